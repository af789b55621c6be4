"""Losses on a linear flow `x_s = (1 - s) x0 + s z`: flow matching, average velocities, distillation.

Their common signature is described in `cpql.consistency.objectives`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cpql.consistency.function import Function, derivative, network_of, perturb
from cpql.consistency.levels import Levels, lognormal_level
from cpql.consistency.losses import Metrics

__all__ = ["check_grid", "compose", "distill", "flow_matching", "meanflow", "shortcut"]


def flow_matching(
    f: Function, teacher: Function, x0: Tensor, z: Tensor, u: Tensor, progress: Tensor, levels: Levels
) -> tuple[Tensor, Metrics]:
    """Train the velocity of a linear flow: `|v(x_u, u) - (z - x0)|^2 / D`, `x_u = (1 - u) x0 + u z`.

    Lipman et al. 2023, section 4.1, with data at 0 and noise at 1. f's parameterisation is `flow`.

    Raises:
        ValueError: f has another parameterisation.
    """
    velocity = network_of(f, "flow").network
    return (velocity(_flow(x0, u, z), u) - (z - x0)).square().mean(-1), {}


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
    acting: Tensor | None = None,
    fraction: float = 0.25,
    mean: float = -0.4,
    std: float = 1.0,
    larger: Literal["apart", "all"] = "apart",
    power: float = 0.0,
    c: float = 1e-3,
) -> tuple[Tensor, Metrics]:
    """MeanFlow: average velocities that agree with the flow's own.

    `w |u(x_s, s, s - r) - stop_gradient(v - (s - r) du/ds)|^2`, with the derivative along the path of
    `x_s = (1 - s) x0 + s z`, whose velocity is `v = z - x0`, and `w = (|error|^2 + c)^-power`, without
    gradient. Where r = s it is flow matching. Geng et al. 2025, Algorithm 1, taken from public code of it.

    Args:
        f, teacher, x0, z, u, progress, levels, u2, acting: see the module's text; the teacher is not used.
            f's parameterisation is `average`.
        fraction: of the examples with r < s.
        mean, std: of the logit of s and r, which is ln t, `lognormal_level`.
        larger: which examples take for s the larger of two draws: those with r < s (`apart`), or `all`, as in
            the official code, where the examples of flow matching are noised more.
        power, c: of the weight. The paper's power is 1, for images, whose errors are all about as long. With
            the few dimensions of an action it makes of the velocity, which is a mean, something between a
            mean and a mode, and modes get lost (docs/consistency.md): so there is no weight here.

    Raises:
        ValueError: f has another parameterisation.
    """
    f = network_of(f, "average")
    apart, u2 = _coin(u2, fraction)
    one, two = (t / (1.0 + t) for t in (lognormal_level(v, levels, mean, std) for v in (u, u2)))
    s = torch.maximum(one, two)
    if larger == "apart":
        s = torch.where(apart, s, one)
    s, span = _acting_or_jump(acting, s, torch.where(apart, (one - two).abs(), 0.0))
    x, slope, ones = _flow(x0, s, z), z - x0, torch.ones_like(s)
    out, change = derivative(f.network, (x, s, span), (slope, ones, ones))
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
    acting: Tensor | None = None,
    fraction: float = 0.25,
    grid: int = 128,
) -> tuple[Tensor, Metrics]:
    """Shortcut models: one long jump goes where two of half its span go, and short ones follow the flow.

    With probability `fraction`: `|u(x_s, s, 2d) - stop_gradient(v1 + v2) / 2|^2 / D`, where
    `v1 = u'(x_s, s, d)`, `v2 = u'(x_s - d v1, s - d, d)` and u' is the teacher's. Else flow matching:
    `|u(x_s, s, 0) - (z - x0)|^2 / D`. Frans et al. 2024, Algorithm 1, and its official code (where the flow
    is asked at the smallest span, 1/grid, in the place of 0).

    Args:
        f, teacher, x0, z, u, progress, levels, u2, acting: see the module's text. The parameterisation of f
            and teacher is `average`.
        fraction: of the examples that jump.
        grid: jumps span 2d = 1, 1/2, 1/4, ... 2/grid and start from a multiple of it. With 0 they start and
            end anywhere: then f is trained from every level, and not from s = 1, 1/2, 1/4, ... alone.

    Raises:
        ValueError: f or teacher have another parameterisation, or grid is no power of two from 2 on.
    """
    check_grid(grid)
    f, teacher = network_of(f, "average"), network_of(teacher, "average")
    jumps, u2 = _coin(u2, fraction)
    if grid:
        span = torch.exp2(-torch.floor(u2 * (grid.bit_length() - 1)))
        s = (torch.floor(u / span) + 1.0) * span
    else:
        s, span = u, u * u2
    s, span = _acting_or_jump(acting, torch.where(jumps, s, u), torch.where(jumps, span, 0.0))
    x, half = _flow(x0, s, z), 0.5 * span
    with torch.no_grad():
        first = teacher.network(x, s, half)
        second = teacher.network(x - half.unsqueeze(-1) * first, s - half, half)
    velocity = torch.where((span > 0).unsqueeze(-1), 0.5 * (first + second).detach(), z - x0)
    return (f.network(x, s, span) - velocity).square().mean(-1), {}


def check_grid(grid: int) -> None:
    """Refuse a grid of `shortcut` that is neither 0 nor a power of two from 2 on, with a ValueError."""
    if grid and (grid < 2 or grid & (grid - 1)):
        raise ValueError(f"the grid of shortcuts must be 0 or a power of two, found {grid}")


def compose(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    u2: Tensor,
    u3: Tensor,
    acting: Tensor | None = None,
    fraction: float = 0.5,
    smallest: float = 1e-3,
) -> tuple[Tensor, Metrics]:
    """Bootstrapped jumps: one jump goes where any two in its place go, and the smallest follow the flow.

    With probability `fraction`: `|p(x_s, s, r) - stop_gradient(p(p(x_s, s, m), m, r))|^2 / D`, where
    `p(x, s, r) = x - (s - r) u(x, s, s - r)` and r < m < s are three uniform times in order. Else
    `|u(x_s, s, d) - (z - x0)|^2 / D`, s and d uniform in [0, 1] and [0, smallest]. Nguyen et al. 2026 (BFQ),
    from two summaries: its code isn't public. (It tosses the coin once for a batch.)

    Args:
        f, teacher, x0, z, u, progress, levels, u2, u3, acting: see the module's text; the teacher is not
            used. f's parameterisation is `average`.
        fraction: of the examples that jump.
        smallest: the longest jump that follows the flow.

    Raises:
        ValueError: f has another parameterisation.
    """
    f = network_of(f, "average")
    jumps, u2 = _coin(u2, fraction)
    if acting is not None:
        jumps = jumps | (acting > 0)
    # The largest of three uniform numbers is the cube root of one, and m is uniform between r and s.
    s = torch.where(jumps, u ** (1 / 3), u)
    span = torch.where(jumps, s * u2.sqrt(), torch.minimum(smallest * u3, u))
    s, span = _acting_or_jump(acting, s, span)
    x, first = _flow(x0, s, z), span * u3
    with torch.no_grad():
        middle = x - first.unsqueeze(-1) * f.network(x, s, first)
        rest = span - first
        end = middle - rest.unsqueeze(-1) * f.network(middle, s - first, rest)
    out = f.network(x, s, span)
    jumped = x - span.unsqueeze(-1) * out - end.detach()
    return torch.where(jumps.unsqueeze(-1), jumped, out - (z - x0)).square().mean(-1), {}


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
    guide, x = network_of(guide, "flow"), z
    with torch.no_grad():
        for i in range(steps):
            x = x - guide.network(x, torch.full_like(u, 1.0 - i / steps)) / steps
    t = torch.full_like(u, levels.t_max)
    return (f(perturb(torch.zeros_like(z), t, z), t) - x.detach()).square().mean(-1), {}


def _flow(x0: Tensor, s: Tensor, z: Tensor) -> Tensor:
    return torch.lerp(x0, z, s.unsqueeze(-1))


def _coin(u: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """An event of probability `fraction`, and the rest of u: uniform in [0, 1) in either case."""
    happened = u < fraction
    rest = torch.where(happened, u / max(fraction, 1e-12), (u - fraction) / max(1.0 - fraction, 1e-12))
    return happened, rest.clamp(max=1.0)


def _acting_or_jump(acting: Tensor | None, s: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """The jumps (s, span), and where `acting` isn't 0 the one that sampling takes there: from s to 0."""
    if acting is None:
        return s, span
    start, given = acting / (1.0 + acting), acting > 0
    return torch.where(given, start, s), torch.where(given, start, span)
