"""Stable-Baselines3: our actor in its TD3, and its replay buffer as our data.

    model = TD3(ConsistencyTD3Policy, "Pendulum-v1", policy_kwargs={"actor_config": ActorConfig(t_max=5.0)})
    model.learn(10_000)
    data = transitions(model.replay_buffer)

Training, saving and loading are SB3's own. The other direction needs nothing: `cpql.Policy.predict` has SB3's
contract, so that `evaluate_policy(policy, env)` scores it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from cpql.actors import ActorConfig, ConsistencyActor
from cpql.data.transitions import Batch, Transitions
from cpql.errors import ConfigError, DataError

try:
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples, Schedule
    from stable_baselines3.td3.policies import Actor, TD3Policy
except ImportError:
    raise ConfigError("cpql.interop.sb3 needs Stable-Baselines3: pip install 'cpql[sb3]'") from None

__all__ = ["ConsistencyTD3Policy", "batch", "transitions"]


class _ConsistencyActor(Actor):
    """SB3's actor, whose layers `mu` are a consistency actor."""

    def __init__(self, config: ActorConfig, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "net_arch": []})
        self.mu: ConsistencyActor = ConsistencyActor(  # type: ignore[assignment]
            self.features_dim, spaces.flatdim(self.action_space), config
        )

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        state = self.extract_features(observation, self.features_extractor)
        noise = state.new_zeros(self.mu.noise_shape(*state.shape[:-1])) if deterministic else None
        return self.mu.sample(state, noise=noise)


class ConsistencyTD3Policy(TD3Policy):
    """A policy for SB3's TD3 whose actor is a `cpql.ConsistencyActor`, `model.actor.mu`.

    TD3's gradient flows through all sampling steps. Noise comes from torch's global generator, which SB3
    seeds; with `deterministic=True`, the default of SB3's `evaluate_policy`, it is zero, as in
    `cpql.Policy.predict`. Where the actor has several modes, that action may lie between them.

    Args:
        observation_space: see SB3's `TD3Policy`, as for the next two and all other keywords.
        action_space: a box of actions.
        lr_schedule: the learning rate of both optimisers.
        net_arch: widths of the critic's layers; `activation_fn` is the critic's too.
        actor_config: the actor's, with its widths; by default one step from `t_max=5`.

    Raises:
        ConfigError: `net_arch` has layers for an actor.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        actor_config: ActorConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(net_arch, dict) and net_arch.get("pi"):
            raise ConfigError(
                f"net_arch: 'pi' is {net_arch['pi']}: expected [], the actor's widths are actor_config.hidden"
            )
        self.actor_config = actor_config or ActorConfig(t_max=5.0)
        super().__init__(observation_space, action_space, lr_schedule, net_arch=net_arch, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "actor_config": self.actor_config}

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        """Make an actor; SB3 makes two, the second one the target."""
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return _ConsistencyActor(self.actor_config, **kwargs).to(self.device)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self.actor._predict(observation, deterministic)


def transitions(buffer: ReplayBuffer, id: str = "") -> Transitions:
    """Turn the content of a replay buffer into a dataset, episode by episode.

    Time limits truncate if the buffer distinguishes them from terminations, as it does by default
    (`handle_timeout_termination`). A full buffer may have overwritten the beginning of each environment's
    oldest episode, which then counts as a shorter one.

    Args:
        buffer: an off-policy agent's, which stores actions scaled to [-1, 1]; one that was filled by hand
            must hold such actions too.
        id: the dataset's name.

    Raises:
        DataError: observations aren't vectors, actions aren't numbers in [-1, 1], or the buffer doesn't keep
            next observations.
    """
    where = id or type(buffer).__name__
    both = buffer.observation_space, buffer.action_space
    if not all(isinstance(space, spaces.Box) for space in both):
        raise DataError(f"{where}: its spaces are {both[0]} and {both[1]}: expected a Box for both")
    if buffer.optimize_memory_usage:
        raise DataError(
            f"{where}: an episode's last observation isn't kept: expected optimize_memory_usage=False"
        )
    order = np.roll(np.arange(buffer.buffer_size), -buffer.pos) if buffer.full else np.arange(buffer.pos)

    def rows(array: NDArray[Any]) -> NDArray[Any]:
        """[time, environments, ...] as [environments x time, ...]."""
        return array[order].swapaxes(0, 1).reshape(-1, *array.shape[2:])

    names = ("observations", "actions", "rewards", "next_observations", "timeouts", "dones")
    columns = {name: rows(getattr(buffer, name)) for name in names}
    columns["terminals"] = columns.pop("dones") * (1 - columns["timeouts"])
    details = {
        "buffer": type(buffer).__name__,
        "environments": buffer.n_envs,
        "overwritten": buffer.full,
        "time_limits_known": buffer.handle_timeout_termination,
    }
    return Transitions.from_dict(columns, source="stable-baselines3", id=id, details=details)


def batch(samples: ReplayBufferSamples) -> Batch:
    """Turn single-step samples of a replay buffer into a batch for `agent.update`."""
    if samples.discounts is not None:
        raise DataError("samples of several steps: expected n_steps=1, or cpql.data.transforms.n_step")
    return Batch(
        samples.observations.float(),
        samples.actions,
        samples.rewards.squeeze(-1),
        samples.next_observations.float(),
        1.0 - samples.dones.squeeze(-1),
    )
