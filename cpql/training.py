"""The training loop, and what a run's folder holds.

runs/hopper-medium/cpql/full/seed0/
    config.yaml             everything the run was told
    metrics.csv             losses and values, means over each interval
    timing.csv              seconds and updates a second
    evaluations/            one JSON file each, with its provenance
    checkpoints/            see `cpql.checkpoint`
    learning_curve.png
    result.json             written when the run is finished
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from torch import Tensor

import cpql.data
from cpql.agents import AGENTS, Agent, AgentConfig
from cpql.checkpoint import load_training, save_checkpoint, write_text
from cpql.config import TrainConfig, build
from cpql.critic import TwinCritic
from cpql.data import transforms
from cpql.data.transitions import Transitions
from cpql.environments import action_bounds, make_task_environment
from cpql.errors import CheckpointError, ConfigError, CpqlError, did_you_mean
from cpql.evaluation import evaluate, versions
from cpql.logging import CSVTable, Logger, make_logger, progress
from cpql.policy import Policy, PolicyConfig
from cpql.report import learning_curve
from cpql.tasks import Task

__all__ = ["Interrupted", "Run", "summary", "train"]

# What a resumed run may change: none of it touches the course of training.
FREE = ("device", "threads", "compile", "logger", "resume", "traceback", "run_dir")


class Interrupted(CpqlError):
    """The user stopped the run; it is saved."""

    exit_code = 130


def agent_config(config: TrainConfig) -> tuple[type[Agent], AgentConfig]:
    """The agent a configuration asks for, and its settings.

    Raises:
        ConfigError: unknown agent, key or value.
    """
    settings = dict(config.agent)
    name = settings.pop("name", None)
    if name not in AGENTS:
        raise ConfigError(f"agent.name={name} is no agent: {did_you_mean(str(name), AGENTS)}")
    kind = AGENTS[name]
    built = build(kind.config_class, settings, "agent")
    return kind, replace(built, updates=config.budget.updates)


def make_policy(agent: Agent, config: TrainConfig, data: Transitions) -> Policy:
    """The agent's present policy, as it is deployed: the online actor and the target critic."""
    c = agent.config
    low, high = -np.ones(agent.action_dim, np.float32), np.ones(agent.action_dim, np.float32)
    if config.env.id is not None:
        environment = make_task_environment(config.env)
        low, high = action_bounds(environment)
        environment.close()
    mean, std = ((), ()) if data.normalisation is None else (tuple(x.tolist()) for x in data.normalisation)
    step = int(agent.state["step"])
    actor: Any = agent.module("actor")
    critic: TwinCritic = agent.module("critic_target").twin  # type: ignore[assignment]
    origin = {
        "agent": config.agent["name"],
        "step": step,
        "seed": config.seed,
        "versions": versions(),
        "data": data.provenance.to_dict(),
    }
    described = PolicyConfig(
        agent.state_dim,
        agent.action_dim,
        tuple(low.tolist()),
        tuple(high.tolist()),
        c.actor,
        c.critic_hidden,
        c.critic_layer_norm,
        c.candidates,
        c.temperature,
        config.env,
        origin,
        mean,
        std,
    )
    return Policy(actor, critic, described)


