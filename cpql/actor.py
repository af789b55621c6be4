"""The consistency actor: noise to action in one or a few steps, given a state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cpql.consistency import (
    OBJECTIVES,
    PARAMETERISATIONS,
    Function,
    Levels,
    Parameterisation,
    consistency_function,
    sample,
)
from cpql.errors import ConfigError, did_you_mean
from cpql.networks import MLP, TimeEmbedding

__all__ = ["ActorConfig", "ConsistencyActor", "choose"]


@dataclass(frozen=True)
class ActorConfig:
    """What a consistency actor is made of.

    Attributes:
        objective: how it imitates data, a key of `cpql.consistency.OBJECTIVES`: denoise, ct, ict, ...
        objective_options: settings of the objective, its keyword arguments.
        parameterisation: `edm` or `unscaled` (Consistency-AC's), see `cpql.consistency.Parameterisation`.
        t_min: smallest noise level, where the actor returns its input.
        t_max: largest noise level, where sampling starts. The papers' 80 comes from images; modes of actions
            in [-1, 1] are told apart far better with 5.
        refinements: noise levels of the sampling steps after the first, descending. Empty: one step.
            Consistency-AC publishes (2.0,): its last refinement is not at a small level. CPQL's antmaze
            sampler is (80.0, 2.24, 0.002), the last of which is the identity.
        sigma_data: standard deviation that the parameterisation assumes of actions.
        clamp: `end` clamps the sample to [-1, 1] once; `inside` every output of the consistency function, in
            the loss too, as CPQL publishes (no gradient pulls an action back from outside).
        action_norm: noise actions in the unbounded space before a tanh, see `cpql.consistency.perturb`.
        hidden: widths of the hidden layers.
        time_width: width of the time embedding.
    """

    objective: str = "denoise"
    objective_options: dict[str, Any] = field(default_factory=dict)
    parameterisation: Literal["edm", "unscaled"] = "edm"
    t_min: float = 0.002
    t_max: float = 80.0
    refinements: tuple[float, ...] = ()
    sigma_data: float = 0.5
    clamp: Literal["end", "inside"] = "end"
    action_norm: bool = False
    hidden: tuple[int, ...] = (256, 256, 256)
    time_width: int = 16

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective {self.objective!r} does not exist: {did_you_mean(self.objective, OBJECTIVES)}"
            )
        known = [
            name
            for name, parameter in inspect.signature(OBJECTIVES[self.objective]).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name != "tanh"
        ]
        for option in self.objective_options:
            if option not in known:
                raise ConfigError(
                    f"objective_options: {self.objective} has no {option!r}: {did_you_mean(option, known)}"
                )
        for key, choices in (("clamp", ("end", "inside")), ("parameterisation", PARAMETERISATIONS)):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"{key} {getattr(self, key)!r} does not exist: choose from {', '.join(choices)}"
                )
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


class ConsistencyActor(nn.Module):
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
        super().__init__()
        self.state_dim, self.action_dim, self.members = state_dim, action_dim, tuple(members)
        self.config = c = config or ActorConfig()
        self.levels = Levels(c.t_min, c.t_max)
        self.parameterisation = Parameterisation(c.parameterisation, c.sigma_data, c.t_min)
        self.time = TimeEmbedding(c.time_width, members)
        self.mlp = MLP(action_dim + c.time_width + state_dim, c.hidden, action_dim, members)

    @property
    def steps(self) -> int:
        """Number of sampling steps, network evaluations an action."""
        return 1 + len(self.config.refinements)

    def function(self, state: Tensor) -> Function:
        """The consistency function f(x, t) of these states, x: [*state.shape[:-1], A], t: without A."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            y: Tensor = self.mlp(torch.cat([x, self.time(t), state], -1))
            return y

        f = consistency_function(network, self.parameterisation)
        if self.config.clamp == "inside":
            return lambda x, t: f(x, t).clamp(-1.0, 1.0)
        return f

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
    ) -> Tensor:
        """Draw an action for each state, differentiable in the weights, the state and the noise.

        Args:
            state: [..., S] ([*members, B, S] with members).
            steps: how many of the configured steps to take; all where None.
            generator: draws the noise, [..., A] for each step in order.
            noise: or the noise itself, [steps, ..., A].

        Returns:
            Actions in [-1, 1], [..., A].

        Raises:
            ValueError: more steps than refinement levels are configured, or noise of another shape.
        """
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps must be in 1..{self.steps} (1 + refinements), found {steps}")
        shape = self.noise_shape(state, steps)
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=state.device, dtype=state.dtype)
        elif noise.shape != shape:
            raise ValueError(f"noise must have the shape {list(shape)}, found {list(noise.shape)}")
        levels = self.config.refinements[: steps - 1]
        return sample(
            self.function(state), noise, self.levels, levels, tanh=self.config.action_norm, clamp=1.0
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
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The behaviour-cloning loss of each pair, by the configured objective.

        Args:
            state: [..., S].
            action: [..., A] in [-1, 1].
            teacher: consistency function of the EMA actor at these states, `ema_actor.function(state)`, for
                the objectives that want one; this actor itself, without gradient, where None.
            progress: share of the training that is done, in [0, 1].
            z: standard normal noise like action; drawn where None.
            u: noise in [0, 1) of shape [...]; drawn where None.
            generator: draws what isn't given.

        Returns:
            Loss of each pair [...], and metrics.
        """
        f = self.function(state)
        if z is None:
            z = torch.randn(action.shape, generator=generator, device=action.device, dtype=action.dtype)
        if u is None:
            u = torch.rand(action.shape[:-1], generator=generator, device=action.device, dtype=action.dtype)
        return OBJECTIVES[self.config.objective](
            f,
            f if teacher is None else teacher,
            action,
            z,
            u,
            torch.as_tensor(progress, dtype=action.dtype, device=action.device),
            self.levels,
            tanh=self.config.action_norm,
            **self.config.objective_options,
        )


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
    if temperature > 0:  # adding Gumbel noise and taking the maximum draws from the softmax
        uniform = torch.rand(value.shape, generator=generator, device=value.device)
        gumbel = uniform.clamp_(1e-20, 1 - 1e-7).log_().neg_().log_().neg_()
        value = gumbel.add_(value, alpha=1 / temperature)
    best = value.argmax(-1)[:, None, None].expand(-1, 1, actions.shape[-1])
    return actions.gather(1, best).squeeze(1)
