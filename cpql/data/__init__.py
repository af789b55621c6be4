"""Data: one form, `Transitions`, and the sources that it comes from.

Imports wait until they are needed: the worker processes that collect data import `cpql.data.workers`
and must not load torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpql.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from cpql.data.d4rl import Progress
    from cpql.data.transitions import Batch, Provenance, Reading, TimeLimits, Transitions
    from cpql.tasks import Task

__all__ = ["SOURCES", "Batch", "Provenance", "Transitions", "load"]

SOURCES = ("auto", "d4rl", "minari", "embedded")


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
        source: "d4rl" takes its cache folder or downloads, "minari" takes a local dataset or downloads,
            "embedded" collects (or takes what it collected before); all strictly. "auto" is D4RL where it can
            be had, else embedded, and then `say` hears that and why.
        path: a file in D4RL's layout, HDF5 or NPZ, or the folder of a Minari dataset; then no source counts.
        id: of the dataset, where it isn't the task's own: D4RL's or Minari's. Nothing is collected instead.
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
    from cpql.data import d4rl, embedded, files, inspection, minari
    from cpql.environments import facts

    if source not in SOURCES:
        raise ConfigError(f"no dataset source '{source}': {did_you_mean(source, SOURCES)}")
    if id is not None and source == "embedded":
        raise ConfigError(
            f"dataset.id={id}: expected none with dataset=embedded, which has the task's own alone"
        )
    if path is None and id is None and not task.dataset:
        raise DataError(
            f"{task.name} has no dataset: expected mode=online, a task that has one, such as hopper-medium, "
            "or dataset.path=FILE"
        )
    folder = Path(path) if path is not None and Path(path).is_dir() else None
    if folder is None and path is None and source == "minari":
        id = id or task.minari
        if not id:
            raise DataError(f"{task.name}: Minari has no counterpart: expected dataset.id to name a dataset")
        folder = minari.locate(id, say=say)
    if folder is not None:
        task = minari.task(task, folder)
    form: Reading = {"time_limits": time_limits}
    expected = None
    if task.id is not None:
        expected, form["action_low"], form["action_high"], form["episode_limit"] = facts(task)
    if folder is not None:
        data = minari.read(folder, task, time_limits=time_limits)
    elif path is not None:
        data = files.read(path, id or task.name, **form)
        task = files.without_foreign_references(task, data)
    elif source == "embedded":
        data = _as_asked(embedded.cached(task, size, seed, progress, say), time_limits)
    else:
        dataset = id or task.dataset
        url, rows = (task.url, task.transitions) if dataset == task.dataset else ("", None)
        try:
            found = d4rl.find(dataset, url) or d4rl.download(dataset, progress, path=url, rows=rows, say=say)
        except DataError as error:
            reason = str(error)
        else:
            # What is damaged, not another file, is the user's to mend: falling back would hide it.
            reason = d4rl.misfit(found, dataset, rows)
        if not reason:
            data = d4rl.read(found, dataset, source="d4rl", rows=rows, **form)
        elif source == "d4rl" or id is not None:
            # The task's stand-in is none for a dataset that was named.
            raise DataError(reason)
        else:
            data = _as_asked(_fall_back(task, size, seed, progress, say, reason), time_limits)
    if expected is not None:
        data.validate_for(*expected)
    if data.provenance.source != "embedded":
        where = data.provenance.file or data.provenance.id
        for finding in inspection.Inspection(data).findings:
            say(f"warning: {where}: {finding}")
    return task, data


def _as_asked(data: Transitions, time_limits: TimeLimits) -> Transitions:
    """Collected data by the rule for time limits; the cache keeps every row."""
    from cpql.data.transitions import Transitions

    if time_limits == "keep":
        return data
    p = data.provenance
    about: dict[str, Any] = {"source": p.source, "id": p.id, "file": p.file, "sha256": p.sha256}
    return Transitions.from_dict(data.to_dict(), **about, details=p.details, time_limits=time_limits)


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
