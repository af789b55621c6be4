"""Measuring things in turn: on a busy machine only ratios of things measured in the same minute say much."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["latencies", "rates"]

Name = TypeVar("Name")


def rates(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int,
    seconds: float,
    finished: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """Calls a second in each round, for `seconds` a round each.

    Args:
        calls: what takes turns.
        rounds: how often.
        seconds: of one turn, at least one call.
        finished: waits for a device.
    """
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                call()
                count += 1
            finished()
            found[name].append(count / (time.perf_counter() - began))
    return found


def latencies(
    calls: Mapping[Name, Callable[[], object]], rounds: int, repeats: int = 200
) -> dict[Name, float]:
    """Microseconds of a call: the median over the rounds of each round's median."""
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            found[name].append(statistics.median(times))
    return {name: 1e6 * statistics.median(values) for name, values in found.items()}
