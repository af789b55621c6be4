"""Measure cpql on this machine, and keep the figures as data.

    python scripts/benchmark.py speed             updates a second of every agent, and the floor of its FLOPs
    python scripts/benchmark.py acting            latency of an action, by rule, batch and form
    python scripts/benchmark.py loading           reading 2M transitions against bare h5py, and the memory
    python scripts/benchmark.py keep RUN...       keep the results of finished runs, in benchmarks/results/
    python scripts/benchmark.py table             print those as the README's table, a row a task

Figures go into benchmarks/NAME.json, with the machine's description. Times on a busy machine mean little:
what counts are the ratios, of things measured in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

# Each reading is a process of its own: memory that has been used before would flatter the second one.
READ = """
import json, resource, sys, time
import h5py, numpy, torch
from pathlib import Path
from cpql.data import d4rl

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path, before, began = Path(sys.argv[1]), peak(), time.perf_counter()
if sys.argv[2] == "bare":
    with h5py.File(path) as file:
        kept = {key: file[key][()] for key in d4rl.KEYS}
else:
    kept = d4rl.read(path, "benchmark")
print(json.dumps({"seconds": time.perf_counter() - began, "bytes": peak() - before}))
"""


def main() -> None:
    """Run the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    command = commands.add_parser("speed", help="updates a second")
    command.add_argument("--agents", nargs="+", default=["cpql", "cpiql", "consistency_ac"])
    command.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    command.add_argument("--members", type=int, nargs="+", default=[1, 4])
    command.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    command.add_argument("--width", type=int, default=256, help="of hidden layers (default: %(default)s)")
    command.add_argument("--batch", type=int, default=256, help="transitions a member (default: %(default)s)")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--device", default="cpu")
    command.add_argument("--rounds", type=int, default=7, help="each measures every row once, in turn")
    command.add_argument("--seconds", type=float, default=1.0, help="that a row runs in a round")
    command.add_argument("--name", default="speed", help="of the JSON (default: %(default)s)")
    command.set_defaults(run=speed)
    command = commands.add_parser("acting", help="latency of an action")
    command.add_argument("--rounds", type=int, default=7)
    command.set_defaults(run=acting)
    command = commands.add_parser("loading", help="reading and checking a D4RL file")
    command.add_argument("--transitions", type=int, default=2_000_000)
    command.add_argument("--repeats", type=int, default=7)
    command.set_defaults(run=loading)
    command = commands.add_parser("keep", help="keep the results of finished runs as data")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    command.set_defaults(run=keep_results)
    command = commands.add_parser("table", help="print the results that were kept as Markdown")
    command.set_defaults(run=lambda _: print(table()))
    options = parser.parse_args()
    options.run(options)


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    from cpql.evaluation import versions

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}


def keep(name: str, content: dict[str, Any]) -> None:
    """Write the figures down."""
    from cpql.checkpoint import write_text

    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    write_text(path, json.dumps(content | {"machine": machine()}, indent=2) + "\n")
    print(f"in {path.relative_to(FOLDER.parent)}")


