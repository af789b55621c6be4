"""What every agent shares: an actor and a critic trained by one pure update on tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cpql.actor import ActorConfig, ConsistencyActor, choose
from cpql.critic import TwinCritic, ValueFunction
from cpql.data.transitions import Batch
from cpql.optimisation import Network, adam, clip_gradient, value_and_grad

__all__ = ["Agent", "AgentConfig", "TargetConfig"]

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

    rate: float = 0.005
    period: int = 1
    start: int = 0


@dataclass(frozen=True)
class AgentConfig:
    """Settings that all agents share.

    Attributes:
        actor: the consistency actor.
        updates: gradient steps of the whole training, over which schedules run.
        batch_size: transitions an update.
        discount: gamma.
        actor_lr: Adam's rate for the actor.
        critic_lr: Adam's rate for the critic.
        lr_decay: `cosine` lets both rates fall to zero over the whole training. (Both official codes step
            their cosine at the wrong pace: it does nothing in Consistency-AC and oscillates in CPQL.)
        max_grad_norm: gradient norm of actor and of critic, each clipped to it.
        eta: weight of the policy's Q-loss.
        eta_warmup: gradient steps over which that weight rises from 0, linearly. A young critic's values look
            only a few steps ahead (at rate 0.005, one target update in 200 steps), and a policy that follows
            them falls over; until it sees further the policy imitates. The papers have none.
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
    updates: int = 2_000_000
    batch_size: int = 256
    discount: float = 0.99
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    lr_decay: Literal["none", "cosine"] = "none"
    max_grad_norm: float = 10.0
    eta: float = 1.0
    eta_warmup: int = 0
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    critic_layer_norm: bool = False
    critic_target: TargetConfig = field(default_factory=TargetConfig)
    actor_target: TargetConfig = field(default_factory=TargetConfig)
    backup_actor: Literal["target", "online"] = "target"
    max_q_backup: int = 0
    candidates: int = 1
    temperature: float = 1.0


class Critic(nn.Module):
    """The critic's networks, which share an optimiser: Q and, where an agent wants one, V."""

    def __init__(self, state_dim: int, action_dim: int, config: AgentConfig, value: bool) -> None:
        super().__init__()
        widths, norm = config.critic_hidden, config.critic_layer_norm
        self.twin = TwinCritic(state_dim, action_dim, widths, layer_norm=norm)
        self.value = ValueFunction(state_dim, widths, layer_norm=norm) if value else None

    def q(self, state: Tensor, action: Tensor) -> Tensor:
        """Both values [2, B] of state-action pairs."""
        q: Tensor = self.twin(state, action)
        return q

    def v(self, state: Tensor) -> Tensor:
        """Values [B] of states."""
        assert self.value is not None
        v: Tensor = self.value(state)
        return v


