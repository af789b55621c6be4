"""The consistency actor: noise to action in one or a few steps, given a state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from pydantic import Field
from torch import Tensor

from cpql.actors.base import Actor
from cpql.actors.conditioned import NoiseConditioned
from cpql.consistency import (
    OBJECTIVES,
    PARAMETERISATIONS,
    ConsistencyFunction,
    Function,
    Kind,
    Levels,
    Network,
    Objective,
    Parameterisation,
    check_grid,
    consistency_function,
    edit,
    sample,
)
from cpql.errors import ConfigError, did_you_mean
from cpql.noise import Draw, Noise
from cpql.settings import Positive, Widths

__all__ = ["ActorConfig", "ConsistencyActor"]

MOST_STEPS = 1_000


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
        clamp: `end` clamps the sample to [-1, 1] once; `inside` clamps every output of the consistency
            function, also in the loss, as CPQL publishes (no gradient pulls an action back from outside).
            Not for objectives that train the network itself.
        action_norm: noise actions in the unbounded space before a tanh, see `cpql.consistency.perturb`. Not
            for objectives whose paths are straight.
        dropout: fraction of the hidden units that the objective's loss leaves out, the same ones on both
            sides of a target; iCT and ECT have it for images.
        hidden: widths of the hidden layers.
        time_width: width of the time embedding, an even number.
        acting_share: fraction of the loss's examples that are noised to a level at which sampling asks the
            function, t_max or a refinement, in place of the objective's own draw. One-step acting uses t_max
            alone, and most objectives rarely draw it. Objectives with a grid take its lowest level that isn't
            below; those of jumps, the jump from there to the data. `distill` learns nothing but t_max.
        kind: names the class.
    """

    objective: str = "denoise"
    objective_options: dict[str, Any] = field(default_factory=dict)
    parameterisation: Literal["auto"] | Kind = "auto"
    t_min: Positive = 0.002
    t_max: Positive = 80.0
    refinements: Annotated[tuple[Positive, ...], Field(max_length=MOST_STEPS - 1)] = ()
    sigma_data: Positive = 0.5
    clamp: Literal["end", "inside"] = "end"
    action_norm: bool = False
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    hidden: Widths = (256, 256, 256)
    time_width: Annotated[int, Field(ge=4, le=1024, multiple_of=2)] = 16
    acting_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    kind: Literal["consistency"] = field(default="consistency", kw_only=True)

    def __post_init__(self) -> None:
        _refuse_unless(self.objective in OBJECTIVES, "objective", self.objective, OBJECTIVES)
        _refuse_unless(self.clamp in ("end", "inside"), "clamp", self.clamp, ("end", "inside"))
        kinds = ("auto", *PARAMETERISATIONS)
        _refuse_unless(self.parameterisation in kinds, "parameterisation", self.parameterisation, kinds)
        _check_options(self.objective, self.row, self.objective_options)
        own, mine = self.row.parameterisation, f"objective={self.objective}"
        if (self.resolved == "average" and own != "average") or own not in (None, self.resolved):
            raise ConfigError(
                f"parameterisation={self.parameterisation} doesn't go with {mine}: leave it at auto"
            )
        if own is not None and self.clamp == "inside":
            raise ConfigError(f"clamp=inside doesn't go with {mine}, which trains the network")
        if self.action_norm and not self.row.takes("tanh"):
            raise ConfigError(f"action_norm doesn't go with {mine}, whose paths are straight")
        if self.refinements and self.objective == "distill":
            raise ConfigError("objective=distill learns one step: it has no refinements")
        if self.acting_share and not self.row.takes("acting"):
            raise ConfigError(f"acting_share doesn't go with {mine}, which learns no level but t_max")
        if not 0.0 < self.t_min < self.t_max:
            raise ConfigError(f"noise levels need 0 < t_min < t_max, found {self.t_min} and {self.t_max}")
        levels = (self.t_max, *self.refinements, self.t_min)
        if not all(low <= high for high, low in itertools.pairwise(levels)):
            raise ConfigError(
                f"refinements must descend within [t_min, t_max] = [{self.t_min}, {self.t_max}], "
                f"found {tuple(self.refinements)}"
            )

    @property
    def row(self) -> Objective:
        """The objective."""
        return OBJECTIVES[self.objective]

    @property
    def resolved(self) -> Kind:
        """The parameterisation that `auto` stands for."""
        if self.parameterisation == "auto":
            return self.row.parameterisation or "edm"
        return self.parameterisation

    def function(self, network: Network) -> ConsistencyFunction:
        """The consistency function of an actor's network F."""
        parameterisation = Parameterisation(self.resolved, self.sigma_data, self.t_min)
        return consistency_function(network, parameterisation, 1.0 if self.clamp == "inside" else None)


def _refuse_unless(valid: bool, key: str, value: str, choices: Sequence[str] | dict[str, Any]) -> None:
    if not valid:
        raise ConfigError(f"{key} {value!r} does not exist: {did_you_mean(value, choices)}")


