"""What every source of datasets is asked, and what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cpql.data.transitions import Reading, TimeLimits, Transitions
from cpql.environments import Facts, facts
from cpql.errors import DataError
from cpql.io import Progress
from cpql.tasks import Task

__all__ = ["AnotherDatasetError", "Request", "Source"]


class AnotherDatasetError(DataError):
    """A file that is whole, and can't be the dataset that was asked for."""


@dataclass(frozen=True)
class Request:
    """The dataset that is asked for.

    Attributes:
        task: whose dataset.
        id: of another dataset than the task's own; None for the task's own.
        path: a file or folder of the user's, for the source `file` alone.
        size: transitions to collect, for sources that collect.
        seed: of the collection.
        time_limits: see `cpql.data.transitions.Reading`.
        progress: called while something is downloaded or collected.
        say: takes a line for the user.
    """

    task: Task
    id: str | None = None
    path: Path | None = None
    size: int = 1_000_000
    seed: int = 0
    time_limits: TimeLimits = "keep"
    progress: Progress | None = None
    say: Callable[[str], None] = print

    def about(self, source: str) -> dict[str, Any]:
        """What is known of the dataset at a source: the task's entry, or `id` alone, or nothing."""
        entry = self.task.datasets.get(source, {})
        return entry if self.id in (None, entry.get("id")) else {"id": self.id}

    @functools.cached_property
    def facts(self) -> Facts | None:
        """The shapes, bounds and time limit of the task's environment; None for a task without one.

        Raises:
            ConfigError: the environment can't be made.
        """
        return None if self.task.id is None else facts(self.task)

    @property
    def reading(self) -> Reading:
        """What arrays don't say about themselves, see `Reading`."""
        reading: Reading = {"time_limits": self.time_limits}
        if self.facts is not None:
            _, reading["action_low"], reading["action_high"], reading["episode_limit"] = self.facts
        return reading


class Source(Protocol):
    """A place that datasets come from.

    A new one is a class in a file of its own and a row in `cpql.data.sources.SOURCES`. Its module is imported
    for `--help`, so that it imports large packages within its functions.

    Attributes:
        description: whose data these are, for the user: "D4RL's".
    """

    description: str

    def locate(self, request: Request) -> Path | None:
        """The dataset's path on this disk; None where it isn't there. Looks, and neither reads nor downloads.

        Raises:
            DataError: this source can't have such a dataset.
        """

    def fetch(self, request: Request) -> Path | Transitions:
        """Download or collect the dataset, which `locate` hasn't found.

        Returns:
            Its path; or, where it can't be kept on this disk, the data.

        Raises:
            DataError: it can't be had; says why, and what to do by hand.
        """

    def read(self, path: Path, request: Request) -> Transitions:
        """Read and check the dataset at a path that `locate` or `fetch` gave.

        Raises:
            AnotherDatasetError: it is whole, and another one than the one that was asked for.
            DataError: it is damaged, or doesn't hold valid transitions.
        """

    def task(self, path: Path, request: Request) -> Task:
        """The task as the dataset at a path has it: the request's own, unless the dataset names another.

        Raises:
            DataError: it is damaged.
        """
        return request.task
