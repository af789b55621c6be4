"""Ways to train a consistency function, one function each, with one signature.

    loss, metrics = objective(f, teacher, x0, z, u, progress, levels, ...)

    f          the function being trained, `f(x, t)`
    teacher    the same with EMA weights, for the objectives that want one (others ignore it)
    x0         clean data [*shape, D]
    z          standard normal noise, like x0
    u          uniform noise in [0, 1), [*shape]: which level each example is noised to
    progress   share of the training that is done, a tensor in [0, 1]
    levels     the noise levels
    loss       per example, [*shape]
    metrics    a dict of tensors, 0-dimensional or [*shape]

What only some want is a keyword without which they can't be called, or that others don't have (`GIVEN`):

    u2         more uniform noise, like u
    guide      a trained network that the objective distils, itself a function: a denoiser or a velocity.
               `GUIDES` has the loss that trains it, another function of the same signature
    tanh       noise the data under a tanh, see `perturb`; who hasn't it stands on paths that are straight

Noise is an argument, so an update is a pure function of its inputs: it compiles as one graph, and tests,
resumed runs and exported programs agree to the bit. A new objective is one function of this form, added to
`OBJECTIVES`; its own settings are keyword arguments with the paper's values as defaults.
`docs/consistency.md` compares them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from cpql.consistency.function import ConsistencyFunction, Function, Network, perturb
from cpql.consistency.levels import (
    Levels,
    ct_discretisation,
    easy_ratio,
    ict_discretisation,
    lognormal_index,
    lognormal_level,
    uniform_index,
)

__all__ = [
    "GIVEN",
    "GUIDES",
    "KINDS",
    "OBJECTIVES",
    "SCHEDULED",
    "Objective",
    "cd",
    "check_grid",
    "ct",
    "denoise",
    "distill",
    "ect",
    "flow_matching",
    "ict",
    "keywords",
    "meanflow",
    "scm",
    "shortcut",
]

Metrics = dict[str, Tensor]
Objective = Callable[..., tuple[Tensor, Metrics]]
"""The signature that all objectives share; see the module's text."""

Metric = Literal["l2", "l1", "huber"]
Weight = Literal["none", "interval"]
Noise = Literal["uniform", "lognormal"]


def denoise(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    tanh: bool = False,
    noise: Noise = "uniform",
    count: int = 40,
    mean: float = -1.2,
    std: float = 1.2,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Metrics]:
    """Regress to the clean data: `(1/t^2 + 1/sigma_data^2) |f(x0 + t z, t) - x0|^2 / D`.

    This is what CPQL's published code optimises (it computes a consistency loss beside it and throws that
    away): EDM's denoising loss with Karras' weights on a fixed grid of 40 levels, all but t_min. Its
    minimiser at level t is E[x0 | x_t], at t_max the mean of the data: sampled in one step it has a single
    mode by construction. In a policy the Q-function moves that mode to the good actions.

    Args:
        f, teacher, x0, z, u, progress, levels, tanh: see the module's text; the teacher is not used.
        noise: how t is drawn: from the grid (`uniform`), or as EDM has it (`lognormal`, Karras et al. 2022,
            Table 1), which leaves less of the loss to the smallest levels.
        count: levels of the grid.
        mean, std: of ln t, for `lognormal`.
        sigma_data: of the weight.
    """
    if noise == "lognormal":
        t = lognormal_level(u, levels, mean, std)
    else:
        n = torch.full_like(u, float(count))
        t = levels.level(uniform_index(u, n) + 1, n)
    weight = t**-2 + sigma_data**-2
    error = f(perturb(x0, t, z, tanh=tanh), t) - x0
    return weight * error.square().mean(-1), {}


def distance(error: Tensor, metric: Metric, c: float | None) -> Tensor:
    """Size [*shape] of an error [*shape, D].

    `l2` is `|e|^2 / D`, `l1` is `sum |e_i| / D`, `huber` is `sqrt(|e|^2 + c^2) - c` with the norm over the
    whole vector (several published implementations take it per element). Where c is None it is iCT's
    `0.00054 sqrt(D)`: nearly the norm itself in few dimensions.
    """
    if metric == "l2":
        return error.square().mean(-1)
    if metric == "l1":
        return error.abs().mean(-1)
    c = 0.00054 * error.shape[-1] ** 0.5 if c is None else c
    return torch.sqrt(error.square().sum(-1) + c**2) - c


