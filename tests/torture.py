"""Kills trainings at their file operations, continues them, and looks at what was lost: `--help` says how.

A trial is a training in a process of its own that counts what it does to the run's folder and dies of SIGKILL
before a chosen operation, in most trials with the last file cut short. It is then continued as a user would,
in a third of the trials killed once more on the way, and what is left is held against an undisturbed run.

The processes are forked from one that has imported everything, so that a trial takes half a second. For the
same reason a curve's PNG holds what is drawn, not its pixels. `Command` starts the real thing, with neither.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors
import torch
from matplotlib.figure import Figure
from rich.console import Console

from cpql.deploy.policy import Policy
from cpql.errors import CheckpointError, CpqlError
from cpql.tasks import Task
from cpql.training.checkpoint import find_training, load_training
from cpql.training.config import BudgetConfig, DatasetConfig, OnlineConfig, TrainConfig
from cpql.training.loop import train_group

ROOT = Path(__file__).resolve().parent.parent
PENDULUM = Task("pendulum", "Pendulum-v1", env_options={"max_episode_steps": 10})
LITTLE = {
    "name": "cpql",
    "actor": {"kind": "consistency", "hidden": [16]},
    "critic_hidden": [16],
    "batch_size": 8,
}
# Any two of a row of metrics, an evaluation and a checkpoint are due at once at some update, and each alone.
BUDGET = BudgetConfig("test", 16, 2, 5, 3, 2, 2, keep=2)
LONGER = replace(BUDGET, updates=400, log_every=20, evaluate_every=100, save_every=100)
DELAYS = (0.0, 0.05, 0.1, 0.5)
PATIENCE = 60.0  # seconds after which a process counts as hanging


@dataclass(frozen=True)
class Kind:
    """A kind of training: how it differs from the plainest one, and whether it must end bit-identical."""

    seeds: tuple[int, ...] = (0,)
    changes: dict[str, Any] = field(default_factory=dict)
    from_base: bool = False
    exact: bool = True


ACTING = OnlineConfig(start_steps=10)
KINDS = {
    "single": Kind(),
    "group": Kind((0, 1)),
    "single, keep=1": Kind(changes={"budget": replace(BUDGET, keep=1)}),
    "group, keep=1": Kind((0, 1), {"budget": replace(BUDGET, keep=1)}),
    "from a checkpoint": Kind(from_base=True),
    "online": Kind(changes={"online": ACTING}, exact=False),
    "finetune": Kind(changes={"online": replace(ACTING, offline_fraction=0.5)}, from_base=True, exact=False),
}


class Place:
    """A folder with what all trials share: a dataset, and a finished run that others start from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.base = folder, folder / "data.npz", folder / "base"
        generator = np.random.default_rng(0)
        np.savez(
            self.data,
            observations=generator.normal(size=(200, 3)),
            actions=generator.uniform(-2, 2, (200, 1)),
            rewards=generator.normal(size=200),
            terminals=np.zeros(200, bool),
            timeouts=np.arange(1, 201) % 20 == 0,
        )

    def start(self, kind: Kind, folder: Path, resume: bool = False) -> str:
        """Train one kind in a folder; what it says meanwhile."""
        members, output = [], StringIO()
        for seed in kind.seeds:
            config = TrainConfig(
                env=PENDULUM,
                agent=LITTLE,
                dataset=DatasetConfig(path=str(self.data)),
                budget=BUDGET,
                seed=seed,
                run_dir=str(folder / f"seed{seed}"),
                compile=False,
                resume=resume,
                checkpoint=str(self.base / "seed0") if kind.from_base else None,
            )
            config = replace(config, **kind.changes)
            if config.online and not config.online.offline_fraction:
                config = replace(config, dataset=DatasetConfig())
            members.append(config)
        train_group(members, Console(file=output))
        return output.getvalue()

    def go_on(self, kind: Kind, folder: Path) -> None:
        """What a user does after a crash: resume, and start anew where that says that there is no run."""
        try:
            self.start(kind, folder, resume=True)
        except CheckpointError as error:
            if "holds no run" not in str(error):
                raise
            self.start(kind, folder)


# A process that dies where it is told to


