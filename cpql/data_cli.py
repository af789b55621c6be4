"""Look at datasets, download, check and convert them.

    python scripts/data.py list hopper
    python scripts/data.py show hopper-medium --png hopper-medium.png
    python scripts/data.py download hopper-medium
    python scripts/data.py verify mine.hdf5 --env hopper-medium
    python scripts/data.py convert mine.hdf5 mine.npz

A dataset is a task's, by name, or your own: HDF5 in D4RL's layout, NPZ with the same keys, or the folder of a
Minari dataset. docs/data.md says what has to be in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpql.data import conversion, embedded, files, inspection, minari, regenerated
from cpql.data.download import recorded, verify_recorded
from cpql.data.sources import SOURCES, Request
from cpql.data.transitions import Transitions
from cpql.environments import import_environment
from cpql.errors import (
    ConfigError,
    CpqlError,
    DataError,
    did_you_mean,
    errors_in_one_line,
    escape_unknown_characters,
    print_error,
    printable,
)
from cpql.io import sha256_of
from cpql.tasks import Task, load_task, task_names
from cpql.training.logging import progress_bars

__all__ = ["main"]

# How to get a task's data from each source, in the order in which they are looked for.
WAYS = {name: source.way for name, source in SOURCES.items() if source.way}
COLLECTED = {"embedded": embedded.collected, "regenerated": regenerated.collected}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 if one of several datasets is at fault.

    Raises:
        SystemExit: after an error, with its exit code.
    """
    escape_unknown_characters()
    options = _parser().parse_args(arguments)
    with errors_in_one_line(options.traceback):
        return int(options.run(options) or 0)


def _print(text: str) -> None:
    """Print text that may come from a file, a server or a path."""
    print(printable(text))


def _parser() -> argparse.ArgumentParser:
    """The commands; the help of each is its function's docstring."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=form)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    environment = "a task's name, hopper-medium, or a Gymnasium id, Hopper-v4"

    def command(name: str, run: Callable[[argparse.Namespace], int | None]) -> Callable[..., Any]:
        text = re.sub(r"(?m)^    ", "", run.__doc__ or "")
        summary = text[0].lower() + text[1:].partition(".")[0]
        sub = commands.add_parser(name, help=summary, description=text, formatter_class=form)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command("list", list_tasks)
    add("pattern", nargs="?", default="", help="part of a name, or with wildcards: 'antmaze-*-v2'")
    add("--json", action="store_true", help="everything that is known, as JSON")

    add = command("show", show)
    add("what", metavar="NAME|FILE|FOLDER", help="a task's name, a file, a Minari folder or id")
    add("--source", choices=WAYS, help="of a task (default: the first whose data are here)")
    add("--env", metavar="NAME", help=f"{environment}: a file's environment, and its reference returns")
    add("--png", type=Path, metavar="FILE", help="draw returns, lengths and actions as well")

    add = command("download", download)
    add("names", nargs="+", metavar="NAME", help="a task's name; with --source minari also a Minari id")
    sources = [source for source in WAYS if source not in COLLECTED]
    add("--source", choices=sources, help="where from (default: the first that has the task's data)")

    add = command("verify", verify)
    add("files", nargs="+", metavar="FILE", help="HDF5, NPZ, or a Minari folder")
    add("--env", metavar="NAME", help=f"{environment}: the widths and the actions' bounds have to fit it")

    add = command("convert", convert)
    add("source", metavar="IN", type=Path, help="HDF5, NPZ, or a Minari folder")
    add("target", metavar="OUT", type=Path, help="a file, or with --id a folder")
    add("--id", default="", help="Minari's id of the new dataset: mine/hopper/mixed-v0")
    bounds = (
        "its bounds are those of actions in HDF5 and NPZ (default: -1 and 1), and a new Minari dataset names "
        "it; a task also says which parts of dict observations to take"
    )
    add("--env", metavar="NAME", help=f"{environment}: {bounds}")
    add("--force", action="store_true", help="replace OUT if it exists")
    return top


def list_tasks(options: argparse.Namespace) -> None:
    """List the tasks, and which of their data are on this disk.

    A table on a terminal; elsewhere a line of names, then a line for each task, with tabs between columns.
    `here` names the sources whose data are on this disk, or says that the embedded source can collect
    some. A * marks tasks whose scores can't be compared with D4RL's tables; the note says why.
    """
    tasks = {name: task for name in task_names() if (task := load_task(name)).datasets}
    names = [name for name in tasks if fnmatch.fnmatchcase(name, f"*{options.pattern}*")]
    if not names:
        raise ConfigError(
            f"no task's name has '{options.pattern}' in it: {did_you_mean(options.pattern, tasks)}"
        )
    rows = [_row(tasks[name]) for name in names]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "transitions", "d4rl", "minari", "ogbench", "here", show_edge=False, pad_edge=False)
    terminal = bool(sys.stdout and sys.stdout.isatty())
    notes: dict[tuple[str, str], None] = {}
    if not terminal:
        print("name", "transitions", "d4rl", "minari", "ogbench", "here", "note", sep="\t")
    for row in rows:
        here = [source for source, found in row["here"].items() if found]
        here += ["can be collected"] if row["collectable"] and not COLLECTED.keys() & set(here) else []
        ids = (row[source] for source in ("d4rl", "minari", "ogbench"))
        cells = [row["name"], str(row["transitions"] or ""), *ids, ", ".join(here)]
        if not terminal:
            print(*cells, row["note"], sep="\t")
            continue
        if row["note"]:
            cells[0] += " *"
            notes[row["name"].partition("-")[0], row["note"]] = None
        table.add_row(*map(Text, cells))
    if terminal:
        console = Console()
        console.print(table)
        for family, note in notes:
            console.print(f"* {family}: {note}", highlight=False, markup=False)


def _row(task: Task) -> dict[str, Any]:
    """What is known of a task's data, as JSON-able values."""
    here: dict[str, Any] = {name: [str(path) for path in _on_disk(task, name)] for name in WAYS}
    here |= {name: next(iter(paths), None) for name, paths in here.items() if name not in COLLECTED}
    d4rl, minari, ogbench = (task.datasets.get(source, {}) for source in ("d4rl", "minari", "ogbench"))
    return {
        "name": task.name,
        "environment": task.id,
        "transitions": d4rl.get("rows"),
        "d4rl": d4rl.get("path", "").rpartition("/")[2],
        "minari": minari.get("id", ""),
        "ogbench": ogbench.get("id", ""),
        "here": here,
        "bytes": os.path.getsize(here["d4rl"]) if here["d4rl"] else None,
        "collectable": _collectable(task),
        "note": task.note,
    }


