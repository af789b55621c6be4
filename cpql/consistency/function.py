"""The consistency function `f(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, c_time(t))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["PARAMETERISATIONS", "Function", "Parameterisation", "consistency_function", "perturb"]

Function = Callable[[Tensor, Tensor], Tensor]
"""`f(x, t)`: x of shape [*shape, D], t of shape [*shape]; a condition is bound into it by its maker."""

PARAMETERISATIONS = ("edm", "unscaled")


@dataclass(frozen=True)
class Parameterisation:
    """The coefficients that tie the network F to the consistency function f.

    Attributes:
        kind: `edm`, the choice of the consistency-models paper (Song et al. 2023, Appendix C, after Karras
            et al. 2022, Table 1) and of CPQL: the network's input has unit variance at every level and its
            time input is 250 ln t. `unscaled`, Consistency-AC's code: no c_in, so that the network sees
            numbers of size t (up to 80), and the raw t as its time input.
        sigma_data: standard deviation of the data.
        t_min: the smallest level, where f is the identity.
    """

    kind: Literal["edm", "unscaled"] = "edm"
    sigma_data: float = 0.5
    t_min: float = 0.002

    def __post_init__(self) -> None:
        if self.kind not in PARAMETERISATIONS:
            raise ValueError(f"parameterisation {self.kind!r}: choose from {', '.join(PARAMETERISATIONS)}")

    def c_skip(self, t: Tensor) -> Tensor:
        """Weight of the input: 1 at t_min, towards 0 at large t."""
        return self.sigma_data**2 / ((t - self.t_min) ** 2 + self.sigma_data**2)

    def c_out(self, t: Tensor) -> Tensor:
        """Weight of the network: 0 at t_min, towards sigma_data at large t."""
        return self.sigma_data * (t - self.t_min) / torch.sqrt(t**2 + self.sigma_data**2)

    def c_in(self, t: Tensor) -> Tensor:
        """Scale of the network's input."""
        if self.kind == "unscaled":
            return torch.ones_like(t)
        return torch.rsqrt(t**2 + self.sigma_data**2)

    def c_time(self, t: Tensor) -> Tensor:
        """The network's time input."""
        return t if self.kind == "unscaled" else 250.0 * torch.log(t)


def consistency_function(network: Function, parameterisation: Parameterisation) -> Function:
    """Build f from the network F so that `f(x, t_min) = x` exactly.

    Source: Song et al. 2023 (Consistency Models), equation 5.
    """

    def f(x: Tensor, t: Tensor) -> Tensor:
        p, t_ = parameterisation, t.unsqueeze(-1)
        return p.c_skip(t_) * x + p.c_out(t_) * network(p.c_in(t_) * x, p.c_time(t))

    return f


def perturb(x: Tensor, t: Tensor, z: Tensor, *, tanh: bool = False) -> Tensor:
    """Noise x to level t: `x + t z`.

    With `tanh` (action normalisation) the noise is added in the unbounded space before a tanh,
    `tanh(atanh(x) + t z)`: what f sees stays in [-1, 1] at every level, and the boundary condition and all
    objectives hold unchanged. Consistency-AC's code squashes `tanh(x + t z)` without the atanh, which moves
    its targets (an action of 0.8 becomes 0.66 at t_min); its published runs never switch it on.

    Args:
        x: [*shape, D]; in [-1, 1] with `tanh`, where +-1 is taken as +-0.999.
        t: [*shape] or broadcastable to it.
        z: standard normal noise, like x.
        tanh: squash.
    """
    t = t.unsqueeze(-1)
    if tanh:
        return torch.tanh(torch.atanh(x.clamp(-0.999, 0.999)) + t * z)
    return x + t * z
