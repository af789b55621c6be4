"""Configuration: YAML files composed by Hydra, checked against typed dataclasses before anything happens.

A dataclass is the only place where a setting, its default and its meaning are written. `configs/` holds
what isn't a default: the table of tasks, budgets, and each agent's published values by task.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from cpql.errors import ConfigError, did_you_mean
from cpql.tasks import Task, expand, patterns

__all__ = [
    "BudgetConfig",
    "DatasetConfig",
    "ExportConfig",
    "OnlineConfig",
    "TrainConfig",
    "build",
    "config_folder",
    "load_task",
    "task_names",
    "task_patterns",
]

T = TypeVar("T")


def config_folder() -> Path:
    """Where the YAML files are: in the wheel inside the package, in a clone beside it."""
    here = Path(__file__).resolve().parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


@functools.cache
def _table() -> dict[str, Any]:
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(config_folder() / "tasks.yaml"))
    return typing.cast(dict[str, Any], content)


@functools.cache
def _tasks() -> dict[str, dict[str, Any]]:
    return expand(_table())


def task_names() -> list[str]:
    """Names of all tasks, in the table's order."""
    return list(_tasks())


def task_patterns() -> list[str]:
    """Name all tasks in one line a family, see `cpql.tasks.patterns`."""
    return patterns(_table())


def load_task(name: str) -> Task:
    """A task by name.

    Raises:
        ConfigError: there is no such task (names the nearest), or the table's row for it isn't right.
    """
    tasks = _tasks()
    if name not in tasks:
        raise ConfigError(f"env={name} is no task: {did_you_mean(name, tasks)}")
    return build(Task, tasks[name], f"tasks.yaml: {name}")


@dataclass(frozen=True)
class DatasetConfig:
    """Which data to learn from, and what to make of them.

    Attributes:
        source: `d4rl`, `minari` and `embedded` are strict; `auto` tries D4RL's cache folder, a download, then
            embedded.
        path: local data instead, strictly: HDF5 or NPZ in D4RL's layout, or a Minari folder.
        id: a D4RL or Minari id instead of the task's own.
        size: transitions to collect where the embedded source is used.
        seed: of that collection.
        reward: what training makes of a reward, a rule of `cpql.data.transforms.REWARD_RULES`; scores always
            count the environment's own.
        normalise_observations: give each observation mean 0 and standard deviation 1 over the dataset; the
            policy does the same when it acts.
        n_step: steps of rewards in a critic's target before it bootstraps.
        time_limits: `drop` leaves out the step at a time limit, as D4RL's `qlearning_dataset` does; `keep`
            learns from it like from any other.
    """

    source: Literal["auto", "d4rl", "minari", "embedded"] = "auto"
    path: str | None = None
    id: str | None = None
    size: int = 1_000_000
    seed: int = 0
    reward: Literal["none", "normalize", "antmaze", "cql_antmaze", "iql_antmaze", "iql_locomotion"] = "none"
    normalise_observations: bool = False
    n_step: int = 1
    time_limits: Literal["keep", "drop"] = "keep"


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
    episode_limit: int = 10_000