class Watch:
    """An audit hook that counts the operations on a folder, and kills the process before one of them.

    It also notes what a checkpoint consists of that isn't on the disk yet when `last` comes to name it.

    Args:
        folder: that counts, with all that is in it.
        at: the operation that isn't done any more; None lets all pass.
        cut: fraction of the last file's new bytes that had been written by then; None leaves it whole.
    """

    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")

    def __init__(self, folder: Path, at: int | None = None, cut: float | None = None) -> None:
        self.folder, self.at, self.cut = str(folder), at, cut
        self.operations: list[str] = []
        self.written: tuple[str, int] | None = None  # the last file, and how long it was before
        self.flushed: set[int] = set()  # inodes
        self.unflushed: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Take an event of the interpreter's."""
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR):
                self.write(os.fsdecode(path), append=not flags & os.O_TRUNC)
        elif event in self.CHANGES:
            # Of a path that is relative to a descriptor, as in shutil.rmtree, no more is known here.
            paths = [os.fsdecode(arg) for arg in args if isinstance(arg, str | bytes)]
            if any(isinstance(arg, int) and arg >= 0 for arg in args) or any(map(self.inside, paths)):
                self.count(f"{event} {paths[-1]}")
                if event == "os.rename":
                    if paths[-1].endswith("/last"):
                        self.look_for_unflushed(Path(paths[-1]).parent, os.readlink(paths[0]))
                    self.flushed.discard(os.stat(os.path.dirname(paths[-1])).st_ino)

    def flush(self, descriptor: int) -> None:
        """Note that a file or a folder is on the disk."""
        self.flushed.add(os.fstat(descriptor).st_ino)

    def look_for_unflushed(self, checkpoints: Path, name: str) -> None:
        """Note what would not survive a power cut of a checkpoint that `last` is about to name."""
        folder = checkpoints / name
        parts = [checkpoints, folder, *folder.rglob("*")]
        self.unflushed += [str(path) for path in parts if path.stat().st_ino not in self.flushed]

    def inside(self, path: str) -> bool:
        """Whether a path is the folder's."""
        return path.startswith(self.folder)

    def write(self, path: str, append: bool = False) -> None:
        """Count that a file is about to be written."""
        if self.inside(path):
            self.count(f"write {path}")
            with suppress(FileNotFoundError):
                self.flushed.discard(os.stat(path).st_ino)
            self.written = path, os.stat(path).st_size if append and os.path.exists(path) else 0

    def count(self, operation: str) -> None:
        """Count an operation, or die before it."""
        if len(self.operations) == self.at:
            self.at = None
            if self.cut is not None and self.written is not None and os.path.isfile(self.written[0]):
                path, before = self.written
                os.truncate(path, before + int(self.cut * max(0, os.stat(path).st_size - before)))
            os.kill(os.getpid(), signal.SIGKILL)
        self.operations.append(operation)
        self.written = None


@dataclass(frozen=True)
class Outcome:
    """What became of a process: killed, or else what it did and how it failed, if it did."""

    killed: bool = False
    operations: list[str] = field(default_factory=list)
    unflushed: list[str] = field(default_factory=list)
    error: str = ""
    traceback: str = ""


class Child:
    """A fork that does some work under a watch and reports."""

    def __init__(self, work: Callable[[], object], watch: Watch) -> None:
        self.pipe, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            report: dict[str, Any] = {}
            try:
                _watch_what_is_not_audited(watch)
                sys.addaudithook(watch)
                work()
            except CpqlError as error:
                report = {"error": str(error)}
            except BaseException as error:
                report = {"error": repr(error), "traceback": traceback.format_exc()}
            try:
                with os.fdopen(into, "w") as out:
                    json.dump({**report, "operations": watch.operations, "unflushed": watch.unflushed}, out)
            finally:
                os._exit(0)
        os.close(into)

    def wait(self) -> Outcome:
        """Its end, which is forced if it doesn't come."""
        parts: list[bytes] = []
        while select.select([self.pipe], [], [], PATIENCE)[0]:
            parts.append(os.read(self.pipe, 1 << 16))
            if not parts[-1]:
                break
        else:
            os.kill(self.pid, signal.SIGKILL)
            parts = [json.dumps({"error": f"hangs for {PATIENCE:.0f} s", "traceback": "hangs"}).encode()]
        os.close(self.pipe)
        os.waitpid(self.pid, 0)
        report = b"".join(parts)
        if not report:
            return Outcome(killed=True)
        return Outcome(**json.loads(report))


def _watch_what_is_not_audited(watch: Watch) -> None:
    """Show a watch the files that safetensors' Rust writes, and what is flushed."""
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        watch.flush(descriptor)

    patch("os.fsync", flush).start()

    def serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        watch.write(os.fspath(filename))
        safetensors.serialize_file(tensors, filename, metadata=metadata)

    patch("safetensors.torch.serialize_file", serialize_file).start()