def _on_disk(task: Task, source: str) -> list[Path]:
    """A task's data from a source that are on this disk; of collected data any size, the newest first."""
    if source in COLLECTED:
        return COLLECTED[source](task)
    path = SOURCES[source].locate(Request(task))
    return [path] if path else []


def _collectable(task: Task) -> bool:
    with suppress(DataError):
        return "regenerated" in task.datasets or bool(embedded.prepare(task, 1_000_000, 0))
    return False


def show(options: argparse.Namespace) -> None:
    """Say what a dataset is like.

    Counts, the returns of its episodes, the score of the policy that made it, the ranges of its numbers,
    and what is suspicious about it. Nothing is downloaded or collected. A task's name wins over a file of
    that name: ./NAME is the file.
    """
    name = options.what
    if name not in task_names():
        if options.source:
            raise ConfigError(f"--source={options.source}: expected none with a file, only with a task")
        data, task = _read_file(_own_path(name), options.env)
    elif options.env:
        raise ConfigError(f"--env={options.env}: expected none with a task, which {name} is")
    else:
        task, sources = _with_data(name), [options.source] if options.source else [*WAYS]
        found = [(source, path) for source in sources for path in _on_disk(task, source)]
        if not found:
            here = {*task.datasets, *(["embedded"] if _collectable(task) else [])}
            ways = [way.format(name) for source, way in WAYS.items() if source in here]
            what = f"{options.source} data" if options.source else "data"
            raise DataError(f"{name}: no {what} on this disk: {', '.join(ways)}")
        source, path = found[0]
        data, task = _read("file" if source in COLLECTED else source, path, task)
    described = inspection.Inspection(data)
    _print(inspection.describe(described, task))
    if options.png:
        _print(f"\ndrawn in {inspection.picture(described, options.png, task)}")


def _with_data(name: str) -> Task:
    """A task that has a dataset."""
    task = load_task(name)
    if not task.datasets:
        raise ConfigError(f"{name} has no dataset: `cpql-data list` names the tasks that have one")
    return task


def _own_path(what: str) -> Path:
    """What a word that is no task's name means: a file, a folder, or the id of a local Minari dataset."""
    path = Path(what)
    if os.path.lexists(path) or path.suffix.lower() in files.ENDINGS:
        return path
    folder = minari.find(what) if minari.ID.fullmatch(what) else None
    if folder is None and "/" not in what:
        load_task(what)  # raises, and names the nearest task
    return folder or path


def _task(name: str) -> Task:
    """The task that --env names, or one made of a Gymnasium id."""
    if name in task_names() or not re.search(r"-v\d+$", name):
        return load_task(name)
    id = import_environment(name)
    return Task(name=id, id=id)


