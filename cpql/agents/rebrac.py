"""ReBRAC: Tarasov et al. 2023, Revisiting the Minimalist Approach to Offline Reinforcement Learning.

    critic   (Q_i(s, a) - y)^2,  y = r + gamma (1 - d) (min_j Q'_j(s', a') - beta_2 |a' - a'_data|^2),
             a' = clip(pi'(s') + clip(N(0, policy_noise^2), +-noise_clip), +-1)          at every update
    actor    beta_1 |pi(s) - a|^2 - lambda min_i Q_i(s, pi(s)),  lambda = 1 / mean |min_i Q_i(s, pi(s))|
             and the moves of both targets                                          at every second one

The squares are summed over dimensions, and a'_data is the data's action at s'. It is TD3+BC with penalties of
their own for actor and critic, a LayerNorm after the critic's activations, deeper networks, and on locomotion
large batches with a large learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from cpql.actors import DeterministicConfig
from cpql.agents.agent import Metrics
from cpql.agents.td3 import TD3, TD3Config
from cpql.data.transitions import Batch
from cpql.networks import Initialisation, Norm
from cpql.noise import Noise
from cpql.settings import NonNegative, Positive

__all__ = ["ReBRAC", "ReBRACConfig"]


def _actor() -> DeterministicConfig:
    return DeterministicConfig((256, 256, 256), init="rebrac")


@dataclass(frozen=True)
class ReBRACConfig(TD3Config):
    """Settings of ReBRAC; by default locomotion's. The penalties are tuned by task.

    Attributes:
        actor_penalty: beta_1, weight of the imitation; may be a value for each member.
        critic_penalty: beta_2, weight of the distance to the data in the critic's target; may be a value for
            each member. At 0 the batch needs no next actions.
    """

    actor: DeterministicConfig = field(default_factory=_actor)
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    actor_lr: Positive | tuple[Positive, ...] = 1e-3
    critic_lr: Positive | tuple[Positive, ...] = 1e-3
    critic_layer_norm: Norm = "after"
    critic_init: Initialisation = "rebrac"
    actor_penalty: NonNegative | tuple[NonNegative, ...] = 0.01
    critic_penalty: NonNegative | tuple[NonNegative, ...] = 0.01

    @property
    def next_actions(self) -> str | None:
        """The penalty on the critic, where there is one."""
        return f"agent.critic_penalty={self.critic_penalty}" if self.critic_penalty else None


class ReBRAC(TD3):
    """ReBRAC (Tarasov et al. 2023, Algorithm 1)."""

    config_class = ReBRACConfig
    config: ReBRACConfig
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr", "critic_lr", "actor_penalty", "critic_penalty")
    name = "rebrac"

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Squared Bellman error of both critics; a' far from the data's lowers the target."""
        next_action, penalty = self.next_action(batch, noise), self.settings["critic_penalty"]
        next_q = self.next_q(batch, next_action)
        if batch.next_actions is not None:
            penalty = penalty.unsqueeze(-1) if isinstance(penalty, Tensor) else penalty
            # At the end of an episode the data's next action isn't known: there is no penalty.
            distance = (next_action - batch.next_actions).square().sum(-1).nan_to_num(0.0)
            next_q = next_q - penalty * distance
        return self.q_error(critic, batch, self.bellman_target(batch, next_q))

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`beta_1 |pi(s) - a|^2 - min_i Q_i(s, pi(s)) / mean |min_i Q_i(s, pi(s))|`, mean over the batch."""
        action = self.actor(actor).sample(batch.observations)
        q = self.critic(self.state["critic"]).q(batch.observations, action).amin(-2)
        imitation = (action - batch.actions).square().sum(-1).mean(-1)
        loss = self.settings["actor_penalty"] * imitation - q.mean(-1) / q.abs().mean(-1).detach()
        return loss, {"actor/imitation": imitation, "actor/q": q.mean(-1)}
