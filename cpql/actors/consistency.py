"""The consistency actor: noise to action in one or a few steps, given a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from pydantic import Field
from torch import Tensor, nn

from cpql.consistency import (
    GIVEN,
    GUIDES,
    KINDS,
    OBJECTIVES,
    PARAMETERISATIONS,
    ConsistencyFunction,
    Function,
    Levels,
    Network,
    Parameterisation,
    check_grid,
    consistency_function,
    edit,
    keywords,
    sample,
)
from cpql.deploy.folded import MOST_STEPS, pick
from cpql.errors import ConfigError, did_you_mean
from cpql.networks import MLP, TimeEmbedding
from cpql.settings import Positive, Widths

__all__ = ["ActorConfig", "ConsistencyActor", "choose"]


@dataclass(frozen=True)
class ActorConfig:
    """What a consistency actor is made of.

    Attributes:
        objective: how it imitates data, a key of `cpql.consistency.OBJECTIVES`: denoise, ct, ict, ...
        objective_options: settings of the objective, its keyword arguments.
        parameterisation: see `cpql.consistency.Parameterisation`; `auto` is the objective's own where it has
            one, else `edm`. `unscaled` is Consistency-AC's.
        t_min: smallest noise level, where the actor returns its input.
        t_max: largest noise level, where sampling starts. The papers' 80 comes from images; modes of actions
            in [-1, 1] are told apart far better with 5.
        refinements: noise levels of the sampling steps after the first, descending. Empty: one step.
            Consistency-AC publishes (2.0,): its last refinement is not at a small level. CPQL's antmaze
            sampler is (80.0, 2.24, 0.002), the last of which is the identity. `distill` learns one step only.
        sigma_data: standard deviation that the parameterisation assumes of actions.
        clamp: `end` clamps the sample to [-1, 1] once; `inside` every output of the consistency function, in
            the loss too, as CPQL publishes (no gradient pulls an action back from outside). Not for
            objectives that train the network itself.
        action_norm: noise actions in the unbounded space before a tanh, see `cpql.consistency.perturb`. Not
            for objectives whose paths are straight.
        dropout: share of the hidden units left out in the objective's loss, the same ones on both sides of a
            target; iCT and ECT have it for images.
        hidden: widths of the hidden layers.
        time_width: width of the time embedding, an even number.
    """

    objective: str = "denoise"
    objective_options: dict[str, Any] = field(default_factory=dict)
    parameterisation: Literal["auto", "edm", "unscaled", "trig", "flow", "average"] = "auto"
    t_min: Positive = 0.002
    t_max: Positive = 80.0
    refinements: Annotated[tuple[Positive, ...], Field(max_length=MOST_STEPS - 1)] = ()
    sigma_data: Positive = 0.5
    clamp: Literal["end", "inside"] = "end"
    action_norm: bool = False
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    hidden: Widths = (256, 256, 256)
    time_width: Annotated[int, Field(ge=4, le=1024, multiple_of=2)] = 16

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective {self.objective!r} does not exist: {did_you_mean(self.objective, OBJECTIVES)}"
            )
        types = keywords(OBJECTIVES[self.objective])
        known = [name for name in types if name not in GIVEN]
        for option, value in self.objective_options.items():
            if option not in known:
                raise ConfigError(
                    f"objective_options: {self.objective} has no {option!r}: {did_you_mean(option, known)}"
                )
            if get_origin(types[option]) is Literal and value not in get_args(types[option]):
                raise ConfigError(
                    f"objective_options: {option} {value!r} does not exist: "
                    f"{did_you_mean(str(value), get_args(types[option]))}"
                )
            kinds = (types[option], *get_args(types[option]))
            if int in kinds and not (type(value) is int and value >= (option != "grid")):
                raise ConfigError(f"objective_options: {option}: expected a count, found {value!r}")
            if float in kinds and not (value is None or _is_finite(value)):
                raise ConfigError(f"objective_options: {option}: expected a finite number, found {value!r}")
        for key, choices in (
            ("clamp", ("end", "inside")),
            ("parameterisation", ("auto", *PARAMETERISATIONS)),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"{key} {getattr(self, key)!r} does not exist: choose from {', '.join(choices)}"
                )
        own = KINDS.get(self.objective)
        if (self.kind == "average" and own != "average") or own not in (None, self.kind):
            raise ConfigError(
                f"parameterisation={self.parameterisation} doesn't go with objective={self.objective}: "
                "leave it at auto"
            )
        if own is not None and self.clamp == "inside":
            raise ConfigError(
                f"clamp=inside doesn't go with objective={self.objective}, which trains the network"
            )
        if self.action_norm and not self.wants("tanh"):
            raise ConfigError(
                f"action_norm doesn't go with objective={self.objective}, whose paths are straight"
            )
        try:
            check_grid(self.objective_options.get("grid", 0))
        except ValueError as error:
            raise ConfigError(f"objective_options: {error}") from None
        if self.refinements and self.objective == "distill":
            raise ConfigError("objective=distill learns one step: it has no refinements")
        if not 0.0 < self.t_min < self.t_max:
            raise ConfigError(f"noise levels need 0 < t_min < t_max, found {self.t_min} and {self.t_max}")
        previous = self.t_max
        for t in self.refinements:
            if not self.t_min <= t <= previous:
                raise ConfigError(
                    f"refinements must descend within [t_min, t_max] = [{self.t_min}, {self.t_max}], "
                    f"found {tuple(self.refinements)}"
                )
            previous = t

    @property
    def kind(self) -> Literal["edm", "unscaled", "trig", "flow", "average"]:
        """The parameterisation, resolved."""
        return KINDS.get(self.objective, "edm") if self.parameterisation == "auto" else self.parameterisation

    def wants(self, name: str) -> bool:
        """Whether the objective has this keyword of `cpql.consistency.GIVEN`."""
        return name in keywords(OBJECTIVES[self.objective])

    def function(self, network: Network) -> ConsistencyFunction:
        """The consistency function of an actor's network F."""
        parameterisation = Parameterisation(self.kind, self.sigma_data, self.t_min)
        return consistency_function(network, parameterisation, 1.0 if self.clamp == "inside" else None)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class _Network(nn.Module):
    """F(x, times, state): an MLP of all three, with an embedding for each time."""

    def __init__(
        self, state_dim: int, action_dim: int, config: ActorConfig, times: int, members: Sequence[int]
    ) -> None:
        super().__init__()
        self.dropout, self.hidden = config.dropout, list(config.hidden)
        self.time = TimeEmbedding(config.time_width, members)
        if times == 2:
            self.span = TimeEmbedding(config.time_width, members)
        width = action_dim + times * config.time_width + state_dim
        self.mlp = MLP(width, config.hidden, action_dim, members)

    def embed(self, time: Tensor, span: Tensor | None = None) -> Tensor:
        """The features [..., times x time_width] of the times [...]."""
        features: Tensor = self.time(time)
        return features if span is None else torch.cat([features, self.span(span)], -1)

    def predict(self, state: Tensor, x: Tensor, *times: Tensor, drop: Tensor | None = None) -> Tensor:
        """F, for x [..., A] and times [...] at states [..., S]; `drop` as for `ConsistencyActor.loss`."""
        masks: Sequence[Tensor] = ()
        if drop is not None:
            masks = torch.split((drop >= self.dropout) / (1.0 - self.dropout), self.hidden, -1)
        y: Tensor = self.mlp(torch.cat([x, self.embed(*times), state], -1), masks)
        return y


