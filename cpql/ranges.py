"""The ranges that settings have, as types of the dataclasses' fields: `cpql.config.build` checks them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = [
    "Candidates",
    "Count",
    "Natural",
    "NonNegative",
    "Positive",
    "Seed",
    "Share",
    "Threads",
    "Width",
    "Widths",
]

MOST = 10**12  # of anything that is counted: more fits no run, and soon no integer of a tensor

Count = Annotated[int, Field(ge=1, le=MOST)]
"""How many there are: at least one."""

Natural = Annotated[int, Field(ge=0, le=MOST)]
"""How many there are, or 0 for none."""

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
"""A finite number above 0."""

NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""A finite number, 0 or more."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A part of the whole, in [0, 1]."""

Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""What torch and every generator of numpy's take, with room for the episodes that are counted from it."""

Threads = Annotated[int, Field(ge=0, le=1024)]
"""CPU threads of PyTorch; 0 leaves it its own choice."""

Candidates = Annotated[int, Field(ge=1, le=10_000)]
"""Actions that compete by their value."""

Width = Annotated[int, Field(ge=1, le=16_384)]
"""Of a layer: the widest have a gigabyte of weights each."""

Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=64)]
"""Of hidden layers, at least one of them."""
