"""The deterministic actor: `a = tanh(MLP(s))`, as in DDPG, TD3 and TD3+BC."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cpql.actors.base import Actor
from cpql.networks import MLP, Activation, Initialisation
from cpql.noise import Noise
from cpql.settings import Widths

__all__ = ["DeterministicActor", "DeterministicConfig"]


@dataclass(frozen=True)
class DeterministicConfig:
    """What a deterministic actor is made of.

    Attributes:
        hidden: widths of the hidden layers.
        activation: between the layers: `relu`, `mish` or `gelu`.
        init: the initial weights, see `cpql.networks.Initialisation`.
        kind: names the class.
    """

    hidden: Widths = (256, 256)
    activation: Activation = "relu"
    init: Initialisation = "torch"
    kind: Literal["deterministic"] = field(default="deterministic", kw_only=True)


class DeterministicActor(Actor):
    """One action for each state, `tanh(MLP(s))`; for the arguments see `Actor`."""

    config_class = DeterministicConfig
    config: DeterministicConfig

    def setup(self) -> None:
        """Make the layers."""
        c = self.config
        self.mlp = MLP(self.state_dim, c.hidden, self.action_dim, self.members, False, c.activation, c.init)

    def sample(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The action in (-1, 1) of each state, [..., S] to [..., A]; there is no noise to draw."""
        return torch.tanh(self.mlp(state))

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error `|pi(s) - a|^2 / A` of each pair, [...]; the other arguments aren't used."""
        return (self.sample(state) - action).square().mean(-1), {}