class ConsistencyActor(_Network):
    """A policy that turns noise into an action with a state-conditioned consistency function.

    An ordinary module: `actor(state)` is a differentiable sample in [-1, 1], for states of any leading
    shape. Scaling to an environment's bounds belongs to `cpql.Policy`.

    Example:
        >>> actor = ConsistencyActor(state_dim=11, action_dim=3)
        >>> actor(torch.zeros(32, 11)).shape
        torch.Size([32, 3])

    Args:
        state_dim: width S of states.
        action_dim: width A of actions.
        config: everything else; the default is CPQL's published actor.
        members: leading axes of independent actors, see `cpql.networks`.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        config: ActorConfig | None = None,
        *,
        members: Sequence[int] = (),
    ) -> None:
        c = config or ActorConfig()
        self.parameterisation = Parameterisation(c.kind, c.sigma_data, c.t_min)
        super().__init__(state_dim, action_dim, c, self.parameterisation.times, members)
        self.state_dim, self.action_dim, self.members = state_dim, action_dim, tuple(members)
        self.config = c
        self.levels = Levels(c.t_min, c.t_max)
        self.wants_tanh, self.wants_u2 = c.wants("tanh"), c.wants("u2")
        self.guide = _Network(state_dim, action_dim, c, 1, members) if c.objective in GUIDES else None

    @property
    def steps(self) -> int:
        """Number of sampling steps, network evaluations an action."""
        return 1 + len(self.config.refinements)

    def function(self, state: Tensor, drop: Tensor | None = None) -> ConsistencyFunction:
        """The consistency function f(x, t) of these states, x: [*state.shape[:-1], A], t: without A."""
        return self.config.function(partial(self.predict, state, drop=drop))

    def evaluate(self, state: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t) at these states: the consistency function as a plain call."""
        return self.function(state)(x, t)

    def noise_shape(self, state: Tensor, steps: int | None = None) -> tuple[int, ...]:
        """Shape of the standard normal noise that `sample` wants: [steps, *state.shape[:-1], A]."""
        return (self.steps if steps is None else steps, *state.shape[:-1], self.action_dim)

    def sample(
        self,
        state: Tensor,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        low: Tensor | float | None = None,
        high: Tensor | float | None = None,
    ) -> Tensor:
        """Draw an action for each state, differentiable in the weights, the state and the noise.

        A part of the action may be given, a stuck joint or an operator's override: the actor fills in the
        rest. What is given tells the rest what to be at every step but the first, so that a one-step actor
        takes no notice of it. See `cpql.consistency.edit`.

        Args:
            state: [..., S] ([*members, B, S] with members).
            steps: how many of the configured steps to take; all where None.
            generator: draws the noise, [..., A] for each step in order.
            noise: or the noise itself, [steps, ..., A].
            known: actions of which a part is given, [..., A] or what broadcasts against it.
            mask: True for the dimensions that are given and kept as they are, bool, like `known`.
            low: bounds that the other dimensions stay in at every step, narrower than [-1, 1]; [..., A], or
                one for all.
            high: the upper ones.

        Returns:
            Actions in [-1, 1], [..., A].

        Raises:
            ValueError: more steps than refinement levels are configured, noise of another shape, or only one
                of `known` and `mask`.
        """
        if (known is None) != (mask is None):
            raise ValueError("known and mask go together: the values, and which of them are given")
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps must be in 1..{self.steps} (1 + refinements), found {steps}")
        shape = self.noise_shape(state, steps)
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=state.device, dtype=state.dtype)
        elif noise.shape != shape:
            raise ValueError(f"noise must have the shape {list(shape)}, found {list(noise.shape)}")
        f, tanh = self.function(state), self.config.action_norm
        refinements = self.config.refinements[: steps - 1]
        if known is None and low is None and high is None:
            return sample(f, noise, self.levels, refinements, tanh=tanh, clamp=1.0)
        nothing = torch.zeros_like(noise[0])
        return edit(
            f,
            nothing if known is None else known.expand_as(nothing),
            nothing.bool() if mask is None else mask,
            noise,
            self.levels,
            (self.levels.t_max, *refinements),
            low=-1.0 if low is None else low,
            high=1.0 if high is None else high,
            tanh=tanh,
        )

    def forward(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """`sample` with all steps."""
        return self.sample(state, generator=generator, noise=noise)

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        teacher: Function | None = None,
        progress: Tensor | float = 1.0,
        z: Tensor | None = None,
        u: Tensor | None = None,
        u2: Tensor | None = None,
        drop: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The behaviour-cloning loss of each pair, by the configured objective.

        An objective that distils another network has it trained along: its loss, on the same noise, is part
        of this one, and no gradient passes between the two.

        Args:
            state: [..., S].
            action: [..., A] in [-1, 1].
            teacher: consistency function of the EMA actor at these states, `ema_actor.function(state)`, for
                the objectives that want one; this actor itself, without gradient, where None.
            progress: share of the training that is done, in [0, 1].
            z: standard normal noise like action; drawn where None.
            u: noise in [0, 1) of shape [...]; drawn where None.
            u2: more of it, for the objectives that want it.
            drop: with dropout, noise in [0, 1) of shape [..., sum of hidden]: a hidden unit is left out where
                it is less than the share. The teacher should be given the same. Drawn where None.
            generator: draws what isn't given.

        Returns:
            Loss of each pair [...], and metrics.
        """
        c = self.config
        if z is None:
            z = torch.randn(action.shape, generator=generator, device=action.device, dtype=action.dtype)
        if u is None:
            u = torch.rand(action.shape[:-1], generator=generator, device=action.device, dtype=action.dtype)
        if c.dropout and drop is None:
            shape = (*u.shape, sum(c.hidden))
            drop = torch.rand(shape, generator=generator, device=u.device, dtype=u.dtype)
        f = self.function(state, drop if c.dropout else None)
        options = dict(c.objective_options)
        if self.wants_tanh:
            options["tanh"] = c.action_norm
        if self.wants_u2:
            if u2 is None:
                u2 = torch.rand(u.shape, generator=generator, device=u.device, dtype=u.dtype)
            options["u2"] = u2
        progress = torch.as_tensor(progress, dtype=action.dtype, device=action.device)
        given = (f if teacher is None else teacher, action, z, u, progress, self.levels)
        if self.guide is None:
            return OBJECTIVES[c.objective](f, *given, **options)
        objective, kind = GUIDES[c.objective]
        guide = consistency_function(
            partial(self.guide.predict, state), Parameterisation(kind, c.sigma_data, c.t_min)
        )
        guiding, _ = objective(guide, *given)
        loss, metrics = OBJECTIVES[c.objective](f, *given, guide=guide, **options)
        return loss + guiding, {**metrics, "guide": guiding}


def choose(
    sample: Callable[[Tensor], Tensor],
    q: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    *,
    candidates: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Act by the candidates rule: draw several actions, pick one with probability softmax(min(Q1, Q2)).

    Both papers' published scores act so, with 50 candidates, the target critic and temperature 1, though
    neither paper dwells on it: nearly argmax where Q is large, nearly uniform where rewards are normalised.

    Args:
        sample: draws an action [..., A] for each state [..., S].
        q: both critics' values [2, B, C] of states [B, 1, S] and actions [B, C, A].
        state: [B, S].
        candidates: C; 1 is the actor alone, and q isn't asked.
        temperature: of the softmax; 0 picks the best.
        generator: draws the choice.

    Returns:
        Actions, [B, A].
    """
    if candidates == 1:
        return sample(state)
    state = state.unsqueeze(-2)
    actions = sample(state.expand(-1, candidates, -1))
    value = q(state, actions).amin(0)
    uniform = None
    if temperature > 0:
        uniform = torch.rand(value.shape, generator=generator, device=value.device)
    picked: Tensor = pick(actions, value, uniform, temperature, torch)
    return picked
