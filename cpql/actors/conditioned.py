"""The network of actors that denoise: an MLP of a noised action, the time, and the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cpql.networks import MLP, TimeEmbedding, dropout_masks

__all__ = ["NoiseConditioned"]


class _Widths(Protocol):
    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def time_width(self) -> int: ...
    @property
    def dropout(self) -> float: ...


class NoiseConditioned(nn.Module):
    """The network F(x, times, state): an MLP of all three, with an embedding for each time."""

    def build(
        self, state_dim: int, action_dim: int, config: _Widths, times: int, members: Sequence[int]
    ) -> None:
        """Make the layers."""
        self.dropout, self.widths = config.dropout, list(config.hidden)
        self.time = TimeEmbedding(config.time_width, members)
        if times == 2:
            self.span = TimeEmbedding(config.time_width, members)
        width = action_dim + times * config.time_width + state_dim
        self.mlp = MLP(width, config.hidden, action_dim, members)

    def embed(self, time: Tensor, span: Tensor | None = None) -> Tensor:
        """The features [..., times x time_width] of the times [...]."""
        features: Tensor = self.time(time)
        return features if span is None else torch.cat([features, self.span(span)], -1)

    def predict(self, state: Tensor, x: Tensor, *times: Tensor, drop: Tensor | None = None) -> Tensor:
        """F, for x [..., A] and times [...] at states [..., S]; `drop` is the loss's noise for dropout."""
        masks = () if drop is None else dropout_masks(drop, self.dropout, self.widths)
        y: Tensor = self.mlp(torch.cat([x, self.embed(*times), state], -1), masks)
        return y