class Agent:
    """An actor-critic learner with a consistency actor.

    `update(batch, noise)` is a pure function of the agent's `state` (a dict of tensors, changed in place),
    the batch and the noise: no host synchronisation, no Python-side randomness, no shape that depends on
    data, so `torch.compile(agent.update, fullgraph=True)` gives one graph. A subclass is one algorithm: it
    gives `critic_loss` and `actor_loss`.

    Args:
        state_dim: width S of states.
        action_dim: width A of actions.
        config: settings; also of the subclass's own kind.
        seed: of the initial weights.
        device: where everything lives.
    """

    config_class: ClassVar[type[AgentConfig]] = AgentConfig

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        config: AgentConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.state_dim, self.action_dim = state_dim, action_dim
        self.config = config if config is not None else self.config_class()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            actor = ConsistencyActor(state_dim, action_dim, self.config.actor)
            critic = Critic(state_dim, action_dim, self.config, self.has_value)
        self.steps = actor.steps
        self.actor, self.critic = Network(actor), Network(critic)
        self.state: dict[str, Tensor] = {"step": torch.zeros((), device=device)}
        for name, network in (("actor", self.actor), ("critic", self.critic)):
            weights = network.initial.to(device)
            self.state |= {
                name: weights.clone(),
                f"{name}_target": weights.clone(),
                f"{name}_mean": torch.zeros_like(weights),
                f"{name}_square": torch.zeros_like(weights),
            }

    # The algorithm: what a subclass writes.

    def critic_loss(self, critic: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The critic's loss, as a function of its flat weights."""
        raise NotImplementedError

    def actor_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The actor's loss, as a function of its flat weights."""
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
        """The present weight of the policy's Q-loss."""
        c = self.config
        return c.eta * (self.state["step"] / c.eta_warmup).clamp(max=1.0) if c.eta_warmup else c.eta

    def draw(self, generator: torch.Generator) -> Noise:
        """All the noise of one update."""
        c = self.config
        batch, device = c.batch_size, self.state["step"].device
        backups = (batch, c.max_q_backup) if c.max_q_backup else (batch,)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        return {
            "next_action": normal(self.steps, *backups, self.action_dim),
            "action": normal(self.steps, batch, self.action_dim),
            "z": normal(batch, self.action_dim),
            "u": torch.rand(batch, generator=generator, device=device),
            "coin": torch.randint(2, (), generator=generator, device=device),
        }

    def bellman_target(self, batch: Batch, noise: Noise) -> Tensor:
        """`r + gamma (1 - d) min_i Q'_i(s', a')`, [B], without gradient; 1 - d is `batch.discounts`.

        With `max_q_backup` each target critic's maximum over several a' stands for its value (Kumar et al.
        2019, as Diffusion-QL uses it).
        """
        c, s = self.config, self.state
        weights = s["actor_target"] if c.backup_actor == "target" else s["actor"]
        next_state = batch.next_observations
        if c.max_q_backup:
            next_state = next_state.unsqueeze(-2).expand(*next_state.shape[:-1], c.max_q_backup, -1)
        next_action = self.actor(weights, "sample", next_state, noise=noise["next_action"])
        next_q: Tensor = self.critic(s["critic_target"], "q", next_state, next_action)
        if c.max_q_backup:
            next_q = next_q.amax(-1)
        return (batch.rewards + c.discount * batch.discounts * next_q.amin(0)).detach()

    def q_loss(self, actor: Tensor, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """`-mean Q_i(s, pi(s)) / stop_gradient(mean |Q_j(s, pi(s))|)`, i and j the two critics by a coin.

        The denominator makes eta mean the same on every task. Both official codes take it from the other
        critic at the policy's actions, as Diffusion-QL does; CPQL's paper writes Q on the data.
        """
        action = self.actor(actor, "sample", batch.observations, noise=noise["action"])
        q = self.critic(self.state["critic"], "q", batch.observations, action)
        first = noise["coin"] == 0
        q_i, q_j = torch.where(first, q[0], q[1]), torch.where(first, q[1], q[0])
        return -q_i.mean() / q_j.abs().mean().detach(), {"actor/q": q.mean()}

    def imitation_loss(
        self, actor: Tensor, batch: Batch, noise: Noise, progress: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The actor's objective on the data, with the target actor as its teacher; mean over the batch."""

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            y: Tensor = self.actor(self.state["actor_target"], "evaluate", batch.observations, x, t)
            return y

        loss, metrics = self.actor(
            actor,
            "loss",
            batch.observations,
            batch.actions,
            teacher=teacher,
            progress=progress,
            z=noise["z"],
            u=noise["u"],
        )
        return loss.mean(), {f"actor/{name}": value for name, value in metrics.items()}

    # The update.

    def update(self, batch: Batch, noise: Noise) -> Metrics:
        """One gradient step of the critic, one of the actor, and the targets' moves.

        Args:
            batch: transitions.
            noise: from `draw`.

        Returns:
            Metrics, tensors on the device.
        """
        c, s = self.config, self.state
        scale = 0.5 * (1.0 + torch.cos(math.pi * self.progress)) if c.lr_decay == "cosine" else 1.0
        metrics: Metrics = {}
        for name, function, rate in (
            ("critic", self.critic_loss, c.critic_lr),
            ("actor", self.actor_loss, c.actor_lr),
        ):
            loss, gradient, more = value_and_grad(partial(function, batch=batch, noise=noise), s[name])
            gradient, norm = clip_gradient(gradient, c.max_grad_norm)
            adam(s[name], gradient, s[f"{name}_mean"], s[f"{name}_square"], s["step"] + 1, rate * scale)
            metrics |= {f"{name}/loss": loss, f"{name}/grad_norm": norm, **more}
        s["step"].add_(1)
        for name, target in (("critic", c.critic_target), ("actor", c.actor_target)):
            due = (s["step"] % target.period == 0) & (s["step"] >= target.start)
            s[f"{name}_target"].lerp_(s[name], torch.where(due, target.rate, 0.0))
        return metrics

    # The outside.

    def module(self, name: str) -> nn.Module:
        """A copy of a network as an ordinary module: `actor`, `actor_target`, `critic`, `critic_target`."""
        network = self.actor if name.startswith("actor") else self.critic
        module: nn.Module
        if name.startswith("actor"):
            module = ConsistencyActor(self.state_dim, self.action_dim, self.config.actor)
        else:
            module = Critic(self.state_dim, self.action_dim, self.config, self.has_value)
        module.load_state_dict({k: v.clone() for k, v in network.unflatten(self.state[name]).items()})
        return module.to(self.state[name].device)

    def act(self, state: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions [B, A] in [-1, 1] for states [B, S], by the configured candidates rule."""
        return choose(
            lambda s: self.actor(self.state["actor"], "sample", s, generator=generator),
            lambda s, a: self.critic(self.state["critic_target"], "q", s, a),
            state,
            candidates=self.config.candidates,
            temperature=self.config.temperature,
            generator=generator,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes: weights, targets, moments, step."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in place.

        Raises:
            ValueError: a name or a shape differs.
        """
        if state.keys() != self.state.keys():
            raise ValueError(f"expected the tensors {sorted(self.state)}, found {sorted(state)}")
        for name, tensor in self.state.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{name}: expected shape {list(tensor.shape)}, found {list(state[name].shape)}"
                )
            tensor.copy_(state[name])
