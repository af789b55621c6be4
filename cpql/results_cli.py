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

import numpy as np
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
from cpql.experiments import statistics
from cpql.experiments.results import Comparison, Group, Row, compare, find_runs, groups, read_run, rows
from cpql.experiments.statistics import Estimate
from cpql.io import write_text

__all__ = ["main"]

STATISTICS = {"IQM": statistics.iqm, "mean": statistics.mean, "median": statistics.median}
THRESHOLDS = 51  # of a performance profile

Section = tuple[str, list[list[str]]]
"""A title, and the lines of a table with its head first."""

Comparisons = dict[str, Comparison]
"""By the agent that is compared with the one of --against."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: after an error, with its exit code.
    """
    escape_unknown_characters()
    options = _parser().parse_args(arguments)
    with errors_in_one_line(options.traceback):
        _run(options)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="results.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder, a folder that holds runs, or a pattern")
    add("--against", metavar="AGENT", help="compare every other agent with this one, as the table names it")
    add(
        "--evaluation",
        metavar="NAME",
        help="the scores of this file of cpql-evaluate's beside each last checkpoint, such as "
        "evaluation_100_1000.json (default: those at the end of the training)",
    )
    for name, what in (("csv", "a line for each row"), ("markdown", "the tables"), ("json", "everything")):
        add(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")
    add("--traceback", action="store_true", help="show where an error came from")
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
    comparisons = [_comparisons(group, against) for group in together]
    sections = [_scores(found)]
    for group, compared in zip(together, comparisons, strict=True):
        sections += [_aggregates(group), _compared(f"{group.scale}, against {against}", compared)]
    sections = [section for section in sections if len(section[1]) > 1]
    left_out = [str(folder) for folder, result in read.items() if result is None]
    notes = _notes(found, together, comparisons, left_out)
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
        "csv": lambda: _csv([_record(row) for row in found]),
        "markdown": lambda: _markdown(sections, notes),
        "json": lambda: _json(found, together, comparisons, left_out),
    }
    for name, text in content.items():
        if file := getattr(options, name):
            write_text(file, text())


def _comparisons(group: Group, against: str | None) -> Comparisons:
    if against is None or not group.of(against):
        return {}
    agents = dict.fromkeys(row.agent for row in group.rows)
    return {agent: compare(group, agent, against) for agent in agents if agent != against}


def _scores(found: list[Row]) -> Section:
    lines = [["task", "agent", "score", "seeds", "settings", "behaviour"]]
    for row in found:
        spread = f" ± {row.scores.std(ddof=1):.1f}" if len(row.runs) > 1 else ""
        score = "not averaged" if row.reason else f"{row.scores.mean():,.1f}{spread}"
        behaviour = row.runs[0].behaviour
        data = "" if row.reason else "unknown" if behaviour is None else f"{behaviour:,.1f}"
        lines.append([row.task, row.agent, score, str(len(row.runs)), str(row.tried), data])
    return "last checkpoint, mean ± standard deviation between seeds", lines


def _aggregates(group: Group) -> Section:
    lines = [["agent", *STATISTICS]]
    for agent, scores in group.complete.items():
        lines.append([agent, *(_cell(statistics.estimate(kind, scores)) for kind in STATISTICS.values())])
    return f"{group.scale}, over {_tasks(group.tasks)} [95% interval]", lines


def _compared(title: str, comparisons: Comparisons) -> Section:
    lines = [["agent", "difference by seed", "pairs", "probability of improvement", "tasks"]]
    for agent, each in comparisons.items():
        figures = _cell(each.difference), str(each.pairs), _cell(each.improvement, 2), str(len(each.tasks))
        lines.append([agent, *figures])
    return f"{title} [95% interval]", lines


def _tasks(tasks: tuple[str, ...]) -> str:
    return tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"


def _cell(estimate: Estimate | None, digits: int = 1) -> str:
    if estimate is None:
        return "none"
    if np.isnan(estimate.low):
        return f"{estimate.value:,.{digits}f}"
    return f"{estimate.value:,.{digits}f} [{estimate.low:,.{digits}f}, {estimate.high:,.{digits}f}]"


