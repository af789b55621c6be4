"""Losses on the noise levels of one path: denoising and the consistency losses.

Their common signature is described in `cpql.consistency.objectives`.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cpql.consistency.function import Function, derivative, network_of, perturb
from cpql.consistency.levels import (
    Levels,
    acting_or_index,
    acting_or_level,
    ct_discretisation,
    easy_ratio,
    ict_discretisation,
    lognormal_index,
    lognormal_level,
    uniform_index,
)

__all__ = ["Metrics", "cd", "ct", "denoise", "distance", "ect", "ict", "scm"]

Metrics = dict[str, Tensor]

Metric = Literal["l2", "l1", "huber"]
Weight = Literal["none", "interval"]
LevelDistribution = Literal["uniform", "lognormal"]


def denoise(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    acting: Tensor | None = None,
    tanh: bool = False,
    noise: LevelDistribution = "uniform",
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
        f, teacher, x0, z, u, progress, levels, acting, tanh: see the module's text; the teacher is not used.
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
    t = acting_or_level(acting, t)
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
    acting: Tensor | None = None,
    tanh: bool = False,
    curriculum: Literal["root", "doubling"] = "root",
    s0: int = 2,
    s1: int = 150,
    noise: LevelDistribution = "uniform",
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
        f, teacher, x0, z, u, progress, levels, acting, tanh: see the module's text.
        curriculum: how N(k) grows: `root`, `ct_discretisation`, or `doubling`, `ict_discretisation`.
        s0, s1: where it starts and ends.
        noise: how n is drawn: `uniform_index` or `lognormal_index`.
        mean, std: of ln t, for `lognormal`.
        target: which function gives the target: the EMA `teacher`, or f itself (`self`).
        metric, c: d, see `distance`.
        weight: w is 1 (`none`), or 1 / (t_{n+1} - t_n) (`interval`), as Consistency-AC's code always has it.
        scale: factor of the loss; Consistency-AC's is 100.
    """
    count = (ct_discretisation if curriculum == "root" else ict_discretisation)(progress, s0, s1)
    if noise == "uniform":
        index = uniform_index(u, count)
    else:
        index = lognormal_index(u, count, levels, mean, std)
    index = acting_or_index(acting, index, count, levels)
    low, high = levels.level(index, count), levels.level(index + 1, count)
    with torch.no_grad():
        x_target = (teacher if target == "ema" else f)(perturb(x0, low, z, tanh=tanh), low)
    error = f(perturb(x0, high, z, tanh=tanh), high) - x_target.detach()
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
    acting: Tensor | None = None,
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
    its official code. Its f is defined down to 0; ours from t_min on, so an r below t_min is taken as 0, in
    the target and in the weight.

    Args:
        f, teacher, x0, z, u, progress, levels, acting, tanh: see the module's text; the teacher is not used.
        stages, q, k, b: of the ratio r / t, `easy_ratio`.
        mean, std: of ln t, `lognormal_level`.
        metric, c: d, see `distance`.
        weight: w is 1 / (t - r) (`interval`), or 1 (`none`).
        scale: factor of the loss.
    """
    t = acting_or_level(acting, lognormal_level(u, levels, mean, std))
    r = t * easy_ratio(t, progress, stages, q, k, b)
    r = torch.where(r < levels.t_min, 0.0, r)
    low = r.clamp(min=levels.t_min)  # what f is asked at where its answer isn't used
    with torch.no_grad():
        x_target = f(perturb(x0, low, z, tanh=tanh), low)
    x_target = torch.where((r > 0).unsqueeze(-1), x_target.detach(), x0)
    loss = scale * distance(f(perturb(x0, t, z, tanh=tanh), t) - x_target, metric, c)
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
    acting: Tensor | None = None,
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
        f, teacher, x0, z, u, progress, levels, acting: see the module's text.
        guide: the denoiser D(x, t).
        solver: `heun`, which the paper prefers, asks the denoiser twice, `euler` once.
        count: the fixed number of levels.
        target: which function gives the target: the EMA `teacher`, or f itself (`self`).
        metric, c: d, see `distance`.
        weight: w is 1 (`none`), or 1 / (t_{n+1} - t_n) (`interval`).
        scale: factor of the loss.
    """
    n = torch.full_like(u, float(count))
    index = acting_or_index(acting, uniform_index(u, n), n, levels)
    low, high = levels.level(index, n), levels.level(index + 1, n)
    x = perturb(x0, high, z)
    with torch.no_grad():
        step, slope = (low - high).unsqueeze(-1), (x - guide(x, high)) / high.unsqueeze(-1)
        below = x + step * slope
        if solver == "heun":
            slope = 0.5 * (slope + (below - guide(below, low)) / low.unsqueeze(-1))
            below = x + step * slope
        x_target = (teacher if target == "ema" else f)(below, low)
    loss = scale * distance(f(x, high) - x_target.detach(), metric, c)
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
    acting: Tensor | None = None,
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
        f, teacher, x0, z, u, progress, levels, acting: see the module's text; the teacher is not used. f's
            parameterisation is `trig`.
        mean, std: of ln(sigma_data tan a), which is ln t, `lognormal_level`.
        warmup: fraction of the training over which r grows from 0 to 1; the paper's is 10,000 updates.
        c: of the tangent's normalisation.

    Raises:
        ValueError: f has another parameterisation.
    """
    f = network_of(f, "trig")
    sigma_data = f.parameterisation.sigma_data
    t = acting_or_level(acting, lognormal_level(u, levels, mean, std))
    angle = torch.atan(t / sigma_data)
    cos, sin = torch.cos(angle).unsqueeze(-1), torch.sin(angle).unsqueeze(-1)
    x, slope = cos * x0 + sin * sigma_data * z, cos * sigma_data * z - sin * x0
    r = (progress / warmup).clamp(max=1.0) if warmup > 0 else 1.0
    # The tangent comes multiplied by cos sin, which keeps it small where a network in a is steep.
    factor = cos * sin
    out, change = derivative(
        f.network, (x / sigma_data, angle), (factor * slope / sigma_data, factor.squeeze(-1))
    )
    fixed = out.detach()
    g = -(cos**2) * (sigma_data * fixed - slope) - r * (factor * x + sigma_data * change)
    g = g / (torch.linalg.vector_norm(g, dim=-1, keepdim=True) + c)
    return (out - fixed - g).square().mean(-1), {}
