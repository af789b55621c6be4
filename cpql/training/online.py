"""Acting while learning: a member's environments, and the buffer that it fills meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpql.agents import Agent
from cpql.data.replay import ReplayBuffer
from cpql.environments import action_bounds, make_task_environment, widths
from cpql.tasks import Task
from cpql.training.config import OnlineConfig

__all__ = ["Explorer"]

# Episodes over which the return that training shows is a mean.
RECENT = 10


class Explorer:
    """One member's environments, the transitions it has seen in them, and how it explores.

    Time limits end an episode and bootstrap: only what the environment calls terminated stops it. (Both
    official codes store them as terminals, `time_limits="terminal"`.)

    Args:
        task: where to act.
        config: how to act.
        seed: of the environments and of exploration.
        device: of the buffer.
        reward: what training makes of rewards [B].
        normalisation: mean and standard deviation [S] that the agent's states are normalised with.
    """

    def __init__(
        self,
        task: Task,
        config: OnlineConfig,
        seed: int,
        device: torch.device,
        reward: Callable[[Tensor], Tensor] = lambda r: r,
        normalisation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.config, self.reward, self.normalisation = config, reward, normalisation
        self.environments = [make_task_environment(task) for _ in range(config.environments)]
        state_dim, action_dim = widths(self.environments[0])
        self.low, high = action_bounds(self.environments[0])
        self.span = high - self.low
        self.buffer = ReplayBuffer(config.buffer_size, state_dim, action_dim, device)
        self.coins = torch.Generator().manual_seed(seed)
        self.steps, self.owed = 0, 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.episodes = 0
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        seeds = np.random.SeedSequence(seed).generate_state(len(self.environments))
        resets = zip(self.environments, seeds, strict=True)
        self.observations: list[NDArray[np.float64]] = [e.reset(seed=int(s))[0] for e, s in resets]
        self.returns = [0.0] * len(self.environments)

    @property
    def epsilon(self) -> float:
        """The current probability of a uniformly random action."""
        c = self.config
        done = min(1.0, self.steps / c.epsilon_steps) if c.epsilon_steps else 1.0
        return c.epsilon + done * (c.epsilon_end - c.epsilon)

    def explore(self, agent: Agent, member: int, generator: torch.Generator) -> None:
        """Act as often as one update requires, after filling the buffer for the first one."""
        while len(self.buffer) < max(1, min(self.config.start_steps, self.config.buffer_size)):
            self.step(agent, member, generator)
        self.owed += 1.0 / self.config.updates_per_step
        while self.owed > 0.0:
            self.step(agent, member, generator)
            self.owed -= len(self.environments)

    def step(self, agent: Agent, member: int, generator: torch.Generator) -> None:
        """Act once in every environment."""
        c, device = self.config, self.buffer.table.device
        count = len(self.environments)
        state = self._seen(self.observations)
        action = 2.0 * torch.rand(count, self.buffer.action_dim, generator=self.coins) - 1.0
        coin = torch.rand(count, generator=self.coins)
        push = c.noise * torch.randn(action.shape, generator=self.coins) if c.noise else 0.0
        if self.steps >= c.start_steps or c.start == "policy":
            chosen = (agent.act(state.to(device), generator, member, c.candidates).cpu() + push).clamp(-1, 1)
            action = torch.where((coin < self.epsilon).unsqueeze(-1), action, chosen)
        scaled = self.low + (action.numpy() + 1.0) * (0.5 * self.span)
        next_observations, rewards, ended = [], [], []
        for k, environment in enumerate(self.environments):
            observation, reward, terminated, truncated, _ = environment.step(scaled[k])
            next_observations.append(observation)
            rewards.append(float(reward))
            ended.append(terminated or (truncated and c.time_limits == "terminal"))
            self.returns[k] += float(reward)
            if terminated or truncated:
                self.recent.append(self.returns[k])
                self.episodes += 1
                self.returns[k] = 0.0
                observation, _ = environment.reset()
            self.observations[k] = observation
        self.buffer.add(
            state,
            action,
            self.reward(torch.tensor(rewards)),
            self._seen(next_observations),
            torch.tensor(ended),
        )
        self.steps += count

    def _seen(self, observations: list[NDArray[np.float64]]) -> Tensor:
        """Observations as the agent takes them, [B, S]."""
        state = torch.from_numpy(np.stack(observations)).float()
        if self.normalisation is None:
            return state
        mean, std = (tensor.cpu() for tensor in self.normalisation)
        return (state - mean) / std

    def metrics(self) -> dict[str, float]:
        """Steps and episodes so far, and the mean return of the last ones."""
        return {
            "online/steps": self.steps,
            "online/episodes": self.episodes,
            "online/return": fmean(self.recent) if self.recent else float("nan"),
            "online/epsilon": self.epsilon,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What exploring is resumed from, in new episodes: environments can't be saved."""
        state = {
            "steps": torch.tensor(self.steps),
            "owed": torch.tensor(self.owed, dtype=torch.float64),
            "episodes": torch.tensor(self.episodes),
            "recent": torch.tensor(list(self.recent), dtype=torch.float64),
            "coins": self.coins.get_state(),
        }
        if self.config.save_buffer:
            state |= {f"buffer.{name}": tensor for name, tensor in self.buffer.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from there; without a saved buffer a new one is filled before the next update."""
        self.steps, self.owed = int(state["steps"]), float(state["owed"])
        self.episodes, self.recent = int(state["episodes"]), deque(state["recent"].tolist(), RECENT)
        self.coins.set_state(state["coins"])
        if self.config.save_buffer:
            self.buffer.load_state_dict({name: state[f"buffer.{name}"] for name in ("table", "added")})
        self._begin(int(torch.randint(2**31, (), generator=self.coins)))
