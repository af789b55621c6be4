"""What a training learns from: a dataset, or experience collected meanwhile (`cpql.train.online`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor

import cpql.data
from cpql.agents import ActorCriticConfig, Agent, AgentConfig
from cpql.data import transforms
from cpql.data.transitions import Batch, Transitions
from cpql.errors import ConfigError
from cpql.tasks import Task
from cpql.train.config import DatasetConfig, TrainConfig
from cpql.train.logging import progress_bars, say
from cpql.train.online import Experience

__all__ = ["Dataset", "Source", "load_source"]


class Dataset:
    """Transitions as a source."""

    def __init__(self, data: Transitions) -> None:
        self.data, self.device, self.normalisation = data, data.device, data.normalisation
        self.state_dim, self.action_dim, self.provenance = data.state_dim, data.action_dim, data.provenance

    def batch(self, agent: Agent, generators: Sequence[torch.Generator]) -> Batch:
        """Draw one update's batch uniformly, with replacement."""
        return self.data.sample(agent.config.batch_size, generators if agent.members else generators[0])

    def metrics(self, member: int) -> dict[str, float]:
        """No metrics."""
        return {}

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], member: int) -> None:
        """Do nothing."""


Source = Dataset | Experience


def load_source(
    config: TrainConfig, seeds: Sequence[int], device: torch.device, console: Console, agent: AgentConfig
) -> tuple[Task, Source]:
    """Load the task as its data have it, and what the members learn from.

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
    if online is not None and agent.next_actions:
        raise ConfigError("agent.critic_penalty: expected 0 while acting, as the paper has it online")
    if online is not None and not online.offline_fraction:
        for key, default in vars(DatasetConfig()).items():
            if key in ("reward", "normalise_observations", "n_step") and getattr(d, key) != default:
                raise ConfigError(f"dataset.{key}={getattr(d, key)}: expected {default} without a dataset")
        return config.env, Experience(config.env, online, seeds, device)
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
        return task, Dataset(data.to(device))
    if d.n_step != 1:
        raise ConfigError(f"dataset.n_step={d.n_step}: an agent that acts meanwhile learns from single steps")
    return task, Experience(task, online, seeds, device, data.to(device), rule)
