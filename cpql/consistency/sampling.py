"""Drawing from a consistency function in one or a few steps, and choosing the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpql.consistency.function import Function, perturb
from cpql.consistency.levels import Levels

__all__ = ["greedy_refinements", "sample"]


def sample(
    f: Function,
    z: Tensor,
    levels: Levels,
    refinements: Sequence[float] = (),
    *,
    tanh: bool = False,
    clamp: float | None = None,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1), differentiable from end to end.

    `x = f(t_max z_0, t_max)`, then for each refinement level t: `x = f(x + sqrt(t^2 - t_min^2) z_i, t)`.
    One step is no special case: it starts and denoises at t_max. (Consistency-AC's code, asked for one
    step, denoises at t = 2 what was noised to 80.)

    Args:
        f: consistency function on [*shape, D], [*shape].
        z: standard normal noise [1 + len(refinements), *shape, D]; z[0] starts.
        levels: gives t_min and t_max.
        refinements: descending levels in [t_min, t_max]; f is the identity at t_min.
        tanh: squash the noisy inputs, see `perturb`.
        clamp: bound of the result's absolute value; the gradient outside is zero.

    Returns:
        Samples, [*shape, D].

    Raises:
        ValueError: not as many noises as steps, or a refinement level out of range.
    """
    if z.shape[0] != 1 + len(refinements):
        raise ValueError(f"{1 + len(refinements)} steps need as much noise, found {z.shape[0]}")
    for level in refinements:
        if not levels.t_min <= level <= levels.t_max:
            raise ValueError(f"refinement level {level} lies outside [{levels.t_min}, {levels.t_max}]")
    t = torch.full(z.shape[1:-1], levels.t_max, dtype=z.dtype, device=z.device)
    x = f(perturb(torch.zeros_like(z[0]), t, z[0], tanh=tanh), t)
    for i, level in enumerate(refinements, start=1):
        spread = torch.full_like(t, (level**2 - levels.t_min**2) ** 0.5)
        x = f(perturb(x, spread, z[i], tanh=tanh), torch.full_like(t, level))
    return x if clamp is None else x.clamp(-clamp, clamp)


@torch.no_grad()
def greedy_refinements(
    f: Function,
    z: Tensor,
    levels: Levels,
    distance: Callable[[Tensor], float],
    *,
    grid: int = 10,
    iterations: int = 6,
    sweeps: int = 0,
    tanh: bool = False,
    clamp: float | None = None,
) -> tuple[float, ...]:
    """Good levels to refine at, found one after the other by ternary search.

    Song et al. 2023 choose each level so, with FID as the distance. Ternary search assumes that the distance
    falls and then rises along the level, which isn't guaranteed, so the levels of a grid are tried first, and
    the search goes on around the best of them. Both run along the level's logarithm. The same noise at every
    trial makes the search deterministic.

    Args:
        f, tanh, clamp: as for `sample`.
        z: standard normal noise [1 + number of levels to find, *shape, D], enough samples for the distance.
        levels: gives t_min and t_max.
        distance: of samples [*shape, D] from the data.
        grid: how many levels are tried first; 0 skips the grid, as in the paper.
        iterations: of the search for each level; each tries two levels and keeps two thirds of the interval.
        sweeps: how often all levels are then searched for again, each with the others fixed: the best level
            to end at may not be the best one to continue from. The paper has none.
        tanh: squash the noisy inputs.

    Returns:
        Descending levels, as `sample` takes them.
    """

    def at(refinements: tuple[float, ...]) -> float:
        noise = z[: 1 + len(refinements)]
        return distance(sample(f, noise, levels, refinements, tanh=tanh, clamp=clamp))

    def search(before: tuple[float, ...], after: tuple[float, ...]) -> tuple[float, ...]:
        """The best level between those before it and those after it, with them."""

        def of(log_level: float) -> float:
            return at((*before, math.exp(log_level), *after))

        # Not the ends themselves: rounding would put them outside.
        low = math.log(after[0] if after else levels.t_min) + 1e-9
        high = math.log(before[-1] if before else levels.t_max) - 1e-9
        if grid:
            width = (high - low) / (grid + 1)
            best = min((low + (i + 1) * width for i in range(grid)), key=of)
            low, high = best - width, best + width
        for _ in range(iterations):
            third = (high - low) / 3
            if of(low + third) <= of(high - third):
                high -= third
            else:
                low += third
        return (*before, math.exp(0.5 * (low + high)), *after)

    found: tuple[float, ...] = ()
    for _ in range(len(z) - 1):
        found = search(found, ())
    for _ in range(sweeps):
        for i in range(len(found)):
            found = min(found, search(found[:i], found[i + 1 :]), key=at)
    return found
