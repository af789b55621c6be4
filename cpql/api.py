"""Training from Python, in a notebook or a script: the same runs as the command line's.

from cpql import train

run = train("hopper-medium", updates=50_000)
run.metrics              columns by name, ready for pandas.DataFrame
run.plot()               a picture
run.policy               acts: run.policy.predict(observation)
run.evaluate(100)        scores it
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cpql.configuration import compose_training, value_text
from cpql.data import files
from cpql.data.embedded import cache_folder
from cpql.data.transitions import Transitions
from cpql.deploy.policy import Policy, find_policy
from cpql.deploy.summary import summary
from cpql.environments import spec_of
from cpql.errors import CheckpointError, ConfigError, DataError, brief, did_you_mean
from cpql.io import aside, sha256_of
from cpql.migration import upgrade
from cpql.tasks import Task, load_task, task_names
from cpql.training.config import TrainConfig
from cpql.training.evaluation import Evaluation, evaluate
from cpql.training.logging import Callback, make_console, read_table
from cpql.training.loop import train_group

if TYPE_CHECKING:
    from cpql.training.curve import Picture

__all__ = ["TrainedRun", "train", "train_members"]

Data = str | PathLike[str] | Transitions


class TrainedRun:
    """A run's folder: what `train` gives, and `TrainedRun("runs/hopper-medium/...")` for any other.

    Args:
        folder: of the run.

    Raises:
        CheckpointError: it holds no run.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.yaml").exists():
            raise CheckpointError(f"{self.folder} holds no run (no config.yaml)")

    @property
    def policy(self) -> Policy:
        """The policy of the last checkpoint, on the CPU."""
        return Policy.load(find_policy(self.folder))

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The columns of metrics.csv by name, `step` first."""
        rows = read_table(self.folder / "metrics.csv")
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations during the training and at its end, in order, each with its provenance."""
        return [_read(file) for file in sorted((self.folder / "evaluations").glob("step_*.json"))]

    @property
    def result(self) -> dict[str, Any]:
        """What result.json holds: the last checkpoint's evaluation, the best one's score, the provenance."""
        return _read(self.folder / "result.json")

    @property
    def score(self) -> float | None:
        """The score of the last checkpoint; None without an environment, or without its references."""
        score: float | None = self.result.get("score")
        return score

    def evaluate(self, episodes: int = 100, *, seed: int = 1000, **options: Any) -> Evaluation:
        """Score the last checkpoint in its environment; options are those of `cpql.training.evaluation`."""
        policy = self.policy
        return evaluate(policy, policy.config.task, episodes, seed=seed, **options)

    def plot(self) -> Picture:
        """Score, values and losses over the updates, a matplotlib figure that a notebook shows."""
        from cpql.training.curve import learning_curve

        config = upgrade(yaml.safe_load((self.folder / "config.yaml").read_text()))
        return learning_curve(self.result, config, self.evaluations, read_table(self.folder / "metrics.csv"))

    def __repr__(self) -> str:
        """The folder, and the result of a finished run."""
        try:
            return f"TrainedRun({str(self.folder)!r})\n{summary(self.result)}"
        except CheckpointError:
            return f"TrainedRun({str(self.folder)!r}): not finished"


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: the run isn't finished (no {file.name})") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged ({brief(error)}): expected what a run wrote") from error
    return content


