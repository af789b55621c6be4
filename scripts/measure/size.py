"""What an update costs against the width of the networks, the batch and the dataset."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cpql.data.transitions import Transitions
from measure.speed import ROWS, Cell, arrays, updater
from measure.turns import rates

__all__ = ["size"]

PLOT = Path(__file__).resolve().parents[2] / "docs" / "size.png"


class Size(NamedTuple):
    """One row of the table."""

    precision: str
    width: int
    batch: int
    rows: int


def size(options: argparse.Namespace) -> dict[str, Any]:
    """Time compiled updates of one agent; rows take turns."""
    torch.set_num_threads(1)
    sizes = [
        Size(precision, width, batch, ROWS)
        for precision in options.precisions
        for width in options.widths
        for batch in options.batches
    ]
    sizes += [Size("fp32", options.widths[0], options.batches[0], rows) for rows in options.datasets]
    datasets = {rows: Transitions.from_dict(arrays(rows)) for rows in {each.rows for each in sizes}}
    calls: dict[Size, Callable[[], object]] = {}
    for each in sizes:
        print(f"preparing {each}", flush=True)
        cell = Cell(options.agent, "compiled", 1, each.precision)
        calls[each] = updater(cell, datasets[each.rows], each.width, each.batch)
        calls[each]()
    found = {each: statistics.median(v) for each, v in rates(calls, options.rounds, options.seconds).items()}
    table = Table(title=f"{options.agent}, compiled, one thread")
    for column in ("precision", "width", "batch", "dataset", "updates/s", "transitions/s"):
        table.add_column(column, justify="right")
    for each, rate in found.items():
        cells = (f"{each.width}", f"{each.batch:,}", f"{each.rows:,}", f"{rate:.2f}")
        table.add_row(each.precision, *cells, f"{rate * each.batch:,.0f}")
    Console().print(table)
    plot(found, options)
    return {
        "agent": options.agent,
        "threads": 1,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "sizes": [each._asdict() | {"updates_per_second": rate} for each, rate in found.items()],
    }


def plot(found: dict[Size, float], options: argparse.Namespace) -> None:
    """Draw transitions a second against the batch, a line for each width, and against the dataset."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for k, width in enumerate(options.widths):
        for precision, style in zip(options.precisions, ("-", "--"), strict=False):
            rates_ = [found[Size(precision, width, batch, ROWS)] * batch for batch in options.batches]
            left.plot(
                options.batches, rates_, f"o{style}", color=f"C{k}", label=f"width {width}, {precision}"
            )
    left.set(xlabel="batch", ylabel="transitions a second", xscale="log", yscale="log")
    left.set_xticks(options.batches, [str(batch) for batch in options.batches])
    left.minorticks_off()
    low, high = left.get_ylim()
    left.set_ylim(low, 4 * high)
    left.legend(fontsize=8, ncols=len(options.precisions), loc="upper right")
    rows = sorted({each.rows for each in found})
    base = [found[Size("fp32", options.widths[0], options.batches[0], n)] for n in rows]
    right.plot(rows, base, "o-", color="C0")
    right.set(xlabel="transitions in the dataset", ylabel="updates a second", xscale="log")
    right.set_ylim(0, 1.2 * max(base))
    right.set_title(f"width {options.widths[0]}, batch {options.batches[0]}, fp32", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(f"{options.agent}, compiled, one CPU thread", fontsize=11)
    figure.savefig(PLOT, dpi=110)
