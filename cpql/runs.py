"""A run's folder: what is written there, and how a run is gone on with.

runs/hopper-medium/cpql/full/seed0/
    config.yaml             everything the run was told
    metrics.csv             losses and values, means over each interval
    timing.csv              seconds and updates a second
    evaluations/            one JSON file each, with its provenance
    checkpoints/            see `cpql.checkpoint`
    learning_curve.png
    result.json             written when the run is finished; says after how many updates
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from cpql.agents import AGENTS
from cpql.checkpoint import load_training, save_checkpoint, saved_steps, write_text
from cpql.config import DatasetConfig, OnlineConfig, TrainConfig, build
from cpql.data.transitions import Provenance
from cpql.errors import CheckpointError, ConfigError
from cpql.evaluation import evaluate, versions
from cpql.logging import CSVTable, make_logger
from cpql.policy import Policy
from cpql.report import learning_curve
from cpql.tasks import Task

__all__ = ["Run", "group_summary", "summary"]

# What a resumed run may change: none of it touches the course of training, but for the budget's length, which
# `train_group` looks at.
FREE = ("budget", "device", "threads", "compile", "logger", "resume", "traceback", "run_dir")


class Run:
    """One seed's run: created once, never overwritten, resumed only as what it was.

    Args:
        config: of the run.
        said: the configuration as plain values, to be kept in `config.yaml`.

    Raises:
        CheckpointError: the folder holds a run already, or holds none to resume, or another one.
    """

    def __init__(self, config: TrainConfig, said: dict[str, Any]) -> None:
        self.config, self.said = config, said
        self.folder = Path(config.run_dir)
        self.length = config.budget.updates  # that it was started with
        self.config_file = self.folder / "config.yaml"
        if self.config_file.exists() and not config.resume:
            raise CheckpointError(
                f"{self.folder} already holds a run: go on with it by resume=true, or name another folder "
                f"by run_dir={self.folder}-2"
            )
        if not self.config_file.exists() and config.resume:
            raise CheckpointError(f"{self.folder} holds no run to resume (no config.yaml)")
        if config.resume:
            before = yaml.safe_load(self.config_file.read_text())
            for key in sorted((before.keys() | said.keys()) - set(FREE)):
                then, now = _whole(key, before.get(key)), _whole(key, said.get(key))
                if then != now:
                    raise CheckpointError(f"{self.config_file}: {_difference(key, then, now)}")
            self.length = before["budget"]["updates"]
            said = before
        self.told = said | {"budget": asdict(config.budget)}

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; a finished one may be asked to go on for longer."""
        file = self.folder / "result.json"
        return file.exists() and self.result()["step"] == self.config.budget.updates

    def check_length(self, schedule: str | None) -> None:
        """See to it that a run whose length has changed is still the same run.

        Args:
            schedule: the agent's setting that depends on the length, where there is one.

        Raises:
            CheckpointError: there is one, or the run has gone on for longer already.
        """
        now, done = self.config.budget.updates, max(self.steps())
        if self.length != now and schedule is not None:
            raise CheckpointError(
                f"{self.config_file}: the run was started with budget.updates={self.length}, not {now}, and "
                f"{schedule} depends on it: resume it with the same, or start a new run"
            )
        if done > now:
            raise CheckpointError(
                f"{self.folder} has gone on to {done} updates: expected budget.updates of as many or more, "
                f"found {now}"
            )

    def result(self) -> dict[str, Any]:
        """What a finished run came to."""
        content: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return content

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far, in order."""
        files = sorted((self.folder / "evaluations").glob("step_*.json"))
        return [json.loads(file.read_text()) for file in files]

    def steps(self) -> set[int]:
        """The steps that it can go on from; 0 is the beginning."""
        return {0, *saved_steps(self.checkpoints)} if self.config.resume else {0}

    def restore(self, step: int, sha256: str | None) -> dict[str, Tensor]:
        """Read the tensors of a checkpoint.

        Args:
            step: one of `steps`, but not 0.
            sha256: of the dataset that training is to go on with.

        Raises:
            CheckpointError: it is damaged, or the run learnt from another dataset.
        """
        tensors, state = load_training(self.checkpoints, step)
        if state["data_sha256"] != sha256:
            raise CheckpointError(
                f"{self.folder}: the run learnt from a dataset with SHA-256 {state['data_sha256']}, "
                f"this one has {sha256}"
            )
        return tensors

    def begin(self, step: int, agent: str, task: Task, data: Callable[[], Provenance]) -> None:
        """Make the folder, once everything that can be checked beforehand has been, and open its tables.

        What was written after `step` is dropped: a resumed run writes it anew. `data` says what the run has
        learnt from by now.
        """
        self.agent, self.task, self.data = agent, task, data
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, yaml.safe_dump(self.told, sort_keys=False))
        for file in (self.folder / "evaluations").glob("step_*.json"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        self.metrics = CSVTable(self.folder / "metrics.csv", step)
        self.timing = CSVTable(self.folder / "timing.csv", step)
        name = f"{task.name}-{agent}-{self.config.seed}"
        self.logger = make_logger(self.config.logger, self.folder, name, self.said)

    def close(self) -> None:
        """Write what loggers hold back."""
        if self.logger is not None:
            self.logger.close()

    def log(self, step: int, figures: dict[str, float], seconds: float, updates: int) -> None:
        """Write the means of an interval."""
        self.metrics.log(step, figures)
        speed = {"seconds": round(seconds, 2), "updates_per_second": round(updates / seconds, 1)}
        self.timing.log(step, speed)
        if self.logger is not None:
            self.logger.log(step, figures)

    def evaluate(self, step: int, policy: Policy, episodes: int) -> None:
        """Score a policy, where there is an environment to score it in, and draw the curve."""
        if self.task.id is not None:
            evaluation = evaluate(policy, self.task, episodes, seed=self.config.seed + 100)
            folder = self.folder / "evaluations"
            folder.mkdir(exist_ok=True)
            content = {"step": step, **self.provenance(), **evaluation.to_dict()}
            write_text(
                folder / f"step_{step:08d}.json", json.dumps(content, indent=2, allow_nan=False) + "\n"
            )
            if self.logger is not None:
                score = {} if evaluation.score is None else {"evaluation/score": evaluation.score}
                self.logger.log(step, {"evaluation/return": evaluation.mean, **score})
        path = self.folder / "learning_curve.png"
        learning_curve(path, self.provenance(), self.evaluations(), self.metrics.rows())

    def provenance(self) -> dict[str, Any]:
        """What every result file says about where it came from."""
        data = self.data()
        behaviour = data.return_mean
        return {
            "task": self.task.name,
            "agent": self.agent,
            "training_seed": self.config.seed,
            "behaviour_return": behaviour,
            "behaviour_score": None if behaviour is None else self.task.score(behaviour),
            "data": data.to_dict(),
        }

    def save(self, step: int, policy: Policy, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint that training can go on from."""
        state = {"data_sha256": self.data().sha256}
        save_checkpoint(self.checkpoints, step, policy, tensors, state, self.config.budget.keep)

    def finish(self, step: int) -> dict[str, Any]:
        """Write the result: the last checkpoint's evaluation, with the best one's score beside it."""
        evaluations = self.evaluations()
        result: dict[str, Any] = {"checkpoint": "last", "evaluated": bool(evaluations)}
        if evaluations:
            best = max(evaluations, key=lambda e: e["return_mean"])
            result["best_evaluation"] = {k: best[k] for k in ("step", "score", "return_mean", "episodes")}
            result |= evaluations[-1]
        else:
            result |= {"step": step, **self.provenance(), "note": self.task.note, "versions": versions()}
        write_text(self.folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        return result


def _whole(key: str, settings: Any) -> Any:
    """A group of settings with every default: what a setting was before there was one."""
    if not isinstance(settings, dict):
        return settings
    kinds: dict[str, type[Any]] = {
        "env": Task,
        "dataset": DatasetConfig,
        "online": OnlineConfig,
    }
    rest = dict(settings)
    if key == "agent" and rest.get("name") in AGENTS:
        kinds[key] = AGENTS[rest.pop("name")].config_class
    try:
        return settings | asdict(build(kinds[key], rest, key))
    except (KeyError, ConfigError):  # nothing that this version knows: then it is compared as it is
        return settings


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for inner in sorted(before.keys() | now.keys()):
            if before.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"the run was started with {key}={before}, not {now}; resume it with the same settings"


def summary(result: dict[str, Any], folder: str) -> str:
    """What a person wants to read at the end of a run."""
    where = f"all in {folder}: learning_curve.png, metrics.csv, result.json, checkpoints/last"
    if not result["evaluated"]:
        lines = [f"trained and not evaluated: {result['task']} has no environment here (env.id=null)"]
        return "\n".join([*lines, *([f"note: {result['note']}"] if result["note"] else []), where])
    returns = f"return {result['return_mean']:,.0f} ± {result['return_std']:,.0f}"
    how = f"over {result['episodes']} episodes of {result['environment']}, last checkpoint, {result['rule']}"
    data = f"data: {result['data']['source']} {result['data']['id']}"
    behaviour = result["behaviour_return"]
    if result["score"] is None:
        beside = "unknown" if behaviour is None else f"{behaviour:,.0f}"
        lines = [f"{returns} {how}", f"behaviour's return {beside}   ({data}, which has no reference scores)"]
    else:
        low, high = result["score_interval"]
        beside = "unknown" if behaviour is None else f"{result['behaviour_score']:.1f}"
        lines = [
            f"score {result['score']:.1f} (95% interval {low:.1f} to {high:.1f}; {returns} {how})",
            f"behaviour {beside}   random 0.0   expert 100.0   "
            f"({result['references']['of']}'s references; {data})",
        ]
    if result["note"]:
        lines.append(f"note: {result['note']}")
    return "\n".join([*lines, where])


def group_summary(results: Sequence[dict[str, Any]], folders: Sequence[str]) -> str:
    """The same for several runs of one program, with the mean over them."""
    texts = [summary(result, folder) for result, folder in zip(results, folders, strict=True)]
    if len(texts) == 1 or not results[0]["evaluated"]:
        return "\n".join(texts)
    of = "return" if results[0]["score"] is None else "score"
    values = [result["return_mean" if of == "return" else "score"] for result in results]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return "\n".join([*texts, f"{of} of {len(values)} runs: {mean:,.1f} ± {spread:,.1f} (between runs)"])
