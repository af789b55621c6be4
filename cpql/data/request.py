"""The interface of the sources of datasets."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cpql.data.transitions import Reading, TimeLimits, Transitions
from cpql.environments import EnvironmentSpec, spec_of
from cpql.errors import DataError
from cpql.io import Progress
from cpql.tasks import Task

__all__ = ["AnotherDatasetError", "Request", "Source"]


class AnotherDatasetError(DataError):
    """A dataset that is valid, but not the requested one."""


@dataclass(frozen=True)
class Request:
    """A requested dataset.

    Attributes:
        task: the task whose dataset it is.
        id: the id of another dataset than the task's own; None for the task's own.
        path: a file in D4RL's layout, HDF5 or NPZ, or the folder of a Minari dataset; for the source `file`.
        size: number of transitions to collect, for sources that collect.
        seed: of the collection.
        time_limits: see `cpql.data.transitions.Reading`.
        progress: called during a download or a collection.
        say: takes a line for the user.
    """

    task: Task
    id: str | None = None
    path: str | os.PathLike[str] | None = None
    size: int = 1_000_000
    seed: int = 0
    time_limits: TimeLimits = "keep"
    progress: Progress | None = None
    say: Callable[[str], None] = print

    def about(self, source: str) -> dict[str, Any]:
        """The dataset at a source: the task's entry, or only `id`, or nothing; see `Task.datasets`."""
        entry = self.task.datasets.get(source, {})
        return entry if self.id in (None, entry.get("id")) else {"id": self.id}

    @functools.cached_property
    def spec(self) -> EnvironmentSpec | None:
        """The widths, bounds and time limit of the task's environment; None for a task without one."""
        return None if self.task.id is None else spec_of(self.task)

    @property
    def reading(self) -> Reading:
        """How the source's arrays are to be read."""
        reading: Reading = {"time_limits": self.time_limits}
        if self.spec is not None:
            _, reading["action_low"], reading["action_high"], reading["episode_limit"] = self.spec
        return reading


class Source(Protocol):
    """A family of datasets: where they are kept, how to get them and how to read them.

    A new one is a class in a module of its own and a row in `cpql.data.sources.SOURCES`. The command line
    imports that module for `--help`, so it imports large packages inside functions. Every method raises a
    DataError that says why, and what can be done by hand.

    Attributes:
        description: whose data these are, for messages: "D4RL's".
        way: how to get a task's data, a clause with {} for the task's name; empty if they are the user's own.
    """

    description: str
    way: str = ""

    def locate(self, request: Request) -> Path | None:
        """The dataset's path on this disk, or None. Nothing is read or downloaded."""

    def fetch(self, request: Request) -> Path | Transitions:
        """Download or collect a dataset; return its path, or the data if they can't be kept on this disk."""

    def read(self, path: Path, request: Request) -> Transitions:
        """Read and check a dataset; an AnotherDatasetError says that it isn't the requested one."""

    def task(self, path: Path, request: Request) -> Task:
        """The task of a dataset: the request's, unless the dataset names its own environment."""
        return request.task