def speed(options: argparse.Namespace) -> None:
    """Time updates, sampling of the batch and of its noise included; rows take turns."""
    import dataclasses
    import time

    import torch
    from rich.console import Console
    from rich.table import Table

    from cpql.agents import CPQL, Agent, AgentConfig, ConsistencyAC, ConsistencyACConfig, CPQLConfig
    from cpql.data.transitions import Transitions

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    kinds: dict[str, tuple[type[Agent], AgentConfig]] = {
        "cpql": (CPQL, CPQLConfig()),
        "cpiql": (CPQL, CPQLConfig(critic="expectile")),
        "consistency_ac": (ConsistencyAC, ConsistencyACConfig()),
    }
    random = torch.Generator().manual_seed(0)
    rows = 50_000
    state_dim, action_dim = 11, 3  # Hopper's
    data = Transitions.from_dict(
        {
            "observations": torch.randn(rows, state_dim, generator=random),
            "next_observations": torch.randn(rows, state_dim, generator=random),
            "actions": torch.rand(rows, action_dim, generator=random) * 2 - 1,
            "rewards": torch.randn(rows, generator=random),
            "terminals": torch.zeros(rows),
        }
    ).to(device)

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def prepared(kind: str, mode: str, members: int, precision: str) -> Any:
        maker, config = kinds[kind]
        widths = (options.width,) * 3
        actor = dataclasses.replace(config.actor, hidden=widths)
        config = dataclasses.replace(config, actor=actor, critic_hidden=widths, batch_size=options.batch)
        seed: int | range = range(members) if members > 1 else 0
        product = torch.bfloat16 if precision == "bf16" else None
        agent = maker(state_dim, action_dim, config, seed=seed, device=device, product=product)
        each = [torch.Generator(device).manual_seed(k) for k in range(members)]
        draws = each if members > 1 else each[0]
        update = torch.compile(agent.update, fullgraph=True) if mode == "compiled" else agent.update

        def once() -> None:
            update(data.sample(config.batch_size, draws), agent.draw(draws))

        began = time.perf_counter()
        once()
        finished()
        return once, time.perf_counter() - began

    from torch.utils.flop_counter import FlopCounterMode

    work = {}
    for kind in options.agents:
        once, _ = prepared(kind, "eager", 1, "fp32")
        with FlopCounterMode(display=False) as counter:
            once()
        work[kind] = counter.get_total_flops()

    def product_rate(dtype: torch.dtype) -> Any:
        a, b = (
            torch.randn(n, options.width, device=device).to(dtype) for n in (options.batch, options.width)
        )

        def once() -> None:
            torch.mm(a, b.T)

        return once, 2 * options.batch * options.width**2

    products = {"fp32": product_rate(torch.float32), "bf16": product_rate(torch.bfloat16)}
    cells = [
        (kind, mode, members, precision)
        for kind in options.agents
        for precision in options.precisions
        for mode in options.modes
        for members in options.members
    ]
    ready: dict[Any, Any] = {}
    rates: dict[Any, list[float]] = {}
    for cell in cells:
        ready[cell] = prepared(*cell)
        rates[cell] = []
        print(f"{' '.join(map(str, cell))}: first update after {ready[cell][1]:.1f} s", flush=True)

    def rate(once: Any) -> float:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < options.seconds:
            once()
            count += 1
        finished()
        return count / (time.perf_counter() - began)

    flops: dict[str, list[float]] = {precision: [] for precision in options.precisions}
    for _ in range(options.rounds):
        for precision in options.precisions:
            once, count = products[precision]
            flops[precision].append(rate(once) * count)
        for cell in cells:
            rates[cell].append(rate(ready[cell][0]))
    table_ = Table(
        title=f"updates a second, {options.threads} thread(s), batch {options.batch}, width {options.width}"
    )
    for column in ("agent", "precision", "mode", "members", "updates/s", "seed-updates/s", "of the floor"):
        table_.add_column(column)
    figures = []
    for cell in cells:
        kind, mode, members, precision = cell
        updates = statistics.median(rates[cell])
        floor = statistics.median(flops[precision]) / work[kind]
        figures.append(
            {
                "agent": kind,
                "mode": mode,
                "members": members,
                "precision": precision,
                "updates_per_second": updates,
                "seed_updates_per_second": updates * members,
                "floor_seed_updates_per_second": floor,
                "first_update_seconds": ready[cell][1],
                "rounds": rates[cell],
            }
        )
        shares = (f"{updates:,.1f}", f"{updates * members:,.1f}", f"{updates * members / floor:.0%}")
        table_.add_row(kind, precision, mode, str(members), *shares)
    Console().print(table_)
    keep(
        options.name,
        {
            "threads": options.threads,
            "device": str(device),
            "batch": options.batch,
            "width": options.width,
            "seconds": options.seconds,
            "flops_of_one_update": work,
            "product_flops_per_second": {key: statistics.median(values) for key, values in flops.items()},
            "rows": figures,
        },
    )


def acting(options: argparse.Namespace) -> None:
    """Time single actions and batches on the CPU, one thread; rows take turns."""
    import time

    import numpy as np
    import torch
    from rich.console import Console
    from rich.table import Table

    from cpql.actor import ActorConfig, ConsistencyActor
    from cpql.critic import TwinCritic
    from cpql.export import fold, to_onnx
    from cpql.policy import Policy, PolicyConfig
    from cpql.tasks import Task

    torch.set_num_threads(1)
    state_dim, action_dim = 11, 3

    def made(refinements: tuple[float, ...], candidates: int) -> Policy:
        actor = ConsistencyActor(state_dim, action_dim, ActorConfig(refinements=refinements))
        bounds = (-1.0,) * action_dim, (1.0,) * action_dim
        task = Task("benchmark", None, "", None, None)
        hidden = (256, 256, 256)
        config = PolicyConfig(
            state_dim, action_dim, *bounds, actor.config, hidden, True, candidates, 1.0, task
        )
        return Policy(actor, TwinCritic(state_dim, action_dim, hidden, layer_norm=True), config)

    observations = np.random.default_rng(0).normal(size=(256, state_dim)).astype(np.float32)
    calls: dict[str, Any] = {}
    for steps, refinements in ((1, ()), (2, (0.8,))):
        policy = made(refinements, 1)
        noise = np.zeros((steps, action_dim), np.float32)
        folded = fold(policy)
        calls[f"folded, numpy, {steps} step(s), batch 1"] = lambda f=folded, n=noise: f(observations[0], n)
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError:
            print("onnxruntime isn't installed: no ONNX rows")
        else:
            with tempfile.TemporaryDirectory() as folder:
                session = onnxruntime.InferenceSession(to_onnx(policy, Path(folder) / "actor.onnx"))
            given = {"observation": observations[:1], "noise": noise[:, None]}
            calls[f"ONNX, {steps} step(s), batch 1"] = lambda s=session, g=given: s.run(None, g)
        calls[f"predict, actor alone, {steps} step(s), batch 1"] = lambda p=policy: p.predict(observations[0])
        for batch in (10, 50, 256):
            several = observations[:batch]
            name = f"predict, actor alone, {steps} step(s), batch {batch}"
            calls[name] = lambda p=policy, o=several: p.predict(o)
    ranked = made((), 50)
    for batch in (1, 10, 50):
        several = observations[:batch]
        calls[f"predict, 50 candidates, 1 step, batch {batch}"] = lambda o=several: ranked.predict(o)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            each = []
            for _ in range(200):
                began = time.perf_counter()
                call()
                each.append(time.perf_counter() - began)
            times[name].append(statistics.median(each))
    table_ = Table(title="microseconds a call, CPU, one thread")
    for column in ("what", "microseconds"):
        table_.add_column(column)
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        table_.add_row(name, f"{value:,.1f}")
    Console().print(table_)
    keep("acting", {"microseconds": medians})


