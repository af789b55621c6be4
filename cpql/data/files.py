"""A dataset at a path, whichever of three forms it has: D4RL's HDF5, NPZ with D4RL's keys, a Minari folder.

HDF5 and NPZ keep actions in the environment's bounds and don't say what those are: whoever reads or writes
them does. Minari's folders say it themselves. `cpql.data.d4rl`, `npz` and `minari` describe the forms.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import ArrayLike

from cpql.data import d4rl, minari, npz
from cpql.data.request import Request, Source
from cpql.data.transitions import Reading, Transitions
from cpql.errors import DataError
from cpql.tasks import Task

__all__ = ["ENDINGS", "File", "Form", "form", "left_out", "read", "without_foreign_references", "write"]

Form = Literal["hdf5", "npz", "minari"]

ENDINGS: dict[str, Form] = {".hdf5": "hdf5", ".h5": "hdf5", ".npz": "npz"}
"""The form that a file's ending stands for."""

Where = str | os.PathLike[str]


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
    path: Where,
    id: str | None = None,
    *,
    task: Task | None = None,
    **reading: Unpack[Reading],
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
    id = id or path.stem
    if kind == "npz":
        return npz.read(path, id, **reading)
    return d4rl.read(path, id, **reading)


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
        replace: whether what is there may be replaced.

    Returns:
        The file, or the dataset's folder.

    Raises:
        ConfigError: there is no such environment.
        DataError: something is there and may not be replaced, or it can't be written.
    """
    path = Path(path)
    kind = ENDINGS.get(path.suffix.lower())
    if kind is None:
        return _write_minari(transitions, path, id, task, replace)
    if path.is_dir() or (os.path.lexists(path) and not replace):
        raise DataError(f"{path.name}: there is one in {path.absolute().parent} already: expected a new name")
    transitions = _in_bounds(transitions, np.asarray(action_low), np.asarray(action_high))
    if kind == "npz":
        return npz.write(transitions, path)
    origin = d4rl.origin_of(transitions.provenance)
    d4rl.write(path, transitions.to_dict(), {} if origin is None else {d4rl.ORIGIN: origin})
    return path


def _in_bounds(transitions: Transitions, low: Any, high: Any) -> Transitions:
    """The same, actions where a file has them. Where that is [-1, 1] they aren't touched: no bit changes."""
    if (low == -1).all() and (high == 1).all():
        return transitions
    table = transitions.table.clone()
    actions = table[:, transitions.state_dim : transitions.state_dim + transitions.action_dim]
    scaled = low + (actions.numpy().astype(np.float64) + 1) / 2 * (high - low)
    actions.numpy()[:] = np.clip(scaled, low, high)
    return dataclasses.replace(transitions, table=table)


def _write_minari(transitions: Transitions, path: Path, id: str, task: Task | None, replace: bool) -> Path:
    folder = path / id
    if not (id and replace and folder.exists()):
        return minari.write(transitions, path, id=id, task=task)
    # Whatever else lies there isn't ours to remove.
    minari.metadata(folder)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        made = minari.write(transitions, aside / "new", id=id, task=task)
        os.rename(folder, aside / "old")
        try:
            os.rename(made, folder)
        except OSError:
            os.rename(aside / "old", folder)
            raise
    except OSError as error:
        raise DataError(f"{id}: can't be written in {path.absolute()} ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


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
    clauses = [f"{', '.join(others)}: all of it"] if others else []
    wide = []
    for key in ("observations", "actions", "rewards", "next_observations"):
        if key in there and not np.can_cast(arrays[key].dtype, np.float32):
            wide.append(key)
    if wide:
        clauses.append(f"{', '.join(wide)}: digits beyond float32's")
    rows = len(arrays["terminals"])
    if taken < rows:
        clauses.append(f"rows: {rows - taken:,} of {rows:,}, which have no next observation")
    if "timeouts" in there:
        clauses += _both_flags(int((_flags(arrays["terminals"]) & _flags(arrays["timeouts"])).sum()))
    return clauses


def _left_out_of_minari(path: Path, task: Task | None) -> list[str]:
    folder = path if (path / minari.ARRAYS).is_file() else path / "data"
    both = 0
    with h5py.File(folder / minari.ARRAYS, "r") as file:
        for name in file:
            if name.startswith("episode_"):
                episode = file[name]
                both += int((_flags(episode["terminations"]) & _flags(episode["truncations"])).sum())
        first = file["episode_0"]
        others = ["infos"] if len(first.get("infos", ())) else []
        if isinstance(first["observations"], h5py.Group):
            taken = task.observation if task else ()
            others += [f"observations/{key}" for key in first["observations"] if key not in taken]
    return [*([f"{', '.join(others)}: all of it"] if others else []), *_both_flags(both)]


def _flags(array: Any) -> Any:
    return np.asarray(array[:]).reshape(-1) != 0


def _both_flags(rows: int) -> list[str]:
    if not rows:
        return []
    return [f"terminals at a time limit: {rows:,}, where the time limit wins"]


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
