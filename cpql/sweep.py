"""A sweep: a command with several values, of which each combination is a job of one of Hydra's launchers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpql.configuration import check_words, key_of
from cpql.errors import ConfigError, CpqlError, Interrupted, printable
from cpql.io import held
from cpql.job import Job, Row, result_of, runs_of
from cpql.tasks import config_folder
from cpql.training.config import TrainConfig, group_agent_config
from cpql.training.logging import make_console, say
from cpql.training.sources import load_data

__all__ = ["sweep"]

EXTRAS = {
    "joblib": ("hydra_joblib_launcher", "joblib"),
    "slurm": ("hydra_submitit_launcher", "slurm"),
    "submitit_local": ("hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_ray_launcher", "ray"),
}
"""The plugin of Hydra's that a launcher needs, and the extra of cpql's that installs it."""

STATES = {
    "finished": "",
    "resumed": "and finished",
    "skipped": "as they were finished before",
    "stopped": "",
    "failed": "",
    "lost": "without a word, as where a process is killed",
    "not started": "",
}
"""What becomes of a run, and what the last line says of it besides."""

GOOD = {"finished", "resumed", "skipped"}


def sweep(words: Sequence[str]) -> None:
    """`cpql-train --multirun`: start the jobs, wait for them, and print what became of each run.

    Args:
        words: of the command, without the flag; see docs/sweeps.md.

    Raises:
        SystemExit: at the end, with 0 if all runs are finished, 130 if the user stopped, else 1.
        ConfigError: a setting isn't valid, two runs have one folder, a package is missing, or another process
            is busy with the same sweep.
    """
    launcher = next((word.partition("=")[2] for word in words[::-1] if key_of(word) == "launcher"), "basic")
    _check_launcher(launcher)
    own_jobs = not any(word.startswith("hydra/sweeper=") for word in words)
    jobs, fixed, folder = _plan(words, own_jobs)
    runs = [config for job in jobs for config in job]
    name = hashlib.sha256(repr([config.run_dir for config in runs]).encode()).hexdigest()[:12]
    notes, console = folder.resolve() / f".sweep-{name}", make_console()
    with held(notes / ".lock", _busy):
        _clear(notes)
        _prepare(runs, console)
        job = Job(Path.cwd(), notes, fixed, launcher != "basic", launcher in ("basic", "joblib"))
        code = 0
        with _letting_jobs_stop(notes / "stopped") if launcher == "joblib" else contextlib.nullcontext():
            try:
                hydra.main(config_path=str(config_folder()), config_name="train", version_base="1.3")(job)()
            except SystemExit:  # Hydra has printed what the launcher failed with
                code = 1
            except KeyboardInterrupt:
                code = Interrupted.exit_code
        rows = _rows(notes, jobs if own_jobs else [])
        _clear(notes)
    _print(rows, console)
    states = {row.state for row in rows}
    if "stopped" in states:
        code = Interrupted.exit_code
    sys.exit(code or int(not states <= GOOD))


def _busy(holder: str) -> None:
    raise ConfigError(f"this sweep is going on already, in {holder}: wait for its end")


def _clear(notes: Path) -> None:
    """Remove what jobs have noted down."""
    for file in [*notes.glob("*.json"), notes / "stopped"]:
        file.unlink(missing_ok=True)


def _check_launcher(name: str) -> None:
    """Refuse a launcher whose plugin isn't installed."""
    plugin, extra = EXTRAS.get(name, ("", ""))
    try:
        missing = bool(plugin) and importlib.util.find_spec(f"hydra_plugins.{plugin}") is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        raise ConfigError(f"launcher={name} needs a package: pip install 'cpql[{extra}]'")


