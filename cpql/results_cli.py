"""Put finished runs beside one another: a table of scores, and statistics over tasks and seeds.

    python scripts/results.py runs
    python scripts/results.py 'runs/hopper-*' other/runs --against td3_bc --markdown results.md

Runs are averaged over seeds where they have one task, one configuration of the agent and the same settings,
data, number of episodes and rule of acting. docs/statistics.md says what each number means.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpql.errors import (
    CheckpointError,
    ConfigError,
    did_you_mean,
    errors_in_one_line,
    escape_unknown_characters,
    printable,
)
from cpql.experiments import tables
from cpql.experiments.results import find_runs, groups, read_run, rows
from cpql.experiments.tables import Section
from cpql.io import write_text

__all__ = ["main", "runs_parser"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: after an error, with its exit code.
    """
    escape_unknown_characters()
    options = _parser().parse_args(arguments)
    with errors_in_one_line(options.traceback):
        _run(options)


def runs_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The options of the commands about runs: which, scored by which evaluation."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder, a folder that holds runs, or a pattern")
    add(
        "--evaluation",
        metavar="NAME",
        help="the scores of this file of cpql-evaluate's beside each last checkpoint, such as "
        "evaluation_100_1000.json (default: those at the end of the training)",
    )
    add("--traceback", action="store_true", help="show where an error came from")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = runs_parser("results.py", __doc__)
    add = parser.add_argument
    add("--against", metavar="AGENT", help="compare every other agent with this one, as the table names it")
    for name, what in (("csv", "a line for each row"), ("markdown", "the tables"), ("json", "everything")):
        add(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")
    return parser


def _run(options: argparse.Namespace) -> None:
    folders = find_runs(options.runs)
    read = {folder: read_run(folder, options.evaluation) for folder in folders}
    found = rows(result for result in read.values() if result is not None)
    if not found:
        raise CheckpointError(
            f"{', '.join(options.runs)}: no run is finished and evaluated: {len(read)} found"
        )
    together = groups(found)
    agents = {row.agent for row in found}
    if options.against and options.against not in agents:
        raise ConfigError(
            f"--against={options.against}: no such agent: {did_you_mean(options.against, agents)}"
        )
    against = options.against
    compared = [tables.comparisons(group, against) for group in together]
    sections = [tables.scores(found)]
    for group, by_agent in zip(together, compared, strict=True):
        title = f"{group.scale}, against {against}"
        sections += [tables.aggregates(group), tables.compared(title, by_agent)]
    sections = [section for section in sections if len(section[1]) > 1]
    left_out = [str(folder) for folder, result in read.items() if result is None]
    everything = found, together, compared, left_out
    notes = [*tables.warnings(*everything), *tables.remarks(found, together)]
    console = Console()
    for title, (head, *lines) in sections:
        table = Table(header_style="bold", show_edge=False, pad_edge=False)
        for column in head:
            table.add_column(column, overflow="fold")
        for line in lines:
            table.add_row(*(Text(printable(cell)) for cell in line))
        console.print(Text(printable(title), "bold"), table, "")
    for note in notes:
        console.print(Text(printable(note)))
    content: dict[str, Callable[[], str]] = {
        "csv": lambda: _csv([tables.record(row) for row in found]),
        "markdown": lambda: _markdown(sections, notes),
        "json": lambda: json.dumps(tables.plain(*everything), indent=2, allow_nan=False) + "\n",
    }
    for name, text in content.items():
        if file := getattr(options, name):
            write_text(file, text())


def _csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _markdown(sections: list[Section], notes: list[str]) -> str:
    blocks = []
    for title, (head, *lines) in sections:
        cells = [head, ["---"] * len(head), *lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
        blocks.append(f"**{title}**\n\n{table}")
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in notes)]) + "\n"
