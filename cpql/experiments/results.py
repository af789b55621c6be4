"""Finished runs read from their folders, and what may be averaged of them.

A folder is all there is of a run: there is no database, and folders from several machines are merged by
being given together. Statistics are those of `cpql.experiments.statistics`.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cpql.agents import AGENTS
from cpql.errors import CheckpointError, brief
from cpql.experiments.statistics import Estimate, Scores, estimate, expected_best, improvement, mean
from cpql.migration import upgrade
from cpql.settings import flat
from cpql.training.config import DatasetConfig

__all__ = [
    "Comparison",
    "Group",
    "Result",
    "Row",
    "compare",
    "find_runs",
    "groups",
    "read_run",
    "rows",
    "scale_of",
]

SHARED = ("data", "environment", "references", "episodes")
"""Conditions in which agents that are compared may not differ; the rule of acting is an agent's own."""

IDENTITY = {f"dataset.{key}" for key in ("source", "path", "id", "size", "seed")}
"""Settings of a dataset that say which it is, not how it is used: results have its checksum instead."""

DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError)
"""What reading a file raises that isn't what a run wrote."""


@dataclass(frozen=True)
class Result:
    """What a finished run's last checkpoint scored.

    Attributes:
        folder: the run's.
        task: its name.
        agent: name of the agent's configuration.
        seed: of the training.
        settings: that the result depends on, as text by dotted name; without the seed.
        score: normalised, in percent; the mean return where the task has no references.
        returns: of each episode, undiscounted.
        behaviour: the data's score, in the same unit; None if unknown.
        conditions: what has to be the same for an average, as text by name: those of `SHARED`, and the rule
            of acting.
        scale: what the score is: whose references normalise it, or "return"; and the source of the data.
        versions: of the packages that it depends on.
    """

    folder: Path
    task: str
    agent: str
    seed: int
    settings: Mapping[str, str]
    score: float
    returns: tuple[float, ...]
    behaviour: float | None
    conditions: Mapping[str, str]
    scale: str
    versions: Mapping[str, str]


def find_runs(words: Iterable[str]) -> list[Path]:
    """Folders of runs, each once.

    Args:
        words: folders of runs, folders that hold some at any depth, or patterns of either, `runs/*/cpql/**`.

    Raises:
        CheckpointError: there is no run in one of them.
    """
    found: dict[Path, Path] = {}
    for word in words:
        tops = [word] if os.path.exists(word) else sorted(glob.glob(word, recursive=True))
        runs = [file.parent for top in tops for file in sorted(Path(top).rglob("config.yaml"))]
        if not runs:
            raise CheckpointError(
                f"{word}: no run there: expected a folder with a config.yaml in it, or below"
            )
        found |= {run.resolve(): run for run in runs}
    # What lies in a run's folder is no other run: loggers have a config.yaml of their own.
    return [run for path, run in found.items() if not found.keys() & set(path.parents)]


def read_run(folder: Path, evaluation: str | None = None) -> Result | None:
    """The result of a run; None if it isn't finished, or was finished without an evaluation.

    Args:
        folder: the run's.
        evaluation: name of a file that `cpql-evaluate` wrote beside the last checkpoint, to take in place of
            the evaluation at the end of the training.

    Raises:
        CheckpointError: a file is damaged, or there is no such evaluation; names the file.
    """
    file = folder / "result.json"
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        if not content.get("evaluated", True):
            return None
        step = content["step"]
        if evaluation is not None:
            file = folder / "checkpoints" / "last" / evaluation
            content |= json.loads(file.read_text())
            if content["policy"]["step"] != step:
                raise ValueError(f"of update {content['policy']['step']}, and the result of {step}")
        data, references = content["data"], content["references"]
        scored = content["score"] is not None
        score, returns = content["score" if scored else "return_mean"], list(content["returns"])
        behaviour = content["behaviour_score" if scored else "behaviour_return"]
        if not np.isfinite([score, *returns]).all():
            raise ValueError("a score or a return is no finite number")
        conditions = {
            "data": f"{data['source']} {data['id']} {(data['sha256'] or '')[:8]}",
            "environment": f"{content['environment']} {content.get('environment_options') or ''}",
            "references": f"{references['random']} to {references['expert']}",
            "episodes": str(len(returns)),
            "rule of acting": str(content["rule"]),
        }
        file = folder / "config.yaml"
        settings = _settings(yaml.safe_load(file.read_text())) | {"updates": str(step)}
        return Result(
            folder,
            task=str(content["task"]),
            agent=str(content["agent"]),
            seed=int(content["training_seed"]),
            settings=settings,
            score=float(score),
            returns=tuple(map(float, returns)),
            behaviour=None if behaviour is None else float(behaviour),
            conditions={name: text.strip() for name, text in conditions.items()},
            scale=scale_of(content),
            versions=dict(content["versions"]),
        )
    except DAMAGE as error:
        raise CheckpointError(
            f"{file}: can't be used ({brief(error)}): expected what a training or cpql-evaluate wrote; mend "
            "it or leave the run out"
        ) from error


