"""Fetching one file from the first of several mirrors that has it, whole or not at all.

Beside the file `NAME` may lie: `.NAME.part`, what has come so far, with `.NAME.part.json`, what is needed to
go on from there; `.NAME.lock`, while a process fetches it; `NAME.sha256`, the checksum of what first came, as
`sha256sum` writes it (and `sha256sum -c` reads it). `NAME` itself appears once all of it has been checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import http.client
import io
import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpql.errors import ConfigError, DataError, printable
from cpql.io import Progress, flush_folder, held, sha256_of

__all__ = ["Mirror", "Progress", "alone", "fetch", "recorded", "verify_recorded"]

Mirror = str | tuple[str, ...]
"""Where a file lies: a URL, or several at one place, of which the next is asked where one answers 404."""

BLOCK = 1 << 18
OVERLAP = 1 << 16
SLOWEST = 1024
HEAD = 1 << 18
MOST = 8 << 30


def fetch(
    mirrors: str | Sequence[Mirror],
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    check: Callable[[Path], object] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    most: int = MOST,
    connect_timeout: float = 10.0,
    read_timeout: float = 30.0,
) -> Path:
    """Fetch a file, unless it lies there already, and record its SHA-256 beside it.

    What an earlier call left unfinished is continued: its last 64 KiB are asked for again and have to be the
    same. At the URL that they came from this needs an unchanged ETag or Last-Modified; without one, or at
    another URL, the same size and something to check the whole with, `sha256` or `check`. Else it starts
    anew. Proxies are those of the environment (`http_proxy`, `https_proxy`, `no_proxy`).

    Args:
        mirrors: http and https URLs, asked in this order; one alone will do.
        path: the file; its folder is made.
        sha256: 64 hexadecimal digits that it must have. Without them, those recorded beside it count, where
            an earlier download left some.
        check: takes a file that has come whole and raises DataError, beginning with the file's name, where it
            isn't what was wanted.
        progress: called with bytes, some ten times a second.
        say: takes the line that another process is waited for.
        most: bytes that the file may have, whatever a server says or doesn't say.
        connect_timeout: seconds until a connection must stand, for each address of a host, and again for TLS.
            Looking up its name takes as long as the system lets it.
        read_timeout: seconds that a server has for all that comes before the file: headers, redirections, a
            proxy's answer. From then on, seconds of silence that end a connection; so does less than 1 KiB a
            second for as long.

    Returns:
        `path`.

    Raises:
        ConfigError: `sha256` can't be a checksum.
        DataError: no mirror had it whole; says what to put where by hand, and what has come is kept. Or the
            disk is full, the folder can't be written to, or what lies there isn't what was wanted.
    """
    path = Path(path).absolute()
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ConfigError(f"sha256 of {path.name}: found '{sha256}': expected 64 hexadecimal digits")
    # Before the lock: a shared folder may be one that only others can write to.
    if os.path.lexists(path):
        return _present(path, sha256, check)
    with alone(path, "downloading", say):
        if os.path.lexists(path):
            return _present(path, sha256, check)
        expected = (sha256 or recorded(path) or "").lower()
        job = _Fetch(path, expected, check, progress, most, connect_timeout, read_timeout)
        return job.run((mirrors,) if isinstance(mirrors, str) else mirrors)


def recorded(path: str | os.PathLike[str]) -> str | None:
    """Give the SHA-256 that was recorded when `path` was downloaded, or None.

    Raises:
        DataError: the record is damaged.
    """
    path = Path(path)
    record = _record(path)
    try:
        text = record.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{record.name}: can't be read ({error.strerror})") from error
    match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)\n?", text)
    if match is None or match[2] != path.name:
        found = text.partition("\n")[0][:100]
        raise DataError(f"{record.name}: found '{found}': expected sha256sum's line for {path.name}")
    return match[1].lower()


def verify_recorded(path: str | os.PathLike[str], found: str | None = None) -> bool:
    """Hold a file against the SHA-256 that was recorded when it was downloaded.

    Args:
        path: the file.
        found: its SHA-256 as it is now, where that is known already.

    Returns:
        Whether there is a record. Where there is none, nothing is known, and nothing is read.

    Raises:
        DataError: the file no longer is what was recorded, or it or the record can't be read.
    """
    path = Path(path)
    expected = recorded(path)
    if expected is None:
        return False
    found = found or _sha256(path)
    if found.lower() != expected:
        raise DataError(
            f"{path.name}: changed since it was downloaded: SHA-256 found {found}, expected {expected} as in "
            f"{_record(path).name}: remove both to download it again"
        )
    return True


class _Refused(Exception):
    """A mirror that is of no use, and why."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(printable(" ".join(reason.split()))[:200])
        self.status = status


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What `.NAME.part.json` holds.

    Attributes:
        url: where all of the part is from; "" once it is from several places.
        validator: what the server there calls this version of the file: its ETag or Last-Modified, or "".
        total: bytes of the whole file; 0 where the server didn't say.
    """

    url: str
    validator: str
    total: int


@dataclasses.dataclass(frozen=True)
class _Fetch:
    """One file that is being fetched, by the one process that holds its lock."""

    path: Path
    sha256: str
    check: Callable[[Path], object] | None
    progress: Progress | None
    most: int
    connect_timeout: float
    read_timeout: float

    @property
    def part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def note(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part.json")

    def run(self, mirrors: Sequence[Mirror]) -> Path:
        reasons = []
        for mirror in mirrors:
            for url in (mirror,) if isinstance(mirror, str) else mirror:
                try:
                    return self.place(self.bring(url))
                except _Refused as error:
                    reasons.append(f"{url} ({error})")
                    if error.status != http.HTTPStatus.NOT_FOUND:
                        break
        name, size, origin = self.path.name, self.size(), self.origin()
        if self.start(origin.url):
            kept = f" ({size:,} of {origin.total:,} bytes are kept, another call goes on from there)"
        else:
            self.discard()
            kept = ""
        where = ", ".join(reasons) or "anywhere: no URL is known"
        raise DataError(
            f"{name} can't be downloaded from {where}{kept}: put {name} into {self.path.parent} by hand"
        )

    def bring(self, url: str) -> str:
        """Have the whole file in `part`, and give its SHA-256."""
        continued = self.receive(url, self.start(url))
        try:
            return self.examine()
        except _Refused:
            self.discard()
            if not continued:
                raise
        # The bytes from before may be what is wrong, not this mirror's.
        self.receive(url, 0)
        try:
            return self.examine()
        except _Refused:
            self.discard()
            raise

    def start(self, url: str) -> int:
        """Say which byte to ask `url` for first."""
        size, origin = self.size(), self.origin()
        same = url == origin.url and bool(origin.validator)
        if size > origin.total or not (same or self.sha256 or self.check):
            return 0
        return max(0, size - OVERLAP)

    def receive(self, url: str, start: int) -> bool:
        """Receive the file from byte `start` on, and say whether that went on with what lay there.

        A server that doesn't go along sends the whole file, at once or when asked again.
        """
        headers = {"User-Agent": "cpql", "Accept-Encoding": "identity"}
        origin = self.origin()
        if start:
            headers["Range"] = f"bytes={start}-"
            if url == origin.url and origin.validator:
                headers["If-Range"] = origin.validator
        try:
            response = self.open(url, headers)
        except _Refused as error:
            if start and error.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return self.receive(url, 0)
            raise
        with response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                made = _Origin(url, _validator(response), response.length or 0)
                if made.total > self.most:
                    raise _Refused(f"declares {made.total:,} bytes: expected at most {self.most:,}")
                with self.writing(made.total):
                    self.discard()
                    self.reserve(made.total)
                    if made.total:
                        _write_text(self.note, json.dumps(dataclasses.asdict(made)))
                self.append(response, 0, made.total)
                return False
            if start and self.continues(response, url, start):
                if url != origin.url:
                    # From now on no server's word stands for all of it.
                    with self.writing(origin.total):
                        mixed = _Origin("", "", origin.total)
                        _write_text(self.note, json.dumps(dataclasses.asdict(mixed)))
                self.reserve(origin.total - self.size())
                self.append(response, self.size(), origin.total)
                return True
        if not start:
            raise _Refused("HTTP 206 without being asked for a part")
        return self.receive(url, 0)

    def open(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Ask for a file, and refuse whatever says that it isn't one."""
        if not re.match(r"https?://", url, re.IGNORECASE):
            raise _Refused("expected an http or https URL")
        pace = _Pace(self.read_timeout)
        try:
            request = urllib.request.Request(url, headers=headers)
            response: http.client.HTTPResponse = _opener(pace).open(request, timeout=self.connect_timeout)
        except urllib.error.HTTPError as error:
            error.close()
            raise _Refused(f"HTTP {error.code} {error.reason}", error.code) from error
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            raise _Refused(_reason(error)) from error
        kind = response.headers.get_content_type()
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.status not in (http.HTTPStatus.OK, http.HTTPStatus.PARTIAL_CONTENT):
            reason = f"HTTP {response.status} {response.reason}"
        elif kind in ("text/html", "application/xhtml+xml"):
            reason = "a web page, not the file"
        elif encoding.lower() != "identity":
            reason = f"encoded as {encoding}: expected the plain file"
        else:
            pace.expect_file(self.most)
            return response
        response.close()
        raise _Refused(reason)

    def continues(self, response: http.client.HTTPResponse, url: str, start: int) -> bool:
        """Whether a 206 is the rest of the file in `part`; reads as much of it as lies there already."""
        origin = self.origin()
        expected = f"bytes {start}-{origin.total - 1}/{origin.total}"
        if response.headers.get("Content-Range", "").strip() != expected:
            return False
        # A server may know Range, but not If-Range.
        validator = _validator(response)
        if url == origin.url and origin.validator and validator not in ("", origin.validator):
            return False
        with self.writing(origin.total), self.part.open("rb") as file:
            file.seek(start)
            mine = file.read()
        theirs = self.read(response.read, len(mine))
        if theirs == mine[: len(theirs)] and len(theirs) < len(mine):
            raise _Refused(f"cut off after {start + len(theirs):,} of {origin.total:,} bytes")
        return theirs == mine

    def read(self, read: Callable[[int], bytes], count: int) -> bytes:
        try:
            return read(count)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Refused(f"{_reason(error)} at {self.size():,} bytes") from error

    def append(self, response: http.client.HTTPResponse, done: int, total: int) -> None:
        """Append a response's body to `part` and see that it is whole, and on the disk."""
        label = f"download {self.path.name}"
        due = 0.0
        with contextlib.ExitStack() as stack:
            with self.writing(total):
                # Without a buffer closing writes nothing, and what is killed has lost nothing.
                file = stack.enter_context(open(self.part, "ab", buffering=0))
            # Whatever follows the last byte isn't waited for.
            while not total or done < total:
                block = self.read(response.read1, min(BLOCK, total - done) if total else BLOCK)
                if not block:
                    break
                with self.writing(total):
                    rest = memoryview(block)
                    while rest:
                        rest = rest[file.write(rest) :]
                done, now = done + len(block), time.monotonic()
                if self.progress is not None and now >= due:
                    self.progress(label, done, total)
                    due = now + 0.1
            with self.writing(total):
                os.fsync(file.fileno())
        if self.progress is not None:
            self.progress(label, done, total)
        if done < total:
            raise _Refused(f"cut off after {done:,} of {total:,} bytes")

    def examine(self) -> str:
        """Check the whole file, and give its SHA-256."""
        if self.size() == 0:
            raise _Refused("an empty file")
        found = _sha256(self.part)
        if self.sha256 and found != self.sha256:
            raise _Refused(f"SHA-256 found {found}, expected {self.sha256}")
        if self.check is not None:
            try:
                self.check(self.part)
            except DataError as error:
                raise _Refused(str(error).removeprefix(f"{self.part.name}: ")) from error
        return found

    def place(self, sha256: str) -> Path:
        with self.writing(self.size()):
            # The record first: a file without one would never get it.
            _write_text(_record(self.path), f"{sha256}  {self.path.name}\n")
            os.replace(self.part, self.path)
            self.note.unlink(missing_ok=True)
            flush_folder(self.path.parent)
        return self.path

    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def origin(self) -> _Origin:
        """Give what is known of the part's bytes; where nothing is, they are of no use."""
        try:
            said = json.loads(self.note.read_text(encoding="utf-8"))
            return _Origin(str(said["url"]), str(said["validator"]), int(said["total"]))
        except (OSError, ValueError, TypeError, KeyError):
            return _Origin("", "", 0)

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def reserve(self, count: int) -> None:
        """Refuse to begin what can't end well."""
        free = shutil.disk_usage(self.path.parent).free
        if count > free:
            raise DataError(self.no_room(count, free))

    @contextlib.contextmanager
    def writing(self, total: int) -> Iterator[None]:
        """Tell trouble with the disk from trouble with a mirror; `total` is of the file in bytes."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                # A full disk hinders everything else: what has come gives way.
                self.discard()
                free = shutil.disk_usage(self.path.parent).free
                raise DataError(self.no_room(total, free)) from error
            raise DataError(
                f"{self.path.name}: can't be written in {self.path.parent} ({_reason(error)})"
            ) from error

    def no_room(self, count: int, free: int) -> str:
        needed = f"{count:,} bytes" if count else "more"
        return (
            f"{self.path.name}: the disk is full: the download needs {needed} in {self.path.parent}, "
            f"{free:,} bytes are free there"
        )


class _Pace:
    """The time and the bytes that one answer may take, on however many connections it comes.

    Only waiting counts: what the disk or a stopped process takes is no server's fault.

    Args:
        patience: seconds of waiting. All that comes before the file has to be there within them, and within
            HEAD bytes; of the file as many seconds have to bring SLOWEST bytes each, again and again.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.in_file = False
        self.waited, self.came = 0.0, 0
        self.limit = self.room = HEAD

    def expect_file(self, most: int) -> None:
        """From here on comes the file: `most` bytes, with what chunks add to them."""
        self.in_file = True
        self.waited, self.came = 0.0, 0
        self.limit = self.room = most

    def read(self, connection: socket.socket, raw: io.RawIOBase, buffer: Any) -> int:
        """Read what has come on a connection.

        Raises:
            HTTPException: it takes too long or brings too much.
        """
        patience = self.patience if self.in_file else self.patience - self.waited
        if patience <= 0:
            raise http.client.HTTPException(self.late())
        connection.settimeout(patience)
        since = time.monotonic()
        try:
            count = raw.readinto(buffer) or 0
        except TimeoutError as error:
            raise http.client.HTTPException(self.late()) from error
        self.waited += time.monotonic() - since
        self.came += count
        self.room -= count
        if self.room < 0:
            what = "end" if self.in_file else "file"
            raise http.client.HTTPException(f"no {what} within {self.limit:,} bytes")
        if self.in_file and self.waited >= self.patience:
            if self.came < SLOWEST * self.waited:
                raise http.client.HTTPException(f"less than {SLOWEST} bytes a second")
            self.waited, self.came = 0.0, 0
        return count

    def late(self) -> str:
        return f"{'stalled for' if self.in_file else 'no answer within'} {self.patience:g} s"


