"""Reading Minari's datasets.

A dataset is a folder, ROOT/ID/data, with two files:

    metadata.json     total_episodes, total_steps, action_space with its bounds, env_spec, ...
    main_data.hdf5    episode_0, episode_1, ..., each a group of
                          observations [T + 1, S]   or a group of such arrays, by name
                          actions      [T, A]       in the action space's bounds
                          rewards      [T]
                          terminations [T]          the task ended: `terminals`
                          truncations  [T]          a time limit was reached: `timeouts`

Step t leads to `observations[t + 1]`. An episode whose last step has neither flag was cut.

The minari package can read them too, but it may import what `metadata.json` names as an environment's
`entry_point`, and it reads the `infos` of every step, often larger than everything else. Here nothing is
imported, and everything is checked before it is read. Data in Arrow or Parquet are refused.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, Json, TypeAdapter, ValidationError

from cpql.data.d4rl import array_of, object_of, origin, refuse_bomb
from cpql.data.transitions import TimeLimits, Transitions
from cpql.environments import action_bounds, make_environment
from cpql.errors import ConfigError, DataError
from cpql.io import sha256_of
from cpql.tasks import Task, check_options

__all__ = ["ARRAYS", "METADATA", "NAME", "Metadata", "TaskOptions", "data_folder", "metadata", "read"]

ARRAYS, METADATA = "main_data.hdf5", "metadata.json"
# Minari's own rule: (namespace/)name-vN, with a namespace of at least two characters.
NAME = r"(?:(?:[-\w]{2,}|[-\w]/[-\w]+)(?:/[-\w]+)*/)?[-\w]+-v\d+"
MOST_METADATA_BYTES = 16 << 20
# Where an episode has D4RL's columns, besides observations.
PATHS = {"actions": "actions", "rewards": "rewards", "terminals": "terminations", "timeouts": "truncations"}
FLOAT32 = float(np.finfo(np.float32).max)

Where = str | os.PathLike[str]


def _check_options(options: dict[str, Any]) -> dict[str, Any]:
    """An environment's options without how its collector looked at it; none of them may be a path."""
    options = {name: value for name, value in options.items() if name != "render_mode"}
    try:
        check_options("options", options)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return options


Total = Annotated[int, Field(strict=True, gt=0, lt=1 << 48)]
Bound = Annotated[float, Field(ge=-FLOAT32, le=FLOAT32)]
Reference = Annotated[float, Field(allow_inf_nan=False)] | None
Options = Annotated[dict[str, Any], AfterValidator(_check_options)]


@dataclass(frozen=True)
class ActionSpace:
    """A box with finite bounds [A] of real numbers."""

    type: Literal["Box"]
    dtype: Annotated[str, Field(pattern="^float")]
    low: list[Bound]
    high: list[Bound]


@dataclass(frozen=True)
class Environment:
    """An environment's spec, whose id names no module: Gymnasium would import one before a colon."""

    id: Annotated[str, Field(pattern="^[^:]+$")]
    kwargs: Options = field(default_factory=dict)
    max_episode_steps: int | None = None
    additional_wrappers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `gymnasium.make`."""
        limit = self.max_episode_steps
        return self.kwargs if limit is None else self.kwargs | {"max_episode_steps": limit}


@dataclass(frozen=True)
class TaskOptions:
    """What `write` keeps of a task and Minari has no place for."""

    observation: tuple[str, ...]
    reset_options: Options


@dataclass(frozen=True)
class Metadata:
    """The content of `metadata.json`, with Minari's names; some values are JSON within the JSON.

    cpql adds the episodes that were cut, which Minari has to call truncated, the origin of the data (see
    `cpql.data.d4rl.origin`), and the task. Old datasets have no action space.
    """

    dataset_id: Annotated[str, Field(pattern=f"^{NAME}$")]
    total_episodes: Total
    total_steps: Total
    data_format: Literal["hdf5"] = "hdf5"
    action_space: Json[ActionSpace] | None = None
    env_spec: Json[Environment] | None = None
    eval_env_spec: Json[Environment] | None = None
    ref_min_score: Reference = None
    ref_max_score: Reference = None
    cpql_cut_episodes: frozenset[Annotated[int, Field(strict=True, ge=0)]] = frozenset()
    cpql_origin: Any = None
    cpql_task: Json[TaskOptions] | None = None

    @property
    def environment(self) -> Environment | None:
        """The one to evaluate in, as in Minari: AntMaze's data have many goals, its evaluation has one."""
        return self.eval_env_spec or self.env_spec


def data_folder(where: Where) -> Path:
    """The folder of a dataset's files: `where`, or the `data` folder in it.

    Raises:
        DataError: there is no dataset.
    """
    for folder in (Path(where), Path(where) / "data"):
        if os.path.isfile(folder / METADATA):
            return folder
    raise DataError(f"{where}: no {METADATA} in it or in its data folder: expected a Minari dataset's folder")


def metadata(where: Where) -> Metadata:
    """Read and check the `metadata.json` in a dataset's folder, or in the `data` folder in that.

    Raises:
        DataError: there is no such dataset, or its `metadata.json` is damaged.
    """
    path = data_folder(where) / METADATA
    name = "/".join(path.parts[-3:])
    try:
        if (size := path.stat().st_size) > MOST_METADATA_BYTES:
            raise DataError(f"{name}: {size:,} bytes long: expected a page of JSON")
        found = TypeAdapter(Metadata).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "damaged"
        raise DataError(f"{name}: {key}: {first['msg']}, found {first['input']!r:.80}") from None
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error}): expected JSON") from error
    low, high = found.ref_min_score, found.ref_max_score
    if low is not None and high is not None and not low < high:
        raise DataError(f"{name}: ref_min_score {low} and ref_max_score {high}: expected the lower first")
    return found