@contextmanager
def drawn_quickly() -> Iterator[None]:
    """Save figures as the numbers that they show: drawing takes nine tenths of a small training."""

    def savefig(self: Figure, target: Any, **_: Any) -> None:
        lines = [line.get_xydata().tolist() for axes in self.axes for line in axes.get_lines()]  # type: ignore[union-attr]
        text = repr((lines, [axes.get_title() for axes in self.axes])).encode()
        with open(target, "wb") as file:
            file.write(text)

    with patch.object(Figure, "savefig", savefig):
        yield


# What is left


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a folder by name: files' bytes, links' targets, folders; of times only their steps."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.fsencode(os.readlink(path))
        elif path.is_dir():
            found[name] = b"folder"
        elif path.name == "timing.csv":
            found[name] = ",".join(column(path, "step")).encode()
        elif path.name == "config.yaml":  # names the run's folder
            lines = path.read_bytes().splitlines()
            found[name] = b"\n".join(line for line in lines if not line.startswith(b"run_dir:"))
        else:
            found[name] = path.read_bytes()
    return found


def column(path: Path, name: str) -> list[str]:
    """One column of a CSV file."""
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def faults(folder: Path, whole: Path, exact: bool = True) -> dict[str, list[str]]:
    """What is wrong with a run that was killed and continued, by the kind of fault.

    Args:
        folder: the run's, or several runs'.
        whole: the same of an uninterrupted one.
        exact: whether every bit must be the same.
    """
    found, expected = contents(folder), contents(whole)
    both = sorted(found.keys() & expected.keys())
    stale = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    different = [name for name in both if found[name] != expected[name]]
    links = [name for name in different if name.endswith("/last") or name.endswith("timing.csv")]
    stale += [f"{name}: {found[name].decode()}, not {expected[name].decode()}" for name in links]
    for result in sorted(folder.rglob("result.json")):
        stale += whole_and_consistent(result.parent, whole / result.parent.relative_to(folder))
    return {
        "stale": stale,
        "left over": sorted(found.keys() - expected.keys()),
        "not identical": [name for name in different if name not in links] if exact else [],
    }


def whole_and_consistent(run: Path, whole: Path) -> list[str]:
    """Where the parts of one finished run contradict each other: what holds whatever its metrics are."""
    wrong = []
    if column(run / "metrics.csv", "step") != column(whole / "metrics.csv", "step"):
        wrong.append(f"{run / 'metrics.csv'}: other steps")
    evaluations = [json.loads(path.read_text()) for path in sorted(run.glob("evaluations/*.json"))]
    result = json.loads((run / "result.json").read_text())
    if any(result[key] != value for key, value in evaluations[-1].items()):
        wrong.append(f"{run / 'result.json'}: not the last evaluation's")
    if not all(math.isfinite(value) for evaluation in evaluations for value in evaluation["returns"]):
        wrong.append(f"{run / 'evaluations'}: not finite")
    checkpoints, step = find_training(run)
    tensors, state = load_training(checkpoints, step)
    numbers = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    if not (step == state["step"] == result["step"] and all(bool(t.isfinite().all()) for t in numbers)):
        wrong.append(f"{checkpoints}: of step {step}, its state of {state['step']}")
    Policy.load(run)
    return wrong


# Trials


@dataclass
class Tally:
    """What came of the trials of one kind."""

    trials: int = 0
    killed: int = 0
    lost: int = 0
    stale: int = 0
    left_over: int = 0
    not_identical: int = 0
    unflushed: int = 0
    details: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.lost or self.stale or self.left_over or self.not_identical or self.unflushed)

    def note(self, what: str, error: str, found: dict[str, list[str]]) -> None:
        """Count one trial: how it failed, or else its faults."""
        self.trials += 1
        self.lost += bool(error)
        self.stale += bool(found.get("stale"))
        self.left_over += bool(found.get("left over"))
        self.not_identical += bool(found.get("not identical"))
        wrong = error or "; ".join(f"{k}: {', '.join(names)}" for k, names in found.items() if names)
        if wrong:
            self.details.append(f"{what}: {wrong}")


