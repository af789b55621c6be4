"""Statistics are those of an independent implementation, of slow loops, and of what has to hold for any."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from cpql.experiments.statistics import (
    Scores,
    estimate,
    expected_best,
    improvement,
    iqm,
    mean,
    median,
    profile,
)

X: Scores = [
    np.array(task)
    for task in (
        [50.2, 37.7, 35.7, 38.6, 42.4],
        [39.3, 67.4, 109.9, 62.0, 67.1],
        [23.3, 3.8, 21.8, 11.6, 27.7],
        [93.3, 94.3, 93.9, 93.8, 94.4],
    )
]
Y: Scores = [
    np.array(task)
    for task in (
        [37.7, 29.8, 30.0, 39.6, 28.4, 34.7],
        [72.9, 74.9, 77.9, 81.1, 88.2, 66.9],
        [33.3, 15.0, 21.9, 21.8, 17.4, 23.0],
        [92.0, 90.4, 94.7, 96.8, 87.4, 89.7],
    )
]

# What rliable 1.2.0 says of X, and of X against Y, with 200,000 and 50,000 resamples.
RLIABLE: dict[str, tuple[Callable[..., Any], Scores, float, float, float]] = {
    "iqm": (iqm, X, 53.37, 45.66, 61.42),
    "mean": (mean, X, 55.41, 50.305, 61.190125),
    "median": (median, X, 55.03, 45.71, 66.07),
    "improvement": (improvement, [*X, *Y], 0.55, 0.38333333, 0.72083333),
}
THRESHOLDS = [0, 20, 40, 60, 80, 100]
RLIABLE_PROFILE = (
    [1.0, 0.9, 0.55, 0.45, 0.3, 0.05],
    [1.0, 0.8, 0.4, 0.35, 0.25, 0.0],
    [1.0, 1.0, 0.7, 0.5, 0.4, 0.15],
)


@pytest.mark.parametrize("name", RLIABLE)
def test_a_statistic_and_its_interval_are_rliables(name: str) -> None:
    kind, scores, value, low, high = RLIABLE[name]
    found = estimate(kind, scores)
    assert found.value == pytest.approx(value, abs=1e-9)
    # 10,000 resamples leave the ends uncertain by about a hundredth of the interval.
    assert found.low == pytest.approx(low, abs=0.03 * (high - low))
    assert found.high == pytest.approx(high, abs=0.03 * (high - low))


def test_a_profile_and_its_band_are_rliables() -> None:
    found = profile(X, THRESHOLDS)
    np.testing.assert_allclose(found.value, RLIABLE_PROFILE[0], atol=1e-9)
    np.testing.assert_allclose(found.low, RLIABLE_PROFILE[1], atol=0.051)  # one run of twenty
    np.testing.assert_allclose(found.high, RLIABLE_PROFILE[2], atol=0.051)


Tasks = st.lists(
    st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), min_size=1, max_size=6).map(np.array),
    min_size=1,
    max_size=5,
)
Pairs = Tasks.flatmap(lambda ours: st.tuples(st.just(ours), st.permutations(ours)))


@given(Tasks)
def test_averages_are_those_of_slow_loops(tasks: list[NDArray[np.float64]]) -> None:
    runs = sorted(float(run) for task in tasks for run in task)
    cut = len(runs) // 4
    assert iqm(*tasks) == pytest.approx(statistics.fmean(runs[cut : len(runs) - cut]))
    means = [statistics.fmean(map(float, task)) for task in tasks]
    assert mean(*tasks) == pytest.approx(statistics.fmean(means))
    assert median(*tasks) == pytest.approx(statistics.median(means))


@settings(max_examples=40)
@given(Pairs)
def test_improvement_is_mann_whitneys_and_has_a_counterpart(pair: tuple[Scores, Scores]) -> None:
    ours, theirs = pair
    shares = [mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in zip(ours, theirs, strict=True)]
    slow = [
        statistics.fmean((a > b) + (a == b) / 2 for a, b in itertools.product(x.tolist(), y.tolist()))
        for x, y in zip(ours, theirs, strict=True)
    ]
    found = improvement(*ours, *theirs)
    assert found == pytest.approx(statistics.fmean(slow)) == pytest.approx(statistics.fmean(shares))
    assert found + improvement(*theirs, *ours) == pytest.approx(1.0)
    assert improvement(*(x + 10_000 for x in ours), *theirs) == 1.0


@settings(max_examples=40)
@given(Tasks, st.randoms(use_true_random=False))
def test_order_doesnt_matter_and_units_pass_through(tasks: list[NDArray[np.float64]], random: Any) -> None:
    shuffled = [np.array(random.sample(task.tolist(), len(task))) for task in tasks]
    random.shuffle(shuffled)
    for kind in (iqm, mean, median):
        assert kind(*shuffled) == pytest.approx(kind(*tasks))
        assert kind(*(3 * task + 7 for task in tasks)) == pytest.approx(3 * kind(*tasks) + 7)


def test_an_interval_follows_the_unit_and_the_seed() -> None:
    one, other = estimate(iqm, X), estimate(iqm, [2 * task - 5 for task in X])
    np.testing.assert_allclose([other.low, other.high], [2 * one.low - 5, 2 * one.high - 5])
    assert estimate(iqm, X) == one != estimate(iqm, X, seed=1)


def test_resamples_are_stratified_by_task() -> None:
    """Tasks that differ by a lot, whose runs don't: their number in a resample is no source of noise."""
    found = estimate(iqm, [np.full(3, 5.0), np.full(4, 50.0), np.full(5, 500.0)])
    assert found.low == found.value == found.high


def test_a_task_with_a_single_run_has_no_interval() -> None:
    found = estimate(mean, [np.array([1.0, 2.0]), np.array([3.0])])
    assert found.value == 2.25 and np.isnan(found.low) and np.isnan(found.high)
    band = profile([np.array([1.0])], [0.0, 2.0])
    assert band.value.tolist() == [1.0, 0.0] and np.isnan(band.low).all()


@given(Tasks)
def test_a_profile_falls_from_one_to_nothing(tasks: list[NDArray[np.float64]]) -> None:
    levels = np.linspace(-126, 125, 20)
    found = profile(tasks, levels, resamples=20).value
    slow = [statistics.fmean(float((task > level).mean()) for task in tasks) for level in levels]
    np.testing.assert_allclose(found, slow)
    assert found[0] == 1.0 and found[-1] == 0.0 and (np.diff(found) <= 1e-12).all()


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=5), st.integers(1, 4))
def test_the_expected_best_is_that_of_all_draws(scores: list[int], tries: int) -> None:
    slow = statistics.fmean(max(drawn) for drawn in itertools.product(scores, repeat=tries))
    assert expected_best(scores, tries) == pytest.approx(slow)
    curve = expected_best(scores, np.arange(1, 30))
    assert curve[0] == pytest.approx(statistics.fmean(scores))
    assert (np.diff(curve) >= -1e-9).all() and curve[-1] <= max(scores) + 1e-9


@pytest.mark.parametrize("kind", [iqm, mean, median], ids=lambda kind: kind.__name__)
def test_ten_thousand_resamples_take_under_a_second(kind: Callable[..., Any]) -> None:
    scores = np.random.default_rng(0).normal(size=(50, 10))
    estimate(kind, X, resamples=10)
    before = time.process_time()
    estimate(kind, list(scores))
    assert time.process_time() - before < 1.0
