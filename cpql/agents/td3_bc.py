"""TD3+BC: Fujimoto and Gu 2021, A Minimalist Approach to Offline Reinforcement Learning.

    critic   (Q_i(s, a) - y)^2,  y = r + gamma (1 - d) min_j Q'_j(s', a'),
             a' = clip(pi'(s') + clip(N(0, policy_noise^2), +-noise_clip), +-1)          at every update
    actor    L = -lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2,  lambda = alpha / mean |Q_1(s, pi(s))|
             and the moves of both targets                                          at every second one

Observations have mean 0 and standard deviation 1 over the dataset (`dataset.normalise_observations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cpql.agents.agent import Metrics
from cpql.agents.td3 import TD3, TD3Config
from cpql.data.transitions import Batch
from cpql.noise import Noise
from cpql.settings import Positive, Widths

__all__ = ["TD3BC", "TD3BCConfig"]


@dataclass(frozen=True)
class TD3BCConfig(TD3Config):
    """Settings of TD3+BC, the same on every task.

    Attributes:
        alpha: weight of Q against the imitation; may be a value for each member.
    """

    critic_hidden: Widths = (256, 256)
    alpha: Positive | tuple[Positive, ...] = 2.5


class TD3BC(TD3):
    """TD3+BC (Fujimoto and Gu 2021, equations 3 to 5)."""

    config_class = TD3BCConfig
    config: TD3BCConfig
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr", "critic_lr", "alpha")
    name = "td3_bc"

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Squared Bellman error of both critics, with target policy smoothing (Fujimoto et al. 2018)."""
        next_q = self.next_q(batch, self.next_action(batch, noise))
        return self.q_error(critic, batch, self.bellman_target(batch, next_q))

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`-lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2`, the latter over batch and dimensions."""
        action = self.actor(actor).sample(batch.observations)
        q = self.critic(self.state["critic"]).q(batch.observations, action).select(-2, 0)
        weight = self.settings["alpha"] / q.abs().mean(-1).detach()
        imitation = (action - batch.actions).square().mean((-2, -1))
        return imitation - weight * q.mean(-1), {"actor/imitation": imitation, "actor/q": q.mean(-1)}
