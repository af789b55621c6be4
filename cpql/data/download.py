"""Fetching one file from the first of several mirrors that has it, whole or not at all.

Beside the file `NAME` may lie: `.NAME.part`, what has come so far; `.NAME.lock`, while a process fetches it;
`NAME.sha256`, the checksum of what first came, as `sha256sum` writes it (and `sha256sum -c` reads it). `NAME`
itself appears once all of it has been checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from cpql.errors import DataError, printable
from cpql.io import Progress, flush_folder, held, sha256_of, write_text

__all__ = ["MOST", "alone", "fetch", "recorded", "verify_recorded"]

MOST = 8 << 30
"""Bytes that a file may have unless the caller says otherwise."""

BLOCK = 1 << 18
OVERLAP = 1 << 16
SLOWEST = 1024


def fetch(
    urls: Sequence[str],
    path: str | os.PathLike[str],
    check: Callable[[Path], object],
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    most: int = MOST,
    timeout: float = 30.0,
) -> Path:
    """Fetch a file, unless it is there already, and record its SHA-256 beside it.

    A file that has a record already, of an earlier download, must have that SHA-256. What an earlier call
    left unfinished is continued, from any URL: its last 64 KiB are requested again and must be the same, and
    if the whole doesn't pass the checks it is downloaded anew. Proxies are those of the environment
    (`http_proxy`, `https_proxy`, `no_proxy`).

    Args:
        urls: http and https URLs of the same file, tried in this order.
        path: the file; its folder is made.
        check: takes a file that has come whole and raises DataError, beginning with the file's name, where it
            isn't the expected one.
        progress: called with bytes, about ten times a second.
        say: takes the line that another process is waited for.
        most: bytes that the file may have, whatever a server says or doesn't say.
        timeout: seconds for a connection, and again for all that comes before the file; after that, seconds
            of silence that end a connection. So does less than 1 KiB a second for as long.

    Returns:
        `path`.

    Raises:
        DataError: no URL had it whole; says what to put where by hand, and what has come is kept. Or the disk
            is full, the folder can't be written to, or the file that is there isn't the expected one.
    """
    path = Path(path).absolute()
    # Before the lock: a shared folder may be one that only others can write to.
    if not os.path.lexists(path):
        with alone(path, "downloading", say):
            if not os.path.lexists(path):
                part = path.with_name(f".{path.name}.part")
                return _Download(path, part, recorded(path), check, progress, most, timeout).run(urls)
    # It may be the user's own: it is checked, and never replaced.
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
    try:
        text = record.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return None
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
        DataError: the file has changed, or it or the record can't be read.
    """
    expected = recorded(path)
    if expected is None:
        return
    try:
        found = found or sha256_of(path)
    except OSError as error:
        where = path.absolute().parent
        raise DataError(f"{path.name}: can't be read in {where} ({_reason(error)})") from error
    if found.lower() != expected:
        raise DataError(
            f"{path.name}: changed since it was downloaded: SHA-256 found {found}, expected {expected} as in "
            f"{_record(path).name}: remove both to download it again"
        )


@contextlib.contextmanager
def alone(path: Path, doing: str, say: Callable[[str], None]) -> Iterator[None]:
    """Be the only process that makes a file.

    Args:
        path: the file.
        doing: how it is made, "downloading", for the line that another process is waited for.
        say: takes that line.

    Raises:
        DataError: the file's folder can't be written to.
    """

    def busy(holder: str) -> None:
        say(f"{path.name}: {holder} is {doing} it: waiting until that has ended")

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(path.with_name(f".{path.name}.lock"), busy))
        except OSError as error:
            raise _unwritable(path, error) from error
        yield


