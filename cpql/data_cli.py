"""Look at datasets, fetch, check and convert them.

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
import fnmatch
import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cpql.errors import ConfigError, CpqlError, DataError, did_you_mean, printable

if TYPE_CHECKING:
    from cpql.data.transitions import Reading, Transitions
    from cpql.io import Progress
    from cpql.tasks import Task

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when it went well, 1 after an error the user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has a ±
    options = parser().parse_args(arguments)
    try:
        code = int(options.run(options) or 0)
        print(end="", flush=True)
        return code
    except CpqlError as error:
        if options.traceback:
            raise
        _complain(error)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read this has seen enough (`| head`); Python would complain once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if options.traceback:
            raise
        reason = error.strerror or str(error)
        _complain(CpqlError(reason if error.filename is None else f"{error.filename}: {reason}"))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _complain(error: CpqlError) -> None:
    _print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)


def _print(text: str, file: TextIO | None = None) -> None:
    """Print what may come from a file, a server or a path as text."""
    print(printable(text), file=file)


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=form)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}.\n\n{more}".rstrip()
        sub = commands.add_parser(
            name, help=text, description=description, parents=[common], formatter_class=form
        )
        sub.set_defaults(run=run)
        return sub

    environment = "a task's name, hopper-medium, or a Gymnasium id, Hopper-v4"

    sub = command(
        "list",
        list_tasks,
        "list the tasks, and which of their data are on this disk",
        "A table on a terminal; elsewhere a line of names, then one a task, with tabs between columns.\n"
        "`here` names the sources whose data are on this disk, or says that the embedded source can collect\n"
        "some. A * marks tasks whose scores can't be compared with D4RL's tables; the note says why.",
    )
    sub.add_argument(
        "pattern", nargs="?", default="", help="part of a name, or with wildcards: 'antmaze-*-v2'"
    )
    sub.add_argument("--json", action="store_true", help="all that is known, as JSON")

    sub = command(
        "show",
        show,
        "say what a dataset is like",
        "Counts, the returns of its episodes, the score of the policy that made it, the ranges of its\n"
        "numbers, and what is suspicious about it. Nothing is downloaded or collected. A task's name wins\n"
        "over a file of that name: ./NAME is the file.",
    )
    sub.add_argument("what", metavar="NAME|FILE|FOLDER", help="a task's name, a file, a Minari folder or id")
    sub.add_argument(
        "--source", choices=("d4rl", "embedded", "minari"), help="of a task (default: the first that is here)"
    )
    sub.add_argument(
        "--env", metavar="NAME", help=f"{environment}: a file's environment, and its reference returns"
    )
    sub.add_argument("--png", type=Path, metavar="FILE", help="draw returns, lengths and actions as well")

    sub = command(
        "download",
        download,
        "fetch the data of tasks",
        "D4RL's files go to $D4RL_DATASET_DIR, else ~/.d4rl/datasets, and are asked of $CPQL_D4RL_MIRROR\n"
        "first; Minari's to $MINARI_DATASETS_PATH, else ~/.minari/datasets. What was interrupted goes on\n"
        "where it stopped; what is there is only checked. Proxies are those of http_proxy, https_proxy and\n"
        "no_proxy.",
    )
    sub.add_argument(
        "names", nargs="+", metavar="NAME", help="a task's name; with --source minari also a Minari id"
    )
    sub.add_argument(
        "--source", choices=("d4rl", "minari"), default="d4rl", help="where from (default: %(default)s)"
    )

    sub = command(
        "verify",
        verify,
        "check that files can be trained on",
        "Exits with 0 where all of them can, warnings included, and with 1 where one can't, and says in one\n"
        "line why. A checksum recorded beside a file (NAME.sha256) has to fit.",
    )
    sub.add_argument("files", nargs="+", metavar="FILE", help="HDF5, NPZ, or a Minari folder")
    sub.add_argument(
        "--env", metavar="NAME", help=f"{environment}: the widths and the actions' bounds have to fit it"
    )

    sub = command(
        "convert",
        convert,
        "convert between D4RL's HDF5, NPZ and Minari",
        "OUT's ending says the form: .hdf5, .h5, .npz; with --id it is the folder that a Minari dataset is\n"
        "put into, as OUT/ID. What was written is read back and compared, and anything lost is named.",
    )
    sub.add_argument("source", metavar="IN", help="HDF5, NPZ, or a Minari folder")
    sub.add_argument("target", metavar="OUT", type=Path, help="a file, or with --id a folder")
    sub.add_argument("--id", help="Minari's id of the new dataset: mine/hopper/mixed-v0")
    sub.add_argument(
        "--env",
        metavar="NAME",
        help=f"{environment}: its bounds are those of actions in HDF5 and NPZ (default: -1 and 1), and a new "
        "Minari dataset names it; a task also says which parts of dict observations to take",
    )
    sub.add_argument("--force", action="store_true", help="replace OUT where it is there")
    return top


def list_tasks(options: argparse.Namespace) -> None:
    """List the tasks."""
    from cpql.tasks import load_task, task_names

    tasks = {name: task for name in task_names() if (task := load_task(name)).datasets}
    names = [name for name in tasks if fnmatch.fnmatchcase(name, f"*{options.pattern}*")]
    if not names:
        raise ConfigError(
            f"no task's name has '{options.pattern}' in it: {did_you_mean(options.pattern, tasks)}"
        )
    rows = [_facts(tasks[name]) for name in names]
    if options.json:
        print(json.dumps(rows, indent=2))
    elif sys.stdout and sys.stdout.isatty():
        _print_table(rows)
    else:
        print("name", "transitions", "d4rl", "minari", "here", "note", sep="\t")
        for row in rows:
            transitions = "" if row["transitions"] is None else row["transitions"]
            cells = (row["name"], transitions, row["d4rl"], row["minari"], _where(row), row["note"])
            print(*cells, sep="\t")


def _facts(task: Task) -> dict[str, Any]:
    """What `list` says of a task."""
    from cpql.data.sources import SOURCES, Request

    request = Request(task)
    d4rl_file, folder = (SOURCES[name].locate(request) for name in ("d4rl", "minari"))
    d4rl_entry, minari_entry = (task.datasets.get(name, {}) for name in ("d4rl", "minari"))
    collected = _embedded_files(task)
    here = {
        "d4rl": d4rl_file and str(d4rl_file),
        "minari": folder and str(folder),
        "embedded": [str(path) for path in collected],
    }
    return {
        "name": task.name,
        "environment": task.id,
        "transitions": d4rl_entry.get("rows"),
        "d4rl": d4rl_entry.get("path", "").rpartition("/")[2],
        "minari": minari_entry.get("id", ""),
        "here": here,
        "bytes": d4rl_file.stat().st_size if d4rl_file else None,
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
    notes: dict[str, list[str]] = {}
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        name, transitions = row["name"], row["transitions"]
        if row["note"]:
            notes.setdefault(row["note"], []).append(name)
        cells = (
            f"{name} *" if row["note"] else name,
            "" if transitions is None else f"{transitions:,}",
            row["d4rl"] + (f" ({row['bytes'] / 1e6:,.0f} MB)" if row["bytes"] else ""),
            row["minari"],
            _where(row),
        )
        table.add_row(
            *map(Text, cells),
            end_section=following is not None and _family(following["name"]) != _family(name),
        )
    console = Console()
    console.print(table)
    for note, names in notes.items():
        families = ", ".join(dict.fromkeys(_family(name) for name in names))
        console.print(f"* {families}: {note}", highlight=False, markup=False)


def _family(name: str) -> str:
    return name.partition("-")[0]


def _embedded_files(task: Task) -> list[Path]:
    """What the embedded source has collected for a task, the newest first."""
    from cpql.data import embedded

    found = embedded.cache_folder().glob(f"{task.name}-embedded-*.hdf5")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _collectable(task: Task) -> bool:
    from cpql.data import embedded

    try:
        embedded.prepare(task, 1_000_000, 0)
    except DataError:
        return False
    return True


def show(options: argparse.Namespace) -> None:
    """Say what a dataset is like."""
    from cpql.data import files, inspection
    from cpql.data.sources import SOURCES, Request
    from cpql.tasks import task_names

    task: Task | None
    if options.what in task_names():
        if options.env:
            raise ConfigError(f"--env={options.env}: expected none with a task, which {options.what} is")
        task = _with_data(options.what)
        path, source = _on_disk(task, options.source)
        if source == "embedded":
            data = files.read(path, task.dataset)
        else:
            task = SOURCES[source].task(path, Request(task))
            data = SOURCES[source].read(path, Request(task))
        _check_record(path, data)
    else:
        if options.source:
            raise ConfigError(
                f"--source={options.source}: expected none with a file, only with a task's name"
            )
        data, task = _read_own(_own_path(options.what), options.env)
    found = inspection.inspect(data)
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


def _on_disk(task: Task, source: str | None) -> tuple[Path, str]:
    """Where a task's data are, and from which source."""
    from cpql.data.sources import SOURCES, Request

    for candidate in (source,) if source else ("d4rl", "embedded", "minari"):
        if candidate == "embedded":
            path = next(iter(_embedded_files(task)), None)
        else:
            path = SOURCES[candidate].locate(Request(task))
        if path is not None:
            return path, candidate
    ways = [f"`cpql-data download {task.name}` fetches D4RL's"]
    if "minari" in task.datasets:
        ways.append(f"`cpql-data download {task.name} --source minari` Minari's")
    if _collectable(task):
        ways.append(f"`python scripts/collect.py dataset {task.name}` collects a stand-in")
    what = f"no {source} data" if source else "no data"
    raise DataError(f"{task.name}: {what} on this disk: {', '.join(ways)}")


