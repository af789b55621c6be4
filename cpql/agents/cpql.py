"""CPQL and CPIQL: Chen, Li and Zhao 2024, Boosting Continuous Control with Consistency Policy.

    critic   CPQL   (Q_i(s, a) - y)^2,  y = r + gamma (1 - d) min_j Q'_j(s', a'),  a' from the actor
             CPIQL  (Q_i(s, a) - (r + gamma (1 - d) V(s')))^2  +  |tau - 1(u < 0)| u^2,
                    u = min_j Q'_j(s, a) - V(s)                      (Kostrikov et al. 2022, eq. 5 and 6)
    actor    L = alpha L_RC + eta L_Q

L_RC is the reconstruction loss `cpql.consistency.denoise`, which the published code optimises; any other
objective can take its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cpql.actors import ActorConfig, ConsistencyActor
from cpql.agents.agent import Metrics
from cpql.agents.generative_agent import GenerativeAgent, GenerativeAgentConfig
from cpql.data.transitions import Batch
from cpql.networks import Norm
from cpql.noise import Noise

__all__ = ["CPQL", "CPQLConfig"]


@dataclass(frozen=True)
class CPQLConfig(GenerativeAgentConfig):
    """Settings of CPQL; the published code's own are `agent=cpql_published`.

    Attributes:
        actor: the consistency actor.
        critic_layer_norm: on, as published for offline training.
        backup_actor: the online actor's action in the critic's target, as published.
        critic: `q` is CPQL, `expectile` is CPIQL.
        expectile: tau of CPIQL's value function.
        expectile_q: whose Q the value function follows: the `target` critic's, as IQL's and CPQL's papers
            have it, or the `online` critic's, as the published code has it (no target at all in CPIQL).
        value_layer_norm: whether CPIQL's value function has the critics' LayerNorm too; the published code's
            has none.
    """

    actor: ActorConfig = field(default_factory=ActorConfig)
    critic_layer_norm: Norm = True
    backup_actor: Literal["target", "online"] = "online"
    critic: Literal["q", "expectile"] = "q"
    expectile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.7
    expectile_q: Literal["target", "online"] = "target"
    value_layer_norm: bool = True


class CPQL(GenerativeAgent):
    """CPQL (Chen et al. 2024, Algorithm 1), or CPIQL with `critic="expectile"`."""

    config_class = CPQLConfig
    config: CPQLConfig

    @property
    def name(self) -> str:
        """By its critic."""
        return "cpiql" if self.has_value else "cpql"

    @property
    def has_value(self) -> bool:
        """Whether the critic has a value function V besides Q: CPIQL's has."""
        return self.config.critic == "expectile"

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """A consistency actor, twin critics and CPIQL's V."""
        actor, critic = self.new_actor(ConsistencyActor, members), self.new_critic(members)
        if self.has_value:
            c = self.config
            critic.value = self.new_value(members, c.value_layer_norm and c.critic_layer_norm)
        return {"actor": actor, "critic": critic}

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """Squared Bellman error of both critics, and CPIQL's expectile loss."""
        if self.config.critic == "q":
            return self.q_error(critic, batch, self.bellman_target(batch, self.next_q(batch, noise)))

        state, action, online = batch.observations, batch.actions, self.critic(critic)
        next_v = online.v(batch.next_observations).detach()
        q_loss, metrics = self.q_error(critic, batch, self.bellman_target(batch, next_v))
        judge = self.critic(self.state["critic_target"] if self.config.expectile_q == "target" else critic)
        with torch.no_grad():
            q = judge.q(state, action).amin(-2).detach()
        advantage = q - online.v(state)
        weight = torch.abs(self.config.expectile - (advantage < 0).to(advantage.dtype))
        v_loss = (weight * advantage.square()).mean(-1)
        q_mean = metrics["critic/q"]
        return q_loss + v_loss, {"critic/q": q_mean, "critic/v": next_v.mean(-1), "critic/v_loss": v_loss}

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`alpha L_RC + eta L_Q`."""
        return self.weighted_loss(actor, batch, noise, self.progress)
