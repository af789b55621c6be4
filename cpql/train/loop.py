"""The training loop: one seed, or several as members of one program, each with a run's folder of its own."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

import cpql.data
from cpql.agents import AGENTS, Agent, AgentConfig
from cpql.data import transforms
from cpql.data.embedded import cache_folder
from cpql.data.transitions import Batch, Provenance, Transitions
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.device import choose_device
from cpql.environments import facts
from cpql.errors import (
    ActingError,
    CheckpointError,
    ConfigError,
    CpqlError,
    Interrupted,
    did_you_mean,
    printable,
)
from cpql.settings import build
from cpql.tasks import Task
from cpql.train.checkpoint import find_training, load_training
from cpql.train.config import DatasetConfig, TrainConfig
from cpql.train.evaluation import versions
from cpql.train.logging import progress
from cpql.train.online import Experience
from cpql.train.program import Update, program
from cpql.train.runs import Run, claimed

__all__ = ["Interrupted", "train", "train_group"]

# What one program's members may differ in.
OWN = ("seed", "run_dir", "agent", "checkpoint")


# What the progress line shows of the metrics: a word, the metric's name, its format.
SHOWN = (
    ("Q", "critic/q", ".1f"),
    ("imitation", "actor/imitation", ".3f"),
    ("steps", "online/steps", ",.0f"),
    ("acting", "online/return", ",.0f"),
)


class Source(Protocol):
    """What a training learns from: a dataset, or what its members see while acting (`cpql.train.online`)."""

    device: torch.device
    normalisation: tuple[Tensor, Tensor] | None

    @property
    def state_dim(self) -> int:
        """S."""

    @property
    def action_dim(self) -> int:
        """A."""

    @property
    def provenance(self) -> Provenance:
        """Where the data come from, and how many there are by now."""

    def batch(self, agent: Agent, generators: Sequence[torch.Generator]) -> Batch:
        """The batch of one update, from a generator for each member."""

    def figures(self, member: int) -> dict[str, float]:
        """More for a member's metrics."""

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """What a member's checkpoint holds of it."""

    def load_state_dict(self, state: dict[str, Tensor], member: int) -> None:
        """Take over what `state_dict` gave."""


class Dataset:
    """Transitions as a source: they stay as they are."""

    def __init__(self, data: Transitions) -> None:
        self.data, self.device, self.normalisation = data, data.device, data.normalisation
        self.state_dim, self.action_dim, self.provenance = data.state_dim, data.action_dim, data.provenance

    def batch(self, agent: Agent, generators: Sequence[torch.Generator]) -> Batch:
        """Drawn uniformly."""
        return self.data.sample(agent.config.batch_size, generators if agent.members else generators[0])

    def figures(self, member: int) -> dict[str, float]:
        """None."""
        return {}

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor], member: int) -> None:
        """Nothing."""


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


Bounds = tuple[tuple[float, ...], tuple[float, ...]]


def bounds_of(task: Task, action_dim: int) -> Bounds:
    """Lower and upper bounds of a task's actions; [-1, 1] where it has no environment."""
    if task.id is None:
        return (-1.0,) * action_dim, (1.0,) * action_dim
    _, low, high, _ = facts(task)
    return tuple(low.tolist()), tuple(high.tolist())


def make_policy(agent: Agent, config: TrainConfig, data: Source, bounds: Bounds, member: int = 0) -> Policy:
    """A member's present policy, as it is deployed: the online actor and the target critic."""
    c = agent.config
    mean, std = ((), ()) if data.normalisation is None else (tuple(x.tolist()) for x in data.normalisation)
    step = int(agent.state["step"])
    actor, critic = agent.deployed(member)
    origin = {
        "agent": config.configuration or agent.name,
        "algorithm": agent.name,
        "step": step,
        "seed": config.seed,
        "versions": versions(),
        "data": data.provenance.to_dict(),
    }
    described = PolicyConfig(
        agent.state_dim,
        agent.action_dim,
        *bounds,
        c.actor,
        c.critic_hidden if critic is not None else (),
        c.critic_layer_norm,
        c.candidates,
        c.temperature,
        config.env,
        origin,
        mean,
        std,
        c.critic_activation,
    )
    return Policy(actor, critic, described)


