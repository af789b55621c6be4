"""Finished and unfinished runs as one HTML file: tables, curves, comparisons, and every run's command.

    python scripts/report.py runs
    python scripts/report.py 'runs/hopper-*' other/runs --out hopper.html --title 'Hopper'

The file needs nothing else, so it can be sent by itself. docs/report.md says what it shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cpql.commands import words
from cpql.errors import errors_in_one_line, escape_unknown_characters, printable
from cpql.experiments.report import render
from cpql.io import write_text
from cpql.results_cli import runs_parser

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: after an error, with its exit code.
    """
    escape_unknown_characters()
    options = _parser().parse_args(arguments)
    with errors_in_one_line(options.traceback):
        page = render(options.runs, title=options.title, evaluation=options.evaluation, command=words)
        write_text(options.out, page)
        print(printable(f"{options.out} ({len(page.encode()) / 1e6:,.1f} MB)"))


def _parser() -> argparse.ArgumentParser:
    parser = runs_parser("report.py", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    add("--title", help="of the page (default: agent and task, or how many there are)")
    return parser
