"""Settings: typed dataclasses, made from plain values and checked, with the ranges that their fields have.

A dataclass is the only place where a setting, its default and its meaning are written.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field

from cpql.errors import ConfigError, did_you_mean

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
    "build",
]

T = TypeVar("T")

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


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from nested plain values.

    Args:
        cls: the dataclass.
        values: by field name.
        where: what to call them in an error.

    Raises:
        ConfigError: a key that doesn't exist, a value of the wrong type, or one that the class refuses;
            names the key, what was found and what was expected.
    """
    from pydantic import ValidationError

    _refuse_unknown(cls, values, where)
    try:
        return typing.cast(T, _adapter(typing.cast(Any, cls)).validate_python(dict(values)))
    except ValidationError as error:
        # Of a setting with several types there is an error for each: one that understood the value says more.
        found = error.errors()
        found = [each for each in found if not each["type"].endswith("_type")] or found
        key = _key(cls, found[0]["loc"])
        expected = [each["msg"].partition(", unable")[0] for each in found if _key(cls, each["loc"]) == key]
        message = " or ".join(
            [expected[0], *(text.removeprefix("Input should be ") for text in expected[1:])]
        )
        value = repr(found[0]["input"])
        raise ConfigError(f"{where}: {key}: {message}, found {value[:80]}") from None


@functools.cache
def _adapter(cls: type[Any]) -> Any:
    """Pydantic's reader of a class, which takes longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _refuse_unknown(cls: type[Any], values: Mapping[str, Any], where: str) -> None:
    types = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{where}: unknown key {key!r}: {did_you_mean(key, types)}")
        inner = _inner(types[key])
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(inner, value, f"{where}: {key}")


def _inner(kind: Any) -> type[Any] | None:
    """The dataclass that a field of this type holds, if it holds one."""
    for one in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(one):
            return typing.cast(type[Any], one)
    return None


def _key(cls: type[Any] | None, path: tuple[int | str, ...]) -> str:
    """A setting's name, from where pydantic found it: without the types that it has tried."""
    parts = []
    for part in path:
        types = typing.get_type_hints(cls) if cls else {}
        if part in types:
            cls = _inner(types[str(part)])
        elif not isinstance(part, int):
            continue
        parts.append(str(part))
    return ".".join(parts)
