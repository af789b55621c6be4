"""What cpql raises when the user, not the program, has to act.

The command line prints these as one line and exits with 1; from Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ActingError",
    "CheckpointError",
    "ConfigError",
    "CpqlError",
    "DataError",
    "Interrupted",
    "brief",
    "did_you_mean",
    "printable",
]


class CpqlError(Exception):
    """Base of all errors that have a cause the user can mend.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code = 1


class ConfigError(CpqlError):
    """A setting that doesn't exist or can't have that value."""


class DataError(CpqlError):
    """A dataset that is missing, broken or doesn't fit the task."""


class CheckpointError(CpqlError):
    """A checkpoint or run folder that can't be read, or mustn't be written."""


class ActingError(CpqlError):
    """An environment that failed, or returned what isn't a finite number."""


class Interrupted(CpqlError):
    """The user stopped the run; it is saved."""

    exit_code = 130


def printable(text: str) -> str:
    """Text from a file, a server or a path as a terminal may have it: control characters are spelled out.

    Line breaks and tabs stay. Whoever prints it with rich adds `markup=False`.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def brief(error: Exception) -> str:
    """An error of anybody's in one line: its kind and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Name the options nearest to `name`, or all of them where none is near: a clause for an error."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(options)}"
