"""What a policy's `config.json` holds: everything but weights that acting takes, and its provenance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from cpql.actors import AnyActorConfig
from cpql.deploy.folded import LARGEST
from cpql.errors import ConfigError
from cpql.networks import Activation, Norm
from cpql.settings import Candidates, NonNegative, Width
from cpql.tasks import Task

__all__ = ["PolicyConfig"]

Bounded = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Deviation = Annotated[float, Field(gt=0, le=LARGEST)]


@dataclass(frozen=True)
class PolicyConfig:
    """Everything but weights that acting takes, and where the policy came from.

    Attributes:
        state_dim: width S of observations.
        action_dim: width A of actions.
        action_low: the environment's lower bounds [A].
        action_high: its upper bounds [A], above the lower ones.
        actor: the actor's config, whose `kind` names its class in `cpql.actors.ACTORS`.
        critic_hidden: widths of the critic's hidden layers; empty where the policy has no critic.
        critic_layer_norm: whether and where the critic has LayerNorm, see `cpql.networks.Norm`.
        candidates: how many actions compete by value when acting; 1 is the actor alone.
        temperature: of that choice; 0 takes the best.
        task: the task that the policy was trained for.
        origin: provenance: agent, step, seed, versions and dataset.
        observation_mean: subtracted from observations [S]; empty where they aren't normalised.
        observation_std: divides them then [S].
        critic_activation: between the critic's layers.

    Raises:
        ConfigError: a list of the wrong length, bounds in the wrong order, or candidates without a critic.
    """

    state_dim: Width
    action_dim: Width
    action_low: tuple[Bounded, ...]
    action_high: tuple[Bounded, ...]
    actor: AnyActorConfig
    critic_hidden: Annotated[tuple[Width, ...], Field(max_length=64)]
    critic_layer_norm: Norm
    candidates: Candidates
    temperature: NonNegative
    task: Task
    origin: dict[str, Any] = field(default_factory=dict)
    observation_mean: tuple[Bounded, ...] = ()
    observation_std: tuple[Deviation, ...] = ()
    critic_activation: Activation = "mish"

    def __post_init__(self) -> None:
        normalised = self.state_dim if self.observation_mean or self.observation_std else 0
        for key, width in (
            ("action_low", self.action_dim),
            ("action_high", self.action_dim),
            ("observation_mean", normalised),
            ("observation_std", normalised),
        ):
            found = len(getattr(self, key))
            if found != width:
                raise ConfigError(f"{key}: expected {width:,} values, found {found:,}")
        for low, high in zip(self.action_low, self.action_high, strict=True):
            if not low < high:
                raise ConfigError(
                    f"action_low, action_high: expected the lower first, found {low} and {high}"
                )
        if self.candidates > 1 and not self.critic_hidden:
            raise ConfigError(f"candidates={self.candidates}: expected 1 for a policy without a critic")
