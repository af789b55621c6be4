"""IQL: Kostrikov, Nair and Levine 2022, Offline Reinforcement Learning with Implicit Q-Learning.

    V        |tau - 1(u < 0)| u^2,  u = min_j Q'_j(s, a) - V(s)                          (eq. 5)
    critic   (Q_i(s, a) - (r + gamma (1 - d) V(s')))^2                                    (eq. 6)
    actor    -min(exp(beta u), 100) log pi(a | s)                                         (eq. 7)

No action outside the data is ever valued. With a deterministic actor `-log pi` is the squared error, summed
over dimensions. V steps first, and actor and critic see the new V, as in Algorithm 1 and the authors' code;
CORL's takes all gradients at the weights before the update (`order="together"`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cpql.actors import ACTORS, DeterministicActor, DeterministicConfig, GaussianActor, GaussianConfig
from cpql.agents.agent import Agent, Metrics, Step
from cpql.agents.config import ActorCriticConfig, TargetConfig
from cpql.critics import ValueFunction
from cpql.data.transitions import Batch
from cpql.networks import Activation
from cpql.noise import Draw, Noise
from cpql.optimisation import FlatModule
from cpql.settings import Count, NonNegative, Positive, Widths

__all__ = ["IQL", "IQLConfig"]

LARGEST_WEIGHT = 100.0
Expectile = Annotated[float, Field(gt=0.0, lt=1.0)]


@dataclass(frozen=True)
class IQLConfig(ActorCriticConfig):
    """Settings of IQL.

    Attributes:
        actor: a Gaussian actor, or a deterministic one.
        lr_decay: the actor's rate falls to zero over the training, as published.
        value_lr: Adam's learning rate for V.
        expectile: tau of the value function; may be a value for each member.
        beta: inverse temperature of the advantages; may be a value for each member.
        order: V steps before the others see it (`value_first`), or all step `together`, as in CORL's code.
    """

    actor: GaussianConfig | DeterministicConfig = field(default_factory=GaussianConfig)
    updates: Count = 1_000_000
    lr_decay: Literal["none", "cosine", "actor_cosine"] = "actor_cosine"
    max_grad_norm: Positive | None = None
    value_lr: Positive | tuple[Positive, ...] = 3e-4
    critic_hidden: Widths = (256, 256)
    critic_activation: Activation = "relu"
    expectile: Expectile | tuple[Expectile, ...] = 0.7
    beta: NonNegative | tuple[NonNegative, ...] = 3.0
    order: Literal["value_first", "together"] = "value_first"


class IQL(Agent):
    """IQL (Kostrikov et al. 2022, Algorithm 1)."""

    config_class = IQLConfig
    config: IQLConfig
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr", "critic_lr", "value_lr", "expectile", "beta")
    name = "iql"
    actor: FlatModule[GaussianActor | DeterministicActor]
    value: FlatModule[ValueFunction]

    @property
    def simultaneous(self) -> bool:
        """Whether all gradients are taken before any network moves."""
        return self.config.order == "together"

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """The actor, twin critics, and V."""
        actor = self.new_actor(ACTORS[self.config.actor.kind], members)
        critic, value = self.new_critic(members), self.new_value(members, self.config.critic_layer_norm)
        return {"actor": actor, "critic": critic, "value": value}

    def steps(self) -> Sequence[Step]:
        """V's, then the actor's and the critic's."""
        return (
            Step("value", self.value_loss),
            Step("actor", self.actor_loss),
            Step("critic", self.critic_loss),
        )

    def targets(self) -> dict[str, TargetConfig]:
        """The critic's alone."""
        return {"critic": self.config.critic_target}

    def noise(self) -> Mapping[str, Draw]:
        """That of the actor's dropout, where it has some."""
        return self.actor.structure.loss_noise(self.config.batch_size)

    @torch.no_grad()
    def target_q(self, batch: Batch) -> Tensor:
        """`min_j Q'_j(s, a)` of the data's actions, [*members, B]."""
        target = self.critic(self.state["critic_target"])
        return target.q(batch.observations, batch.actions).amin(-2).detach()

    def value_loss(self, value: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The expectile loss of V, mean over the batch."""
        v, tau = self.value(value).forward(batch.observations), self.settings["expectile"]
        advantage = self.target_q(batch) - v
        tau = tau.unsqueeze(-1) if isinstance(tau, Tensor) else tau
        loss = ((tau - (advantage < 0).float()).abs() * advantage.square()).mean(-1)
        return loss, {"critic/v": v.mean(-1)}

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The mean squared Bellman error of the twins."""
        with torch.no_grad():
            next_v = self.value(self.state["value"]).forward(batch.next_observations).detach()
        loss, metrics = self.q_error(critic, batch, self.bellman_target(batch, next_v))
        return 0.5 * loss, metrics

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Advantage-weighted imitation; the weight is at most 100."""
        beta, kind = self.settings["beta"], self.config.actor
        beta = beta.unsqueeze(-1) if isinstance(beta, Tensor) else beta
        with torch.no_grad():
            v = self.value(self.state["value"]).forward(batch.observations)
            weight = torch.exp(beta * (self.target_q(batch) - v)).clamp(max=LARGEST_WEIGHT).detach()
        imitation, _ = self.actor(actor).loss(batch.observations, batch.actions, noise=noise)
        if isinstance(kind, DeterministicConfig):
            imitation = imitation * self.action_dim
        metrics = {"actor/imitation": imitation.mean(-1), "actor/weight": weight.mean(-1)}
        return (weight * imitation).mean(-1), metrics
