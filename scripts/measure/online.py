"""What runs in an environment came to, step by step, as data and as a picture."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cpql.training.config import OnlineConfig
from measure.results import changes, defaults

__all__ = ["online"]

HERE = Path(__file__).resolve().parents[2]


def online(options: argparse.Namespace) -> dict[str, Any]:
    """Add the runs' evaluations to those kept before, replacing those of the same name and seed; draw all."""
    kept = HERE / "benchmarks" / "online.json"
    every: list[dict[str, Any]] = json.loads(kept.read_text())["runs"] if kept.exists() else []
    for row in (of_run(options.label, folder) for folder in options.runs):
        every = [old for old in every if (name(old), old["seed"]) != (name(row), row["seed"])] + [row]
    every.sort(key=lambda row: (name(row), row["seed"]))
    draw(every, HERE / "docs" / "online.png")
    for row in every:
        print(
            *name(row), f"seed {row['seed']}:", f"{row['steps'][-1]:,} steps,", f"{row['returns'][-1]:,.1f}"
        )
    return {"runs": every}


def name(row: dict[str, Any]) -> tuple[str, str, str]:
    """What the seeds of one experiment have in common."""
    return row["task"], row["mode"], row["label"]


def of_run(label: str, folder: Path) -> dict[str, Any]:
    """A run's row: what each of its evaluations returned, after how many steps in the environment."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    acting, finetuned = config["online"], config["checkpoint"] is not None
    results = [json.loads(file.read_text()) for file in sorted((folder / "evaluations").glob("*.json"))]
    steps = [acting["start_steps"] + round(e["step"] / acting["updates_per_step"]) for e in results]
    last = results[-1]
    return {
        "task": last["task"],
        "mode": "finetune" if finetuned else "online",
        "label": label,
        "seed": last["training_seed"],
        "environment": last["environment"],
        "rule": last["rule"],
        "finished": (folder / "result.json").exists(),
        "steps": steps,
        "returns": [round(e["return_mean"], 1) for e in results],
        "episodes": [e["episodes"] for e in results],
        "data": f"{last['data']['source']} {last['data']['id']}",
        "precision": config["precision"],
        "agent": changes(config["agent"], defaults(config["agent"]["name"])),
        "online": changes(acting, asdict(OnlineConfig())),
        "versions": last["versions"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each task and mode: each seed's curve, and a line at what a finetuned run began with."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    panels: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        panels.setdefault((row["mode"], row["task"]), {}).setdefault(row["label"], []).append(row)
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for (mode, task), axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for k, (label, seeds) in enumerate(panels[mode, task].items()):
            for row in seeds:
                axes.plot(row["steps"], row["returns"], color=f"C{k}", alpha=0.35, linewidth=0.8)
            shared = min(len(row["steps"]) for row in seeds)
            mean = np.mean([row["returns"][:shared] for row in seeds], 0)
            axes.plot(seeds[0]["steps"][:shared], mean, color=f"C{k}", label=f"{label} (seeds: {len(seeds)})")
            if mode == "finetune":  # until its first update it acts as it did offline
                axes.plot(
                    [0, seeds[0]["steps"][-1]], [mean[0]] * 2, color="0.4", linestyle=":", linewidth=0.8
                )
        axes.set_title(f"{task}, {mode}", fontsize=10)
        axes.set_xlabel("environment steps")
        axes.set_ylabel("return")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
