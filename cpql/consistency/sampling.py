"""Drawing from a consistency function in one or a few steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpql.consistency.function import Function, perturb
from cpql.consistency.levels import Levels

__all__ = ["sample"]


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