def read(where: Where, task: Task | None = None, *, time_limits: TimeLimits = "keep") -> Transitions:
    """Read and check the dataset in a folder, or in the `data` folder in it.

    Actions are scaled from the dataset's action space to [-1, 1]. What cpql wrote has the provenance that it
    had then. A task's `observation` names the arrays to concatenate, in order, if observations are dicts.

    Raises:
        DataError: there is no such dataset, it is damaged, declares more than it holds, leads to other files,
            or has actions or observations that aren't vectors of numbers.
        ConfigError: it has no action space, and its environment can't be made.
    """
    about, folder = metadata(where), data_folder(where)
    path, name = folder / ARRAYS, "/".join((*folder.parts[-2:], ARRAYS))
    try:
        with h5py.File(path, "r") as file:
            arrays = _arrays(file.id, path, name, about, task.observation if task else ())
        sha256 = sha256_of(path)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name}: damaged, can't be read ({' '.join(str(error).split())}): expected whole HDF5; "
            f"`minari download --force {about.dataset_id}` downloads a dataset again"
        ) from error
    space, environment = about.action_space, about.environment
    if space is not None:
        low, high = np.array(space.low, np.float32), np.array(space.high, np.float32)
        if not low.shape == high.shape == arrays["actions"].shape[1:]:
            raise DataError(
                f"{about.dataset_id}: 'action_space' in {METADATA} has {len(low)} lower and {len(high)} "
                f"upper bounds: expected {arrays['actions'].shape[1]}, as many as actions have numbers"
            )
    elif environment is not None:  # as in Minari
        with contextlib.closing(make_environment(environment.id, **environment.options)) as made:
            low, high = action_bounds(made)
    else:
        raise DataError(f"{about.dataset_id}: neither 'action_space' nor 'env_spec' in {METADATA}")
    known: dict[str, Any] = {
        "source": "minari",
        "id": about.dataset_id,
        "details": {"environment": environment and environment.id},
    }
    if about.cpql_origin is not None:
        known = origin(about.cpql_origin, f"{folder.parent.name}/data/{METADATA}")
    known |= {"file": ARRAYS, "sha256": sha256, "time_limits": time_limits}
    return Transitions.from_dict(arrays, action_low=low, action_high=high, **known)


def _arrays(
    file: Any, path: Path, name: str, about: Metadata, observation: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """All episodes, one after another, in arrays of the size that the metadata declare."""
    first, where, keys = object_of(file, "episode_0", name), f"{name}: episode_0", ["observations"]
    tables = object_of(first, "observations", where)
    if isinstance(tables, h5py.h5g.GroupID):
        keys = [f"observations/{key}" for key in observation]
        if not keys or not all(key.encode() in tables for key in observation):
            found = ", ".join(repr(key.decode(errors="replace")) for key in itertools.islice(tables, 20))
            raise DataError(
                f"{name}: 'observations' is a dict of {found}: expected a task whose `observation` names "
                f"some of them, found {list(observation)}"
            )
    widths = []
    for key in (*keys, "actions"):
        shape = list(array_of(first, key, where).shape or ())
        if len(shape) != 2 or not shape[1]:
            raise DataError(f"{where}: '{key}' has shape {shape}: expected a vector a step")
        widths.append(shape[1])
    steps, width, ends = about.total_steps, widths.pop(), [0, *itertools.accumulate(widths)]
    refuse_bomb(name, 4 * steps * (ends[-1] + width + 1), path)
    observations, next_observations = np.empty((2, steps, ends[-1]), np.float32)
    columns = {name: np.empty(steps, np.float32) for name in PATHS.values()}
    columns["actions"] = np.empty((steps, width), np.float32)
    stop = 0
    for number in range(about.total_episodes):
        where, start = f"{name}: episode_{number}", stop
        episode = object_of(file, f"episode_{number}", name)
        arrays = {key: array_of(episode, key, where) for key in (*columns, *keys)}
        shape = list(arrays["rewards"].shape or ())
        stop += shape[0] if len(shape) == 1 else 0
        if not start < stop <= steps:
            raise DataError(
                f"{where}: 'rewards' has shape {shape} after {start:,} steps: expected at least 1, and "
                f"{steps:,} in all, as {METADATA} says"
            )
        with np.errstate(over="ignore"):  # from_dict reports infinity, with its row
            for key, column in columns.items():
                expected = (stop - start, *column.shape[1:])
                column[start:stop] = _values(arrays[key], f"{where}: '{key}'", expected)
            for key, (left, right) in zip(keys, itertools.pairwise(ends), strict=True):
                table = _values(arrays[key], f"{where}: '{key}'", (stop - start + 1, right - left))
                observations[start:stop, left:right] = table[:-1]
                next_observations[start:stop, left:right] = table[1:]
        if number in about.cpql_cut_episodes:
            columns["truncations"][stop - 1] = 0
    if stop != steps or f"episode_{about.total_episodes}".encode() in file:
        raise DataError(
            f"{name}: {len(file):,} episodes, {stop:,} steps read: expected {about.total_episodes:,} and "
            f"{steps:,}, as {METADATA} says"
        )
    columns = {key: columns[name] for key, name in PATHS.items()}
    return {"observations": observations, "next_observations": next_observations} | columns


def _values(array: Any, where: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape != shape:
        found = list(array.shape or ())
        raise DataError(f"{where} has shape {found}: expected {list(shape)}, as its rewards need")
    values = np.empty(shape, array.dtype)
    array.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values
