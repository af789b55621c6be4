"""A run's folder: what is written there, and how a run is resumed.

runs/hopper-medium/cpql/full/seed0/
    config.yaml             the resolved configuration
    metrics.csv             losses and values, means over each interval
    timing.csv              seconds and updates a second
    evaluations/            one JSON file each, with its provenance
    checkpoints/            see `cpql.training.checkpoint`
    learning_curve.png
    result.json             written when the run is finished, with the number of updates
    .lock                   while a process works on the run: which process, on which host
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from cpql.deploy.policy import Policy
from cpql.errors import CheckpointError, brief
from cpql.io import aside, clear_leftovers, flush, held, versions, write_text
from cpql.migration import upgrade
from cpql.settings import flat
from cpql.tasks import Task
from cpql.training.checkpoint import go_back, prune, save_checkpoint, saved_steps
from cpql.training.config import TrainConfig, agent_config, train_config
from cpql.training.evaluation import evaluate
from cpql.training.logging import LOGGERS, Callback, CallbackLogger, CSVTable, Logger
from cpql.training.sources import Source

__all__ = ["Run", "claimed", "complete"]

# What a resumed run may change, since it doesn't affect training; of the budget, the length may matter.
FREE = (
    *("budget", "configuration", "device", "threads", "compile", "logger", "wandb", "resume", "traceback"),
    "run_dir",
)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, and remove the temporary files of killed processes.

    The folder is created if necessary, and removed again if it stays empty.

    Raises:
        CheckpointError: another process works on it, or it can't be written to.
    """
    another = "name another folder by run_dir=..."

    def busy(holder: str) -> None:
        raise CheckpointError(f"{folder} is in use by {holder}: wait for its end, or {another}")

    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder / ".lock", busy))
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{folder}: can't be written to ({reason}): {another}") from error
        for place in (folder, folder / "checkpoints", folder / "evaluations"):
            clear_leftovers(place)
        yield


