"""A task: an environment to act in, the dataset to learn from, and the returns that scores refer to.

The tasks themselves are data: `configs/tasks.yaml` is a table of them by family, which `expand` spells out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpql.errors import ConfigError, did_you_mean
from cpql.settings import Count, build

__all__ = [
    "Task",
    "check_options",
    "config_folder",
    "expand",
    "load_task",
    "task_names",
    "task_patterns",
    "with_own_references",
]

LONGEST_NAME = 200
ENTRY: dict[str, type] = {"id": str, "path": str, "rows": int}


@dataclass(frozen=True)
class Task:
    """One benchmark task.

    A policy or a run's folder, which contain a task, may come from anyone. So no name in a task may be a path
    out of a folder, and no option may name a file; see `check_options`.

    Attributes:
        name: what the user types, `hopper-medium`.
        id: Gymnasium's environment id for evaluation. D4RL's locomotion data came from the v2 physics, of
            which v4 is the closest living relative. None where nothing is to be evaluated: then actions are
            taken for [-1, 1] and observations for as wide as the data's.
        random_return: the return that scores 0 (D4RL's reference, undiscounted); None where there is none.
        expert_return: the return that scores 100; None where there is none.
        datasets: the datasets of the task by source, a name of `cpql.data.sources.SOURCES`: each has an `id`,
            such as `hopper-medium-v2` of `d4rl`; where known also a `path` under the source's hosts,
            `gym_mujoco_v2/hopper_medium-v2.hdf5`, and its number of `rows`. Those of two sources may be
            different data: `mujoco/hopper/medium-v0` of `minari` has the name in common with D4RL's, not the
            policy, the episodes or the environment's version. Empty for a task that is only learnt online.
        observation: keys of a dict observation that are concatenated, in this order; empty where the
            observation is an array.
        env_options: keyword arguments of `gymnasium.make`.
        reset_options: the environment's `reset(options=...)`.
        episodes: of one evaluation in the papers.
        at_once: how many of them run side by side: fewer where an environment takes much memory.
        note: a sentence where scores here can't be compared with D4RL's tables, and why.
        benchmark: whose references these are; scores of two benchmarks belong in no common table.
        measure: what scores are made of: "return", by the references; or "success", the share of episodes, in
            percent, whose last step had `success` in its info, as OGBench's are.

    Raises:
        ConfigError: a name that could be a path to elsewhere, an option that names a file, an entry of
            `datasets` with other keys or types, or references that scale nothing.
    """

    name: str
    id: str | None
    random_return: float | None = None
    expert_return: float | None = None
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    observation: tuple[str, ...] = ()
    env_options: dict[str, Any] = field(default_factory=dict)
    reset_options: dict[str, Any] = field(default_factory=dict)
    episodes: int = 10
    at_once: Count = 50
    note: str = ""
    benchmark: str = "D4RL"
    measure: Literal["return", "success"] = "return"

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        for source, entry in self.datasets.items():
            _check_name("datasets", source)
            _check_entry(f"datasets.{source}", entry)
        check_options("env_options", self.env_options)
        check_options("reset_options", self.reset_options)
        low, high = self.random_return, self.expert_return
        if low is not None and high is not None and not 0.0 < abs(high - low) < math.inf:
            raise ConfigError(
                f"random_return and expert_return: expected two numbers, found {low} and {high}"
            )

    @property
    def dataset(self) -> str:
        """The id of the first of `datasets`, D4RL's where it has one; empty where there is none."""
        return next((str(entry["id"]) for entry in self.datasets.values()), "")

    def score(self, episode_return: float) -> float | None:
        """The normalised score, in percent: `100 (R - R_random) / (R_expert - R_random)`.

        None where the task has no references.
        """
        if self.random_return is None or self.expert_return is None:
            return None
        return 100.0 * (episode_return - self.random_return) / (self.expert_return - self.random_return)


def _check_entry(key: str, entry: Mapping[str, Any]) -> None:
    """Check one dataset of a task: its keys, their types, and that no name leads out of a folder."""
    values: dict[str, Any] = {"id": None, **entry}
    for name, value in values.items():
        if name not in ENTRY:
            raise ConfigError(f"{key}: unknown key {name!r}: {did_you_mean(name, ENTRY)}")
        if type(value) is not ENTRY[name]:
            raise ConfigError(f"{key}.{name}: expected {ENTRY[name].__name__}, found {value!r}")
        if isinstance(value, str):
            _check_name(f"{key}.{name}", value)
        elif isinstance(value, int) and value < 1:
            raise ConfigError(f"{key}.{name}: expected at least 1, found {value}")


def _check_name(key: str, name: str) -> None:
    """Refuse a name that would lead out of a folder if appended to its path."""
    leads_out = {"", ".", ".."} & set(name.split("/")) or "\\" in name or re.match(r"\w:", name)
    if leads_out or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"{key} {name[:LONGEST_NAME]!r}: expected a name such as 'hopper-medium', not a path"
        )


