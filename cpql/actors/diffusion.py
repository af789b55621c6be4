"""The diffusion actor of Diffusion-QL: DDPM over actions (Ho et al. 2020; Wang et al. 2023, section 3).

With T steps, t = 1 ... T and the cumulative product of the variance-preserving schedule,

    alphabar_t = exp(-beta_min t / T - (beta_max - beta_min) t^2 / (2 T^2))

an action is noised as `x_t = sqrt(alphabar_t) a + sqrt(1 - alphabar_t) z`, and the network predicts z. Each
of T sampling steps draws `x_{t-1}` from the posterior given x_t and the predicted x_0, kept in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from cpql.actors.base import Actor
from cpql.actors.conditioned import NoiseConditioned
from cpql.errors import ConfigError
from cpql.noise import Draw, Noise
from cpql.settings import Positive, Widths

__all__ = ["DiffusionActor", "DiffusionConfig"]


@dataclass(frozen=True)
class DiffusionConfig:
    """What a diffusion actor is made of.

    Attributes:
        steps: T, of the diffusion and of sampling.
        beta_min: of the schedule.
        beta_max: of the schedule, above `beta_min`.
        dropout: fraction of the hidden units that the loss leaves out.
        hidden: widths of the hidden layers.
        time_width: width of the time embedding, an even number.
        kind: names the class.
    """

    steps: Annotated[int, Field(ge=1, le=1_000)] = 5
    beta_min: Positive = 0.1
    beta_max: Positive = 10.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    hidden: Widths = (256, 256, 256)
    time_width: Annotated[int, Field(ge=4, le=1024, multiple_of=2)] = 16
    kind: Literal["diffusion"] = field(default="diffusion", kw_only=True)

    def __post_init__(self) -> None:
        if not self.beta_min < self.beta_max:
            raise ConfigError(f"beta_max={self.beta_max}: expected more than beta_min={self.beta_min}")

    def remaining(self, t: float) -> float:
        """`alphabar_t`, the fraction of an action's variance that is left after t of the steps."""
        s = t / self.steps
        return math.exp(-self.beta_min * s - 0.5 * (self.beta_max - self.beta_min) * s * s)


class DiffusionActor(NoiseConditioned, Actor):
    """A policy that denoises Gaussian noise in T steps; for the arguments see `Actor`."""

    config_class = DiffusionConfig
    config: DiffusionConfig

    def setup(self) -> None:
        """Make the layers."""
        self.steps = self.draws = self.config.steps
        self.build(self.state_dim, self.action_dim, self.config, 1, self.members)

    def coefficients(self) -> list[tuple[float, float, float, float, float]]:
        """What each step of sampling computes, from t = T down to 1.

        Returns:
            For each step a, b, c, d and s: `x_0 = clip(a x_t - b F)`, `x_{t-1} = c x_0 + d x_t + s z`; at the
            last one c is 1, d and s are 0.
        """
        steps = []
        for t in range(self.config.steps, 0, -1):
            now, then = self.config.remaining(t), self.config.remaining(t - 1)
            beta = 1.0 - now / then
            a, b = now**-0.5, (1.0 / now - 1.0) ** 0.5
            c, d = beta * then**0.5 / (1.0 - now), (1.0 - then) * (1.0 - beta) ** 0.5 / (1.0 - now)
            steps.append((a, b, c, d, (beta * (1.0 - then) / (1.0 - now)) ** 0.5))
        return steps

    def sample(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw an action in [-1, 1] for each state in T steps, [..., S] to [..., A]; see `Actor.sample`."""
        noise = self.sample_noise(noise, state, generator)
        x = noise[0]
        for k, (a, b, c, d, s) in enumerate(self.coefficients()):
            time = torch.full(x.shape[:-1], self.config.steps - 1.0 - k, device=x.device, dtype=x.dtype)
            clean = (a * x - b * self.predict(state, x, time)).clamp(-1.0, 1.0)
            x = c * clean + d * x
            if k + 1 < self.steps:
                x = x + s * noise[k + 1]
        return x

    def loss_noise(self, *batch: int) -> dict[str, Draw]:
        """`z`, the noise that the network predicts, `u`, which gives the step, and dropout's `drop`."""
        draws = {"z": Draw("normal", (*batch, self.action_dim)), "u": Draw("uniform", batch)}
        if self.config.dropout:
            draws["drop"] = Draw("uniform", (*batch, sum(self.config.hidden)))
        return draws

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`|F(x_t, t, s) - z|^2 / A` of each pair, [...], at t uniform in 1 ... T; see `Actor.loss`."""
        noise = self.complete_noise(noise, action, generator)
        x, t, _ = self._noised(action, noise)
        drop = noise["drop"] if self.config.dropout else None
        predicted = self.predict(state, x, t - 1.0, drop=drop)
        return (predicted - noise["z"]).square().mean(-1), {}

    def denoised(self, state: Tensor, action: Tensor, noise: Noise) -> Tensor:
        """An action in one step: x_0 as predicted from a noised action, [..., A] in [-1, 1].

        It is EDP's action approximation (Kang et al. 2023, section 4.1), whose gradient needs no sampling.

        Args:
            state: [..., S].
            action: of the dataset, [..., A].
            noise: `z` and `u` as for `loss`.
        """
        x, t, remaining = self._noised(action, noise)
        predicted = self.predict(state, x, t - 1.0)
        clean = (x - (1.0 - remaining).sqrt() * predicted) / remaining.sqrt()
        return clean.clamp(-1.0, 1.0)

    def _noised(self, action: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """`x_t` [..., A], t [...] and `alphabar_t` [..., 1]."""
        c = self.config
        t = torch.floor(noise["u"] * c.steps).clamp(max=c.steps - 1) + 1.0
        s = (t / c.steps).unsqueeze(-1)
        remaining = torch.exp(-c.beta_min * s - 0.5 * (c.beta_max - c.beta_min) * s.square())
        return remaining.sqrt() * action + (1.0 - remaining).sqrt() * noise["z"], t, remaining