def kill(place: Place, name: str, trials: int, seed: int) -> Tally:
    """Kill one kind of training at operations spread over all that it does; 0 trials: at each of them."""
    kind, tally, chance = KINDS[name], Tally(), random.Random(f"{seed} {name}")
    if kind.from_base and not place.base.exists():
        place.start(KINDS["single"], place.base)
    whole = place.folder / f"{name} whole"
    reference = Child(lambda: place.start(kind, whole), Watch(whole)).wait()
    if reference.error:
        raise RuntimeError(f"{name}: the undisturbed run failed: {reference.traceback or reference.error}")
    tally.unflushed = len(reference.unflushed)
    total = len(reference.operations)
    points = trials or total
    for trial in range(points):
        at = int((trial + chance.random()) * total / points) if trials else trial
        cut = chance.choice([None, 0.0, 0.5, 0.99])
        again = chance.randrange(total) if chance.random() < 1 / 3 else None
        folder = place.folder / "trial"
        outcomes = [Child(lambda: place.start(kind, folder), Watch(folder, at, cut)).wait()]  # noqa: B023
        if again is not None:
            outcomes.append(Child(lambda: place.go_on(kind, folder), Watch(folder, again)).wait())  # noqa: B023
        outcomes.append(Child(lambda: place.go_on(kind, folder), Watch(folder)).wait())  # noqa: B023
        tally.killed += sum(outcome.killed for outcome in outcomes)
        failed = next((outcome for outcome in outcomes if outcome.error), Outcome())
        error = last_line(failed.traceback) or failed.error
        what = f"{name}, before {at} of {total} ({reference.operations[at].replace(str(whole), '')})"
        what += "" if cut is None else f", {cut:.0%} of the last file"
        what += "" if again is None else f", again before {again}"
        tally.note(what, error, {} if error else faults(folder, whole, kind.exact))
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def refusal(outcome: Outcome, holder: int) -> str:
    """What is wrong with the line that a second process ends with; nothing if it names the first one."""
    if outcome.traceback:
        return last_line(outcome.traceback)
    named = (
        "process" in outcome.error and str(holder) in outcome.error and os.uname().nodename in outcome.error
    )
    if named and "\n" not in outcome.error:
        return ""
    return outcome.error or "both ran to the end"


