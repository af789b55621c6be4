"""Diffusion-QL: Wang, Hunt and Zhou 2023, Diffusion Policies as an Expressive Policy Class.

    critic   (Q_i(s, a) - y)^2,  y = r + gamma (1 - d) min_j Q'_j(s', a'),  a' from the target actor
    actor    L = L_d + eta L_Q,  L_d = |eps(sqrt(ab) a + sqrt(1 - ab) z, t, s) - z|^2 / A      (eq. 1 to 3)

It is the learner that Consistency-AC and CPQL started from. With `policy_action="denoised"` the Q-loss takes
EDP's action (Kang et al. 2023, Efficient Diffusion Policies): a noised action of the data, denoised in one
step, so that no gradient flows through T steps of sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from cpql.actors import DiffusionActor, DiffusionConfig
from cpql.agents.agent import Metrics
from cpql.agents.config import TargetConfig
from cpql.agents.generative_agent import GenerativeAgent, GenerativeAgentConfig
from cpql.data.transitions import Batch
from cpql.noise import Noise
from cpql.optimisation import FlatModule

__all__ = ["DiffusionQL", "DiffusionQLConfig"]


@dataclass(frozen=True)
class DiffusionQLConfig(GenerativeAgentConfig):
    """Settings of Diffusion-QL.

    Attributes:
        actor: the diffusion actor.
        actor_target: as published, from update 1,001 on at every fifth update.
        policy_action: of the Q-loss: `sampled` in T steps, or `denoised` in one, as in EDP.
    """

    actor: DiffusionConfig = field(default_factory=DiffusionConfig)
    actor_target: TargetConfig = field(default_factory=lambda: TargetConfig(0.005, period=5, start=1_001))
    policy_action: Literal["sampled", "denoised"] = "sampled"


class DiffusionQL(GenerativeAgent):
    """Diffusion-QL (Wang et al. 2023, Algorithm 1)."""

    config_class = DiffusionQLConfig
    config: DiffusionQLConfig
    name = "diffusion_ql"
    actor_class = DiffusionActor
    actor: FlatModule[DiffusionActor]

    def policy_action(self, actor: Tensor, batch: Batch, noise: Noise) -> Tensor:
        """The action of the Q-loss, [*members, B, A]."""
        if self.config.policy_action == "sampled":
            return super().policy_action(actor, batch, noise)
        return self.actor(actor).denoised(batch.observations, batch.actions, noise)

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Squared Bellman error of both critics."""
        return self.q_error(critic, batch, self.bellman_target(batch, self.next_q(batch, noise)))

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`alpha L_d + eta L_Q`."""
        return self.weighted_loss(actor, batch, noise, self.progress)