def scale_of(content: Mapping[str, Any]) -> str:
    """What the score of a result or an evaluation is: whose references it has, and the source of the data."""
    benchmark = content["references"].get("of", "D4RL")  # the only one at first
    measured = "return" if content["score"] is None else f"{benchmark} score"
    return f"{measured}, {content['data']['source']} data"


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """A run's settings that its result depends on; those that its version didn't have yet by default."""
    config = upgrade(config)
    own = {key: config[key] for key in ("agent", "dataset", "online") if config.get(key)}
    kind = AGENTS.get(config["agent"]["name"])
    defaults = {"agent": asdict(kind.config_class()) if kind else {}, "dataset": asdict(DatasetConfig())}
    values = flat(defaults) | flat(own) | {"precision": config.get("precision", "fp32")}
    if config.get("checkpoint"):
        values["checkpoint"] = "given"  # each seed has its own
    return {
        key: str(list(value) if isinstance(value, tuple) else value)
        for key, value in values.items()
        if not isinstance(value, Mapping) and key not in IDENTITY | {"agent.updates"}
    }


@dataclass(frozen=True)
class Row:
    """The runs of one agent with one setting on one task.

    Attributes:
        task: its name.
        agent: the configuration's name; with several settings on a task also what tells them apart.
        configuration: its name alone.
        runs: by seed.
        tried: how many settings of this configuration the given runs of the task have.
    """

    task: str
    agent: str
    configuration: str
    runs: tuple[Result, ...]
    tried: int

    @cached_property
    def reason(self) -> str:
        """Why these runs can't be averaged; empty if they can."""
        differ = []
        for name in self.runs[0].conditions:
            folders: dict[str, list[str]] = {}
            for run in self.runs:
                folders.setdefault(run.conditions[name], []).append(str(run.folder))
            if len(folders) > 1:
                parts = (f"{value} ({', '.join(where)})" for value, where in folders.items())
                differ.append(f"different {name}: {', '.join(parts)}")
        twice = [
            f"seed {a.seed} ({a.folder}, {b.folder})" for a, b in pairwise(self.runs) if a.seed == b.seed
        ]
        return "; ".join([*differ, *(["several runs of " + ", ".join(twice)] if twice else [])])

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Each seed's score, [seeds]."""
        return np.array([run.score for run in self.runs])

    def unlike(self, other: Row) -> str:
        """In which of `SHARED` two rows differ; empty where they may be compared."""
        pairs = {name: [row.runs[0].conditions[name] for row in (self, other)] for name in SHARED}
        unequal = (
            f"{name} {ours} for {self.agent}, {theirs} for {other.agent}"
            for name, (ours, theirs) in pairs.items()
            if ours != theirs
        )
        return "; ".join(unequal)


