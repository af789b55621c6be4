"""Minari's datasets: where they lie, how they are fetched, read and written, and what their scores refer to.

A dataset is a folder, ROOT/ID/data, with two files:

    metadata.json     total_episodes, total_steps, action_space with its bounds, env_spec, ...
    main_data.hdf5    episode_0, episode_1, ..., each a group of
                          observations [T + 1, S]   or a group of such arrays, by name
                          actions      [T, A]       in the action space's bounds
                          rewards      [T]
                          terminations [T]          the task ended: `terminals`
                          truncations  [T]          the clock ran out: `timeouts`

`observations[t + 1]` is what step t led to. An episode whose last step has neither flag was cut.

Files are read with h5py: the layout is simple, reading it needs no further package, the `infos` of every
step, often larger than all the rest, are left where they are, and nothing in `metadata.json` can have code
imported, as an environment's `entry_point` would. Only downloads need the package. Data in Minari's other
formats, Arrow and Parquet, are refused.

Scores: Minari's references are its own, where it has any. They, and its data, are other ones than D4RL's even
where the names agree, so `task` puts them in the place of D4RL's, and nothing is ever scored by both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from cpql.data.d4rl import MOST_EXPANSION, ORIGIN, UNSUSPICIOUS_BYTES, origin, origin_of, user_folder
from cpql.data.request import Request, Source
from cpql.data.transitions import TimeLimits, Transitions
from cpql.environments import action_bounds, make_environment
from cpql.errors import ConfigError, DataError
from cpql.tasks import Task, check_options

__all__ = [
    "ARRAYS",
    "CUTS",
    "ID",
    "Minari",
    "find",
    "load",
    "locate",
    "metadata",
    "read",
    "references",
    "root",
    "task",
    "write",
]

ARRAYS, ABOUT = "main_data.hdf5", "metadata.json"
# Minari's own: (namespace/)name-vN, the namespace of two characters at least.
ID = re.compile(r"(?!.*//)(?:[-\w][-\w/]*[-\w]/)?[-\w]+-v\d+", re.ASCII)
# The oldest version with this layout, so that every later one reads what is written here.
LAYOUT_VERSION = "0.5.0"
CUTS = "cpql_cut_episodes"
# What a task says of its environment that Minari has no place for.
HOW = "cpql_task"
MOST_ABOUT_BYTES = 16 << 20
MOST_STEPS = 1 << 48

Where = str | os.PathLike[str]


class Minari(Source):
    """Minari's datasets, in its own folder, else downloaded by the package."""

    description = "Minari's"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        about = request.about("minari")
        return find(about["id"]) if about else None

    def fetch(self, request: Request) -> Path:
        """See `Source`."""
        about = request.about("minari")
        if not about:
            raise DataError(
                f"{request.task.name}: Minari has no counterpart: expected dataset.id to name a dataset"
            )
        return locate(about["id"], say=request.say)

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`; the task is what `Minari.task` gave."""
        return read(path, request.task, time_limits=request.time_limits)

    def task(self, path: Path, request: Request) -> Task:
        """See `Source`."""
        return task(request.task, path)


def root() -> Path:
    """Where Minari keeps its datasets: `$MINARI_DATASETS_PATH`, else `~/.minari/datasets`.

    Raises:
        DataError: there is no home folder.
    """
    # Taken as it stands, a `~` in it too: the package does so, and downloads go where it thinks.
    named = os.environ.get("MINARI_DATASETS_PATH")
    return Path(named) if named else user_folder("MINARI_DATASETS_PATH", "~/.minari/datasets")


def find(id: str) -> Path | None:
    """Give the folder of a dataset that is here whole, or None.

    Raises:
        DataError: `id` isn't a Minari id.
    """
    folder = root() / _checked(id)
    return folder if all((folder / "data" / name).is_file() for name in (ABOUT, ARRAYS)) else None


def _checked(id: str) -> str:
    if ID.fullmatch(id) is None:
        raise DataError(f"'{id}' isn't a Minari id: expected one such as 'D4RL/pen/human-v2'")
    return id


def locate(id: str, *, download: bool = True, say: Callable[[str], None] = print) -> Path:
    """Give the folder of a dataset, and fetch it first where it isn't here.

    Args:
        id: `D4RL/pen/human-v2`, `mujoco/hopper/medium-v0`.
        download: whether to fetch it. A download that was cut off goes on where it stopped.
        say: takes a line for the user. The hub's client draws its own progress bars.

    Raises:
        DataError: it is neither here nor to be had.
    """
    if find(id) is None and download:
        _download(id, say)
    folder = root() / id
    # What isn't whole is for `read` to complain about: it knows what is missing.
    if not folder.is_dir():
        raise DataError(_absent(id))
    return folder


def load(
    id: str,
    task: Task | None = None,
    *,
    time_limits: TimeLimits = "keep",
    download: bool = True,
    say: Callable[[str], None] = print,
) -> Transitions:
    """Read a dataset by its id, and fetch it first where it isn't here: `locate`, then `read`.

    Raises:
        DataError: it is neither here nor to be had, or isn't valid.
    """
    return read(locate(id, download=download, say=say), task, time_limits=time_limits)


def _download(id: str, say: Callable[[str], None]) -> None:
    """Have the minari package fetch a dataset into its own root."""
    try:
        import minari  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(f"{_absent(id)}; pip install 'minari[hdf5,hf]' for downloads ({error})") from error
    say(f"downloading {id} from Minari into {root()}")
    try:
        # What it prints and warns of is for its own command line; `say` is told what matters.
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            # By force, or a folder that a cut download has left would count as the dataset.
            minari.download_dataset(id, force_download=True)
    except Exception as error:  # the hub's client raises errors of every library beneath it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{_absent(id)} (the download failed: {reason})") from error
    for warning in caught:
        if warning.category is UserWarning:
            say(f"warning: {' '.join(str(warning.message).split())}")


def _absent(id: str) -> str:
    return f"{id}: no such dataset in {root()}: `minari download {id}`, or put it into {root() / id / 'data'}"


def metadata(where: Where) -> dict[str, Any]:
    """Read what a dataset says of itself.

    Args:
        where: its folder, the `data` folder in it, or the id of a local dataset.

    Raises:
        DataError: there is no such dataset, or its `metadata.json` is damaged.
    """
    return _metadata(_folder(where))


def _folder(where: Where) -> Path:
    """The folder with the dataset's two files."""
    path = Path(where)
    if not path.exists() and ID.fullmatch(str(where)):
        path = root() / path
        if not path.is_dir():
            raise DataError(_absent(str(where)))
    if not path.is_dir():
        found = "not a folder" if path.exists() else "no such folder"
        raise DataError(f"{path}: {found}: expected a Minari dataset's, or an id such as 'D4RL/pen/human-v2'")
    for folder in (path, path / "data"):
        if (folder / ABOUT).is_file():
            return folder
    raise DataError(f"{path}: no {ABOUT} in it or in its data folder: expected a Minari dataset's folder")


def _name(path: Path) -> str:
    """A file as errors name it, with the dataset's folder."""
    return "/".join(path.parts[-3:])


def _metadata(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    name = _name(path)
    try:
        if path.stat().st_size > MOST_ABOUT_BYTES:
            raise DataError(f"{name}: {path.stat().st_size:,} bytes long: expected a page of JSON")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{name}: damaged ({error}): expected JSON as Minari writes it") from error
    if not isinstance(found, dict):
        raise DataError(f"{name}: holds a {type(found).__name__}: expected Minari's keys")
    if found.get("data_format", "hdf5") != "hdf5":
        raise DataError(
            f"{name}: 'data_format' is {found['data_format']!r}: expected 'hdf5', the only one read here"
        )
    for key in ("total_episodes", "total_steps"):
        if type(found.get(key)) is not int or not 0 < found[key] < MOST_STEPS:
            raise DataError(f"{name}: '{key}' is {found.get(key)!r}: expected how many there are")
    if not (isinstance(found.get("dataset_id"), str) and ID.fullmatch(found["dataset_id"])):
        raise DataError(
            f"{name}: 'dataset_id' is {found.get('dataset_id')!r}: expected one such as 'me/mine-v0'"
        )
    return found


def _encoded(about: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """A value that Minari keeps as JSON within the JSON."""
    if about.get(key) is None:
        return None
    try:
        found = json.loads(about[key])
        if isinstance(found, dict):
            return found
    except (ValueError, TypeError, RecursionError):
        pass
    raise DataError(f"{about['dataset_id']}: '{key}' in {ABOUT} is damaged: expected what Minari wrote")


def read(where: Where, task: Task | None = None, *, time_limits: TimeLimits = "keep") -> Transitions:
    """Read and check a dataset on this disk.

    Args:
        where: its folder, the `data` folder in it, or the id of a local dataset.
        task: whose `observation` says which arrays to take, in order, where observations are dicts. Where
            they are arrays already, laid end to end by whoever wrote them, nobody is asked.
        time_limits: see `Transitions.from_dict`.

    Returns:
        Transitions with actions scaled from the dataset's action space to [-1, 1]. What cpql wrote says
        itself where it came from, as in `cpql.data.npz`.

    Raises:
        DataError: there is no such dataset, it is damaged, declares more than it holds, leads to other files,
            or has actions or observations that aren't vectors of numbers.
        ConfigError: the bounds of its actions are an environment's that can't be made.
    """
    folder = _folder(where)
    about = _metadata(folder)
    path = folder / ARRAYS
    name = _name(path)
    if not path.is_file():
        raise DataError(
            f"{name}: no such file beside {ABOUT}: expected the arrays; `minari download --force "
            f"{about['dataset_id']}` fetches a dataset again"
        )
    try:
        with h5py.File(path, "r") as file:
            arrays = _Reader(file, about, task.observation if task else (), name, path.stat().st_size).read()
        with path.open("rb") as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, can't be read ({reason}): expected whole HDF5") from error
    low, high = _bounds(about, arrays["actions"].shape[1])
    environment = _environment(about)
    source, id, details = "minari", about["dataset_id"], {"environment": environment and environment[0]}
    if ORIGIN in about:
        source, id, details = origin(about[ORIGIN], f"{_name(folder / ABOUT)}:")
    return Transitions.from_dict(
        arrays,
        source=source,
        id=id,
        file=ARRAYS,
        sha256=sha256,
        details=details,
        time_limits=time_limits,
        action_low=low,
        action_high=high,
    )