def _own_path(what: str) -> Path:
    """The path that a word means which is no task's name: a file, a folder, or a local Minari id."""
    from cpql.data import files, minari
    from cpql.tasks import load_task

    path = Path(what)
    if os.path.lexists(path) or path.suffix.lower() in files.ENDINGS:
        return path
    folder = minari.find(what) if minari.ID.fullmatch(what) else None
    if folder is None and "/" not in what:
        load_task(what)
    return folder or path


def _task(name: str) -> Task:
    """The task that --env names, or one made of a Gymnasium id."""
    from cpql.environments import import_environment
    from cpql.tasks import Task, load_task, task_names

    if name in task_names() or not re.search(r"-v\d+$", name):
        return load_task(name)
    id = import_environment(name)
    return Task(name=id, id=id)


def _environment_facts(task: Task) -> tuple[tuple[int, int], Reading]:
    """An environment's widths, and what it says of files."""
    from cpql.environments import facts

    widths, low, high, limit = facts(task)
    return widths, {"action_low": low, "action_high": high, "episode_limit": limit}


def _read_own(path: Path, env: str | None) -> tuple[Transitions, Task | None]:
    """Read a file or folder as training would with `--env`, and give the task that it is for, if any."""
    from cpql.data import files, minari

    task = _task(env) if env else None
    if files.form(path) == "minari" and (task or minari.metadata(path).get("env_spec")):
        task = minari.task(task, path)
    both, facts = _environment_facts(task) if env and task else (None, {})
    data = _read(path, task, facts)
    _check_record(path, data)
    if both:
        data.validate_for(*both)
    if task and files.form(path) != "minari":
        task = files.without_foreign_references(task, data)
    return data, task


