"""TorchRL: a consistency actor as a TensorDict module, and its imitation objective as a loss module.

    policy = ConsistencyModule(ConsistencyActor(3, 1, ActorConfig("ct", t_max=5.0)))
    collector = Collector(TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling()), policy, ...)
    loss = ConsistencyLoss(policy)
    updater = SoftUpdate(loss, tau=0.005)
    loss(batch)["loss_imitation"].backward()

Actions are in [-1, 1]; TorchRL's transform `ActionScaling` makes them so in an environment with other bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpql.actors.consistency import ConsistencyActor
from cpql.errors import ConfigError
from cpql.noise import draw

try:
    from tensordict import TensorDict, TensorDictBase, TensorDictParams
    from tensordict.nn import TensorDictModule, dispatch
    from tensordict.utils import NestedKey
    from torchrl.envs.utils import ExplorationType, exploration_type
    from torchrl.objectives import LossModule
except ImportError:
    raise ConfigError("cpql.interop.torchrl needs TorchRL: pip install 'cpql[torchrl]'") from None

__all__ = ["ConsistencyLoss", "ConsistencyModule"]


class _Acting(nn.Module):
    """An actor that explores as TorchRL wants it at the moment."""

    def __init__(self, actor: ConsistencyActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, state: Tensor) -> Tensor:
        if exploration_type() in (None, ExplorationType.RANDOM):
            return self.actor.sample(state)
        return self.actor.sample(
            state,
            noise=torch.zeros(
                self.actor.noise_shape(*state.shape[:-1]), device=state.device, dtype=state.dtype
            ),
        )


class ConsistencyModule(TensorDictModule):  # type: ignore[misc]
    """A policy for collectors, environments' rollouts and losses: reads a state, writes an action.

    It heeds `set_exploration_type`: with RANDOM, which collectors set, noise is drawn, and with the others,
    of which DETERMINISTIC is TorchRL's default, it is zero. The actor is `module.actor`.

    TorchRL's losses act deterministically. Those whose gradient is to flow through the sampling steps, as of
    `DDPGLoss`, want noise: `loss.deterministic_sampling_mode = ExplorationType.RANDOM`.

    Args:
        actor: a consistency actor without members.
        in_key: of the state [..., S].
        out_key: of the action [..., A] in [-1, 1].
    """

    def __init__(
        self, actor: ConsistencyActor, in_key: NestedKey = "observation", out_key: NestedKey = "action"
    ) -> None:
        super().__init__(_Acting(actor), in_keys=[in_key], out_keys=[out_key])


class ConsistencyLoss(LossModule):  # type: ignore[misc]
    """The actor's imitation objective, `ConsistencyActor.loss`, of the states and actions in a batch.

    `loss.progress` is the share of the training that is done, in [0, 1], for the objectives that have a
    curriculum: assign a number to it as training goes on.

    Args:
        actor_network: a `ConsistencyModule`; its state is what the batch has under the same key.
        delay_actor: keep target parameters, which TorchRL's `SoftUpdate` moves, as the teacher. Only `ct`,
            `cd` and `shortcut` ask a teacher other than the actor itself.
        reduction: "mean", "sum" or "none", over the batch.

    Returns, as a TensorDict: `loss_imitation`, and the objective's metrics without gradient, means over the
    batch. `set_keys(action=...)` names the key that actions are read from.
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"

    default_keys = _AcceptedKeys
    out_keys = ("loss_imitation",)
    _schedulable_buffers = frozenset({"progress"})

    actor_network: ConsistencyModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams

    def __init__(
        self, actor_network: ConsistencyModule, *, delay_actor: bool = True, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)
        self.delay_actor, self.reduction = delay_actor, reduction
        self.register_buffer("progress", torch.zeros(()))

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """There is no value to estimate."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """What is read of a batch."""
        return [*self.actor_network.in_keys, self.tensor_keys.action]

    @dispatch  # type: ignore[untyped-decorator]
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The loss of a batch of any shape."""
        actor: ConsistencyActor = self.actor_network.module.actor
        state = tensordict.get(self.actor_network.in_keys[0])
        action = tensordict.get(self.tensor_keys.action)
        noise = draw(actor.loss_noise(*state.shape[:-1]), device=state.device, dtype=state.dtype)

        def network(x: Tensor, *times: Tensor) -> Tensor:
            with self.target_actor_network_params.to_module(self.actor_network):
                return actor.predict(state, x, *times, drop=noise.get("drop"))

        with self.actor_network_params.to_module(self.actor_network):
            loss, metrics = actor.loss(
                state,
                action,
                teacher=actor.config.function(network) if self.delay_actor else None,
                progress=self.progress,
                noise=noise,
            )
        means = {name: value.detach().mean() for name, value in metrics.items()}
        return TensorDict({"loss_imitation": self._reduce_loss(loss, tensordict), **means})
