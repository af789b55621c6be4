"""FQL: Park, Li and Levine 2025, Flow Q-Learning.

    critic   mean_i (Q_i(s, a) - y)^2,  y = r + gamma (1 - d) mean_j Q'_j(s', mu(s', z))          (eq. 6)
    flow     |v(s, x_t, t) - (a - z)|^2,  x_t = (1 - t) z + t a                                   (eq. 7)
    actor    alpha |mu(s, z) - flow(s, z)|^2 - lambda mean_i Q_i(s, mu(s, z))                     (eq. 8)

lambda is 1, or 1 / mean |Q| with `q_loss="normalised"`, which makes alpha mean the same on every task. One
optimiser trains all of it on the sum, so all gradients are taken at the weights before the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cpql.actors import OneStepActor, OneStepConfig
from cpql.agents.agent import Agent, Metrics, Step
from cpql.agents.config import ActorCriticConfig, TargetConfig
from cpql.data.transitions import Batch
from cpql.networks import Activation, Initialisation, Norm
from cpql.noise import Draw, Noise
from cpql.optimisation import FlatModule
from cpql.settings import Count, NonNegative, Positive, Widths

__all__ = ["FQL", "FQLConfig"]


@dataclass(frozen=True)
class FQLConfig(ActorCriticConfig):
    """Settings of FQL.

    Attributes:
        actor: the one-step actor and its flow.
        alpha: weight of the distillation against Q; may be a value for each member.
        q_loss: `normalised` divides Q by its size, as the authors advise for new tasks; `plain` doesn't, as
            in the published tables, whose alpha is tuned by task.
        q_aggregation: of the twins' values in the critic's target: `mean`, or `min`, as published for Adroit
            and antmaze-large and -giant.
    """

    actor: OneStepConfig = field(default_factory=OneStepConfig)
    updates: Count = 1_000_000
    max_grad_norm: Positive | None = None
    critic_hidden: Widths = (512, 512, 512, 512)
    critic_layer_norm: Norm = "after"
    critic_activation: Activation = "gelu"
    critic_init: Initialisation = "glorot"
    alpha: NonNegative | tuple[NonNegative, ...] = 1.0
    q_loss: Literal["normalised", "plain"] = "normalised"
    q_aggregation: Literal["mean", "min"] = "mean"


class FQL(Agent):
    """FQL (Park et al. 2025, Algorithm 1)."""

    config_class = FQLConfig
    config: FQLConfig
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr", "critic_lr", "alpha")
    simultaneous = True
    name = "fql"
    actor: FlatModule[OneStepActor]

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """The one-step actor with its flow, and twin critics."""
        return {"actor": self.new_actor(OneStepActor, members), "critic": self.new_critic(members)}

    def steps(self) -> Sequence[Step]:
        """The critic's and the actor's, which is the flow's too."""
        return Step("critic", self.critic_loss), Step("actor", self.actor_loss)

    def targets(self) -> dict[str, TargetConfig]:
        """The critic's alone: the online actor acts in its target."""
        return {"critic": self.config.critic_target}

    def noise(self) -> Mapping[str, Draw]:
        """That of the next action, and the actor's own."""
        size = self.config.batch_size
        return {"next": Draw("normal", (size, self.action_dim)), **self.actor.structure.loss_noise(size)}

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Mean squared Bellman error of the twins, without target smoothing."""
        with torch.no_grad():
            next_noise = noise["next"].unsqueeze(0)
            next_action = self.actor(self.state["actor"]).sample(batch.next_observations, noise=next_noise)
            q = self.critic(self.state["critic_target"]).q(batch.next_observations, next_action)
            next_q = (q.mean(-2) if self.config.q_aggregation == "mean" else q.amin(-2)).detach()
        loss, metrics = self.q_error(critic, batch, self.bellman_target(batch, next_q))
        return 0.5 * loss, metrics

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The flow's imitation, the distillation and Q; the last sees actions clamped to [-1, 1]."""
        state, online = batch.observations, self.actor(actor)
        flow = online.flow_loss(state, batch.actions, noise).mean(-1)
        predicted = online.predict(state, noise["start"])
        distillation = online.distillation_loss(predicted, state, noise["start"]).mean(-1)
        q = self.critic(self.state["critic"]).q(state, predicted.clamp(-1.0, 1.0)).mean(-2)
        q_loss = -q.mean(-1)
        if self.config.q_loss == "normalised":
            q_loss = q_loss / q.abs().mean(-1).detach()
        loss = flow + self.settings["alpha"] * distillation + q_loss
        return loss, {"actor/flow": flow, "actor/distillation": distillation, "actor/q": q.mean(-1)}