def train(
    data: Data,
    agent: str = "recommended",
    *,
    env: str | None = None,
    updates: int | None = None,
    seed: int = 0,
    run_dir: str | PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> TrainedRun:
    """Train an agent, as the command line does, with its defaults, its checks and its folders.

    Called again, it goes on where the run was stopped; a run that is finished is returned at once.

    Example:
        >>> run = train("hopper-medium", updates=50_000, settings={"agent.eta": 0.5})  # doctest: +SKIP

    Args:
        data: a task's name; a file or a Minari folder of your own; or transitions, which are written to
            cpql's cache folder.
        agent: name of its configuration, a file of `configs/agent/`.
        env: with data of your own: a task's name, whose references make a score, or a Gymnasium id. Without
            it nothing is evaluated.
        updates: gradient steps; by default the budget's, a million.
        seed: of the training.
        run_dir: the run's folder; by default in `runs/`, by task, agent, budget and seed.
        settings: any others, by the command line's names: `{"agent.eta": 0.5, "budget": "quick"}`.
        callback: called with the step and metrics: the means of each logging interval, and each evaluation's.

    Raises:
        CpqlError: the user can mend it: a setting, the data, another run in the folder.
    """
    configs = _configs(data, agent, env, updates, run_dir, {"seed": seed, **(settings or {})})
    if len(configs) > 1:
        raise ConfigError("settings: expected those of one run; train_members trains several")
    train_group(configs, make_console(), callback)
    return TrainedRun(configs[0].run_dir)


def train_members(
    data: Data,
    agent: str = "recommended",
    *,
    settings: Mapping[str, Any],
    env: str | None = None,
    updates: int | None = None,
    run_dir: str | PathLike[str] | None = None,
    callback: Callback | None = None,
) -> list[TrainedRun]:
    """Train several runs as the members of one program; docs/sweeps.md says when that is worth it.

    Example:
        >>> runs = train_members("hopper-medium", settings={"seeds": [0, 1, 2]})  # doctest: +SKIP

    Args:
        settings: lists give each member its value: `{"seeds": [0, 1, 2]}`, or `{"agent.eta": [0.5, 1.0]}`.
        data, agent, env, updates, callback: as for `train`.
        run_dir: with `${seed}` in it, or what else the members differ in.

    Raises:
        CpqlError: as in `train`; also, after the others are finished, that a member diverged.
    """
    configs = _configs(data, agent, env, updates, run_dir, settings)
    train_group(configs, make_console(), callback)
    return [TrainedRun(config.run_dir) for config in configs]


def _configs(
    data: Data,
    agent: str,
    env: str | None,
    updates: int | None,
    run_dir: str | PathLike[str] | None,
    settings: Mapping[str, Any],
) -> list[TrainConfig]:
    words: dict[str, Any] = {"agent": agent, "resume": "auto"}
    if isinstance(data, str) and data in task_names():
        if env is not None:
            raise ConfigError(f"env={env}: expected none, as {data!r} is a task")
        words["env"] = data
    else:
        if env in task_names():
            words["env"] = env
        else:
            name = "data" if isinstance(data, Transitions) else Path(data).stem
            words |= {"env": "gymnasium", "env.id": env, "env.name": name}
        if not isinstance(data, Transitions) and not Path(data).exists():
            known = f"; {did_you_mean(str(data), task_names())}" if "/" not in str(data) else ""
            raise DataError(f"{data}: expected a task's name, or a file or folder that exists{known}")
        task = None if env is None else load_task(env) if env in task_names() else Task(env, env)
        words["dataset.path"] = _kept(data, task) if isinstance(data, Transitions) else fspath(data)
    if updates is not None:
        words["budget.updates"] = updates
    if run_dir is not None:
        words["run_dir"] = fspath(run_dir)
    return compose_training([f"{key}={value_text(value)}" for key, value in {**words, **settings}.items()])


def _kept(data: Transitions, task: Task | None) -> str:
    """Write transitions to cpql's cache folder, by their content, so that a run of them can be resumed."""
    _, low, high, _ = (0, -1.0, 1.0, None) if task is None else spec_of(task)
    with tempfile.TemporaryDirectory() as folder:
        written = files.write(data, Path(folder) / "data.npz", action_low=low, action_high=high)
        kept = cache_folder() / f"transitions-{sha256_of(written)[:16]}.npz"
        if not kept.exists():
            with aside(kept) as temporary:
                shutil.copyfile(written, temporary)
    return str(kept)
