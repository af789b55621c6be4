"""A replay buffer: the last transitions of an agent that learns while it acts, on its device."""

from __future__ import annotations

import torch
from torch import Tensor

from cpql.data.transitions import Batch, Rows, join

__all__ = ["ReplayBuffer"]


class ReplayBuffer(Rows):
    """A ring of transitions, in the layout of `Transitions.table`: [capacity, S + A + S + 2].

    Args:
        capacity: number of transitions that it holds; after that the oldest are replaced.
        state_dim: S.
        action_dim: A.
        device: where it lies.
    """

    def __init__(
        self, capacity: int, state_dim: int, action_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        self.state_dim, self.action_dim = state_dim, action_dim
        self.table = torch.zeros(capacity, 2 * state_dim + action_dim + 2, device=device)
        self.added = 0

    def __len__(self) -> int:
        """The number of transitions that it holds."""
        return min(self.added, len(self.table))

    def add(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_observations: Tensor,
        terminated: Tensor,
    ) -> None:
        """Take observations [B, S], actions [B, A] in [-1, 1], rewards [B], ends of the task [B] bool.

        Transitions that end at a time limit bootstrap like any other: their next observation is the last of
        the episode and not the next one's first.
        """
        discounts = 1.0 - terminated.float()
        rows = join(Batch(observations, actions, rewards, next_observations, discounts)).to(self.table)
        places = torch.arange(self.added, self.added + len(rows)) % len(self.table)
        self.table[places.to(self.table.device)] = rows
        self.added += len(rows)

    def state_dict(self) -> dict[str, Tensor]:
        """The transitions, and how many have been added."""
        return {"table": self.table[: len(self)], "added": torch.tensor(self.added)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave; a ValueError says that it is wider or longer than this one."""
        table = state["table"]
        if table.shape[1] != self.table.shape[1] or len(table) > len(self.table):
            raise ValueError(
                f"a buffer of shape {list(table.shape)} doesn't fit into one of {list(self.table.shape)}"
            )
        self.table[: len(table)] = table
        self.added = int(state["added"])