class Means:
    """Means of metrics over an interval, kept on the device; `members` is the agent's."""

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one update's metrics."""
        if self.sums:
            for name, value in metrics.items():
                self.sums[name] += value
        else:
            self.sums = {name: value.expand(self.members).clone() for name, value in metrics.items()}
        self.count += 1

    def take(self) -> list[dict[str, float]]:
        """The means of each member, fetched in one transfer; counting starts anew."""
        values = torch.stack([value.float() for value in self.sums.values()], -1) / self.count
        means = [
            dict(zip(self.sums, row, strict=True)) for row in values.reshape(-1, len(self.sums)).tolist()
        ]
        self.sums, self.count = {}, 0
        return means


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a question the loop can ask.

    A second Ctrl-C acts at once.
    """
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere signals can't be handled
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                previous[number] = signal.signal(number, stop)
    try:
        yield lambda: stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def load_data(config: TrainConfig, console: Console) -> tuple[Task, Transitions]:
    """The dataset as it is, and the task as the dataset has it."""
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
            say=_say(console),
        )
    finally:
        for context, _ in bars.values():
            context.__exit__(None, None, None)
    _say(console, "")(data.provenance.line())
    return task, data


def _say(console: Console, style: str = "yellow") -> Callable[[str], None]:
    """Print a line as it is, whatever the files and paths that it speaks of are called."""
    return lambda line: console.print(
        printable(line), style=style, highlight=False, markup=False, soft_wrap=True
    )


def load_source(
    config: TrainConfig, seeds: Sequence[int], device: torch.device, console: Console, discount: float
) -> tuple[Task, Source]:
    """What the members learn from, and the task as it has it.

    Raises:
        ConfigError: a setting of the dataset that can't be had while acting.
    """
    d, online = config.dataset, config.online
    if online is not None and not online.offline_share:
        for key, default in vars(DatasetConfig()).items():
            if key in ("reward", "normalise_observations", "n_step") and getattr(d, key) != default:
                raise ConfigError(f"dataset.{key}={getattr(d, key)}: there is no dataset to do it to")
        return config.env, Experience(config.env, online, seeds, device)
    task, data = load_data(config, console)
    rule = transforms.reward_rule(data, d.reward)
    data = transforms.reward(data, d.reward)
    if d.normalise_observations:
        data = transforms.normalise_observations(data)
    if online is None:
        return task, Dataset(transforms.n_step(data, d.n_step, discount).to(device))
    if d.n_step != 1:
        raise ConfigError(f"dataset.n_step={d.n_step}: an agent that acts meanwhile learns from single steps")
    return task, Experience(task, online, seeds, device, data.to(device), rule)


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
    return train_group([(config, said)], console)[0]


def train_group(
    members: Sequence[tuple[TrainConfig, dict[str, Any]]], console: Console
) -> list[dict[str, Any]]:
    """Train several runs as members of one program.

    Member k is, up to rounding, the run that its configuration alone would be, and its folder is an ordinary
    run's: `resume` takes it alone or in a group. A member that diverges is left as it was last saved, the
    others go on.

    Args:
        members: configuration of each run, and the same as plain values. They may differ in seed, folder and
            `by_member`.
        console: where people look.

    Returns:
        What each `result.json` holds.

    Raises:
        Interrupted: the user stopped it; everything is saved.
        CpqlError: anything else the user can mend; also, when the others are finished, that one diverged.
    """
    config = members[0][0]
    if config.threads:
        torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        for own, _ in members:
            stack.enter_context(claimed(Path(own.run_dir)))
        runs = [Run(own, said) for own, said in members]
        if all(run.finished for run in runs):
            return [run.result() for run in runs]
        if config.resume and not any(run.begun for run in runs):
            raise CheckpointError(f"{runs[0].folder} holds no run to resume (no config.yaml)")
        return _set_up(runs, console).run_to_end()


def _set_up(runs: Sequence[Run], console: Console) -> _Training:
    """Check and load all that a training needs; nothing is written yet."""
    config = runs[0].config
    device = choose_device(config.device)
    if config.precision == "tf32" and device.type != "cuda":
        raise ConfigError("precision=tf32: only a CUDA device has it; use precision=fp32 or precision=bf16")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    kind, settings = _settings_of_all([run.config for run in runs])
    for run in runs:
        run.check_length(settings.schedule)
    if config.checkpoint and settings.lr_decay == "cosine":
        raise ConfigError(
            f"agent.lr_decay=cosine: checkpoint={config.checkpoint} is at its end, where the rates are 0: "
            "expected agent.lr_decay=none"
        )
    seeds = [run.config.seed for run in runs]
    task, source = load_source(config, seeds, device, console, settings.discount)
    seed: int | list[int] = seeds if len(seeds) > 1 else seeds[0]
    matmul_dtype = torch.bfloat16 if config.precision == "bf16" else None
    agent = kind(
        source.state_dim, source.action_dim, settings, seed=seed, device=device, matmul_dtype=matmul_dtype
    )
    return _Training(runs, task, agent, source, console)


def _settings_of_all(configs: Sequence[TrainConfig]) -> tuple[type[Agent], AgentConfig]:
    """One agent's settings for all members, with a tuple where they differ.

    Raises:
        ConfigError: they differ in what they may not.
    """
    chosen = [agent_config(config) for config in configs]
    kind, first = chosen[0]
    rest = {name: getattr(configs[0], name) for name in vars(configs[0]) if name not in OWN}
    for config, (other, settings) in zip(configs, chosen, strict=True):
        same = {name: getattr(first, name) for name in kind.by_member}
        if other is not kind or replace(settings, **same) != first:
            raise ConfigError(
                f"members may differ in {', '.join(kind.by_member)}, not in other settings of the agent"
            )
        if any(getattr(config, name) != value for name, value in rest.items()):
            raise ConfigError(
                "members may differ in seed, run_dir and the agent's rates, not in other settings"
            )
    every = {name: tuple(getattr(settings, name) for _, settings in chosen) for name in kind.by_member}
    differing: dict[str, Any] = {name: values for name, values in every.items() if len(set(values)) > 1}
    return kind, replace(first, **differing)


def _common_steps(runs: Sequence[Run]) -> list[int]:
    """The steps that all runs can go on from, the last one first; 0 is the beginning.

    Raises:
        CheckpointError: there is but the beginning, and some have gone on from it for longer than from one
            checkpoint to the next.
    """
    common = sorted(set.intersection(*(run.steps() for run in runs)), reverse=True)
    if common == [0] and any(max(run.steps()) > run.config.budget.save_every for run in runs):
        where = ", ".join(f"{run.folder} at {max(run.steps()):,}" for run in runs)
        raise CheckpointError(f"no checkpoint that all members have ({where}): resume them one by one")
    return common


class _Training:
    """One program under way, and the runs that are its members."""

    def __init__(
        self, runs: Sequence[Run], task: Task, agent: Agent, source: Source, console: Console
    ) -> None:
        self.runs, self.agent, self.source, self.console = runs, agent, source, console
        self.config = replace(runs[0].config, env=task)
        self.bounds = bounds_of(task, agent.action_dim)
        self.generators = [torch.Generator(source.device).manual_seed(run.config.seed) for run in runs]
        self.means = Means(agent.members)
        self.diverged: dict[int, CpqlError] = {}
        self.step = self.restore()
        self.saved = self.step
        if not self.step:
            self.start_from_checkpoints()

    def run_to_end(self) -> list[dict[str, Any]]:
        """Train what is left, saving and evaluating on the way."""
        config, source = self.config, self.source
        if config.compile:
            say = _say(self.console, "")
            say("compiling the update: a minute or two, seconds where it was compiled before")
        made = program(self.agent, config.compile, cache_folder() / "programs", _say(self.console))
        with ExitStack() as stack:
            for run in self.runs:
                run.start_logger(self.step, config.env, self.agent.name)
                stack.callback(run.close)
            if made.compiled:
                # One program for the whole run: a second one would mean that something depends on data.
                stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
            try:
                for run in self.runs:
                    run.begin(self.step, made.how, lambda: source.provenance)
                self.loop(made.update, stack.enter_context(_stop_signals()))
                results = [run.finish(self.step) for _, run in self.going()]
            except ActingError as error:
                self.save()
                raise ActingError(f"{error}; {self.where()}") from error
            except OSError as error:
                what = f"{error.filename}: " if error.filename else ""
                raise CheckpointError(
                    f"{what}{error.strerror or error}: training can't be saved any further; {self.where()}"
                ) from error
        if self.diverged:
            raise next(iter(self.diverged.values()))
        return results

    def where(self) -> str:
        """What is saved, and how to go on from it."""
        folders = ", ".join(str(run.folder) for run in self.runs)
        if not self.saved:
            return f"nothing was saved yet in {folders}"
        return f"saved up to update {self.saved:,} in {folders}; go on with the same command and resume=true"

    def going(self) -> list[tuple[int, Run]]:
        """The members that haven't diverged, by number."""
        return [(k, run) for k, run in enumerate(self.runs) if k not in self.diverged]

    def loop(self, update: Update, stopped: Callable[[], bool]) -> None:
        """All updates that are left."""
        budget, agent = self.config.budget, self.agent
        # A single run has no member axis.
        draws = self.generators if agent.members else self.generators[0]
        began, text, first = time.monotonic(), self.last_scores(), self.step
        with progress(self.console, "training", budget.updates, self.step) as bar:
            with bar.paused():
                # What a process that was killed still owed, or the policy that it starts from.
                if self.step or self.config.checkpoint:
                    self.evaluate(stopped)
            while self.step < budget.updates and not stopped():
                batch = self.source.batch(agent, self.generators)
                self.means.add(update(batch, agent.draw(draws)))
                self.step += 1
                if self.due(budget.log_every):
                    text = self.log(time.monotonic() - began - bar.away, self.step - first)
                if self.due(budget.save_every) or self.due(budget.evaluate_every) or stopped():
                    with bar.paused():
                        self.save()
                        self.evaluate(stopped)
                bar.update(self.step, text)
        if stopped():
            raise Interrupted(f"stopped after {self.step:,} of {budget.updates:,} updates; {self.where()}")

    def due(self, every: int) -> bool:
        """Whether something that happens every so many updates, and at the end, happens now; 0 is never."""
        return self.step == self.config.budget.updates or (every > 0 and self.step % every == 0)

    def evaluate(self, stopped: Callable[[], bool]) -> None:
        """Score every member where that is due, and drop checkpoints that are no longer needed."""
        budget = self.config.budget
        if self.due(budget.evaluate_every):
            episodes = budget.final_episodes if self.step == budget.updates else budget.episodes
            with contextlib.suppress(Interrupted):  # the loop says so
                for k, run in self.going():
                    run.evaluate(self.step, self.policy(k, run), episodes, stopped)
        for _, run in self.going():
            run.prune()

    def policy(self, member: int, run: Run) -> Policy:
        """A member's present policy, for the task as the data have it."""
        config = replace(run.config, env=self.config.env)
        return make_policy(self.agent, config, self.source, self.bounds, member)

    def log(self, seconds: float, updates: int) -> str:
        """Write the interval's means, and say them in short: over the members that haven't diverged."""
        means = [each | self.source.figures(k) for k, each in enumerate(self.means.take())]
        for k, run in self.going():
            wrong = next(
                (n for n, value in means[k].items() if not math.isfinite(value) and n != "online/return"),
                None,
            )
            if wrong is None:
                run.log(self.step, means[k], seconds, updates)
                continue
            self.diverge(k, run, f"{wrong} is {means[k][wrong]}")
        going = [means[k] for k, _ in self.going()]
        text = [
            f"{word} {statistics.fmean(m[name] for m in going):{form}}"
            for word, name, form in SHOWN
            if name in going[0] and math.isfinite(going[0][name])
        ]
        return "  ".join([*text, self.last_scores()])

    def diverge(self, member: int, run: Run, what: str) -> None:
        """Leave a member as it was last saved.

        Raises:
            CpqlError: there are no others.
        """
        where = f" in {run.folder}" if self.agent.members else ""
        error = CpqlError(
            f"{what} at update {self.step}: training diverged{where}. A smaller agent.eta or actor_lr "
            f"usually helps; the last checkpoint is {run.last}"
        )
        if len(self.going()) == 1:
            raise error
        self.diverged[member] = error
        _say(self.console, "red")(str(error))

    def last_scores(self) -> str:
        """The last evaluations, for the bar."""
        last = [evaluations[-1] for _, run in self.going() if (evaluations := run.evaluations())]
        if not last:
            return ""
        scored = last[0]["score"] is not None
        values = [f"{e['score' if scored else 'return_mean']:.1f}" for e in last]
        return f"{'score' if scored else 'return'} {' '.join(values)}"

    def save(self) -> None:
        """Write a checkpoint of every member that training can go on from, alone or in a group.

        Once all have theirs, each may drop older ones: some step is always there for all.
        """
        if self.saved == self.step:
            return
        for k, run in self.going():
            state = self.agent.state_dict(k)
            if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
                self.diverge(k, run, "a weight isn't finite")
                continue
            tensors = {f"agent.{name}": tensor for name, tensor in state.items()}
            tensors["generator"] = self.generators[k].get_state()
            tensors["means_count"] = torch.tensor(self.means.count)
            sums = self.means.sums.items()
            tensors |= {f"means.{name}": value[k] if self.agent.members else value for name, value in sums}
            tensors |= {f"source.{name}": value for name, value in self.source.state_dict(k).items()}
            run.save(self.step, self.policy(k, run), tensors)
        self.saved = self.step

    def start_from_checkpoints(self) -> None:
        """Take every network and optimiser from the runs that these start from, where they name one."""
        for k, run in enumerate(self.runs):
            if run.config.checkpoint:
                tensors, _ = load_training(*find_training(Path(run.config.checkpoint)))
                try:
                    self.agent.load_state_dict(_named("agent.", tensors), k)
                except ValueError as error:
                    raise CheckpointError(f"checkpoint={run.config.checkpoint}: {error}") from error

    def restore(self) -> int:
        """Take up the last checkpoint that all members have, and give its step.

        Raises:
            CheckpointError: there are some and none can be read, or they are another training's.
        """
        *steps, beginning = _common_steps(self.runs)
        damage: CheckpointError | None = None
        for step in steps:
            try:
                read = [run.read(step) for run in self.runs]
            except CheckpointError as error:
                damage = error
                _say(self.console)(f"warning: {error}; trying the checkpoint before it")
                continue
            self.take_up(step, read)
            return step
        if damage is not None:
            raise damage
        return beginning

    def take_up(self, step: int, read: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Go on from a checkpoint's tensors and state, by member."""
        sums: list[dict[str, Tensor]] = []
        for k, (run, (tensors, state)) in enumerate(zip(self.runs, read, strict=True)):
            try:
                run.check_data(state["data_sha256"], self.source.provenance.sha256)
                self.agent.load_state_dict(_named("agent.", tensors), k)
                self.source.load_state_dict(_named("source.", tensors), k)
                self.generators[k].set_state(tensors["generator"])
                self.means.count = int(tensors["means_count"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{run.checkpoints}, step {step}: {error}") from error
            sums.append({n: value.to(self.source.device) for n, value in _named("means.", tensors).items()})
        self.means.sums = (
            {name: torch.stack([each[name] for each in sums]) for name in sums[0]}
            if self.agent.members
            else sums[0]
        )


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names have a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
