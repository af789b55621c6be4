"""What a change costs a training: updates a second and the time of a checkpoint, of two checkouts in turn."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cpql.train.config import BudgetConfig
from measure.speed import arrays

__all__ = ["cost"]

HERE = Path(__file__).resolve().parents[2]

# A training as anybody runs it, and only what has been the same in both for long is asked for.
TRAIN = """
import csv, json, sys, time
from io import StringIO
from pathlib import Path
from rich.console import Console
from cpql.train import loop as training
from cpql.train.config import BudgetConfig, DatasetConfig, TrainConfig
from cpql.tasks import Task

data, run, updates, every = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
save, seconds = training._Training.save, []

def timed(self):
    began = time.perf_counter()
    save(self)
    seconds.append(time.perf_counter() - began)

training._Training.save = timed
budget = BudgetConfig(updates=updates, log_every=every, evaluate_every=updates, save_every=every)
agent = {"name": "cpql"}
config = TrainConfig(Task("cost", None), agent, DatasetConfig(path=data), budget,
                     run_dir=str(run), compile=True)
training.train_group([(config, {"agent": agent})], Console(file=StringIO()))
with (run / "timing.csv").open(newline="") as file:
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
speed = (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["seconds"] - rows[0]["seconds"])
print(json.dumps({"updates_per_second": speed, "checkpoint_seconds": seconds}))
"""


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Train with published widths, here and in the other checkout in turn."""
    names = {"before": options.other.resolve(), "after": HERE}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, allow_pickle=False, **arrays())
        for turn in range(options.rounds + 1):  # the first one compiles
            for name, checkout in list(names.items())[:: 1 if turn % 2 else -1]:
                words = [data, Path(folder) / f"{name}{turn}", options.updates, options.every]
                done = subprocess.run(
                    [sys.executable, "-c", TRAIN, *map(str, words)],
                    cwd=folder,
                    env={
                        **os.environ,
                        "PYTHONPATH": str(checkout),
                        "CPQL_CACHE": str(Path(folder) / f"cache-{name}"),
                        "OMP_NUM_THREADS": "1",
                    },
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                if turn:
                    found[name].append(json.loads(done.stdout))
    speeds = {name: [run["updates_per_second"] for run in runs] for name, runs in found.items()}
    saving = {
        name: [statistics.median(run["checkpoint_seconds"]) for run in runs] for name, runs in found.items()
    }
    ratio = statistics.median(a / b for a, b in zip(speeds["after"], speeds["before"], strict=True))
    before, after = (statistics.median(saving[name]) for name in names)
    between = BudgetConfig().save_every / statistics.median(speeds["before"])
    table = Table(title="cpql with published widths, compiled, one thread")
    for column in ("checkout", "updates/s", "checkpoint, ms"):
        table.add_column(column)
    for name in names:
        middle = statistics.median(speeds[name]), 1e3 * statistics.median(saving[name])
        table.add_row(name, f"{middle[0]:,.1f}", f"{middle[1]:.1f}")
    Console().print(
        table,
        f"updates a second: ratio {ratio:.3f}; checkpoints every {BudgetConfig().save_every:,} updates: "
        f"{100 * (after - before) / between:+.4f}% of the time",
        soft_wrap=True,
    )
    return {
        "updates": options.updates,
        "updates_per_second": speeds,
        "ratio_of_updates_per_second": ratio,
        "checkpoint_seconds": saving,
        "share_of_checkpoints": (after - before) / between,
    }
