"""The consistency function `f(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, c_time(t))`.

Whatever a paper's own picture of noise, f lives in one: `x = data + t z`, with t in the units of the data.
The other pictures are a change of variables, after which f is still a sum of its input and the network's
output:

    TrigFlow     x_a = cos(a) data + sin(a) sigma_data z     x = x_a / cos(a)     t = sigma_data tan(a)
    linear flow  x_s = (1 - s) data + s z                    x = x_s / (1 - s)    t = s / (1 - s)

So one sampler draws from all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "PARAMETERISATIONS",
    "ConsistencyFunction",
    "Function",
    "Kind",
    "Network",
    "Parameterisation",
    "consistency_function",
    "derivative",
    "network_of",
    "perturb",
]

Function = Callable[[Tensor, Tensor], Tensor]
"""`f(x, t)`: x of shape [*shape, D], t of shape [*shape]; a condition is bound into it by its maker."""

Network = Callable[..., Tensor]
"""The network F as a call: `F(x, time)`, or `F(x, time, span)` with the parameterisation `average`."""

Kind = Literal["edm", "unscaled", "trig", "flow", "average"]
PARAMETERISATIONS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Parameterisation:
    """The coefficients that tie the network F to the consistency function f.

    Attributes:
        kind: `edm`, the choice of the consistency-models paper (Song et al. 2023, Appendix C, after Karras
            et al. 2022, Table 1) and of CPQL: the network's input has unit variance at every level and its
            time input is 250 ln t. `unscaled`, Consistency-AC's code: no c_in, so that the network sees
            numbers of size t (up to 80), and the raw t as its time input. `trig`, TrigFlow (Lu and Song 2024,
            section 3): `cos(a) x_a - sin(a) sigma_data F(x_a / sigma_data, a)`. `flow`: F is the velocity
            v(x_s, s) of a linear flow, and f one Euler step of it to s = 0, `x_s - s v(x_s, s)`, which makes
            f a denoiser. `average`: F is the average velocity u(x_s, s, span) over [s - span, s] (Geng et
            al. 2025; Frans et al. 2024), and f its jump to s = 0, `x_s - s u(x_s, s, s)`.
        sigma_data: standard deviation of the data; a linear flow has none.
        t_min: the smallest level, where f is the identity with `edm` and `unscaled`. The others are it at 0.
    """

    kind: Kind = "edm"
    sigma_data: float = 0.5
    t_min: float = 0.002

    def __post_init__(self) -> None:
        if self.kind not in PARAMETERISATIONS:
            raise ValueError(f"parameterisation {self.kind!r}: choose from {', '.join(PARAMETERISATIONS)}")

    @property
    def linear(self) -> bool:
        """Whether the network lives on a linear flow."""
        return self.kind in ("flow", "average")

    def c_skip(self, t: Tensor) -> Tensor:
        """Weight of the input: 1 at the smallest level, towards 0 at large t."""
        if self.linear:
            return 1.0 / (1.0 + t)
        smallest = 0.0 if self.kind == "trig" else self.t_min
        return self.sigma_data**2 / ((t - smallest) ** 2 + self.sigma_data**2)

    def c_out(self, t: Tensor) -> Tensor:
        """Weight of the network: 0 at the smallest level, towards sigma_data at large t, or minus that."""
        if self.linear:
            return -t / (1.0 + t)
        if self.kind == "trig":
            return -self.sigma_data * t * torch.rsqrt(t**2 + self.sigma_data**2)
        return self.sigma_data * (t - self.t_min) / torch.sqrt(t**2 + self.sigma_data**2)

    def c_in(self, t: Tensor) -> Tensor:
        """Scale of the network's input."""
        if self.linear:
            return 1.0 / (1.0 + t)
        if self.kind == "unscaled":
            return torch.ones_like(t)
        return torch.rsqrt(t**2 + self.sigma_data**2)

    def c_time(self, t: Tensor) -> Tensor:
        """The network's time input."""
        if self.linear:
            return t / (1.0 + t)
        if self.kind == "trig":
            return torch.atan(t / self.sigma_data)
        return t if self.kind == "unscaled" else 250.0 * torch.log(t)

    @property
    def times(self) -> int:
        """How many time inputs the network has."""
        return 2 if self.kind == "average" else 1


@dataclass(frozen=True)
class ConsistencyFunction:
    """The `Function` of a network, which the objectives that train F itself look into.

    Attributes:
        network: F.
        parameterisation: what makes f of it.
        clamp: bound of f's absolute value; the gradient outside is zero.
    """

    network: Network
    parameterisation: Parameterisation
    clamp: float | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """`f(x, t)`."""
        p, t_ = self.parameterisation, t.unsqueeze(-1)
        time = p.c_time(t)
        y = p.c_skip(t_) * x + p.c_out(t_) * self.network(p.c_in(t_) * x, *[time] * p.times)
        return y if self.clamp is None else y.clamp(-self.clamp, self.clamp)


def consistency_function(
    network: Network, parameterisation: Parameterisation, clamp: float | None = None
) -> ConsistencyFunction:
    """Build f from the network F so that it is the identity at the smallest level.

    Source: Song et al. 2023 (Consistency Models), equation 5; for the other kinds see `Parameterisation`.
    """
    return ConsistencyFunction(network, parameterisation, clamp)


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


def network_of(f: Function, kind: Kind) -> ConsistencyFunction:
    """f, whose network an objective trains.

    Raises:
        ValueError: f has another parameterisation.
    """
    if not isinstance(f, ConsistencyFunction) or f.parameterisation.kind != kind:
        raise ValueError(
            f"this wants a function made by consistency_function with the parameterisation {kind}"
        )
    return f


def derivative(network: Network, at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A network's value, and its derivative along a direction, without gradient."""
    value, tangent = torch.func.jvp(network, at, along)  # type: ignore[misc]
    return value, tangent.detach()