def ct(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    tanh: bool = False,
    curriculum: Literal["root", "doubling"] = "root",
    s0: int = 2,
    s1: int = 150,
    noise: Noise = "uniform",
    mean: float = -1.1,
    std: float = 2.0,
    target: Literal["ema", "self"] = "ema",
    metric: Metric = "l2",
    c: float | None = None,
    weight: Weight = "none",
    scale: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Consistency training: neighbouring levels of one noisy path must map to the same data.

    `w d(f(x0 + t_{n+1} z, t_{n+1}), stop_gradient(f_teacher(x0 + t_n z, t_n)))`, n of N(k) levels. Song et
    al. 2023, equation 10 and Algorithm 3. Each of its choices is an argument; `ict` is another set of them.

    Args:
        f, teacher, x0, z, u, progress, levels, tanh: see the module's text.
        curriculum: how N(k) grows: `root`, `ct_discretisation`, or `doubling`, `ict_discretisation`.
        s0, s1: where it starts and ends.
        noise: how n is drawn: `uniform_index` or `lognormal_index`.
        mean, std: of ln t, for `lognormal`.
        target: whose the target is: the EMA `teacher`'s, or f's own (`self`).
        metric, c: d, see `distance`.
        weight: w is 1 (`none`), or 1 / (t_{n+1} - t_n) (`interval`), as Consistency-AC's code always has it.
        scale: factor of the loss; Consistency-AC's is 100.
    """
    count = (ct_discretisation if curriculum == "root" else ict_discretisation)(progress, s0, s1)
    if noise == "uniform":
        index = uniform_index(u, count)
    else:
        index = lognormal_index(u, count, levels, mean, std)
    low, high = levels.level(index, count), levels.level(index + 1, count)
    with torch.no_grad():
        wanted = (teacher if target == "ema" else f)(perturb(x0, low, z, tanh=tanh), low)
    error = f(perturb(x0, high, z, tanh=tanh), high) - wanted.detach()
    loss = scale * distance(error, metric, c)
    return loss / (high - low) if weight == "interval" else loss, {"levels": count}


ict = partial(
    ct,
    curriculum="doubling",
    s0=10,
    s1=1280,
    noise="lognormal",
    target="self",
    metric="huber",
    weight="interval",
)
"""Improved consistency training: no EMA teacher, doubling N(k), lognormal levels, pseudo-Huber metric.

Song and Dhariwal 2023, section 3: `ct` with other choices.
"""


def ect(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    tanh: bool = False,
    stages: int = 8,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    mean: float = -1.1,
    std: float = 2.0,
    metric: Metric = "huber",
    c: float | None = None,
    weight: Weight = "interval",
    scale: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Easy consistency tuning: continuous levels t and r, whose ratio nears 1 as training goes on.

    `w d(f(x0 + t z, t), stop_gradient(f(x0 + r z, r)))`; where r is 0 the target is the data, so that
    training starts as a diffusion model's. Geng et al. 2024 (Consistency Models Made Easy), section 3, and
    its official code.

    Args:
        f, teacher, x0, z, u, progress, levels, tanh: see the module's text; the teacher is not used.
        stages, q, k, b: of the ratio r / t, `easy_ratio`.
        mean, std: of ln t, `lognormal_level`.
        metric, c: d, see `distance`.
        weight: w is 1 / (t - r) (`interval`), or 1 (`none`).
        scale: factor of the loss.
    """
    t = lognormal_level(u, levels, mean, std)
    r = t * easy_ratio(t, progress, stages, q, k, b)
    low = r.clamp(min=levels.t_min)  # below it f isn't defined, and what it would give is all but the data
    with torch.no_grad():
        wanted = f(perturb(x0, low, z, tanh=tanh), low)
    wanted = torch.where((r > 0).unsqueeze(-1), wanted.detach(), x0)
    loss = scale * distance(f(perturb(x0, t, z, tanh=tanh), t) - wanted, metric, c)
    return loss / (t - r) if weight == "interval" else loss, {}


def cd(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    guide: Function,
    solver: Literal["heun", "euler"] = "heun",
    count: int = 18,
    target: Literal["ema", "self"] = "ema",
    metric: Metric = "l2",
    c: float | None = None,
    weight: Weight = "none",
    scale: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Consistency distillation: neighbouring levels of a denoiser's own path map to the same data.

    `w d(f(x_{n+1}, t_{n+1}), stop_gradient(f_teacher(x_n, t_n)))`, where `x_{n+1} = x0 + t_{n+1} z` and x_n
    is one solver step of `dx/dt = (x - D(x, t)) / t` below it. Song et al. 2023, equations 6 and 7,
    Algorithm 2.

    Args:
        f, teacher, x0, z, u, progress, levels: see the module's text.
        guide: the denoiser D(x, t).
        solver: `heun`, which the paper prefers, asks the denoiser twice, `euler` once.
        count: the fixed number of levels.
        target: whose the target is: the EMA `teacher`'s, or f's own (`self`).
        metric, c: d, see `distance`.
        weight: w is 1 (`none`), or 1 / (t_{n+1} - t_n) (`interval`).
        scale: factor of the loss.
    """
    n = torch.full_like(u, float(count))
    index = uniform_index(u, n)
    low, high = levels.level(index, n), levels.level(index + 1, n)
    x = perturb(x0, high, z)
    with torch.no_grad():
        step, slope = (low - high).unsqueeze(-1), (x - guide(x, high)) / high.unsqueeze(-1)
        below = x + step * slope
        if solver == "heun":
            slope = 0.5 * (slope + (below - guide(below, low)) / low.unsqueeze(-1))
            below = x + step * slope
        wanted = (teacher if target == "ema" else f)(below, low)
    loss = scale * distance(f(x, high) - wanted.detach(), metric, c)
    return loss / (high - low) if weight == "interval" else loss, {}


def scm(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    mean: float = -1.0,
    std: float = 1.4,
    warmup: float = 0.1,
    c: float = 0.1,
) -> tuple[Tensor, Metrics]:
    """Continuous-time consistency training: f's derivative along the path, made zero.

    `|F(x_a / sigma_data, a) - stop_gradient(F + g / (|g| + c))|^2 / D`, where

        x_a = cos(a) x0 + sin(a) sigma_data z,   x' = cos(a) sigma_data z - sin(a) x0
        g   = -cos(a)^2 (sigma_data F - x') - r cos(a) sin(a) (x_a + sigma_data F')

    and F' is dF/da along the path: g is cos(a) df/da once r has grown to 1. Lu and Song 2024 (sCM), Algorithm
    1, taken from public code of it. Its learned weight e^w(a), which makes the levels' losses alike, is left
    out: with a normalised tangent the loss is less than 1 / D at every level, and near it where |g| >> c.

    Args:
        f, teacher, x0, z, u, progress, levels: see the module's text; the teacher is not used. f's
            parameterisation is `trig`.
        mean, std: of ln(sigma_data tan a), which is ln t, `lognormal_level`.
        warmup: share of the training over which r grows from 0 to 1; the paper's is 10,000 updates.
        c: of the tangent's normalisation.

    Raises:
        ValueError: f has another parameterisation.
    """
    f = _raw(f, "trig")
    sigma_data = f.parameterisation.sigma_data
    angle = torch.atan(lognormal_level(u, levels, mean, std) / sigma_data)
    cos, sin = torch.cos(angle).unsqueeze(-1), torch.sin(angle).unsqueeze(-1)
    x, slope = cos * x0 + sin * sigma_data * z, cos * sigma_data * z - sin * x0
    r = (progress / warmup).clamp(max=1.0) if warmup > 0 else 1.0
    # The tangent comes multiplied by cos sin, which keeps it small where a network in a is steep.
    factor = cos * sin
    out, change = _derivative(
        f.network, (x / sigma_data, angle), (factor * slope / sigma_data, factor.squeeze(-1))
    )
    fixed = out.detach()
    g = -(cos**2) * (sigma_data * fixed - slope) - r * (factor * x + sigma_data * change)
    g = g / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + c)
    return (out - fixed - g).square().mean(-1), {}


def meanflow(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    u2: Tensor,
    share: float = 0.25,
    mean: float = -0.4,
    std: float = 1.0,
    power: float = 0.0,
    c: float = 1e-3,
) -> tuple[Tensor, Metrics]:
    """MeanFlow: average velocities that agree with the flow's own.

    `w |u(x_s, s, s - r) - stop_gradient(v - (s - r) du/ds)|^2`, with the derivative along the path of
    `x_s = (1 - s) x0 + s z`, whose velocity is `v = z - x0`, and `w = (|error|^2 + c)^-power`, without
    gradient. Where r = s it is flow matching. Geng et al. 2025, Algorithm 1, taken from public code of it.

    Args:
        f, teacher, x0, z, u, progress, levels, u2: see the module's text; the teacher is not used. f's
            parameterisation is `average`.
        share: of the examples with r < s.
        mean, std: of the logit of s and r, which is ln t, `lognormal_level`; s is the larger of two.
        power, c: of the weight. The paper's power is 1, for images, whose errors are all about as long. With
            the few dimensions of an action it makes of the velocity, which is a mean, something between a
            mean and a mode, and modes get lost (docs/consistency.md): so there is no weight here.

    Raises:
        ValueError: f has another parameterisation.
    """
    f = _raw(f, "average")
    apart, u2 = _coin(u2, share)
    one, two = (t / (1.0 + t) for t in (lognormal_level(v, levels, mean, std) for v in (u, u2)))
    s = torch.where(apart, torch.maximum(one, two), one)
    span = torch.where(apart, (one - two).abs(), 0.0)
    x, slope, ones = _flow(x0, s, z), z - x0, torch.ones_like(s)
    out, change = _derivative(f.network, (x, s, span), (slope, ones, ones))
    error = (out - (slope - span.unsqueeze(-1) * change).detach()).square().sum(-1)
    return error * (error.detach() + c) ** -power, {}


def shortcut(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    u2: Tensor,
    share: float = 0.25,
    grid: int = 128,
) -> tuple[Tensor, Metrics]:
    """Shortcut models: one long jump goes where two of half its span go, and short ones follow the flow.

    With probability `share`: `|u(x_s, s, 2d) - stop_gradient(v1 + v2) / 2|^2 / D`, where
    `v1 = u'(x_s, s, d)`, `v2 = u'(x_s - d v1, s - d, d)` and u' is the teacher's. Else flow matching:
    `|u(x_s, s, 0) - (z - x0)|^2 / D`. Frans et al. 2024, Algorithm 1, and its official code (where the flow
    is asked at the smallest span, 1/grid, in the place of 0).

    Args:
        f, teacher, x0, z, u, progress, levels, u2: see the module's text. The parameterisation of f and
            teacher is `average`.
        share: of the examples that jump.
        grid: jumps span 2d = 1, 1/2, 1/4, ... 2/grid and start from a multiple of it. With 0 they start and
            end anywhere: then f is trained from every level, and not from s = 1, 1/2, 1/4, ... alone.

    Raises:
        ValueError: f or teacher have another parameterisation, or grid is no power of two from 2 on.
    """
    check_grid(grid)
    f, teacher = _raw(f, "average"), _raw(teacher, "average")
    jumps, u2 = _coin(u2, share)
    if grid:
        span = torch.exp2(-torch.floor(u2 * (grid.bit_length() - 1)))
        s = (torch.floor(u / span) + 1.0) * span
    else:
        s, span = u, u * u2
    s, span = torch.where(jumps, s, u), torch.where(jumps, span, 0.0)
    x, half = _flow(x0, s, z), 0.5 * span
    with torch.no_grad():
        first = teacher.network(x, s, half)
        second = teacher.network(x - half.unsqueeze(-1) * first, s - half, half)
    wanted = torch.where(jumps.unsqueeze(-1), 0.5 * (first + second).detach(), z - x0)
    return (f.network(x, s, span) - wanted).square().mean(-1), {}


def check_grid(grid: int) -> None:
    """Refuse a grid of `shortcut` that is neither 0 nor a power of two from 2 on, with a ValueError."""
    if grid and (grid < 2 or grid & (grid - 1)):
        raise ValueError(f"the grid of shortcuts must be 0 or a power of two, found {grid}")


def distill(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    guide: Function,
    steps: int = 10,
) -> tuple[Tensor, Metrics]:
    """One-step distillation of a flow: `|f(t_max z, t_max) - x|^2 / D`, x where the flow takes the noise z.

    `x_1 = z`, then `x_{s-1/steps} = x_s - v(x_s, s) / steps` down to x_0. Park et al. 2025 (FQL), section 4.
    f learns one level, t_max: there is nothing to refine with. (FQL clips x to the bounds of actions.)

    Args:
        f, teacher, x0, z, u, progress, levels: see the module's text; of them f, z and levels are used.
        guide: the velocity: a function of the parameterisation `flow`, trained by `flow_matching`.
        steps: Euler's.

    Raises:
        ValueError: the guide has another parameterisation.
    """
    guide, x = _raw(guide, "flow"), z
    with torch.no_grad():
        for i in range(steps):
            x = x - guide.network(x, torch.full_like(u, 1.0 - i / steps)) / steps
    t = torch.full_like(u, levels.t_max)
    return (f(perturb(torch.zeros_like(z), t, z), t) - x.detach()).square().mean(-1), {}


def flow_matching(
    f: Function, teacher: Function, x0: Tensor, z: Tensor, u: Tensor, progress: Tensor, levels: Levels
) -> tuple[Tensor, Metrics]:
    """Train the velocity of a linear flow: `|v(x_u, u) - (z - x0)|^2 / D`, `x_u = (1 - u) x0 + u z`.

    Lipman et al. 2023, section 4.1, with data at 0 and noise at 1. f's parameterisation is `flow`.

    Raises:
        ValueError: f has another parameterisation.
    """
    velocity = _raw(f, "flow").network
    return (velocity(_flow(x0, u, z), u) - (z - x0)).square().mean(-1), {}


def _raw(f: Function, kind: str) -> ConsistencyFunction:
    if not isinstance(f, ConsistencyFunction) or f.parameterisation.kind != kind:
        raise ValueError(
            f"this wants a function made by consistency_function with the parameterisation {kind}"
        )
    return f


def _derivative(network: Network, at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The network's value, and its derivative along a direction without gradient."""
    value, derivative = torch.func.jvp(network, at, along)  # type: ignore[misc]
    return value, derivative.detach()


def _flow(x0: Tensor, s: Tensor, z: Tensor) -> Tensor:
    return torch.lerp(x0, z, s.unsqueeze(-1))


def _coin(u: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """An event of probability `share`, and what is left of u: uniform in [0, 1) again where it happened."""
    return u < share, (u / max(share, 1e-12)).clamp(max=1.0)


OBJECTIVES: dict[str, Objective] = {
    "denoise": denoise,
    "ct": ct,
    "ict": ict,
    "ect": ect,
    "cd": cd,
    "scm": scm,
    "meanflow": meanflow,
    "shortcut": shortcut,
    "distill": distill,
}

KINDS: dict[str, Literal["trig", "average"]] = {"scm": "trig", "meanflow": "average", "shortcut": "average"}
"""The parameterisation that f must have, of the objectives that train the network F itself."""

GUIDES: dict[str, tuple[Objective, Literal["edm", "flow"]]] = {
    "cd": (partial(denoise, noise="lognormal"), "edm"),
    "distill": (flow_matching, "flow"),
}
"""How the guide of an objective is trained, and its parameterisation."""

SCHEDULED = ("ct", "ict", "ect", "scm")
"""Objectives that depend on `progress`: they can't be trained for longer than was said at first."""

GIVEN = ("u2", "guide", "tanh")
"""Keywords of objectives that aren't settings."""


@cache
def keywords(objective: Objective) -> Mapping[str, Any]:
    """The types of an objective's keyword arguments by name: its settings, and what it wants of `GIVEN`."""
    hints = get_type_hints(objective.func if isinstance(objective, partial) else objective)
    parameters = inspect.signature(objective).parameters.values()
    return MappingProxyType({p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})
