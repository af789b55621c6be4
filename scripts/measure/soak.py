"""Trainings one after the other in one process: what of memory, threads and descriptors they leave behind."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from torture import KINDS, Place

__all__ = ["soak"]


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Train for a while, every kind in turn, and measure this process after each round."""
    kinds = dict(KINDS)
    if options.compile:
        kinds = {"compiled": replace(KINDS["single"], changes={"compile": True})}
    found: dict[str, list[int]] = {"memory_kib": [], "threads": [], "descriptors": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        place.start(KINDS["single"], place.base)
        began = time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            for kind in kinds.values():
                place.start(kind, place.folder / "run")
                shutil.rmtree(place.folder / "run")
            for name, value in _state().items():
                found[name].append(value)
    rounds, tenth = len(found["threads"]), max(1, len(found["threads"]) // 10)
    slopes = {name: _slope(values[rounds // 2 :]) for name, values in found.items()}
    for name, values in found.items():
        first, last = (statistics.median(part) for part in (values[tenth : 2 * tenth], values[-tenth:]))
        print(
            f"{name}: {first:,.0f} in the second tenth of {rounds} rounds of {len(kinds)} trainings, "
            f"{last:,.0f} in the last; {slopes[name]:+.3f} a round in the second half"
        )
    return {
        "minutes": options.minutes,
        "kinds": list(kinds),
        "rounds": rounds,
        "slopes_by_round_in_the_second_half": slopes,
        **found,
    }


def _state() -> dict[str, int]:
    """This process's memory in use in KiB, its threads and its open descriptors, as Linux counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_kib": int(lines["VmRSS"].split()[0]),
        "threads": int(lines["Threads"]),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def _slope(values: list[int]) -> float:
    """Of the least squares' line."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else 0.0
