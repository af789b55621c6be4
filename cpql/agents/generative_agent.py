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
from cpql.settings import Count, Natural, NonNegative, Positive

__all__ = ["GenerativeAgent", "GenerativeAgentConfig"]


@dataclass(frozen=True)
class GenerativeAgentConfig(ActorCriticConfig):
    """Settings that all agents with a generative actor and twin critics share.

    Attributes:
        actor: the generative actor.
        actor_target: how the target (EMA) actor follows.
        alpha: weight of the actor's imitation loss; at 0 it isn't computed.
        eta: weight of the policy's Q-loss.
        eta_start: gradient steps of imitation alone before that weight is more than 0.
        eta_warmup: gradient steps over which it then rises from 0, linearly. A young critic's values look
            only a few steps ahead (at rate 0.005, one target update in 200 steps), and a policy that follows
            them falls over; until it sees further the policy imitates. The papers have none.
        q_loss: `normalised` divides by the values' size, so that eta means the same on every task; `spread`
            by how much they differ between two of the data's actions, which a constant added to all rewards
            doesn't change; `min` is the mean of the twins' smaller value as it is, as CPQL's code has it
            online.
        imitation_weight: of each example. `softmax` and `exponential` grow with `x = (Q(s, a) - Q(s, pi(s)))
            / (mean |Q| temperature)`, so that the better actions of mixed data count more: `2 sigmoid(x)`,
            GFP's softmax over the two actions (Tiofack et al. 2025), and `min(exp(x), 100)`, as in
            advantage-weighted regression (Peng et al. 2019).
        imitation_temperature: of that weight; may be a value for each member.
        policy_period: updates between steps of the policy; TD3's is 2.
        policy_noise: standard deviation of TD3's noise on the next action in the critic's target.
        noise_clip: that noise stays within +- this.
        q_aggregation: of the twins' values in the critic's target, the `min` or the `mean`.
        backup_actor: whose action the critic's target takes at the next state: the `target` actor's
            (Consistency-AC) or the `online` actor's (CPQL).
        max_q_backup: 0 or the number of next actions over which each target critic's maximum is taken.
    """

    actor: Any = field(default_factory=ActorConfig)
    actor_target: TargetConfig = field(default_factory=TargetConfig)
    alpha: NonNegative = 1.0
    eta: NonNegative | tuple[NonNegative, ...] = 1.0
    eta_start: Natural = 0
    eta_warmup: Natural = 0
    q_loss: Literal["normalised", "spread", "min"] = "normalised"
    imitation_weight: Literal["none", "softmax", "exponential"] = "none"
    imitation_temperature: Positive | tuple[Positive, ...] = 0.1
    policy_period: Count = 1
    policy_noise: NonNegative = 0.0
    noise_clip: NonNegative = 0.5
    q_aggregation: Literal["min", "mean"] = "min"
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
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr", "critic_lr", "eta", "imitation_temperature")
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
        return Step("critic", self.critic_loss), Step("actor", self.actor_loss, self.config.policy_period)

    def noise(self) -> Mapping[str, Draw]:
        """The noise of two samples and of the imitation loss, and the coin between the critics."""
        c, actor = self.config, self.actor.structure
        imitation = actor.loss_noise(c.batch_size)
        smoothing = Draw("normal", (c.batch_size * max(1, c.max_q_backup), self.action_dim))
        return {
            **({"smoothing": smoothing} if c.policy_noise else {}),
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
        eta, start, warmup = self.settings["eta"], self.config.eta_start, self.config.eta_warmup
        if not (start or warmup):
            return eta
        since = self.state["step"] - start
        return eta * ((since / warmup).clamp(0.0, 1.0) if warmup else (since >= 0).to(since.dtype))

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

        a' may have TD3's smoothing noise, and the mean of the twins may stand for their minimum. With
        `max_q_backup` each target critic's maximum over several a' stands for its value (Kumar et al. 2019,
        as Diffusion-QL uses it).
        """
        c, s = self.config, self.state
        weights = s["actor_target"] if c.backup_actor == "target" else s["actor"]
        next_state = batch.next_observations
        if c.max_q_backup:
            next_state = next_state.repeat_interleave(c.max_q_backup, -2)
        next_action = self.sample(weights, next_state, noise["next_action"])
        if c.policy_noise:
            smoothing = (c.policy_noise * noise["smoothing"]).clamp(-c.noise_clip, c.noise_clip)
            next_action = (next_action + smoothing).clamp(-1.0, 1.0)
        next_q = self.critic(s["critic_target"]).q(next_state, next_action)
        if c.max_q_backup:
            next_q = next_q.unflatten(-1, (-1, c.max_q_backup)).amax(-1)  # type: ignore[no-untyped-call]
        return (next_q.amin(-2) if c.q_aggregation == "min" else next_q.mean(-2)).detach()

    def q_loss(self, q: Tensor, batch: Batch, noise: Noise) -> Tensor:
        """`-mean Q_i(s, pi(s)) / scale` [*members], from both critics' values q [*members, 2, B].

        The scale makes eta mean the same on every task: `mean |Q_j(s, pi(s))|`, without gradient, i and j the
        two critics by a coin. Both official codes take it from the other critic at the policy's actions, as
        Diffusion-QL does; CPQL's paper writes Q on the data. With `q_loss="spread"` it is `mean |Q_j(s, a) -
        Q_j(s, a~)|` with the data's actions at s and at another state. With `q_loss="min"` the loss is
        `-mean min_i Q_i(s, pi(s))`.
        """
        if self.config.q_loss == "min":
            return -q.amin(-2).mean(-1)
        first, (q_1, q_2) = (noise["coin"] == 0).unsqueeze(-1), q.unbind(-2)
        q_i, q_j = torch.where(first, q_1, q_2), torch.where(first, q_2, q_1)
        if self.config.q_loss == "spread":
            elsewhere = self.data_q(batch, batch.actions.roll(1, -2))
            difference = self.data_q(batch, batch.actions) - elsewhere
            scale = torch.where(first, difference[..., 1, :], difference[..., 0, :]).abs().mean(-1)
        else:
            scale = q_j.abs().mean(-1)
        return -q_i.mean(-1) / scale.detach()

    @torch.no_grad()
    def data_q(self, batch: Batch, action: Tensor) -> Tensor:
        """Both critics' values [*members, 2, B] of actions at the batch's states."""
        return self.critic(self.state["critic"]).q(batch.observations, action).detach()

    def example_weight(self, q: Tensor, batch: Batch) -> Tensor | None:
        """`imitation_weight` of each example, [*members, B], given Q(s, pi(s)) [*members, 2, B]."""
        rule, temperature = self.config.imitation_weight, self.settings["imitation_temperature"]
        if rule == "none":
            return None
        q = q.detach().amin(-2)
        advantage = self.data_q(batch, batch.actions).amin(-2) - q
        x = advantage / (q.abs().mean(-1) * temperature).unsqueeze(-1)
        return 2.0 * torch.sigmoid(x) if rule == "softmax" else torch.exp(x).clamp(max=100.0)

    def weighted_loss(
        self, actor: Tensor, batch: Batch, noise: Noise, progress: Tensor
    ) -> tuple[Tensor, Metrics]:
        """`alpha` times the imitation loss plus `eta` times the Q-loss, [*members]."""
        action = self.policy_action(actor, batch, noise)
        q = self.critic(self.state["critic"]).q(batch.observations, action)
        q_loss = self.q_loss(q, batch, noise)
        metrics = {"actor/q_loss": q_loss, "actor/q": q.mean((-2, -1))}
        if not self.config.alpha:
            return self.eta * q_loss, metrics
        weight = self.example_weight(q, batch)
        imitation, more = self.imitation_loss(actor, batch, noise, progress, weight)
        metrics = {"actor/imitation": imitation, **metrics, **more}
        return self.config.alpha * imitation + self.eta * q_loss, metrics
