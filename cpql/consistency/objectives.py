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
    metrics    a dict of 0-dimensional tensors

Noise is an argument, so an update is a pure function of its inputs: it compiles as one graph, and tests,
resumed runs and exported programs agree to the bit. A new objective is one function of this form, added to
`OBJECTIVES`; its own settings are keyword arguments with the paper's values as defaults.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from cpql.consistency.function import Function, perturb
from cpql.consistency.levels import (
    Levels,
    ct_discretisation,
    ict_discretisation,
    lognormal_index,
    uniform_index,
)

__all__ = ["OBJECTIVES", "Objective", "ct", "denoise", "ict"]

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """The signature that all objectives share; see the module's text."""

    def __call__(
        self,
        f: Function,
        teacher: Function,
        x0: Tensor,
        z: Tensor,
        u: Tensor,
        progress: Tensor,
        levels: Levels,
        *,
        tanh: bool = False,
    ) -> tuple[Tensor, Metrics]:
        """Loss of each example, and metrics."""
        ...


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
    count: int = 40,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Metrics]:
    """Regress to the clean data: `(1/t^2 + 1/sigma_data^2) |f(x0 + t z, t) - x0|^2 / D`.

    This is what CPQL's published code optimises (it computes a consistency loss beside it and throws that
    away): EDM's denoising loss with Karras' weights on a fixed grid of 40 levels, all but t_min. Its
    minimiser at level t is E[x0 | x_t], at t_max the mean of the data: sampled in one step it has a single
    mode by construction. In a policy the Q-function moves that mode to the good actions.
    """
    n = torch.full_like(u, float(count))
    t = levels.level(uniform_index(u, n) + 1, n)
    weight = t**-2 + sigma_data**-2
    error = f(perturb(x0, t, z, tanh=tanh), t) - x0
    return weight * error.square().mean(-1), {}


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
    s0: int = 2,
    s1: int = 150,
    weight: Literal["none", "interval"] = "none",
    scale: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Consistency training: neighbouring levels of one noisy path must map to the same data.

    `w |f(x0 + t_{n+1} z, t_{n+1}) - stop_gradient(f_teacher(x0 + t_n z, t_n))|^2 / D`, n uniform on N(k)
    levels. Song et al. 2023, equation 10 and Algorithm 3 (squared l2 metric, weight 1).

    Args:
        f, teacher, x0, z, u, progress, levels, tanh: see the module's text.
        s0, s1: curriculum of N(k), `ct_discretisation`.
        weight: `interval` divides by `t_{n+1} - t_n`, as Consistency-AC's code always does.
        scale: factor of the loss; Consistency-AC's is 100.
    """
    count = ct_discretisation(progress, s0, s1)
    index = uniform_index(u, count)
    low, high = levels.level(index, count), levels.level(index + 1, count)
    target = teacher(perturb(x0, low, z, tanh=tanh), low).detach()
    error = f(perturb(x0, high, z, tanh=tanh), high) - target
    loss = scale * error.square().mean(-1)
    return loss / (high - low) if weight == "interval" else loss, {"levels": count}


def ict(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    tanh: bool = False,
    s0: int = 10,
    s1: int = 1280,
    mean: float = -1.1,
    std: float = 2.0,
    c: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Improved consistency training: no EMA teacher, doubling N(k), lognormal levels, pseudo-Huber metric.

    `(sqrt(|f(x_{n+1}) - stop_gradient(f(x_n))|^2 + c^2) - c) / (t_{n+1} - t_n)`, the norm over the whole
    vector (several published implementations take it per element). Song and Dhariwal 2023, section 3.

    Args:
        f, teacher, x0, z, u, progress, levels, tanh: see the module's text; the teacher is not used.
        s0, s1: curriculum of N(k), `ict_discretisation`.
        mean, std: of ln t, `lognormal_index`.
        c: of the pseudo-Huber metric; the paper's `0.00054 sqrt(D)` where None, nearly l1 in few dimensions.
    """
    c = 0.00054 * x0.shape[-1] ** 0.5 if c is None else c
    count = ict_discretisation(progress, s0, s1)
    index = lognormal_index(u, count, levels, mean, std)
    low, high = levels.level(index, count), levels.level(index + 1, count)
    with torch.no_grad():
        target = f(perturb(x0, low, z, tanh=tanh), low)
    error = f(perturb(x0, high, z, tanh=tanh), high) - target.detach()
    distance = torch.sqrt(error.square().sum(-1) + c**2) - c
    return distance / (high - low), {"levels": count}


OBJECTIVES: dict[str, Objective] = {"denoise": denoise, "ct": ct, "ict": ict}
