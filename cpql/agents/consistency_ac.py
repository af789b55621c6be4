"""Consistency-AC: Ding and Jin 2023, Consistency Models as a Rich and Efficient Policy Class for RL.

    critic   (Q_i(s, a) - y)^2,  y = r + gamma (1 - d) min_j Q'_j(s', a'),  a' from the EMA actor
    actor    L = alpha L_CT + eta L_Q

L_CT is consistency training on the data with the EMA actor as teacher, `cpql.consistency.ct`. The gradient
of L_Q flows through all sampling steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cpql.actors import ActorConfig
from cpql.agents.agent import Metrics
from cpql.agents.generative_agent import GenerativeAgent, GenerativeAgentConfig
from cpql.data.transitions import Batch
from cpql.noise import Noise
from cpql.settings import Positive

__all__ = ["ConsistencyAC", "ConsistencyACConfig"]


@dataclass(frozen=True)
class ConsistencyACConfig(GenerativeAgentConfig):
    """Settings of Consistency-AC; the published code's own are `agent=consistency_ac_published`.

    Attributes:
        actor: consistency training, two steps, the second at 0.8 (published: 2.0), with EDM's input scaling
            (published: none). Its loss is weighted by 100 / (t_{n+1} - t_n): the published `scale` column
            says otherwise for some tasks, but never reaches the code's agent, so all published eta belong to
            this weight.
        q_normalisation: divide the critic's targets by their standard deviation over the batch, as the
            published code does on some tasks: a moving target that also drops the scale of rewards.
        curriculum_restarts: how often the N(k) curriculum runs in one training, the last time perhaps in
            part; 1 is the paper's, the published code restarts it every 50,000 updates.
    """

    actor: ActorConfig = field(
        default_factory=lambda: ActorConfig(
            objective="ct", objective_options={"weight": "interval", "scale": 100.0}, refinements=(0.8,)
        )
    )
    q_normalisation: bool = False
    curriculum_restarts: Positive = 1.0


class ConsistencyAC(GenerativeAgent):
    """Consistency-AC (Ding and Jin 2023, Algorithm 1)."""

    config_class = ConsistencyACConfig
    config: ConsistencyACConfig
    name = "consistency_ac"

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Squared Bellman error of both critics."""
        target = self.bellman_target(batch, self.next_q(batch, noise))
        if self.config.q_normalisation:
            target = target / (target.std(-1, keepdim=True) + 1e-6)
        return self.q_error(critic, batch, target)

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`alpha L_CT + eta L_Q`; the paper's alpha is 1, and 0 online."""
        c = self.config
        if c.curriculum_restarts == 1:
            return self.weighted_loss(actor, batch, noise, self.progress)
        length = c.updates / c.curriculum_restarts
        progress = torch.remainder(self.state["step"], length) / length
        return self.weighted_loss(actor, batch, noise, progress)