def rows(results: Iterable[Result]) -> list[Row]:
    """Group results by task, agent and setting, in the order of their names."""
    by_agent: dict[str, dict[str, list[Result]]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        by_agent.setdefault(result.agent, {}).setdefault(result.task, []).append(result)
    found = []
    for name, tasks in by_agent.items():
        keys = _telling(list(tasks.values()))
        for task, runs in tasks.items():
            labels: dict[str, list[Result]] = {}
            for run in runs:
                chosen = (f"{key.removeprefix('agent.')}={run.settings.get(key)}" for key in keys)
                labels.setdefault(" ".join([name, *chosen]), []).append(run)
            found += [Row(task, label, name, tuple(own), len(labels)) for label, own in labels.items()]
    return sorted(found, key=lambda row: (row.task, row.agent))


def _telling(tasks: Sequence[Sequence[Result]]) -> list[str]:
    """Settings that tell apart the runs of every task that aren't set alike: few, not all that differ."""

    def kinds(keys: Iterable[str]) -> int:
        return sum(len({tuple(run.settings.get(key) for key in keys) for run in runs}) for runs in tasks)

    every = sorted({key for runs in tasks for run in runs for key in run.settings})
    chosen: list[str] = []
    while kinds(chosen) < kinds(every):
        chosen.append(max(every, key=lambda key: kinds([*chosen, key])))
    return chosen


@dataclass(frozen=True)
class Group:
    """Rows that are averaged and whose scores have one scale.

    Attributes:
        scale: of the scores, `D4RL score, embedded data`; of returns also the task, since each is its own.
        rows: in the order of their tasks.
    """

    scale: str
    rows: tuple[Row, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their tasks."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def of(self, agent: str) -> dict[str, Row]:
        """An agent's rows by task."""
        return {row.task: row for row in self.rows if row.agent == agent}

    @property
    def complete(self) -> dict[str, Scores]:
        """Scores on each task of the agents that have all tasks."""
        agents = {row.agent: [*self.of(row.agent).values()] for row in self.rows}
        count = len(self.tasks)
        return {agent: [row.scores for row in own] for agent, own in agents.items() if len(own) == count}

    def expected_best(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        """Expected score of the best of 1, 2, ... settings, by task and configuration that has several."""
        settings: dict[tuple[str, str], list[float]] = {}
        for row in self.rows:
            settings.setdefault((row.task, row.configuration), []).append(float(row.scores.mean()))
        several = {key: scores for key, scores in settings.items() if len(scores) > 1}
        return {key: expected_best(scores, np.arange(len(scores)) + 1) for key, scores in several.items()}

    def apart(self) -> list[str]:
        """What else than their agents sets the rows of a task apart, in a line for each that differs."""
        pairs = [(one, other) for one, other in pairwise(self.rows) if one.task == other.task]
        return [f"{one.task}: {unlike}" for one, other in pairs if (unlike := one.unlike(other))]


def groups(found: Iterable[Row]) -> list[Group]:
    """Put the rows that are averaged into groups of one scale."""
    scales: dict[str, list[Row]] = {}
    for row in found:
        if not row.reason:
            scale = row.runs[0].scale
            scales.setdefault(f"{row.task}, {scale}" if scale.startswith("return") else scale, []).append(row)
    return [Group(scale, tuple(own)) for scale, own in scales.items()]


@dataclass(frozen=True)
class Comparison:
    """An agent against another, over the tasks where both have scores under the same conditions.

    Attributes:
        tasks: that the figures are over.
        pairs: number of seeds that both have, over all tasks.
        difference: between runs of one seed, the mean over tasks of its mean; None without such seeds.
        improvement: probability that a run of the agent beats one of the other; None without tasks.
        left_out: tasks that aren't compared, and why.
    """

    tasks: tuple[str, ...]
    pairs: int
    difference: Estimate | None
    improvement: Estimate | None
    left_out: tuple[str, ...]


def compare(group: Group, agent: str, against: str) -> Comparison:
    """Compare an agent of a group with another one."""
    ours, theirs = group.of(agent), group.of(against)
    apart = {task: ours[task].unlike(theirs[task]) for task in ours if task in theirs}
    tasks = [task for task, difference in apart.items() if not difference]
    differences = []
    for task in tasks:
        mine, other = ({run.seed: run.score for run in rows[task].runs} for rows in (ours, theirs))
        differences.append(np.array([mine[seed] - other[seed] for seed in mine if seed in other]))
    paired = [seeds for seeds in differences if len(seeds)]
    return Comparison(
        tuple(tasks),
        sum(map(len, paired)),
        estimate(mean, paired) if paired else None,
        estimate(improvement, [rows[t].scores for rows in (ours, theirs) for t in tasks]) if tasks else None,
        tuple(f"{task}: {difference}" for task, difference in apart.items() if difference),
    )
