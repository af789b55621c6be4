"""Calls in fresh Python processes, one per core, which end together with the program that started them.

A worker receives calls on its standard input and answers on its standard output. A message is a line of JSON
followed by arrays in safetensors' format, so nothing is unpickled. A worker imports cpql but not the program
that started it, which may be a notebook or standard input and needs no `if __name__ == "__main__"`.

Workers run in a session of their own, so Ctrl-C in a terminal reaches only the program, which then ends them.
If the program ends in any other way, the workers' input is closed and they exit at once.

Workers import this module, so it must load neither torch nor anything that does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, TYPE_CHECKING, Any

import safetensors.numpy
from numpy.typing import NDArray

from cpql import errors
from cpql.errors import ConfigError, CpqlError, DataError, brief

if TYPE_CHECKING:
    import numpy as np

    from cpql.data.behaviour import Behaviour
    from cpql.tasks import Task

__all__ = ["Arrays", "in_workers", "serve"]

Arrays = dict[str, NDArray[Any]]
Worker = subprocess.Popen[bytes]

# With the program's own path, so that workers find its cpql and its environments.
START = "import json, sys; sys.path = json.loads(sys.argv[1]); import cpql.data.workers as w; w.serve()"
# BLAS adds in a fixed order only with one thread, and reads these variables once, when numpy is imported.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def in_workers(
    function: Callable[..., Arrays],
    arguments: Sequence[tuple[Any, ...]],
    count: int | None,
    report: Callable[[Sequence[int]], None] | None = None,
) -> list[Arrays]:
    """Call a function in worker processes.

    A single call runs in a worker too, because there BLAS has one thread and adds in a fixed order.

    Args:
        function: of a module that workers can import, such as `cpql.data.behaviour.rollout`.
        arguments: of each call: a task, a behaviour or None, a count, a `numpy.random.SeedSequence`, and
            any further values that JSON can represent.
        count: the number of processes; None starts one per core.
        report: called after each call with the indices of all finished calls.

    Returns:
        The arrays that each call returned, in the order of `arguments`.

    Raises:
        ActingError: an environment failed.
        ConfigError: an environment can't be made in a worker.
        DataError: a worker died or ran out of memory; or whatever `CpqlError` a call itself raises.
    """
    # In a container a process may use fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(count or cores or 1, len(arguments))
    done: list[int] = []
    # Leaving the block ends the workers first, then joins the threads that wait for their answers.
    with ThreadPoolExecutor(count) as threads, _started(count) as workers:
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def call(each: tuple[Any, ...]) -> Arrays:
            worker = idle.get()
            try:
                return _call(worker, function, *each)
            finally:
                idle.put(worker)

        futures = {threads.submit(call, each): k for k, each in enumerate(arguments)}
        try:
            for future in as_completed(futures):
                future.result()
                done.append(futures[future])
                if report is not None:
                    report(done)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


@contextlib.contextmanager
def _started(count: int) -> Iterator[list[Worker]]:
    """Start workers and end them with the block."""
    workers: list[Worker] = []
    try:
        for _ in range(count):
            worker = subprocess.Popen(
                [sys.executable, "-P", "-c", START, json.dumps([str(path) for path in sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if sys.stderr is None else None,
                env=os.environ | ONE_THREAD,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
            workers.append(worker)
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            with contextlib.suppress(BrokenPipeError), worker:  # input that wasn't sent yet has no reader
                pass


def _call(
    worker: Worker,
    function: Callable[..., Arrays],
    task: Task,
    behaviour: Behaviour | None,
    count: int,
    seed: np.random.SeedSequence,
    *more: Any,
) -> Arrays:
    """Send one call to a worker; return its answer or raise its error."""
    assert worker.stdin is not None and worker.stdout is not None
    header = {
        "function": [function.__module__, function.__name__],
        "environment": _registration(task.id),
        "task": dataclasses.asdict(task),
        "behaviour": behaviour is not None,
        "count": count,
        "seed": {"entropy": seed.entropy, "spawn_key": seed.spawn_key},
        "more": more,
    }
    try:
        _send(worker.stdin, header, {} if behaviour is None else behaviour.to_tensors())
        answer, arrays = _receive(worker.stdout)
    except (BrokenPipeError, EOFError):
        raise DataError(f"collecting {task.name}: a worker process {_end(worker.wait())}") from None
    if "error" in answer:
        cause = RuntimeError(f"in a worker process:\n{answer['traceback']}")
        raise getattr(errors, answer["error"])(answer["text"]) from cause
    return arrays


def _registration(id: str | None) -> str | None:
    """How the program registered an environment, as JSON; None if workers can register it without that."""
    import gymnasium

    from cpql.environments import CONTROL, OGBENCH, ROBOTICS

    spec = gymnasium.registry.get(id or "")
    if spec is None or spec.id.startswith((*ROBOTICS, *OGBENCH, CONTROL)):
        return None
    maker = spec.entry_point
    if callable(maker):
        name = getattr(maker, "__qualname__", type(maker).__qualname__)
        maker = f"{maker.__module__}:{name}"
    try:
        if str(maker).startswith("__main__:"):
            raise ValueError(f"{maker} is the program itself")
        return dataclasses.replace(spec, entry_point=maker, vector_entry_point=None).to_json()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"environment '{id}' can't be made in worker processes ({error}): expected a class in a module "
            "that they can import, and plain kwargs"
        ) from error


def _end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    cause = ", which the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{cause}"


def serve() -> None:
    """Run a worker: answer calls until the input ends."""
    calls: queue.SimpleQueue[tuple[dict[str, Any], Arrays]] = queue.SimpleQueue()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what an environment prints doesn't mix with the answers

    def listen() -> None:
        """Receive calls; at the end of the input, exit at once, even in the middle of a call."""
        with contextlib.suppress(EOFError):
            while True:
                calls.put(_receive(sys.stdin.buffer))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        header, tensors = calls.get()
        answer: dict[str, Any] = {}
        arrays: Arrays = {}
        try:
            arrays = _run(header, tensors)
        except Exception as error:
            kind, text = "ActingError", f"environment '{header['task']['id']}' failed: {brief(error)}"
            if isinstance(error, CpqlError):
                kind, text = type(error).__name__, str(error)
            elif isinstance(error, MemoryError):
                kind, text = (
                    "DataError",
                    f"collecting {header['task']['name']}: out of memory in a worker process",
                )
            answer = {"error": kind, "text": text, "traceback": traceback.format_exc()}
        try:
            _send(answers, answer, arrays)
        except BrokenPipeError:
            os._exit(0)


def _run(header: dict[str, Any], tensors: Arrays) -> Arrays:
    """Make the call that `_call` describes."""
    import gymnasium
    import numpy as np
    from gymnasium.envs.registration import EnvSpec

    from cpql.data.behaviour import Behaviour
    from cpql.tasks import Task

    if header["environment"] is not None:
        spec = EnvSpec.from_json(header["environment"])
        gymnasium.registry.setdefault(spec.id, spec)
    module, name = header["function"]
    function: Callable[..., Arrays] = getattr(importlib.import_module(module), name)
    task = Task(**header["task"] | {"observation": tuple(header["task"]["observation"])})
    behaviour = Behaviour.from_tensors(tensors) if header["behaviour"] else None
    seed = np.random.SeedSequence(**header["seed"])
    return function(task, behaviour, header["count"], seed, *header["more"])


def _send(stream: IO[bytes], header: dict[str, Any], arrays: Arrays) -> None:
    content = safetensors.numpy.save(arrays)
    stream.write(json.dumps(header | {"bytes": len(content)}).encode() + b"\n")
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], Arrays]:
    line = stream.readline()
    header = json.loads(line) if line.endswith(b"\n") else {"bytes": 1}
    content = stream.read(header["bytes"])
    if len(content) < header["bytes"]:
        raise EOFError
    return header, safetensors.numpy.load(content)
