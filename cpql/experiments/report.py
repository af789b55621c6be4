"""The report: runs as one HTML file that fetches nothing.

It is a second way out of the tables of `cpql.experiments.tables`, which has all figures, beside what only a
run's folder tells: curves, values, time, films. `report.html.jinja` is the page.
"""

from __future__ import annotations

import base64
import datetime
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cpql.errors import CheckpointError, ConfigError, printable
from cpql.experiments import charts, tables
from cpql.experiments.figures import Figures, number
from cpql.experiments.history import FILMS, History, read_history
from cpql.experiments.results import Group, Row, find_runs, groups, read_run, rows
from cpql.io import versions

__all__ = ["Report", "render"]

FOLDER = Path(__file__).parent
FILM_BYTES, ALL_FILMS_BYTES = 3_000_000, 12_000_000
"""Larger films are named and not embedded; nor are more than these together."""
SELF_MADE = {
    "embedded": "collected by cpql's own behaviours",
    "regenerated": "made again by OGBench's oracles",
}

Command = Callable[[Mapping[str, Any]], Sequence[str] | None]


def render(
    words: Sequence[str],
    *,
    title: str | None = None,
    evaluation: str | None = None,
    command: Command = lambda settings: None,
) -> str:
    """The page of some runs.

    Args:
        words: as `find_runs` takes them.
        title: of the page; None names the agent and the task.
        evaluation: as `read_run` takes it.
        command: from a run's settings to the words after `train.py` that give them, or None.

    Raises:
        CheckpointError: there is no run, none has an evaluation, or a file is damaged; names it.
        ConfigError: jinja2 isn't installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ConfigError("the report needs a package: pip install 'cpql[report]'") from None

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else printable(str(value))

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=shown,
    )
    environment.filters |= {"drawn": Markup, "number": number, "estimate": _estimate, "duration": _duration}
    content = Report(words, evaluation).content(command)
    return environment.get_template("report.html.jinja").render(content, title=title or content["title"])


class Report:
    """What a page shows, as plain values and charts.

    Args:
        words: as `find_runs` takes them.
        evaluation: as `read_run` takes it.

    Raises:
        CheckpointError: see `render`.
    """

    def __init__(self, words: Sequence[str], evaluation: str | None = None) -> None:
        self.words, self.evaluation = words, evaluation
        folders = find_runs(words)
        results = {folder: read_run(folder, evaluation) for folder in folders}
        self.histories = {folder: read_history(folder) for folder in folders}
        self.found = rows(result for result in results.values() if result is not None)
        self.unscored = [h for h in self.histories.values() if results[h.folder] is None]
        if not self.found and not any(history.points for history in self.unscored):
            raise CheckpointError(f"{', '.join(words)}: no run has an evaluation: {len(folders)} found")
        self.groups = groups(self.found)
        names = [row.agent for row in self.found] + [h.agent for h in self.unscored]
        self.agents = {name: number for number, name in enumerate(dict.fromkeys(sorted(names)))}
        left_out = [str(history.folder) for history in self.unscored]
        none: list[tables.Comparisons] = [{} for _ in self.groups]
        self.plain = tables.plain(self.found, self.groups, none, left_out)
        self.everything = self.found, self.groups, none, left_out
        self.figures = Figures(self.found, self.histories, self.unscored, self.agents)

    def content(self, command: Command) -> dict[str, Any]:
        """All that the template needs, by the names that it has there."""
        tasks = sorted({row.task for row in self.found} | {history.task for history in self.unscored})
        agents = {row.configuration for row in self.found} | {history.agent for history in self.unscored}
        return {
            "title": f"{_one(agents, 'agents')} on {_one(tasks, 'tasks')}",
            "date": datetime.date.today().isoformat(),
            "versions": versions("cpql"),
            "counts": {
                "finished runs": len(self.histories) - len(self.unscored),
                "unfinished": len(self.unscored),
                "tasks": len(tasks),
                "agents": len(agents),
                "seeds": len({history.seed for history in self.histories.values()}),
            },
            "data": self._data(),
            "packages": self._packages(),
            "warnings": [*self._apart(), *tables.warnings(*self.everything)],
            "remarks": tables.remarks(self.found, self.groups) if self.found else [],
            "agents": [self._key(name) for name in self.agents],
            "groups": [self._group(*pair) for pair in zip(self.groups, self.plain["groups"], strict=True)],
            "rows": [self._row(*pair) for pair in zip(self.found, self.plain["rows"], strict=True)],
            "curves": self.figures.curves(),
            "returns": self.figures.returns(),
            "values": self.figures.values(),
            "published": self._published(),
            "films": self._films(),
            "runs": [self._run(row, history, command) for row, history in self._each()],
            "commands": [
                shlex.join(["python", f"scripts/{script}.py", *self.words, *self._option()])
                for script in ("report", "results")
            ],
        }

    def _option(self) -> list[str]:
        return [] if self.evaluation is None else ["--evaluation", self.evaluation]

    def _each(self) -> list[tuple[Row | None, History]]:
        """Every run with its row, unfinished ones last."""
        finished = [(row, self.histories[run.folder]) for row in self.found for run in row.runs]
        return [*finished, *((None, history) for history in self.unscored)]

    def _key(self, name: str) -> dict[str, str]:
        return {"name": name, "key": charts.key(self.agents[name])}

    def _data(self) -> list[dict[str, Any]]:
        """Each dataset once, with the tasks that it is of."""
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for history in self.histories.values():
            if history.data:
                data = history.data
                name = (history.task, data["source"], data["id"], data["sha256"] or "")
                found.setdefault(name, {**data, "task": history.task, "made": SELF_MADE.get(data["source"])})
        return [found[name] for name in sorted(found)]

    def _packages(self) -> dict[str, str]:
        """Of each package the versions that runs had, with the number of runs where there are several."""
        every: dict[str, Counter[str]] = {}
        for row in self.found:
            for run in row.runs:
                for package, version in run.versions.items():
                    every.setdefault(package, Counter())[version] += 1
        return {
            package: next(iter(counts))
            if len(counts) == 1
            else ", ".join(f"{version} ({count})" for version, count in sorted(counts.items()))
            for package, counts in every.items()
        }

    def _apart(self) -> list[str]:
        """Warnings that no table has: data that isn't the benchmark's, and versions that differ."""
        made: dict[str, list[str]] = {}
        for data in self._data():
            if data["made"]:
                made.setdefault(data["source"], []).append(data["task"])
        lines = [
            f"{source} data, {SELF_MADE[source]}: {', '.join(dict.fromkeys(where))}; these scores don't "
            "belong beside published ones"
            for source, where in made.items()
        ]
        several = [f"{name} {text}" for name, text in self._packages().items() if "(" in text]
        return lines + [f"different versions (with the number of runs): {text}" for text in several]

    def _keys(self, group: Group) -> list[dict[str, str]]:
        return [self._key(agent) for agent in sorted({row.agent for row in group.rows})]

    def _group(self, group: Group, plain: Mapping[str, Any]) -> dict[str, Any]:
        """The table of a group as a paper has it, and its comparison where there is something to compare.

        The highest mean of a task is the best where all its rows were scored under the same conditions.
        """
        agents = self._keys(group)
        by_agent = [group.of(agent["name"]) for agent in agents]
        lines = []
        for task in group.tasks:
            own = [of.get(task) for of in by_agent]
            records = [None if row is None else tables.record(row) for row in own]
            alike = not any(line.startswith(f"{task}: ") for line in group.apart()) and len(own) > 1
            best = max(each["mean"] for each in records if each is not None) if alike else None
            behaviours = {each["behaviour"] for each in records if each is not None}
            lines.append(
                {
                    "task": task,
                    "cells": [each and {**each, "best": each["mean"] == best} for each in records],
                    "behaviour": behaviours.pop() if len(behaviours) == 1 else None,
                }
            )
        complete = plain["agents"]
        names = [name for name in tables.STATISTICS if name != "median" or len(group.tasks) > 1]
        return {
            "scale": group.scale,
            "tasks": group.tasks,
            "agents": agents,
            "lines": lines,
            "statistics": {
                name: [complete.get(agent["name"], {}).get(name) for agent in agents] for name in names
            },
            **(self._comparison(group, plain) if len(agents) > 1 else {}),
        }

    def _comparison(self, group: Group, plain: Mapping[str, Any]) -> dict[str, Any]:
        agents, drawn = [key["name"] for key in self._keys(group)], self.figures.intervals(plain)
        pairs = {against: tables.comparisons(group, against) for against in agents}
        return {
            "intervals": [
                {**self._key(agent), **figures, "drawn": drawn.get(agent, "")}
                for agent, figures in plain["agents"].items()
            ],
            "profile": self.figures.profile(plain),
            "improvement": [
                {
                    **self._key(agent),
                    "cells": [
                        None if agent == other else tables.plain_comparison(agent, pairs[other][agent])
                        for other in agents
                    ],
                }
                for agent in agents
            ],
        }

    def _row(self, row: Row, plain: Mapping[str, Any]) -> dict[str, Any]:
        bests = [best for run in row.runs if (best := self.histories[run.folder].best)]
        mean = float(np.mean([score for score, _ in bests])) if bests and not row.reason else None
        scores = [run["score"] for run in plain["runs"]]
        return {**plain, **self._key(row.agent), "scores": scores, "best": mean}

    def _published(self) -> list[dict[str, Any]]:
        """Published scores of the tasks whose runs have the same data, with ours beside them."""
        found = []
        for table in yaml.safe_load((FOLDER / "published.yaml").read_text(encoding="utf-8")):
            lines = []
            for task, scores in table["scores"].items():
                data = table["data"].format(task=task) + " "
                same = [
                    row
                    for row in self.found
                    if row.task == task and not row.reason and row.runs[0].conditions["data"].startswith(data)
                ]
                if same:
                    of = {row.configuration.removesuffix("_published"): tables.record(row) for row in same}
                    pairs = zip(table["agents"], scores, strict=True)
                    lines += [{"task": task, "agent": a, "score": s, "ours": of.get(a)} for a, s in pairs]
            if lines:
                found.append({"source": table["source"], "lines": lines})
        return found

    def _films(self) -> list[dict[str, Any]]:
        """The films in runs' folders: the smaller ones as data, the others by name."""
        found, left = [], ALL_FILMS_BYTES
        for row, history in self._each():
            agent = row.agent if row else history.agent
            for film in history.films:
                size, kind, source = film.stat().st_size, FILMS[film.suffix], ""
                if size <= min(FILM_BYTES, left):
                    left -= size
                    source = f"data:{kind};base64,{base64.b64encode(film.read_bytes()).decode()}"
                film_of = f"{agent} on {history.task}, seed {history.seed}: {film.stem.replace('_', ' ')}"
                found.append({"of": film_of, "file": film, "kind": kind.partition("/")[0], "source": source})
        return found

    def _run(
        self,
        row: Row | None,
        history: History,
        command: Command,
    ) -> dict[str, Any]:
        agent = row.agent if row else history.agent
        score = {run.folder: run.score for run in row.runs}[history.folder] if row else None
        words, commands = command(history.config), {}
        if words is not None:
            commands["train"] = shlex.join(["python", "scripts/train.py", *words])
        if row and history.evaluation and self.evaluation is None:
            options = [f"{key}={value}" for key, value in history.evaluation.items()]
            where = f"checkpoint={history.folder}"
            commands["score again"] = shlex.join(["python", "scripts/evaluate.py", where, *options])
        return {
            **self._key(agent),
            "history": history,
            "score": score,
            "spark": self.figures.sparkline(agent, history),
            "commands": commands,
        }


def _one(names: Collection[str], many: str) -> str:
    return next(iter(names)) if len(names) == 1 else f"{len(names)} {many}"


def _estimate(value: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A figure of the JSON with its interval."""
    if value is None:
        return "–"
    text = number(value["value"], digits)
    if value["interval"] is None:
        return text
    low, high = (number(end, digits) for end in value["interval"])
    return f"{text} [{low}, {high}]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
