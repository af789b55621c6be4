"""TorchRL: an actor as a TensorDict module, and the imitation objective as a loss module.

    policy = ConsistencyModule(ConsistencyActor(3, 1, ActorConfig("ct", t_max=5.0)))
    collector = Collector(TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling()), policy, ...)
    loss = ConsistencyLoss(policy)
    updater = SoftUpdate(loss, tau=0.005)
    loss(batch)["loss_imitation"].backward()

Actions are in [-1, 1]; TorchRL's transform `ActionScaling` maps them to an environment's bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpql.actors import Actor, ConsistencyActor
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
    """An actor that explores as TorchRL's present exploration type says."""

    def __init__(self, actor: Actor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, state: Tensor) -> Tensor:
        explores = exploration_type() in (None, ExplorationType.RANDOM)
        noise = None if explores else state.new_zeros(self.actor.noise_shape(*state.shape[:-1]))
        return self.actor.sample(state, noise=noise)


class ConsistencyModule(TensorDictModule):  # type: ignore[misc]
    """A policy for collectors, rollouts and losses, which reads a state and writes an action.

    Under `set_exploration_type(ExplorationType.RANDOM)`, which collectors set, it draws noise; under the
    other types, of which DETERMINISTIC is TorchRL's default, noise is zero. The actor is `module.actor`.

    TorchRL's losses act deterministically. A loss whose gradient should flow through the sampling steps, such
    as `DDPGLoss`, needs noise: `loss.deterministic_sampling_mode = ExplorationType.RANDOM`.

    Args:
        actor: any actor without members.
        in_key: key of the state [..., S].
        out_key: key of the action [..., A] in [-1, 1].
    """

    def __init__(
        self, actor: Actor, in_key: NestedKey = "observation", out_key: NestedKey = "action"
    ) -> None:
        super().__init__(_Acting(actor), in_keys=[in_key], out_keys=[out_key])


class ConsistencyLoss(LossModule):  # type: ignore[misc]
    """The imitation objective of a consistency actor, `ConsistencyActor.loss`, on a batch.

    It returns a TensorDict with `loss_imitation` and, without gradient, the objective's metrics, averaged
    over the batch. `set_keys(action=...)` names the key of the actions. Assign the fraction of the training
    that is done, in [0, 1], to `loss.progress`, for the objectives with a curriculum.

    Args:
        actor_network: a `ConsistencyModule` with a consistency actor; the batch has the state under its key.
        delay_actor: whether to keep target parameters, which TorchRL's `SoftUpdate` moves, as the teacher.
            Only `ct`, `cd` and `shortcut` use a teacher other than the actor itself.
        reduction: "mean", "sum" or "none", over the batch.
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
        """Do nothing: no value is estimated."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys that are read from a batch."""
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
            teacher = actor.config.function(network) if self.delay_actor else None
            loss, metrics = actor.loss(state, action, teacher=teacher, progress=self.progress, noise=noise)
        means = {name: value.detach().mean() for name, value in metrics.items()}
        return TensorDict({"loss_imitation": self._reduce_loss(loss, tensordict), **means})
