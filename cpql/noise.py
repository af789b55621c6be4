"""Noise as an argument: which random tensors a computation needs, and drawing them.

Whatever uses random numbers lists them first, as a dict of `Draw`, and then takes the tensors. So an update
is a pure function of its inputs, and tests, resumed runs and exported programs can be given the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Draw", "Noise", "draw"]

Noise = Mapping[str, Tensor]
"""Random tensors by name."""


@dataclass(frozen=True)
class Draw:
    """One random tensor.

    Attributes:
        kind: `normal` is standard normal, `uniform` is in [0, 1), `coin` is 0 or 1 as an integer.
        shape: its shape.
    """

    kind: Literal["normal", "uniform", "coin"]
    shape: tuple[int, ...] = ()


def draw(
    draws: Mapping[str, Draw],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Draw random tensors, in the order in which they are listed."""
    drawn: dict[str, Tensor] = {}
    for name, one in draws.items():
        if one.kind == "coin":
            drawn[name] = torch.randint(2, one.shape, generator=generator, device=device)
        else:
            make = torch.randn if one.kind == "normal" else torch.rand
            drawn[name] = make(one.shape, generator=generator, device=device, dtype=dtype)
    return drawn
