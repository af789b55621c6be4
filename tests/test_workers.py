"""Worker processes, real ones: they do what they are asked, say what went wrong, end with the program."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from cpql.data.behaviour import rollout
from cpql.data.workers import in_workers
from cpql.errors import ActingError, ConfigError, CpqlError, DataError
from cpql.tasks import Task

SECONDS = 2.0  # that a program may take to end
PROC = Path("/proc")
processes = pytest.mark.skipif(not (PROC / "self" / "stat").exists(), reason="reads processes from /proc")

# Ten seconds of work and more, told of every half second.
LONG = """
import sys
from cpql.tasks import load_task
from cpql.data import embedded

def tell(label, done, total):
    print(done, flush=True)

if __name__ == "__main__":
    try:
        embedded.collect(load_task("hopper-random"), 320_000, 0, progress=tell, workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def stat(pid: int) -> tuple[str, int] | None:
    """A process's state and parent, or None where there is none."""
    try:
        state, parent = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state, int(parent)


def alive(pid: int) -> bool:
    """Whether it runs: nobody may be there to bury the orphans of a container."""
    found = stat(pid)
    return found is not None and found[0] not in "ZX"


def workers_of(pid: int) -> list[int]:
    """The workers that a process has; libraries start others as they are imported."""
    found = []
    for child in (int(path.name) for path in PROC.iterdir() if path.name.isdigit()):
        if (stat(child) or ("", 0))[1] == pid and alive(child):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if "cpql.data.workers" in (PROC / str(child) / "cmdline").read_text():
                    found.append(child)
    return found


@contextlib.contextmanager
def started(count: int, *words: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A program in a process group of its own, as a shell starts it, and its first workers."""
    pipe = subprocess.PIPE
    command = [sys.executable, *words]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        while len(workers := workers_of(process.pid)) < count:
            assert process.poll() is None
            time.sleep(0.01)
        yield process, workers


@pytest.mark.slow
@processes
@pytest.mark.parametrize(
    ("number", "group", "when"),
    [
        (signal.SIGKILL, False, "acting"),
        (signal.SIGTERM, False, "acting"),
        (signal.SIGINT, False, "acting"),
        (signal.SIGINT, True, "starting"),
        (signal.SIGINT, True, "acting"),
    ],
    ids=lambda value: {False: "program", True: "group"}[value] if isinstance(value, bool) else str(value),
)
def test_workers_end_with_the_program(number: signal.Signals, group: bool, when: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LONG)
    with started(2, str(program)) as (process, workers):
        if when == "acting":
            assert process.stdout is not None and process.stdout.readline()
        began = time.monotonic()
        (os.killpg if group else os.kill)(process.pid, number)
        _, printed = process.communicate(timeout=60)
        while any(map(alive, workers)) and time.monotonic() - began < 60:
            time.sleep(0.01)
        assert time.monotonic() - began < SECONDS
    assert printed == ""
    assert process.returncode == (130 if number == signal.SIGINT else -number)


@processes
def test_the_command_leaves_nothing_behind(tmp_path: Path) -> None:
    script, out = Path(__file__).parents[1] / "scripts" / "collect.py", tmp_path / "out" / "mine.hdf5"
    words = (str(script), "dataset", "hopper-random", "--size", "2000000", "--out", str(out))
    with started(1, *words) as (process, workers):
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)
        assert not any(map(alive, workers))
    assert (process.returncode, *printed) == (130, "", "interrupted\n")
    assert not out.parent.exists()


@pytest.mark.parametrize("way", ["file", "standard input"])
def test_a_program_needs_no_guard(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPQL_CACHE", str(tmp_path / "cache"))
    text = """
import cpql.data
from cpql.tasks import load_task

print("begin")
print(len(cpql.data.load(load_task("hopper-medium"), source="embedded", size=50)[1]))
"""
    program = tmp_path / "program.py"
    program.write_text(text)
    command = [sys.executable, str(program) if way == "file" else "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("begin\n50\n", "")


def test_answers_are_those_of_the_functions() -> None:
    task = Task("pendulum", "Pendulum-v1", env_options={"max_episode_steps": 7})
    seeds = [np.random.SeedSequence(3, spawn_key=(k,)) for k in range(3)]
    seen: list[int] = []
    found = in_workers(rollout, [(task, None, 9, s) for s in seeds], 2, lambda done: seen.append(len(done)))
    for arrays, seed in zip(found, seeds, strict=True):
        expected = rollout(task, None, 9, seed)
        assert arrays.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(arrays[key], value) and arrays[key].dtype == value.dtype
    assert seen == [1, 2, 3]


MINE = """
import gymnasium
import numpy as np

def add(task, behaviour, count, seed, more):
    return {"sum": np.array([count + more, seed.entropy])}

class Mine(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, error=None):
        self.error = error

    def reset(self, *, seed=None, options=None):
        print("this is no answer")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        if self.error:
            raise {"memory": MemoryError("4 GiB"), "value": ValueError("out of\\nbattery")}[self.error]
        return np.ones(2, np.float32), 1.0, False, False, {}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Maker of tasks in an environment that this program registers, of a module that it can import."""
    (tmp_path / "mine_of_the_tests.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    import mine_of_the_tests  # type: ignore[import-not-found]

    gymnasium.register("Mine-v0", mine_of_the_tests.Mine)
    yield lambda **options: Task("mine", "Mine-v0", env_options=options)
    del gymnasium.registry["Mine-v0"]
    del sys.modules["mine_of_the_tests"]


def test_environments_of_the_program_are_known_to_workers(mine: Any) -> None:
    (made,) = in_workers(rollout, [(mine(), None, 3, np.random.SeedSequence(0))], 1)
    assert made["rewards"].tolist() == [1, 1, 1]


def test_any_function_of_a_module_can_be_called(mine: Any) -> None:
    function = sys.modules["mine_of_the_tests"].add
    arguments = [(mine(), None, k, np.random.SeedSequence(7), 10) for k in range(3)]
    assert [made["sum"].tolist() for made in in_workers(function, arguments, None)] == [
        [10, 7],
        [11, 7],
        [12, 7],
    ]


def test_what_goes_wrong_is_said_in_one_line(mine: Any) -> None:
    def refused(kind: type[CpqlError], text: str, task: Task) -> None:
        with pytest.raises(kind) as caught:
            in_workers(rollout, [(task, None, 3, np.random.SeedSequence(0))], 1)
        assert str(caught.value) == text

    text = "environment 'Mine-v0' failed in step: out of battery"
    refused(ActingError, text, mine(error="value"))
    refused(DataError, "collecting mine: out of memory in a worker process", mine(error="memory"))
    discrete = Task("cart", "CartPole-v1")
    with pytest.raises(ConfigError, match="actions are Discrete"):
        in_workers(rollout, [(discrete, None, 3, np.random.SeedSequence(0))], 1)
    spec = gymnasium.registry["Mine-v0"]
    spec.kwargs = {"error": lambda: None}
    with pytest.raises(ConfigError, match=r"'Mine-v0' can't be made in worker processes .*plain kwargs"):
        in_workers(rollout, [(mine(), None, 3, np.random.SeedSequence(0))], 1)
    spec.entry_point, spec.kwargs = "__main__:Mine", {}
    refused(
        ConfigError,
        "environment 'Mine-v0' can't be made in worker processes (it is the program itself that defines "
        "it): expected a class in a module that they can import, and plain kwargs",
        mine(),
    )


@processes
def test_a_worker_that_was_killed_is_said_to_be() -> None:
    task = Task("pendulum", "Pendulum-v1")

    def kill(_: Any) -> None:
        for worker in workers_of(os.getpid()):
            os.kill(worker, signal.SIGKILL)

    expected = (
        "collecting pendulum: a worker process ended with exit code -9: "
        "the system killed it, perhaps as memory ran out"
    )
    with pytest.raises(DataError) as caught:
        in_workers(rollout, [(task, None, steps, np.random.SeedSequence(0)) for steps in (5, 10**7)], 1, kill)
    assert str(caught.value) == expected
    assert workers_of(os.getpid()) == []
