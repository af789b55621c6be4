"""What every actor can do, and acting by the best of several candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cpql.noise import Draw, Noise, draw

__all__ = ["Actor", "choose"]


class Actor(nn.Module):
    """A policy as a module: `actor(state)` is an action in [-1, 1], differentiable in weights and state.

    It takes states of any leading shape. Scaling to an environment's bounds belongs to `cpql.Policy`.

    Args:
        state_dim: width S of states.
        action_dim: width A of actions.
        config: everything else, of the class's own `config_class`; its `kind` names the class.
        members: leading axes of independent actors, see `cpql.networks`.

    Attributes:
        steps: network evaluations for one action.
        draws: standard normal vectors [A] that one action takes; 0 where the action follows from the state.
    """

    config_class: ClassVar[type[Any]]
    steps: int = 1
    draws: int = 0

    def __init__(
        self, state_dim: int, action_dim: int, config: Any = None, *, members: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.state_dim, self.action_dim, self.members = state_dim, action_dim, tuple(members)
        self.config = config if config is not None else self.config_class()
        self.setup()

    def setup(self) -> None:
        """Make the layers, by the config; the constructor calls it."""

    def noise_shape(self, *batch: int) -> tuple[int, ...]:
        """Shape [draws, *batch, A] of the standard normal noise that `sample` takes at states [*batch, S]."""
        return (self.draws, *batch, self.action_dim)

    def sample_noise(self, noise: Tensor | None, state: Tensor, generator: torch.Generator | None) -> Tensor:
        """The noise that `sample` takes at these states."""
        if noise is not None:
            return noise
        shape = self.noise_shape(*state.shape[:-1])
        return torch.randn(shape, generator=generator, device=state.device, dtype=state.dtype)

    def sample(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw an action in [-1, 1] for each state, [..., S] to [..., A].

        Args:
            state: [..., S] ([*members, B, S] with members).
            generator: draws the noise.
            noise: or the noise itself, of shape `noise_shape(...)`.
        """
        raise NotImplementedError

    def forward(
        self, state: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """`sample`."""
        return self.sample(state, generator=generator, noise=noise)

    def loss_noise(self, *batch: int) -> dict[str, Draw]:
        """The random tensors that `loss` takes for states [*batch, S]."""
        return {}

    def complete_noise(self, noise: Noise | None, action: Tensor, generator: torch.Generator | None) -> Noise:
        """The noise that `loss` takes for actions [..., A]: what is given, and the rest drawn."""
        given = noise or {}
        draws = self.loss_noise(*action.shape[:-1])
        missing = {name: one for name, one in draws.items() if name not in given}
        return {**given, **draw(missing, generator, action.device, action.dtype)}

    def loss(
        self,
        state: Tensor,
        action: Tensor,
        *,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The imitation loss of each state-action pair, [...], and metrics.

        Args:
            state: [..., S].
            action: [..., A] in [-1, 1].
            noise: the random tensors that `loss_noise` lists; those that are missing are drawn.
            generator: draws them.
        """
        raise NotImplementedError


def choose(
    sample: Callable[[Tensor], Tensor],
    q: Callable[[Tensor, Tensor], Tensor],
    state: Tensor,
    *,
    candidates: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Act by the candidates rule: draw several actions and pick one with probability softmax(min(Q1, Q2)).

    The published scores of Consistency-AC and CPQL come from it, with 50 candidates, the target critic and
    temperature 1, although neither paper dwells on it. It is nearly argmax where Q is large, and nearly
    uniform where rewards are normalised.

    Args:
        sample: draws an action [..., A] for each state [..., S].
        q: both critics' values [2, B, C] of states [B, 1, S] and actions [B, C, A].
        state: [B, S].
        candidates: C; with 1 the actor acts alone and q isn't called.
        temperature: of the softmax; 0 picks the best.
        generator: draws the choice.

    Returns:
        Actions, [B, A].
    """
    if candidates == 1:
        return sample(state)
    state = state.unsqueeze(-2)
    actions = sample(state.expand(-1, candidates, -1))
    value = q(state, actions).amin(0)
    if temperature > 0:
        # Adding Gumbel noise and taking the maximum draws from the softmax.
        uniform = torch.rand(value.shape, generator=generator, device=value.device)
        value = value * (1 / temperature) - torch.log(-torch.log(uniform.clip(1e-20, 1 - 1e-7)))
    best = value.argmax(-1)[..., None, None]
    return actions.gather(-2, best.expand(-1, 1, actions.shape[-1])).squeeze(-2)
