"""The tables over finished runs: lines of text for people, plain values for programs.

Whatever shows results, a terminal, a file or the report, takes its figures from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpql.experiments import statistics
from cpql.experiments.results import Comparison, Group, Result, Row, compare
from cpql.experiments.statistics import Estimate

__all__ = [
    "STATISTICS",
    "Comparisons",
    "Section",
    "aggregates",
    "compared",
    "comparisons",
    "plain",
    "plain_comparison",
    "record",
    "remarks",
    "scores",
    "warnings",
]

STATISTICS = {"IQM": statistics.iqm, "mean": statistics.mean, "median": statistics.median}
THRESHOLDS = 51  # of a performance profile

Section = tuple[str, list[list[str]]]
"""A title, and the lines of a table with its head first."""

Comparisons = Mapping[str, Comparison]
"""By the agent that is compared with another one."""


def comparisons(group: Group, against: str | None) -> Comparisons:
    """Every other agent of a group compared with one; nothing where the group doesn't have that one."""
    if against is None or not group.of(against):
        return {}
    agents = dict.fromkeys(row.agent for row in group.rows)
    return {agent: compare(group, agent, against) for agent in agents if agent != against}


def scores(found: Sequence[Row]) -> Section:
    """A line for each row: its mean and standard deviation over seeds."""
    lines = [["task", "agent", "score", "seeds", "settings", "behaviour"]]
    for row in found:
        spread = f" ± {row.scores.std(ddof=1):.1f}" if len(row.runs) > 1 else ""
        score = "not averaged" if row.reason else f"{row.scores.mean():,.1f}{spread}"
        behaviour = row.runs[0].behaviour
        data = "" if row.reason else "unknown" if behaviour is None else f"{behaviour:,.1f}"
        lines.append([row.task, row.agent, score, str(len(row.runs)), str(row.tried), data])
    return "last checkpoint, mean ± standard deviation between seeds", lines


def aggregates(group: Group) -> Section:
    """A line for each agent that has all tasks of a group: its statistics over them."""
    lines = [["agent", *STATISTICS]]
    for agent, own in group.complete.items():
        lines.append([agent, *(_cell(statistics.estimate(kind, own)) for kind in STATISTICS.values())])
    return f"{group.scale}, over {_tasks(group.tasks)} [95% interval]", lines


def compared(title: str, by_agent: Comparisons) -> Section:
    """A line for each agent that was compared with one."""
    lines = [["agent", "difference by seed", "pairs", "probability of improvement", "tasks"]]
    for agent, each in by_agent.items():
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


def warnings(
    found: Sequence[Row], together: Sequence[Group], by_group: Sequence[Comparisons], left_out: Sequence[str]
) -> list[str]:
    """What keeps runs from being averaged or compared, in a line each.

    Args:
        found: all rows.
        together: their groups.
        by_group: the comparisons that are shown of each group.
        left_out: runs without a score.
    """
    lines = [f"not averaged: {row.task}, {row.agent}: {row.reason}" for row in found if row.reason]
    for group, by_agent in zip(together, by_group, strict=True):
        lacking = sorted({row.agent for row in group.rows} - group.complete.keys())
        if lacking:
            lines.append(
                f"no figures over {_tasks(group.tasks)}, as runs of some are missing: {', '.join(lacking)}"
            )
        lines += [f"not under the same conditions: {difference}" for difference in group.apart()]
        lines += [f"not compared: {task}" for each in by_agent.values() for task in each.left_out]
    if left_out:
        lines.append(f"not finished or not evaluated, left out: {', '.join(left_out)}")
    return lines


def remarks(found: Sequence[Row], together: Sequence[Group]) -> list[str]:
    """How the figures came about, in a line each."""
    lines = []
    for group in together:
        for (task, agent), best in group.expected_best().items():
            values = ", ".join(f"{value:,.1f}" for value in best)
            lines.append(f"expected best of 1 to {len(best)} settings: {task}, {agent}: {values}")
    conditions: dict[str, list[str]] = {}
    for row in found:
        if not row.reason:
            how = row.runs[0].conditions
            text = f"{how['episodes']} episodes, {how['rule of acting']}"
            conditions.setdefault(text, []).append(row.agent)
    for text, where in conditions.items():
        lines.append(
            f"scored by {text}" + ("" if len(conditions) == 1 else f": {', '.join(dict.fromkeys(where))}")
        )
    lines.append("settings: the number of settings of the configuration among the given runs of the task")
    if any(len(row.runs) == 1 for row in found):
        lines.append("an interval needs two seeds of every task")
    return lines


def record(row: Row) -> dict[str, Any]:
    """A row as plain values; those that its runs don't share are None where they can't be averaged."""
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


def plain(
    found: Sequence[Row], together: Sequence[Group], by_group: Sequence[Comparisons], left_out: Sequence[str]
) -> dict[str, Any]:
    """Everything as JSON-able values; the arguments are those of `warnings`."""
    return {
        "rows": [
            {
                **record(row),
                "IQM": None if row.reason else _plain(statistics.estimate(statistics.iqm, [row.scores])),
                "runs": [_run_record(run) for run in row.runs],
            }
            for row in found
        ],
        "groups": [_group_record(*each) for each in zip(together, by_group, strict=True)],
        "left_out": list(left_out),
    }


def _run_record(run: Result) -> dict[str, Any]:
    names = ("seed", "score", "returns", "conditions", "settings", "versions")
    return {"folder": str(run.folder), **{name: getattr(run, name) for name in names}}


def _group_record(group: Group, by_agent: Comparisons) -> dict[str, Any]:
    every = np.concatenate([row.scores for row in group.rows])
    thresholds = np.linspace(np.floor(every.min()), np.ceil(every.max()), THRESHOLDS)
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
        "comparisons": [plain_comparison(agent, each) for agent, each in by_agent.items()],
    }


def plain_comparison(agent: str, each: Comparison) -> dict[str, Any]:
    """A comparison as JSON-able values."""
    return {
        "agent": agent,
        "tasks": each.tasks,
        "pairs": each.pairs,
        "difference": _plain(each.difference),
        "probability_of_improvement": _plain(each.improvement),
        "left_out": each.left_out,
    }


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    value, low, high = (each.tolist() for each in (estimate.value, estimate.low, estimate.high))
    return {"value": value, "interval": None if np.isnan(estimate.low).any() else [low, high]}
