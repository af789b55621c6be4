"""Statistics of scores over tasks and seeds.

Scores are a list with an array for each task, `[runs]`: one number a run, of as many runs as the task has. A
statistic takes these arrays as its arguments and reduces their last axis; axes before it are resamples.
Formulae and sources are in docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "Estimate",
    "Scores",
    "estimate",
    "expected_best",
    "improvement",
    "iqm",
    "mean",
    "median",
    "profile",
]

Array = NDArray[np.float64]
Scores = Sequence[Array]
Statistic = Callable[..., Array]

IN_MEMORY = 20_000_000
"""Numbers that are resampled at once."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95% interval, each a number, or an array where the statistic is one.

    Attributes:
        value: of the scores themselves.
        low: lower end of the interval; NaN where a task has a single run, which nothing can be said about.
        high: upper end of the interval, likewise.
    """

    value: Array
    low: Array
    high: Array


def iqm(*tasks: Array, axis: int = -1) -> Array:
    """Interquartile mean: the mean of all tasks' runs without the lowest and the highest quarter.

    As rliable has it (Agarwal et al. 2021, section 4.3): of n runs floor(n / 4) are left out at either end.
    A task counts by its number of runs.
    """
    return np.asarray(stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis))


def mean(*tasks: Array, axis: int = -1) -> Array:
    """Mean over tasks of each task's mean over runs."""
    return np.asarray(np.mean([task.mean(axis) for task in tasks], axis=0))


def median(*tasks: Array, axis: int = -1) -> Array:
    """Median over tasks of each task's mean over runs."""
    return np.asarray(np.median([task.mean(axis) for task in tasks], axis=0))


def improvement(*tasks: Array, axis: int = -1) -> Array:
    """Probability that a run of X beats one of Y on the same task, averaged over tasks, in [0, 1].

    On each task it is the Mann-Whitney statistic over the number of pairs; a tie counts one half (Agarwal et
    al. 2021, section 4.3).

    Args:
        *tasks: X's scores of each task, then Y's in the same order.
        axis: only -1.
    """
    half = len(tasks) // 2
    shares = []
    for x, y in zip(tasks[:half], tasks[half:], strict=True):
        ours, theirs = x[..., :, None], y[..., None, :]
        shares.append(((ours > theirs).mean((-2, -1)) + (ours >= theirs).mean((-2, -1))) / 2)
    return np.asarray(np.mean(shares, axis=0))


def estimate(statistic: Statistic, scores: Scores, *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """A statistic with its 95% interval by the percentile bootstrap, stratified by task.

    Each resample draws every task's runs anew, with replacement and independently of the other tasks, as
    rliable does.

    Args:
        statistic: `iqm`, `mean`, `median`, `improvement` or another of that form.
        scores: an array for each of its arguments, [..., runs]; what comes before runs is drawn together.
        resamples: how many.
        seed: of the draws.
    """
    value = np.asarray(statistic(*scores, axis=-1))
    if min(task.shape[-1] for task in scores) < 2:
        return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    interval = stats.bootstrap(
        scores,
        statistic,
        n_resamples=resamples,
        batch=max(1, IN_MEMORY // sum(task.size for task in scores)),
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, np.asarray(interval.low), np.asarray(interval.high))


def profile(scores: Scores, thresholds: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Performance profile: the share of runs that score above each threshold, averaged over tasks.

    The band holds at each threshold by itself (Agarwal et al. 2021, section 4.2).

    Args:
        scores: an array for each task, [runs].
        thresholds: in the scores' unit, [n].
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    levels = np.asarray(thresholds)[:, None]
    above = [(task > levels).astype(np.float64) for task in scores]
    return estimate(mean, above, resamples=resamples, seed=seed)


def expected_best(scores: ArrayLike, tries: ArrayLike) -> Array:
    """Expected online performance: the expected score of the best of k settings, for each k in `tries`.

    The settings are drawn with replacement from those that have a score, `[n]`: with the scores in order,
    `sum_i s_i ((i / n)^k - ((i - 1) / n)^k)` (Kurenkov & Kolesnikov 2022, after Dodge et al. 2019, whose
    expected validation performance it is; ReBRAC reports it). At k = 1 that is the mean, and below the best
    for every k.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    below = np.arange(len(ordered) + 1) / len(ordered)
    best_is = np.diff(below ** np.asarray(tries)[..., None], axis=-1)  # the probability for each score
    return np.asarray(best_is @ ordered)
