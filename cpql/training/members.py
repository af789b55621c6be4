"""The members of one program: an agent with a member axis, and a run's folder for each of them."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cpql.agents import Agent
from cpql.deploy.config import PolicyConfig
from cpql.deploy.policy import Policy
from cpql.environments import spec_of
from cpql.errors import CheckpointError, CpqlError, Interrupted
from cpql.io import versions
from cpql.training.checkpoint import find_training, load_training
from cpql.training.logging import say
from cpql.training.runs import Run
from cpql.training.sources import Source

__all__ = ["Means", "Members"]

# What the progress line shows of the metrics: a word, the metric's name, its format.
SHOWN = (
    ("Q", "critic/q", ".1f"),
    ("imitation", "actor/imitation", ".3f"),
    ("steps", "online/steps", ",.0f"),
    ("acting", "online/return", ",.0f"),
)


class Means:
    """Means of metrics over an interval, kept on the device; `members` is the agent's."""

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members, self.sums, self.counts = members, dict[str, Tensor](), dict[str, int]()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count one update's metrics; not every update has them all."""
        for name, value in metrics.items():
            if name in self.sums:
                self.sums[name] += value
                self.counts[name] += 1
            else:
                self.sums[name], self.counts[name] = value.expand(self.members).clone(), 1

    def take(self) -> list[dict[str, float]]:
        """The means of each member, fetched in one transfer; counting starts again."""
        values = torch.stack([total.float() / self.counts[name] for name, total in self.sums.items()], -1)
        names = list(self.sums)
        self.sums, self.counts = {}, {}
        return [dict(zip(names, row, strict=True)) for row in values.reshape(-1, len(names)).tolist()]

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """A member's sums and counts."""
        state = {f"sum.{name}": total[member] if self.members else total for name, total in self.sums.items()}
        return state | {f"count.{name}": torch.tensor(count) for name, count in self.counts.items()}

    def load_state_dicts(self, states: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        """Take over what `state_dict` gave of every member."""
        sums = [_named("sum.", state) for state in states]
        self.counts = {name: int(count) for name, count in _named("count.", states[0]).items()}
        self.sums = {
            name: torch.stack([each[name] for each in sums]).to(device) if self.members else total.to(device)
            for name, total in sums[0].items()
        }


class Members:
    """The members of a program under way: one agent, what it learns from, and the run of each member.

    A member that diverges is left as it was last saved, and the others continue.

    Args:
        runs: one for each member.
        agent: with a member axis if there are several runs.
        source: what they learn from.
        console: for progress and warnings.

    Attributes:
        step: gradient steps taken, at first those of the last checkpoint that all members have.

    Raises:
        CheckpointError: the checkpoints can't be read, or are another training's.
    """

    def __init__(self, runs: Sequence[Run], agent: Agent, source: Source, console: Console) -> None:
        self.runs, self.agent, self.source, self.console = runs, agent, source, console
        self.config = replace(runs[0].config, env=source.task)
        self.generators = [torch.Generator(source.device).manual_seed(run.config.seed) for run in runs]
        self.means = Means(agent.members)
        self.diverged: dict[int, CpqlError] = {}
        self.bounds = ((-1.0,) * agent.action_dim, (1.0,) * agent.action_dim)
        if source.task.id is not None:
            spec = spec_of(source.task)
            self.bounds = tuple(spec.action_low.tolist()), tuple(spec.action_high.tolist())
        self.step = self.saved = self._restore()
        # A run that starts from another one's checkpoint counts from 0; its agent counts on.
        self.before = int(agent.state["step"]) - self.step

    @property
    def phase(self) -> int:
        """The phase of the next update: the updates that the agent has taken, modulo its `cycle`."""
        return (self.before + self.step) % self.agent.cycle

    def active(self) -> list[tuple[int, Run]]:
        """The members that haven't diverged, by number."""
        return [(k, run) for k, run in enumerate(self.runs) if k not in self.diverged]

    def where(self) -> str:
        """Say what is saved, and how to continue."""
        folders = ", ".join(str(run.folder) for run in self.runs)
        saved = (
            f"saved up to update {self.saved:,} in {folders}; continue with the same command and resume=true"
        )
        return saved if self.saved else f"nothing was saved yet in {folders}"

    def due(self, every: int) -> bool:
        """Whether an event that occurs every so many updates, and at the end, is due; 0 is never."""
        return self.step == self.config.budget.updates or (every > 0 and self.step % every == 0)

    def log(self, seconds: float, updates: int) -> str:
        """Write the interval's means, and return them in short, averaged over the members."""
        means = [each | self.source.metrics(k) for k, each in enumerate(self.means.take())]
        for k, run in self.active():
            broken = [n for n, x in means[k].items() if not math.isfinite(x) and n != "online/return"]
            if broken:
                self._diverge(k, run, f"{broken[0]} is {means[k][broken[0]]}")
            else:
                run.log(self.step, means[k], seconds, updates)
        active = [means[k] for k, _ in self.active()]
        text = [
            f"{word} {statistics.fmean(m[name] for m in active):{form}}"
            for word, name, form in SHOWN
            if name in active[0] and math.isfinite(active[0][name])
        ]
        return "  ".join([*text, self.last_scores()])

    def last_scores(self) -> str:
        """The scores of the last evaluations, for the progress line."""
        last = [evaluations[-1] for _, run in self.active() if (evaluations := run.evaluations())]
        if not last:
            return ""
        of, key = ("return", "return_mean") if last[0]["score"] is None else ("score", "score")
        return " ".join([of, *(f"{evaluation[key]:.1f}" for evaluation in last)])

    def _diverge(self, member: int, run: Run, what: str) -> None:
        """Leave a member as it was last saved, or raise a CpqlError if there are no others."""
        where = f" in {run.folder}" if self.agent.members else ""
        last = f"{run.checkpoints}/step_{max(run.steps()):08d}" if max(run.steps()) else "none"
        error = CpqlError(
            f"{what} at update {self.step}: training diverged{where}. A smaller agent.eta or actor_lr "
            f"usually helps; the last checkpoint is {last}"
        )
        if len(self.active()) == 1:
            raise error
        self.diverged[member] = error
        say(self.console, str(error), "red")

    def policy(self, member: int) -> Policy:
        """A member's present policy: the online actor, and the target critic if there is one."""
        agent, run, c, source = self.agent, self.runs[member].config, self.agent.config, self.source
        actor, critic = agent.deployed(member)
        mean, std = ((), ()) if source.normalisation is None else (x.tolist() for x in source.normalisation)
        config = PolicyConfig(
            state_dim=agent.state_dim,
            action_dim=agent.action_dim,
            action_low=self.bounds[0],
            action_high=self.bounds[1],
            actor=c.actor,
            critic_hidden=() if critic is None else c.critic_hidden,
            critic_layer_norm=critic is not None and c.critic_layer_norm,
            critic_activation="mish" if critic is None else c.critic_activation,
            candidates=agent.rule[0],
            temperature=agent.rule[1],
            task=self.config.env,
            origin={
                "agent": run.configuration or agent.name,
                "algorithm": agent.name,
                "step": int(agent.state["step"]),
                "seed": run.seed,
                "versions": versions(),
                "data": source.provenance.to_dict(),
            },
            observation_mean=tuple(mean),
            observation_std=tuple(std),
        )
        return Policy(actor, critic, config)

    def evaluate(self, stopped: Callable[[], bool]) -> None:
        """Score every member if that is due, and drop checkpoints that are no longer needed."""
        budget = self.config.budget
        if self.due(budget.evaluate_every):
            episodes = budget.final_episodes if self.step == budget.updates else budget.episodes
            with contextlib.suppress(Interrupted):  # the loop reports it
                for k, run in self.active():
                    run.evaluate(self.step, self.policy(k), episodes, stopped)
        for _, run in self.active():
            run.prune()

    def save(self) -> None:
        """Write a checkpoint of every member, from which it can be resumed alone or in a group.

        Older checkpoints are dropped only after all members have theirs, so that some step is always common
        to all.
        """
        if self.saved == self.step:
            return
        for k, run in self.active():
            state = self.agent.state_dict(k)
            if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
                self._diverge(k, run, "a weight isn't finite")
                continue
            parts = {"agent": state, "means": self.means.state_dict(k), "source": self.source.state_dict(k)}
            tensors = {f"{part}.{name}": x for part, named in parts.items() for name, x in named.items()}
            tensors["generator"] = self.generators[k].get_state()
            run.save(self.step, self.policy(k), tensors)
        self.saved = self.step

    def _restore(self) -> int:
        """Load the last checkpoint that all members have and that can be read, and return its step."""
        *steps, _ = common = sorted(set.intersection(*(run.steps() for run in self.runs)), reverse=True)
        if common == [0] and any(max(run.steps()) > run.config.budget.save_every for run in self.runs):
            where = ", ".join(f"{run.folder} at {max(run.steps()):,}" for run in self.runs)
            raise CheckpointError(f"no checkpoint that all members have ({where}): resume them one by one")
        for step in steps:
            try:
                read = [load_training(run.checkpoints, step) for run in self.runs]
            except CheckpointError as error:
                if step == steps[-1]:
                    raise
                say(self.console, f"warning: {error}; trying the checkpoint before it", "yellow")
            else:
                self._load(step, read)
                return step
        for k, run in enumerate(self.runs):
            if run.config.checkpoint:
                tensors, _ = load_training(*find_training(run.config.checkpoint))
                try:
                    self.agent.load_state_dict(_named("agent.", tensors), k)
                except ValueError as error:
                    raise CheckpointError(f"checkpoint={run.config.checkpoint}: {error}") from error
        return 0

    def _load(self, step: int, read: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        """Continue from a checkpoint's tensors and state, by member."""
        means = []
        for k, (run, (tensors, state)) in enumerate(zip(self.runs, read, strict=True)):
            try:
                then, now = state["data_sha256"], self.source.provenance.sha256
                if then != now:
                    raise CheckpointError(
                        f"{run.folder}: the run learnt from a dataset with SHA-256 {then}, this one has {now}"
                    )
                self.agent.load_state_dict(_named("agent.", tensors), k)
                self.source.load_state_dict(_named("source.", tensors), k)
                self.generators[k].set_state(tensors["generator"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{run.checkpoints}, step {step}: {error}") from error
            own = _named("means.", tensors)
            if "means_count" in tensors:  # older checkpoints have sums alone, and one count for all
                counts = {f"count.{name}": tensors["means_count"] for name in own}
                own = counts | {f"sum.{name}": total for name, total in own.items()}
            means.append(own)
        self.means.load_state_dicts(means, self.source.device)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names have a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
