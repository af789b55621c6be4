"""A dataset at a path, whichever of three forms it has: D4RL's HDF5, NPZ with D4RL's keys, a Minari folder.

HDF5 and NPZ keep actions in the environment's bounds and don't say what those are: the caller does. Minari's
folders say it themselves. `cpql.data.d4rl` and `cpql.data.minari` describe their forms. NPZ is what
`numpy.savez` makes of observations [N, S], actions [N, A], rewards [N], terminals [N] and, where known,
timeouts [N] and next_observations [N, S]; arrays of Python objects are pickles and are never read.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import ArrayLike

from cpql.data import d4rl, minari
from cpql.data.request import Request, Source
from cpql.data.transitions import Reading, Transitions
from cpql.errors import DataError, did_you_mean
from cpql.io import aside, sha256_of
from cpql.tasks import Task

__all__ = ["ENDINGS", "File", "Form", "form", "left_out", "read", "without_foreign_references", "write"]

Form = Literal["hdf5", "npz", "minari"]

ENDINGS: dict[str, Form] = {".hdf5": "hdf5", ".h5": "hdf5", ".npz": "npz"}
"""The form that a file's ending stands for."""

Where = str | os.PathLike[str]

# D4RL's own files carry these besides; they say nothing about the transitions.
IGNORED = ("infos/", "metadata/")
# What zipfile, and numpy's parser of headers, raise on damaged bytes.
DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    MemoryError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class File(Source):
    """The user's own file or folder, `Request.path`."""

    description = "your own"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        return request.path

    def fetch(self, request: Request) -> Path:
        """See `Source`."""
        raise DataError("dataset=file: expected dataset.path to name a file or a Minari dataset's folder")

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`."""
        return read(path, request.id or request.task.name, task=request.task, **request.reading)

    def task(self, path: Path, request: Request) -> Task:
        """See `Source`."""
        return minari.task(request.task, path) if path.is_dir() else request.task


def form(path: Where) -> Form:
    """Say which form a path has: a folder is Minari's; a file's ending tells, or else what is in it."""
    path = Path(path)
    if path.is_dir():
        return "minari"
    named = ENDINGS.get(path.suffix.lower())
    if named is None:
        return "npz" if path.is_file() and zipfile.is_zipfile(path) else "hdf5"
    return named


def read(
    path: Where, id: str | None = None, *, task: Task | None = None, **reading: Unpack[Reading]
) -> Transitions:
    """Read and check a dataset of any form.

    Args:
        path: a file, or a Minari dataset's folder.
        id: the dataset's id, for the provenance; the file's name without its ending by default. Minari's
            folders, and files that cpql collected or converted, say it themselves.
        task: whose `observation` says which arrays to take where Minari's observations are dicts.
        **reading: see `Reading`; of a Minari folder, which says the rest itself, `time_limits` alone counts.

    Raises:
        DataError: there is no such dataset, it is damaged, or doesn't hold valid transitions.
    """
    path = Path(path)
    kind = form(path)
    if kind == "minari":
        return minari.read(path, task, time_limits=reading.get("time_limits", "keep"))
    if kind == "hdf5":
        return d4rl.read(path, id or path.stem, **reading)
    arrays = _npz(path)
    origin = d4rl.Origin("file", path.stem if id is None else id, {})
    if d4rl.ORIGIN in arrays:
        origin = d4rl.origin(str(arrays.pop(d4rl.ORIGIN)), f"{path.name}:")
    return Transitions.from_dict(
        arrays, **origin._asdict(), file=path.name, sha256=sha256_of(path), **reading
    )


def _npz(path: Path) -> dict[str, Any]:
    """The arrays of an NPZ file that has no keys but D4RL's.

    Raises:
        DataError: the file is missing, damaged, isn't NPZ, has other keys, or declares more than it holds.
    """
    name, key = path.name, "the archive"
    if not path.is_file():
        found = "not a file" if path.exists() else f"no such file in {path.absolute().parent}"
        raise DataError(f"{name}: {found}: expected NPZ with D4RL's keys")
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{name}: not NPZ, or cut off: expected what numpy.savez writes, whole")
        with np.load(path, allow_pickle=False) as archive:
            keys = [key for key in archive.files if not key.startswith(IGNORED)]
            for key in keys:
                if key not in (*d4rl.KEYS, d4rl.ORIGIN):
                    raise DataError(f"{name}: {key!r} is none of D4RL's keys: {did_you_mean(key, d4rl.KEYS)}")
                if keys.count(key) > 1:
                    raise DataError(f"{name}: '{key}' is there {keys.count(key)} times: expected it once")
            declared = sum(archive.zip.getinfo(f"{key}.npy").file_size for key in keys)
            size = path.stat().st_size
            if d4rl.is_bomb(declared, size):
                raise DataError(
                    f"{name}: declares {declared / 2**20:,.0f} MiB in {size / 2**20:,.2f} MiB compressed: "
                    f"expected at most {d4rl.MOST_EXPANSION} times as much"
                )
            arrays = {}
            for key in keys:
                arrays[key] = archive[key]
        return arrays
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, '{key}' can't be read ({reason}): expected whole NPZ") from error


def write(
    transitions: Transitions,
    path: Where,
    *,
    id: str = "",
    task: Task | None = None,
    action_low: ArrayLike = -1.0,
    action_high: ArrayLike = 1.0,
    replace: bool = False,
) -> Path:
    """Write a dataset, whole or not at all.

    What `read` gives back is what was written, to the bit; where the actions' bounds aren't -1 and 1, actions
    are scaled there and back and may differ by rounding. Data that are cpql's own or Minari's say so in
    whatever form they are written.

    Args:
        transitions: what to write.
        path: the file, whose ending says its form (`ENDINGS`); with any other, or none, the folder that a
            Minari dataset is put into, as `path/ID`.
        id: Minari's id of the new dataset.
        task: whose environment a Minari dataset is to name.
        action_low: the bounds to put actions into, for HDF5 and NPZ: the environment's, [A] or one for all.
        action_high: the upper ones.
        replace: whether an existing dataset may be replaced.

    Returns:
        The file, or the dataset's folder.

    Raises:
        ConfigError: there is no such environment.
        DataError: something is there and may not be replaced, or it can't be written.
    """
    path = Path(path)
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        return minari.write(transitions, path, id=id, task=task, replace=replace)
    if path.is_dir() or (os.path.lexists(path) and not replace):
        raise DataError(f"{path.name}: there is one in {path.absolute().parent} already: expected a new name")
    arrays = transitions.to_dict()
    low, high = np.asarray(action_low), np.asarray(action_high)
    if (low != -1).any() or (high != 1).any():  # in [-1, 1] no bit changes
        scaled = low + (arrays["actions"].astype(np.float64) + 1) / 2 * (high - low)
        arrays["actions"] = np.clip(scaled, low, high).astype(np.float32)
    origin = d4rl.origin_of(transitions.provenance)
    attributes = {} if origin is None else {d4rl.ORIGIN: origin}
    if kind == "hdf5":
        d4rl.write(path, arrays, attributes)
        return path
    try:
        # A stream rather than a name, to which numpy would add an ending.
        with aside(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{k: np.array(v) for k, v in attributes.items()})
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error
    return path


def left_out(path: Where, data: Transitions, task: Task | None = None) -> list[str]:
    """Say what a dataset holds that its transitions don't.

    Args:
        path: as for `read`, which has accepted it.
        data: what `read` gave.
        task: as for `read`.

    Returns:
        A clause for each thing that no reader here takes over; none where there is nothing.
    """
    path = Path(path)
    kind = form(path)
    if kind == "minari":
        return _left_out_of_minari(path, task)
    if kind == "npz":
        with np.load(path, allow_pickle=False) as archive:
            return _left_out_of_arrays(archive, archive.files, len(data))
    with d4rl.opened(path) as (arrays, _):
        return _left_out_of_arrays(arrays, next(iter(arrays.values())).file, len(data))


def _left_out_of_arrays(arrays: Mapping[str, Any], names: Iterable[str], taken: int) -> list[str]:
    there = set(names)
    others = sorted({name.partition("/")[0] for name in there - {*d4rl.KEYS, d4rl.ORIGIN}})
    wide = []
    for key in ("observations", "actions", "rewards", "next_observations"):
        if key in there and not np.can_cast(arrays[key].dtype, np.float32):
            wide.append(key)
    rows = len(arrays["terminals"])
    clauses = [f"{', '.join(others)}: all of it"] if others else []
    if wide:
        clauses.append(f"{', '.join(wide)}: digits beyond float32's")
    if taken < rows:
        clauses.append(f"rows: {rows - taken:,} of {rows:,}, which have no next observation")
    return clauses + (_both_flags([(arrays["terminals"], arrays["timeouts"])]) if "timeouts" in there else [])


def _left_out_of_minari(path: Path, task: Task | None) -> list[str]:
    folder = path if (path / minari.ARRAYS).is_file() else path / "data"
    with h5py.File(folder / minari.ARRAYS, "r") as file:
        first = file["episode_0"]
        others = ["infos"] if len(first.get("infos", ())) else []
        if isinstance(first["observations"], h5py.Group):
            taken = task.observation if task else ()
            others += [f"observations/{key}" for key in first["observations"] if key not in taken]
        episodes = [file[name] for name in file if name.startswith("episode_")]
        flags = [(episode["terminations"], episode["truncations"]) for episode in episodes]
        return [*([f"{', '.join(others)}: all of it"] if others else []), *_both_flags(flags)]


def _both_flags(pairs: Iterable[tuple[Any, Any]]) -> list[str]:
    """A clause for the rows where the task ended and the clock ran out at once."""
    rows = sum(int(((one[:].ravel() != 0) & (other[:].ravel() != 0)).sum()) for one, other in pairs)
    return [f"terminals at a time limit: {rows:,}, where the time limit wins"] if rows else []


def without_foreign_references(task: Task, data: Transitions) -> Task:
    """Take D4RL's references from a task whose data came from Minari by way of a file.

    Minari's own references stay in its folders; scores by D4RL's would mix two benchmarks.
    """
    if data.provenance.source != "minari" or task.benchmark == "Minari" or task.random_return is None:
        return task
    note = (
        f"the data are Minari's {data.provenance.id}, from a file: returns only, never comparable with D4RL's"
    )
    return dataclasses.replace(task, random_return=None, expert_return=None, benchmark="Minari", note=note)
