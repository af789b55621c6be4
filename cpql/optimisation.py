"""Training as pure functions on flat weights.

An agent keeps each network's weights as one vector [*members, P]. So gradient clipping is one norm, Adam and
a moving average are one elementwise expression each, and an update touches a dozen tensors instead of
hundreds: less to launch, less to guard, less to save. The modules people see are made of views of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

__all__ = ["FlatModule", "adam", "clip_gradient", "value_and_grad"]

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
M = TypeVar("M", bound=nn.Module)


class _Methods(nn.Module):
    """Lets `functional_call`, which only knows `forward`, reach a module's other methods."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, method)(*args, **kwargs)


class _Bound:
    """A module's methods with some weights, one call at a time."""

    def __init__(self, flat: FlatModule[Any], weights: Tensor) -> None:
        self._flat, self._weights = flat, weights

    def __getattr__(self, method: str) -> Callable[..., Any]:
        flat = self._flat
        parameters = {f"module.{name}": part for name, part in flat.unflatten(self._weights).items()}
        return lambda *args, **kwargs: torch.func.functional_call(
            flat.methods, parameters, (method, *args), kwargs
        )


class FlatModule(Generic[M]):
    """A module whose weights are an argument: `flat(weights).q(state, action)`.

    What `flat(weights)` gives has the module's methods, for calls that return tensors: the weights are in
    place while a method runs and not after it, so a method that returns a closure over the module won't do.

    Args:
        module: the initialised module; all its parameters begin with the member axes.
        members: the axes that stay in front of the flat weights [*members, P].

    Attributes:
        initial: the module's own weights, flat.
        structure: the module without its weights, for what doesn't need them.
    """

    def __init__(self, module: M, members: tuple[int, ...] = ()) -> None:
        parameters = dict(module.named_parameters())
        self.members = members
        self.names = list(parameters)
        self.shapes = [p.shape[len(members) :] for p in parameters.values()]
        self.sizes = [s.numel() for s in self.shapes]
        self.initial = torch.cat([p.detach().reshape(*members, -1) for p in parameters.values()], -1)
        self.structure = module.to("meta").requires_grad_(False)
        self.methods = _Methods(self.structure)

    def __call__(self, weights: Tensor) -> M:
        """The module with these weights [*members, P]."""
        return cast(M, _Bound(self, weights))

    def unflatten(self, weights: Tensor) -> dict[str, Tensor]:
        """Views of the flat weights [*members, P] by parameter name."""
        parts = torch.split(weights, self.sizes, -1)
        return {
            name: part.view(*self.members, *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


def value_and_grad(loss: LossFunction, weights: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss [*members], its gradient in the weights [*members, P], and its metrics.

    The gradient is that of the sum over members, whose gradients don't touch each other. Inside
    `torch.compile` the functional transform is what traces as one graph; outside, plain autograd has less
    overhead.
    """
    if torch.compiler.is_compiling():

        def summed(weights: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            value, metrics = loss(weights)
            return value.sum(), (value, metrics)

        gradient, (_, (value, metrics)) = torch.func.grad_and_value(summed, has_aux=True)(weights)
    else:
        leaf = weights.detach().requires_grad_()
        value, metrics = loss(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient, {name: metric.detach() for name, metric in metrics.items()}


def clip_gradient(gradient: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """Scale each member's gradient [*members, P] to a norm of at most `max_norm`, and return its norm too."""
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    if max_norm is not None:
        gradient = gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return gradient, norm.squeeze(-1)


def adam(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    rate: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    decay: float = 0.0,
) -> None:
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), in place on weights and both moments.

    Args:
        weights, gradient, mean, square: [*members, P].
        step: how many steps were taken, this one included; a tensor, so that nothing waits for it.
        rate: learning rate.
        beta1, beta2, epsilon: the paper's.
        decay: of the weights, decoupled (AdamW: Loshchilov and Hutter 2019, Algorithm 2).
    """
    if decay:
        weights.mul_(1.0 - rate * decay)
    mean.lerp_(gradient, 1.0 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    first = rate / (1.0 - beta1**step)
    second = (1.0 - beta2**step).sqrt()
    weights.sub_(first * mean / (square.sqrt() / second + epsilon))
