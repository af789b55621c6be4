"""Reading and writing a dataset in one of three forms: D4RL's HDF5, NPZ with D4RL's keys, a Minari folder.

HDF5 and NPZ files keep actions in the environment's bounds, which the caller gives; a Minari folder names its
own. `cpql.data.d4rl` and `cpql.data.minari` describe their forms. An NPZ file is what `numpy.savez` writes,
with observations [N, S], actions [N, A], rewards [N], terminals [N] and, where known, timeouts [N] and
next_observations [N, S]. Arrays of Python objects are pickles and are never read.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
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

__all__ = [
    "ENDINGS",
    "File",
    "Form",
    "form",
    "left_out",
    "npz",
    "read",
    "without_foreign_references",
    "write",
]

Form = Literal["hdf5", "npz", "minari"]

ENDINGS: dict[str, Form] = {".hdf5": "hdf5", ".h5": "hdf5", ".npz": "npz"}
"""The form of a file by its ending."""

Where = str | os.PathLike[str]

# Further keys of D4RL's own files, which aren't transitions.
IGNORED = ("infos/", "metadata/")


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
    """The form of a dataset: a folder is Minari's; a file's form follows from its ending, or its content."""
    path = Path(path)
    if path.is_dir():
        return "minari"
    by_content: Form = "npz" if path.is_file() and zipfile.is_zipfile(path) else "hdf5"
    return ENDINGS.get(path.suffix.lower(), by_content)


def read(
    path: Where, id: str | None = None, *, task: Task | None = None, **reading: Unpack[Reading]
) -> Transitions:
    """Read and check a dataset of any form: a file, or a Minari dataset's folder.

    Args:
        path: of the dataset.
        id: for the provenance, by default the file's name without its ending. A Minari folder, or a file that
            cpql collected or converted, names its own.
        task: its `observation` selects the arrays where a Minari dataset's observations are dicts.
        **reading: see `Reading`; for a Minari folder only `time_limits` is used.

    Raises:
        DataError: there is no such dataset, it is damaged, or doesn't hold valid transitions.
    """
    path = Path(path)
    kind = form(path)
    if kind == "minari":
        return minari.read(path, task, time_limits=reading.get("time_limits", "keep"))
    if kind == "hdf5":
        return d4rl.read(path, id or path.stem, **reading)
    arrays = npz(path, "D4RL's", (*d4rl.KEYS, d4rl.ORIGIN))
    origin = d4rl.Origin("file", path.stem if id is None else id, {})
    if d4rl.ORIGIN in arrays:
        origin = d4rl.origin(str(arrays.pop(d4rl.ORIGIN)), f"{path.name}:")
    return Transitions.from_dict(
        arrays, **origin._asdict(), file=path.name, sha256=sha256_of(path), **reading
    )


def npz(path: Path, whose: str, known: Sequence[str]) -> dict[str, Any]:
    """The arrays of an NPZ file that has only known keys, and doesn't declare more than it can hold.

    Args:
        path: of the file.
        whose: layout it is, for errors: "D4RL's".
        known: keys that it may have.

    Raises:
        DataError: it isn't such a file, or is damaged.
    """
    name, key = path.name, "the archive"
    d4rl.check_file(path, f"NPZ with {whose} keys")
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{name}: not NPZ, or cut off: expected what numpy.savez writes, whole")
        with np.load(path, allow_pickle=False) as archive:
            keys = [key for key in archive.files if not key.startswith(IGNORED)]
            for key in keys:
                if key not in known:
                    raise DataError(f"{name}: {key!r} is none of {whose} keys: {did_you_mean(key, known)}")
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
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise errors of every kind on damaged bytes
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
    """Write a dataset, whole or not at all, and return its file or folder.

    `read` gives back the same transitions, bit for bit; only actions may differ by rounding, where their
    bounds aren't -1 and 1. The origin of data from cpql or Minari is written in every form.

    Args:
        transitions: what to write.
        path: a file with one of `ENDINGS`; any other path is the folder to put a Minari dataset into.
        id: Minari's id of the new dataset.
        task: its environment is named in a Minari dataset.
        action_low: lower bounds of actions in HDF5 and NPZ files: the environment's, [A] or one for all.
        action_high: their upper bounds.
        replace: whether an existing dataset may be replaced.

    Raises:
        ConfigError: there is no such environment.
        DataError: there is one already that may not be replaced, or it can't be written.
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
        # A stream: to a name numpy would add an ending.
        with aside(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{k: np.array(v) for k, v in attributes.items()})
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error
    return path


def left_out(path: Where, data: Transitions, task: Task | None = None) -> list[str]:
    """A clause for each kind of content of a dataset that isn't in its transitions, `data`."""
    path = Path(path)
    kind = form(path)
    if kind == "minari":
        return _left_out_of_minari(path, task)
    if kind == "npz":
        with np.load(path, allow_pickle=False) as archive:
            return _left_out_of_arrays(archive, len(data))
    with h5py.File(path, "r") as file:
        return _left_out_of_arrays(file, len(data))


def _left_out_of_arrays(arrays: Mapping[str, Any], read: int) -> list[str]:
    others = sorted({name.partition("/")[0] for name in set(arrays) - {*d4rl.KEYS, d4rl.ORIGIN}})
    tables = [key for key in ("observations", "actions", "rewards", "next_observations") if key in arrays]
    wide = [key for key in tables if not np.can_cast(arrays[key].dtype, np.float32)]
    rows = len(arrays["terminals"])
    clauses = [f"{', '.join(others)}: all of it"] if others else []
    if wide:
        clauses.append(f"{', '.join(wide)}: digits beyond float32's")
    if read < rows:
        clauses.append(f"rows: {rows - read:,} of {rows:,}, which have no next observation")
    return clauses + (
        _both_flags([(arrays["terminals"], arrays["timeouts"])]) if "timeouts" in arrays else []
    )


def _left_out_of_minari(path: Path, task: Task | None) -> list[str]:
    folder = path if (path / minari.ARRAYS).is_file() else path / "data"
    with h5py.File(folder / minari.ARRAYS, "r") as file:
        first = file["episode_0"]
        others = ["infos"] if len(first.get("infos", ())) else []
        if isinstance(first["observations"], h5py.Group):
            keys = task.observation if task else ()
            others += [f"observations/{key}" for key in first["observations"] if key not in keys]
        episodes = [file[name] for name in file if name.startswith("episode_")]
        flags = [(episode["terminations"], episode["truncations"]) for episode in episodes]
        return [*([f"{', '.join(others)}: all of it"] if others else []), *_both_flags(flags)]


def _both_flags(pairs: Iterable[tuple[Any, Any]]) -> list[str]:
    """A clause for the rows that are both terminal and at a time limit."""
    rows = sum(int(((one[:].ravel() != 0) & (other[:].ravel() != 0)).sum()) for one, other in pairs)
    return [f"terminals at a time limit: {rows:,}, where the time limit wins"] if rows else []


def without_foreign_references(task: Task, data: Transitions) -> Task:
    """A task without D4RL's references if its data are Minari's, from a file: it would mix two benchmarks."""
    if data.provenance.source != "minari" or task.benchmark == "Minari" or task.random_return is None:
        return task
    id = data.provenance.id
    note = f"the data are Minari's {id}, from a file: returns only, never comparable with D4RL's"
    return dataclasses.replace(task, random_return=None, expert_return=None, benchmark="Minari", note=note)