class _Array(NamedTuple):
    """An array of an episode: h5py's low-level id, its path, shape and type."""

    id: Any
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _Reader:
    """Reads episodes one after another into arrays of the size that the metadata state.

    With h5py's low-level interface: a dataset may have ten thousand short episodes, and the other one takes
    longer to look at an array than to read it.
    """

    def __init__(
        self, file: h5py.File, about: Mapping[str, Any], observation: Sequence[str], name: str, size: int
    ) -> None:
        self.file, self.about, self.observation = file.id, about, observation
        self.name, self.size = name, size

    def read(self) -> dict[str, NDArray[np.float32]]:
        episodes, steps = self.about["total_episodes"], self.about["total_steps"]
        paths = self._paths()
        widths = [self._width(path) for path in paths]
        ends = [0, *itertools.accumulate(widths)]
        columns = {path: slice(*ends[k : k + 2]) for k, path in enumerate(paths)}
        states, width = ends[-1], self._width("actions")
        declared = 4 * steps * (states + width + 1)
        if declared > UNSUSPICIOUS_BYTES and declared > MOST_EXPANSION * self.size:
            raise DataError(
                f"{self.name}: {steps:,} steps declared, {declared / 2**30:,.1f} GiB, in a file of "
                f"{self.size / 2**20:,.2f} MiB: expected arrays that are written"
            )
        observations, following = np.empty((2, steps, states), np.float32)
        actions = np.empty((steps, width), np.float32)
        rewards, terminations, truncations = np.empty((3, steps), np.float32)
        flags = {"terminations": terminations, "truncations": truncations}
        cuts = self._cuts(episodes)
        start = 0
        for number in range(episodes):
            episode = f"episode_{number}"
            group = self._member(self.file, episode, episode, h5py.h5g.GroupID)
            first = self._array(group, "rewards", episode)
            length = first.shape[0] if len(first.shape) == 1 else 0
            part = slice(start, start + length)
            if not start < part.stop <= steps:
                raise DataError(
                    f"{self.name}: '{first.path}' has shape {list(first.shape)} after {start:,} steps: "
                    f"expected at least 1, and {steps:,} in all, as {ABOUT} says"
                )
            with np.errstate(over="ignore"):  # infinity is found, with its row, by from_dict
                rewards[part] = self._values(first, (length,))
                for key, column in flags.items():
                    column[part] = self._values(self._array(group, key, episode), (length,))
                actions[part] = self._values(self._array(group, "actions", episode), (length, width))
                for path, place in columns.items():
                    shape = (length + 1, place.stop - place.start)
                    table = self._values(self._array(group, path, episode), shape)
                    observations[part, place], following[part, place] = table[:-1], table[1:]
            start = part.stop
            if number in cuts:
                truncations[start - 1] = 0
        if start != steps:
            raise DataError(f"{self.name}: {start:,} steps: expected {steps:,}, as {ABOUT} says")
        if f"episode_{episodes}".encode() in self.file:
            raise DataError(f"{self.name}: an 'episode_{episodes}': expected {episodes:,}, as {ABOUT} says")
        return {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "terminals": terminations,
            "timeouts": truncations,
            "next_observations": following,
        }

    def _paths(self) -> list[str]:
        """Where in an episode its observations are, as the first one has them."""
        space = _encoded(self.about, "observation_space")
        episode = self._member(self.file, "episode_0", "episode_0", h5py.h5g.GroupID)
        found = self._member(episode, "observations", "episode_0/observations", object)
        if isinstance(found, h5py.h5d.DatasetID):
            self._check_vector(space, "observations")
            return ["observations"]
        names = [name.decode(errors="replace") for name in found]
        there = ", ".join(map(repr, names[:20])) or "nothing"
        if not self.observation:
            raise DataError(
                f"{self.name}: 'observations' is a dict of {there}: expected a task whose `observation` "
                "says which of them to take"
            )
        spaces = (space or {}).get("subspaces")
        for key in self.observation:
            if key not in names:
                raise DataError(f"{self.name}: no '{key}' in 'observations', only {there}")
            self._check_vector(spaces.get(key) if isinstance(spaces, dict) else None, f"observations/{key}")
        return [f"observations/{key}" for key in self.observation]

    def _check_vector(self, space: Any, path: str) -> None:
        # Images may be kept as JPEG, rows of bytes that look like a table: only the space tells.
        if space is None:
            return
        kind, shape = (space.get("type"), space.get("shape")) if isinstance(space, dict) else (space, None)
        if kind != "Box" or not isinstance(shape, list) or len(shape) != 1:
            found = f"{kind!r}" if shape is None else f"{kind!r} of {shape}"
            raise DataError(f"{self.name}: '{path}' is a {found}: expected a 'Box' of one axis, not an image")

    def _cuts(self, episodes: int) -> frozenset[int]:
        """The episodes that end by a cut, though Minari has to call it a truncation."""
        cuts = self.about.get(CUTS, [])
        if not isinstance(cuts, list) or not all(type(k) is int and 0 <= k < episodes for k in cuts):
            raise DataError(
                f"{self.about['dataset_id']}: '{CUTS}' in {ABOUT} is damaged: expected what cpql wrote"
            )
        return frozenset(cuts)

    def _member(self, group: Any, key: str, full: str, kind: type[Any]) -> Any:
        """What a group has under a key, and has in this file."""
        name = key.encode()
        if not group.links.exists(name):
            raise DataError(f"{self.name}: no '{full}': expected Minari's layout")
        if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            raise DataError(f"{self.name}: '{full}' is a link to elsewhere: expected it in the file")
        found = h5py.h5o.open(group, name)
        if not isinstance(found, kind):
            names = {h5py.h5g.GroupID: "a group", h5py.h5d.DatasetID: "an array"}
            raise DataError(
                f"{self.name}: '{full}' is {names.get(type(found), 'a type')}: expected {names[kind]}"
            )
        return found

    def _array(self, group: Any, path: str, episode: str) -> _Array:
        """An array of numbers that are in this file, looked at but not read."""
        full = f"{episode}/{path}"
        *parents, key = path.split("/")
        for parent in parents:
            group = self._member(group, parent, f"{episode}/{parent}", h5py.h5g.GroupID)
        id = self._member(group, key, full, h5py.h5d.DatasetID)
        shape, dtype, made = id.shape or (), id.dtype, id.get_create_plist()
        if dtype.kind not in "biuf":
            raise DataError(f"{self.name}: '{full}' holds {dtype}: expected numbers")
        if made.get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
            raise DataError(f"{self.name}: '{full}' keeps its numbers in another file: expected them here")
        declared, held = math.prod(shape) * dtype.itemsize, id.get_storage_size()
        # Compression is judged over all episodes together, by the steps and the file's size.
        if declared > held and (made.get_nfilters() == 0 or held == 0):
            raise DataError(
                f"{self.name}: '{full}' declares {declared:,} bytes and holds {held:,}: expected all of them"
            )
        return _Array(id, full, shape, dtype)

    def _values(self, array: _Array, shape: tuple[int, ...]) -> NDArray[Any]:
        """Read an array, if it has the shape that the others ask for."""
        if array.shape != shape:
            raise DataError(
                f"{self.name}: '{array.path}' has shape {list(array.shape)}: expected {list(shape)}, by the "
                "first episode's width and this one's rewards"
            )
        values = np.empty(shape, array.dtype)
        array.id.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
        return values

    def _width(self, path: str) -> int:
        """How many numbers a step has in the first episode."""
        group = self._member(self.file, "episode_0", "episode_0", h5py.h5g.GroupID)
        array = self._array(group, path, "episode_0")
        if len(array.shape) != 2 or array.shape[1] == 0:
            kind = "images or sequences" if len(array.shape) > 2 else "discrete, or scalars"
            raise DataError(
                f"{self.name}: '{array.path}' has shape {list(array.shape)}, {kind}: expected a vector a step"
            )
        return array.shape[1]


