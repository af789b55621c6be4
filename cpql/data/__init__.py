"""Data: one form, `Transitions`, and the sources that it comes from.

Imports wait until they are needed: the worker processes that collect data import `cpql.data.behaviour`
and must not load torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cpql.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from cpql.data.d4rl import Progress
    from cpql.data.transitions import Batch, Provenance, Transitions
    from cpql.tasks import Task

__all__ = ["SOURCES", "Batch", "Provenance", "Transitions", "load"]

SOURCES = ("auto", "d4rl", "embedded")


def __getattr__(name: str) -> Any:
    if name in ("Batch", "Provenance", "Transitions"):
        from cpql.data import transitions

        return getattr(transitions, name)
    raise AttributeError(f"module 'cpql.data' has no attribute '{name}'")


def load(
    task: Task,
    *,
    source: str = "auto",
    path: str | None = None,
    size: int,
    seed: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Transitions:
    """Load a task's dataset, on the CPU.

    Args:
        task: whose dataset.
        source: "d4rl" takes its cache folder or downloads, "embedded" collects (or takes what it
            collected before); both strictly. "auto" is D4RL where it can be had, else embedded, and then
            `say` hears that and why.
        path: a file in D4RL's layout; then nothing else counts.
        size: how many transitions to collect, for the embedded source.
        seed: of the collection.
        progress: called with what is being done, how much of it is done, and how much there is.
        say: takes a line for the user.

    Raises:
        ConfigError: there is no such source.
        DataError: the data can't be had, or aren't valid.
    """
    from cpql.data import d4rl, embedded

    if path is not None:
        return d4rl.read(path, task.name)
    if source not in SOURCES:
        raise ConfigError(f"no dataset source '{source}': {did_you_mean(source, SOURCES)}")
    if source == "embedded":
        return embedded.cached(task, size, seed, progress, say)
    found = d4rl.find(task.dataset)
    if found is None:
        try:
            found = d4rl.download(task.dataset, progress)
        except DataError as error:
            if source == "d4rl":
                raise
            return _fall_back(task, size, seed, progress, say, str(error))
    return d4rl.read(found, task.dataset, source="d4rl")


def _fall_back(
    task: Task, size: int, seed: int, progress: Progress | None, say: Callable[[str], None], reason: str
) -> Transitions:
    import dataclasses

    from cpql.data import embedded

    try:
        # Before collecting, so that a task without behaviours hears of both ways at once.
        embedded.prepare(task, size, seed)
    except DataError as error:
        raise DataError(f"no data for {task.name}: {reason}; and {error}") from error
    say(
        f"warning: {task.name} is self-collected data from cpql's own SAC behaviours, "
        f"not D4RL's {task.dataset}, because {reason}"
    )
    data = embedded.cached(task, size, seed, progress, say)
    provenance = data.provenance
    details = provenance.details | {"fallback": reason}
    return dataclasses.replace(data, provenance=dataclasses.replace(provenance, details=details))