def _read(path: Path, task: Task | None, facts: Reading) -> Transitions:
    from cpql.data import files

    try:
        return files.read(path, task=task, **facts)
    except DataError as error:
        if not facts and str(error).endswith("expected [-1, 1]"):
            raise DataError(f"{error}, or --env with the environment whose bounds they have") from error
        raise


def _check_record(path: Path, data: Transitions) -> None:
    """Hold a file against the checksum beside it, where a download left one."""
    from cpql.data.download import verify_recorded

    if path.is_file():
        verify_recorded(path, data.provenance.sha256)


def download(options: argparse.Namespace) -> int:
    """Fetch the data of tasks."""
    failed = False
    for name in options.names:
        try:
            path = _fetch(name, options.source)
        except CpqlError as error:
            if options.traceback:
                raise
            _complain(error)
            failed = True
        else:
            _print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {_sha256(path)}")
    return int(failed)


def _fetch(name: str, source: str) -> Path:
    from cpql.data import minari
    from cpql.data.sources import SOURCES, Request
    from cpql.tasks import load_task, task_names

    def say(line: str) -> None:
        _print(line, file=sys.stderr)

    if source == "minari":
        id = (
            name
            if "/" in name and name not in task_names()
            else load_task(name).datasets.get("minari", {}).get("id")
        )
        if not id:
            raise ConfigError(f"{name}: Minari has no such data: expected another task, or a Minari id")
        folder = minari.locate(id, say=say)
        minari.metadata(folder)
        return folder / "data" / minari.ARRAYS
    task = _with_data(name)
    with _progress() as progress:
        found = SOURCES["d4rl"].fetch(Request(task, progress=progress, say=say))
    assert isinstance(found, Path)
    return found


