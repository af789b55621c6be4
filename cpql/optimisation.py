"""Training as pure functions on flat weights.

An agent keeps each network's weights as one vector [*members, P]. So gradient clipping is one norm, Adam and
a moving average are one elementwise expression each, and an update touches a dozen tensors instead of
hundreds: less to launch, less to guard, less to save. The modules people see are made of views of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Network", "adam", "clip_gradient", "value_and_grad"]

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class _Methods(nn.Module):
    """Lets `functional_call`, which only knows `forward`, reach a module's other methods."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, method)(*args, **kwargs)


class Network:
    """A module's structure without its weights: `network(weights, "method", ...)` calls it with some.

    Args:
        module: the initialised module; all parameters begin with the member axes.
        members: the axes that stay in front of the flat weights [*members, P].
    """

    def __init__(self, module: nn.Module, members: tuple[int, ...] = ()) -> None:
        parameters = dict(module.named_parameters())
        self.members = members
        self.names = list(parameters)
        self.shapes = [p.shape[len(members) :] for p in parameters.values()]
        self.sizes = [s.numel() for s in self.shapes]
        self.initial = torch.cat([p.detach().reshape(*members, -1) for p in parameters.values()], -1)
        self._skeleton = _Methods(module).to("meta").requires_grad_(False)

    def unflatten(self, weights: Tensor, members: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Views of the flat weights [*members, P] by parameter name; `members` where they have others."""
        parts = torch.split(weights, self.sizes, -1)
        members = self.members if members is None else members
        return {
            name: part.view(*members, *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def flatten(self, parameters: dict[str, Tensor]) -> Tensor:
        """The inverse of `unflatten`."""
        return torch.cat([parameters[name].reshape(*self.members, -1) for name in self.names], -1)

    def __call__(self, weights: Tensor, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the module's method with these weights."""
        parameters = {f"module.{name}": part for name, part in self.unflatten(weights).items()}
        return torch.func.functional_call(self._skeleton, parameters, (method, *args), kwargs)


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


def clip_gradient(gradient: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Scale each member's gradient [*members, P] to a norm of at most `max_norm`; also returns the norms."""
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm.squeeze(-1)


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
) -> None:
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), in place on weights and both moments.

    Args:
        weights, gradient, mean, square: [*members, P].
        step: how many steps were taken, this one included; a tensor, so that nothing waits for it.
        rate: learning rate.
        beta1, beta2, epsilon: the paper's.
    """
    mean.lerp_(gradient, 1.0 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    first = rate / (1.0 - beta1**step)
    second = (1.0 - beta2**step).sqrt()
    weights.sub_(first * mean / (square.sqrt() / second + epsilon))
