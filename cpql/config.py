"""Configuration: YAML files composed by Hydra, checked against typed dataclasses before anything happens.

A dataclass is the only place where a setting, its default and its meaning are written. `configs/` holds
what isn't a default: tasks, budgets, and each agent's published values by task.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from cpql.errors import ConfigError, did_you_mean
from cpql.tasks import Task

__all__ = ["BudgetConfig", "DatasetConfig", "TrainConfig", "build", "config_folder", "load_task"]

T = TypeVar("T")


def config_folder() -> Path:
    """Where the YAML files are: in the wheel inside the package, in a clone beside it."""
    here = Path(__file__).resolve().parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def load_task(name: str) -> Task:
    """A task by name.

    Raises:
        ConfigError: there is no such task; names the nearest.
    """
    from omegaconf import OmegaConf

    folder = config_folder() / "env"
    names = [path.stem for path in folder.glob("*.yaml")]
    if name not in names:
        raise ConfigError(f"env={name} is no task: {did_you_mean(name, names)}")
    content = OmegaConf.load(folder / f"{name}.yaml")
    return build(Task, typing.cast(dict[str, Any], OmegaConf.to_container(content)), f"env/{name}.yaml")


@dataclass(frozen=True)
class DatasetConfig:
    """Which data to learn from.

    Attributes:
        source: `d4rl` and `embedded` are strict; `auto` tries D4RL's cache folder, a download, then embedded.
        path: a local file in D4RL's HDF5 layout instead, strictly.
        size: transitions to collect where the embedded source is used.
        seed: of that collection.
    """

    source: Literal["auto", "d4rl", "embedded"] = "auto"
    path: str | None = None
    size: int = 1_000_000
    seed: int = 0


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train and how often to look.

    Attributes:
        name: `quick` or `full`.
        updates: gradient steps.
        log_every: gradient steps between lines of metrics.csv, means over the interval.
        evaluate_every: gradient steps between evaluations.
        save_every: gradient steps between checkpoints.
        episodes: of an evaluation during training.
        final_episodes: of the evaluation at the end.
        keep: how many checkpoints to keep, the newest; 0 keeps all.
        dataset_size: transitions that are collected where data has to be.
    """

    name: str = "full"
    updates: int = 1_000_000
    log_every: int = 1_000
    evaluate_every: int = 50_000
    save_every: int = 50_000
    episodes: int = 10
    final_episodes: int = 100
    keep: int = 2
    dataset_size: int = 1_000_000


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        env: the task.
        agent: the algorithm's name and its settings, checked against its own dataclass.
        dataset: what to learn from.
        budget: how long.
        logger: where metrics go besides CSV.
        seed: of weights, data order and noise.
        device: `auto` takes a GPU where there is one.
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        compile: fuse the update into one program: a minute to build, then more than twice as fast on a CPU.
        run_dir: the run's folder; never overwritten.
        resume: go on with the run in `run_dir`.
        traceback: show Python's traceback with an error.
    """

    env: Task
    agent: dict[str, Any]
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    compile: bool = True
    run_dir: str = "runs/run"
    resume: bool = False
    traceback: bool = False


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from nested plain values.

    Args:
        cls: the dataclass.
        values: by field name.
        where: what to call them in an error.

    Raises:
        ConfigError: a key that doesn't exist, a value of the wrong type, or one that the class refuses;
            names the key, what was found and what was expected.
    """
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(cls, values, where)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key}: {message}, found {first['input']!r}") from None


def _refuse_unknown(cls: type[Any], values: Mapping[str, Any], where: str) -> None:
    types = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{where}: unknown key {key!r}: {did_you_mean(key, types)}")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, Mapping):
            _refuse_unknown(typing.cast(type[Any], types[key]), value, f"{where}: {key}")
