"""What a run's folder says of the training itself, finished or not: its curve, values, time and films."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cpql.errors import CheckpointError, brief
from cpql.experiments.results import DAMAGE, scale_of
from cpql.migration import upgrade
from cpql.training.curve import value_of_data

__all__ = ["FILMS", "History", "Point", "read_history"]

FILMS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif"}
"""Media types of the files that are looked for in a run's `evaluations/`, by suffix."""


EVALUATION = ("episodes", "seed", "episode_limit")
"""What `cpql-evaluate` takes of an evaluation's settings; early versions had no limit."""


@dataclass(frozen=True)
class Point:
    """An evaluation.

    Attributes:
        step: the update after which it was made.
        score: normalised, in percent; the mean return where the task has no references.
        low: lower end of its 95% interval over episodes; `high`: the upper end.
        high: see `low`.
        episodes: how many.
    """

    step: int
    score: float
    low: float
    high: float
    episodes: int


@dataclass(frozen=True)
class History:
    """A run's training.

    Attributes:
        folder: the run's.
        task: its name.
        agent: name of the agent's configuration.
        seed: of the training.
        finished: whether it has a result.
        updates: how many it was to have.
        points: its evaluations, in order of their steps.
        best: score and step of the best evaluation, chosen after the fact; None without a result that has it.
        metrics: the columns of metrics.csv, each [rows]; `step` is one of them.
        seconds: of training, without evaluations, over all processes that worked on it.
        data: the dataset's provenance, as results have it; empty before the first evaluation.
        behaviour: the data's score, in the unit of the points; None if unknown.
        scale: what the scores are, see `Result`.
        evaluation: settings of the evaluation at the end, as `cpql-evaluate` takes them; empty without.
        config: the run's settings, nested.
        films: files of recorded episodes, by name.
    """

    folder: Path
    task: str
    agent: str
    seed: int
    finished: bool
    updates: int
    points: tuple[Point, ...]
    best: tuple[float, int] | None
    metrics: Mapping[str, NDArray[np.float64]]
    seconds: float
    data: Mapping[str, Any]
    behaviour: float | None
    scale: str
    evaluation: Mapping[str, int]
    config: Mapping[str, Any]
    films: tuple[Path, ...]

    @property
    def done(self) -> int:
        """How many updates its metrics reach to."""
        return int(self.metrics["step"][-1]) if self.metrics else 0

    @property
    def value_of_data(self) -> float | None:
        """See `cpql.training.curve.value_of_data`."""
        return value_of_data(self.config, self.data)


def read_history(folder: Path) -> History:
    """Read a run's folder without changing anything there.

    Raises:
        CheckpointError: a file is damaged; names the file.
    """
    file = folder / "config.yaml"
    try:
        config = upgrade(yaml.safe_load(file.read_text()))
        task, updates, seed = config["env"]["name"], int(config["budget"]["updates"]), int(config["seed"])
        agent = config.get("configuration") or config["agent"]["name"]
        points, last = [], dict[str, Any]()
        for file in sorted((folder / "evaluations").glob("step_*.json")):
            last = json.loads(file.read_text())
            points.append(_point(last))
        file = folder / "result.json"
        best, finished, evaluation = None, file.exists(), {}
        if finished:
            last = json.loads(file.read_text())
            if found := last.get("best_evaluation"):
                best = _score(found), int(found["step"])
                evaluation = {key: int(last[key]) for key in EVALUATION if key in last}
        data = last.get("data") or {}
        scored = last.get("score") is not None
        behaviour = last.get("behaviour_score" if scored else "behaviour_return")
        scale = scale_of(last) if points else ""
        file = folder / "metrics.csv"
        metrics = _table(file)
        file = folder / "timing.csv"
        seconds = _table(file).get("seconds", np.zeros(0))
    except DAMAGE as error:
        raise CheckpointError(
            f"{file}: can't be used ({brief(error)}): expected what a training wrote; mend it or leave the "
            "run out"
        ) from error
    # Seconds count from the start of a process: the last row of each is what it took.
    ends = np.append(seconds[1:] < seconds[:-1], True)[: len(seconds)]
    films = sorted(path for path in (folder / "evaluations").glob("*") if path.suffix in FILMS)
    return History(
        folder,
        task=str(last.get("task", task)),
        agent=str(last.get("agent", agent)),
        seed=seed,
        finished=finished,
        updates=updates,
        points=tuple(points),
        best=best,
        metrics=metrics,
        seconds=float(seconds[ends].sum()),
        data=data,
        behaviour=None if behaviour is None else float(behaviour),
        scale=scale,
        evaluation=evaluation,
        config=config,
        films=tuple(films),
    )


def _point(content: Mapping[str, Any]) -> Point:
    scored = content["score"] is not None
    score = _score(content)
    low, high = content.get("score_interval" if scored else "return_interval") or (score, score)
    return Point(int(content["step"]), score, float(low), float(high), int(content["episodes"]))


def _score(content: Mapping[str, Any]) -> float:
    return float(content["return_mean"] if content["score"] is None else content["score"])


def _table(path: Path) -> dict[str, NDArray[np.float64]]:
    """A CSV file's columns; its last line counts once it is whole, as a run may be writing it."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if len(lines) < 2:
        return {}
    cells = np.array([line.split(",") for line in lines[1:]], np.float64)
    return dict(zip(lines[0].split(","), cells.T, strict=True))
