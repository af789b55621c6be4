"""A task: an environment to act in, the dataset to learn from, and the returns that scores refer to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """One benchmark task; `configs/env/NAME.yaml` holds one as data.

    Attributes:
        name: what the user types, `hopper-medium`.
        id: Gymnasium's environment id for evaluation. D4RL's data came from the v2 physics, of which v4
            is the closest living relative.
        dataset: D4RL's dataset id, `hopper-medium-v2`.
        random_return: the return that scores 0 (D4RL's reference, undiscounted).
        expert_return: the return that scores 100.
    """

    name: str
    id: str
    dataset: str
    random_return: float
    expert_return: float

    def score(self, episode_return: float) -> float:
        """D4RL's normalised score, in percent: `100 (R - R_random) / (R_expert - R_random)`."""
        return 100.0 * (episode_return - self.random_return) / (self.expert_return - self.random_return)
