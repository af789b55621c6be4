"""Fetching a file, from a loopback server whose pages misbehave in every way that mirrors do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpql.data import d4rl, download
from cpql.data.download import fetch, recorded, verify_recorded
from cpql.data.request import Request
from cpql.errors import DataError
from cpql.io import Progress
from cpql.tasks import Task

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = random.Random(1).randbytes(300_000)
OVERLAP = 64 * 1024


@dataclass
class Page:
    """What a path answers.

    Attributes:
        stop: bytes of the body after which it ends early; None sends all of it.
        wait: set, it goes on at `stop`; None, the connection is closed there.
        ranges: whether Range is obeyed.
        said: what Content-Range says instead of the truth.
        length: whether Content-Length is sent.
    """

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stop: int | None = None
    wait: threading.Event | None = None
    ranges: bool = True
    said: str = ""
    length: bool = True


class Asked(NamedTuple):
    """A request and its answer."""

    path: str
    range: str | None
    status: int
    promised: int


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []
        self.came = threading.Event()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __setitem__(self, path: str, page: Page) -> None:
        self.pages[path] = page

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is meant to."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path, Page(b"not here", 404))
        span, status, body, headers = self.headers["Range"], page.status, page.content, dict(page.headers)
        if status == 200 and span and page.ranges:
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                status, body = 416, b""
            else:
                status, total = 206, len(body)
                body = body[start:]
                headers["Content-Range"] = page.said or f"bytes {start}-{total - 1}/{total}"
        self.server.asked.append(Asked(self.path, span, status, len(body)))
        self.server.came.set()
        if page.stop == -1:
            self.server.closing.wait(30)
            return
        self.send_response(status)
        if page.length:
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if page.stop is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: page.stop])
        if page.wait is not None:
            page.wait.wait(30)
            self.wfile.write(body[page.stop :])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running.pages.clear()
    running.asked.clear()
    running.came.clear()
    return running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "file.bin"


@pytest.fixture
def dead() -> Iterator[str]:
    """A URL where nobody listens: the port is taken, but not listened at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/file.bin"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def fits(path: Path) -> None:
    if path.read_bytes() != BODY:
        raise DataError(f"{path.name}: not the body")


def anything(path: Path) -> None:
    """A check that every file passes."""


def failure(urls: Sequence[str], path: Path, check: Callable[[Path], None] = fits) -> str:
    """The one line that a call ends with."""
    with pytest.raises(DataError) as caught:
        fetch(urls, path, check)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def record(path: Path, sha256: str = SHA256) -> None:
    path.parent.mkdir(exist_ok=True)
    path.with_name("file.bin.sha256").write_text(f"{sha256}  file.bin\n")


def lies_whole(path: Path) -> None:
    assert path.read_bytes() == BODY
    assert path.with_name("file.bin.sha256").read_text() == f"{SHA256}  file.bin\n"
    assert names(path.parent) == ["file.bin", "file.bin.sha256"]


def test_a_file_arrives_whole_and_is_fetched_once(server: Server, path: Path, dead: str) -> None:
    server["/file.bin"] = Page(BODY)
    seen: list[tuple[str, int, int]] = []
    urls = [dead, f"{server.url}/file.bin"]
    assert fetch(urls, str(path), fits, progress=lambda *report: seen.append(report)) == path
    lies_whole(path)
    assert seen[-1] == ("download file.bin", 300_000, 300_000)
    assert all(first[1] <= second[1] for first, second in itertools.pairwise(seen))
    assert fetch(urls, path, fits) == path
    assert len(server.asked) == 1
    if shutil.which("sha256sum"):
        command = ["sha256sum", "--check", "--strict", "file.bin.sha256"]
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
        assert done.stdout == "file.bin: OK\n"


def test_a_length_that_nobody_says(server: Server, path: Path) -> None:
    server["/file.bin"] = Page(BODY, length=False, stop=200_000)
    assert "not the body" in failure([f"{server.url}/file.bin"], path)
    assert names(path.parent) == []
    server["/file.bin"] = Page(BODY, length=False)
    seen: list[tuple[str, int, int]] = []
    fetch([f"{server.url}/file.bin"], path, fits, progress=lambda *report: seen.append(report))
    lies_whole(path)
    assert seen[-1][::2] == ("download file.bin", 0)


