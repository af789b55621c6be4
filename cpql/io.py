"""Files that appear whole or not at all, are on the disk, and are worked on by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

__all__ = [
    "Progress",
    "aside",
    "aside_of",
    "clear_leftovers",
    "flush",
    "flush_folder",
    "held",
    "sha256_of",
    "write_text",
]

ASIDE = ".aside"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0 where nobody knows)."""


def write_text(path: Path, text: str) -> None:
    """Write a file aside and put it in place in one move."""
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def aside(final: Path) -> Iterator[Path]:
    """A path beside `final` to write to.

    When the block ends well, what is there is flushed to the disk and replaces `final`; else it vanishes.
    """
    holder = aside_of(final)
    try:
        temporary = holder / final.name
        yield temporary
        flush(temporary)
        if os.path.lexists(final) and (_is_folder(final) or _is_folder(temporary)):
            final.replace(holder / "old")  # no move replaces a folder, or anything by one
        os.replace(temporary, final)
        flush_folder(final.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def aside_of(beside: Path) -> Path:
    """A new folder, hidden beside a path, which `clear_leftovers` removes if nobody else does."""
    return Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=ASIDE, dir=beside.parent))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left of `aside` in a folder; no other may be writing."""
    for path in folder.glob(f".*{ASIDE}"):
        shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file, or all files of a folder, on the disk."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            flush(inner)
        flush_folder(path)
        return
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
    """Hold a lock, and no other process does.

    The lock's folder is made for that, and goes again where nothing was put into it. The lock of a process
    that is dead holds nobody up.

    Args:
        file: the lock's, which says who holds it.
        busy: called with who that is before it is waited for, unless this raises.

    Raises:
        OSError: the folder can't be written to.
    """
    lock = filelock.FileLock(file)
    missing = [each for each in (file.parent, *file.parent.parents) if not os.path.exists(each)]
    waiting, lost = False, 0
    while not lock.is_locked:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if waiting else 0)
        except filelock.Timeout:
            busy(_holder(file))
            waiting = True
        except FileNotFoundError:
            # The other process may have failed and taken the folder away; that doesn't happen for ever.
            lost += 1
            if lost == 100:
                raise
        except NotImplementedError as error:  # neither flock nor what stands in for it
            raise OSError(str(error)) from error
    native = isinstance(lock, filelock.FileLock)  # the stand-in says itself who holds it, and goes by itself
    if native:
        with contextlib.suppress(OSError):  # a full disk hinders nobody from being alone
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        # filelock leaves flock's file there. Removing it while it is held is safe: since 3.24 a lock on a
        # file that is gone isn't taken.
        if native:
            with contextlib.suppress(OSError):  # not while it is open, on Windows
                file.unlink()
        lock.release()
        with contextlib.suppress(OSError):  # something lies in it
            for each in missing:
                each.rmdir()


def _holder(file: Path) -> str:
    """Who holds a lock: they write it there as soon as they have it."""
    for _ in range(20):
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            if text := " ".join(file.read_text(errors="replace").split()):
                return text
    return "another process"