def keep_results(options: argparse.Namespace) -> None:
    """Keep what a run came to, how it got there, and all that it depends on."""
    import yaml

    from cpql.checkpoint import write_text

    folder = FOLDER / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for path in options.runs:
        said = yaml.safe_load((path / "config.yaml").read_text())
        del said["run_dir"]  # a path of this machine
        result = json.loads((path / "result.json").read_text())
        evaluations = [
            json.loads(file.read_text()) for file in sorted((path / "evaluations").glob("step_*.json"))
        ]
        curve = [[e["step"], e["episodes"], round(e["score"], 2)] for e in evaluations]
        content = {"curve_of_step_episodes_score": curve, **result, "configuration": said}
        name = f"{result['task']}-{result['agent']}-seed{result['training_seed']}.json"
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        write_text(folder / name, "{\n" + ",\n".join(lines) + "\n}\n")
        print(f"benchmarks/results/{name}: {result['score']:.1f}")


def table() -> str:
    """The kept results: the last checkpoint of each seed over its episodes, and the mean over seeds."""
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))]
    head = (
        "task",
        "agent",
        "score, mean over seeds",
        "spread",
        "each seed, mean ± spread over episodes",
        "behaviour",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["task"], result["agent"]), []).append(result)
    for (task, agent), runs in sorted(cells.items()):
        runs = sorted(runs, key=lambda run: int(run["training_seed"]))
        scores = [run["score"] for run in runs]
        spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        percent = [100 / (run["references"]["expert"] - run["references"]["random"]) for run in runs]
        each = ", ".join(
            f"{run['score']:.1f} ± {run['return_std'] * unit:.1f}"
            for run, unit in zip(runs, percent, strict=True)
        )
        behaviour = f"{runs[0]['behaviour_score']:.1f}"
        row = [task, f"`{agent}`", f"**{statistics.mean(scores):.1f}**", spread, each, behaviour]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def loading(options: argparse.Namespace) -> None:
    """Time bare h5py and cpql in turn, plain and compressed as D4RL's own files are."""
    import h5py  # type: ignore[import-untyped]
    import numpy as np

    rows, random = options.transitions, np.random.default_rng(0)
    states = random.normal(size=(rows + 1, 11)).astype(np.float32)
    arrays = {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": random.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": random.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 1000 == 999,
    }
    size = sum(array.size * 4 for array in arrays.values())
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, options_ in (("plain", {}), ("gzip", {"compression": "gzip", "compression_opts": 4})):
            path = Path(folder) / f"{form}.hdf5"
            with h5py.File(path, "w") as file:
                for key, array in arrays.items():
                    file.create_dataset(key, data=array, **options_)
            figures: dict[str, list[dict[str, float]]] = {"bare": [], "cpql": []}
            for _ in range(options.repeats):
                for who, runs in figures.items():
                    command = [sys.executable, "-c", READ, str(path), who]
                    runs.append(json.loads(subprocess.check_output(command)))
            seconds = {
                who: statistics.median(run["seconds"] for run in runs) for who, runs in figures.items()
            }
            pairs = zip(figures["cpql"], figures["bare"], strict=True)
            table[form] = {
                "file_bytes": path.stat().st_size,
                "seconds": seconds,
                "ratio": statistics.median(mine["seconds"] / bare["seconds"] for mine, bare in pairs),
                "peak_bytes": max(run["bytes"] for run in figures["cpql"]),
                "peak_ratio": max(run["bytes"] for run in figures["cpql"]) / size,
            }
            print(
                f"{form:<6} bare h5py {seconds['bare']:.2f} s, cpql {seconds['cpql']:.2f} s, ratio "
                f"{table[form]['ratio']:.2f}; peak memory {table[form]['peak_ratio']:.2f} times the arrays' "
                "float32 size"
            )
    keep("loading", {"transitions": rows, "float32_bytes": size, "repeats": options.repeats, **table})


if __name__ == "__main__":
    main()