class _Refused(Exception):
    """A URL that is of no use, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(" ".join(reason.split()))[:200])


@dataclasses.dataclass(frozen=True)
class _Download:
    """One file that is being fetched, by the one process that holds its lock."""

    path: Path
    part: Path
    expected: str | None
    check: Callable[[Path], object]
    progress: Progress | None
    most: int
    timeout: float

    def run(self, urls: Sequence[str]) -> Path:
        reasons = []
        for url in urls:
            try:
                sha256 = self.bring(url)
            except _Refused as error:
                reasons.append(f"{url} ({error})")
                continue
            with self.writing(self.size()):
                # The record first: a file without one would never get it.
                write_text(_record(self.path), f"{sha256}  {self.path.name}\n")
                os.replace(self.part, self.path)
                flush_folder(self.path.parent)
            return self.path
        where = ", ".join(reasons) or "anywhere: no URL is known"
        if self.size() > OVERLAP:
            where += f" ({self.size():,} bytes are kept, another call goes on from there)"
        else:
            self.part.unlink(missing_ok=True)
        name, folder = self.path.name, self.path.parent
        raise DataError(f"{name} can't be downloaded from {where}: put {name} into {folder} by hand")

    def bring(self, url: str) -> str:
        """Have the whole file in `part`, and give its SHA-256."""
        start = self.size() - OVERLAP
        if start > 0 and self.receive(url, start):
            # What doesn't fit may be the bytes from before, not this server's.
            with contextlib.suppress(_Refused):
                return self.examine()
        self.receive(url, 0)
        return self.examine()

    def receive(self, url: str, start: int) -> bool:
        """Receive the file from byte `start` on, or all of it where the server sends that.

        Returns:
            False where what is sent doesn't continue what is there; never for `start=0`.
        """
        response = self.request(url, start)
        if response is None:
            return False
        with response:
            total = response.length or 0
            if response.status == 206:
                sent = response.headers.get("Content-Range", "").strip()
                match = re.fullmatch(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", sent)
                first, last, total = map(int, match.groups()) if match else (0, 0, 0)
                if (first, last + 1) != (start, total):
                    return False
            else:
                start = 0
            if total > self.most:
                raise _Refused(f"declares {total:,} bytes: expected at most {self.most:,}")
            if total - self.size() > shutil.disk_usage(self.path.parent).free:
                raise self.no_room(total - self.size())
            return self.write(self.blocks(response, start, total), start, total)

    def write(self, blocks: Iterator[bytes], start: int, total: int) -> bool:
        """Write what comes to `part` from byte `start` on; False where it isn't what is there already."""
        label, size, done, due = f"download {self.path.name}", self.size() if start else 0, start, 0.0
        # Without a buffer closing writes nothing, and what is killed has lost nothing.
        with self.writing(total), open(self.part, "r+b" if start else "w+b", buffering=0) as file:
            file.seek(start)
            for block in blocks:
                known = file.read(min(len(block), max(0, size - done)))
                if block[: len(known)] != known:
                    return False
                rest = memoryview(block)[len(known) :]
                while rest:
                    rest = rest[file.write(rest) :]
                done += len(block)
                if self.progress and done > size and time.monotonic() >= due:
                    self.progress(label, done, total)
                    due = time.monotonic() + 0.1
            file.truncate(done)
            os.fsync(file.fileno())
        if self.progress:
            self.progress(label, done, total)
        return True

    def blocks(self, response: http.client.HTTPResponse, done: int, total: int) -> Iterator[bytes]:
        """What a server sends, up to the last byte of the file; whatever follows isn't waited for."""
        waited, came = 0.0, 0
        while not total or done < total:
            since = time.monotonic()
            try:
                block = response.read1(min(BLOCK, total - done) if total else BLOCK)
            except TimeoutError as error:
                raise _Refused(f"stalled for {self.timeout:g} s at {done:,} bytes") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _Refused(f"{_reason(error)} at {done:,} bytes") from error
            done, came = done + len(block), came + len(block)
            if not block and done < total:
                raise _Refused(f"cut off after {done:,} of {total:,} bytes")
            if done > self.most:
                raise _Refused(f"no end within {self.most:,} bytes")
            # Only waiting counts: what the disk takes is no server's fault.
            waited += time.monotonic() - since
            if waited >= self.timeout:
                if came < SLOWEST * waited:
                    raise _Refused(f"less than {SLOWEST} bytes a second at {done:,} bytes")
                waited, came = 0.0, 0
            if not block:
                return
            yield block

    def request(self, url: str, start: int) -> http.client.HTTPResponse | None:
        """Ask for a file from byte `start` on; None where the server has no such byte.

        Raises:
            _Refused: the answer isn't a file.
        """
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise _Refused("expected an http or https URL")
        headers = {"User-Agent": "cpql", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            response = _open(url, headers, self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if start and error.code == 416:
                return None
            raise _Refused(f"HTTP {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            late = isinstance(getattr(error, "reason", error), TimeoutError)
            raise _Refused(f"no answer within {self.timeout:g} s" if late else _reason(error)) from error
        if response.status not in ((200, 206) if start else (200,)):
            reason = f"HTTP {response.status} {response.reason}"
        elif response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            reason = "a web page, not the file"
        else:
            return response
        response.close()
        raise _Refused(reason)

    def examine(self) -> str:
        """Check the whole file, and give its SHA-256; what isn't the file goes."""
        try:
            if self.size() == 0:
                raise DataError("an empty file")
            with self.writing(0):
                found = sha256_of(self.part)
            if self.expected not in (None, found):
                raise DataError(f"SHA-256 found {found}, expected {self.expected}")
            self.check(self.part)
        except DataError as error:
            self.part.unlink()
            raise _Refused(str(error).removeprefix(f"{self.part.name}: ")) from error
        return found

    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    @contextlib.contextmanager
    def writing(self, total: int) -> Iterator[None]:
        """Tell trouble with the disk from trouble with a server; `total` is of the file in bytes."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise _unwritable(self.path, error) from error
            # A full disk hinders everything else: what has come gives way.
            self.part.unlink(missing_ok=True)
            raise self.no_room(total) from error

    def no_room(self, count: int) -> DataError:
        needed, free = f"{count:,} bytes" if count else "more", shutil.disk_usage(self.path.parent).free
        return DataError(
            f"{self.path.name}: the disk is full: the download needs {needed} in {self.path.parent}, "
            f"{free:,} bytes are free there"
        )


class _Redirections(urllib.request.HTTPRedirectHandler, urllib.request.FTPHandler):
    """Follows redirections, but not to ftp, and reads nothing else of them: it may have no end."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def ftp_open(self, req: Any) -> Any:
        raise urllib.error.URLError("a redirection to ftp is not allowed")


def _open(url: str, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    """Open a URL: a connection has `timeout` seconds, and so has all else that comes before the file.

    A socket's timeout is for single reads, and headers may come a byte at a time. So a thread reads them,
    which is left to itself where that takes too long.
    """
    future: Future[http.client.HTTPResponse] = Future()

    def read() -> None:
        try:
            request = urllib.request.Request(url, headers=headers)
            response = urllib.request.build_opener(_Redirections).open(request, timeout=timeout)
        except Exception as error:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)
        else:
            try:
                future.set_result(response)
            except InvalidStateError:  # nobody waits for it any more
                response.close()

    threading.Thread(target=read, daemon=True).start()
    try:
        return future.result(2 * timeout)
    except TimeoutError:
        if future.cancel():
            raise
        return future.result()


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path.name}: can't be written in {path.absolute().parent} ({_reason(error)})")


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if type(cause) in (http.client.BadStatusLine, http.client.UnknownProtocol):
        return f"expected an answer in HTTP/1, found '{cause}'"
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