class Run:
    """One seed's run: created once, never overwritten, resumed only with the settings it was started with.

    Raises:
        CheckpointError: the folder holds a run that isn't to be resumed, or that has other settings, was
            longer, or can't be continued to another length.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.folder = config, Path(config.run_dir)
        self.config_file, self.result_file = self.folder / "config.yaml", self.folder / "result.json"
        self.checkpoints = self.folder / "checkpoints"
        self.settings = asdict(config)
        self.begun = self.config_file.exists()
        if self.begun:
            if not config.resume:
                raise CheckpointError(
                    f"{self.folder} already holds a run: continue it with resume=true, or name another "
                    f"folder by run_dir={self.folder}-2"
                )
            self._compare()
        elif saved_steps(self.checkpoints):
            raise CheckpointError(
                f"{self.folder} holds checkpoints and no config.yaml: name another folder by run_dir=..."
            )

    def _compare(self) -> None:
        """Take over the settings of the file as they were written, and refuse others."""
        self.settings = _read(self.config_file, yaml.safe_load, "the run's configuration", "budget.updates")
        before = train_config(upgrade(self.settings), str(self.config_file))
        then, now = complete(before), complete(train_config(asdict(self.config), "configuration"))
        for key in sorted(then.keys() | now.keys(), key=lambda key: (not key.endswith(".name"), key)):
            if then.get(key) != now.get(key):
                raise CheckpointError(
                    f"{self.config_file}: the run was started with {key}={then.get(key)}, not "
                    f"{now.get(key)}; resume it with the same settings"
                )
        length, new, done = before.budget.updates, self.config.budget.updates, max(self.steps())
        schedule = agent_config(self.config)[1].schedule
        if length != new and schedule is not None:
            raise CheckpointError(
                f"{self.config_file}: the run was started with budget.updates={length}, not {new}, and "
                f"{schedule} depends on it: resume it with the same, or start a new run"
            )
        if done > new:
            raise CheckpointError(
                f"{self.folder} has {done} updates: expected budget.updates of as many or more, found {new}"
            )
        self.settings["budget"] = asdict(self.config.budget)

    @property
    def finished(self) -> bool:
        """Whether the run has reached the end of its budget, which may have been raised since."""
        return self.result_file.exists() and self.result()["step"] == self.config.budget.updates

    def result(self) -> dict[str, Any]:
        """The result of a finished run."""
        return _read(self.result_file, json.loads, WRITTEN, "step")

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far, in order."""
        return [
            _read(file, json.loads, WRITTEN, "step", "return_mean") for _, file in self._evaluation_files()
        ]

    def _evaluation_files(self) -> list[tuple[int, Path]]:
        files = (self.folder / "evaluations").glob("step_*.json")
        numbered = ((file.stem.removeprefix("step_"), file) for file in files)
        return sorted((int(number), file) for number, file in numbered if number.isdecimal())

    def _best(self) -> dict[str, Any] | None:
        """The first of the evaluations with the highest return, or success rate where that is the score."""

        def key(e: dict[str, Any]) -> tuple[float, float]:
            return e["score"] if e.get("measure") == "success" else 0.0, e["return_mean"]

        return max(self.evaluations(), key=key, default=None)

    def steps(self) -> set[int]:
        """The steps that the run can be resumed from; 0 is the beginning."""
        return {0, *saved_steps(self.checkpoints)} if self.begun else {0}

    def start_loggers(self, step: int, task: Task, algorithm: str, callback: Callback | None) -> None:
        """Start the loggers besides CSV. They come before anything is written, since they may fail."""
        self.task, self.algorithm = task, algorithm
        self.agent = self.config.configuration or algorithm
        name = f"{task.name}-{self.agent}-{self.folder.name}"
        self.loggers: list[Logger] = [] if callback is None else [CallbackLogger(callback)]
        for kind in self.config.loggers:
            self.loggers.append(LOGGERS[kind](self.folder, name, self.settings, step))

    def begin(self, step: int, program: str, source: Source) -> None:
        """Write the configuration and open the tables; whatever was written after `step` is dropped.

        Results name `program`, how updates are computed, and the source's provenance at the time.
        """
        self.program, self.source = program, source
        write_text(self.config_file, yaml.safe_dump(self.settings, sort_keys=False))
        self.begun = True
        if self.result_file.exists() and self.result()["step"] > step:
            self.result_file.unlink()
        for after, file in self._evaluation_files():
            if after > step:
                file.unlink()
        if self.checkpoints.exists():
            go_back(self.checkpoints, step)
        self.metrics = CSVTable(self.folder / "metrics.csv", step)
        self.timing = CSVTable(self.folder / "timing.csv", step)

    def close(self) -> None:
        """Write what the loggers have buffered."""
        for logger in self.loggers:
            logger.close()

    def log(self, step: int, metrics: dict[str, float], seconds: float, updates: int) -> None:
        """Write the means of an interval."""
        self.metrics.log(step, metrics)
        speed = {"seconds": round(seconds, 2), "updates_per_second": round(updates / seconds, 1)}
        self.timing.log(step, speed)
        for logger in self.loggers:
            logger.log(step, metrics)

    def evaluate(self, step: int, policy: Policy, episodes: int, stopped: Callable[[], bool]) -> None:
        """Evaluate a step's policy, unless that was done or there is no environment, and draw the curve.

        Raises:
            Interrupted: `stopped` returned True.
            ActingError: the environment failed.
        """
        file = self.folder / "evaluations" / f"step_{step:08d}.json"
        if self.task.id is not None and not file.exists():
            seed, limit = self.config.seed + 100, self.config.budget.episode_limit
            found = evaluate(policy, self.task, episodes, seed=seed, episode_limit=limit, stopped=stopped)
            _write(file, {"step": step, **self.provenance(), **found.to_dict()})
            score = {} if found.score is None else {"evaluation/score": found.score}
            for logger in self.loggers:
                logger.log(step, {"evaluation/return": found.mean, **score})
        from cpql.training.curve import DPI, learning_curve  # loads matplotlib

        picture = learning_curve(self.provenance(), self.settings, self.evaluations(), self.metrics.rows())
        with aside(self.folder / "learning_curve.png") as temporary:
            picture.savefig(temporary, dpi=DPI, format="png")

    def provenance(self) -> dict[str, Any]:
        """Where a result comes from, for every result file."""
        data = self.source.provenance
        behaviour = data.return_mean
        return {
            "task": self.task.name,
            "agent": self.agent,
            "algorithm": self.algorithm,
            "program": self.program,
            "training_seed": self.config.seed,
            "behaviour_return": behaviour,
            "behaviour_score": None if behaviour is None else self.task.score(behaviour),
            "data": data.to_dict(),
        }

    def save(self, step: int, policy: Policy, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint that training can be resumed from, after the metrics that lead to it."""
        if self.metrics.path.exists():
            flush(self.metrics.path)
        data = {"data_sha256": self.source.provenance.sha256}
        save_checkpoint(self.checkpoints, step, policy, tensors, data)

    def prune(self) -> None:
        """Drop all checkpoints except the newest and the best."""
        best = self._best()
        prune(self.checkpoints, self.config.budget.keep, () if best is None else (best["step"],))

    def finish(self, step: int) -> dict[str, Any]:
        """Write the result: the last checkpoint's evaluation, with the best one's score beside it."""
        result: dict[str, Any] = {"checkpoint": "last", "evaluated": False}
        if best := self._best():
            result["evaluated"] = True
            result["best_evaluation"] = {k: best[k] for k in ("step", "score", "return_mean", "episodes")}
            kept = best["step"] in saved_steps(self.checkpoints)
            result["best_evaluation"]["checkpoint"] = f"step_{best['step']:08d}" if kept else None
            result |= self.evaluations()[-1]
        else:
            result |= {"step": step, **self.provenance(), "note": self.task.note, "versions": versions()}
        _write(self.result_file, result)
        return result


WRITTEN = "what a run wrote; remove it to continue"


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _read(path: Path, parse: Callable[[str], Any], expected: str, *numbers: str) -> dict[str, Any]:
    """Read a file of nested values that has these numbers, by their dotted names."""
    try:
        content = dict(parse(path.read_text()))
        values = flat(content)
        for name in numbers:
            float(values[name])
        return content
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: damaged ({brief(error)}): expected {expected}") from error


def complete(config: TrainConfig) -> Mapping[str, Any]:
    """All settings that training depends on, by dotted name; what a file lacks is at its default."""
    settings = {key: value for key, value in asdict(config).items() if key not in FREE}
    agent = asdict(agent_config(config)[1])
    del agent["updates"]
    return flat({**settings, "agent": {"name": config.agent["name"], **agent}})