class Run:
    """A run's folder: created once, never overwritten, resumed only as what it was.

    Args:
        config: of the run.
        said: the configuration as plain values, to be kept in `config.yaml`.

    Raises:
        CheckpointError: the folder holds a run already, or holds none to resume, or another one.
    """

    def __init__(self, config: TrainConfig, said: dict[str, Any]) -> None:
        self.folder = Path(config.run_dir)
        self.config_file = self.folder / "config.yaml"
        self.said = said
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
                if before.get(key) != said.get(key):
                    raise CheckpointError(
                        f"{self.config_file}: {_difference(key, before.get(key), said.get(key))}"
                    )

    def create(self) -> None:
        """Make the folder, once everything that can be checked beforehand has been."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.config_file.exists():
            write_text(self.config_file, yaml.safe_dump(self.said, sort_keys=False))

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.folder / "result.json").exists()

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far, in order."""
        files = sorted((self.folder / "evaluations").glob("step_*.json"))
        return [json.loads(file.read_text()) for file in files]

    def forget_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that training goes on from."""
        for file in (self.folder / "evaluations").glob("step_*.json"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for inner in sorted(before.keys() | now.keys()):
            if before.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"the run was started with {key}={before}, not {now}; resume it with the same settings"


class Means:
    """Means of metrics over an interval, kept on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one update's metrics."""
        if self.sums:
            for name, value in metrics.items():
                self.sums[name] += value
        else:
            self.sums = {name: value.clone() for name, value in metrics.items()}
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means, fetched in one transfer; counting starts anew."""
        values = (torch.stack([v.float().mean() for v in self.sums.values()]) / self.count).tolist()
        means = dict(zip(self.sums, values, strict=True))
        self.sums, self.count = {}, 0
        return means


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a question the loop can ask; a second Ctrl-C acts at once."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where signals can't be handled
        previous = {}
    try:
        yield lambda: stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch finds no CUDA device here; use device=auto or device=cpu")
    return torch.device(
        "cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name
    )


def load_data(config: TrainConfig, console: Console, discount: float) -> tuple[Task, Transitions]:
    """The dataset as the agent is to see it, and the task as the dataset has it."""
    bars: dict[str, Any] = {}

    def show(title: str, done: int, total: int) -> None:
        if title not in bars:
            context = progress(console, title, total)
            bars[title] = (context, context.__enter__())
        bars[title][1].update(done)
        if done >= total:
            bars.pop(title)[0].__exit__(None, None, None)

    d = config.dataset
    try:
        task, data = cpql.data.load(
            config.env,
            source=d.source,
            path=d.path,
            id=d.id,
            size=d.size,
            seed=d.seed,
            time_limits=d.time_limits,
            progress=show,
            say=lambda line: console.print(line, style="yellow", highlight=False, soft_wrap=True),
        )
    finally:
        for context, _ in bars.values():
            context.__exit__(None, None, None)
    console.print(data.provenance.line(), highlight=False, soft_wrap=True)
    data = transforms.reward(data, d.reward)
    if d.normalise_observations:
        data = transforms.normalise_observations(data)
    return task, transforms.n_step(data, d.n_step, discount)


def train(config: TrainConfig, said: dict[str, Any], console: Console) -> dict[str, Any]:
    """Train, evaluate and save; the whole of one run.

    Args:
        config: of the run.
        said: the same as plain values, kept in the run's folder.
        console: where people look.

    Returns:
        What `result.json` holds.

    Raises:
        Interrupted: the user stopped it; everything is saved.
        CpqlError: anything else the user can mend.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config, said)
    if run.finished:
        result: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
        return result
    device = choose_device(config.device)
    kind, settings = agent_config(config)
    task, data = load_data(config, console, settings.discount)
    config, data = replace(config, env=task), data.to(device)
    agent = kind(data.state_dim, data.action_dim, settings, seed=config.seed, device=device)
    run.create()
    logger = make_logger(
        config.logger, run.folder, f"{config.env.name}-{config.agent['name']}-{config.seed}", said
    )
    try:
        return _Training(config, run, agent, data, logger, console).run_to_end()
    finally:
        if logger is not None:
            logger.close()


