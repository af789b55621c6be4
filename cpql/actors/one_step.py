"""The one-step actor of FQL: a network from noise to an action, distilled from a flow (Park et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cpql.actors.base import Actor
from cpql.actors.flow import FlowActor, FlowConfig
from cpql.networks import MLP, Activation, Initialisation
from cpql.noise import Draw, Noise
from cpql.settings import Widths

__all__ = ["OneStepActor", "OneStepConfig"]


@dataclass(frozen=True)
class OneStepConfig:
    """What a one-step actor is made of, and the flow that teaches it.

    Attributes:
        hidden: widths of the hidden layers.
        activation: between the layers: `gelu`, `mish` or `relu`.
        init: the initial weights, see `cpql.networks.Initialisation`.
        flow: the flow that imitates the data.
        kind: names the class.
    """

    hidden: Widths = (512, 512, 512, 512)
    activation: Activation = "gelu"
    init: Initialisation = "glorot"
    flow: FlowConfig = field(default_factory=FlowConfig)
    kind: Literal["one_step"] = field(default="one_step", kw_only=True)


class OneStepActor(Actor):
    """A policy mu(s, z) that maps noise to where a flow would take it; for the arguments see `Actor`."""

    config_class = OneStepConfig
    config: OneStepConfig
    draws = 1

    def setup(self) -> None:
        """Make the layers."""
        c, width = self.config, self.action_dim + self.state_dim
        self.mlp = MLP(width, c.hidden, self.action_dim, self.members, False, c.activation, c.init)
        self.flow = FlowActor(self.state_dim, self.action_dim, c.flow, members=self.members)

    def predict(self, state: Tensor, z: Tensor) -> Tensor:
        """mu(s, z) [..., A], not clamped, for states [..., S] and noise [..., A]."""
        y: Tensor = self.mlp(torch.cat([z, state], -1))
        return y

    def sample(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw an action in [-1, 1] for each state, [..., S] to [..., A]; see `Actor.sample`."""
        return self.predict(state, self.sample_noise(noise, state, generator)[0]).clamp(-1.0, 1.0)

    def loss_noise(self, *batch: int) -> dict[str, Draw]:
        """`z` and `u` of the flow's loss, and `start`, the noise that is distilled."""
        return {**self.flow.loss_noise(*batch), "start": Draw("normal", (*batch, self.action_dim))}

    def flow_loss(self, state: Tensor, action: Tensor, noise: Noise) -> Tensor:
        """The flow's imitation loss of each pair, [...]."""
        return self.flow.loss(state, action, noise=noise)[0]

    def distillation_loss(self, predicted: Tensor, state: Tensor, z: Tensor) -> Tensor:
        """`|mu(s, z) - flow(s, z)|^2 / A` of each state, [...]; no gradient passes to the flow."""
        with torch.no_grad():
            end = self.flow.sample(state, noise=z.unsqueeze(0)).detach()
        return (predicted - end).square().mean(-1)

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The flow's loss plus the distillation loss of each pair, [...]; see `Actor.loss`."""
        noise = self.complete_noise(noise, action, generator)
        flow, z = self.flow_loss(state, action, noise), noise["start"]
        distillation = self.distillation_loss(self.predict(state, z), state, z)
        return flow + distillation, {"flow": flow, "distillation": distillation}
