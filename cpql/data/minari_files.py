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
imported, and everything is looked at before it is read. Data in Arrow or Parquet are refused.
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

from cpql.data.d4rl import Origin, is_bomb, origin
from cpql.data.transitions import TimeLimits, Transitions
from cpql.environments import action_bounds, make_environment
from cpql.errors import ConfigError, DataError
from cpql.io import sha256_of
from cpql.tasks import Task, check_options

__all__ = ["ARRAYS", "METADATA", "NAME", "Metadata", "TaskOptions", "metadata", "read"]

ARRAYS, METADATA = "main_data.hdf5", "metadata.json"
# Minari's own rule: (namespace/)name-vN, with a namespace of at least two characters.
NAME = r"(?:(?:[-\w]{2,}|[-\w]/[-\w]+)(?:/[-\w]+)*/)?[-\w]+-v\d+"
MOST_METADATA_BYTES = 16 << 20
FLOAT32 = float(np.finfo(np.float32).max)

Where = str | os.PathLike[str]


def _without_paths(options: dict[str, Any]) -> dict[str, Any]:
    """Check an environment's options, without how the collector looked at it."""
    options = {name: value for name, value in options.items() if name != "render_mode"}
    try:
        check_options("options", options)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return options


Total = Annotated[int, Field(strict=True, gt=0, lt=1 << 48)]
Bound = Annotated[float, Field(ge=-FLOAT32, le=FLOAT32)]
Reference = Annotated[float, Field(allow_inf_nan=False)] | None
Options = Annotated[dict[str, Any], AfterValidator(_without_paths)]


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
    """What `metadata.json` says of a dataset, with Minari's names; some values are JSON within the JSON.

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


def metadata(where: Where) -> Metadata:
    """Read and check a dataset's `metadata.json`.

    Args:
        where: the dataset's folder, or the `data` folder in it.

    Raises:
        DataError: there is no such dataset, or its `metadata.json` is damaged.
    """
    path = _data_folder(where) / METADATA
    name = _name(path)
    try:
        if (size := path.stat().st_size) > MOST_METADATA_BYTES:
            raise DataError(f"{name}: {size:,} bytes long: expected a page of JSON")
        found = TypeAdapter(Metadata).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "damaged"
        raise DataError(f"{name}: {key}: {first['msg']}, found {first['input']!r:.80}") from None
    except OSError as error:
        raise DataError(f"{name}: damaged ({error}): expected JSON as Minari writes it") from error
    low, high = found.ref_min_score, found.ref_max_score
    if low is not None and high is not None and not low < high:
        raise DataError(f"{name}: ref_min_score {low} and ref_max_score {high}: expected the lower first")
    if max(found.cpql_cut_episodes, default=0) >= found.total_episodes:
        raise DataError(f"{name}: cpql_cut_episodes: expected numbers below {found.total_episodes}")
    return found


def _data_folder(where: Where) -> Path:
    path = Path(where)
    if not path.is_dir():
        found = "not a folder" if path.exists() else "no such folder"
        raise DataError(f"{path}: {found}: expected a Minari dataset's folder")
    for folder in (path, path / "data"):
        if (folder / METADATA).is_file():
            return folder
    raise DataError(f"{path}: no {METADATA} in it or in its data folder: expected a Minari dataset's folder")


def _name(path: Path) -> str:
    """A file's name in errors, with the dataset's folder."""
    return "/".join(path.parts[-3:])


def read(where: Where, task: Task | None = None, *, time_limits: TimeLimits = "keep") -> Transitions:
    """Read and check a dataset.

    Args:
        where: its folder, or the `data` folder in it.
        task: its `observation` names the arrays to concatenate, in order, if observations are dicts. It isn't
            used if they are arrays already.
        time_limits: see `Transitions.from_dict`.

    Returns:
        Transitions with actions scaled from the dataset's action space to [-1, 1]. What cpql wrote has the
        provenance that it had then.

    Raises:
        DataError: there is no such dataset, it is damaged, declares more than it holds, leads to other files,
            or has actions or observations that aren't vectors of numbers.
        ConfigError: it has no action space, and its environment can't be made.
    """
    about, path = metadata(where), _data_folder(where) / ARRAYS
    name = _name(path)
    if not path.is_file():
        raise DataError(
            f"{name}: no such file beside {METADATA}: expected the arrays; `minari download --force "
            f"{about.dataset_id}` downloads a dataset again"
        )
    try:
        with h5py.File(path, "r") as file:
            arrays = _arrays(file.id, about, task.observation if task else (), path.stat().st_size)
        sha256 = sha256_of(path)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, can't be read ({reason}): expected whole HDF5") from error
    low, high = _bounds(about, arrays["actions"].shape[1])
    environment = about.environment
    known = Origin("minari", about.dataset_id, {"environment": environment and environment.id})
    if about.cpql_origin is not None:
        known = origin(about.cpql_origin, f"{_name(path.with_name(METADATA))}:")
    return Transitions.from_dict(
        arrays,
        **known._asdict(),
        file=ARRAYS,
        sha256=sha256,
        time_limits=time_limits,
        action_low=low,
        action_high=high,
    )


def _bounds(about: Metadata, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The actions' bounds [A]; as in Minari, the environment's if the dataset has no action space."""
    space, environment = about.action_space, about.environment
    if space is None:
        if environment is None:
            raise DataError(f"{about.dataset_id}: neither 'action_space' nor 'env_spec' in {METADATA}")
        with contextlib.closing(make_environment(environment.id, **environment.options)) as made:
            return action_bounds(made)
    if not len(space.low) == len(space.high) == width:
        raise DataError(
            f"{about.dataset_id}: 'action_space' in {METADATA} has {len(space.low)} lower and "
            f"{len(space.high)} upper bounds: expected {width}, as many as actions have numbers"
        )
    return np.array(space.low, np.float32), np.array(space.high, np.float32)