def _sha256(path: Path) -> str:
    from cpql.data.download import recorded

    known = recorded(path)  # which fetching has checked
    if known is None:
        with path.open("rb") as file:
            known = hashlib.file_digest(file, "sha256").hexdigest()
    return known


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show bytes as they come: a bar on a terminal, a line every ten seconds elsewhere."""
    from rich import progress as rich

    if sys.stderr.isatty():
        from rich.console import Console

        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=Console(stderr=True)) as bars:
            made: dict[str, rich.TaskID] = {}

            def draw(label: str, done: int, total: int) -> None:
                if label not in made:
                    made[label] = bars.add_task(printable(label))
                bars.update(made[label], completed=done, total=total or None)

            yield draw
        return
    said = time.monotonic()

    def tell(label: str, done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= 10:
            said = time.monotonic()
            of = f" of {total:,}" if total else ""
            _print(f"{label}: {done:,}{of} bytes", file=sys.stderr)

    yield tell


def verify(options: argparse.Namespace) -> int:
    """Check that files can be trained on."""
    from cpql.data import inspection

    failed = False
    for file in options.files:
        try:
            data, _ = _read_own(Path(file), options.env)
        except CpqlError as error:
            if options.traceback:
                raise
            _complain(error)
            failed = True
            continue
        found = inspection.inspect(data)
        for finding in found.findings:
            _print(f"warning: {file}: {finding}")
        warnings = len(found.findings)
        _print(
            f"{file}: can be trained on: {len(data):,} transitions, {data.provenance.episodes:,} complete "
            f"episodes, {warnings or 'no'} warning{'' if warnings == 1 else 's'}"
        )
    return int(failed)


def convert(options: argparse.Namespace) -> None:
    """Convert between D4RL's HDF5, NPZ and Minari."""
    from cpql.data import files, minari

    source, target = Path(options.source), options.target
    ending = target.suffix.lower()
    if ending in files.ENDINGS and options.id:
        raise ConfigError(f"--id={options.id}: expected none with a file, only with a folder for Minari")
    if ending not in files.ENDINGS and not options.id:
        endings = ", ".join(files.ENDINGS)
        raise ConfigError(
            f"{target}: expected a name with one of the endings {endings}, or, for Minari, a folder and --id"
        )
    made = target / (options.id or "")
    if os.path.lexists(made) and not options.force:
        raise DataError(f"{made}: there is one already: expected a new name, or --force")
    task = _task(options.env) if options.env else None
    facts = _bounds(source, target, task)
    data = _read(source, task, facts)
    bounds: Any = {key: facts[key] for key in ("action_low", "action_high") if key in facts}
    made = files.write(data, target, id=options.id or "", task=task, replace=options.force, **bounds)
    again = files.read(made, **bounds)
    rounded = _compare(data, again, made)
    _print(f"{made}: {len(data):,} transitions, read back the same {rounded or 'to the bit'}")
    losses = files.left_out(source, data, task)
    ends = int((data.ends & ~again.ends).sum())
    if ends:
        losses.append(f"ends of episodes: {ends:,}, where no flag says so and rows join up")
    before, after = data.provenance.episodes, again.provenance.episodes
    if before != after:
        losses.append(
            f"complete episodes: {before - after:,} of {before:,}, no flag says any more that they are"
        )
    if options.id:
        cuts = len(minari.metadata(made)[minari.CUTS])
        if cuts:
            losses.append(f"cut episodes: {cuts:,}, which other readers of Minari's files take for truncated")
    for loss in losses:
        _print(f"lost: {loss}")


def _bounds(source: Path, target: Path, task: Task | None) -> Reading:
    """The bounds that actions in HDF5 and NPZ have, and the time limit, for `files.read`."""
    from cpql.data import files, minari

    if files.form(source) == "minari":
        if target.suffix.lower() not in files.ENDINGS:
            return {}
        about = minari.metadata(source)
        space = json.loads(about.get("action_space") or "{}")
        unit = {*space.get("low", ())} == {-1.0} and {*space.get("high", ())} == {1.0}
        if unit and "RescaleAction" not in str(about.get("env_spec")):
            return {}
        if task is None:
            raise DataError(
                f"{source}: its environment's actions aren't in [-1, 1]: expected --env with the environment "
                f"whose bounds they are to have in {target.name}"
            )
    return _environment_facts(task)[1] if task else {}


def _compare(data: Transitions, again: Transitions, made: Path) -> str:
    """Hold what was read back against what was written; a clause where actions were rounded."""
    import torch

    same = torch.equal(data.terminated, again.terminated) and torch.equal(data.truncated, again.truncated)
    bits, others = (x.table.view(torch.int32).clone() for x in (data, again))
    actions = slice(data.state_dim, data.state_dim + data.action_dim)
    rounded = not torch.equal(bits[:, actions], others[:, actions])
    bits[:, actions] = others[:, actions]
    if not (same and torch.equal(bits, others)):
        raise DataError(f"{made}: reads back as other transitions: expected those that were written")
    if not rounded:
        return ""
    apart = float((data.actions - again.actions).abs().max())
    return f"but for actions, which scaling to their bounds and back has moved by up to {apart:.1g}"


if __name__ == "__main__":
    sys.exit(main())
