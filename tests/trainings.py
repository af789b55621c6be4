"""Little trainings of a fraction of a second, for the tests of what they leave behind."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.torch import load_file

from cpql.data import d4rl
from cpql.tasks import load_task
from cpql.training.config import BudgetConfig, DatasetConfig, TrainConfig
from cpql.training.loop import train_group

AGENTS: dict[str, dict[str, Any]] = {
    "cpql": {"name": "cpql"},
    "cpiql": {"name": "cpql", "critic": "expectile", "candidates": 3},
    "consistency_ac": {"name": "consistency_ac"},
    "td3_bc": {"name": "td3_bc"},
}


def write_dataset(path: Path) -> Path:
    """A file of Hopper's widths in D4RL's layout."""
    random = np.random.default_rng(0)
    ends = np.arange(1, 401) % 20 == 0
    arrays = {
        "observations": random.normal(size=(400, 11)),
        "actions": random.uniform(-1, 1, size=(400, 3)),
        "rewards": random.normal(size=400),
        "terminals": ends,
        "timeouts": np.zeros(400, bool),
    }
    d4rl.write(path, arrays, {})
    return path


def settings(path: Path, run_dir: Path, agent: str = "cpql", **changes: Any) -> TrainConfig:
    little: dict[str, Any] = {"actor": {"hidden": [16, 16]}, "critic_hidden": [16, 16], "batch_size": 8}
    config = TrainConfig(
        env=load_task("hopper-medium"),
        agent={**little, **AGENTS[agent]},
        dataset=DatasetConfig(path=str(path)),
        budget=BudgetConfig("test", 40, 4, 20, 10, 2, 3, keep=2),
        run_dir=str(run_dir),
        compile=False,
    )
    return replace(config, **changes)


def run(config: TrainConfig) -> tuple[dict[str, Any], str]:
    text = StringIO()
    return train_group([config], Console(file=text, width=200))[0], text.getvalue()


def everything(folder: Path) -> dict[str, Any]:
    """All that a run leaves that may not depend on when it was interrupted."""
    found: dict[str, Any] = {"metrics": (folder / "metrics.csv").read_text()}
    for file in [*sorted(folder.glob("evaluations/*.json")), folder / "result.json"]:
        found[file.name] = json.loads(file.read_text())
    for file in sorted((folder / "checkpoints" / "last").rglob("*.safetensors")):
        found[file.name] = {k: v.numpy().tobytes() for k, v in load_file(file).items()}
    return found


def run_group(folder: Path, dataset: Path, seeds: tuple[int, ...], **changes: Any) -> list[dict[str, Any]]:
    members = [settings(dataset, folder / f"seed{seed}", seed=seed, **changes) for seed in seeds]
    return train_group(members, Console(file=StringIO(), width=200))


class Killed(BaseException):
    """Stands for a process that dies on the spot."""


def die() -> None:
    raise Killed