def _bounds(about: Mapping[str, Any], width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The action space's bounds [A], lower and upper; the environment's where the dataset has no space."""
    id = about["dataset_id"]
    space = _encoded(about, "action_space")
    if space is None:
        # Minari's own rule for old datasets.
        found = _environment(about)
        if found is None:
            raise DataError(
                f"{id}: neither 'action_space' nor 'env_spec' in {ABOUT}: expected actions' bounds"
            )
        environment = make_environment(found[0], **found[1])
        environment.close()
        return action_bounds(environment)
    if space.get("type") != "Box" or not str(space.get("dtype")).startswith("float"):
        kind = f"{space.get('type')!r} of {space.get('dtype', 'numbers')!r}"
        raise DataError(f"{id}: actions are a {kind}: expected a 'Box' of real numbers")
    try:
        low, high = (np.broadcast_to(np.asarray(space[key], float), (width,)) for key in ("low", "high"))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{id}: 'action_space' in {ABOUT} is damaged: expected bounds of {width} actions"
        ) from error
    if not (np.abs([low, high]) <= np.finfo(np.float32).max).all():
        raise DataError(f"{id}: actions without bounds: expected a Box with finite ones")
    return low.astype(np.float32), high.astype(np.float32)


def _environment(about: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]] | None:
    """The environment to evaluate in: its id, its options, and the names of wrappers around it.

    Minari takes references in `eval_env_spec` where there is one: AntMaze's data have many goals, its
    evaluation one.
    """
    for key in ("eval_env_spec", "env_spec"):
        spec = _encoded(about, key)
        if spec is None:
            continue
        id, options, steps = spec.get("id"), spec.get("kwargs") or {}, spec.get("max_episode_steps")
        wrappers = spec.get("additional_wrappers")
        wrappers = wrappers if isinstance(wrappers, list) else []
        # Gymnasium imports the module that an id names before a colon.
        if not isinstance(id, str) or not id or ":" in id or not isinstance(options, dict):
            raise DataError(
                f"{about['dataset_id']}: '{key}' in {ABOUT} names {id!r}: expected a Gymnasium id"
            )
        # How the collector looked at it is nothing that evaluation should repeat.
        options = {name: value for name, value in options.items() if name != "render_mode"}
        _check_options(about, key, options)
        if isinstance(steps, int):
            options["max_episode_steps"] = steps
        names = (str(wrapper.get("name")) for wrapper in wrappers if isinstance(wrapper, dict))
        return id, options, [name for name in names if name.isidentifier()]  # as a class's name is
    return None


def _check_options(about: Mapping[str, Any], key: str, options: Mapping[str, Any]) -> None:
    """Refuse options of an environment that a file mustn't have."""
    try:
        check_options("options", options)
    except ConfigError as error:
        raise DataError(f"{about['dataset_id']}: '{key}' in {ABOUT}: {error}") from None


def references(where: Where) -> tuple[float, float] | None:
    """Give the returns that score 0 and 100 by Minari's own rule, or None: then there is no score.

    Only `D4RL/*` datasets have references, and they are Minari's, of its versions of the environments.

    Args:
        where: the dataset's folder, the `data` folder in it, or the id of a local dataset.

    Raises:
        DataError: there is no such dataset, or its references are damaged.
    """
    return _references(metadata(where))


def _references(about: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    if low is None or high is None:
        return None
    for value in (low, high):
        if type(value) not in (int, float) or not -sys.float_info.max <= value <= sys.float_info.max:
            raise DataError(
                f"{about['dataset_id']}: a reference score of {value!r}: expected a finite number"
            )
    if not low < high:
        raise DataError(f"{about['dataset_id']}: reference scores {low} and {high}: expected the lower first")
    return float(low), float(high)


def task(task: Task | None, where: Where) -> Task:
    """Give the task that a dataset is for: its environment, its options, its references.

    Args:
        task: what the user named, for its name and what isn't the dataset's to say; None where the dataset
            is all there is.
        where: the dataset's folder, the `data` folder in it, or the id of a local dataset.

    Returns:
        A task that evaluates as Minari does. Its references are Minari's or none, never D4RL's. Its options
        of `reset`, which Minari has no place for, are those that `write` was given.

    Raises:
        DataError: there is no such dataset, or neither it nor a task says which environment it is from.
    """
    about = metadata(where)
    id = about["dataset_id"]
    found, scale = _environment(about), _references(about)
    notes = [
        f"data and references are the Minari dataset {id}'s: its scores are never comparable with D4RL's"
        if scale
        else f"the Minari dataset {id} has no references: returns only, never comparable with D4RL's"
    ]
    if found is not None:
        environment, options, wrappers = found
        # Actions that were rescaled are what the dataset's action space says.
        wrappers = [name for name in wrappers if name != "RescaleAction"]
        if wrappers:
            notes.append(f"collected through {', '.join(wrappers)}, which evaluation goes without")
        base = task or Task(name=id, id=environment)
        base = dataclasses.replace(base, id=environment, env_options=options, **_how(about, base.observation))
    elif task is not None:
        notes.append(f"it doesn't say which environment it is from: {task.id} is the task's")
        base = task
    else:
        raise DataError(f"{id}: no 'env_spec' in {ABOUT}: expected a task that names the environment")
    low, high = scale or (None, None)
    return dataclasses.replace(
        base,
        datasets={"minari": {"id": id}},
        random_return=low,
        expert_return=high,
        note="; ".join(notes),
        benchmark="Minari",
    )


def _how(about: Mapping[str, Any], observation: tuple[str, ...]) -> dict[str, Any]:
    """The parts of observations and the options of `reset` that `write` was given."""
    how = _encoded(about, HOW) or {}
    parts, reset = how.get("observation", observation), how.get("reset_options", {})
    texts = isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts)
    if not (texts and isinstance(reset, dict)):
        raise DataError(f"{about['dataset_id']}: '{HOW}' in {ABOUT} is damaged: expected what cpql wrote")
    _check_options(about, HOW, reset)
    return {"observation": tuple(parts), "reset_options": reset}


def write(transitions: Transitions, path: Where, *, id: str, task: Task | None = None) -> Path:
    """Write transitions as a Minari dataset, whole or not at all.

    Every episode of Minari's must end terminated or truncated, and step t + 1 must start where step t led.
    So a row that doesn't lead to the next one ends its episode, and an episode that was cut, there or at the
    end of the data, is called truncated; `metadata.json` lists those, and `read` takes them for cuts again:
    what it reads is what was written, to the bit.

    Args:
        transitions: what to write. Actions are in [-1, 1], and the action space says so.
        path: the root to write into, such as `root()`; the dataset becomes `path/ID/data`.
        id: the dataset's id, `mine/hopper/mixed-v0`.
        task: whose environment, with its options, is named for `recover_environment`. Where its actions have
            other bounds than [-1, 1] it is described with `RescaleAction` around it.

    Returns:
        The dataset's folder, `path/ID`.

    Raises:
        ConfigError: there is no such environment.
        DataError: `id` isn't a Minari id, there is such a dataset already, the environment has other actions,
            or it can't be written.
    """
    folder = Path(path) / _checked(id)
    if folder.exists():
        raise DataError(f"{id}: there is one in {path} already: expected a new id, or that one removed")
    arrays = transitions.to_dict()
    observations, following = arrays["observations"], arrays["next_observations"]
    ended = arrays["terminals"] | arrays["timeouts"]
    last = ended | transitions.ends.cpu().numpy()
    # To the bit: one array holds both, and -0.0 isn't 0.0 to a round trip.
    last[:-1] |= (following[:-1].view(np.uint32) != observations[1:].view(np.uint32)).any(1)
    last[-1] = True
    stops = np.flatnonzero(last) + 1
    about: dict[str, Any] = {
        "total_episodes": len(stops),
        "total_steps": len(last),
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": _box(observations.shape[1], math.inf),
        "action_space": _box(arrays["actions"].shape[1], 1.0),
        "dataset_id": id,
        "minari_version": LAYOUT_VERSION,
        "description": transitions.provenance.line(),
        CUTS: np.flatnonzero(~ended[stops - 1]).tolist(),
    }
    if task is not None and task.id is not None:
        about["env_spec"] = _spec(task.id, task.env_options, arrays["actions"].shape[1])
        about[HOW] = json.dumps({"observation": task.observation, "reset_options": task.reset_options})
    text = origin_of(transitions.provenance)
    if text is not None:
        about[ORIGIN] = text
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        data = aside / "data"
        data.mkdir(parents=True)
        with h5py.File(data / ARRAYS, "w") as file:
            for number, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
                _write_episode(file.create_group(f"episode_{number}"), number, arrays, int(start), int(stop))
        about["dataset_size"] = round((data / ARRAYS).stat().st_size / 1e6, 1)
        (data / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        os.rename(aside, folder)
    except OSError as error:
        raise DataError(f"{id}: can't be written in {Path(path).absolute()} ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write_episode(
    group: h5py.Group, number: int, arrays: Mapping[str, NDArray[Any]], start: int, stop: int
) -> None:
    part = slice(start, stop)
    group.attrs["id"] = number
    group.attrs["total_steps"] = stop - start
    group["observations"] = np.concatenate(
        [arrays["observations"][part], arrays["next_observations"][stop - 1 : stop]]
    )
    group["actions"] = arrays["actions"][part]
    group["rewards"] = arrays["rewards"][part]
    group["terminations"] = arrays["terminals"][part]
    truncations = arrays["timeouts"][part].copy()
    truncations[-1] |= not arrays["terminals"][stop - 1]
    group["truncations"] = truncations
    group.create_group("infos")  # Minari's episodes can't be printed without


def _box(width: int, bound: float) -> str:
    """A space as Minari writes it."""
    space = {
        "type": "Box",
        "dtype": "float32",
        "shape": [width],
        "low": [-bound] * width,
        "high": [bound] * width,
    }
    return json.dumps(space)


def _spec(environment: str, options: Mapping[str, Any], width: int) -> str:
    """An environment as Minari writes it, taking actions in [-1, 1]."""
    made = make_environment(environment, **options)
    try:
        actions = made.action_space
        if not isinstance(actions, gymnasium.spaces.Box) or actions.shape != (width,):
            raise DataError(f"{environment}: its actions are {actions}: expected a Box of {width}")
        if not ((actions.low == -1) & (actions.high == 1)).all():
            made = gymnasium.wrappers.RescaleAction(made, -1, 1)  # type: ignore[arg-type]
        assert made.spec is not None
        return made.spec.to_json()
    finally:
        made.close()
