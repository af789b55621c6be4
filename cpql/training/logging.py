"""Where metrics go: always to CSV, optionally to TensorBoard or Weights & Biases, and to the terminal."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cpql import io
from cpql.errors import ConfigError, printable

__all__ = [
    "LOGGERS",
    "Bar",
    "CSVTable",
    "Callback",
    "CallbackLogger",
    "Logger",
    "make_console",
    "progress_bars",
    "read_table",
    "say",
]


class CSVTable:
    """A CSV file with one row a step.

    Rows after `step` are dropped, since a resumed run writes them again, and so are broken ones that a full
    disk or a power cut has left.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.columns: list[str] = []
        if not path.exists():
            return
        head, *lines = path.read_text(errors="replace").split("\n")[:-1] or [""]
        columns = head.split(",")
        kept = [line for line in lines if _is_row(line, len(columns)) and int(line.partition(",")[0]) <= step]
        if kept:
            self.columns = columns
            io.write_text(path, "\n".join([head, *kept]) + "\n")
        else:  # the next row defines the columns
            path.unlink()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row; the first row defines the columns, and what a later row lacks is NaN."""
        row = {"step": step, **metrics}
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not self.columns:
                self.columns = list(row)
                writer.writerow(self.columns)
            writer.writerow([row.get(name, math.nan) for name in self.columns])

    def rows(self) -> list[dict[str, float]]:
        """All rows as numbers."""
        return read_table(self.path)


def read_table(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _is_row(line: str, count: int) -> bool:
    """Whether a line is a step and as many numbers as make `count`."""
    step, *rest = line.split(",")
    try:
        return step.isdecimal() and len([float(cell) for cell in rest]) == count - 1
    except ValueError:
        return False


class TensorBoardLogger:
    """Metrics as TensorBoard scalars in the run's `tensorboard/`; those after `step` are replaced."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("logger=tensorboard needs a package: pip install 'cpql[tensorboard]'") from None
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class WandbLogger:
    """Metrics to Weights & Biases: offline, unless WANDB_MODE or an API key is set; needs no account."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logger=wandb needs a package: pip install wandb") from None
        mode: Any = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
        options: dict[str, Any] = {"project": "cpql", **config.get("wandb", {}), "name": name, "mode": mode}
        try:
            # A resumed run goes on under its id; offline, wandb keeps its parts until they are synced.
            file = folder / "wandb_id.txt"
            if file.exists():
                options |= {"id": file.read_text().strip()}
                options |= {} if mode == "offline" else {"resume": "allow"}
            # The members of a group are separate runs in one process.
            self.run: Any = wandb.init(**options, dir=str(folder), config=config, reinit="create_new")
            io.write_text(file, self.run.id + "\n")
        except Exception as error:  # wandb raises many kinds
            raise ConfigError(f"logger=wandb: {' '.join(str(error).split())}") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics at a step."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


Callback = Callable[[int, dict[str, float]], None]


class CallbackLogger:
    """Metrics to a function of the caller's, which takes the step and the metrics."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call it."""
        self.callback(step, dict(metrics))

    def close(self) -> None:
        """Nothing is left to do."""


Logger = TensorBoardLogger | WandbLogger | CallbackLogger
LOGGERS: dict[str, Callable[[Path, str, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}
"""Loggers besides CSV by name, each made from the run's folder, a name for the run, its configuration as
plain values and the step that it continues from. They raise ConfigError if their package is missing."""


class _Output:
    """A stream that drops what can't be written any more, so that training continues without a terminal."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream, self.prefix = stream, prefix

    def write(self, text: str) -> int:
        """Write lines and flush, to nowhere once that has failed."""
        try:
            self.stream.write("".join(self.prefix + line for line in text.splitlines(keepends=True)))
            self.stream.flush()
        except OSError:  # a closed pipe, a terminal that is gone, a full disk
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # also for what is buffered, and Python's last flush
            os.close(nowhere)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_console(prefix: str = "") -> Console:
    """A console on standard output, for as long as that can be written to.

    Args:
        prefix: of each line, where other processes print meanwhile: there are no bars then.
    """
    # Python has no stdout if it was closed before the start; rich knows that case.
    stream = None if sys.stdout is None else cast(TextIO, _Output(sys.stdout, prefix))
    return Console(file=stream, soft_wrap=True, force_terminal=False if prefix else None)


def say(console: Console, line: str, style: str = "") -> None:
    """Print a line as it is, whatever characters the paths and names in it have."""
    console.print(printable(line), style=style, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """A progress bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, console: Console, title: str, total: int, start: int = 0, every: float = 10.0) -> None:
        self.console, self.title, self.total, self.every = console, title, total, every
        # The speed is that of the last half minute, so that compiling doesn't count for ever.
        self.recent: deque[tuple[float, int]] = deque()
        self.printed = time.monotonic()
        self.away = 0.0
        self.rich: Progress | None = None
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
            self.rich.add_task(title, total=total, completed=start, text="")
            self.rich.start()

    def update(self, done: int, text: str = "") -> None:
        """Show how much is done, with a text beside it."""
        now = time.monotonic()
        if not self.recent or now - self.recent[-1][0] > 0.5:
            self.recent.append((now, done))
        while len(self.recent) > 2 and now - self.recent[0][0] > 30.0:
            self.recent.popleft()
        then, before = self.recent[0]
        speed = (done - before) / (now - then) if now > then else 0.0
        if self.rich is not None:
            self.rich.update(self.rich.task_ids[0], completed=done, text=f"{speed:,.0f}/s {text}")
        elif now - self.printed >= self.every or done == self.total:
            self.printed = now
            line = [f"{self.title} {done:,}/{self.total:,}", f"{speed:,.0f}/s" if speed else "", text]
            if speed and done < self.total:
                minutes, seconds = divmod(round((self.total - done) / speed), 60)
                line.append(f"{minutes}:{seconds:02d} left")
            self.console.print("  ".join(filter(None, line)), highlight=False, soft_wrap=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count the seconds of the block in `away` and leave them out of the speed."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self.away += seconds
            self.recent = deque((when + seconds, done) for when, done in self.recent)

    def close(self) -> None:
        """Stop drawing."""
        if self.rich is not None:
            self.rich.stop()


@contextmanager
def progress_bars(console: Console) -> Iterator[io.Progress]:
    """A callback that draws a bar for each title that it is called with."""
    bars: dict[str, Bar] = {}
    with ExitStack() as stack:

        def show(title: str, done: int, total: int) -> None:
            if title not in bars:
                bars[title] = stack.enter_context(closing(Bar(console, title, total)))
            bars[title].update(done)
            if 0 < total <= done:  # a total of 0 is unknown
                bars.pop(title).close()

        yield show
