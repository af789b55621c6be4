"""The Gaussian actor: `a ~ N(tanh(MLP(s)), diag(std)^2)`, with one std for all states, as IQL has it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cpql.actors.base import Actor
from cpql.networks import MLP, Activation, Initialisation, dropout_masks
from cpql.noise import Draw, Noise
from cpql.settings import Widths

__all__ = ["GaussianActor", "GaussianConfig"]

LOG_STD = (-20.0, 2.0)


@dataclass(frozen=True)
class GaussianConfig:
    """What a Gaussian actor is made of.

    Attributes:
        hidden: widths of the hidden layers.
        activation: between the layers: `relu`, `mish` or `gelu`.
        init: the initial weights, see `cpql.networks.Initialisation`.
        dropout: fraction of the hidden units that the loss leaves out.
        kind: names the class.
    """

    hidden: Widths = (256, 256)
    activation: Activation = "relu"
    init: Initialisation = "torch"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    kind: Literal["gaussian"] = field(default="gaussian", kw_only=True)


class GaussianActor(Actor):
    """Learns a distribution of actions by its likelihood, and acts by the mean, which is IQL's evaluation.

    The standard deviation of each dimension is a weight of its own, the same at all states; its logarithm
    starts at 0 and stays in [-20, 2]. For the arguments see `Actor`.
    """

    config_class = GaussianConfig
    config: GaussianConfig

    def setup(self) -> None:
        """Make the layers."""
        c = self.config
        self.mlp = MLP(self.state_dim, c.hidden, self.action_dim, self.members, False, c.activation, c.init)
        self.log_std = nn.Parameter(torch.zeros(*self.members, self.action_dim))

    def sample(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The mean in (-1, 1) at each state, [..., S] to [..., A]; no noise is drawn."""
        return torch.tanh(self.mlp(state))

    def loss_noise(self, *batch: int) -> dict[str, Draw]:
        """`drop`, the uniform noise of dropout, where there is dropout."""
        c = self.config
        return {"drop": Draw("uniform", (*batch, sum(c.hidden)))} if c.dropout else {}

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`-log pi(a | s)`, summed over dimensions, of each pair, [...]; see `Actor.loss`."""
        c, noise = self.config, self.complete_noise(noise, action, generator)
        masks = dropout_masks(noise["drop"], c.dropout, c.hidden) if c.dropout else ()
        mean = torch.tanh(self.mlp(state, masks))
        log_std = self.log_std.clamp(*LOG_STD)
        log_std = log_std.unsqueeze(-2) if self.members else log_std
        error = ((action - mean) * torch.exp(-log_std)).square()
        loss = (0.5 * error + log_std + 0.5 * math.log(2.0 * math.pi)).sum(-1)
        return loss, {"std": torch.exp(log_std).mean(-1).expand_as(loss)}
