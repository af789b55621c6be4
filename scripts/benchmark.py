"""Measure cpql on this machine, and keep the figures as data.

    python scripts/benchmark.py speed             updates a second of every agent, and the floor of its FLOPs
    python scripts/benchmark.py size              updates a second by width, batch and dataset, and a plot
    python scripts/benchmark.py side              several seeds as one process, against processes side by side
    python scripts/benchmark.py acting            latency of an action, by rule, batch and form
    python scripts/benchmark.py evaluating        ten episodes at once against one after the other
    python scripts/benchmark.py official          updates and actions beside the papers' own codes
    python scripts/benchmark.py loading           reading 2M transitions against bare h5py, and the memory
    python scripts/benchmark.py objectives RUN... scores, diversity and Q bias of finished runs, by objective
    python scripts/benchmark.py online RUN...     curves of online and finetuned runs, as data and as a plot
    python scripts/benchmark.py official_online   the papers' own codes learning online
    python scripts/benchmark.py torture           kill trainings at every file operation and continue them
    python scripts/benchmark.py soak              memory, threads and descriptors over many trainings
    python scripts/benchmark.py cost --other DIR  updates and checkpoints beside another checkout of cpql
    python scripts/benchmark.py keep RUN...       keep the results of finished runs, in benchmarks/results/
    python scripts/benchmark.py table             print those as the README's table, a row a task

Figures go into benchmarks/NAME.json, with the machine's description. Times on a busy machine mean little:
what counts are the ratios, of things measured in turn.
"""

from __future__ import annotations

import argparse
import importlib
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
    command.set_defaults(run=lambda options: keep(options.name, measured("speed", options)))
    command = commands.add_parser("size", help="updates a second against width, batch and dataset")
    command.add_argument("--agent", default="cpql")
    command.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    command.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    command.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    command.add_argument("--datasets", type=int, nargs="+", default=[10_000, 2_000_000])
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument(
        "--seconds", type=float, default=1.0, help="that a row runs in a round, at least once"
    )
    command.set_defaults(run=lambda options: keep("size", measured("size", options)))
    command = commands.add_parser("side", help="several seeds as one process")
    command.add_argument("--agent", default="cpql")
    command.add_argument("--precision", default="fp32")
    command.add_argument("--members", type=int, default=4)
    command.add_argument("--cores", type=int, default=2)
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--seconds", type=float, default=20.0)
    command.set_defaults(run=lambda options: keep(f"side_{options.precision}", measured("side", options)))
    command = commands.add_parser("acting", help="latency of an action")
    command.add_argument("--rounds", type=int, default=7)
    command.set_defaults(run=lambda options: keep("acting", measured("acting", options)))
    command = commands.add_parser("evaluating", help="whole evaluations")
    command.add_argument("--steps", type=int, default=1000, help="of an episode (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=3)
    command.set_defaults(run=lambda options: keep("evaluating", measured("evaluating", options)))
    command = commands.add_parser("official", help="beside checkouts of the papers' own codes")
    command.add_argument("--cpql", type=Path, required=True, metavar="DIR", help="of cccedric/cpql")
    command.add_argument(
        "--cac",
        type=Path,
        required=True,
        metavar="DIR",
        help="of quantumiracle/Consistency_Model_For_Reinforcement_Learning",
    )
    command.add_argument("--forms", nargs="+", default=["eager fp32", "compiled fp32", "compiled bf16"])
    command.add_argument("--threads", type=int, nargs="+", default=[1])
    command.add_argument("--rounds", type=int, default=7, help="each measures every row once, in turn")
    command.add_argument("--seconds", type=float, default=2.0, help="that a row runs in a round")
    command.set_defaults(run=lambda options: keep("official", measured("official", options)))
    command = commands.add_parser("loading", help="reading and checking a D4RL file")
    command.add_argument("--transitions", type=int, default=2_000_000)
    command.add_argument("--repeats", type=int, default=7)
    command.set_defaults(run=loading)
    command = commands.add_parser("objectives", help="what finished runs came to, by objective")
    command.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="added to those measured before")
    command.set_defaults(run=lambda options: keep("objectives", measured("objectives", options)))
    command = commands.add_parser("online", help="what runs came to while they acted, step by step")
    command.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="added to those kept before")
    command.add_argument("--label", default="cpql", help="what these runs are called (default: %(default)s)")
    command.set_defaults(run=lambda options: keep("online", measured("online", options)))
    command = commands.add_parser("official_online", help="the papers' own codes learning online")
    command.add_argument("--cpql", type=Path, metavar="DIR", help="a checkout, as for official")
    command.add_argument("--cac", type=Path, metavar="DIR", help="a checkout, as for official")
    command.add_argument("--env", default="Pendulum-v1")
    command.add_argument("--task", help="its name among our curves, where it isn't the environment's")
    command.add_argument(
        "--steps", type=int, default=20_000, help="in the environment (default: %(default)s)"
    )
    command.add_argument("--every", type=int, default=1_000, help="steps between evaluations")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=lambda options: keep("online", measured("official_online", options)))
    command = commands.add_parser("torture", help="kill trainings, continue them, look at what was lost")
    command.add_argument("--trials", type=int, default=301, help="kills at operations (default: %(default)s)")
    command.add_argument("--twice", type=int, default=20, help="of two trainings at once")
    command.add_argument("--commands", type=int, default=50, help="kills of the command, compiled")
    command.add_argument("--commands-twice", type=int, default=20, help="of the command, twice at once")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=lambda options: keep("torture", measured("torture", options)))
    command = commands.add_parser("soak", help="many trainings in one process")
    command.add_argument("--minutes", type=float, default=20.0)
    command.add_argument("--compile", action="store_true", help="compiled ones instead of all kinds")
    command.add_argument("--name", default="soak", help="of the JSON (default: %(default)s)")
    command.set_defaults(run=lambda options: keep(options.name, measured("soak", options)))
    command = commands.add_parser("cost", help="updates and checkpoints beside another checkout")
    command.add_argument("--other", type=Path, required=True, metavar="DIR", help="cpql as it was before")
    command.add_argument("--updates", type=int, default=2_000, help="of a training (default: %(default)s)")
    command.add_argument("--every", type=int, default=200, help="updates between checkpoints")
    command.add_argument("--rounds", type=int, default=7, help="each trains once in each checkout")
    command.set_defaults(run=lambda options: keep("cost", measured("cost", options)))
    command = commands.add_parser("keep", help="keep the results of finished runs as data")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    command.set_defaults(run=keep_results)
    command = commands.add_parser("table", help="print the results that were kept as Markdown")
    command.set_defaults(run=lambda _: print(table()))
    options = parser.parse_args()
    options.run(options)


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    from cpql.io import versions

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}


