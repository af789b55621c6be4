"""Downloading one file from the first of several mirrors that has it, whole or not at all.

There may be further files beside `NAME`: `.NAME.part`, an unfinished download; `.NAME.lock`, while a process
downloads it; `NAME.sha256`, the checksum of the first download, in `sha256sum`'s format. `NAME` itself
appears once the whole file has been checked.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpql.errors import DataError, brief, printable
from cpql.io import Progress, alone, flush_folder, sha256_of, write_text

__all__ = ["fetch", "recorded", "verify_recorded"]

TIMEOUT = 30.0
"""Seconds without any data after which a URL is given up."""

MOST = 8 << 30
"""The largest file that is downloaded, in bytes."""

BLOCK = 1 << 18
OVERLAP = 1 << 16


def fetch(
    urls: Sequence[str],
    path: str | os.PathLike[str],
    check: Callable[[Path], object],
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Download a file, unless it exists already, and record its SHA-256 beside it.

    If there is a record of an earlier download, the file must have that SHA-256. An unfinished download is
    continued, from any of the URLs: its last 64 KiB are requested again and must be the same; if the whole
    file then fails a check, it is downloaded from the start. Proxies are those of the environment
    (`http_proxy`, `https_proxy`, `no_proxy`).

    Args:
        urls: http and https URLs of the same file, tried in this order.
        path: the file; its folder is created.
        check: called with the whole file; raises a DataError, which begins with the file's name, if it isn't
            the expected one.
        progress: called with the number of bytes, after every 256 KiB.
        say: takes the line that another process is waited for.

    Raises:
        DataError: no URL gave the whole file; names the file to put into the folder by hand, and keeps the
            unfinished download. Or the disk is full, the folder can't be written to, or the file that exists
            isn't the expected one.
    """
    path = Path(path).absolute()
    # Before the lock: a shared folder may be read-only.
    if not os.path.lexists(path):
        with alone(path, "downloading", say):
            if not os.path.lexists(path):
                return _Download(path, check, progress).run(urls)
    # It may be the user's own file: it is checked and never replaced.
    if not path.is_file():
        raise DataError(f"{path.name}: not a file in {path.parent}: expected a file or nothing")
    verify_recorded(path)
    check(path)
    return path


def recorded(path: Path) -> str | None:
    """The SHA-256 that was recorded when `path` was downloaded, or None.

    Raises:
        DataError: the record is damaged.
    """
    record = _record(path)
    if not record.exists():
        return None
    text = record.read_text("utf-8", errors="replace")
    match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)\n?", text)
    if match is None or match[2] != path.name:
        found = text.partition("\n")[0][:100]
        raise DataError(f"{record.name}: found '{found}': expected sha256sum's line for {path.name}")
    return match[1].lower()


def verify_recorded(path: Path, found: str | None = None) -> None:
    """Compare a file with the SHA-256 that was recorded when it was downloaded, if one was.

    Args:
        path: the file.
        found: its SHA-256 as it is now, where that is known already.

    Raises:
        DataError: the file has changed, or the record is damaged.
    """
    expected = recorded(path)
    if expected is not None and (found := found or sha256_of(path)) != expected:
        raise DataError(
            f"{path.name}: changed since it was downloaded: SHA-256 found {found}, expected {expected} as in "
            f"{_record(path).name}: remove both to download it again"
        )


class _OtherBytesError(ValueError):
    """A server that doesn't continue what was downloaded, or a whole file that isn't the expected one."""


