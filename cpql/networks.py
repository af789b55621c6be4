"""Networks with a members axis: many independent networks of one shape as one batched product.

Weights have the shape [*members, out, in]; inputs [*members, batch, in], or anything that broadcasts
against it: a state batch [B, S] is shown to all members. `members=()` is an ordinary network on [..., in].
A twin critic is `members=(2,)`, four seeds of a twin critic are `members=(4, 2)`. A loss summed over
members gives each its own gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MLP", "LayerNorm", "Linear", "Mish", "TimeEmbedding", "set_product"]

THICK = 16  # least width, in and out, of a layer whose products `set_product` changes


class Linear(nn.Module):
    """`x W^T + b` for each member; initialised as `torch.nn.Linear` is.

    Attributes:
        product: the type that the product is taken in, where it isn't the weights' own; see `set_product`.
    """

    product: torch.dtype | None = None

    def __init__(self, inputs: int, outputs: int, members: Sequence[int] = ()) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(*members, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*members, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Map [*members, B, in] (or [..., in] without members) to [*members, B, out]."""
        bias = self.bias if self.bias.ndim == 1 else self.bias.unsqueeze(-2)
        if self.product is not None:
            return (x.to(self.product) @ self.weight.to(self.product).mT).to(x.dtype) + bias
        if self.bias.ndim == 1:
            return functional.linear(x, self.weight, bias)
        return x @ self.weight.mT + bias


def set_product(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Take a module's large matrix products in another type, `torch.bfloat16`: weights and the rest stay.

    Faster where the processor has units for it; of each factor eight bits are left.
    """
    for part in module.modules():
        # Thin layers take longer in it, by far where they have three outputs.
        if isinstance(part, Linear) and min(part.weight.shape[-2:]) >= THICK:
            part.product = dtype


class LayerNorm(nn.Module):
    """Layer normalisation with a gain and an offset for each member."""

    def __init__(self, width: int, members: Sequence[int] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*members, width))
        self.bias = nn.Parameter(torch.zeros(*members, width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if self.bias.ndim == 1:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)
        normal = functional.layer_norm(x, x.shape[-1:])
        return normal * self.weight.unsqueeze(-2) + self.bias.unsqueeze(-2)


class Mish(nn.Module):
    """`x tanh(softplus(x))`, Misra 2020."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise.

        Written as `x n / (n + 2)`, `n = e^x (e^x + 2)`, it costs one exponential instead of three functions.
        That pays where a compiler fuses the rest, and there it matters: at these widths the activation
        otherwise costs more than the matrix product before it.
        """
        if not torch.compiler.is_compiling():
            # Not by x.requires_grad, which an outer transform (torch.func) doesn't show here.
            if torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() < 8192:
                return functional.mish(x)
            # Nobody needs the steps between: half the time of torch's own on a CPU.
            n = x.clamp(max=20.0).exp_()
            n.mul_(n + 2.0)
            return n.div_(n + 2.0).mul_(x)
        w = torch.exp(x.clamp(max=20.0))
        n = w * (w + 2.0)
        return x * (n / (n + 2.0))


class MLP(nn.Module):
    """Linear layers with Mish between them, optionally a LayerNorm before each Mish."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        members: Sequence[int] = (),
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers.append(Linear(i, o, members))
            if layer_norm:
                layers.append(LayerNorm(o, members))
            layers.append(Mish())
        layers.append(Linear(widths[-1], outputs, members))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Map [*members, B, inputs] to [*members, B, outputs].

        Args:
            x: the inputs.
            masks: a factor [..., width] of each hidden layer's activations, in order: dropout.
        """
        if not masks:
            y: Tensor = self.layers(x)
            return y
        remaining = iter(masks)
        for layer in self.layers:
            x = layer(x) * next(remaining) if isinstance(layer, Mish) else layer(x)
        return x


class TimeEmbedding(nn.Module):
    """A number as `width` features: sines and cosines, then a layer of 2 x width, Mish, and a layer."""

    def __init__(self, width: int, members: Sequence[int] = ()) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"the time embedding's width must be even and at least 4, found {width}")
        self.frequencies = width // 2
        self.mlp = MLP(width, (2 * width,), width, members)

    def forward(self, t: Tensor) -> Tensor:
        """Map [*members, B] to [*members, B, width]."""
        steps = torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
        frequency = torch.exp(steps * (-math.log(10_000.0) / (self.frequencies - 1)))
        angle = t.unsqueeze(-1) * frequency
        y: Tensor = self.mlp(torch.cat([angle.sin(), angle.cos()], -1))
        return y
