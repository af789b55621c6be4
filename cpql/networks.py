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
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "MLP",
    "Activation",
    "Initialisation",
    "LayerNorm",
    "Linear",
    "Mish",
    "Norm",
    "TimeEmbedding",
    "dropout_masks",
    "set_matmul_dtype",
]

Activation = Literal["mish", "relu", "gelu"]
"""GELU is its tanh approximation, as in JAX."""

Norm = bool | Literal["after"]
"""LayerNorm in each hidden layer: none, before the activation (True), or `after` it, as in ReBRAC and FQL
(with an epsilon of 1e-6, their library's)."""

Initialisation = Literal["torch", "glorot", "rebrac"]
"""Initial weights. `torch`: U(-1/sqrt(in), 1/sqrt(in)) for weights and biases. `glorot`: Glorot's uniform
weights, biases 0 (FQL). `rebrac`: hidden layers U(-1/sqrt(in), 1/sqrt(in)) with biases 0.1, and the last
layer U(-b, b), b = 0.001 for a policy's and 0.003 for a critic's."""

LAST = {"policy": 1e-3, "critic": 3e-3}

# Thinner layers, in or out, take longer in bfloat16, by far where they have three outputs.
LEAST_WIDTH_IN_BF16 = 16


class Linear(nn.Module):
    """`x W^T + b` for each member; initialised as `torch.nn.Linear` is.

    Attributes:
        matmul_dtype: dtype of the matrix product, where it isn't that of the weights; see `set_matmul_dtype`.
    """

    matmul_dtype: torch.dtype | None = None

    def __init__(self, inputs: int, outputs: int, members: Sequence[int] = ()) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(*members, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*members, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Map [*members, B, in] (or [..., in] without members) to [*members, B, out]."""
        bias = self.bias if self.bias.ndim == 1 else self.bias.unsqueeze(-2)
        if (dtype := self.matmul_dtype) is not None:
            return (x.to(dtype) @ self.weight.to(dtype).mT).to(x.dtype) + bias
        if self.bias.ndim == 1:
            return functional.linear(x, self.weight, bias)
        return x @ self.weight.mT + bias


def set_matmul_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Compute a module's large matrix products in another dtype, such as `torch.bfloat16`.

    Weights and everything else keep their dtype. It is faster on processors that have units for bfloat16,
    which keeps eight bits of each factor.
    """
    for part in module.modules():
        if isinstance(part, Linear) and min(part.weight.shape[-2:]) >= LEAST_WIDTH_IN_BF16:
            part.matmul_dtype = dtype


class LayerNorm(nn.Module):
    """Layer normalisation with a gain and an offset for each member; `epsilon` is added to the variance."""

    def __init__(self, width: int, members: Sequence[int] = (), epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(*members, width))
        self.bias = nn.Parameter(torch.zeros(*members, width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        if self.bias.ndim == 1:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.epsilon)
        normal = functional.layer_norm(x, x.shape[-1:], eps=self.epsilon)
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
            # Without gradients the intermediate results can be overwritten: half the time of torch's own.
            n = x.clamp(max=20.0).exp_()
            n.mul_(n + 2.0)
            return n.div_(n + 2.0).mul_(x)
        w = torch.exp(x.clamp(max=20.0))
        n = w * (w + 2.0)
        return x * (n / (n + 2.0))


class GELU(nn.GELU):
    """Its tanh approximation, elementwise."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


ACTIVATIONS: dict[str, type[nn.Module]] = {"mish": Mish, "relu": nn.ReLU, "gelu": GELU}


class MLP(nn.Module):
    """Linear layers with an activation between them, optionally with a LayerNorm at each activation.

    Args:
        inputs: width of the input.
        hidden: widths of the hidden layers.
        outputs: width of the output.
        members: leading axes of independent networks.
        layer_norm: whether and where there is a LayerNorm, see `Norm`.
        activation: a key of `ACTIVATIONS`.
        initial: of the weights, see `Initialisation`.
        role: for `initial="rebrac"`, what the last layer gives.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        members: Sequence[int] = (),
        layer_norm: Norm = False,
        activation: Activation = "mish",
        initial: Initialisation = "torch",
        role: Literal["policy", "critic"] = "policy",
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [Linear(i, o, members), ACTIVATIONS[activation]()]
            if layer_norm == "after":
                layers.append(LayerNorm(o, members, 1e-6))
            elif layer_norm:
                layers.insert(-1, LayerNorm(o, members))
        layers.append(Linear(widths[-1], outputs, members))
        self.layers = nn.Sequential(*layers)
        linear = [layer for layer in layers if isinstance(layer, Linear)]
        for layer in linear if initial != "torch" else ():
            nn.init.constant_(layer.bias, 0.0 if initial == "glorot" else 0.1)
            if initial == "glorot":
                bound = math.sqrt(6.0 / sum(layer.weight.shape[-2:]))
                nn.init.uniform_(layer.weight, -bound, bound)
        if initial == "rebrac":
            for parameter in linear[-1].parameters():
                nn.init.uniform_(parameter, -LAST[role], LAST[role])

    def forward(self, x: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Map [*members, B, inputs] to [*members, B, outputs].

        Args:
            x: the inputs.
            masks: dropout: a factor [..., width] for the activations of each hidden layer, in order.
        """
        if not masks:
            y: Tensor = self.layers(x)
            return y
        remaining = iter(masks)
        for layer in self.layers:
            x = layer(x) * next(remaining) if isinstance(layer, tuple(ACTIVATIONS.values())) else layer(x)
        return x


def dropout_masks(drop: Tensor, rate: float, widths: Sequence[int]) -> Sequence[Tensor]:
    """`MLP.forward`'s masks from uniform noise [..., sum(widths)]: 0 where it is less than the rate."""
    return torch.split((drop >= rate) / (1.0 - rate), list(widths), -1)


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
