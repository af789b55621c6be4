"""What every agent shares: an actor and a critic trained by one pure update on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cpql.actors.consistency import ActorConfig, ConsistencyActor, choose
from cpql.consistency.objectives import SCHEDULED
from cpql.critics import TwinCritic, ValueFunction
from cpql.data.transitions import Batch
from cpql.errors import ConfigError
from cpql.networks import set_product
from cpql.optimisation import Network, adam, clip_gradient, value_and_grad
from cpql.settings import Candidates, Count, Natural, NonNegative, Positive, Widths

__all__ = ["BY_MEMBER", "Agent", "AgentConfig", "TargetConfig", "steps_first"]

BY_MEMBER = ("actor_lr", "critic_lr", "eta")
"""The settings that may differ between the members of a group, besides the seed."""

Metrics = dict[str, Tensor]
Noise = dict[str, Tensor]


@dataclass(frozen=True)
class TargetConfig:
    """How a target network follows its online network: `target += rate (online - target)`.

    Attributes:
        rate: share taken over at each update of the target.
        period: gradient steps between updates of the target.
        start: gradient steps before the first one. Until then the target keeps its initial weights: the
            official codes start at 1000, which for CPQL freezes the critic's target at random values.
    """

    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.005
    period: Count = 1
    start: Natural = 0


@dataclass(frozen=True)
class AgentConfig:
    """Settings that all agents share.

    Attributes:
        actor: the consistency actor.
        updates: gradient steps of the whole training, over which schedules run.
        batch_size: transitions an update.
        discount: gamma.
        actor_lr: Adam's rate for the actor. In a group of agents this, `critic_lr` and `eta` may be one for
            each member.
        critic_lr: Adam's rate for the critic.
        lr_decay: `cosine` lets both rates fall to zero over the whole training. (Both official codes step
            their cosine at the wrong pace: it does nothing in Consistency-AC and oscillates in CPQL.)
        max_grad_norm: gradient norm of actor and of critic, each clipped to it.
        alpha: weight of the actor's imitation loss; at 0 it isn't computed.
        eta: weight of the policy's Q-loss.
        eta_warmup: gradient steps over which that weight rises from 0, linearly. A young critic's values look
            only a few steps ahead (at rate 0.005, one target update in 200 steps), and a policy that follows
            them falls over; until it sees further the policy imitates. The papers have none.
        q_loss: `normalised` divides by the values' size, so that eta means the same on every task; `min` is
            the mean of the twins' smaller value as it is, as CPQL's code has it online.
        critic_hidden: widths of the critic's hidden layers.
        critic_layer_norm: LayerNorm before the critic's activations.
        critic_target: how the target critic follows.
        actor_target: how the target (EMA) actor follows.
        backup_actor: whose action the critic's target takes at the next state: the `target` actor's
            (Consistency-AC) or the `online` actor's (CPQL).
        max_q_backup: 0 or the number of next actions over which each target critic's maximum is taken.
        candidates: actions drawn when acting, of which one is chosen by its value; 1 is the actor alone.
            All published scores of both papers come from 50.
        temperature: of the choice, softmax(min(Q1, Q2) / temperature) under the target critic; 0 is argmax.
    """

    actor: ActorConfig = field(default_factory=ActorConfig)
    updates: Count = 2_000_000
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    discount: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    actor_lr: Positive | tuple[Positive, ...] = 3e-4
    critic_lr: Positive | tuple[Positive, ...] = 3e-4
    lr_decay: Literal["none", "cosine"] = "none"
    max_grad_norm: Positive = 10.0
    alpha: NonNegative = 1.0
    eta: NonNegative | tuple[NonNegative, ...] = 1.0
    eta_warmup: Natural = 0
    q_loss: Literal["normalised", "min"] = "normalised"
    critic_hidden: Widths = (256, 256, 256)
    critic_layer_norm: bool = False
    critic_target: TargetConfig = field(default_factory=TargetConfig)
    actor_target: TargetConfig = field(default_factory=TargetConfig)
    backup_actor: Literal["target", "online"] = "target"
    max_q_backup: Annotated[int, Field(ge=0, le=1_000)] = 0
    candidates: Candidates = 1
    temperature: NonNegative = 1.0

    @property
    def schedule(self) -> str | None:
        """The setting whose course depends on `updates`, where there is one."""
        if self.lr_decay == "cosine":
            return "agent.lr_decay=cosine"
        name = self.actor.objective
        return f"agent.actor.objective={name}" if name in SCHEDULED else None


def steps_first(noise: Tensor) -> Tensor:
    """A sampler's noise [*members, steps, B, A] as it takes it, [steps, *members, B, A]."""
    return noise.movedim(-3, 0)


