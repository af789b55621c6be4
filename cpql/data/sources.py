"""The registry of sources: every family of datasets by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cpql.data import inspection
from cpql.data.d4rl import D4RL
from cpql.data.embedded import Embedded
from cpql.data.files import File, without_foreign_references
from cpql.data.minari import Minari
from cpql.data.ogbench import OGBench
from cpql.data.regenerated import Regenerated
from cpql.data.request import AnotherDatasetError, Request, Source
from cpql.data.transitions import Transitions
from cpql.errors import ConfigError, DataError, did_you_mean
from cpql.tasks import Task

__all__ = ["AUTO", "SOURCES", "Request", "Source", "check_source", "load"]

SOURCES: dict[str, Source] = {
    "d4rl": D4RL(),
    "embedded": Embedded(),
    "minari": Minari(),
    "ogbench": OGBench(),
    "regenerated": Regenerated(),
    "file": File(),
}
"""Sources by name: `dataset=NAME` chooses one, and `dataset.path` the source `file`."""

AUTO = (("d4rl", "embedded"), ("ogbench", "regenerated"))
"""The sources that `dataset=auto` tries, in this order: those whose first one has a dataset of the task."""


def check_source(name: str) -> None:
    """Raise a ConfigError unless there is a source of that name, or it is `auto`."""
    if name not in ("auto", *SOURCES):
        raise ConfigError(f"no dataset source '{name}': {did_you_mean(name, ('auto', *SOURCES))}")


def load(task: Task, *, source: str = "auto", **options: Any) -> tuple[Task, Transitions]:
    """Load a task's dataset, on the CPU.

    Args:
        task: the task whose dataset it is.
        source: a name in `SOURCES`, used strictly; "auto" tries D4RL, then embedded, or OGBench, then
            regenerated, with a warning that gives the reason.
        **options: the other fields of `Request`. A `path` overrides `source`; with an `id` "auto" tries the
            first of the two alone, as the second replaces the task's own dataset only. `say` takes a warning
            if it does, and one for each finding of `cpql.data.inspection` in data that cpql didn't collect
            itself.

    Returns:
        The task of the data (a Minari dataset names its own environment and references), and the data, with
        the widths of that environment and actions scaled from its bounds to [-1, 1].

    Raises:
        ConfigError: there is no such source, or the environment can't be made.
        DataError: the data aren't available, or aren't valid.
    """
    check_source(source)
    request = Request(task, **options)
    if not (request.path or request.id or task.datasets):
        raise DataError(
            f"{task.name} has no dataset: expected mode=online, a task that has one, such as hopper-medium, "
            "or dataset.path=FILE"
        )
    both = next((pair for pair in AUTO if pair[0] in task.datasets), AUTO[0])
    auto = both if request.id is None else both[:1]
    names = ("file",) if request.path else auto if source == "auto" else (source,)
    request, data = _first(names, request)
    if request.spec is not None:
        data.validate_for(*request.spec.widths)
    if data.provenance.source != "embedded":
        for finding in inspection.Inspection(data).findings:
            request.say(f"warning: {data.provenance.name}: {finding}")
    return without_foreign_references(request.task, data), data


def _first(names: Sequence[str], request: Request) -> tuple[Request, Transitions]:
    """Read from the first source that has the data; a later one gives the reason in a warning."""
    task = request.task
    reasons: list[DataError] = []
    for name in names:
        source = SOURCES[name]
        try:
            path = source.locate(request)
            if reasons:
                request.say(
                    f"warning: {task.name} is {source.description}, not {SOURCES[names[0]].description} "
                    f"{task.dataset}, because {reasons[0]}"
                )
            found = path or source.fetch(request)
        except DataError as error:
            reasons.append(error)
            continue
        if isinstance(found, Transitions):
            data = found
        else:
            if (
                own := source.task(found, request)
            ) is not task:  # else the request knows the environment already
                request = dataclasses.replace(request, task=own)
            _ = request.spec  # raises before anything is read if the environment can't be made
            try:
                data = source.read(found, request)
            except AnotherDatasetError as error:
                reasons.append(error)
                continue
        if reasons:
            details = data.provenance.details | {"fallback": str(reasons[0])}
            data = dataclasses.replace(data, provenance=dataclasses.replace(data.provenance, details=details))
        return request, data
    if len(reasons) == 1:
        raise reasons[0]
    raise DataError(f"no data for {task.name}: {'; and '.join(map(str, reasons))}") from reasons[-1]
