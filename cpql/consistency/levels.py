"""Which noise levels there are, how many, and how one is drawn.

The number of levels N may be a tensor: a level is a formula on (index, N), never an array of length N, so a
curriculum over N changes no shape and a compiled update is compiled once. Schedules take `progress`, the
fraction of the whole training that is done, in [0, 1]. (Consistency-AC's code restarts its schedule at every
logging interval, so that its N sweeps 2..150 forty times a run; the agent's `curriculum_restarts` has that.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Levels",
    "acting_or_index",
    "acting_or_level",
    "ct_discretisation",
    "ct_teacher_decay",
    "easy_ratio",
    "ict_discretisation",
    "lognormal_index",
    "lognormal_level",
    "uniform_index",
]


@dataclass(frozen=True)
class Levels:
    """Karras et al. 2022, equation 5, ascending: index 0 is t_min, index N - 1 is t_max.

    Attributes:
        t_min: smallest level, greater than 0.
        t_max: largest level; 80 is the papers' habit from images, a few units fit actions better.
        rho: the larger, the more levels are near t_min.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0.0 < self.t_min < self.t_max:
            raise ValueError(f"levels need 0 < t_min < t_max, found t_min={self.t_min}, t_max={self.t_max}")

    def level(self, index: Tensor, count: Tensor) -> Tensor:
        """The level of index i in 0..N-1: `(t_min^(1/rho) + i/(N-1) (t_max^(1/rho) - t_min^(1/rho)))^rho`."""
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        t: Tensor = (low + index / (count - 1) * (high - low)) ** self.rho
        return t.clamp(self.t_min, self.t_max)  # the power loses the ends to rounding

    def index(self, t: Tensor, count: Tensor) -> Tensor:
        """The inverse of `level`, as a real number."""
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        index: Tensor = (t ** (1 / self.rho) - low) / (high - low) * (count - 1)
        return index


def ct_discretisation(progress: Tensor, s0: int = 2, s1: int = 150) -> Tensor:
    """Number of levels N(k) of consistency training, k/K = progress.

    `N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1` (Song et al. 2023, Appendix C): s0 at the
    start, s1 + 1 at the end. Consistency-AC's code drops the `+ 1` beside s1: pass `s1=149` for its figures.
    """
    return torch.ceil(torch.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def ct_teacher_decay(count: Tensor, s0: int = 2, mu0: float = 0.95) -> Tensor:
    """The EMA teacher's decay `mu(k) = exp(s0 ln(mu0) / N(k))` (Song et al. 2023, Appendix C)."""
    return torch.exp(s0 * math.log(mu0) / count)


def ict_discretisation(progress: Tensor, s0: int = 10, s1: int = 1280) -> Tensor:
    """Number of levels of improved consistency training, doubling in equal stretches.

    `N(k) = min(s0 2^floor(k/K'), s1) + 1`, `K' = floor(K / (log2 floor(s1/s0) + 1))`
    (Song and Dhariwal 2023, section 3.5). With `progress = k/K`, `k/K'` is
    `progress (log2 floor(s1/s0) + 1)` up to the rounding of K'.
    """
    stretches = math.log2(s1 // s0) + 1
    return torch.clamp(s0 * torch.exp2(torch.floor(progress * stretches)), max=s1) + 1


def uniform_index(u: Tensor, count: Tensor) -> Tensor:
    """Index n ~ U{0, ..., N - 2} from u ~ U[0, 1)."""
    return torch.minimum(torch.floor(u * (count - 1)), count - 2)


def lognormal_index(u: Tensor, count: Tensor, levels: Levels, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Index n in 0..N-2 with iCT's discretised lognormal probability, from u ~ U[0, 1).

    `p(n) ~ erf((ln t_{n+1} - mean) / (sqrt2 std)) - erf((ln t_n - mean) / (sqrt2 std))` (Song and Dhariwal
    2023, equation 10). The sum over n telescopes, so the inverse of its distribution function is closed:
    draw t from the lognormal truncated to [t_min, t_max] and take the interval it falls in.
    """
    t = lognormal_level(u, levels, mean, std)
    index = torch.floor(levels.index(t, count))
    return torch.minimum(index.clamp(min=0), count - 2)


def lognormal_level(u: Tensor, levels: Levels, mean: float, std: float) -> Tensor:
    """A level whose logarithm is normal, truncated to [t_min, t_max], from u ~ U[0, 1).

    On a linear flow, where `s = t / (1 + t)`, ln t is the logit of s: there it is a logit-normal s.
    """
    scale = math.sqrt(2.0) * std
    low = math.erf((math.log(levels.t_min) - mean) / scale)
    high = math.erf((math.log(levels.t_max) - mean) / scale)
    t = torch.exp(mean + scale * torch.erfinv(low + u * (high - low)))
    return t.clamp(levels.t_min, levels.t_max)


def acting_or_level(acting: Tensor | None, t: Tensor) -> Tensor:
    """The levels t, and those of `acting` in their place where it isn't 0."""
    return t if acting is None else torch.where(acting > 0, acting, t)


def acting_or_index(acting: Tensor | None, index: Tensor, count: Tensor, levels: Levels) -> Tensor:
    """The indices n in 0..N-2 of pairs of levels (n, n + 1), by `acting` where it isn't 0.

    There the pair's upper level is the lowest one of the grid that isn't below the acting level.
    """
    if acting is None:
        return index
    above = torch.ceil(levels.index(acting, count) - 1e-3)  # a level of the grid is itself, despite rounding
    return torch.where(acting > 0, torch.minimum((above - 1).clamp(min=0), count - 2), index)


def easy_ratio(t: Tensor, progress: Tensor, stages: int, q: float, k: float, b: float) -> Tensor:
    """The ratio r / t of easy consistency tuning, which nears 1 in equal stages of the training.

    `max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b t)))`, stage = 0, 1, ... (Geng et al. 2024, section 3.3). The
    official code counts a stage's length in images; here `stages` of them share the training.
    """
    stage = torch.floor(progress * stages).clamp(max=stages - 1)
    return (1.0 - q ** (-stage - 1.0) * (1.0 + k * torch.sigmoid(-b * t))).clamp(min=0.0)
