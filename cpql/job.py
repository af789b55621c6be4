"""A job of a sweep: what a launcher calls, in this process or on another machine.

It trains a run, or several as the members of one program, from where an earlier call of the same command left
them, and notes down in a file what became of each. One that fails takes no other along.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from cpql.configuration import key_of, members, register
from cpql.errors import CpqlError, Interrupted, brief
from cpql.io import write_text
from cpql.training.config import TrainConfig
from cpql.training.logging import make_console, say
from cpql.training.loop import group_summary, train_group

__all__ = ["Job", "Row", "result_of", "runs_of"]

SAME = {"agent": "configuration", "seeds": "seed", "env.id": "env.name"}
"""Settings that a part of a run's folder depends on that has another name."""


@dataclass(frozen=True)
class Row:
    """What became of a run.

    Attributes:
        run: its folder, or the words of a job whose settings aren't valid.
        state: one of `cpql.sweep.STATES`.
        score: of its last checkpoint; the mean return where there is no score.
        reason: why it failed.
    """

    run: str
    state: str
    score: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """What a launcher calls for each job, in whichever process: it is pickled for that.

    Attributes:
        folder: that the command was given in.
        notes: folder of the jobs' notes.
        fixed: keys that have one value in all jobs.
        numbered: whether each line begins with the job's number, as others print meanwhile.
        together: whether a job that is stopped keeps others from starting, as Ctrl-C is meant for all.
    """

    folder: Path
    notes: Path
    fixed: frozenset[str]
    numbered: bool
    together: bool

    def __call__(self, content: DictConfig) -> float | None:
        """Train a job's runs, whose settings are `content`.

        Returns:
            The mean of their scores, which a sweeper may maximise; None if one has no score.
        """
        register()  # another process may have composed the settings, elsewhere
        os.chdir(self.folder)
        number, words = HydraConfig.get().job.num, list(HydraConfig.get().overrides.task)
        stop, note = self.notes / "stopped", self.notes / f"{number}.json"
        if stop.exists():
            return None
        console = make_console(f"[{number}] " if self.numbered else "")
        own = " ".join([word for word in words if key_of(word) not in self.fixed] or words)
        say(console, f"job {number}: {own}", "bold")
        rows, reason = [Row(own, "lost")], ""
        try:
            configs = runs_of(content, words, self.fixed)
            ends = [_end(config) for config in configs]
            rows = [Row(config.run_dir, "lost") for config in configs]
            _write(note, rows)
            rows = _train(configs, ends, console)
        except (Interrupted, KeyboardInterrupt) as error:
            if self.together:
                stop.touch()
            state, reason = "stopped", str(error) or "interrupted"
        except Exception as error:
            known = isinstance(error, CpqlError)
            if not known or content.traceback is True:
                traceback.print_exc()
            state, reason = "failed", str(error) if known else brief(error)
        if reason:
            say(console, f"{state}: {reason}", "red" if state == "failed" else "")
            rows = [Row(row.run, state, None, reason if state == "failed" else "") for row in rows]
        _write(note, rows)
        scores = [row.score for row in rows if row.score is not None]
        return statistics.fmean(scores) if len(scores) == len(rows) else None


def _train(configs: Sequence[TrainConfig], ends: Sequence[str], console: Console) -> list[Row]:
    """Train the members of a program, of which some may diverge; `ends` are their states if all goes well."""
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(HydraConfig.get().job.num % torch.cuda.device_count())
    try:
        say(console, group_summary(train_group(configs, console), configs))
    except CpqlError as error:
        found = [result_of(config) for config in configs]
        if isinstance(error, Interrupted) or "skipped" in ends or not any(found):
            raise
        say(console, f"error {error}", "red")
        return [
            Row(config.run_dir, end, _score(result))
            if result
            else Row(config.run_dir, "failed", None, str(error))
            for config, end, result in zip(configs, ends, found, strict=True)
        ]
    return [Row(c.run_dir, end, _score(result_of(c) or {})) for c, end in zip(configs, ends, strict=True)]


def result_of(config: TrainConfig) -> dict[str, Any] | None:
    """The result of a run, if it is finished; `cpql.training.runs` reports damage."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content: dict[str, Any] = json.loads((Path(config.run_dir) / "result.json").read_text())
        if content["step"] == config.budget.updates:
            return content
    return None


def _score(result: dict[str, Any]) -> float | None:
    if not result.get("evaluated"):
        return None
    return float(result["return_mean"] if result["score"] is None else result["score"])


def _end(config: TrainConfig) -> str:
    """The state that a run will have if all goes well."""
    if result_of(config):
        return "skipped"
    return "resumed" if (Path(config.run_dir) / "config.yaml").exists() else "finished"


def runs_of(content: DictConfig, words: Sequence[str], fixed: frozenset[str]) -> list[TrainConfig]:
    """A job's runs, in folders of their own; they go on where they were unless the command says otherwise."""
    keys = [key_of(word) for word in words]
    if "resume" not in keys:
        OmegaConf.update(content, "resume", "auto")
    folder = str(OmegaConf.to_container(content)["run_dir"])  # type: ignore[call-overload, index]
    named = set(re.findall(r"\$\{([\w.]+)\}", folder)) | {"run_dir"}
    marks = []
    for key, word in sorted(zip(keys, words, strict=True)):
        part = SAME.get(key, key)
        if key not in fixed and not any(f"{name}.".startswith(f"{part}.") for name in named):
            marks.append(_mark(key.removeprefix("agent."), word.partition("=")[2]))
    OmegaConf.update(content, "run_dir", "-".join([folder, *marks]))
    return members(content, keys)


def _mark(key: str, value: str) -> str:
    """A setting as a part of a folder's name that no shell and no command has to quote: `eta0.5`."""
    try:
        float(value)
    except ValueError:
        value = "-" + re.sub(r"[^\w.+]+", "-", value).strip("-")
    return key + value


def _write(note: Path, rows: Sequence[Row]) -> None:
    write_text(note, json.dumps([asdict(row) for row in rows]))