class _Training:
    """One run under way."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        agent: Agent,
        data: Transitions,
        logger: Logger | None,
        console: Console,
    ) -> None:
        self.config, self.run, self.agent, self.data = config, run, agent, data
        self.logger, self.console = logger, console
        self.generator = torch.Generator(data.device).manual_seed(config.seed)
        self.means = Means()
        self.step = 0
        if config.resume and (run.checkpoints / "last").is_dir():
            self.restore()
        run.forget_after(self.step)
        self.metrics = CSVTable(run.folder / "metrics.csv", self.step)
        self.timing = CSVTable(run.folder / "timing.csv", self.step)

    def run_to_end(self) -> dict[str, Any]:
        """Train what is left, evaluating and saving on the way."""
        budget, agent = self.config.budget, self.agent
        update = agent.update
        if self.config.compile:
            self.console.print("compiling the update: the first step takes a minute or two", highlight=False)
            update = torch.compile(update, fullgraph=True)
        began, text, first = time.monotonic(), self.last_score(), self.step
        with (
            _stop_signal() as stopped,
            progress(self.console, "training", budget.updates, self.step) as bar,
        ):
            while self.step < budget.updates:
                self.step += 1
                batch = self.data.sample(agent.config.batch_size, self.generator)
                self.means.add(update(batch, agent.draw(self.generator)))
                done = self.step == budget.updates
                if self.step % budget.log_every == 0 or done:
                    figures = self.log(time.monotonic() - began, self.step - first)
                    q, imitation = figures["critic/q"], figures["actor/imitation"]
                    text = f"Q {q:.1f}  imitation {imitation:.3f}  {self.last_score()}"
                if self.step % budget.evaluate_every == 0 or done:
                    self.evaluate(budget.final_episodes if done else budget.episodes)
                if self.step % budget.save_every == 0 or done:
                    self.save()
                bar.update(self.step, text)
                if stopped():
                    self.save()
                    raise Interrupted(
                        f"stopped after {self.step:,} of {budget.updates:,} updates, all saved in "
                        f"{self.run.folder}; go on with the same command and resume=true"
                    )
        return self.finish(time.monotonic() - began)

    def log(self, seconds: float, updates: int) -> dict[str, float]:
        """Write the interval's means."""
        figures = self.means.take()
        for name, value in figures.items():
            if not math.isfinite(value):
                last = self.run.checkpoints / "last"
                raise CpqlError(
                    f"{name} is {value} at update {self.step}: training diverged. A smaller agent.eta "
                    f"or actor_lr usually helps; the last checkpoint is {last if last.exists() else 'none'}"
                )
        self.metrics.log(self.step, figures)
        self.timing.log(
            self.step, {"seconds": round(seconds, 2), "updates_per_second": round(updates / seconds, 1)}
        )
        if self.logger is not None:
            self.logger.log(self.step, figures)
        return figures

    def last_score(self) -> str:
        """The last evaluation, for the bar."""
        evaluations = self.run.evaluations()
        if not evaluations:
            return ""
        score, mean = evaluations[-1]["score"], evaluations[-1]["return_mean"]
        return f"return {mean:.1f}" if score is None else f"score {score:.1f}"

    def evaluate(self, episodes: int) -> None:
        """Score the present policy, where there is an environment to score it in, and draw the curve."""
        if self.config.env.id is not None:
            self.play(episodes)
        path = self.run.folder / "learning_curve.png"
        learning_curve(path, self.provenance(), self.run.evaluations(), self.metrics.rows())

    def play(self, episodes: int) -> None:
        """Score the present policy and keep the result."""
        policy = make_policy(self.agent, self.config, self.data)
        evaluation = evaluate(policy, self.config.env, episodes, seed=self.config.seed + 100)
        folder = self.run.folder / "evaluations"
        folder.mkdir(exist_ok=True)
        content = {"step": self.step, **self.provenance(), **evaluation.to_dict()}
        write_text(
            folder / f"step_{self.step:08d}.json", json.dumps(content, indent=2, allow_nan=False) + "\n"
        )
        if self.logger is not None:
            score = {} if evaluation.score is None else {"evaluation/score": evaluation.score}
            self.logger.log(self.step, {"evaluation/return": evaluation.mean, **score})

    def provenance(self) -> dict[str, Any]:
        """What every result file says about where it came from."""
        behaviour = self.data.provenance.return_mean
        return {
            "task": self.config.env.name,
            "agent": self.config.agent["name"],
            "training_seed": self.config.seed,
            "behaviour_return": behaviour,
            "behaviour_score": None if behaviour is None else self.config.env.score(behaviour),
            "data": self.data.provenance.to_dict(),
        }

    def save(self) -> None:
        """Write a checkpoint that training can go on from."""
        tensors = {f"agent.{name}": tensor for name, tensor in self.agent.state_dict().items()}
        tensors["generator"] = self.generator.get_state()
        tensors |= {f"means.{name}": tensor for name, tensor in self.means.sums.items()}
        save_checkpoint(
            self.run.checkpoints,
            self.step,
            make_policy(self.agent, self.config, self.data),
            tensors,
            {"means_count": self.means.count, "data_sha256": self.data.provenance.sha256},
            self.config.budget.keep,
        )

    def restore(self) -> None:
        """Take up the last checkpoint."""
        tensors, state = load_training(self.run.checkpoints)
        if state["data_sha256"] != self.data.provenance.sha256:
            raise CheckpointError(
                f"{self.run.folder}: the run learnt from a dataset with SHA-256 {state['data_sha256']}, "
                f"this one has {self.data.provenance.sha256}"
            )
        try:
            self.agent.load_state_dict(
                {k.removeprefix("agent."): v for k, v in tensors.items() if k.startswith("agent.")}
            )
        except ValueError as error:
            raise CheckpointError(f"{self.run.checkpoints / 'last'}: {error}") from error
        self.generator.set_state(tensors["generator"])
        self.means.sums = {
            k.removeprefix("means."): v.to(self.data.device)
            for k, v in tensors.items()
            if k.startswith("means.")
        }
        self.means.count, self.step = state["means_count"], state["step"]

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write the result: the last checkpoint's evaluation, with the best one's score beside it."""
        evaluations = self.run.evaluations()
        result: dict[str, Any] = {"checkpoint": "last", "evaluated": bool(evaluations)}
        if evaluations:
            best = max(evaluations, key=lambda e: e["return_mean"])
            result["best_evaluation"] = {k: best[k] for k in ("step", "score", "return_mean", "episodes")}
            result |= evaluations[-1]
        else:
            result |= {"step": self.step, **self.provenance(), "note": self.config.env.note}
            result["versions"] = versions()
        write_text(self.run.folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        return result


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
