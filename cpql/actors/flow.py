"""The flow actor: an ODE from noise to actions, learnt by flow matching (Lipman et al. 2023).

The network is a velocity v(s, x, t) on the straight paths `x_t = (1 - t) z + t a`, from noise at t = 0 to an
action at t = 1. Sampling takes K steps of Euler's method.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from cpql.actors.base import Actor
from cpql.networks import MLP, Activation, Initialisation
from cpql.noise import Draw, Noise
from cpql.settings import Widths

__all__ = ["FlowActor", "FlowConfig"]


@dataclass(frozen=True)
class FlowConfig:
    """What a flow actor is made of.

    Attributes:
        steps: K, of Euler's method.
        hidden: widths of the hidden layers.
        activation: between the layers: `gelu`, `mish` or `relu`.
        init: the initial weights, see `cpql.networks.Initialisation`.
        kind: names the class.
    """

    steps: Annotated[int, Field(ge=1, le=1_000)] = 10
    hidden: Widths = (512, 512, 512, 512)
    activation: Activation = "gelu"
    init: Initialisation = "glorot"
    kind: Literal["flow"] = field(default="flow", kw_only=True)


class FlowActor(Actor):
    """A policy that follows a learnt velocity from noise to an action; for the arguments see `Actor`."""

    config_class = FlowConfig
    config: FlowConfig

    def setup(self) -> None:
        """Make the layers."""
        c, width = self.config, self.action_dim + 1 + self.state_dim
        self.steps, self.draws = c.steps, 1
        self.mlp = MLP(width, c.hidden, self.action_dim, self.members, False, c.activation, c.init)

    def velocity(self, state: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v(s, x, t) [..., A], for states [..., S], x [..., A] and times t [...] in [0, 1]."""
        v: Tensor = self.mlp(torch.cat([x, t.unsqueeze(-1), state], -1))
        return v

    def sample(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw an action in [-1, 1] for each state in K steps, [..., S] to [..., A]; see `Actor.sample`."""
        noise = self.sample_noise(noise, state, generator)
        x = noise[0]
        for k in range(self.steps):
            t = torch.full(x.shape[:-1], k / self.steps, device=x.device, dtype=x.dtype)
            x = x + self.velocity(state, x, t) / self.steps
        return x.clamp(-1.0, 1.0)

    def loss_noise(self, *batch: int) -> dict[str, Draw]:
        """`z`, the beginning of each path, and `u`, the time on it."""
        return {"z": Draw("normal", (*batch, self.action_dim)), "u": Draw("uniform", batch)}

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`|v(s, x_t, t) - (a - z)|^2 / A` of each pair, [...], t uniform in [0, 1); see `Actor.loss`."""
        noise = self.complete_noise(noise, action, generator)
        z, t = noise["z"], noise["u"]
        x = z + t.unsqueeze(-1) * (action - z)
        return (self.velocity(state, x, t) - (action - z)).square().mean(-1), {}
