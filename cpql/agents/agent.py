"""What every agent shares: networks trained by one pure update on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cpql.actors import Actor, ActorConfig, choose
from cpql.agents.config import ActorCriticConfig, AgentConfig, TargetConfig
from cpql.critics import Critic, TwinCritic, ValueFunction
from cpql.data.transitions import Batch
from cpql.errors import ConfigError
from cpql.networks import Norm, set_matmul_dtype
from cpql.noise import Draw, Noise, draw
from cpql.optimisation import FlatModule, adam, clip_gradient, value_and_grad

__all__ = ["Agent", "Loss", "Metrics", "Step"]

Metrics = dict[str, Tensor]


class Loss(Protocol):
    """A loss as a function of a network's flat weights."""

    def __call__(self, weights: Tensor, /, batch: Batch, noise: Noise) -> tuple[Tensor, Metrics]:
        """The loss [*members], and metrics [*members]."""


class Step(NamedTuple):
    """One gradient step of an update.

    Attributes:
        network: the network that it trains, by name; its learning rate is the setting `NAME_lr`.
        loss: as a function of that network's flat weights.
        period: the step is taken at every so many updates, the last of them.
    """

    network: str
    loss: Loss
    period: int = 1


class Agent:
    """A learner: an actor and, for most algorithms, a critic.

    `update(batch, noise)` is a pure function of the agent's `state` (a dict of tensors, changed in place),
    the batch and the noise: no host synchronisation, no Python-side randomness, no shape that depends on
    data, so `torch.compile(agent.update, fullgraph=True)` gives one graph. A subclass is one algorithm. It
    declares its `networks`, the `steps` that train them and the `targets` that follow them, and writes their
    losses; inside a loss `self.critic(weights).q(state, action)` calls a network with some weights.

    A group of agents is one agent with a member axis M in front of weights, batches, noise and metrics:
    `[*members, ...]` below is `[M, ...]` for a group and `[...]` for a single agent. Members share nothing
    but the program: losses are summed over them, so that each has its own gradient, norm and Adam.

    Args:
        state_dim: width S of states.
        action_dim: width A of actions.
        config: settings, of the subclass's own `config_class`.
        seed: of the initial weights; several make a group, whose member k starts as the agent of seed k.
        device: where everything lives.
        matmul_dtype: `torch.bfloat16` computes the update's matrix products in it. Weights, optimiser and
            losses stay float32, and `network` gives ordinary modules.

    Attributes:
        by_member: the settings that may differ between the members of a group, besides the seed.
        cycle: updates after which the pattern of steps repeats.

    Raises:
        ConfigError: settings by member that aren't as many as the members.
    """

    config_class: ClassVar[type[AgentConfig]] = AgentConfig
    by_member: ClassVar[tuple[str, ...]] = ("actor_lr",)
    config: Any
    actor: FlatModule[Any]
    critic: FlatModule[Critic]

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        config: AgentConfig | None = None,
        *,
        seed: int | Sequence[int] = 0,
        device: torch.device | str = "cpu",
        matmul_dtype: torch.dtype | None = None,
    ) -> None:
        self.state_dim, self.action_dim = state_dim, action_dim
        self.config = config if config is not None else self.config_class()
        self.members: tuple[int, ...] = () if isinstance(seed, int) else (len(seed),)
        self.settings = {name: self._of_members(name, torch.device(device)) for name in self.by_member}
        alone: dict[str, FlatModule[Any]] = {}
        initial: list[dict[str, Tensor]] = []
        with torch.random.fork_rng(devices=[]):
            for one in [seed] if isinstance(seed, int) else seed:
                torch.manual_seed(one)
                alone = {name: FlatModule(module) for name, module in self.networks(()).items()}
                initial.append({name: network.initial for name, network in alone.items()})
            modules = self.networks(self.members)
        self._alone = alone  # the structure of a single member, which acts by itself
        self.state: dict[str, Tensor] = {"step": torch.zeros((), device=device)}
        for name, module in modules.items():
            set_matmul_dtype(module, matmul_dtype)
            setattr(self, name, FlatModule(module, self.members))
            each = [member[name] for member in initial]
            weights = (torch.stack(each) if self.members else each[0]).to(device)
            self.state[name] = weights.clone()
            if name in self.targets():
                self.state[f"{name}_target"] = weights.clone()
            if name == "actor" and self.config.actor_average:
                self.state["actor_average"] = weights.clone()
            self.state[f"{name}_mean"] = torch.zeros_like(weights)
            self.state[f"{name}_square"] = torch.zeros_like(weights)
        self.cycle = math.lcm(*(step.period for step in self.steps()))

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

    @property
    def name(self) -> str:
        """The algorithm's name in results."""
        raise NotImplementedError

    def networks(self, members: tuple[int, ...]) -> dict[str, nn.Module]:
        """Initialised networks by name, with these member axes; one is `actor`, most have a `critic`."""
        raise NotImplementedError

    def steps(self) -> Sequence[Step]:
        """The gradient steps of an update, in order."""
        raise NotImplementedError

    def targets(self) -> dict[str, TargetConfig]:
        """How the target networks follow, by the name of the online network."""
        return {"critic": self.config.critic_target, "actor": self.config.actor_target}

    @property
    def simultaneous(self) -> bool:
        """Whether all gradients are taken before any network moves, as where one loss trains them all."""
        return False

    def noise(self) -> Mapping[str, Draw]:
        """The random tensors of one update, without member axes."""
        return {}

    # What algorithms are made of.

    def new_actor(self, kind: type[Actor], members: tuple[int, ...]) -> Actor:
        """An actor of a kind, by the config."""
        return kind(self.state_dim, self.action_dim, self.config.actor, members=members)

    def new_critic(self, members: tuple[int, ...]) -> Critic:
        """Twin critics by an `ActorCriticConfig`."""
        c = self.config
        options = {"activation": c.critic_activation, "initial": c.critic_init, "members": members}
        dims = self.state_dim, self.action_dim
        return Critic(TwinCritic(*dims, c.critic_hidden, layer_norm=c.critic_layer_norm, **options))

    def new_value(self, members: tuple[int, ...], layer_norm: Norm) -> ValueFunction:
        """A value function of the critics' form, but for its LayerNorm."""
        c = self.config
        options = {"activation": c.critic_activation, "initial": c.critic_init, "members": members}
        return ValueFunction(self.state_dim, c.critic_hidden, layer_norm=layer_norm, **options)

    def bellman_target(self, batch: Batch, next_value: Tensor) -> Tensor:
        """`r + gamma (1 - d) V(s')`, [*members, B], without gradient; 1 - d is `batch.discounts`."""
        target: Tensor = batch.rewards + self.config.discount * batch.discounts * next_value
        return target.detach()

    def q_error(self, critic: Tensor, batch: Batch, target: Tensor) -> tuple[Tensor, Metrics]:
        """`sum_i mean (Q_i(s, a) - target)^2` over the twin critics, [*members], and the means of both."""
        q = self.critic(critic).q(batch.observations, batch.actions)
        loss = (q - target.unsqueeze(-2)).square().mean(-1).sum(-1)
        return loss, {"critic/q": q.mean((-2, -1)), "critic/target": target.mean(-1)}

    def imitation_loss(
        self, actor: Tensor, batch: Batch, noise: Noise, progress: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """The actor's own loss on the data, mean over the batch; a consistency actor's target teaches it.

        Args:
            actor: flat weights.
            batch: the data.
            noise: from `draw`.
            progress: fraction of the training that is done.
            weight: of each example, [*members, B]; by default 1.
        """
        state, config = batch.observations, self.config.actor
        options: dict[str, Any] = {}
        if isinstance(config, ActorConfig):

            def network(x: Tensor, *times: Tensor) -> Tensor:
                target = self.actor(self.state["actor_target"])
                y: Tensor = target.predict(state, x, *times, drop=noise.get("drop"))
                return y

            options = {"teacher": config.function(network), "progress": progress}
        loss, metrics = self.actor(actor).loss(state, batch.actions, noise=noise, **options)
        means = {name: value.mean(-1) if value.ndim else value for name, value in metrics.items()}
        loss = loss if weight is None else weight * loss
        return loss.mean(-1), {f"actor/{name}": value for name, value in means.items()}

    @property
    def progress(self) -> Tensor:
        """Fraction of the training that is done, in [0, 1]."""
        done: Tensor = self.state["step"] / self.config.updates
        return done.clamp(max=1.0)

    # The update.

    def draw(self, generator: torch.Generator | Sequence[torch.Generator]) -> dict[str, Tensor]:
        """All the noise of one update; for a group from a generator for each member, as it would alone."""
        if isinstance(generator, torch.Generator):
            return draw(self.noise(), generator, self.state["step"].device)
        drawn = [self.draw(one) for one in generator]
        return {name: torch.stack([noise[name] for noise in drawn]) for name in drawn[0]}

    def update(self, batch: Batch, noise: Noise, phase: int | None = None) -> Metrics:
        """One update: the gradient steps that are due, then the moves of the target networks.

        Args:
            batch: transitions, [*members, B, ...].
            noise: from `draw`.
            phase: how many updates were taken before this one, modulo `cycle`, as a number of Python's: each
                phase is a program of its own. By default it is read from the state, which waits for the
                device where `cycle` isn't 1.

        Returns:
            Metrics [*members] of the steps taken, tensors on the device.
        """
        c, s = self.config, self.state
        if phase is None:
            phase = int(s["step"]) % self.cycle if self.cycle > 1 else 0
        cosine = 1.0 if c.lr_decay == "none" else 0.5 * (1.0 + torch.cos(math.pi * self.progress))
        before = {name: s[name].clone() for name, target in self.targets().items() if target.lagged}
        pending: list[Callable[[], None]] = []
        metrics: Metrics = {}
        for name, loss_function, period in self.steps():
            if (phase + 1) % period:
                continue
            loss, gradient, more = value_and_grad(partial(loss_function, batch=batch, noise=noise), s[name])
            gradient, norm = clip_gradient(gradient, c.max_grad_norm)
            rate = self.settings[f"{name}_lr"]
            rate = rate.unsqueeze(-1) if isinstance(rate, Tensor) else rate
            decays = c.lr_decay == "cosine" or (c.lr_decay == "actor_cosine" and name == "actor")
            taken = s["step"] + 1 if period == 1 else torch.floor((s["step"] + 1) / period)
            moments = s[f"{name}_mean"], s[f"{name}_square"]
            pending.append(
                partial(
                    adam,
                    s[name],
                    gradient,
                    *moments,
                    taken,
                    rate * cosine if decays else rate,
                    epsilon=c.adam_epsilon,
                    decay=c.weight_decay,
                )
            )
            if not self.simultaneous:
                pending.pop()()
            metrics |= {f"{name}/loss": loss, f"{name}/grad_norm": norm, **more}
        for step in pending:
            step()
        s["step"].add_(1)
        for name, target in self.targets().items():
            due = ((s["step"] - target.start) % target.period == 0) & (s["step"] >= target.start)
            s[f"{name}_target"].lerp_(before.get(name, s[name]), torch.where(due, target.rate, 0.0))
        if c.actor_average:
            s["actor_average"].lerp_(s["actor"], (9.0 / (9.0 + s["step"])).clamp(min=c.actor_average))
        return metrics

    # The outside.

    def network(self, name: str, member: int = 0) -> nn.Module:
        """A copy of a network as an ordinary module, such as `actor`, `actor_target`, `critic_target`."""
        weights, base = self.state_dict(member)[name], name.partition("_")[0]
        with torch.random.fork_rng(devices=[]):
            module = self.networks(())[base]
        parts = self._alone[base].unflatten(weights)
        module.load_state_dict({k: v.clone() for k, v in parts.items()})
        return module.to(weights.device)

    @property
    def rule(self) -> tuple[int, float]:
        """How it acts: the number of candidates, which is 1 without a critic, and the temperature."""
        c = self.config
        return (c.candidates, c.temperature) if isinstance(c, ActorCriticConfig) else (1, 1.0)

    @property
    def acting(self) -> str:
        """Whose weights act: the actor's, or their average's."""
        return "actor_average" if self.config.actor_average else "actor"

    def deployed(self, member: int = 0) -> tuple[Actor, TwinCritic | None]:
        """What acts after training: the actor or its average, and the target critic that ranks candidates."""
        actor = self.network(self.acting, member)
        assert isinstance(actor, Actor)
        if "critic_target" not in self.state:
            return actor, None
        critic = self.network("critic_target", member)
        assert isinstance(critic, Critic)
        return actor, critic.twin

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
            member: which one acts.
            candidates: how many compete; by default the configured number.
        """
        weights = self.state_dict(member)
        actor: FlatModule[Actor] = self._alone["actor"]
        return choose(
            lambda s: actor(weights[self.acting]).sample(s, generator=generator),
            lambda s, a: self._alone["critic"](weights["critic_target"]).q(s, a),
            state,
            candidates=self.rule[0] if candidates is None else candidates,
            temperature=self.rule[1],
            generator=generator,
        )

    def state_dict(self, member: int = 0) -> dict[str, Tensor]:
        """Everything that training changes, of one member: weights, targets, moments, step.

        It is what a single agent of that seed would give, so that a member can go on alone and a single agent
        in a group.
        """
        if not self.members:
            return dict(self.state)
        return {name: tensor if name == "step" else tensor[member] for name, tensor in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], member: int = 0) -> None:
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
