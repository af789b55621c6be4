"""Updates a second of every agent, and the floor of their FLOPs."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from cpql.agents import CPQL, ActorCriticConfig, Agent, ConsistencyAC, ConsistencyACConfig, CPQLConfig
from cpql.data.transitions import Transitions
from measure.turns import rates

__all__ = ["ACTION_DIM", "ROWS", "STATE_DIM", "Cell", "arrays", "speed", "updater"]

STATE_DIM, ACTION_DIM = 11, 3  # Hopper's
ROWS = 50_000

KINDS: dict[str, tuple[type[Agent], ActorCriticConfig]] = {
    "cpql": (CPQL, CPQLConfig()),
    "cpiql": (CPQL, CPQLConfig(critic="expectile")),
    "consistency_ac": (ConsistencyAC, ConsistencyACConfig()),
}


class Cell(NamedTuple):
    """One row of the table."""

    kind: str
    mode: str
    members: int
    precision: str


def arrays(rows: int = ROWS) -> dict[str, NDArray[np.float32]]:
    """Made-up transitions of Hopper's sizes."""
    random = np.random.default_rng(0)
    return {
        "observations": random.standard_normal((rows, STATE_DIM), np.float32),
        "next_observations": random.standard_normal((rows, STATE_DIM), np.float32),
        "actions": random.random((rows, ACTION_DIM), np.float32) * 2 - 1,
        "rewards": random.standard_normal(rows, np.float32),
        "terminals": np.zeros(rows, np.float32),
    }


def updater(cell: Cell, data: Transitions, width: int = 256, batch: int = 256) -> Callable[[], object]:
    """One update of an agent of ours, sampling of the batch and of its noise included."""
    maker, config = KINDS[cell.kind]
    widths = (width,) * 3
    actor = dataclasses.replace(config.actor, hidden=widths)
    config = dataclasses.replace(config, actor=actor, critic_hidden=widths, batch_size=batch)
    seed: int | range = range(cell.members) if cell.members > 1 else 0
    product = torch.bfloat16 if cell.precision == "bf16" else None
    agent = maker(STATE_DIM, ACTION_DIM, config, seed=seed, device=data.device, matmul_dtype=product)
    each = [torch.Generator(data.device).manual_seed(k) for k in range(cell.members)]
    draws = each if cell.members > 1 else each[0]
    torch._dynamo.config.recompile_limit = 64  # a table has many rows; a training has one program
    update = torch.compile(agent.update, fullgraph=True) if cell.mode == "compiled" else agent.update
    return lambda: update(data.sample(config.batch_size, draws), agent.draw(draws))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Time updates; rows take turns."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    data = Transitions.from_dict(arrays()).to(device)

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def prepared(cell: Cell) -> Callable[[], object]:
        return updater(cell, data, options.width, options.batch)

    work = {}
    for kind in options.agents:
        with FlopCounterMode(display=False) as counter:
            prepared(Cell(kind, "eager", 1, "fp32"))()
        work[kind] = counter.get_total_flops()

    def product(dtype: torch.dtype) -> Callable[[], object]:
        a, b = (
            torch.randn(n, options.width, device=device).to(dtype) for n in (options.batch, options.width)
        )
        return lambda: torch.mm(a, b.T)

    products = {"fp32": product(torch.float32), "bf16": product(torch.bfloat16)}
    calls: dict[str | Cell, Callable[[], object]] = {p: products[p] for p in options.precisions}
    first: dict[Cell, float] = {}
    for kind in options.agents:
        for precision in options.precisions:
            for mode in options.modes:
                for members in options.members:
                    cell = Cell(kind, mode, members, precision)
                    calls[cell], began = prepared(cell), time.perf_counter()
                    calls[cell]()
                    finished()
                    first[cell] = time.perf_counter() - began
                    print(f"{' '.join(map(str, cell))}: first update after {first[cell]:.1f} s", flush=True)
    found = rates(calls, options.rounds, options.seconds, finished)
    flops = {
        p: statistics.median(found[p]) * 2 * options.batch * options.width**2 for p in options.precisions
    }
    table = Table(
        title=f"updates a second, {options.threads} thread(s), batch {options.batch}, width {options.width}"
    )
    for column in ("agent", "precision", "mode", "members", "updates/s", "seed-updates/s", "of the floor"):
        table.add_column(column)
    rows = []
    for cell, seconds in first.items():
        updates = statistics.median(found[cell])
        floor = flops[cell.precision] / work[cell.kind]
        rows.append(
            {
                "agent": cell.kind,
                "mode": cell.mode,
                "members": cell.members,
                "precision": cell.precision,
                "updates_per_second": updates,
                "seed_updates_per_second": updates * cell.members,
                "floor_seed_updates_per_second": floor,
                "first_update_seconds": seconds,
                "rounds": found[cell],
            }
        )
        shares = (
            f"{updates:,.1f}",
            f"{updates * cell.members:,.1f}",
            f"{updates * cell.members / floor:.0%}",
        )
        table.add_row(cell.kind, cell.precision, cell.mode, str(cell.members), *shares)
    Console().print(table)
    return {
        "threads": options.threads,
        "device": str(device),
        "batch": options.batch,
        "width": options.width,
        "seconds": options.seconds,
        "flops_of_one_update": work,
        "product_flops_per_second": flops,
        "rows": rows,
    }
