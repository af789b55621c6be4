"""Configuration: YAML files composed by Hydra, checked against typed dataclasses before anything happens.

A dataclass is the only place where a setting, its default and its meaning are written. `configs/` holds
what isn't a default: the table of tasks, budgets, and each agent's published values by task.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from cpql.errors import ConfigError, did_you_mean
from cpql.ranges import Candidates, Count, Natural, NonNegative, Positive, Seed, Share, Threads
from cpql.tasks import Task, expand, patterns

__all__ = [
    "BudgetConfig",
    "DatasetConfig",
    "EvaluateConfig",
    "ExportConfig",
    "OnlineConfig",
    "TrainConfig",
    "build",
    "config_folder",
    "load_task",
    "task_names",
    "task_patterns",
    "with_own_references",
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


def with_own_references(task: Task, own: Task) -> Task:
    """A task that was made of another one, without that one's references where they don't hold for it.

    References are returns in one environment, made and reset with certain options. Those that a task was
    given in their place stay.

    Args:
        task: whose environment or options may have been changed.
        own: the task that it was made of.
    """
    if task.id is None or own.random_return is None:
        return task
    if (task.random_return, task.expert_return) != (own.random_return, own.expert_return):
        return task
    keys = ("id", "env_options", "reset_options")
    changed = [f"{key}={getattr(task, key)}" for key in keys if getattr(task, key) != getattr(own, key)]
    if not changed:
        return task
    note = (
        f"{', '.join(changed)} isn't {own.name}'s own: a return, and no score by {own.benchmark}'s references"
    )
    return dataclasses.replace(task, random_return=None, expert_return=None, note=note)


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
    size: Count = 1_000_000
    seed: Seed = 0
    reward: Literal["none", "normalize", "antmaze", "cql_antmaze", "iql_antmaze", "iql_locomotion"] = "none"
    normalise_observations: bool = False
    n_step: Annotated[int, Field(ge=1, le=1_000)] = 1
    time_limits: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train and how often to look.

    Attributes:
        name: `quick` or `full`.
        updates: gradient steps.
        log_every: gradient steps between lines of metrics.csv, means over the interval.
        evaluate_every: gradient steps between evaluations; 0 evaluates at the end only.
        save_every: gradient steps between checkpoints.
        episodes: of an evaluation during training.
        final_episodes: of the evaluation at the end.
        keep: how many checkpoints to keep, the newest; 0 keeps all.
        dataset_size: transitions that are collected where data has to be.
        episode_limit: steps after which an evaluation ends an episode that its environment doesn't end.
    """

    name: str = "full"
    updates: Count = 1_000_000
    log_every: Count = 1_000
    evaluate_every: Natural = 50_000
    save_every: Count = 50_000
    episodes: Count = 10
    final_episodes: Count = 100
    keep: Natural = 2
    dataset_size: Count = 1_000_000
    episode_limit: Count = 10_000


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

    environments: Annotated[int, Field(ge=1, le=1_000)] = 1
    updates_per_step: Positive = 1.0
    start_steps: Natural = 5_000
    start: Literal["random", "policy"] = "random"
    candidates: Candidates = 1
    epsilon: Share = 0.0
    epsilon_end: Share = 0.0
    epsilon_steps: Natural = 0
    noise: Share = 0.0
    buffer_size: Count = 1_000_000
    save_buffer: bool = True
    offline_share: Share = 0.0


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
            `auto` does so where that can be had and goes on uncompiled elsewhere, which it says; true ends
            in an error there.
        configuration: name of the chosen agent configuration, a file of `configs/agent/`: results and loggers
            call the agent by it.
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
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "tf32"] = "fp32"
    threads: Threads = 1
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
    candidates: Candidates | None
    temperature: NonNegative | None
    noise: Literal["input", "inside"]
    out: str | None
    traceback: bool


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation; `configs/evaluate.yaml` has the defaults.

    Attributes:
        checkpoint: a run's folder, one of its checkpoints, a policy's folder, or the Hub's.
        episodes: how many.
        seed: of the environments and the policy's noise: episode i has seed + i.
        candidates: how many actions compete by their value; 1 is the actor alone; None leaves the policy's
            own rule.
        temperature: of that choice, likewise; only for several candidates that are sampled.
        deterministic: see `cpql.Policy.predict`.
        env_id: Gymnasium's id of another environment than the task's, as wide as that; then there is a return
            and no score.
        episode_limit: steps after which an episode ends that its environment doesn't end.
        device: `auto` takes a GPU where there is one.
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        out: the JSON file; None puts it beside the policy, named by what isn't the policy's own there.
        traceback: show Python's traceback with an error.
    """

    checkpoint: str
    episodes: Count
    seed: Seed
    candidates: Candidates | None
    temperature: NonNegative | None
    deterministic: bool
    env_id: str | None
    episode_limit: Count
    device: Literal["auto", "cpu", "cuda"]
    threads: Threads
    out: str | None
    traceback: bool


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
        # Of a setting with several types there is an error for each: one that understood the value says more.
        found = error.errors()
        found = [each for each in found if not each["type"].endswith("_type")] or found
        key = _key(cls, found[0]["loc"])
        expected = [each["msg"].partition(", unable")[0] for each in found if _key(cls, each["loc"]) == key]
        message = " or ".join(
            [expected[0], *(text.removeprefix("Input should be ") for text in expected[1:])]
        )
        value = repr(found[0]["input"])
        raise ConfigError(f"{where}: {key}: {message}, found {value[:80]}") from None


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
        inner = _inner(types[key])
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(inner, value, f"{where}: {key}")


def _inner(kind: Any) -> type[Any] | None:
    """The dataclass that a field of this type holds, if it holds one."""
    for one in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(one):
            return typing.cast(type[Any], one)
    return None


def _key(cls: type[Any] | None, path: tuple[int | str, ...]) -> str:
    """A setting's name, from where pydantic found it: without the types that it has tried."""
    parts = []
    for part in path:
        types = typing.get_type_hints(cls) if cls else {}
        if part in types:
            cls = _inner(types[str(part)])
        elif not isinstance(part, int):
            continue
        parts.append(str(part))
    return ".".join(parts)
