"""What the actor-critic agents with a generative actor share: imitation, and a Q-loss through samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cpql.actors import Actor, ActorConfig, ConsistencyActor
from cpql.agents.agent import Agent, Metrics, Step
from cpql.agents.config import ActorCriticConfig, TargetConfig
from cpql.data.transitions import Batch
from cpql.noise import Draw, Noise
from cpql.optimisation import FlatModule
from cpql.settings import Natural, NonNegative

__all__ = ["GenerativeAgent", "GenerativeAgentConfig"]


@dataclass(frozen=True)
class GenerativeAgentConfig(ActorCriticConfig):
    """Settings that all agents with a generative actor and twin critics share.

    Attributes:
        actor: the generative actor.
        actor_target: how the target (EMA) actor follows.
        alpha: weight of the actor's imitation loss; at 0 it isn't computed.
        eta: weight of the policy's Q-loss.
        eta_warmup: gradient steps over which that weight rises from 0, linearly. A young critic's values look
            only a few steps ahead (at rate 0.005, one target update in 200 steps), and a policy that follows
            them falls over; until it sees further the policy imitates. The papers have none.
        q_loss: `normalised` divides by the values' size, so that eta means the same on every task; `min` is
            the mean of the twins' smaller value as it is, as CPQL's code has it online.
        backup_actor: whose action the critic's target takes at the next state: the `target` actor's
            (Consistency-AC) or the `online` actor's (CPQL).
        max_q_backup: 0 or the number of next actions over which each target critic's maximum is taken.
    """

    actor: Any = field(default_factory=ActorConfig)
    actor_target: TargetConfig = field(default_factory=TargetConfig)
    alpha: NonNegative = 1.0
    eta: NonNegative | tuple[NonNegative, ...] = 1.0
    eta_warmup: Natural = 0
    q_loss: Literal["normalised", "min"] = "normalised"
    backup_actor: Literal["target", "online"] = "target"
    max_q_backup: Annotated[int, Field(ge=0, le=1_000)] = 0


class GenerativeAgent(Agent):
    """A twin critic, and a generative actor that imitates the data and climbs the critic.

    A subclass writes `critic_loss` and `actor_loss`. The gradient of the Q-loss flows through all sampling
    steps of the actor.

    Attributes:
        actor_class: the actor, whose imitation loss takes the noise `z` and `u`.
    """

    config: GenerativeAgentConfig
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr", "critic_lr", "eta")
    actor_class: ClassVar[type[Actor]] = ConsistencyActor
    actor: FlatModule[Any]

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The critic's loss [*members], as a function of its flat weights."""
        raise NotImplementedError

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The actor's loss [*members], as a function of its flat weights."""
        raise NotImplementedError

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """The actor and twin critics."""
        actor = self.new_actor(self.actor_class, members)
        return {"actor": actor, "critic": self.new_critic(members)}

    def steps(self) -> Sequence[Step]:
        """The critic's, then the actor's with the new critic."""
        return Step("critic", self.critic_loss), Step("actor", self.actor_loss)

    def noise(self) -> Mapping[str, Draw]:
        """The noise of two samples and of the imitation loss, and the coin between the critics."""
        c, actor = self.config, self.actor.structure
        imitation = actor.loss_noise(c.batch_size)
        return {
            "next_action": Draw("normal", actor.noise_shape(c.batch_size * max(1, c.max_q_backup))),
            "action": Draw("normal", actor.noise_shape(c.batch_size)),
            "z": imitation["z"],
            "u": imitation["u"],
            "coin": Draw("coin"),
            **imitation,
        }

    @property
    def eta(self) -> float | Tensor:
        """The present weight of the policy's Q-loss, one or [*members]."""
        eta, warmup = self.settings["eta"], self.config.eta_warmup
        return eta * (self.state["step"] / warmup).clamp(max=1.0) if warmup else eta

    def sample(self, actor: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        """Actions of the actor with some weights; noise [*members, steps, B, A]."""
        action: Tensor = self.actor(actor).sample(state, noise=noise.movedim(-3, 0))
        return action

    def policy_action(self, actor: Tensor, batch: Batch, noise: Noise) -> Tensor:
        """The action that the Q-loss values, [*members, B, A]: a sample at the batch's states."""
        return self.sample(actor, batch.observations, noise["action"])

    @torch.no_grad()
    def next_q(self, batch: Batch, noise: Noise) -> Tensor:
        """`min_i Q'_i(s', a')` [*members, B], with a' from the target actor or the online one.

        With `max_q_backup` each target critic's maximum over several a' stands for its value (Kumar et al.
        2019, as Diffusion-QL uses it).
        """
        c, s = self.config, self.state
        weights = s["actor_target"] if c.backup_actor == "target" else s["actor"]
        next_state = batch.next_observations
        if c.max_q_backup:
            next_state = next_state.repeat_interleave(c.max_q_backup, -2)
        next_action = self.sample(weights, next_state, noise["next_action"])
        next_q = self.critic(s["critic_target"]).q(next_state, next_action)
        if c.max_q_backup:
            next_q = next_q.unflatten(-1, (-1, c.max_q_backup)).amax(-1)  # type: ignore[no-untyped-call]
        return next_q.amin(-2).detach()

    def q_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`-mean Q_i(s, pi(s)) / stop_gradient(mean |Q_j(s, pi(s))|)`, i and j the two critics by a coin.

        The denominator makes eta mean the same on every task. Both official codes take it from the other
        critic at the policy's actions, as Diffusion-QL does; CPQL's paper writes Q on the data. With
        `q_loss="min"` it is `-mean min_i Q_i(s, pi(s))`.
        """
        action = self.policy_action(actor, batch, noise)
        q = self.critic(self.state["critic"]).q(batch.observations, action)
        metrics = {"actor/q": q.mean((-2, -1))}
        if self.config.q_loss == "min":
            return -q.amin(-2).mean(-1), metrics
        first, (q_1, q_2) = (noise["coin"] == 0).unsqueeze(-1), q.unbind(-2)
        q_i, q_j = torch.where(first, q_1, q_2), torch.where(first, q_2, q_1)
        return -q_i.mean(-1) / q_j.abs().mean(-1).detach(), metrics

    def weighted_loss(
        self, actor: Tensor, batch: Batch, noise: Noise, progress: Tensor
    ) -> tuple[Tensor, Metrics]:
        """`alpha` times the imitation loss plus `eta` times the Q-loss, [*members]."""
        q_loss, metrics = self.q_loss(actor, batch, noise)
        metrics = {"actor/q_loss": q_loss, **metrics}
        if not self.config.alpha:
            return self.eta * q_loss, metrics
        imitation, more = self.imitation_loss(actor, batch, noise, progress)
        metrics = {"actor/imitation": imitation, **metrics, **more}
        return self.config.alpha * imitation + self.eta * q_loss, metrics