@dataclass(frozen=True)
class OnlineConfig:
    """How an agent acts while it learns, `mode=online` and `mode=finetune`.

    Attributes:
        environments: how many at once, for each member.
        updates_per_step: gradient steps for each step of an environment; budget.updates counts the former.
        start_steps: steps before the first update.
        start: what acts in them: `random` actions, or the `policy`.
        candidates: actions drawn when exploring, of which one is chosen by its value, see `AgentConfig`.
        epsilon: share of uniformly random actions after that, at first;
        epsilon_end: in the end;
        epsilon_steps: steps of an environment on the way.
        noise: standard deviation of a Gaussian on the other actions, in [-1, 1] (TD3's exploration).
        buffer_size: transitions that are kept, the newest.
        save_buffer: keep them in checkpoints. Else a resumed run fills its buffer anew before it goes on.
        offline_share: of each batch, from the dataset (`mode=finetune`).
    """

    environments: int = 1
    updates_per_step: float = 1.0
    start_steps: int = 5_000
    start: Literal["random", "policy"] = "random"
    candidates: int = 1
    epsilon: float = 0.0
    epsilon_end: float = 0.0
    epsilon_steps: int = 0
    noise: float = 0.0
    buffer_size: int = 1_000_000
    save_buffer: bool = True
    offline_share: float = 0.0

    def __post_init__(self) -> None:
        for key, least in (("environments", 1), ("candidates", 1), ("start_steps", 0), ("buffer_size", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"online.{key} must be at least {least}, found {getattr(self, key)}")
        if self.updates_per_step <= 0.0:
            raise ConfigError(f"online.updates_per_step must be positive, found {self.updates_per_step}")
        for key in ("epsilon", "epsilon_end", "noise", "offline_share"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"online.{key} must be in [0, 1], found {getattr(self, key)}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        env: the task.
        agent: the algorithm's name and its settings, checked against its own dataclass.
        dataset: what to learn from; not with `mode=online`.
        budget: how long.
        online: how to act meanwhile; null is offline.
        checkpoint: a run whose last checkpoint this one starts from: every network and optimiser.
        logger: where metrics go besides CSV.
        seed: of weights, data order and noise.
        device: `auto` takes a GPU where there is one.
        precision: of the update's matrix products: `fp32`; `bf16`, faster where the processor has units for
            it, with weights, optimiser and losses in fp32; `tf32`, which only a GPU has.
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        compile: fuse the update into one program: a minute to build, then about twice as fast on a CPU.
        run_dir: the run's folder; never overwritten.
        resume: go on with the run in `run_dir`.
        traceback: show Python's traceback with an error.
    """

    env: Task
    agent: dict[str, Any]
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    online: OnlineConfig | None = None
    checkpoint: str | None = None
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "tf32"] = "fp32"
    threads: int = 1
    compile: bool | Literal["auto"] = "auto"
    configuration: str = ""
    run_dir: str = "runs/run"
    resume: bool = False
    traceback: bool = False


@dataclass(frozen=True)
class ExportConfig:
    """One export; `configs/export.yaml` has the defaults.

    Attributes:
        checkpoint: a run's folder, one of its checkpoints, or a policy's folder.
        format: see `cpql.export.export`, as for `noise`.
        candidates: how many actions compete by their value; 1 is the actor alone; None leaves the policy's
            own rule.
        temperature: of that choice, likewise; only for several candidates.
        noise: where it comes from.
        out: the file, which mustn't exist; None puts it beside the policy.
        traceback: show Python's traceback with an error.
    """

    checkpoint: str
    format: Literal["onnx", "torch", "numpy"]
    candidates: int | None
    temperature: float | None
    noise: Literal["input", "inside"]
    out: str | None
    traceback: bool

    def __post_init__(self) -> None:
        if self.candidates is not None and self.candidates < 1:
            raise ConfigError(f"candidates={self.candidates}: expected at least 1")
        if self.temperature is not None and not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: expected 0 or more")


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
    from pydantic import ValidationError

    _refuse_unknown(cls, values, where)
    try:
        return typing.cast(T, _adapter(typing.cast(Any, cls)).validate_python(dict(values)))
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic puts the tried one of several types behind the key
        key = ".".join(str(part) for part in first["loc"] if part not in ("float", "tuple[float, ...]"))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key}: {message}, found {first['input']!r}") from None


@functools.cache
def _adapter(cls: type[Any]) -> Any:
    """Pydantic's reader of a class, which takes longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _refuse_unknown(cls: type[Any], values: Mapping[str, Any], where: str) -> None:
    types = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{where}: unknown key {key!r}: {did_you_mean(key, types)}")
        inner = next(
            (kind for kind in typing.get_args(types[key]) if dataclasses.is_dataclass(kind)), types[key]
        )
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            _refuse_unknown(typing.cast(type[Any], inner), value, f"{where}: {key}")