def _arrays(
    file: Any, about: Metadata, observation: Sequence[str], size: int
) -> dict[str, NDArray[np.float32]]:
    """All episodes, one after another, in arrays of the size that the metadata say.

    With h5py's low-level interface: a dataset may have ten thousand short episodes, and with the other one
    looking at an array takes longer than reading it.
    """
    steps = about.total_steps
    first = _open(file, "episode_0", "episode_0")
    paths = _observations(first, observation)
    ends = [0, *itertools.accumulate(_width(first, path) for path in paths)]
    parts = {path: slice(*ends[k : k + 2]) for k, path in enumerate(paths)}
    width = _width(first, "actions")
    declared = 4 * steps * (ends[-1] + width + 1)
    if is_bomb(declared, size):
        raise DataError(
            f"{steps:,} steps declared, {declared / 2**30:,.1f} GiB, in a file of {size / 2**20:,.2f} MiB: "
            "expected arrays that are written"
        )
    observations, following = np.empty((2, steps, ends[-1]), np.float32)
    others = {key: np.empty(steps, np.float32) for key in ("rewards", "terminations", "truncations")}
    others["actions"] = np.empty((steps, width), np.float32)
    start = 0
    for number in range(about.total_episodes):
        label = f"episode_{number}"
        episode = _open(file, label, label)
        shape: tuple[int, ...] = _array(episode, "rewards", f"{label}/rewards").shape or ()
        rows = slice(start, start + (shape[0] if len(shape) == 1 else 0))
        length = rows.stop - start
        if not start < rows.stop <= steps:
            raise DataError(
                f"'{label}/rewards' has shape {list(shape)} after {start:,} steps: expected at least 1, "
                f"and {steps:,} in all, as {METADATA} says"
            )
        with np.errstate(over="ignore"):  # from_dict reports infinity, with its row
            for key, array in others.items():
                array[rows] = _values(episode, key, label, (length, *array.shape[1:]))
            for path, part in parts.items():
                table = _values(episode, path, label, (length + 1, part.stop - part.start))
                observations[rows, part], following[rows, part] = table[:-1], table[1:]
        start = rows.stop
        if number in about.cpql_cut_episodes:
            others["truncations"][start - 1] = 0
    if start != steps:
        raise DataError(f"{start:,} steps: expected {steps:,}, as {METADATA} says")
    if (label := f"episode_{about.total_episodes}").encode() in file:
        raise DataError(f"an '{label}': expected {about.total_episodes:,} episodes, as {METADATA} says")
    names = {"terminals": "terminations", "timeouts": "truncations"}
    columns = {key: others[names.get(key, key)] for key in ("actions", "rewards", *names)}
    return {"observations": observations, "next_observations": following} | columns


def _observations(episode: Any, keys: Sequence[str]) -> list[str]:
    """The paths of the arrays that make up an observation."""
    found = _open(episode, "observations", "episode_0/observations")
    if isinstance(found, h5py.h5d.DatasetID):
        return ["observations"]
    names = [name.decode(errors="replace") for name in found]
    there = ", ".join(map(repr, names[:20])) or "nothing"
    if not keys:
        raise DataError(
            f"'observations' is a dict of {there}: expected a task whose `observation` says which to take"
        )
    for key in keys:
        if key not in names:
            raise DataError(f"no '{key}' in 'observations', only {there}")
    return [f"observations/{key}" for key in keys]


def _width(episode: Any, path: str) -> int:
    """How many numbers a step has in the first episode."""
    shape: tuple[int, ...] = _array(episode, path, f"episode_0/{path}").shape or ()
    if len(shape) != 2 or shape[1] == 0:
        kind = "images or sequences" if len(shape) > 2 else "discrete, or scalars"
        raise DataError(f"'episode_0/{path}' has shape {list(shape)}, {kind}: expected a vector a step")
    return shape[1]


def _open(group: Any, path: str, label: str) -> Any:
    """What a path leads to, by hard links alone: then it is in this file."""
    for key in path.encode().split(b"/"):
        if not isinstance(group, h5py.h5g.GroupID) or not group.links.exists(key):
            raise DataError(f"no '{label}': expected Minari's layout")
        if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
            raise DataError(f"'{label}' is a link to elsewhere: expected it in the file")
        group = h5py.h5o.open(group, key)
    return group


def _array(group: Any, path: str, label: str) -> Any:
    """An array of numbers that are in this file, not read yet."""
    array = _open(group, path, label)
    if not isinstance(array, h5py.h5d.DatasetID):
        raise DataError(f"'{label}' is a group: expected an array")
    made = array.get_create_plist()
    if made.get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
        raise DataError(f"'{label}' keeps its numbers in another file: expected them here")
    if array.dtype.kind not in "biuf":
        raise DataError(f"'{label}' holds {array.dtype}: expected numbers")
    return array


def _values(group: Any, path: str, label: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read an array that has this shape."""
    array = _array(group, path, f"{label}/{path}")
    if array.shape != shape:
        raise DataError(
            f"'{label}/{path}' has shape {list(array.shape or ())}: expected {list(shape)}, by the first "
            "episode's width and this one's rewards"
        )
    values = np.empty(shape, array.dtype)
    array.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values