def _notes(
    found: list[Row], together: list[Group], comparisons: list[Comparisons], left_out: list[str]
) -> list[str]:
    """What the tables don't show."""
    notes = [f"not averaged: {row.task}, {row.agent}: {row.reason}" for row in found if row.reason]
    for group, compared in zip(together, comparisons, strict=True):
        lacking = sorted({row.agent for row in group.rows} - group.complete.keys())
        if lacking:
            notes.append(
                f"no figures over {_tasks(group.tasks)}, as runs of some are missing: {', '.join(lacking)}"
            )
        notes += [f"not under the same conditions: {difference}" for difference in group.apart()]
        for (task, agent), best in group.expected_best().items():
            values = ", ".join(f"{value:,.1f}" for value in best)
            notes.append(f"expected best of 1 to {len(best)} settings: {task}, {agent}: {values}")
        notes += [f"not compared: {task}" for each in compared.values() for task in each.left_out]
    if left_out:
        notes.append(f"not finished or not evaluated, left out: {', '.join(left_out)}")
    conditions: dict[str, list[str]] = {}
    for row in found:
        if not row.reason:
            how = row.runs[0].conditions
            text = f"{how['episodes']} episodes, {how['rule of acting']}"
            conditions.setdefault(text, []).append(row.agent)
    for text, where in conditions.items():
        notes.append(
            f"scored by {text}" + ("" if len(conditions) == 1 else f": {', '.join(dict.fromkeys(where))}")
        )
    notes.append("settings: the number of settings of the configuration among the given runs of the task")
    if any(len(row.runs) == 1 for row in found):
        notes.append("an interval needs two seeds of every task")
    return notes


def _record(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    averaged, first = not row.reason, row.runs[0]
    return {
        "task": row.task,
        "agent": row.agent,
        "scale": first.scale,
        "mean": float(row.scores.mean()) if averaged else None,
        "std": float(row.scores.std(ddof=1)) if averaged and len(row.runs) > 1 else None,
        "seeds": " ".join(str(run.seed) for run in row.runs),
        "settings_tried": row.tried,
        "behaviour": first.behaviour if averaged else None,
        **({name.replace(" ", "_"): text if averaged else None for name, text in first.conditions.items()}),
        "not_averaged": row.reason or None,
    }


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


def _json(
    found: list[Row], together: list[Group], comparisons: list[Comparisons], left_out: list[str]
) -> str:
    plain = {
        "rows": [{**_record(row), "runs": [_run_record(run) for run in row.runs]} for row in found],
        "groups": [_group_record(*each) for each in zip(together, comparisons, strict=True)],
        "left_out": left_out,
    }
    return json.dumps(plain, indent=2, allow_nan=False) + "\n"


def _run_record(run: Any) -> dict[str, Any]:
    names = ("seed", "score", "returns", "conditions", "settings", "versions")
    return {"folder": str(run.folder), **{name: getattr(run, name) for name in names}}


def _group_record(group: Group, comparisons: Comparisons) -> dict[str, Any]:
    scores = np.concatenate([row.scores for row in group.rows])
    thresholds = np.linspace(np.floor(scores.min()), np.ceil(scores.max()), THRESHOLDS)
    return {
        "scale": group.scale,
        "tasks": group.tasks,
        "thresholds": thresholds.tolist(),
        "agents": {
            agent: {
                **{name: _plain(statistics.estimate(kind, own)) for name, kind in STATISTICS.items()},
                "profile": _plain(statistics.profile(own, thresholds)),
            }
            for agent, own in group.complete.items()
        },
        "expected_best": [
            {"task": task, "agent": agent, "score_by_number_of_settings": best.tolist()}
            for (task, agent), best in group.expected_best().items()
        ],
        "comparisons": [
            {
                "agent": agent,
                "tasks": each.tasks,
                "pairs": each.pairs,
                "difference": _plain(each.difference),
                "probability_of_improvement": _plain(each.improvement),
                "left_out": each.left_out,
            }
            for agent, each in comparisons.items()
        ],
    }


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    value, low, high = (each.tolist() for each in (estimate.value, estimate.low, estimate.high))
    return {"value": value, "interval": None if np.isnan(estimate.low).any() else [low, high]}