class _Download:
    """The download of one file, by the process that holds its lock."""

    def __init__(self, path: Path, check: Callable[[Path], object], progress: Progress | None) -> None:
        self.path, self.check, self.progress = path, check, progress
        self.part = path.with_name(f".{path.name}.part")
        self.expected = recorded(path)

    def run(self, urls: Sequence[str]) -> Path:
        reasons = []
        for url in urls:
            try:
                sha256 = self.bring(url)
            except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
                reasons.append(f"{url} ({_reason(error)})")
                continue
            with self.writing(self.size()):
                # The record first: a file without a record would never get one.
                write_text(_record(self.path), f"{sha256}  {self.path.name}\n")
                os.replace(self.part, self.path)
                flush_folder(self.path.parent)
            return self.path
        where = ", ".join(reasons) or "anywhere: no URL is known"
        if self.size() > OVERLAP:
            where += f" ({self.size():,} bytes are kept, another call continues there)"
        else:
            self.part.unlink(missing_ok=True)
        name, folder = self.path.name, self.path.parent
        raise DataError(f"{name} can't be downloaded from {where}: put {name} into {folder} by hand")

    def bring(self, url: str) -> str:
        """Download the whole file to `part` and return its SHA-256."""
        if self.size() > OVERLAP:
            # If the check fails, the earlier bytes may be wrong rather than this server's.
            with contextlib.suppress(_OtherBytesError):
                self.receive(url, self.size() - OVERLAP)
                return self.examine()
        self.receive(url, 0)
        return self.examine()

    def receive(self, url: str, start: int) -> None:
        """Receive the file from byte `start` on, or all of it if the server sends that."""
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise ValueError("expected an http or https URL")
        headers = {"User-Agent": "cpql", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            opener = urllib.request.build_opener(_Redirections)
            response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _OtherBytesError("another file") from error
            raise
        with response:
            total = response.length or 0
            if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
                raise ValueError("a web page, not the file")
            if start and response.status == http.HTTPStatus.PARTIAL_CONTENT:
                sent = response.headers.get("Content-Range", "").strip()
                match = re.fullmatch(rf"bytes {start}-(\d{{1,15}})/(\d{{1,15}})", sent)
                if match is None or int(match[1]) + 1 != int(match[2]):
                    raise _OtherBytesError("another part of the file")
                total = int(match[2])
            elif response.status == http.HTTPStatus.OK:
                start = 0
            else:
                raise ValueError(f"HTTP {response.status} {response.reason}")
            if total > MOST:
                raise ValueError(f"declares {total:,} bytes: expected at most {MOST:,}")
            if total - self.size() > shutil.disk_usage(self.path.parent).free:
                raise self.no_room(total - self.size())
            self.write(response, start, total)

    def write(self, response: http.client.HTTPResponse, start: int, total: int) -> None:
        """Write a body to `part` from byte `start` on, where the bytes that are there must be the same."""
        size, done = self.size() if start else 0, start
        # Without a buffer a killed process loses nothing that has arrived.
        with self.writing(total), open(self.part, "r+b" if start else "w+b", buffering=0) as file:
            file.seek(start)
            while True:
                try:
                    block = response.read1(min(BLOCK, total - done) if total else BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise ValueError(f"{_reason(error)} at {done:,} bytes") from error
                if not block:
                    break
                known = file.read(min(len(block), max(0, size - done)))
                if block[: len(known)] != known:
                    raise _OtherBytesError("another file")
                rest = memoryview(block)[len(known) :]
                while rest:
                    rest = rest[file.write(rest) :]
                done += len(block)
                if done > MOST:
                    raise ValueError(f"no end within {MOST:,} bytes")
                if self.progress and done > size:
                    self.progress(f"download {self.path.name}", done, total)
            if done < total:
                raise ValueError(f"cut off after {done:,} of {total:,} bytes")
            file.truncate(done)
            os.fsync(file.fileno())

    def examine(self) -> str:
        """Check the whole file and return its SHA-256; a wrong file is removed."""
        found = sha256_of(self.part)
        try:
            if self.size() == 0:
                raise ValueError("an empty file")
            if self.expected not in (None, found):
                raise ValueError(f"SHA-256 found {found}, expected {self.expected}")
            self.check(self.part)
        except (DataError, ValueError) as error:
            self.part.unlink()
            raise _OtherBytesError(str(error).removeprefix(f"{self.part.name}: ")) from error
        return found

    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    @contextlib.contextmanager
    def writing(self, total: int) -> Iterator[None]:
        """Turn errors of the disk into DataErrors; `total` is the file's number of bytes."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # A full disk stops every other program too: the unfinished download is removed.
                self.part.unlink(missing_ok=True)
                raise self.no_room(total) from error
            name, where = self.path.name, self.path.parent
            raise DataError(f"{name}: can't be written in {where} ({_reason(error)})") from error

    def no_room(self, count: int) -> DataError:
        name, where, free = self.path.name, self.path.parent, shutil.disk_usage(self.path.parent).free
        return DataError(
            f"{name}: the disk is full: the download needs {f'{count:,}' if count else 'more'} bytes in "
            f"{where}, {free:,} bytes are free there"
        )


class _Redirections(urllib.request.HTTPRedirectHandler, urllib.request.FTPHandler):
    """Follows redirections, though not to ftp, without reading their bodies, which may be endless."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def ftp_open(self, req: Any) -> Any:
        raise urllib.error.URLError("a redirection to ftp is not allowed")


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _reason(error: Exception) -> str:
    """Why a URL doesn't give the file, in one line of printable text."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        text = f"HTTP {error.code} {error.reason}"
    elif isinstance(cause, TimeoutError):
        text = f"no answer within {TIMEOUT:g} s"
    elif isinstance(cause, http.client.HTTPException):
        text = brief(cause)
    else:
        text = str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
    return printable(" ".join(text.split()))[:200]