def _plan(words: Sequence[str], every: bool) -> tuple[list[list[TrainConfig]], frozenset[str], Path]:
    """The runs of each job as Hydra's own sweeper makes them, checked before the first one starts.

    Args:
        words: of the command.
        every: all jobs; else the first one alone, as another sweeper chooses the values.

    Returns:
        Each job's runs, the keys that have one value in all jobs, and the folder of the sweep.
    """
    for word in words:
        if "=" not in word and not word.startswith("~"):
            check_words("train", [word])
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        try:
            parsed = {each.get_key_element(): each for each in parser.parse_overrides(list(words))}
            values = {
                key: [f"{key}={value}" for value in each.sweep_string_iterator()][: None if every else 1]
                if each.is_discrete_sweep()
                else [str(each.input_line)]
                for key, each in parsed.items()
                if every or each.is_discrete_sweep() or not each.is_sweep_override()
            }
        except HydraException as error:
            raise ConfigError(" ".join(str(error).split())) from None
        fixed = frozenset(key_of(key) for key, each in parsed.items() if not each.is_sweep_override())
        jobs = []
        for job in map(list, itertools.product(*values.values())):
            try:
                content = compose("train", job, return_hydra_config=True)
            except HydraException:
                GlobalHydra.instance().clear()
                check_words("train", job)  # says better what is wrong
                raise
            HydraConfig.instance().set_config(content)
            folder = Path(content.hydra.sweep.dir)
            with open_dict(content):
                del content["hydra"]
            jobs.append(runs_of(content, job, fixed))
            group_agent_config(jobs[-1])
    count = Counter(config.run_dir for job in jobs for config in job)
    if twice := [run for run, jobs_of_it in count.items() if jobs_of_it > 1]:
        raise ConfigError(
            f"two jobs have the folder {twice[0]}: expected values that differ, or another run_dir="
        )
    return jobs, fixed, folder


def _prepare(runs: Iterable[TrainConfig], console: Console) -> None:
    """Download or collect what the unfinished runs learn from, so that no job waits for another to do it."""
    wanted = {}
    for config in runs:
        if result_of(config) is None and (config.online is None or config.online.offline_fraction):
            d = config.dataset
            wanted[repr((config.env, d.source, d.path, d.id, d.size, d.seed))] = config
    for config in wanted.values():
        try:
            load_data(config, console)
        except CpqlError as error:  # which its jobs will report
            say(console, f"warning: {error}", "yellow")


@contextlib.contextmanager
def _letting_jobs_stop(stop: Path) -> Iterator[None]:
    """Leave the first Ctrl-C to the jobs, which get it too: they save, and no other starts."""

    def interrupt(number: int, frame: object) -> None:
        stop.touch()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _rows(notes: Path, jobs: Sequence[Sequence[TrainConfig]]) -> list[Row]:
    """What the jobs have noted down, in their order; a job without a note hasn't started."""
    found = {int(file.stem): json.loads(file.read_text()) for file in notes.glob("*.json")}
    rows = []
    for number in range(max([len(jobs), *(number + 1 for number in found)])):
        if number in found:
            rows += [Row(**row) for row in found[number]]
        elif number < len(jobs):
            rows += [Row(config.run_dir, "not started") for config in jobs[number]]
    return rows


def _print(rows: Sequence[Row], console: Console) -> None:
    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    for title in ("run", "state", "score", ""):
        table.add_column(title, overflow="fold", justify="right" if title == "score" else "left")
    for row in rows:
        score = "" if row.score is None else f"{row.score:,.1f}"
        table.add_row(*(Text(printable(cell)) for cell in (row.run, row.state, score, row.reason)))
    console.print(table, soft_wrap=False)
    counts = Counter(row.state for row in rows)
    parts = [
        f"{counts[state]} {' '.join([state, more]).strip()}"
        for state, more in STATES.items()
        if counts[state]
    ]
    say(console, f"{len(rows)} run{'s' * (len(rows) != 1)}: {', '.join(parts)}")
    if counts.keys() - GOOD:
        say(console, "the same command goes on with those that aren't finished")
