"""Episodes of a run's policy in the environment of its own task, and its critic's values there."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpql.deploy.policy import Policy
from cpql.environments import make_task_environment

__all__ = ["EPISODES", "HORIZON", "SEED", "Array", "Episode", "episodes", "q_bias", "values"]

EPISODES, SEED = 10, 1000
# At gamma 0.99 what comes after so many steps is 5% of a return: a time limit nearer than that spoils it.
HORIZON = 300

Array = NDArray[Any]


class Episode(NamedTuple):
    """One whole episode of T steps.

    Attributes:
        seed: of the environment's reset.
        observations: [T, S], those that the policy acted on.
        actions: [T, A], in the environment's bounds.
        rewards: [T].
        terminated: whether the task ended it, and not the time limit.
    """

    seed: int
    observations: Array
    actions: Array
    rewards: Array
    terminated: bool

    @property
    def known(self) -> int:
        """The number of steps whose discounted return to go isn't cut short by the time limit."""
        return len(self.rewards) if self.terminated else max(1, len(self.rewards) - HORIZON)


def episodes(policy: Policy) -> list[Episode]:
    """The policy's episodes from the seeds that all measurements share; the policy's noise is seeded too."""
    policy.seed(SEED)
    found = []
    for seed in range(SEED, SEED + EPISODES):
        environment = make_task_environment(policy.config.task)
        observation, _ = environment.reset(seed=seed)
        observations, actions, rewards, terminated, truncated = [], [], [], False, False
        while not (terminated or truncated):
            action, _ = policy.predict(observation)
            observations.append(observation)
            actions.append(action)
            observation, reward, terminated, truncated, _ = environment.step(action)
            rewards.append(float(reward))
        environment.close()
        arrays = np.stack(observations), np.stack(actions), np.array(rewards)
        found.append(Episode(seed, *arrays, bool(terminated)))
    return found


def q_bias(policy: Policy, found: list[Episode], discount: float) -> tuple[float, float]:
    """Mean over the episodes' states of Q minus the discounted return to go, and of that return."""
    errors: list[Array] = []
    returns: list[Array] = []
    for episode in found:
        to_go = np.zeros(len(episode.rewards) + 1)
        for step in range(len(episode.rewards) - 1, -1, -1):
            to_go[step] = episode.rewards[step] + discount * to_go[step + 1]
        count = episode.known
        q = values(policy, episode.observations[:count], episode.actions[:count])
        errors.append(q - to_go[:count])
        returns.append(to_go[:count])
    return float(np.concatenate(errors).mean()), float(np.concatenate(returns).mean())


@torch.no_grad()
def values(policy: Policy, states: Array, actions: Array) -> Array:
    """The smaller value of the twins [N], of observations and actions as the environment has them."""
    low, high = (torch.tensor(bound) for bound in (policy.config.action_low, policy.config.action_high))
    action = 2.0 * (torch.from_numpy(actions).float() - low) / (high - low) - 1.0
    assert policy.critic is not None
    q: Tensor = policy.critic(policy.normalise(torch.from_numpy(states).float()), action)
    return q.amin(0).double().numpy()
