"""Which data the tasks have: their names at each source, and what is on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpql.data import embedded, regenerated
from cpql.data.sources import SOURCES, Request
from cpql.errors import DataError
from cpql.tasks import Task

__all__ = ["WAYS", "entry", "on_disk", "ways", "where"]

WAYS = {name: source.way for name, source in SOURCES.items() if source.way}
"""How to get a task's data from each source, in the order in which they are looked for."""

COLLECTED = {"embedded": embedded.collected, "regenerated": regenerated.collected}


def on_disk(task: Task, source: str) -> list[Path]:
    """A task's data from a source that are on this disk; of collected data any size, the newest first."""
    if source in COLLECTED:
        return COLLECTED[source](task)
    path = SOURCES[source].locate(Request(task))
    return [path] if path else []


def collectable(task: Task) -> bool:
    """Whether the embedded source has behaviours for a task."""
    try:
        embedded.prepare(task, 1_000_000, 0)
    except DataError:
        return False
    return True


def ways(task: Task) -> list[str]:
    """How to get a task's data, one clause each."""
    here = {*task.datasets, *(["embedded"] if collectable(task) else [])}
    return [way.format(task.name) for source, way in WAYS.items() if source in here]


def entry(task: Task) -> dict[str, Any]:
    """What is known of a task's data, as JSON-able values."""
    paths = {source: [str(path) for path in on_disk(task, source)] for source in WAYS}
    first = {source: next(iter(found), None) for source, found in paths.items()}
    d4rl, minari = (task.datasets.get(source, {}) for source in ("d4rl", "minari"))
    return {
        "name": task.name,
        "environment": task.id,
        "transitions": d4rl.get("rows"),
        "d4rl": d4rl.get("path", "").rpartition("/")[2],
        "minari": minari.get("id", ""),
        "here": first | {source: paths[source] for source in COLLECTED},
        "bytes": Path(first["d4rl"]).stat().st_size if first["d4rl"] else None,
        "collectable": collectable(task),
        "note": task.note,
    }


def where(entry: dict[str, Any]) -> str:
    """The sources whose data are on this disk, or that the embedded source can collect some."""
    sources = [source for source, found in entry["here"].items() if found]
    if entry["collectable"] and "embedded" not in sources:
        sources.append("can be collected")
    return ", ".join(sources)
