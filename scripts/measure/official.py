"""The papers' own codes as a yardstick: their updates and their way to act beside ours.

They are read from wherever their repositories were checked out and run as they are, on the CPU, with their
settings for hopper-medium. Left out is what their main programs do around an update (CPQL's resets an
environment and writes four TensorBoard figures at each), so that the ratios are of the updates alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cpql.actors.consistency import ActorConfig
from cpql.data.transitions import Transitions
from measure.acting import untrained
from measure.speed import ACTION_DIM, STATE_DIM, Cell, arrays, updater
from measure.turns import latencies, rates

__all__ = ["official"]

BATCH = 256
# Consistency-AC's train() runs its whole curriculum N(k) in each call, here in this many updates.
ITERATIONS = 25


class Row(NamedTuple):
    """One row of the table: whose code, how, on how many threads."""

    agent: str
    form: str
    threads: int


def borrowed(folder: Path, *names: str) -> list[ModuleType]:
    """Import modules from a checkout, as if nothing had happened to `sys.modules`.

    Both checkouts have packages called `agents` and `utils`, and their logger wants `tabulate`, of which an
    update needs nothing: where it isn't installed an empty module stands in for it.
    """
    if not (folder / "agents").is_dir():
        sys.exit(f"{folder}: expected a checkout with a folder agents/ in it")
    before = set(sys.modules)
    if importlib.util.find_spec("tabulate") is None:
        sys.modules["tabulate"] = ModuleType("tabulate")
        vars(sys.modules["tabulate"])["tabulate"] = None
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("agents", "utils", "tabulate"):
                del sys.modules[name]


def official(options: argparse.Namespace) -> dict[str, Any]:
    """Time the official updates and ours, then acting with 50 candidates; rows take turns."""
    warnings.filterwarnings("ignore", "Implicit dimension choice for softmax")  # theirs
    torch.manual_seed(0)
    made_up = arrays()
    data = Transitions.from_dict(made_up)
    learner, sampler = borrowed(options.cpql, "agents.ql_cm", "utils.data_sampler")
    cpql = learner.CPQL("cpu", STATE_DIM, ACTION_DIM, rl_type="offline", eta=2.0, lr=3e-4, grad_norm=9.0)
    cpql_data = sampler.Data_Sampler(made_up, "cpu", "no")
    learner, sampler = borrowed(options.cac, "agents.ql_consistency", "utils.data_sampler")
    cac = learner.Consistency_QL(
        STATE_DIM, ACTION_DIM, 1.0, "cpu", discount=0.99, tau=0.005, eta=0.1, n_timesteps=2, grad_norm=9.0
    )
    cac_data = sampler.Data_Sampler(made_up, "cpu", "no")
    for agent in (cpql, cac):
        agent.step = agent.step_start_ema  # from where on all targets move

    def theirs(kind: str) -> Callable[[], object]:
        if kind == "cpql":
            return lambda: [cpql.train(cpql_data, BATCH) for _ in range(ITERATIONS)]
        return lambda: cac.train(cac_data, ITERATIONS, BATCH)

    def ours(kind: str, form: str) -> Callable[[], object]:
        mode, precision = form.split()
        update = updater(Cell(kind, mode, 1, precision), data, batch=BATCH)
        update()  # compiles, for as many threads as are set
        return lambda: [update() for _ in range(ITERATIONS)]

    calls: dict[Row, Callable[[], object]] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for kind in ("cpql", "consistency_ac"):
            for form in ("official", *options.forms):
                print(f"preparing {kind}, {form}, {threads} thread(s)", flush=True)
                call = theirs(kind) if form == "official" else ours(kind, form)

                def on_threads(call: Callable[[], object] = call, threads: int = threads) -> None:
                    if torch.get_num_threads() != threads:
                        torch.set_num_threads(threads)
                    call()

                calls[Row(kind, form, threads)] = on_threads
    found = rates(calls, options.rounds, options.seconds)
    table = Table(title=f"updates a second, Hopper's sizes, batch {BATCH}, CPU")
    for column in ("agent", "code", "threads", "updates/s", "ratio to official"):
        table.add_column(column)
    rows = []
    for row, rounds in found.items():
        base = found[Row(row.agent, "official", options.threads[0])]
        ratio = statistics.median(a / b for a, b in zip(rounds, base, strict=True))
        updates = ITERATIONS * statistics.median(rounds)
        table.add_row(row.agent, row.form, str(row.threads), f"{updates:.1f}", f"{ratio:.2f}")
        rows.append(row._asdict() | {"updates_per_second": updates, "ratio": ratio})
    if len(options.threads) > 1:
        table.caption = f"ratios to the official code on {options.threads[0]} thread(s)"
    Console().print(table)

    torch.set_num_threads(1)
    observation = np.random.default_rng(0).normal(size=STATE_DIM).astype(np.float32)
    same_actors = {
        "cpql": (cpql, ActorConfig(clamp="inside"), True),
        "consistency_ac": (cac, ActorConfig(parameterisation="unscaled", refinements=(2.0,)), False),
    }
    acts: dict[tuple[str, str], Callable[[], object]] = {}
    for kind, (agent, config, layer_norm) in same_actors.items():
        policy = untrained(STATE_DIM, ACTION_DIM, config, candidates=50, layer_norm=layer_norm)
        acts[kind, "official sample_action"] = lambda a=agent: a.sample_action(observation)  # type: ignore[misc]
        acts[kind, "predict, 50 candidates"] = lambda p=policy: p.predict(observation)  # type: ignore[misc]
    medians = latencies(acts, options.rounds)
    table = Table(title="microseconds an action, 50 candidates, batch 1, CPU, 1 thread")
    for column in ("agent", "code", "microseconds", "times faster"):
        table.add_column(column)
    actions = []
    for (kind, form), value in medians.items():
        ratio = medians[kind, "official sample_action"] / value
        table.add_row(kind, form, f"{value:,.0f}", f"{ratio:.2f}")
        actions.append({"agent": kind, "form": form, "microseconds": value, "ratio": ratio})
    Console().print(table)
    sources = {"cpql": options.cpql / "agents/ql_cm.py", "cac": options.cac / "agents/ql_consistency.py"}
    return {
        "about": __doc__,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "batch": BATCH,
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()},
        "updates": rows,
        "actions": actions,
    }