def twice(place: Place, trials: int) -> Tally:
    """Start the same training twice, shortly after one another, or resume it while it is still going."""
    kind, tally = Kind(changes={"budget": LONGER}), Tally()
    whole, folder = place.folder / "twice whole", place.folder / "twice"
    reference = Child(lambda: place.start(kind, whole), Watch(whole)).wait()
    if reference.error:
        raise RuntimeError(f"the undisturbed run failed: {reference.traceback or reference.error}")
    for trial in range(trials):
        resume = trial % 2 == 1
        first = Child(lambda: place.start(kind, folder), Watch(folder))
        if resume:
            while not (folder / "seed0" / "metrics.csv").exists():
                time.sleep(0.01)
            second = Child(lambda: place.start(kind, folder, resume=True), Watch(folder))
        else:
            time.sleep(DELAYS[trial // 2 % len(DELAYS)])
            second = Child(lambda: place.start(kind, folder), Watch(folder))
        one, other = first.wait(), second.wait()
        error = refusal(one, second.pid) if one.error else refusal(other, first.pid)
        what = "resumed while still going" if resume else f"twice, {DELAYS[trial // 2 % len(DELAYS)]} s apart"
        tally.note(what, error, {} if error else faults(folder, whole))
        shutil.rmtree(folder)
    return tally


# The real command


class Command:
    """`scripts/train.py` in a folder of its own, compiled or not, always with the same words."""

    def __init__(self, place: Place, name: str, compile: bool) -> None:
        self.folder = place.folder / name
        self.words = [
            "env=gymnasium",
            "env.id=Pendulum-v1",
            "+env.env_options.max_episode_steps=10",
            f"dataset.path={place.data}",
            "agent.actor.hidden=[16]",
            "agent.critic_hidden=[16]",
            "agent.batch_size=8",
            "budget.updates=2000",
            "budget.log_every=50",
            "budget.evaluate_every=500",
            "budget.save_every=80",
            "budget.episodes=2",
            "budget.final_episodes=2",
            f"compile={str(compile).lower()}",
            "run_dir=run",
        ]
        self.environment = {
            **os.environ,
            "CPQL_CACHE": str(place.folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start it, in a session of its own."""
        self.folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *self.words, *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_run(self, process: subprocess.Popen[str]) -> None:
        """Wait until there is something in the run's folder, or the process has ended."""
        while process.poll() is None and not list(self.folder.glob("run/*")):
            time.sleep(0.005)

    def go_on(self) -> str:
        """Run to the end as a user would after a crash; what went wrong."""
        process = self.start("resume=true")
        output = process.communicate()[1]
        if process.returncode and "holds no run" in output:
            process = self.start()
            output = process.communicate()[1]
        return last_line(output) if process.returncode else ""


def last_line(text: str) -> str:
    """What a traceback comes to."""
    return text.strip().rpartition("\n")[2]


def undisturbed(command: Command) -> float:
    """Run a command to its end; the seconds that it takes from the first file on."""
    process = command.start()
    command.wait_for_run(process)
    began = time.monotonic()
    output = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"the undisturbed command failed: {output}")
    return time.monotonic() - began


def kill_command(place: Place, trials: int, seed: int) -> Tally:
    """Kill the command, compiled, at random times after its first file, a third of the trials twice."""
    tally, chance = Tally(), random.Random(seed)
    whole = Command(place, "command whole", True)
    undisturbed(whole)  # this one compiles
    shutil.rmtree(whole.folder)
    seconds = undisturbed(whole)
    for _ in range(trials):
        command, what = Command(place, "command", True), "killed"
        for words in ((), ("resume=true",))[: 2 if chance.random() < 1 / 3 else 1]:
            process, after = command.start(*words), chance.uniform(0.0, seconds)
            command.wait_for_run(process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(after)
            tally.killed += process.poll() is None
            what += f" after {after:.2f} of {seconds:.2f} s"
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        error = command.go_on()
        tally.note(what, error, {} if error else faults(command.folder, whole.folder))
        shutil.rmtree(command.folder)
    return tally


def command_twice(place: Place, trials: int) -> Tally:
    """Start the command twice: one runs to its end, the other is refused in a line, and exits with 1."""
    tally, whole = Tally(), Command(place, "commands whole", False)
    undisturbed(whole)
    for trial in range(trials):
        command, delay = Command(place, "commands", False), DELAYS[trial % len(DELAYS)]
        first = command.start()
        time.sleep(delay)
        pair = [first, command.start()]
        outputs = [process.communicate()[1].strip() for process in pair]
        codes = [process.returncode for process in pair]
        error = f"exit codes {codes}: {' | '.join(map(last_line, outputs))}"
        if sorted(codes) == [0, 1]:
            loser = codes.index(1)
            error = refusal(Outcome(error=outputs[loser]), pair[1 - loser].pid)
        tally.note(f"twice, {delay} s apart", error, {} if error else faults(command.folder, whole.folder))
        shutil.rmtree(command.folder)
    return tally


@contextmanager
def prepared() -> Iterator[Place]:
    """A place, and a process that has everything loaded that a training needs."""
    torch.set_num_threads(1)
    with drawn_quickly(), tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder).resolve())
        for name, kind in KINDS.items():
            if not kind.from_base:
                place.start(kind, place.folder / "warm" / name)
        yield place


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=42, help="of all kinds together (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="instead: each operation of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    parser.add_argument("--twice", type=int, default=2, help="trials of two at once (default: %(default)s)")
    parser.add_argument("--commands", type=int, default=0, help="kills of the real command, compiled")
    parser.add_argument("--commands-twice", type=int, default=0, help="the real command twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    found: dict[str, Tally] = {}
    with prepared() as place:

        def done(name: str, tally: Tally) -> None:
            found[name] = tally
            print(
                f"{name}: {tally.trials} trials, {tally.killed} kills, {tally.lost} lost, {tally.stale} "
                f"stale, {tally.left_over} with files left over, {tally.not_identical} not identical, "
                f"{tally.unflushed} files named before they were on the disk",
                *tally.details,
                sep="\n  ",
                flush=True,
            )

        for number, name in enumerate(options.kinds):
            count = (options.trials + number) // len(options.kinds)
            if count or options.all:
                done(name, kill(place, name, 0 if options.all else count, options.seed))
        if options.twice:
            done("started twice", twice(place, options.twice))
        if options.commands:
            done("command", kill_command(place, options.commands, options.seed))
        if options.commands_twice:
            done("command twice", command_twice(place, options.commands_twice))
    if options.out:
        options.out.write_text(
            json.dumps({name: vars(tally) for name, tally in found.items()}, indent=2) + "\n"
        )
    sys.exit(not all(tally.clean for tally in found.values()))


if __name__ == "__main__":
    main()