@pytest.mark.parametrize(
    ("page", "statuses"),
    [
        (Page(BODY), [206]),
        (Page(BODY + b"longer"), [206]),
        (Page(BODY[:100_000]), [416, 200]),
        (Page(OTHER), [206, 200]),
        # Only what isn't asked for again differs: the check of the whole finds it.
        (Page(b"?" + BODY[1:]), [206, 200]),
        (Page(BODY[:150_000] + OTHER[150_000:]), [206, 200]),
        (Page(OTHER, ranges=False), [200]),
        (Page(OTHER, said="bytes 0-299999/300000"), [206, 200]),
        (Page(OTHER, said="nonsense"), [206, 200]),
    ],
    ids=["same", "longer", "shorter", "other", "start", "end", "no-ranges", "other-range", "no-range"],
)
@pytest.mark.parametrize("second", ["file.bin", "another"])
def test_a_cut_download_goes_on_where_it_was(
    server: Server, path: Path, page: Page, statuses: list[int], second: str
) -> None:
    url = f"{server.url}/file.bin"
    server["/file.bin"] = Page(BODY, stop=200_000)
    assert failure([url], path) == (
        f"file.bin can't be downloaded from {url} (cut off after 200,000 of 300,000 bytes) (200,000 bytes "
        f"are kept, another call continues there): put file.bin into {path.parent} by hand"
    )
    assert names(path.parent) == [".file.bin.part"]
    server[f"/{second}"] = page

    def whole(path: Path) -> None:
        if path.read_bytes() != page.content:
            raise DataError(f"{path.name}: not the content")

    seen: list[tuple[str, int, int]] = []
    fetch([f"{server.url}/{second}"], path, whole, progress=lambda *report: seen.append(report))
    assert path.read_bytes() == page.content and recorded(path) == hashlib.sha256(page.content).hexdigest()
    assert names(path.parent) == ["file.bin", "file.bin.sha256"]
    assert [asked.status for asked in server.asked[1:]] == statuses
    assert server.asked[1].range == f"bytes={START}-"
    assert statuses != [206] or seen[0][1] > 200_000


@pytest.mark.parametrize(
    ("part", "statuses"),
    [(BODY, [206]), (BODY + b"?", [206]), (BODY[:100], [200]), (OTHER[:200_000], [206, 200]), (b"", [200])],
    ids=["whole", "too long", "short", "other", "empty"],
)
def test_any_part_that_lies_there(server: Server, path: Path, part: bytes, statuses: list[int]) -> None:
    server["/file.bin"] = Page(BODY)
    path.parent.mkdir()
    path.with_name(".file.bin.part").write_bytes(part)
    fetch([f"{server.url}/file.bin"], path, fits)
    lies_whole(path)
    assert [asked.status for asked in server.asked] == statuses


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (
            Page(b"<html>Sorry</html>", headers={"Content-Type": "text/html; charset=utf-8"}),
            "a web page, not",
        ),
        (Page(b"<html>Sorry</html>"), "not the body"),
        (Page(OTHER), "not the body"),
        (Page(b""), "an empty file"),
        (Page(b"", 404), "HTTP 404 Not Found"),
        (Page(b"", 403), "HTTP 403 Forbidden"),
        (Page(b"", 500), "HTTP 500 Internal Server Error"),
        (Page(b"", 204), "HTTP 204 No Content"),
        (Page(BODY, 206), "HTTP 206 Partial Content"),
        (Page(BODY, stop=100), "cut off after 100 of 300,000 bytes"),
        (Page(b"zz\r\n", length=False, headers={"Transfer-Encoding": "chunked"}), "at 0 bytes"),
        (Page(b"", 302, headers={"Location": "file:///etc/hostname"}), "HTTP 302"),
        (Page(b"", 302, headers={"Location": "ftp://127.0.0.1/file.bin"}), "is not allowed"),
    ],
    ids=lambda value: None if isinstance(value, Page) else value,
)
def test_what_is_no_file_is_never_taken_for_one(server: Server, path: Path, page: Page, reason: str) -> None:
    server["/bad"] = page
    message = failure([f"{server.url}/bad"], path)
    assert message.startswith(f"file.bin can't be downloaded from {server.url}/bad (") and reason in message
    assert message.endswith(f": put file.bin into {path.parent} by hand")
    assert names(path.parent.parent) == []
    # Nor does it harm what has come before, unless it claims to be the file.
    server["/file.bin"] = Page(BODY, stop=200_000)
    failure([f"{server.url}/file.bin"], path)
    server["/file.bin"] = Page(BODY)
    fetch([f"{server.url}/bad", f"{server.url}/file.bin"], path, fits)
    lies_whole(path)


