"""What the offline variants of TD3 share: Fujimoto, van Hoof and Meger 2018, with a term that imitates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cpql.actors import DeterministicActor, DeterministicConfig
from cpql.agents.agent import Agent, Metrics, Step
from cpql.agents.config import ActorCriticConfig, TargetConfig
from cpql.data.transitions import Batch
from cpql.networks import Activation
from cpql.noise import Draw, Noise
from cpql.optimisation import FlatModule
from cpql.settings import Count, NonNegative, Positive

__all__ = ["TD3", "TD3Config"]


def _every_second() -> TargetConfig:
    return TargetConfig(0.005, period=2)


@dataclass(frozen=True)
class TD3Config(ActorCriticConfig):
    """Settings that the variants of TD3 share.

    Attributes:
        actor: the deterministic actor.
        actor_target: how the target actor follows, as the critic's does.
        policy_noise: standard deviation of the noise on the target policy's action.
        noise_clip: that noise stays within +- this.
        policy_period: updates between steps of the policy. The targets move at the same updates.
    """

    actor: DeterministicConfig = field(default_factory=DeterministicConfig)
    updates: Count = 1_000_000
    max_grad_norm: Positive | None = None
    critic_activation: Activation = "relu"
    critic_target: TargetConfig = field(default_factory=_every_second)
    actor_target: TargetConfig = field(default_factory=_every_second)
    policy_noise: NonNegative = 0.2
    noise_clip: NonNegative = 0.5
    policy_period: Count = 2


class TD3(Agent):
    """A deterministic actor that steps less often than its twin critics. A subclass writes both losses."""

    config: TD3Config
    actor: FlatModule[DeterministicActor]

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The critic's loss [*members], as a function of its flat weights."""
        raise NotImplementedError

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The actor's loss [*members], as a function of its flat weights."""
        raise NotImplementedError

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """A deterministic actor and twin critics."""
        return {"actor": self.new_actor(DeterministicActor, members), "critic": self.new_critic(members)}

    def steps(self) -> Sequence[Step]:
        """The critic's at every update, the actor's less often."""
        return Step("critic", self.critic_loss), Step("actor", self.actor_loss, self.config.policy_period)

    def noise(self) -> Mapping[str, Draw]:
        """The noise on the target policy's action."""
        return {"next_action": Draw("normal", (self.config.batch_size, self.action_dim))}

    @torch.no_grad()
    def next_action(self, batch: Batch, noise: Noise) -> Tensor:
        """`clip(pi'(s') + clip(N(0, policy_noise^2), +-noise_clip), +-1)`, [*members, B, A]."""
        c = self.config
        smoothing = (c.policy_noise * noise["next_action"]).clamp(-c.noise_clip, c.noise_clip)
        action = self.actor(self.state["actor_target"]).sample(batch.next_observations)
        return (action + smoothing).clamp(-1.0, 1.0).detach()

    @torch.no_grad()
    def next_q(self, batch: Batch, next_action: Tensor) -> Tensor:
        """`min_j Q'_j(s', a')`, [*members, B]."""
        target = self.critic(self.state["critic_target"])
        return target.q(batch.next_observations, next_action).amin(-2).detach()
