"""What a policy's `config.json` holds: everything but weights that acting takes, and its provenance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from cpql.actors import AnyActorConfig
from cpql.deploy.folded import LARGEST
from cpql.errors import ConfigError
from cpql.networks import Activation
from cpql.settings import Candidates, NonNegative, Width
from cpql.tasks import Task

__all__ = ["PolicyConfig"]

SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class PolicyConfig:
    """Everything but weights that acting takes, and where the policy came from.

    Attributes:
        state_dim: width S of observations.
        action_dim: width A of actions.
        action_low: the environment's lower bounds [A].
        action_high: its upper bounds [A], above the lower ones.
        actor: the actor's config, whose `kind` names the actor's class in `cpql.actors.ACTORS`.
        critic_hidden: widths of the critic's hidden layers; empty where the policy has no critic.
        critic_layer_norm: whether the critic has LayerNorm.
        candidates: how many actions compete by value when acting, 1 to 10,000; 1 is the actor alone.
        temperature: of that choice, 0 or more; 0 takes the best.
        task: the task that the policy was trained for.
        origin: provenance: agent, step, seed, versions and dataset.
        observation_mean: subtracted from observations [S]; empty where they aren't normalised.
        observation_std: divides them then [S], above 0.
        critic_activation: between the critic's layers, `mish` or `relu`.

    Raises:
        ConfigError: a number out of range, a list of the wrong length, or candidates without a critic.
    """

    state_dim: Width
    action_dim: Width
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    actor: AnyActorConfig
    critic_hidden: Annotated[tuple[Width, ...], Field(max_length=64)]
    critic_layer_norm: bool
    candidates: Candidates
    temperature: NonNegative
    task: Task
    origin: dict[str, Any] = field(default_factory=dict)
    observation_mean: tuple[float, ...] = ()
    observation_std: tuple[float, ...] = ()
    critic_activation: Activation = "mish"

    def __post_init__(self) -> None:
        normalised = self.state_dim if self.observation_mean or self.observation_std else 0
        for key, width, least in (
            ("action_low", self.action_dim, -LARGEST),
            ("action_high", self.action_dim, -LARGEST),
            ("observation_mean", normalised, -LARGEST),
            ("observation_std", normalised, SMALLEST),
        ):
            values = getattr(self, key)
            if len(values) != width:
                raise ConfigError(f"{key}: expected {width:,} values, found {len(values):,}")
            for value in values:
                if not least <= value <= LARGEST:
                    raise ConfigError(f"{key}: expected a number in [{least:g}, {LARGEST:g}], found {value}")
        for low, high in zip(self.action_low, self.action_high, strict=True):
            if not low < high:
                raise ConfigError(
                    f"action_low, action_high: expected the lower first, found {low} and {high}"
                )
        if self.candidates > 1 and not self.critic_hidden:
            raise ConfigError(f"candidates={self.candidates}: expected 1 for a policy without a critic")
