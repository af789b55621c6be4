"""What cpql raises when the user, not the program, has to act.

The command line prints these as one line and exits with 1; from Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = [
    "ActingError",
    "CheckpointError",
    "ConfigError",
    "CpqlError",
    "DataError",
    "Interrupted",
    "brief",
    "did_you_mean",
    "errors_in_one_line",
    "escape_unknown_characters",
    "print_error",
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
    """An error of anybody's in one line of at most 500 characters: its kind, but for ValueError, and text."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500] or type(error).__name__


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Name the options nearest to `name`, or all of them where none is near: a clause for an error."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(options)}"


def print_error(error: CpqlError) -> None:
    """Print an error on standard error as one line, `error` in red before it."""
    from rich.console import Console
    from rich.text import Text

    line = Text(printable(" ".join(str(error).splitlines())))
    if not isinstance(error, Interrupted):
        line = Text.assemble(("error", "red"), " ", line)
    Console(stderr=True, soft_wrap=True).print(line)


def escape_unknown_characters() -> None:
    """Let standard output escape what its encoding doesn't have, such as a ±."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def errors_in_one_line(traceback: bool = False) -> Iterator[None]:
    """End the program with one line where the user can mend what went wrong, or has stopped it.

    Args:
        traceback: let exceptions pass instead.

    Raises:
        SystemExit: with the error's exit code, after `CpqlError`, `OSError` and `KeyboardInterrupt`; silently
            where the reader of the output is gone.
    """
    if traceback:
        yield
        return
    try:
        yield
        print(end="", flush=True)
    except CpqlError as error:
        _exit(error)
    except KeyboardInterrupt:
        _exit(Interrupted("interrupted"))
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = error.filename
        try:
            print(end="", flush=True)
        except OSError:  # its reader is gone, or its disk is full: Python would report that once more
            where = "standard output"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = error.strerror or str(error)
        _exit(CpqlError(reason if where is None else f"{where}: {reason}"))


def _exit(error: CpqlError) -> NoReturn:
    print_error(error)
    sys.exit(error.exit_code)