class Critic(nn.Module):
    """The critic's networks, which share an optimiser: Q and, where an agent wants one, V."""

    def __init__(
        self, state_dim: int, action_dim: int, config: AgentConfig, value: bool, members: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        widths, norm = config.critic_hidden, config.critic_layer_norm
        self.twin = TwinCritic(state_dim, action_dim, widths, layer_norm=norm, members=members)
        self.value = ValueFunction(state_dim, widths, layer_norm=norm, members=members) if value else None

    def q(self, state: Tensor, action: Tensor) -> Tensor:
        """Both values [*members, 2, B] of state-action pairs."""
        q: Tensor = self.twin(state, action)
        return q

    def v(self, state: Tensor) -> Tensor:
        """Values [*members, B] of states."""
        assert self.value is not None
        v: Tensor = self.value(state)
        return v


class Agent:
    """An actor-critic learner with a consistency actor.

    `update(batch, noise)` is a pure function of the agent's `state` (a dict of tensors, changed in place),
    the batch and the noise: no host synchronisation, no Python-side randomness, no shape that depends on
    data, so `torch.compile(agent.update, fullgraph=True)` gives one graph. A subclass is one algorithm: it
    gives `critic_loss` and `actor_loss`.

    A group of agents is one agent with a member axis M in front of weights, batches, noise and metrics:
    `[*members, ...]` below is `[M, ...]` for a group and `[...]` for a single agent. Members share nothing
    but the program: losses are summed over them, so that each has its own gradient, norm and Adam.

    Args:
        state_dim: width S of states.
        action_dim: width A of actions.
        config: settings; also of the subclass's own kind.
        seed: of the initial weights; several make a group, whose member k starts as the agent of seed k.
        device: where everything lives.
        product: `torch.bfloat16` takes the update's matrix products in it. Weights, optimiser and losses stay
            float32, and `module` gives ordinary modules.

    Raises:
        ConfigError: settings by member that aren't as many as the members.
    """

    config_class: ClassVar[type[AgentConfig]] = AgentConfig

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        config: AgentConfig | None = None,
        *,
        seed: int | Sequence[int] = 0,
        device: torch.device | str = "cpu",
        product: torch.dtype | None = None,
    ) -> None:
        self.state_dim, self.action_dim = state_dim, action_dim
        self.config = config if config is not None else self.config_class()
        self.members: tuple[int, ...] = () if isinstance(seed, int) else (len(seed),)
        self._by_member = {name: self._of_members(name, torch.device(device)) for name in BY_MEMBER}
        initial = []
        with torch.random.fork_rng(devices=[]):
            for one in [seed] if isinstance(seed, int) else seed:
                torch.manual_seed(one)
                alone = [Network(module) for module in self._modules()]
                initial.append([network.initial for network in alone])
            modules = self._modules(self.members)
        for module in modules:
            set_product(module, product)
        self.actor, self.critic = (Network(module, self.members) for module in modules)
        self._alone = alone  # the structure of one member, which acts by itself
        self.steps = 1 + len(self.config.actor.refinements)
        self.state: dict[str, Tensor] = {"step": torch.zeros((), device=device)}
        for name, each in zip(("actor", "critic"), zip(*initial, strict=True), strict=True):
            weights = (torch.stack(each) if self.members else each[0]).to(device)
            self.state |= {
                name: weights.clone(),
                f"{name}_target": weights.clone(),
                f"{name}_mean": torch.zeros_like(weights),
                f"{name}_square": torch.zeros_like(weights),
            }

    def _modules(self, members: tuple[int, ...] = ()) -> tuple[ConsistencyActor, Critic]:
        actor = ConsistencyActor(self.state_dim, self.action_dim, self.config.actor, members=members)
        return actor, Critic(self.state_dim, self.action_dim, self.config, self.has_value, members)

    def _of_members(self, name: str, device: torch.device) -> float | Tensor:
        value = getattr(self.config, name)
        if isinstance(value, int | float):
            return value
        if (len(value),) != self.members:
            count = self.members[0] if self.members else 1
            raise ConfigError(
                f"{name}={list(value)}: {len(value)} values: expected one, or {count}, by member"
            )
        return torch.tensor(value, device=device)

    # The algorithm: what a subclass writes.

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The critic's loss [*members], as a function of its flat weights."""
        raise NotImplementedError

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The actor's loss [*members], as a function of its flat weights."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The algorithm's name in results."""
        raise NotImplementedError

    @property
    def has_value(self) -> bool:
        """Whether the critic has a value function V beside Q."""
        return False

    # What the algorithms are made of.

    @property
    def progress(self) -> Tensor:
        """Share of the training that is done, in [0, 1]."""
        return (self.state["step"] / self.config.updates).clamp(max=1.0)

    @property
    def eta(self) -> float | Tensor:
        """The present weight of the policy's Q-loss, one or [*members]."""
        eta, warmup = self._by_member["eta"], self.config.eta_warmup
        return eta * (self.state["step"] / warmup).clamp(max=1.0) if warmup else eta

    def draw(self, generator: torch.Generator | Sequence[torch.Generator]) -> Noise:
        """All the noise of one update; for a group from a generator each, as its members alone would draw."""
        if not isinstance(generator, torch.Generator):
            drawn = [self.draw(one) for one in generator]
            return {name: torch.stack([noise[name] for noise in drawn]) for name in drawn[0]}
        c = self.config
        batch, device = c.batch_size, self.state["step"].device
        backups = batch * max(1, c.max_q_backup)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        noise = {
            "next_action": normal(self.steps, backups, self.action_dim),
            "action": normal(self.steps, batch, self.action_dim),
            "z": normal(batch, self.action_dim),
            "u": torch.rand(batch, generator=generator, device=device),
            "coin": torch.randint(2, (), generator=generator, device=device),
        }
        if c.actor.wants("u2"):
            noise["u2"] = torch.rand(batch, generator=generator, device=device)
        if c.actor.dropout:
            noise["drop"] = torch.rand(batch, sum(c.actor.hidden), generator=generator, device=device)
        return noise

    @torch.no_grad()
    def bellman_target(self, batch: Batch, noise: Noise) -> Tensor:
        """`r + gamma (1 - d) min_i Q'_i(s', a')`, [*members, B], without gradient.

        1 - d is `batch.discounts`. With `max_q_backup` each target critic's maximum over several a' stands
        for its value (Kumar et al. 2019, as Diffusion-QL uses it).
        """
        c, s = self.config, self.state
        weights = s["actor_target"] if c.backup_actor == "target" else s["actor"]
        next_state = batch.next_observations
        if c.max_q_backup:
            next_state = next_state.repeat_interleave(c.max_q_backup, -2)
        next_action = self.actor(weights, "sample", next_state, noise=steps_first(noise["next_action"]))
        next_q: Tensor = self.critic(s["critic_target"], "q", next_state, next_action)
        if c.max_q_backup:
            next_q = next_q.unflatten(-1, (-1, c.max_q_backup)).amax(-1)  # type: ignore[no-untyped-call]
        return (batch.rewards + c.discount * batch.discounts * next_q.amin(-2)).detach()

    def q_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`-mean Q_i(s, pi(s)) / stop_gradient(mean |Q_j(s, pi(s))|)`, i and j the two critics by a coin.

        The denominator makes eta mean the same on every task. Both official codes take it from the other
        critic at the policy's actions, as Diffusion-QL does; CPQL's paper writes Q on the data. With
        `q_loss="min"` it is `-mean min_i Q_i(s, pi(s))`.
        """
        action = self.actor(actor, "sample", batch.observations, noise=steps_first(noise["action"]))
        q = self.critic(self.state["critic"], "q", batch.observations, action)
        metrics = {"actor/q": q.mean((-2, -1))}
        if self.config.q_loss == "min":
            return -q.amin(-2).mean(-1), metrics
        first, (q_1, q_2) = (noise["coin"] == 0).unsqueeze(-1), q.unbind(-2)
        q_i, q_j = torch.where(first, q_1, q_2), torch.where(first, q_2, q_1)
        return -q_i.mean(-1) / q_j.abs().mean(-1).detach(), metrics

    def imitation_loss(
        self, actor: Tensor, batch: Batch, noise: Noise, progress: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The actor's objective on the data, with the target actor as its teacher; mean over the batch."""
        drop = noise.get("drop")

        def network(x: Tensor, *times: Tensor) -> Tensor:
            weights, state = self.state["actor_target"], batch.observations
            y: Tensor = self.actor(weights, "predict", state, x, *times, drop=drop)
            return y

        loss, metrics = self.actor(
            actor,
            "loss",
            batch.observations,
            batch.actions,
            teacher=self.config.actor.function(network),
            progress=progress,
            z=noise["z"],
            u=noise["u"],
            u2=noise.get("u2"),
            drop=drop,
        )
        means = {name: value.mean(-1) if value.ndim else value for name, value in metrics.items()}
        return loss.mean(-1), {f"actor/{name}": value for name, value in means.items()}

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

    # The update.

    def update(self, batch: Batch, noise: Noise) -> Metrics:
        """One gradient step of the critic, one of the actor, and the targets' moves.

        Args:
            batch: transitions, [*members, B, ...].
            noise: from `draw`.

        Returns:
            Metrics [*members], tensors on the device.
        """
        c, s = self.config, self.state
        scale = 0.5 * (1.0 + torch.cos(math.pi * self.progress)) if c.lr_decay == "cosine" else 1.0
        metrics: Metrics = {}
        for name, function in (("critic", self.critic_loss), ("actor", self.actor_loss)):
            loss, gradient, more = value_and_grad(partial(function, batch=batch, noise=noise), s[name])
            gradient, norm = clip_gradient(gradient, c.max_grad_norm)
            rate = self._by_member[f"{name}_lr"]
            rate = rate.unsqueeze(-1) if isinstance(rate, Tensor) else rate
            adam(s[name], gradient, s[f"{name}_mean"], s[f"{name}_square"], s["step"] + 1, rate * scale)
            metrics |= {f"{name}/loss": loss, f"{name}/grad_norm": norm, **more}
        s["step"].add_(1)
        for name, target in (("critic", c.critic_target), ("actor", c.actor_target)):
            due = (s["step"] % target.period == 0) & (s["step"] >= target.start)
            s[f"{name}_target"].lerp_(s[name], torch.where(due, target.rate, 0.0))
        return metrics

    # The outside.

    def module(self, name: str, member: int = 0) -> nn.Module:
        """A copy of a network as an ordinary module: `actor`, `actor_target`, `critic`, `critic_target`."""
        which = 0 if name.startswith("actor") else 1
        weights = self.state_dict(member)[name]
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = self._modules()[which]
        parts = (self.actor, self.critic)[which].unflatten(weights, ())
        module.load_state_dict({k: v.clone() for k, v in parts.items()})
        return module.to(weights.device)

    @torch.no_grad()
    def act(
        self,
        state: Tensor,
        generator: torch.Generator | None = None,
        member: int = 0,
        candidates: int | None = None,
    ) -> Tensor:
        """Actions [B, A] in [-1, 1] of a member for states [B, S], by the candidates rule.

        Args:
            state: [B, S].
            generator: of the noise and the choice.
            member: whose.
            candidates: how many compete; the configured ones where None.
        """
        weights = self.state_dict(member)
        actor, critic = self._alone
        return choose(
            lambda s: actor(weights["actor"], "sample", s, generator=generator),
            lambda s, a: critic(weights["critic_target"], "q", s, a),
            state,
            candidates=self.config.candidates if candidates is None else candidates,
            temperature=self.config.temperature,
            generator=generator,
        )

    def state_dict(self, member: int = 0) -> dict[str, Tensor]:
        """Everything that training changes, of one member: weights, targets, moments, step.

        What a single agent of that seed would give: a member can go on alone, and a single agent in a group.
        """
        if not self.members:
            return dict(self.state)
        return {name: tensor if name == "step" else tensor[member] for name, tensor in self.state.items()}

    def load_state_dict(self, state: dict[str, Any], member: int = 0) -> None:
        """Take over what `state_dict` gave, in place.

        Raises:
            ValueError: a name or a shape differs.
        """
        if state.keys() != self.state.keys():
            raise ValueError(f"expected the tensors {sorted(self.state)}, found {sorted(state)}")
        for name, tensor in self.state_dict(member).items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{name}: expected shape {list(tensor.shape)}, found {list(state[name].shape)}"
                )
            tensor.copy_(state[name])
