"""Files that appear whole or not at all and are worked on by one process at a time; and what they record."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from cpql.errors import DataError

__all__ = [
    "Progress",
    "alone",
    "aside",
    "aside_of",
    "clear_leftovers",
    "flush",
    "flush_folder",
    "held",
    "sha256_of",
    "user_folder",
    "versions",
    "write_text",
]

ASIDE = ".aside"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 where nobody knows)."""


def user_folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or else `default`; either may begin with `~`."""
    path = os.environ.get(variable) or default
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        text = f"there is no home folder for {path}: expected {variable} to name a folder"
        raise DataError(text) from error


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, if they are installed; by default of Python and what a score depends on."""
    found = {} if packages else {"python": platform.python_version()}
    for package in packages or ("cpql", "torch", "gymnasium", "gymnasium-robotics", "mujoco", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_text(path: Path, text: str) -> None:
    """Write a file aside and put it in place in one move."""
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def aside(final: Path) -> Iterator[Path]:
    """A path beside `final` to write a file or a folder to; the folder that `final` is in is made.

    When the block ends well, what was written is flushed to the disk and replaces `final`; else it vanishes.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    holder = aside_of(final)
    try:
        temporary = holder / final.name
        yield temporary
        flush(temporary)
        old = holder / "old"
        if os.path.lexists(final) and any(
            path.is_dir() and not path.is_symlink() for path in (final, temporary)
        ):
            final.replace(old)  # no move replaces a folder, or anything by one
        try:
            os.replace(temporary, final)
        except OSError:
            if os.path.lexists(old):
                old.replace(final)
            raise
        flush_folder(final.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def aside_of(beside: Path) -> Path:
    """A new folder, hidden beside a path, which `clear_leftovers` removes if nobody else does."""
    return Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=ASIDE, dir=beside.parent))


def clear_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed processes have left of `aside` in a folder, or for one file of that name alone.

    No other process may be writing in the folder, or to that file.
    """
    for path in folder.glob(f".{glob.escape(name)}*{ASIDE}"):
        shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file, or all files of a folder, on the disk."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            flush(inner)
        flush_folder(path)
    elif not path.is_symlink():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the system lets folders be opened for that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def held(file: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock; the lock of a process that is dead delays nobody.

    The lock's folder is made for that, and removed again if nothing was put into it.

    Args:
        file: the lock's, which names its holder.
        busy: called with the holder before it is waited for, unless this raises.

    Raises:
        OSError: the folder can't be written to.
    """
    lock = filelock.FileLock(file)
    missing = [each for each in (file.parent, *file.parent.parents) if not os.path.exists(each)]
    timeout = 0
    for attempt in range(100):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=timeout)
            break
        except filelock.Timeout:
            busy(_holder(file))
            timeout = -1
        except FileNotFoundError:  # the other process may have failed and removed the folder
            if attempt == 99:
                raise
        except NotImplementedError as error:  # neither flock nor its stand-in
            raise OSError(str(error)) from error
    native = isinstance(lock, filelock.FileLock)  # the stand-in names its holder and removes itself
    with contextlib.suppress(OSError):  # a full disk prevents no lock
        if native:
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        # filelock leaves flock's file there. Removing it while it is held is safe: since 3.24 a lock on a
        # file that is gone isn't taken.
        with contextlib.suppress(OSError):  # not while it is open, on Windows
            if native:
                file.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # there is something in it
            for each in missing:
                each.rmdir()


@contextmanager
def alone(path: Path, doing: str, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only process that makes a file, and clear what killed ones have left of theirs.

    Args:
        path: the file.
        doing: how it is made, "downloading", for the line that another process is waited for.
        say: takes that line.

    Raises:
        DataError: the file's folder can't be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock, end = path.with_name(f".{path.name}.lock"), f"is {doing} it: waiting until that has ended"
            stack.enter_context(held(lock, lambda holder: say(f"{path.name}: {holder} {end}")))
        except OSError as error:
            where, reason = path.absolute().parent, error.strerror or str(error)
            raise DataError(f"{path.name}: can't be written in {where} ({reason})") from error
        clear_leftovers(path.parent, f"{path.name}.")
        yield


def _holder(file: Path) -> str:
    """Who holds a lock: they write it there as soon as they have it."""
    for _ in range(20):
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            if text := " ".join(file.read_text(errors="replace").split()):
                return text
    return "another process"
