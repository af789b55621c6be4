"""Critics: `TwinCritic` for Q(s, a), `ValueFunction` for V(s), and `Critic`, what an optimiser trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpql.networks import MLP, Activation, Initialisation, Norm

__all__ = ["Critic", "TwinCritic", "ValueFunction"]


class TwinCritic(nn.Module):
    """Two Q-functions as one network with a members axis of 2."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        *,
        layer_norm: Norm = False,
        activation: Activation = "mish",
        initial: Initialisation = "torch",
        members: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.q = MLP(
            state_dim + action_dim, hidden, 1, (*members, 2), layer_norm, activation, initial, "critic"
        )

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Both values of each pair.

        Args:
            state: [*members, *batch, S].
            action: [*members, *batch, A]; batch is broadcast against the state's.

        Returns:
            [*members, 2, *batch].
        """
        m = len(self.members)
        batch = torch.broadcast_shapes(state.shape[m:-1], action.shape[m:-1])  # type: ignore[no-untyped-call]
        pair = torch.cat([x.expand(*x.shape[:m], *batch, x.shape[-1]) for x in (state, action)], -1)
        q: Tensor = self.q(pair.reshape(*pair.shape[:m], 1, -1, pair.shape[-1]))
        return q.reshape(*self.members, 2, *batch)


class ValueFunction(nn.Module):
    """A state's value V(s)."""

    def __init__(
        self,
        state_dim: int,
        hidden: Sequence[int] = (256, 256, 256),
        *,
        layer_norm: Norm = False,
        activation: Activation = "mish",
        initial: Initialisation = "torch",
        members: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.v = MLP(state_dim, hidden, 1, members, layer_norm, activation, initial, "critic")

    def forward(self, state: Tensor) -> Tensor:
        """Map [*members, B, S] to [*members, B]."""
        v: Tensor = self.v(state)
        return v.squeeze(-1)


class Critic(nn.Module):
    """The networks that share the critic's optimiser: twin Q and, where the algorithm has one, V."""

    def __init__(self, twin: TwinCritic, value: ValueFunction | None = None) -> None:
        super().__init__()
        self.twin, self.value = twin, value

    def q(self, state: Tensor, action: Tensor) -> Tensor:
        """Both values [*members, 2, B] of state-action pairs."""
        q: Tensor = self.twin(state, action)
        return q

    def v(self, state: Tensor) -> Tensor:
        """Values [*members, B] of states."""
        assert self.value is not None
        v: Tensor = self.value(state)
        return v
