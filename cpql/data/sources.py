"""The registry of sources: every family of datasets by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from cpql.data import inspection
from cpql.data.d4rl import D4RL
from cpql.data.embedded import Embedded
from cpql.data.files import File, without_foreign_references
from cpql.data.minari import Minari
from cpql.data.request import AnotherDatasetError, Request, Source
from cpql.data.transitions import TimeLimits, Transitions
from cpql.errors import ConfigError, DataError, did_you_mean
from cpql.io import Progress
from cpql.tasks import Task

__all__ = ["AUTO", "SOURCES", "Request", "Source", "check_source", "load"]

SOURCES: dict[str, Source] = {
    "d4rl": D4RL(),
    "minari": Minari(),
    "embedded": Embedded(),
    "file": File(),
}
"""Sources by name; `file` reads what `dataset.path` names, the others are chosen by `dataset=NAME`."""

AUTO = ("d4rl", "embedded")
"""The sources that `dataset=auto` tries, in this order; a later one is a stand-in, and called so."""


def check_source(name: str) -> None:
    """Check the name of a source, which may be `auto`.

    Raises:
        ConfigError: there is no such source.
    """
    if name not in ("auto", *SOURCES):
        raise ConfigError(f"no dataset source '{name}': {did_you_mean(name, ('auto', *SOURCES))}")


def load(
    task: Task,
    *,
    source: str = "auto",
    path: str | None = None,
    id: str | None = None,
    size: int,
    seed: int = 0,
    time_limits: TimeLimits = "keep",
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Task, Transitions]:
    """Load a task's dataset, on the CPU.

    Args:
        task: whose dataset.
        source: a name of `SOURCES`, strictly: "d4rl" reads its cache folder or downloads,
            "minari" does the same with Minari's, "embedded" collects, or reads what it has collected before.
            "auto" tries D4RL, then embedded, and `say` takes a warning with the reason.
        path: a file in D4RL's layout, HDF5 or NPZ, or the folder of a Minari dataset; then no source counts.
        id: of another dataset than the task's own, D4RL's or Minari's. Nothing is collected in its place.
        size: how many transitions to collect, for the embedded source.
        seed: of the collection.
        time_limits: "drop" leaves out the rows at a time limit, as `d4rl.qlearning_dataset` does.
        progress: called with what is being done, how much of it is done, and how much there is.
        say: takes a line for the user: a warning where D4RL's data can't be had, and one for each finding of
            `cpql.data.inspection` in data that cpql didn't collect itself.

    Returns:
        The task as the data have it (Minari's name their own environment and references), and the data, as
        wide as that environment, actions scaled from its bounds. A task without an environment takes data of
        any width, actions in [-1, 1].

    Raises:
        ConfigError: there is no such source, or the environment can't be made.
        DataError: the data can't be had, or aren't valid.
    """
    check_source(source)
    if path is None and id is None and not task.datasets:
        raise DataError(
            f"{task.name} has no dataset: expected mode=online, a task that has one, such as hopper-medium, "
            "or dataset.path=FILE"
        )
    names: tuple[str, ...] = (source if path is None else "file",)
    if names == ("auto",):
        # The task's stand-in is none for a dataset that was named.
        names = AUTO if id is None else AUTO[:1]
    local = None if path is None else Path(path)
    request, data = _first(names, Request(task, id, local, size, seed, time_limits, progress, say))
    if request.facts is not None:
        data.validate_for(*request.facts.widths)
    if data.provenance.source != "embedded":
        for finding in inspection.Inspection(data).findings:
            say(f"warning: {data.provenance.name}: {finding}")
    return without_foreign_references(request.task, data), data


def _first(names: tuple[str, ...], request: Request) -> tuple[Request, Transitions]:
    """Read from the first source that can have the data; a later one in place of the first says why."""
    reasons: list[DataError] = []
    for name in names:
        source = SOURCES[name]
        try:
            path = source.locate(request)
            if reasons:
                request.say(
                    f"warning: {request.task.name} is {source.description}, not "
                    f"{SOURCES[names[0]].description} {request.task.dataset}, because {reasons[0]}"
                )
            found = path or source.fetch(request)
        except DataError as error:
            reasons.append(error)
            continue
        if isinstance(found, Path):
            request = dataclasses.replace(request, task=source.task(found, request))
            _ = request.facts  # an environment that can't be made is an error before anything is read
            try:
                data = source.read(found, request)
            except AnotherDatasetError as error:
                reasons.append(error)
                continue
        else:
            data = found
        if reasons:
            details = data.provenance.details | {"fallback": str(reasons[0])}
            data = dataclasses.replace(data, provenance=dataclasses.replace(data.provenance, details=details))
        return request, data
    if len(reasons) == 1:
        raise reasons[0]
    raise DataError(f"no data for {request.task.name}: {'; and '.join(map(str, reasons))}") from reasons[-1]