def test_redirections_and_proxies_are_followed(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server["/here"] = Page(b"", 302, headers={"Location": "/there"})
    server["/there"] = Page(BODY, stop=200_000)
    failure([f"{server.url}/here"], path)
    server["/there"] = Page(BODY)
    fetch([f"{server.url}/here"], path, fits)
    lies_whole(path)
    assert server.asked[-1] == Asked("/there", f"bytes={START}-", 206, 100_000 + OVERLAP)
    path.unlink()
    url = "http://no.such.host.invalid/file.bin"
    monkeypatch.setenv("http_proxy", server.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server[url] = Page(BODY)
    fetch([url], path, fits)
    lies_whole(path)
    assert server.asked[-1].path == url


def test_all_urls_and_their_reasons_are_named(server: Server, path: Path, dead: str) -> None:
    mirrors = [dead, "file:///etc/hostname", "nonsense", f"{server.url}/gone"]
    assert failure(mirrors, path) == (
        f"file.bin can't be downloaded from {dead} (Connection refused), "
        "file:///etc/hostname (expected an http or https URL), nonsense (expected an http or https URL), "
        f"{server.url}/gone (HTTP 404 Not Found): put file.bin into {path.parent} by hand"
    )
    assert failure([], path) == (
        "file.bin can't be downloaded from anywhere: no URL is known: "
        f"put file.bin into {path.parent} by hand"
    )
    # This end speaks TLS, the other doesn't.
    assert "SSL" in failure([f"{server.url.replace('http', 'https')}/file.bin"], path)
    assert "no.such.host.invalid/f (" in failure(["http://no.such.host.invalid/f"], path)
    assert "http://[/f (" in failure(["http://[/f"], path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse at once what Linux lets wait")
def test_a_host_that_does_not_take_connections(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        crowd = [socket.socket() for _ in range(4)]
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        server["/file.bin"] = Page(BODY)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/file.bin"
        begun = time.monotonic()
        assert f"{url} (no answer within 0.3 s)" in failure([url], path)
        assert time.monotonic() - begun < 10
        # The second one has all the time it needs.
        fetch([url, f"{server.url}/file.bin"], path, fits)
        for one in crowd:
            one.close()
    lies_whole(path)


def test_a_disk_without_room_is_said_before_anything_is_written(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/file.bin"
    usage = shutil.disk_usage(path.parent.parent)

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=count))

    server["/file.bin"] = Page(BODY)
    free(299_999)
    assert failure([url, f"{server.url}/never-asked"], path) == (
        f"file.bin: the disk is full: the download needs 300,000 bytes in {path.parent}, "
        "299,999 bytes are free there"
    )
    assert names(path.parent.parent) == []
    # With 200,000 bytes here already, only the rest needs room.
    server["/file.bin"] = Page(BODY, stop=200_000)
    free(300_000)
    failure([url], path)
    server["/file.bin"] = Page(BODY)
    free(99_999)
    assert "needs 100,000 bytes" in failure([url], path)
    free(100_000)
    fetch([url], path, fits)
    lies_whole(path)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "the disk is full: the download needs 300,000 bytes in"),
        (errno.EDQUOT, "the disk is full: the download needs 300,000 bytes in"),
        (errno.EIO, "can't be written in"),
    ],
)
def test_a_disk_that_fills_up_or_fails(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    class Full(io.FileIO):
        """A file that takes 100,000 bytes."""

        def write(self, block: Any) -> int:
            left = 100_000 - self.tell()
            if left <= 0:
                raise OSError(code, os.strerror(code))
            return super().write(block[:left])

    server["/file.bin"] = Page(BODY)
    monkeypatch.setattr(download, "open", lambda path, mode, buffering: Full(path, mode), raising=False)
    message = failure([f"{server.url}/file.bin", f"{server.url}/never-asked"], path)
    assert message.startswith("file.bin: ") and text in message
    assert not path.exists() and len(server.asked) == 1
    if code != errno.EIO:
        assert names(path.parent.parent) == []
        assert re.search(r"[\d,]+ bytes are free there$", message)
    monkeypatch.delattr(download, "open")
    fetch([f"{server.url}/file.bin"], path, fits)
    lies_whole(path)


def test_a_folder_that_cannot_be(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    message = failure([f"{server.url}/file.bin"], tmp_path / "data" / "file.bin")
    assert message.startswith(f"file.bin: can't be written in {tmp_path / 'data'} (")
    assert server.asked == []


CHILD = """
import sys
from cpql.data.download import fetch
fetch([sys.argv[1]], sys.argv[2], lambda path: None, say=lambda line: print(line, flush=True))
print("done", flush=True)
"""


def child(url: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, url, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_downloads(server: Server, path: Path) -> None:
    gate = threading.Event()
    server["/file.bin"] = Page(BODY, stop=200_000, wait=gate)
    with child(f"{server.url}/file.bin", path) as first:
        assert server.came.wait(60)
        with child(f"{server.url}/file.bin", path) as second:
            assert second.stdout is not None and first.stdout is not None
            line = second.stdout.readline()
            assert re.fullmatch(
                r"file.bin: process \d+ on \S+ is downloading it: waiting until .* ended\n", line
            )
            assert not path.exists()
            gate.set()
            assert (first.stdout.read(), second.stdout.read()) == ("done\n", "done\n")
    assert (first.returncode, second.returncode) == (0, 0)
    assert server.asked == [Asked("/file.bin", None, 200, 300_000)]
    lies_whole(path)


def test_a_process_that_waits_outlives_the_folder(server: Server, path: Path) -> None:
    server["/file.bin"] = Page(BODY)
    path.parent.mkdir()
    lock = filelock.FileLock(path.with_name(".file.bin.lock"))
    lock.acquire()
    with child(f"{server.url}/file.bin", path) as process:
        assert process.stdout is not None
        assert "is downloading it" in process.stdout.readline()
        # As a download that fails here leaves things: the folder is gone, at once, with the lock in it.
        path.parent.rename(path.parent.with_name("gone"))
        lock.release()
        assert process.stdout.read() == "done\n"
    lies_whole(path)


def test_a_killed_process_is_taken_over_from(server: Server, path: Path) -> None:
    server["/file.bin"] = Page(BODY, stop=200_000, wait=server.closing)
    part = path.with_name(".file.bin.part")
    with child(f"{server.url}/file.bin", path) as process:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size == 200_000):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not path.exists()
    server["/file.bin"] = Page(BODY)
    said: list[str] = []
    fetch([f"{server.url}/file.bin"], path, fits, say=said.append)
    lies_whole(path)
    assert said == [] and server.asked[-1].range == f"bytes={200_000 - OVERLAP}-"


def test_an_interrupted_call_is_taken_over_from(server: Server, path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    server["/file.bin"] = Page(BODY)
    with pytest.raises(KeyboardInterrupt):
        fetch([f"{server.url}/file.bin"], path, fits, progress=stop)
    assert names(path.parent) == [".file.bin.part"]
    fetch([f"{server.url}/file.bin"], path, fits)
    lies_whole(path)
    assert server.asked[-1].status == 206


def test_a_file_that_changed_since(server: Server, path: Path) -> None:
    url = f"{server.url}/file.bin"
    server["/file.bin"] = Page(BODY)
    assert recorded(path) is None
    verify_recorded(path)
    fetch([url], path, anything)
    assert recorded(path) == SHA256
    verify_recorded(path)
    verify_recorded(path, SHA256)
    path.write_bytes(OTHER)
    found = hashlib.sha256(OTHER).hexdigest()
    for look in (
        verify_recorded,
        lambda path: verify_recorded(path, found),
        lambda path: fetch([url], path, anything),
    ):
        with pytest.raises(DataError) as caught:
            look(path)
        assert str(caught.value) == (
            f"file.bin: changed since it was downloaded: SHA-256 found {found}, expected {SHA256} as in "
            "file.bin.sha256: remove both to download it again"
        )
    assert path.read_bytes() == OTHER
    # What was recorded holds for another download too, until it is removed.
    path.unlink()
    server["/other"] = Page(OTHER)
    message = failure([f"{server.url}/other"], path, anything)
    assert f"(SHA-256 found {found}, expected {SHA256}): put" in message
    fetch([f"{server.url}/other", url], path, anything)
    lies_whole(path)
    path.unlink()
    path.with_name("file.bin.sha256").unlink()
    fetch([f"{server.url}/other", url], path, anything)
    assert recorded(path) == found


@pytest.mark.parametrize("text", ["", "abc  file.bin\n", f"{SHA256}  other.bin\n", f"{SHA256}\n", "\x00\xff"])
def test_a_damaged_record(server: Server, path: Path, text: str) -> None:
    path.parent.mkdir()
    path.with_name("file.bin.sha256").write_text(text)
    for call in (recorded, verify_recorded, lambda path: fetch([f"{server.url}/file.bin"], path, fits)):
        with pytest.raises(DataError, match=r"^file.bin.sha256: found '.*': expected sha256sum's line for"):
            call(path)
    path.with_name("file.bin.sha256").write_text(f"{SHA256.upper()} *file.bin")
    assert recorded(path) == SHA256


def test_what_lies_there_is_the_users(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(OTHER)
    assert fetch([], path, anything) == path
    assert failure([], path) == "file.bin: not the body"
    assert names(path.parent) == ["file.bin"]
    path.unlink()
    path.mkdir()
    assert failure([], path).startswith("file.bin: not a file in")
    path.rmdir()
    path.symlink_to("nowhere")
    assert failure([], path).startswith("file.bin: not a file in")


# What a stranger's server does: bytes that it sends and seconds that it waits, then it hangs up.
Script = Iterable[bytes | float]

RESET = b"reset"
HOLD = itertools.repeat(0.02)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n"
HEAD = PLAIN + b"\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
START = 200_000 - OVERLAP
REST = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes %d-299999/300000\r\n"
NO_ANSWER = "no answer within 0.3 s"
TOO_MUCH = "no end within 3,000,000 bytes"
NO_HTTP = "BadStatusLine: "


class Stranger:
    """A server that plays scripts: `script` is given what was asked, its head."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.place = f"127.0.0.1:{self.listening.getsockname()[1]}"
        self.script: Callable[[bytes], Script] = honest
        self.asked: list[bytes] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.answer, args=self.listening.accept()[:1], daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = connection.recv(1 << 16)
            self.asked.append(head)
            for act in self.script(head):
                if isinstance(act, float):
                    # A client that has gone away: there is an end to read.
                    if select.select([connection], [], [], act)[0] and not connection.recv(1 << 16):
                        return
                elif act == RESET:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                else:
                    connection.sendall(act)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()


@pytest.fixture
def stranger(server: Server) -> Iterator[Stranger]:
    stranger = Stranger()
    yield stranger
    stranger.close()


def honest(head: bytes) -> Script:
    span = re.search(rb"Range: bytes=(\d+)-", head)
    if not span:
        return [HEAD, BODY]
    start = int(span[1])
    return [REST % start + b"Content-Length: %d\r\n\r\n" % (300_000 - start), BODY[start:]]


def over_and_over(text: bytes, pause: float = 0.0) -> Script:
    while True:
        yield text
        if pause:
            yield pause


def status(line: str, *headers: str) -> bytes:
    return "".join(f"{each}\r\n" for each in (f"HTTP/1.1 {line}", *headers, "")).encode("latin-1")


def chunks(body: bytes, size: int) -> bytes:
    pieces = (body[i : i + size] for i in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def elsewhere(location: str, after: Script = ()) -> Callable[[bytes], Script]:
    """Redirects what asks for the file, and is honest about the rest."""

    def script(head: bytes) -> Script:
        if b"file.bin" not in head.split()[1]:
            return honest(head)
        return itertools.chain([status("302 Found", f"Location: {location}")], after)

    return script


def further(pause: float) -> Callable[[bytes], Script]:
    """Redirects everything to a place of another name."""
    return lambda head: [pause, status("302 Found", f"Location: {head.split()[1].decode()}x")]


def then(*scripts: Script | bytes | float) -> Callable[[bytes], Script]:
    """Answers so, whatever is asked."""
    acts = [[script] if isinstance(script, bytes | float) else script for script in scripts]
    return lambda head: itertools.chain(*acts)


# What it does, and the reason that is given, or WHOLE where the file comes nevertheless.
WHOLE = None
STRANGERS: dict[str, tuple[Callable[[bytes], Script], str | None]] = {
    "hangs up": (then(), "Remote end closed connection without response"),
    "resets": (then(RESET), "Connection reset by peer"),
    "says nothing": (then(HOLD), NO_ANSWER),
    "stops within the headers": (then(PLAIN, HOLD), NO_ANSWER),
    "a status without end": (then(over_and_over(b"HTTP/1.1 " * 999)), "more than 65536 bytes"),
    "a header without end": (then(PLAIN, over_and_over(b"X" * 9999)), "more than 65536 bytes"),
    "headers without end": (then(PLAIN, over_and_over(b"X: y\r\n" * 999)), "more than 100 headers"),
    "continues once": (then(CONTINUE, HEAD, BODY), WHOLE),
    "switches protocols": (then(status("101 Switching Protocols"), HOLD), "HTTP 101"),
    "garbage": (then(OTHER), NO_HTTP),
    "a file without a head": (then(BODY), NO_HTTP),
    "an alert of TLS": (then(b"\x15\x03\x01\x00\x02\x02\x28"), NO_HTTP),
    "another protocol": (then(HEAD.replace(b"HTTP/1.1", b"HTTP/7.0"), BODY), "UnknownProtocol: HTTP/7.0"),
    "a status that is no number": (then(HEAD.replace(b"200", b"2oo"), BODY), NO_HTTP + "HTTP/1.1 2oo OK"),
    "colours the terminal": (then(status("500 \x1b[31mred\x07\x9b")), "HTTP 500 \\x1b[31mred\\x07\\x9b"),
    "a reason without end": (then(status("500 " + "because " * 8000)), "HTTP 500 because"),
    "redirects to itself": (elsewhere("/file.bin"), "infinite loop"),
    "redirects without end": (further(0.0), "infinite loop"),
    "redirects nowhere": (then(status("302 Found")), "HTTP 302 Found"),
    "redirects to a port that cannot be": (elsewhere(f"http://127.0.0.1:{10**20}/x"), "too large"),
    "redirects to a port that is no number": (elsewhere("http://127.0.0.1:x/x"), "nonnumeric port"),
    "redirects to half an address": (elsewhere("http://[::1/x"), "Invalid IPv6 URL"),
    "redirects to a name too long": (elsewhere(f"http://{'x' * 300}.invalid/x"), "label empty or too long"),
    "redirects to a name with a line break": (elsewhere("http://a\r\n b/x"), "control characters"),
    "redirects into the machine": (elsewhere("file:///etc/hostname"), "is not allowed"),
    "redirects to other data": (elsewhere("data:,x"), "is not allowed"),
    "redirects with a page without end": (elsewhere("/x", over_and_over(b"page" * 999)), WHOLE),
    "not found, without end": (then(status("404 Not Found"), over_and_over(b"gone" * 999)), "HTTP 404"),
    "not modified": (then(status("304 Not Modified"), BODY), "HTTP 304 Not Modified"),
    "a part that nobody asked for": (then(REST % 9, b"\r\n", BODY[9:]), "HTTP 206 Partial Content"),
    "a page without end": (
        then(status("200 OK", "Content-Type: text/html"), over_and_over(b"page" * 999)),
        "a web page, not the file",
    ),
    "declares what no disk holds": (
        then(status("200 OK", f"Content-Length: {10**18}"), BODY),
        "declares 1,000,000,000,000,000,000 bytes: expected at most 3,000,000",
    ),
    "declares what no number holds": (
        then(status("200 OK", f"Content-Length: {'9' * 5000}"), over_and_over(BODY)),
        TOO_MUCH,
    ),
    "declares less than nothing": (then(status("200 OK", "Content-Length: -1"), BODY), WHOLE),
    "declares two lengths": (then(PLAIN, b"Content-Length: 7\r\n\r\n", BODY), WHOLE),
    "declares less than it sends": (then(HEAD, over_and_over(BODY)), WHOLE),
    "declares more than it sends": (then(HEAD, BODY[:-1]), "cut off after 299,999 of 300,000 bytes"),
    "declares nothing, without end": (then(status("200 OK"), over_and_over(BODY)), TOO_MUCH),
    "chunks without end": (then(CHUNKED, over_and_over(chunks(BODY, 99_999))), TOO_MUCH),
    "small chunks": (then(CHUNKED, chunks(BODY, 9), b"0\r\n\r\n"), WHOLE),
    "a chunk of no size": (then(CHUNKED, b"many\r\n", BODY), "at 0 bytes"),
    "a chunk of less than nothing": (then(CHUNKED, b"-5\r\n", BODY), "at 300,000 bytes"),
    "a chunk of more than it sends": (then(CHUNKED, b"f" * 99, b"\r\n", BODY), "at 300,000 bytes"),
    "a chunk's size without end": (then(CHUNKED, over_and_over(b"1" * 999)), "more than 65536 bytes"),
    "lines of another system": (then(HEAD.replace(b"\r\n", b"\n"), BODY), WHOLE),
    "a header that is none": (then(PLAIN, b"nonsense\r\n\r\n", BODY), WHOLE),
    "stops within the file": (then(HEAD, BODY[:200_000], HOLD), f"{NO_ANSWER} at 200,000 bytes"),
    "resets within the file": (then(HEAD, BODY[:200_000], 0.1, RESET), "Connection reset by peer at"),
}


Meet = Callable[[str, Path, str | None], None]


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Meet:
    monkeypatch.setattr(download, "MOST", 3_000_000)
    return lambda url, path, reason: _meet(url, path, reason, monkeypatch)


def _meet(url: str, path: Path, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch from a stranger: the right file, or one line with the reason, in time.

    Only what ends by a clock has a quick one: the others mustn't need it, nor fail on a busy machine.
    """
    if reason is WHOLE:
        fetch([url], path, fits)
        lies_whole(path)
        return
    begun = time.monotonic()
    with monkeypatch.context() as patch:
        if "no answer within" in reason:
            patch.setattr(download, "TIMEOUT", 0.3)
        message = failure([url], path)
    assert time.monotonic() - begun < 8
    assert reason in message and message.isprintable() and len(message) < 700
    assert not path.exists()


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_sends_the_right_file_or_is_refused(
    stranger: Stranger, path: Path, meet: Meet, name: str
) -> None:
    url = f"http://{stranger.place}/file.bin"
    stranger.script, reason = STRANGERS[name]
    meet(url, path, reason)
    stranger.script = honest
    meet(url, path, WHOLE)


def rest(*acts: Script | bytes | float) -> Callable[[bytes], Script]:
    """Answers so if a part is asked for."""
    scripted = then(*acts)
    return lambda head: scripted(head) if b"Range:" in head else honest(head)


PART = REST % START + b"\r\n"
# What it does when it is asked for the rest of 200,000 bytes, the reason, and how many bytes are kept.
WITHIN: dict[str, tuple[Callable[[bytes], Script], str | None, int]] = {
    "hangs up": (then(), "Remote end closed connection", 200_000),
    "says nothing": (then(HOLD), NO_ANSWER, 200_000),
    "not found": (then(status("404 Not Found")), "HTTP 404", 200_000),
    "stops within what lies here": (then(PART, BODY[START:150_000], HOLD), NO_ANSWER, 200_000),
    "resets within what lies here": (
        then(PART, BODY[START:150_000], 0.1, RESET),
        "Connection reset by peer",
        200_000,
    ),
    "ends within what lies here": (then(PART, BODY[START:150_000]), "cut off after 150,000", 200_000),
    "stops within what is new": (then(PART, BODY[START:220_000], HOLD), NO_ANSWER, 220_000),
    "sends more than there is": (then(PART, over_and_over(BODY[START:])), WHOLE, 0),
    "sends another file": (rest(PART, OTHER[START:]), WHOLE, 0),
    "sends another file's end": (rest(PART, BODY[START:200_000], OTHER[200_000:]), WHOLE, 0),
    "names a place that no number holds": (
        rest((REST % START).replace(b"300000", b"9" * 5000), b"\r\n", BODY[START:]),
        WHOLE,
        0,
    ),
    "names no place": (rest(status("206 Partial Content"), BODY[START:]), WHOLE, 0),
    "sends several parts": (
        rest(status("206 Partial Content", "Content-Type: multipart/byteranges")),
        WHOLE,
        0,
    ),
    "has no such part of anything": (then(status("416 Range Not Satisfiable")), "HTTP 416", 200_000),
}


@pytest.mark.parametrize("name", WITHIN)
def test_what_lies_here_survives_a_stranger(stranger: Stranger, path: Path, meet: Meet, name: str) -> None:
    url = f"http://{stranger.place}/file.bin"
    path.parent.mkdir()
    part = path.with_name(".file.bin.part")
    part.write_bytes(BODY[:200_000])
    stranger.script, reason, kept = WITHIN[name]
    meet(url, path, reason)
    assert part.stat().st_size >= kept if kept else not part.exists()
    stranger.script = honest
    meet(url, path, WHOLE)


TUNNEL = b"HTTP/1.1 200 Connection established\r\n"
# What it does when TLS is expected, at once or through a proxy, and the reason.
BEFORE: dict[str, tuple[Callable[[bytes], Script], str, bool]] = {
    "no handshake": (then(HOLD), NO_ANSWER, False),
    "no TLS": (then(HEAD, BODY), "SSL", False),
    "a proxy that hangs up": (then(), "Remote end closed connection", True),
    "a proxy that says nothing": (then(HOLD), NO_ANSWER, True),
    "a proxy that refuses": (
        then(status("407 Proxy Authentication Required")),
        "Tunnel connection failed: 407",
        True,
    ),
    "a proxy to nowhere": (then(TUNNEL, b"\r\n", HOLD), NO_ANSWER, True),
    "a proxy to no TLS": (then(TUNNEL, b"\r\n", HEAD, BODY), "SSL", True),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_stranger_where_tls_is_expected(
    stranger: Stranger, path: Path, meet: Meet, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stranger.script, reason, proxy = BEFORE[name]
    if proxy:
        monkeypatch.setenv("https_proxy", f"http://{stranger.place}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
    place = "no.such.host.invalid" if proxy else stranger.place
    meet(f"https://{place}/file.bin", path, reason)
    assert not proxy or stranger.asked[0].startswith(b"CONNECT no.such.host.invalid:443 ")


NAME = "hopper_medium-v2.hdf5"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """D4RL's cache folder, which doesn't exist yet, in a world without D4RL's host."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    monkeypatch.delenv("CPQL_D4RL_MIRROR", raising=False)
    monkeypatch.setattr(d4rl, "HOST", "http://127.0.0.1:9/")
    monkeypatch.setattr(d4rl, "MIRROR", "http://127.0.0.1:9/mirror/")
    return tmp_path / "datasets"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A small file in D4RL's layout."""
    with h5py.File(tmp_path / "source.hdf5", "w") as file:
        file["observations"], file["actions"] = np.zeros((4000, 11)), np.zeros((4000, 3))
    return (tmp_path / "source.hdf5").read_bytes()


@pytest.mark.parametrize("length", [True, False], ids=["said", "unsaid"])
def test_a_d4rl_file_arrives_from_its_urls(
    server: Server, cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, length: bool
) -> None:
    # The host has a folder for each family, its mirror has none.
    monkeypatch.setattr(d4rl, "HOST", f"{server.url}/host/")
    monkeypatch.setattr(d4rl, "MIRROR", f"{server.url}/mirror/")
    place = "elsewhere/hopper_full-v2.hdf5"
    server[f"/host/{place}"] = Page(content, length=length)
    seen: list[tuple[str, int, int]] = []
    path = get("hopper-full-replay-v2", lambda *report: seen.append(report), path=place)
    assert [asked.path for asked in server.asked] == [f"/mirror/{path.name}", f"/host/{place}"]
    assert path == cache / "hopper_full-v2.hdf5" and path.read_bytes() == content
    size = len(content)
    assert seen[-1] == ("download hopper_full-v2.hdf5", size, size if length else 0)
    # Without a path D4RL's host is asked for the id's name.
    server[f"/host/gym_mujoco_v2/{NAME}"] = Page(content)
    assert get("hopper-medium-v2") == cache / NAME
    assert names(cache) == [path.name, f"{path.name}.sha256", NAME, f"{NAME}.sha256"]
    with pytest.raises(DataError, match="isn't a D4RL id"):
        get("hopper")


def test_d4rls_places_are_asked_by_https_first() -> None:
    assert d4rl.MIRROR.startswith("https:") and d4rl.HOST.startswith("http:")


def get(id: str, progress: Progress | None = None, **entry: Any) -> Path:
    task = Task("task", None, datasets={"d4rl": {"id": id, **entry}})
    return d4rl.D4RL().fetch(Request(task, progress=progress))


def test_an_own_mirror_is_asked_first(
    server: Server, cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPQL_D4RL_MIRROR", f"{server.url}/one {server.url}/two/")
    monkeypatch.setattr(d4rl, "HOST", f"{server.url}/d4rl/")
    asked = [f"/one/gym_mujoco_v2/{NAME}", f"/one/{NAME}", f"/two/gym_mujoco_v2/{NAME}", f"/two/{NAME}"]
    server[f"/d4rl/gym_mujoco_v2/{NAME}"] = Page(content)
    for place in (f"/d4rl/gym_mujoco_v2/{NAME}", *reversed(asked)):
        server[place] = Page(content)
        server.asked.clear()
        path = get("hopper-medium-v2")
        expected = [*asked, f"/d4rl/gym_mujoco_v2/{NAME}"]
        assert [request.path for request in server.asked] == expected[: expected.index(place) + 1]
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("page", "damaged"),
        ("half", "damaged"),
        ("none", "an empty file"),
        ("npz", "damaged"),
        ("other", "none of D4RL's arrays"),
        ("long", "'observations' has shape [4001, 11]: expected [4000, 11] of D4RL's hopper-medium-v2"),
        ("wide", "'actions' has shape [4000, 6]: expected [4000, 3] of D4RL's hopper-medium-v2"),
        ("few", "'actions' has shape []: expected [4000, 3] of D4RL's hopper-medium-v2"),
        ("marked", "carries 'cpql_origin', as cpql's own files do: expected D4RL's hopper-medium-v2"),
    ],
)
def test_what_is_no_d4rl_file_is_never_taken_for_one(
    server: Server,
    cache: Path,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    reason: str,
) -> None:
    def made(attributes: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> bytes:
        with h5py.File(tmp_path / "made.hdf5", "w") as file:
            for key, shape in shapes.items():
                file[key] = np.zeros(shape)
            file.attrs.update(attributes or {})
        return (tmp_path / "made.hdf5").read_bytes()

    claim = {"cpql_origin": json.dumps({"source": "d4rl", "id": "hopper-medium-v2", "details": {}})}
    archive = io.BytesIO()
    np.savez(archive, observations=np.zeros((4000, 11)), actions=np.zeros((4000, 3)))
    bodies = {
        "page": b"<html>Sorry</html>",
        "half": content[: len(content) // 2],
        "none": b"",
        "npz": archive.getvalue(),
        "other": made(x=()),
        "long": made(observations=(4001, 11), actions=(4001, 3)),
        "wide": made(observations=(4000, 11), actions=(4000, 6)),
        "few": made(observations=(4000, 11)),
        "marked": made(claim, observations=(4000, 11), actions=(4000, 3)),
    }
    monkeypatch.setattr(d4rl, "MIRROR", f"{server.url}/")
    url = f"{server.url}/{NAME}"
    server[f"/{NAME}"] = Page(bodies[kind])
    with pytest.raises(DataError) as caught:
        get("hopper-medium-v2", rows=4000)
    message = str(caught.value)
    assert message.startswith(f"{NAME} can't be downloaded from {url} ({reason}")
    assert message.endswith(f": put {NAME} into {cache} by hand") and "\n" not in message
    assert not cache.exists()
    # What fits is taken, and where nobody knows how many rows there are, any number fits.
    server[f"/{NAME}"] = Page(content)
    get("hopper-medium-v2", rows=4000)
    if kind == "long":
        (cache / NAME).unlink()
        (cache / f"{NAME}.sha256").unlink()
        server[f"/{NAME}"] = Page(bodies[kind])
        get("hopper-medium-v2")


@pytest.mark.parametrize("folder", ["http://127.0.0.1:9/", "nonsense", "http://no.such.host.invalid/"])
def test_an_unreachable_own_mirror_is_one_line(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("CPQL_D4RL_MIRROR", folder)
    place = folder.rstrip("/")
    with pytest.raises(DataError, match=rf"^{NAME} can't be downloaded from {place}/.*{NAME} \(.*put {NAME}"):
        get("hopper-medium-v2")
    assert not cache.exists()


PAGES = st.builds(
    Page,
    content=st.sampled_from([BODY, BODY, BODY, OTHER, BODY[:250_000], b"<html>"]),
    status=st.sampled_from([200, 200, 200, 200, 404, 500]),
    stop=st.none() | st.integers(0, 300_000),
    ranges=st.booleans(),
    length=st.sampled_from([True, True, True, False]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.tuples(PAGES, PAGES), min_size=1, max_size=5), checksum=st.booleans())
def test_whatever_mirrors_do_it_is_the_right_file_or_none(
    server: Server, calls: list[tuple[Page, Page]], checksum: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data" / "file.bin"
        if checksum:
            record(path)
        check = anything if checksum else fits
        for pages in calls:
            server["/a"], server["/b"] = pages
            whole = any(
                page.content == BODY and page.status == 200 and page.stop in (None, 300_000) for page in pages
            )
            try:
                fetch([f"{server.url}/a", f"{server.url}/b"], path, check)
            except DataError:
                assert not whole and not path.exists()
                assert set(names(path.parent)) <= {".file.bin.part", "file.bin.sha256"}
            else:
                break
        server["/a"] = Page(BODY)
        fetch([f"{server.url}/a"], path, check)
        lies_whole(path)
