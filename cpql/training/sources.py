"""What a training learns from: a dataset, or what its members meet meanwhile (`cpql.training.online`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

import cpql.data
from cpql.agents import ActorCriticConfig, Agent, AgentConfig
from cpql.data import transforms
from cpql.data.transitions import Batch, Provenance, Transitions, split
from cpql.errors import ConfigError
from cpql.tasks import Task
from cpql.training.config import DatasetConfig, OnlineConfig, TrainConfig
from cpql.training.logging import progress_bars, say
from cpql.training.online import Explorer

__all__ = ["Source", "load_data", "load_source"]


class Source:
    """What the members of a training learn from: a dataset, what they meet while they act, or both, mixed.

    Args:
        task: where to act.
        online: how to act; None doesn't.
        seeds: one for each member.
        device: of buffers and batches.
        data: the dataset, which gives `online.offline_fraction` of each batch, or all of it.
        reward: what training makes of rewards [B], as already in `data`.
    """

    def __init__(
        self,
        task: Task,
        online: OnlineConfig | None,
        seeds: Sequence[int],
        device: torch.device,
        data: Transitions | None = None,
        reward: Callable[[Tensor], Tensor] = lambda r: r,
    ) -> None:
        self.task, self.device, self.data = task, device, data
        self.normalisation = None if data is None else data.normalisation
        self.explorers, self.fraction = list[Explorer](), 0.0
        if online is not None:
            self.fraction = online.offline_fraction
            self.explorers = [Explorer(task, online, s, device, reward, self.normalisation) for s in seeds]
        dims = self.explorers[0].buffer if data is None else data
        self.state_dim, self.action_dim = dims.state_dim, dims.action_dim

    @property
    def provenance(self) -> Provenance:
        """The dataset's; with acting also the environment and the steps so far."""
        if self.data is not None and not self.explorers:
            return self.data.provenance
        steps = self.explorers[0].steps
        acted = {"environment": self.task.id, "steps": steps}
        if self.data is not None:
            p = self.data.provenance
            return replace(p, source=f"{p.source} + online", details=p.details | {"online": acted})
        nothing = (None,) * 5
        return Provenance("online", str(self.task.id), None, None, steps, 0, *nothing, acted)

    def batch(self, agent: Agent, generators: Sequence[torch.Generator]) -> Batch:
        """One update's batch, drawn uniformly with replacement, after every member has acted."""
        size = agent.config.batch_size
        if self.data is not None and not self.explorers:
            return self.data.sample(size, generators if agent.members else generators[0])
        old = round(self.fraction * size) if self.data is not None else 0
        each = []
        for k, (explorer, generator) in enumerate(zip(self.explorers, generators, strict=True)):
            explorer.explore(agent, k, generator)
            rows = [explorer.buffer.rows(size - old, generator)]
            if self.data is not None:
                rows.append(self.data.rows(old, generator))
            each.append(torch.cat(rows))
        return split(torch.stack(each) if agent.members else each[0], self.state_dim, self.action_dim)

    def metrics(self, member: int) -> dict[str, float]:
        """A member's `Explorer.metrics`; none without acting."""
        return self.explorers[member].metrics() if self.explorers else {}

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """A member's `Explorer.state_dict`; a dataset has no state."""
        return self.explorers[member].state_dict() if self.explorers else {}

    def load_state_dict(self, state: Mapping[str, Tensor], member: int) -> None:
        """Take over what `state_dict` gave of a member."""
        if self.explorers:
            self.explorers[member].load_state_dict(state)


def load_data(config: TrainConfig, console: Console) -> tuple[Task, Transitions]:
    """A training's dataset as its source has it, and the task of the settings as the data have it.

    Raises:
        DataError: there are no such data, or they aren't valid.
    """
    d = config.dataset
    with progress_bars(console) as progress:
        task, data = cpql.data.load(
            config.env,
            source=d.source,
            path=d.path,
            id=d.id,
            size=d.size,
            seed=d.seed,
            time_limits=d.time_limits,
            progress=progress,
            say=lambda line: say(console, line, "yellow"),
        )
    say(console, data.provenance.line())
    return task, data


def load_source(
    config: TrainConfig, seeds: Sequence[int], device: torch.device, console: Console, agent: AgentConfig
) -> Source:
    """Load what the members learn from; its task is the one of the settings as the data have it.

    Args:
        config: of the training.
        seeds: one for each member.
        device: where the data go.
        console: for progress, warnings and what was loaded.
        agent: settings of the agent that learns.

    Raises:
        ConfigError: a setting of the dataset that isn't possible while acting.
        DataError: there are no such data, or they aren't valid.
    """
    d, online = config.dataset, config.online
    if online is not None and not isinstance(agent, ActorCriticConfig):
        name = config.agent["name"]
        raise ConfigError(f"agent={name}: expected mode=offline for an agent that has no critic")
    if online is not None and agent.next_actions:
        raise ConfigError(
            f"{agent.next_actions}: expected 0 while acting, as only a dataset has next actions"
        )
    if online is not None and not online.offline_fraction:
        for key, default in vars(DatasetConfig()).items():
            if key in ("reward", "normalise_observations", "n_step") and getattr(d, key) != default:
                raise ConfigError(f"dataset.{key}={getattr(d, key)}: expected {default} without a dataset")
        return Source(config.env, online, seeds, device)
    task, data = load_data(config, console)
    rule = transforms.reward_rule(data, d.reward)
    data = transforms.reward(data, d.reward)
    if d.normalise_observations:
        data = transforms.normalise_observations(data)
    if online is None:
        if agent.next_actions:
            data = transforms.next_actions(data)
        if d.n_step != 1:
            if not isinstance(agent, ActorCriticConfig):
                raise ConfigError(f"dataset.n_step={d.n_step}: expected 1 for an agent without a critic")
            data = transforms.n_step(data, d.n_step, agent.discount)
    elif d.n_step != 1:
        raise ConfigError(f"dataset.n_step={d.n_step}: an agent that acts meanwhile learns from single steps")
    return Source(task, online, seeds, device, data.to(device), rule)