def _check_options(name: str, objective: Objective, options: dict[str, Any]) -> None:
    types = objective.settings
    for option, value in options.items():
        if option not in types:
            raise ConfigError(f"objective_options: {name} has no {option!r}: {did_you_mean(option, types)}")
        expected = types[option]
        if get_origin(expected) is Literal:
            choices = get_args(expected)
            _refuse_unless(value in choices, f"objective_options: {option}", str(value), choices)
        accepted = (expected, *get_args(expected))
        if int in accepted and not (type(value) is int and value >= (option != "grid")):
            raise ConfigError(f"objective_options: {option}: expected a count, found {value!r}")
        number = isinstance(value, int | float) and math.isfinite(value)
        if float in accepted and not (value is None or number):
            raise ConfigError(f"objective_options: {option}: expected a finite number, found {value!r}")
    try:
        check_grid(options.get("grid", 0))
    except ValueError as error:
        raise ConfigError(f"objective_options: {error}") from None


class ConsistencyActor(NoiseConditioned, Actor):
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

    config_class = ActorConfig
    config: ActorConfig

    def setup(self) -> None:
        """Make the layers."""
        c = self.config
        self.parameterisation = Parameterisation(c.resolved, c.sigma_data, c.t_min)
        self.levels = Levels(c.t_min, c.t_max)
        self.steps = self.draws = 1 + len(c.refinements)
        self.build(self.state_dim, self.action_dim, c, self.parameterisation.times, self.members)
        self.guide: NoiseConditioned | None = None
        if c.row.guide is not None:
            self.guide = NoiseConditioned()
            self.guide.build(self.state_dim, self.action_dim, c, 1, self.members)

    def function(self, state: Tensor, drop: Tensor | None = None) -> ConsistencyFunction:
        """The consistency function f(x, t) of these states, x: [*state.shape[:-1], A], t: without A."""
        return self.config.function(partial(self.predict, state, drop=drop))

    def evaluate(self, state: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t) at these states: the consistency function as a plain call."""
        return self.function(state)(x, t)

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

        A part of the action may be fixed, for a stuck joint or an operator's override: the actor fills in
        the rest. The fixed part conditions the rest at every step but the first, so that a one-step actor
        ignores it. See `cpql.consistency.edit`.

        Args:
            state: [..., S] ([*members, B, S] with members).
            steps: how many of the configured steps to take; all of them by default.
            generator: draws the noise, [..., A] for each step in order.
            noise: or the noise itself, [steps, ..., A].
            known: actions whose dimensions under `mask` are fixed, [..., A] or broadcastable to it.
            mask: True for the dimensions that keep the value in `known`, bool, of the same shape.
            low: lower bounds of the other dimensions at every step, within [-1, 1]; [..., A] or one number.
            high: their upper bounds.

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
        shape = (steps, *state.shape[:-1], self.action_dim)
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

    def loss_noise(self, *batch: int) -> dict[str, Draw]:
        """The random tensors that `loss` takes: of the objective, of dropout, and of `acting_share`."""
        draws = {"z": Draw("normal", (*batch, self.action_dim)), "u": Draw("uniform", batch)}
        draws |= {name: Draw("uniform", batch) for name in ("u2", "u3") if self.config.row.takes(name)}
        if self.config.dropout:
            draws["drop"] = Draw("uniform", (*batch, sum(self.config.hidden)))
        if self.config.acting_share:
            draws["acting"] = Draw("uniform", batch)
        return draws

    def acting_levels(self, u: Tensor) -> Tensor:
        """The level at which each example acts, from u ~ U[0, 1); 0 for all but `acting_share` of them."""
        step = u * (self.steps / self.config.acting_share)  # uniform in [0, steps) for those that act
        t = torch.full_like(u, self.levels.t_max)
        for i, refinement in enumerate(self.config.refinements, start=1):
            t = torch.where(step < i, t, refinement)
        return torch.where(step < self.steps, t, 0.0)

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        teacher: Function | None = None,
        progress: Tensor | float = 1.0,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The behaviour-cloning loss of each pair, by the configured objective.

        An objective that distils a guide trains it too: the guide's loss, on the same noise, is part of this
        one, and no gradient passes between the two.

        Args:
            state: [..., S].
            action: [..., A] in [-1, 1].
            teacher: consistency function of the EMA actor at these states, `ema_actor.function(state)`, for
                the objectives that use one; by default this actor itself, without gradient.
            progress: fraction of the training that is done, in [0, 1].
            noise: the random tensors of `loss_noise`; those that are missing are drawn. A hidden unit is left
                out where `drop` is less than the config's dropout; the teacher should be given the same.
            generator: draws them.

        Returns:
            Loss of each pair [...], and metrics.
        """
        c, given = self.config, self.complete_noise(noise, action, generator)
        options = dict(c.objective_options)
        if c.row.takes("tanh"):
            options["tanh"] = c.action_norm
        options |= {name: given[name] for name in ("u2", "u3") if c.row.takes(name)}
        if c.acting_share:
            options["acting"] = self.acting_levels(given["acting"])
        f = self.function(state, given["drop"] if c.dropout else None)
        progress = torch.as_tensor(progress, dtype=action.dtype, device=action.device)
        inputs = (f if teacher is None else teacher, action, given["z"], given["u"], progress, self.levels)
        if self.guide is None or c.row.guide is None:
            return c.row.loss(f, *inputs, **options)
        parameterisation = Parameterisation(c.row.guide.parameterisation, c.sigma_data, c.t_min)
        guide = consistency_function(partial(self.guide.predict, state), parameterisation)
        guiding, _ = c.row.guide.loss(guide, *inputs)
        loss, metrics = c.row.loss(f, *inputs, guide=guide, **options)
        return loss + guiding, {**metrics, "guide": guiding}