class _Incoming(io.RawIOBase):
    """What comes on a connection, at a pace."""

    def __init__(self, connection: socket.socket, raw: io.RawIOBase, pace: _Pace) -> None:
        self.connection, self.raw, self.pace = connection, raw, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.pace.read(self.connection, self.raw, buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read at a pace: its own head and body, and what a proxy says before it."""

    def __init__(self, connection: socket.socket, *arguments: Any, pace: _Pace, **options: Any) -> None:
        super().__init__(connection, *arguments, **options)
        # As small as it is: what it reads ahead of the file counts as head.
        self.fp = io.BufferedReader(_Incoming(connection, self.fp.detach(), pace), 8192)


class _Connection(http.client.HTTPConnection):
    """A connection with two patiences: urllib knows only one."""

    def __init__(self, *arguments: Any, pace: _Pace, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.response_class = functools.partial(_Response, pace=pace)  # type: ignore[assignment]
        self.patience = pace.patience

    def connect(self) -> None:
        try:
            super().connect()
        except TimeoutError as error:
            raise TimeoutError(f"no connection within {self.timeout:g} s") from error
        self.sock.settimeout(self.patience)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__()
        self.pace = pace

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_Connection, pace=self.pace), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_SecureConnection, pace=self.pace), request)

    http_request = urllib.request.AbstractHTTPHandler.do_request_
    https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows them, and doesn't read what else they say, as urllib does: it may have no end."""

    def redirect_request(self, request: urllib.request.Request, answer: Any, *more: Any) -> Any:
        answer.close()
        return super().redirect_request(request, answer, *more)


def _opener(pace: _Pace) -> urllib.request.OpenerDirector:
    """Make an opener that, unlike urllib's own, knows neither ftp: nor file:, not even by a redirection."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _Handler(pace),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirections(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _validator(response: http.client.HTTPResponse) -> str:
    """Give what If-Range takes: a weak ETag stands for bytes that are much the same, not the same."""
    etag: str = response.headers.get("ETag", "")
    modified: str = response.headers.get("Last-Modified", "")
    return etag if etag.startswith('"') else modified


def _present(path: Path, sha256: str | None, check: Callable[[Path], object] | None) -> Path:
    """Check a file that lies there already: it is the user's, so it is never replaced."""
    if not path.is_file():
        raise DataError(f"{path.name}: not a file in {path.parent}: expected a file or nothing")
    if sha256 is None:
        verify_recorded(path)
    elif (found := _sha256(path)) != sha256.lower():
        raise DataError(
            f"{path.name}: another file lies in {path.parent}: SHA-256 found {found}, expected "
            f"{sha256.lower()}: remove it to download it"
        )
    if check is not None:
        check(path)
    return path


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
            raise DataError(
                f"{path.name}: can't be written in {path.absolute().parent} ({_reason(error)})"
            ) from error
        yield


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(
            f"{path.name}: can't be read in {path.absolute().parent} ({_reason(error)})"
        ) from error


def _write_text(path: Path, text: str) -> None:
    """Write a small file in one move. Its name aside is always the same: the lock is held."""
    aside = path.with_name(f".{path.name.removeprefix('.')}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if type(cause) in (http.client.BadStatusLine, http.client.UnknownProtocol):
        return f"expected an answer in HTTP/1, found '{cause}'"
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
