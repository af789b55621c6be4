"""Acting in fresh Python processes, one a core, that end with the process that started them.

A worker takes jobs on its standard input and answers on its standard output. A message is a line of JSON,
then arrays as safetensors: nothing is unpickled. It imports cpql and never the program that started it, which
therefore needs no `if __name__ == "__main__"` and may be a notebook, or come from standard input.

Workers are in a session of their own. A terminal's Ctrl-C therefore reaches the program alone, which ends
them; and however the program itself ends, their input ends with it, and so do they.

This module is imported by the workers: it loads neither torch nor anything that does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import IO, TYPE_CHECKING, Any

import safetensors.numpy
from numpy.typing import NDArray

from cpql import errors
from cpql.errors import ActingError, ConfigError, CpqlError, DataError

if TYPE_CHECKING:
    import numpy as np

    from cpql.data.behaviour import Behaviour
    from cpql.tasks import Task

__all__ = ["in_workers", "serve"]

Arrays = dict[str, NDArray[Any]]
Worker = subprocess.Popen[bytes]

# The program's own path, so that its cpql is the one that is imported, and its environments are found.
START = "import json, sys; sys.path = json.loads(sys.argv[1]); import cpql.data.workers as w; w.serve()"
# Sums come in one order only where BLAS has one thread; it reads this once, when numpy is imported.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def in_workers(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    count: int | None,
    report: Callable[[Sequence[int]], None] | None = None,
) -> list[Any]:
    """Call a function in worker processes.

    Even a single job runs in one: there BLAS has one thread, and sums in one order.

    Args:
        function: `rollout` or `play` of `cpql.data.behaviour`.
        arguments: of each call.
        count: processes; None for one a core.
        report: called with the places of those that are done, whenever another is.

    Returns:
        What each call returned, in the order of `arguments`.

    Raises:
        ActingError: an environment failed.
        ConfigError: an environment can't be made in a worker.
        DataError: a worker died, or ran out of memory; or what a call itself raises.
    """
    count = min(count or _cores(), len(arguments))
    done: list[int] = []
    # The workers end before the threads that wait for them.
    with ThreadPoolExecutor(count) as threads, _started(count) as workers:
        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def call(each: tuple[Any, ...]) -> Any:
            worker = idle.get()
            try:
                return _ask(worker, function.__name__, *each)
            finally:
                idle.put(worker)

        futures: dict[Future[Any], int] = {threads.submit(call, each): k for k, each in enumerate(arguments)}
        running = set(futures)
        try:
            while running:
                # Not for ever: on Windows a wait without an end hears no Ctrl-C.
                ready, running = wait(running, 0.5, FIRST_COMPLETED)
                for future in ready:
                    future.result()
                    done.append(futures[future])
                    if report is not None:
                        report(done)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _cores() -> int:
    # What this process may use, which in a container is fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _started(count: int) -> Iterator[list[Worker]]:
    """Have workers, and leave none behind."""
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
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                # What was still to be written finds no reader.
                with contextlib.suppress(BrokenPipeError):
                    _there(pipe).close()


def _ask(
    worker: Worker,
    function: str,
    task: Task,
    behaviour: Behaviour | None,
    count: int,
    seed: np.random.SeedSequence,
    *more: Any,
) -> Any:
    """Have a worker call a function, and give what that returned or raise what it raised."""
    from cpql.data.behaviour import Episodes

    job = {
        "function": function,
        "environment": _registered(task.id),
        "task": dataclasses.asdict(task),
        "behaviour": behaviour is not None,
        "count": count,
        "seed": {"entropy": seed.entropy, "spawn_key": seed.spawn_key},
        "more": more,
    }
    try:
        _send(_there(worker.stdin), job, {} if behaviour is None else behaviour.to_tensors())
        answer, arrays = _receive(_there(worker.stdout))
    except (BrokenPipeError, EOFError):
        raise DataError(f"collecting {task.name}: a worker process {_end(worker.wait())}") from None
    if "error" in answer:
        kind, text = answer["error"], answer["text"]
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, CpqlError):
            raise known(text)
        cause = RuntimeError(f"in a worker process:\n{answer['traceback']}")
        if kind == "MemoryError":
            raise DataError(f"collecting {task.name}: out of memory in a worker process") from cause
        raise ActingError(f"environment '{task.id}' failed: {kind}: {text}") from cause
    return Episodes(**arrays) if function == "play" else arrays


def _registered(id: str | None) -> str | None:
    """What a worker needs to know of an environment: how the program registered it, as JSON."""
    import gymnasium

    from cpql.environments import CONTROL, ROBOTICS

    spec = gymnasium.registry.get(id or "")
    if spec is None or spec.id.startswith((*ROBOTICS, CONTROL)):
        return None  # `make_environment` knows by itself where they come from
    maker = spec.entry_point
    if callable(maker):
        maker = f"{maker.__module__}:{getattr(maker, '__qualname__', type(maker).__qualname__)}"
    if str(maker).startswith("__main__:"):
        raise ConfigError(
            f"environment '{id}' is made by {str(maker).removeprefix('__main__:')} of the program itself: "
            "expected it in a module, which worker processes can import"
        )
    try:
        return dataclasses.replace(spec, entry_point=maker, vector_entry_point=None).to_json()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"environment '{id}' can't be registered in worker processes ({error}): expected plain kwargs"
        ) from error


def _end(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    why = ", which the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{why}"


def serve() -> None:
    """Be a worker: answer jobs until there can be no more."""
    jobs: queue.SimpleQueue[tuple[dict[str, Any], Arrays]] = queue.SimpleQueue()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an environment prints is no answer

    def listen() -> None:
        """Receive jobs; at the end of the program, end at once, in the middle of whatever is done."""
        with contextlib.suppress(EOFError):
            while True:
                jobs.put(_receive(sys.stdin.buffer))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        job, tensors = jobs.get()
        answer: dict[str, Any] = {}
        arrays: Arrays = {}
        try:
            arrays = _work(job, tensors)
        except Exception as error:
            kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
            text = " ".join(str(error).split())
            answer = {"error": kind, "text": text, "traceback": traceback.format_exc()}
        try:
            _send(answers, answer, arrays)
        except BrokenPipeError:
            os._exit(0)


def _work(job: dict[str, Any], tensors: Arrays) -> Arrays:
    import gymnasium
    import numpy as np
    from gymnasium.envs.registration import EnvSpec

    from cpql.data import behaviour
    from cpql.tasks import Task

    if job["environment"] is not None:
        spec = EnvSpec.from_json(job["environment"])
        gymnasium.registry.setdefault(spec.id, spec)
    said = job["task"]
    task = Task(**said | {"observation": tuple(said["observation"])})
    policy = behaviour.Behaviour.from_tensors(tensors) if job["behaviour"] else None
    functions: dict[str, Callable[..., Any]] = {"rollout": behaviour.rollout, "play": behaviour.play}
    made = functions[job["function"]](
        task, policy, job["count"], np.random.SeedSequence(**job["seed"]), *job["more"]
    )
    return made if isinstance(made, dict) else vars(made)


def _send(stream: IO[bytes], said: dict[str, Any], arrays: Arrays) -> None:
    content = safetensors.numpy.save(arrays)
    stream.write(json.dumps(said | {"bytes": len(content)}).encode() + b"\n")
    stream.write(content)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], Arrays]:
    line = stream.readline()
    said = json.loads(line) if line.endswith(b"\n") else {"bytes": 1}
    content = stream.read(said["bytes"])
    if len(content) < said["bytes"]:
        raise EOFError
    return said, safetensors.numpy.load(content)


def _there(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