def _read_file(path: Path, env: str | None) -> tuple[Transitions, Task]:
    """Read a file or folder as training would with `--env`; also return the task that it is for."""
    return _read("file", path, _task(env) if env else Task("file", None), fit=bool(env))


def _read(source: str, path: Path, task: Task, *, fit: bool = False) -> tuple[Transitions, Task]:
    """Read a dataset from a source; with `fit` as wide as the task's environment, and in its bounds."""
    task = SOURCES[source].task(path, Request(task, path=path))
    # Without an environment nothing has to be installed for it.
    task_read = task if fit else dataclasses.replace(task, id=None)
    request = Request(task_read, path.stem if source == "file" else None, path)
    with _advice_on_bounds(fit):
        data = SOURCES[source].read(path, request)
    if path.is_file():
        verify_recorded(path, data.provenance.sha256)
    if request.spec is not None:
        data.validate_for(*request.spec.widths)
    return data, files.without_foreign_references(task, data)


@contextmanager
def _advice_on_bounds(known: bool) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        if known or not str(error).endswith("expected [-1, 1]"):
            raise
        raise DataError(f"{error}, or --env with the environment whose bounds they have") from error


def download(options: argparse.Namespace) -> int:
    """Download the data of tasks.

    D4RL's files go to $D4RL_DATASET_DIR, else ~/.d4rl/datasets, and are looked for at $CPQL_D4RL_MIRROR
    first; OGBench's go to $OGBENCH_DATASET_DIR, else ~/.ogbench/data, and are looked for at
    $CPQL_OGBENCH_MIRROR first; Minari's go to $MINARI_DATASETS_PATH, else ~/.minari/datasets. An interrupted
    download continues where it stopped; data that are here are only checked. Proxies are those of http_proxy,
    https_proxy and no_proxy.
    """
    console = Console(stderr=True, soft_wrap=True)

    def fetch(name: str) -> None:
        if options.source == "minari" and "/" in name and name not in task_names():
            task = Task(name, None, datasets={"minari": {"id": name}})
        else:
            task = _with_data(name)
        source = SOURCES[options.source or next(iter(task.datasets))]
        say = partial(console.print, markup=False, highlight=False)
        with progress_bars(console) as progress:
            request = Request(task, progress=progress, say=lambda line: say(printable(line)))
            path = source.fetch(request)
        assert isinstance(path, Path)
        if path.is_dir():
            minari.metadata(path)
            path = path / "data" / minari.ARRAYS
        _print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {recorded(path) or sha256_of(path)}")

    return _for_each(options.names, fetch, options.traceback)


def _for_each(names: list[str], run: Callable[[str], None], traceback: bool) -> int:
    """Go on after an error with one of several; 1 if there was any."""
    failed = 0
    for name in names:
        try:
            run(name)
        except CpqlError as error:
            if traceback:
                raise
            print_error(error)
            failed = 1
    return failed


def verify(options: argparse.Namespace) -> int:
    """Check that files can be trained on.

    Exits with 0 if all of them can, warnings included, and with 1 if one can't, and says in one line why. A
    checksum recorded beside a file (NAME.sha256) has to fit.
    """

    def check(file: str) -> None:
        data, _ = _read_file(Path(file), options.env)
        findings = inspection.Inspection(data).findings
        for finding in findings:
            _print(f"warning: {file}: {finding}")
        _print(
            f"{file}: can be trained on: {len(data):,} transitions, {data.provenance.episodes:,} complete "
            f"episodes, {len(findings) or 'no'} warning{'' if len(findings) == 1 else 's'}"
        )

    return _for_each(options.files, check, options.traceback)


def convert(options: argparse.Namespace) -> None:
    """Convert between D4RL's HDF5, NPZ and Minari.

    OUT's ending says the form: .hdf5, .h5, .npz; with --id it is the folder that a Minari dataset is put
    into, as OUT/ID. What was written is read back and compared, and anything lost is named.
    """
    target, id = options.target, options.id
    if (target.suffix.lower() in files.ENDINGS) == bool(id):
        endings = ", ".join(files.ENDINGS)
        raise ConfigError(
            f"{target}: expected a name with one of the endings {endings}, or, for Minari, a folder and --id"
        )
    if os.path.lexists(target / id) and not options.force:
        raise DataError(f"{target / id}: there is one already: expected a new name, or --force")
    task = _task(options.env) if options.env else None
    with _advice_on_bounds(task is not None):
        lines = conversion.convert(options.source, target, id=id, task=task, replace=options.force)
    for line in lines:
        _print(line)
