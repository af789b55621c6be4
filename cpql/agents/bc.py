"""BC: behaviour cloning, the imitation loss of any actor and nothing else.

A deterministic actor has the squared error, a Gaussian one the likelihood, and a consistency, diffusion, flow
or one-step actor its generative loss. It is the row without Q in a table of agents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from cpql.actors import ACTORS, Actor, AnyActorConfig, GaussianConfig
from cpql.agents.agent import Agent, Metrics, Step
from cpql.agents.config import AgentConfig, TargetConfig
from cpql.data.transitions import Batch
from cpql.noise import Draw, Noise
from cpql.optimisation import FlatModule
from cpql.settings import Count, Positive

__all__ = ["BC", "BCConfig"]


@dataclass(frozen=True)
class BCConfig(AgentConfig):
    """Settings of behaviour cloning.

    Attributes:
        actor: the actor, of any kind.
        actor_target: how the target (EMA) actor follows, which teaches the objectives that have a teacher.
    """

    actor: AnyActorConfig = field(default_factory=GaussianConfig)
    updates: Count = 1_000_000
    max_grad_norm: Positive | None = None
    actor_target: TargetConfig = field(default_factory=TargetConfig)


class BC(Agent):
    """Behaviour cloning with any actor, without a critic."""

    config_class = BCConfig
    config: BCConfig
    name = "bc"
    actor: FlatModule[Actor]

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """The actor alone."""
        return {"actor": self.new_actor(ACTORS[self.config.actor.kind], members)}

    def steps(self) -> Sequence[Step]:
        """One step on the imitation loss."""
        return (Step("actor", self.actor_loss),)

    def targets(self) -> dict[str, TargetConfig]:
        """The teacher of a consistency actor."""
        return {"actor": self.config.actor_target} if self.config.actor.kind == "consistency" else {}

    def noise(self) -> Mapping[str, Draw]:
        """What the actor's loss draws."""
        return self.actor.structure.loss_noise(self.config.batch_size)

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The actor's imitation loss, mean over the batch."""
        return self.imitation_loss(actor, batch, noise, self.progress)
