"""Where figures go: CSV always, TensorBoard or Weights & Biases besides, and the terminal."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cpql.errors import ConfigError
from cpql.io import flush, write_text

__all__ = ["Bar", "CSVTable", "Logger", "make_console", "make_logger", "progress"]


class Logger(Protocol):
    """Takes figures at steps."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Write what is left."""


class CSVTable:
    """A CSV file with one row a step.

    Rows after `step` are dropped, as a resumed run writes them anew, and so is what isn't a row: one that a
    full disk or a power cut has cut off.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.columns: list[str] = []
        if not path.exists():
            return
        head, *lines = path.read_text(errors="replace").split("\n")[:-1] or [""]
        columns = head.split(",")
        kept = [
            line for line in lines if _numbers(line, len(columns)) and int(line.partition(",")[0]) <= step
        ]
        if kept:
            self.columns = columns
            write_text(path, "\n".join([head, *kept]) + "\n")
        else:  # the next row names the columns
            path.unlink()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append a row; the first one names the columns."""
        row = {"step": step, **figures}
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not self.columns:
                self.columns = list(row)
                writer.writerow(self.columns)
            writer.writerow([row[name] for name in self.columns])

    def rows(self) -> list[dict[str, float]]:
        """All rows as numbers."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    def flush(self) -> None:
        """Have it on the disk."""
        if self.path.exists():
            flush(self.path)


def _numbers(line: str, count: int) -> bool:
    """Whether a line is a row: a step and as many numbers as make `count`."""
    step, *rest = line.split(",")
    try:
        return step.isdecimal() and len([float(cell) for cell in rest]) == count - 1
    except ValueError:
        return False


class TensorBoardLogger:
    """Figures as TensorBoard scalars in the run's `tensorboard/`; those after `step` are written anew."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("logger=tensorboard needs a package: pip install 'cpql[tensorboard]'") from None
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class WandbLogger:
    """Figures to Weights & Biases: offline, unless WANDB_MODE or an API key is set; needs no account."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logger=wandb needs a package: pip install wandb") from None
        mode: Any = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
        try:
            # The members of a group are runs of their own, in one process.
            self.run: Any = wandb.init(
                project="cpql", name=name, dir=str(folder), config=config, mode=mode, reinit="create_new"
            )
        except Exception as error:  # it has many kinds
            raise ConfigError(f"logger=wandb: {' '.join(str(error).split())}") from error

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures at a step."""
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def make_logger(kind: str, folder: Path, name: str, config: dict[str, Any], step: int) -> Logger | None:
    """The logger besides CSV, if one is asked for.

    Args:
        kind: its name.
        folder: the run's.
        name: what a service calls the run.
        config: of the run, as plain values.
        step: that the run goes on from.

    Raises:
        ConfigError: its package is missing, or it can't be started.
    """
    if kind == "tensorboard":
        return TensorBoardLogger(folder, step)
    if kind == "wandb":
        return WandbLogger(folder, name, config)
    return None


class _Output:
    """A stream that is written to for as long as somebody reads it: training goes on without a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or from now on don't."""
        with self._while_it_lasts():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Likewise."""
        with self._while_it_lasts():
            self.stream.flush()

    @contextmanager
    def _while_it_lasts(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # a closed pipe, a terminal that is gone, a full disk
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # for what is buffered, and for Python's last words
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_console() -> Console:
    """Where people look: standard output, for as long as it can be written to."""
    # Python has none where it was closed before the start; rich knows that case.
    stream = None if sys.stdout is None else cast(TextIO, _Output(sys.stdout))
    return Console(file=stream, soft_wrap=True)


class Bar:
    """A progress bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console, title: str, total: int, start: int = 0, every: float = 10.0) -> None:
        self.console, self.title, self.total, self.every = console, title, total, every
        self.recent: deque[tuple[float, int]] = (
            deque()
        )  # the last half minute, so that compiling isn't counted for ever
        self.said = time.monotonic()
        self.away = 0.0
        self.rich: Progress | None = None
        self.id: TaskID | None = None
        if console.is_terminal:
            self.rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TextColumn("[cyan]{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.id = self.rich.add_task(title, total=total, completed=start, text="")
            self.rich.start()

    def update(self, done: int, text: str = "") -> None:
        """Show how far it is, with a text beside it."""
        now = time.monotonic()
        if not self.recent or now - self.recent[-1][0] > 0.5:
            self.recent.append((now, done))
        while len(self.recent) > 2 and now - self.recent[0][0] > 30.0:
            self.recent.popleft()
        then, before = self.recent[0]
        speed = (done - before) / (now - then) if now > then else 0.0
        if self.rich is not None and self.id is not None:
            self.rich.update(self.id, completed=done, text=f"{speed:,.0f}/s {text}")
        elif now - self.said >= self.every or done == self.total:
            self.said = now
            minutes, seconds = divmod(round((self.total - done) / speed), 60) if speed else (0, 0)
            left = f"{minutes}:{seconds:02d} left" if speed and done < self.total else ""
            line = (
                f"{self.title} {done:,}/{self.total:,}",
                f"{speed:,.0f}/s" if speed else "",
                text,
                left,
            )
            self.console.print("  ".join(filter(None, line)), highlight=False, soft_wrap=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count what happens meanwhile into `away`, the seconds of all pauses, and not into the speed."""
        began = time.monotonic()
        try:
            yield
        finally:
            gone = time.monotonic() - began
            self.away += gone
            self.recent = deque((when + gone, done) for when, done in self.recent)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.rich is not None:
            self.rich.stop()


@contextmanager
def progress(console: Console, title: str, total: int, start: int = 0) -> Iterator[Bar]:
    """A bar that is closed whatever happens."""
    bar = Bar(console, title, total, start)
    try:
        yield bar
    finally:
        bar.close()