def check_options(key: str, options: Mapping[str, Any]) -> None:
    """Refuse environment options (of `gymnasium.make` or `reset`) that could be a path or set a render mode.

    A bare file name, `xml_file: hopper.xml`, is allowed: it names one of the environment's own files.

    Raises:
        ConfigError: there is such an option; the message begins with `key`.
    """
    if "render_mode" in options:
        raise ConfigError(f"{key}: render_mode={options['render_mode']!r}: expected none, as nobody watches")
    for text in _texts(options):
        if "/" in text or "\\" in text or text.startswith((".", "~")) or re.match(r"\w:", text):
            raise ConfigError(
                f"{key}: {text[:LONGEST_NAME]!r} could be a path: expected none; a module of your own can "
                "register an environment that has it, and the command line name that: MODULE:Env-v0"
            )


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested options, keys as well as values, without recursion: a file decides the depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value


def expand(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Spell out the table of tasks: one for each combination of a family's values.

    Args:
        table: by family, what its tasks share and, for every word in braces in its `name`, the values of
            that word with what each of them adds. A later word's fields win over an earlier one's, and both
            over what is shared; nested fields are merged. Texts may use the words, and `{file}` if one of the
            values has a `file`.

    Returns:
        Fields of `Task`, unchecked, by the task's name.
    """
    tasks = {}
    for family in table.values():
        axes = _axes(family)
        shared = {key: value for key, value in family.items() if key not in axes}
        for chosen in itertools.product(*(family[axis].items() for axis in axes)):
            words = dict(zip(axes, (value for value, _ in chosen), strict=True))
            fields = functools.reduce(_merged, (added for _, added in chosen), shared)
            if "file" in fields:
                words["file"] = fields.pop("file")
            task = _formatted(fields, words)
            tasks[task["name"]] = task
    return tasks


def _axes(family: Mapping[str, Any]) -> list[str]:
    """Names of a family's lists of values, in the order of its name's braces."""
    return re.findall(r"\{(\w+)\}", family["name"])


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(one[key], other[key]) for key in one.keys() & other.keys()
            if isinstance(one[key], Mapping) and isinstance(other[key], Mapping)}  # fmt: skip
    return {**one, **other, **both}


def _formatted(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _formatted(inner, words) for key, inner in value.items()}
    return value.format(**words) if isinstance(value, str) else value


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


def task_patterns(table: Mapping[str, Any] | None = None) -> list[str]:
    """Name all tasks in one line a family, as a shell would expand it: `kitchen-{complete,partial,mixed}`."""
    names = []
    for family in (table or _table()).values():
        lists = {axis: "{" + ",".join(family[axis]) + "}" for axis in _axes(family)}
        names.append(family["name"].format(**lists))
    return names


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
    """Remove a task's reference returns if its environment or options differ from those of `own`.

    References hold for one environment, made and reset with certain options. References that `task` has in
    place of those of `own`, the task it was derived from, are kept.
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