def keep(name: str, content: dict[str, Any]) -> None:
    """Write the figures down."""
    from cpql.io import write_text

    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    write_text(path, json.dumps(content | {"machine": machine()}, indent=2) + "\n")
    print(f"in {path.relative_to(FOLDER.parent)}")


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run what has a module of its own, which is only loaded then."""
    content: dict[str, Any] = getattr(importlib.import_module(f"measure.{name}"), name)(options)
    return content


def keep_results(options: argparse.Namespace) -> None:
    """Keep what a run came to, how it got there, and all that it depends on.

    What is kept of another run stays: ends with a line where there is such a result by the name.
    """
    import yaml

    from cpql.io import write_text

    folder = FOLDER / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for path in options.runs:
        said = yaml.safe_load((path / "config.yaml").read_text())
        del said["run_dir"]  # a path of this machine
        result = json.loads((path / "result.json").read_text())
        if result.get("score") is None:
            sys.exit(f"{path / 'result.json'}: has no score: expected a result with reference scores")
        evaluations = [
            json.loads(file.read_text()) for file in sorted((path / "evaluations").glob("step_*.json"))
        ]
        curve = [[e["step"], e["episodes"], round(e["score"], 2)] for e in evaluations]
        content = {"curve_of_step_episodes_score": curve, **result, "configuration": said}
        kind = "-".join((result["agent"], *unusual(said)))
        name = f"{result['task']}-{kind}-seed{result['training_seed']}.json"
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        kept = folder / name
        if kept.exists() and (before := json.loads(kept.read_text())) != json.loads(text):
            apart = difference("configuration", before["configuration"], said) or "only figures differ"
            sys.exit(f"{path}: benchmarks/results/{name} is another run's ({apart}): remove that one first")
        write_text(kept, text)
        print(f"benchmarks/results/{name}: {result['score']:.1f}")


def difference(key: str, before: Any, now: Any) -> str:
    """Name the first setting in which two runs differ, with both values; "" where none does."""
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name))
        return difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"{key} is {before} there, {now} here"


def unusual(said: dict[str, Any]) -> list[str]:
    """What tells a run's kind from its agent's own: another objective than the paper's, another precision."""
    from cpql.agents import AGENTS

    objective = said["agent"]["actor"]["objective"]
    precision = said.get("precision", "fp32")  # there was no other one at first
    usual = {"fp32", AGENTS[said["agent"]["name"]].config_class().actor.objective}
    return [what for what in (objective, precision) if what not in usual]


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
        agent = ", ".join((f"`{result['agent']}`", *unusual(result["configuration"])))
        cells.setdefault((result["task"], agent), []).append(result)
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
        row = [task, agent, f"**{statistics.mean(scores):.1f}**", spread, each, behaviour]
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
