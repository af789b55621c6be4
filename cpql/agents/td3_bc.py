"""TD3+BC: Fujimoto and Gu 2021, A Minimalist Approach to Offline Reinforcement Learning.

    critic   (Q_i(s, a) - y)^2,  y = r + gamma (1 - d) min_j Q'_j(s', a'),
             a' = clip(pi'(s') + clip(N(0, policy_noise^2), +-noise_clip), +-1)          at every update
    actor    L = -lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2,  lambda = alpha / mean |Q_1(s, pi(s))|
             and the moves of both targets                                          at every second one

Observations have mean 0 and standard deviation 1 over the dataset (`dataset.normalise_observations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from cpql.actors import DeterministicActor, DeterministicConfig
from cpql.agents.agent import Agent, AgentConfig, Metrics, Step, TargetConfig
from cpql.data.transitions import Batch
from cpql.networks import Activation
from cpql.noise import Draw, Noise
from cpql.optimisation import FlatModule
from cpql.settings import Count, NonNegative, Positive, Widths

__all__ = ["TD3BC", "TD3BCConfig"]


@dataclass(frozen=True)
class TD3BCConfig(AgentConfig):
    """Settings of TD3+BC, the same on every task.

    Attributes:
        alpha: weight of Q against the imitation; may be a value for each member.
        policy_noise: standard deviation of the noise on the target policy's action.
        noise_clip: that noise stays within +- this.
        policy_period: updates between steps of the policy. The targets move at the same updates.
    """

    actor: DeterministicConfig = field(default_factory=DeterministicConfig)
    updates: Count = 1_000_000
    max_grad_norm: Positive | None = None
    critic_hidden: Widths = (256, 256)
    critic_activation: Activation = "relu"
    critic_target: TargetConfig = field(default_factory=lambda: TargetConfig(0.005, period=2))
    actor_target: TargetConfig = field(default_factory=lambda: TargetConfig(0.005, period=2))
    alpha: Positive | tuple[Positive, ...] = 2.5
    policy_noise: NonNegative = 0.2
    noise_clip: NonNegative = 0.5
    policy_period: Count = 2


class TD3BC(Agent):
    """TD3+BC (Fujimoto and Gu 2021, equations 3 to 5)."""

    config_class = TD3BCConfig
    config: TD3BCConfig
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr", "critic_lr", "alpha")
    name = "td3_bc"
    actor: FlatModule[DeterministicActor]

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """A deterministic actor and twin critics."""
        return {"actor": self.new_actor(DeterministicActor, members), "critic": self.new_critic(members)}

    def steps(self) -> Sequence[Step]:
        """The critic's at every update, the actor's less often."""
        c = self.config
        return Step("critic", self.critic_loss), Step("actor", self.actor_loss, c.policy_period)

    def noise(self) -> Mapping[str, Draw]:
        """The noise on the target policy's action."""
        return {"next_action": Draw("normal", (self.config.batch_size, self.action_dim))}

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Squared Bellman error of both critics, with target policy smoothing (Fujimoto et al. 2018)."""
        c, s = self.config, self.state
        with torch.no_grad():
            smoothing = (c.policy_noise * noise["next_action"]).clamp(-c.noise_clip, c.noise_clip)
            next_action = self.actor(s["actor_target"]).sample(batch.next_observations) + smoothing
            next_q = self.critic(s["critic_target"]).q(batch.next_observations, next_action.clamp(-1.0, 1.0))
            target = self.bellman_target(batch, next_q.amin(-2))
        return self.q_error(critic, batch, target)

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`-lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2`, the latter over batch and dimensions."""
        action = self.actor(actor).sample(batch.observations)
        q = self.critic(self.state["critic"]).q(batch.observations, action).select(-2, 0)
        weight = self.settings["alpha"] / q.abs().mean(-1).detach()
        imitation = (action - batch.actions).square().mean((-2, -1))
        return imitation - weight * q.mean(-1), {"actor/imitation": imitation, "actor/q": q.mean(-1)}
