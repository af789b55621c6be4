"""Several seeds as members of one process on all cores, against one process a core with a seed each."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cpql.data.transitions import Transitions
from measure.speed import Cell, arrays, updater
from measure.turns import rates

__all__ = ["side"]


def side(options: argparse.Namespace) -> dict[str, Any]:
    """Run both ways in turn, each in fresh processes; the compile cache makes their start short."""
    found: dict[str, list[float]] = {"one process": [], "side by side": []}
    for _ in range(options.rounds):
        found["one process"].append(_rate(options, options.members, options.cores, 1))
        found["side by side"].append(_rate(options, 1, 1, options.cores))
    together, apart = (statistics.median(rates_) for rates_ in found.values())
    ratio = statistics.median(a / b for a, b in zip(*found.values(), strict=True))
    table = Table(title=f"{options.agent}, {options.precision}, {options.cores} cores")
    for column in ("how", "seed-updates/s"):
        table.add_column(column)
    table.add_row(f"{options.members} seeds, one process, {options.cores} threads", f"{together:.1f}")
    table.add_row(f"{options.cores} processes with a seed and a thread each", f"{apart:.1f}")
    Console().print(table, f"ratio {ratio:.2f}")
    return {
        "agent": options.agent,
        "precision": options.precision,
        "members": options.members,
        "cores": options.cores,
        "seconds": options.seconds,
        "seed_updates_per_second": found,
        "ratio": ratio,
    }


def _rate(options: argparse.Namespace, members: int, threads: int, processes: int) -> float:
    """Seed-updates a second of all processes together."""
    words = [options.agent, options.precision, *map(str, (members, threads, options.seconds))]
    code = "import sys; from measure.side import worker; worker(sys.argv[1:])"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    pipes = [(process.stdin, process.stdout) for process in started]
    for _, out in pipes:  # all of them are ready before any is let go, and all are let go before one is heard
        assert out is not None
        out.readline()
    for into, _ in pipes:
        assert into is not None
        into.write("go\n")
        into.flush()
    lines = [process.communicate()[0] for process in started]
    return sum(float(json.loads(line)) for line in lines)


def worker(words: list[str]) -> None:
    """Compile, wait for a line, measure, print the rate."""
    kind, precision, members, threads, seconds = words
    torch.set_num_threads(int(threads))
    update = updater(Cell(kind, "compiled", int(members), precision), Transitions.from_dict(arrays()))
    for _ in range(3):
        update()
    print("ready", flush=True)
    sys.stdin.readline()
    (rate,) = rates({"": update}, 1, float(seconds))[""]
    print(json.dumps(rate * int(members)))
