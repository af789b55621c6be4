"""A user's own dataset in one of three forms: D4RL's HDF5, NPZ with D4RL's keys, a Minari folder.

HDF5 and NPZ files keep actions in the environment's bounds, which the caller gives; a Minari folder names its
own. `cpql.data.d4rl` and `cpql.data.minari` describe their forms. NPZ files in OGBench's layout
are read too.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Unpack

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import ArrayLike

from cpql.data import d4rl, minari, ogbench
from cpql.data.d4rl import ENDINGS, form
from cpql.data.request import Request, Source
from cpql.data.transitions import Reading, Transitions
from cpql.errors import DataError
from cpql.tasks import Task

__all__ = ["ENDINGS", "File", "form", "left_out", "read", "without_foreign_references", "write"]

Where = str | os.PathLike[str]


class File(Source):
    """The user's own file or folder, `Request.path`."""

    description = "your own"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        return Path(request.path) if request.path else None

    def fetch(self, request: Request) -> Path:
        """See `Source`."""
        raise DataError("dataset=file: expected dataset.path to name a file or a Minari dataset's folder")

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`."""
        return read(path, request.id or request.task.name, task=request.task, **request.reading)

    def task(self, path: Path, request: Request) -> Task:
        """See `Source`."""
        return minari.task(request.task, path) if path.is_dir() else request.task


def read(
    path: Where, id: str | None = None, *, task: Task | None = None, **reading: Unpack[Reading]
) -> Transitions:
    """Read and check a dataset of any form: a file, or a Minari dataset's folder.

    Args:
        path: of the dataset.
        id: for the provenance, by default the file's name without its ending. A Minari folder, or a file that
            cpql collected or converted, names its own.
        task: its `observation` selects the arrays where a Minari dataset's observations are dicts; the
            rewards of a file in OGBench's layout are of this task.
        **reading: see `Reading`; for a Minari folder only `time_limits` is used.

    Raises:
        DataError: there is no such dataset, it is damaged, or doesn't hold valid transitions.
    """
    path = Path(path)
    if path.is_dir():
        return minari.read(path, task, time_limits=reading.get("time_limits", "keep"))
    if ogbench.fits(path):
        return ogbench.read(path, task, id or path.stem, **reading)
    return d4rl.read(path, id or path.stem, **reading)


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
    if path.suffix.lower() not in ENDINGS:
        return minari.write(transitions, path, id=id, task=task, replace=replace)
    if path.is_dir() or (os.path.lexists(path) and not replace):
        raise DataError(f"{path.name}: there is one in {path.absolute().parent} already: expected a new name")
    arrays = transitions.to_dict()
    low, high = np.asarray(action_low), np.asarray(action_high)
    if (low != -1).any() or (high != 1).any():  # in [-1, 1] no bit changes
        scaled = low + (arrays["actions"].astype(np.float64) + 1) / 2 * (high - low)
        arrays["actions"] = np.clip(scaled, low, high).astype(np.float32)
    d4rl.write(path, arrays, d4rl.origin_of(transitions.provenance))
    return path


def left_out(path: Where, data: Transitions, task: Task | None = None) -> list[str]:
    """A clause for each kind of content of a dataset that isn't in its transitions, `data`."""
    path, kind, clauses = Path(path), form(path), []
    if kind == "minari":
        path = minari.data_folder(path) / minari.ARRAYS
    with np.load(path, allow_pickle=False) if kind == "npz" else h5py.File(path, "r") as content:
        if kind == "minari":
            first, keys = content["episode_0"], task.observation if task else ()
            others = ["infos"] if len(first.get("infos", ())) else []
            if isinstance(first["observations"], h5py.Group):
                others += [f"observations/{key}" for key in first["observations"] if key not in keys]
            flags = [(each["terminations"], each["truncations"]) for each in content.values()]
        else:
            others = sorted({key.partition("/")[0] for key in content} - {*d4rl.KEYS, d4rl.ORIGIN})
            tables = [k for k in d4rl.KEYS if k in content and k not in ("terminals", "timeouts")]
            wide = [key for key in tables if not np.can_cast(content[key].dtype, np.float32)]
            if wide:
                clauses.append(f"{', '.join(wide)}: digits beyond float32's")
            if missing := len(content["terminals"]) - len(data):
                rows = len(content["terminals"])
                clauses.append(f"rows: {missing:,} of {rows:,}, which have no next observation")
            flags = [(content["terminals"], content["timeouts"])] if "timeouts" in content else []
        both = sum(
            int(np.count_nonzero((one[:].ravel() != 0) & (other[:].ravel() != 0))) for one, other in flags
        )
    if both:
        clauses.append(f"terminals at a time limit: {both:,}, where the time limit wins")
    return [f"{', '.join(others)}: all of it", *clauses] if others else clauses


def without_foreign_references(task: Task, data: Transitions) -> Task:
    """A task without D4RL's references if its data are Minari's, from a file: it would mix two benchmarks."""
    if data.provenance.source != "minari" or task.benchmark == "Minari" or task.random_return is None:
        return task
    id = data.provenance.id
    note = f"the data are Minari's {id}, from a file: returns only, never comparable with D4RL's"
    return dataclasses.replace(task, random_return=None, expert_return=None, benchmark="Minari", note=note)
