"""Settings: typed dataclasses, made from plain values and checked, with the ranges that their fields have.

A dataclass is the only place where a setting, its default and its meaning are written.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field

from cpql.errors import ConfigError, did_you_mean

__all__ = [
    "Candidates",
    "Count",
    "Fraction",
    "Natural",
    "NonNegative",
    "Positive",
    "Seed",
    "Threads",
    "Width",
    "Widths",
    "build",
    "flat",
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

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
"""Of a whole, in [0, 1]."""

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

    In a union of dataclasses the value's `kind` chooses the one whose field `kind` has that default; a value
    without it is made into the first.

    Args:
        cls: the dataclass.
        values: by field name.
        where: what to call them in an error.

    Raises:
        ConfigError: a key that doesn't exist, a value of the wrong type, or one that the class refuses;
            names the key, what was found and what was expected.
    """
    return _build(cls, values, where, "")


def _build(cls: type[T], values: Mapping[str, Any], where: str, parents: str) -> T:
    """`build`, for a dataclass that is the field `parents` of another (`a.b.`, or "" for the outermost)."""
    from pydantic import ValidationError

    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            at = f"{where}: {parents.removesuffix('.')}" if parents else where
            raise ConfigError(f"{at}: unknown key {key!r}: {did_you_mean(key, hints)}")
    plain = dict(values)
    for key, value in values.items():
        if isinstance(value, Mapping) and (inner := _inner(hints[key], value, f"{where}: {parents}{key}")):
            plain[key] = _build(inner, value, where, f"{parents}{key}.")
    try:
        return typing.cast(T, _adapter(typing.cast(Any, cls)).validate_python(plain))
    except ValidationError as error:
        # A field with several types has an error for each: one that understood the value says more.
        errors = error.errors()
        errors = [each for each in errors if not each["type"].endswith("_type")] or errors
        key = _key(errors[0]["loc"])
        expected = [each["msg"].partition(", unable")[0] for each in errors if _key(each["loc"]) == key]
        others = (text.removeprefix("Input should be ") for text in expected[1:])
        message = " or ".join([expected[0], *others])
        raise ConfigError(f"{where}: {parents}{key}: {message}, found {errors[0]['input']!r:.80}") from None


@functools.cache
def _adapter(cls: type[Any]) -> Any:
    """Pydantic's reader of a class, which takes longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _inner(hint: Any, values: Mapping[str, Any], where: str) -> type[Any] | None:
    """The dataclass that a field of this type makes of `values`, if there is one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    classes: list[Any] = [option for option in options if dataclasses.is_dataclass(option)]
    if len(classes) < 2 or "kind" not in values:
        return classes[0] if classes else None
    kinds = {cls.kind: cls for cls in classes}
    if values["kind"] not in list(kinds):
        raise ConfigError(f"{where}.kind: expected {' or '.join(kinds)}, found {values['kind']!r:.80}")
    return typing.cast(type[Any], kinds[values["kind"]])


def _key(path: tuple[int | str, ...]) -> str:
    """A field and the indices in it, from where pydantic found an error: without the types that it tried."""
    return ".".join(str(part) for k, part in enumerate(path) if k == 0 or isinstance(part, int))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names; the values of groups are there too, as those of empty ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found[prefix + key] = value
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.") | {prefix + key: {}}
    return found
