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
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cpql.errors import (
    ConfigError,
    CpqlError,
    DataError,
    did_you_mean,
    errors_in_one_line,
    print_error,
    printable,
)

if TYPE_CHECKING:
    from cpql.data.transitions import Transitions
    from cpql.io import Progress
    from cpql.tasks import Task

__all__ = ["main"]

# How to get the data of each source, and in which order `show` looks for them.
WAYS = {
    "d4rl": "`cpql-data download {}` downloads D4RL's",
    "embedded": "`python scripts/collect.py dataset {}` collects a stand-in",
    "minari": "`cpql-data download {} --source minari` downloads Minari's",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 if one of several datasets is at fault.

    Raises:
        SystemExit: after an error, with its exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has a ±
    options = _parser().parse_args(arguments)
    with errors_in_one_line(options.traceback):
        try:
            code = int(options.run(options) or 0)
            print(end="", flush=True)
        except BrokenPipeError:  # the reader has seen enough (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
    return code


def _print(text: str, file: TextIO | None = None) -> None:
    """Print text that may come from a file, a server or a path."""
    print(printable(text), file=file)


def _parser() -> argparse.ArgumentParser:
    """The commands; the help of each is its function's docstring."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=form)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    environment = "a task's name, hopper-medium, or a Gymnasium id, Hopper-v4"

    def command(name: str, run: Callable[[argparse.Namespace], int | None]) -> Callable[..., Any]:
        text = re.sub(r"(?m)^    ", "", run.__doc__ or "")
        summary = text.partition(".")[0]
        sub = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=text,
            parents=[common],
            formatter_class=form,
        )
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
    sources = [source for source in WAYS if source != "embedded"]
    add("--source", choices=sources, default="d4rl", help="where from (default: %(default)s)")

    add = command("verify", verify)
    add("files", nargs="+", metavar="FILE", help="HDF5, NPZ, or a Minari folder")
    add("--env", metavar="NAME", help=f"{environment}: the widths and the actions' bounds have to fit it")

    add = command("convert", convert)
    add("source", metavar="IN", help="HDF5, NPZ, or a Minari folder")
    add("target", metavar="OUT", type=Path, help="a file, or with --id a folder")
    add("--id", help="Minari's id of the new dataset: mine/hopper/mixed-v0")
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
    from cpql.tasks import load_task, task_names

    tasks = {name: task for name in task_names() if (task := load_task(name)).datasets}
    names = [name for name in tasks if fnmatch.fnmatchcase(name, f"*{options.pattern}*")]
    if not names:
        raise ConfigError(
            f"no task's name has '{options.pattern}' in it: {did_you_mean(options.pattern, tasks)}"
        )
    rows = [_row(tasks[name]) for name in names]
    if options.json:
        print(json.dumps(rows, indent=2))
    elif sys.stdout and sys.stdout.isatty():
        _print_table(rows)
    else:
        print("name", "transitions", "d4rl", "minari", "here", "note", sep="\t")
        for row in rows:
            cells = (row["name"], row["transitions"] or "", row["d4rl"], row["minari"])
            print(*cells, _where(row), row["note"], sep="\t")


def _row(task: Task) -> dict[str, Any]:
    """What `list` says of a task."""
    here = {source: [str(path) for path in _on_disk(task, source)] for source in WAYS}
    d4rl, minari = (task.datasets.get(source, {}) for source in ("d4rl", "minari"))
    return {
        "name": task.name,
        "environment": task.id,
        "transitions": d4rl.get("rows"),
        "d4rl": d4rl.get("path", "").rpartition("/")[2],
        "minari": minari.get("id", ""),
        "here": {
            "d4rl": next(iter(here["d4rl"]), None),
            "minari": next(iter(here["minari"]), None),
            "embedded": here["embedded"],
        },
        "bytes": Path(here["d4rl"][0]).stat().st_size if here["d4rl"] else None,
        "collectable": _collectable(task),
        "note": task.note,
    }


def _where(row: dict[str, Any]) -> str:
    sources = [source for source, found in row["here"].items() if found]
    if row["collectable"] and "embedded" not in sources:
        sources.append("can be collected")
    return ", ".join(sources)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    for column in ("task", "transitions", "D4RL", "Minari", "on this disk"):
        table.add_column(column, justify="right" if column == "transitions" else "left", overflow="fold")
    families = [row["name"].partition("-")[0] for row in rows]
    notes: dict[str, dict[str, None]] = {}
    for row, family, following in zip(rows, families, [*families[1:], families[-1]], strict=True):
        if row["note"]:
            notes.setdefault(row["note"], {})[family] = None
        size = f" ({row['bytes'] / 1e6:,.0f} MB)" if row["bytes"] else ""
        cells = (
            row["name"] + (" *" if row["note"] else ""),
            f"{row['transitions']:,}" if row["transitions"] else "",
            row["d4rl"] + size,
            row["minari"],
            _where(row),
        )
        table.add_row(*map(Text, cells), end_section=following != family)
    console = Console()
    console.print(table)
    for note, marked in notes.items():
        console.print(f"* {', '.join(marked)}: {note}", highlight=False, markup=False)


def _on_disk(task: Task, source: str) -> list[Path]:
    """A task's data from a source that are on this disk; of collected data any size, the newest first."""
    from cpql.data import embedded
    from cpql.data.sources import SOURCES, Request

    if source == "embedded":
        return embedded.collected(task)
    path = SOURCES[source].locate(Request(task))
    return [path] if path else []


def _collectable(task: Task) -> bool:
    from cpql.data import embedded

    try:
        embedded.prepare(task, 1_000_000, 0)
    except DataError:
        return False
    return True


def show(options: argparse.Namespace) -> None:
    """Say what a dataset is like.

    Counts, the returns of its episodes, the score of the policy that made it, the ranges of its numbers,
    and what is suspicious about it. Nothing is downloaded or collected. A task's name wins over a file of
    that name: ./NAME is the file.
    """
    from cpql.data import inspection
    from cpql.tasks import task_names

    task: Task | None
    if options.what in task_names():
        if options.env:
            raise ConfigError(f"--env={options.env}: expected none with a task, which {options.what} is")
        data, task = _read_task(_with_data(options.what), options.source)
    elif options.source:
        raise ConfigError(f"--source={options.source}: expected none with a file, only with a task's name")
    else:
        data, task = _read_file(_own_path(options.what), options.env)
    found = inspection.Inspection(data)
    _print(inspection.describe(found, task))
    if options.png:
        _print(f"\ndrawn in {inspection.picture(found, options.png, task)}")


def _with_data(name: str) -> Task:
    """A task that has a dataset."""
    from cpql.tasks import load_task

    task = load_task(name)
    if not task.datasets:
        raise ConfigError(f"{name} has no dataset: `cpql-data list` names the tasks that have one")
    return task


def _read_task(task: Task, source: str | None) -> tuple[Transitions, Task]:
    """Read a task's data from a source, or from the first that has them on this disk."""
    for name in (source,) if source else WAYS:
        for path in _on_disk(task, name)[:1]:
            return _read("file" if name == "embedded" else name, path, task, task.dataset)
    ways = [
        way.format(task.name)
        for name, way in WAYS.items()
        if (_collectable(task) if name == "embedded" else name in task.datasets)
    ]
    what = f"no {source} data" if source else "no data"
    raise DataError(f"{task.name}: {what} on this disk: {', '.join(ways)}")


def _read_file(path: Path, env: str | None) -> tuple[Transitions, Task | None]:
    """Read a file or folder as training would with `--env`; also return the task that it is for, if any."""
    from cpql.data import files, minari
    from cpql.tasks import Task

    known = env or (files.form(path) == "minari" and minari.metadata(path).env_spec)
    task = _task(env) if env else Task(path.stem or "file", None)
    data, task = _read("file", path, task, path.stem, fit=bool(env))
    return data, task if known else None


def _read(source: str, path: Path, task: Task, id: str, *, fit: bool = False) -> tuple[Transitions, Task]:
    """Read a dataset from a source; with `fit` as wide as the task's environment, and in its bounds."""
    from cpql.data.download import verify_recorded
    from cpql.data.files import without_foreign_references
    from cpql.data.sources import SOURCES, Request

    task = SOURCES[source].task(path, Request(task, path=path))
    # Without an environment nothing has to be installed for it.
    request = Request(task if fit else dataclasses.replace(task, id=None), id, path)
    try:
        data = SOURCES[source].read(path, request)
    except DataError as error:
        if not fit and str(error).endswith("expected [-1, 1]"):
            raise DataError(f"{error}, or --env with the environment whose bounds they have") from error
        raise
    if path.is_file():
        verify_recorded(path, data.provenance.sha256)
    if request.facts is not None:
        data.validate_for(*request.facts.widths)
    return data, without_foreign_references(task, data)


def _own_path(what: str) -> Path:
    """What a word that is no task's name means: a file, a folder, or the id of a local Minari dataset."""
    from cpql.data import files, minari
    from cpql.tasks import load_task

    path = Path(what)
    if os.path.lexists(path) or path.suffix.lower() in files.ENDINGS:
        return path
    folder = minari.find(what) if minari.ID.fullmatch(what) else None
    if folder is None and "/" not in what:
        load_task(what)  # raises, and names the nearest task
    return folder or path


def _task(name: str) -> Task:
    """The task that --env names, or one made of a Gymnasium id."""
    from cpql.environments import import_environment
    from cpql.tasks import Task, load_task, task_names

    if name in task_names() or not re.search(r"-v\d+$", name):
        return load_task(name)
    id = import_environment(name)
    return Task(name=id, id=id)


def download(options: argparse.Namespace) -> int:
    """Download the data of tasks.

    D4RL's files go to $D4RL_DATASET_DIR, else ~/.d4rl/datasets, and are looked for at $CPQL_D4RL_MIRROR
    first; Minari's go to $MINARI_DATASETS_PATH, else ~/.minari/datasets. An interrupted download continues
    where it stopped; data that are here are only checked. Proxies are those of http_proxy, https_proxy and
    no_proxy.
    """
    return _for_each(options.names, lambda name: _download(name, options.source), options.traceback)


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


def _download(name: str, source: str) -> None:
    from cpql.data import minari
    from cpql.data.download import recorded
    from cpql.data.sources import SOURCES, Request
    from cpql.io import sha256_of
    from cpql.tasks import Task, task_names

    def say(line: str) -> None:
        _print(line, file=sys.stderr)

    if source == "minari" and "/" in name and name not in task_names():
        task = Task(name, None, datasets={"minari": {"id": name}})
    else:
        task = _with_data(name)
    with _progress() as progress:
        path = SOURCES[source].fetch(Request(task, progress=progress, say=say))
    assert isinstance(path, Path)
    if path.is_dir():
        minari.metadata(path)
        path = path / "data" / minari.ARRAYS
    _print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {recorded(path) or sha256_of(path)}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show downloaded bytes: a bar on a terminal, a line every ten seconds elsewhere."""
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    terminal, shown = sys.stderr.isatty(), time.monotonic()
    ids: dict[str, rich.TaskID] = {}
    with rich.Progress(*columns, console=Console(stderr=True), disable=not terminal) as bars:

        def report(label: str, done: int, total: int) -> None:
            nonlocal shown
            if terminal:
                if label not in ids:
                    ids[label] = bars.add_task(printable(label))
                bars.update(ids[label], completed=done, total=total or None)
            elif time.monotonic() - shown >= 10:
                shown = time.monotonic()
                _print(f"{label}: {done:,}{f' of {total:,}' if total else ''} bytes", file=sys.stderr)

        yield report


def verify(options: argparse.Namespace) -> int:
    """Check that files can be trained on.

    Exits with 0 if all of them can, warnings included, and with 1 if one can't, and says in one line why. A
    checksum recorded beside a file (NAME.sha256) has to fit.
    """
    from cpql.data import inspection

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
    from cpql.data import files, minari
    from cpql.tasks import Task

    source, target, id = Path(options.source), options.target, options.id or ""
    named = target.suffix.lower() in files.ENDINGS
    if named and id:
        raise ConfigError(f"--id={id}: expected none with a file, only with a folder for Minari")
    if not named and not id:
        endings = ", ".join(files.ENDINGS)
        raise ConfigError(
            f"{target}: expected a name with one of the endings {endings}, or, for Minari, a folder and --id"
        )
    if os.path.lexists(target / id) and not options.force:
        raise DataError(f"{target / id}: there is one already: expected a new name, or --force")
    task = _task(options.env) if options.env else None
    bounds = _bounds(source, target, task)
    data, _ = _read("file", source, task or Task("file", None), source.stem, fit=bool(bounds))
    made = files.write(data, target, id=id, task=task, replace=options.force, **bounds)
    again = files.read(made, **bounds)
    _print(f"{made}: {len(data):,} transitions, read back the same {_compare(data, again, made)}")
    for loss in files.left_out(source, data, task):
        _print(f"lost: {loss}")
    ends = int((data.ends & ~again.ends).sum())
    before, after = data.provenance.episodes, again.provenance.episodes
    cuts = len(minari.metadata(made).cpql_cut_episodes) if id else 0
    for count, text in (
        (ends, f"ends of episodes: {ends:,}, where no flag says so and rows join up"),
        (
            before - after,
            f"complete episodes: {before - after:,} of {before:,}, which no flag marks any more",
        ),
        (cuts, f"cut episodes: {cuts:,}, which other readers of Minari's files take for truncated"),
    ):
        if count:
            _print(f"lost: {text}")


def _bounds(source: Path, target: Path, task: Task | None) -> dict[str, Any]:
    """The bounds that actions in HDF5 and NPZ have, for `files.read` and `files.write`."""
    from cpql.data import files, minari
    from cpql.environments import facts

    if files.form(source) == "minari":
        if target.suffix.lower() not in files.ENDINGS:
            return {}
        about = minari.metadata(source)
        space, wrappers = about.action_space, about.env_spec.additional_wrappers if about.env_spec else []
        unit = space is not None and {*space.low} == {-1.0} and {*space.high} == {1.0}
        if unit and not any(wrapper.get("name") == "RescaleAction" for wrapper in wrappers):
            return {}
        if task is None:
            raise DataError(
                f"{source}: its environment's actions aren't in [-1, 1]: expected --env with the environment "
                f"whose bounds they are to have in {target.name}"
            )
    return {} if task is None else dict(zip(("action_low", "action_high"), facts(task)[1:3], strict=True))


def _compare(data: Transitions, again: Transitions, made: Path) -> str:
    """Compare what was read back with what was written: to the bit, or but for actions that were rounded."""
    import torch

    same = torch.equal(data.terminated, again.terminated) and torch.equal(data.truncated, again.truncated)
    bits, others = (x.table.view(torch.int32).clone() for x in (data, again))
    actions = slice(data.state_dim, data.state_dim + data.action_dim)
    rounded = not torch.equal(bits[:, actions], others[:, actions])
    bits[:, actions] = others[:, actions]
    if not (same and torch.equal(bits, others)):
        raise DataError(f"{made}: reads back as other transitions: expected those that were written")
    if not rounded:
        return "to the bit"
    apart = float((data.actions - again.actions).abs().max())
    return f"but for actions, which scaling to their bounds and back has moved by up to {apart:.1g}"


if __name__ == "__main__":
    sys.exit(main())
