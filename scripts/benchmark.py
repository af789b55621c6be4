"""Measure cpql on this machine, and keep the results in benchmarks/, with a description of the machine.

Times on a busy machine mean little; compare ratios of things measured in turn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

AGENTS, PRECISIONS = ["cpql", "cpiql", "consistency_ac"], ["fp32", "bf16"]

# What each command does, and its options with their defaults; `Path` has none.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "speed": (
        "updates a second of every agent, and the limit that its FLOPs set; rows take turns",
        {
            "agents": AGENTS,
            "modes": ["eager", "compiled"],
            "members": [1, 4],
            "precisions": PRECISIONS,
            "width": 256,
            "batch": 256,
            "threads": 1,
            "device": "cpu",
            "rounds": 7,
            "seconds": 1.0,
            "out": "speed",
        },
    ),
    "size": (
        "updates a second by width, batch and dataset, and docs/size.png",
        {
            "agent": "cpql",
            "precisions": PRECISIONS,
            "widths": [256, 512, 1024],
            "batches": [256, 1024, 4096],
            "datasets": [10_000, 2_000_000],
            "rounds": 3,
            "seconds": 1.0,
        },
    ),
    "side": (
        "several seeds as one process, against processes side by side",
        {
            "agent": "cpql",
            "precision": "fp32",
            "members": 4,
            "cores": 2,
            "rounds": 3,
            "seconds": 20.0,
            "out": "side_fp32",
        },
    ),
    "acting": ("latency of an action, by rule, batch and form", {"rounds": 7}),
    "evaluating": (
        "ten episodes at once against one after the other",
        {"steps": 1000, "rounds": 3},
    ),
    "official": (
        "updates and actions beside the papers' own codes, checkouts of cccedric/cpql and of "
        "quantumiracle/Consistency_Model_For_Reinforcement_Learning",
        {
            "cpql": Path,
            "cac": Path,
            "forms": ["eager fp32", "compiled fp32", "compiled bf16"],
            "threads": [1],
            "rounds": 7,
            "seconds": 2.0,
        },
    ),
    "parity": (
        "the papers' own updates beside ours in float64, from the same checkouts",
        {"cpql": Path, "cac": Path, "widths": [16, 256]},
    ),
    "baselines": (
        "the baselines' codes beside ours in float64, from checkouts of tinkoff-ai/CORL, "
        "Zhendong-Wang/Diffusion-Policies-for-Offline-RL, ikostrikov/implicit_q_learning, DT6A/ReBRAC and "
        "seohongpark/fql",
        {name: Path for name in ("corl", "diffusion_ql", "iql", "rebrac", "fql")} | {"widths": [16]},
    ),
    "objectives": (
        "scores, diversity and Q bias of finished runs, by objective, beside those measured before",
        {"runs": [Path]},
    ),
    "critic": (
        "whether runs' critics rank actions as true returns do, and how far their actors are from the data "
        "(docs/diagnosis.md)",
        {"runs": [Path], "states": 48, "actions": 8, "rollouts": 4, "horizon": 300, "json": ""},
    ),
    "online": (
        "curves of online and finetuned runs, beside those kept before, as data and as docs/online.png",
        {"runs": [Path], "label": "cpql"},
    ),
    "torture": (
        "kill trainings at file operations and continue them, also two at once (twice) and as commands",
        {"trials": 301, "twice": 20, "commands": 50, "commands_twice": 20, "seed": 0},
    ),
    "soak": (
        "memory, threads and descriptors over many trainings of all kinds, or of compiled ones",
        {"minutes": 20.0, "compile": False, "out": "soak"},
    ),
    "keep": ("keep the results of finished runs, in benchmarks/results/", {"runs": [Path]}),
    "table": ("print those as the README's table, a row a task and agent", {}),
}


def main() -> None:
    """Run the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, (text, settings) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        for key, default in settings.items():
            add_option(command, key, default)
    options = parser.parse_args()
    file = "results" if options.command in ("keep", "table") else options.command
    found = getattr(importlib.import_module(f"measure.{file}"), options.command)(options)
    if isinstance(found, str):
        print(found)
    elif found is not None:
        keep(getattr(options, "out", options.command), found)


def add_option(command: argparse.ArgumentParser, key: str, default: Any) -> None:
    """Add an option that has its default's type; a list takes several values."""
    flag = f"--{key.replace('_', '-')}"
    if default == [Path]:
        command.add_argument(key, type=Path, nargs="*", metavar="RUN")
    elif default is Path:
        command.add_argument(flag, type=Path, required=True, metavar="DIR", help="a checkout")
    elif default is False:
        command.add_argument(flag, action="store_true")
    elif isinstance(default, list):
        command.add_argument(flag, type=type(default[0]), nargs="+", default=default, help=" ")
    else:
        command.add_argument(flag, type=type(default), default=default, help=" ")


def machine() -> dict[str, Any]:
    """What a measurement depends on."""
    from cpql.io import versions

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}


def keep(name: str, content: dict[str, Any]) -> None:
    """Write results into benchmarks/."""
    from cpql.io import write_text

    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    write_text(path, as_json(content | {"machine": machine()}))
    print(f"in {path.relative_to(FOLDER.parent)}")


def as_json(content: dict[str, Any]) -> str:
    """JSON with a line for each key, and in a list of rows for each row."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n]"
        else:
            text = json.dumps(value)
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
