"""The charts of a report: what of runs and rows is drawn, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cpql.experiments import charts
from cpql.experiments.charts import Line, Strip
from cpql.experiments.history import History
from cpql.experiments.results import Row

__all__ = ["Figures", "number"]

CURVE_POINTS = 120
"""What a line over training has at most."""

Panels = list[dict[str, str]]
"""A chart for each task, with the `task`, the `scale` if that matters, and the `chart`."""


@dataclass(frozen=True)
class Figures:
    """Charts with one colour an agent.

    Attributes:
        found: all rows.
        histories: of all runs, by folder.
        unscored: of the runs that are in no row.
        agents: each agent's number.
    """

    found: Sequence[Row]
    histories: Mapping[Path, History]
    unscored: Sequence[History]
    agents: Mapping[str, int]

    def curves(self) -> Panels:
        """Scores over training."""
        return self._panels(self._curves)

    def values(self) -> Panels:
        """The critic's values of the data's actions over training, where there is a critic."""
        return self._panels(self._values)

    def _panels(self, draw: Callable[[str, list[Row], list[History]], str]) -> Panels:
        every: dict[tuple[str, str], tuple[list[Row], list[History]]] = {}
        for row in self.found:
            every.setdefault((row.task, row.runs[0].scale), ([], []))[0].append(row)
        for history in self.unscored:
            if history.points:
                every.setdefault((history.task, history.scale), ([], []))[1].append(history)
        drawn = ((task, scale, draw(scale, *own)) for (task, scale), own in sorted(every.items()))
        return [{"task": task, "scale": scale, "chart": chart} for task, scale, chart in drawn if chart]

    def _named(
        self, own: Iterable[Row], unscored: Iterable[History]
    ) -> Iterable[tuple[str, int, bool, list[History]]]:
        """What a chart has a line for: name, agent's number, whether it is unfinished, the runs."""
        for row in own:
            agent, runs = self.agents[row.agent], [self.histories[run.folder] for run in row.runs]
            if row.reason:  # each by itself
                yield from ((f"{row.agent}, {run.folder}", agent, False, [run]) for run in runs)
            else:
                yield row.agent, agent, False, runs
        by_agent: dict[str, list[History]] = {}
        for history in unscored:
            by_agent.setdefault(history.agent, []).append(history)
        for name, runs in by_agent.items():
            yield f"{name}, unfinished", self.agents[name], True, runs

    def _curves(self, scale: str, own: list[Row], unscored: list[History]) -> str:
        lines: list[Line] = []
        for name, agent, faint, runs in self._named(own, unscored):
            points = [{point.step: point.score for point in run.points} for run in runs]
            lines += _over_seeds(name, agent, faint, points)
        if not lines:
            return ""
        every = [self.histories[run.folder] for row in own for run in row.runs] + unscored
        behaviours = {run.behaviour for run in every}
        return charts.lines(
            lines,
            title="scores over training",
            x_label="updates",
            y_label=_unit(scale),
            references=_named("behaviour", behaviours),
        )

    def _values(self, scale: str, own: list[Row], unscored: list[History]) -> str:
        lines: list[Line] = []
        references = set[float | None]()
        for name, agent, faint, runs in self._named(own, unscored):
            with_critic = [run for run in runs if "critic/q" in run.metrics]
            columns = [(run.metrics["step"], run.metrics["critic/q"]) for run in with_critic]
            points = [dict(zip(steps.tolist(), q.tolist(), strict=True)) for steps, q in columns]
            lines += [_thinned(line) for line in _over_seeds(name, agent, faint, points)]
            references |= {run.value_of_data for run in with_critic}
        if not lines:
            return ""
        return charts.lines(
            lines,
            title="values over training",
            x_label="updates",
            y_label="mean Q of the data's actions",
            references=[
                (f"endless data {number(value)}", value) for value in references if value is not None
            ],
        )

    def returns(self) -> Panels:
        """The returns of all episodes that scores are made of."""
        by_task: dict[str, list[Row]] = {}
        for row in self.found:
            by_task.setdefault(row.task, []).append(row)
        panels = []
        for task, own in by_task.items():
            strips = [
                Strip(row.agent, self.agents[row.agent], [run.returns for run in row.runs]) for row in own
            ]
            data = {self.histories[run.folder].data.get("return_mean") for row in own for run in row.runs}
            chart = charts.strips(
                strips,
                title="returns of episodes",
                x_label="return of an episode",
                references=[
                    (f"the data's mean {number(value)}", value) for value in data if value is not None
                ],
            )
            panels.append({"task": task, "scale": "", "chart": chart})
        return panels

    def intervals(self, plain: Mapping[str, Any]) -> dict[str, str]:
        """Each agent's IQM of a group with its interval, drawn; `plain` is the group in the JSON file."""
        every = {agent: figures["IQM"] for agent, figures in plain["agents"].items()}
        ends = [end for each in every.values() for end in (each["interval"] or [each["value"]])]
        if not ends or min(ends) == max(ends):
            return {}
        span = min(ends), max(ends)
        return {
            agent: charts.interval(each["value"], each["interval"], span, self.agents[agent])
            for agent, each in every.items()
        }

    def profile(self, plain: Mapping[str, Any]) -> str:
        """The performance profiles of a group; empty where no agent has all tasks."""
        lines = []
        for name, figures in plain["agents"].items():
            shares = figures["profile"]
            low, high = shares["interval"] or (None, None)
            agent, thresholds = self.agents[name], plain["thresholds"]
            lines.append(Line(name, agent, thresholds, shares["value"], low, high, steps=True))
        if not lines:
            return ""
        return charts.lines(
            lines,
            title="performance profile",
            x_label=_unit(plain["scale"]),
            y_label="share of runs above",
            y_span=(0.0, 1.0),
        )

    def sparkline(self, agent: str, history: History) -> str:
        """A run's scores over training; empty without two of them."""
        steps, scores = [p.step for p in history.points], [p.score for p in history.points]
        return charts.sparkline(steps, scores, self.agents[agent]) if len(steps) > 1 else ""


def _over_seeds(name: str, agent: int, faint: bool, runs: Sequence[Mapping[Any, float]]) -> list[Line]:
    """The mean over runs of values by step, where all have one, in a band from the lowest to the highest."""
    common = sorted(set.intersection(*map(set, runs))) if runs else []
    if not common:
        return []
    values = np.array([[run[step] for step in common] for run in runs])
    known = np.isfinite(values).all(0)
    steps, values = np.array(common)[known], values[:, known]
    if not len(steps):
        return []
    low, high = (values.min(0), values.max(0)) if len(runs) > 1 else (None, None)
    return [Line(name, agent, steps, values.mean(0), low, high, faint)]


def _thinned(line: Line) -> Line:
    """A line through the means of neighbouring points, where there are many."""
    count = len(np.asarray(line.x))
    pieces = np.array_split(np.arange(count), min(CURVE_POINTS, count))

    def means(values: ArrayLike | None) -> ArrayLike | None:
        return None if values is None else [np.asarray(values)[piece].mean() for piece in pieces]

    x, y, low, high = map(means, (line.x, line.y, line.low, line.high))
    assert x is not None and y is not None
    return replace(line, x=x, y=y, low=low, high=high)


def _named(name: str, values: Iterable[float | None]) -> list[tuple[str, float]]:
    """References of one name that differ in their values, those that are known."""
    return [(name, value) for value in sorted(value for value in values if value is not None)]


def _unit(scale: str) -> str:
    return "return" if "return" in scale else scale.partition(",")[0]


def number(value: float | None, digits: int = 1) -> str:
    """A number as the page shows it."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")
