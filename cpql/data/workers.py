"""Calls in fresh Python processes, one per core, which end together with the program that started them.

A worker gets its calls on its standard input and answers each on its standard output; the two pickle for each
other alone. It imports cpql but not the program that started it, which may be a notebook or standard input
and needs no `if __name__ == "__main__"`: the pools of `concurrent.futures` import the program, and loky's
workers outlive one that is killed.

Workers run in a session of their own, so Ctrl-C in a terminal reaches only the program, which then ends them.
If the program ends in any other way, the workers' input is closed and they exit at once.

Workers import this module, so it must load neither torch nor anything that does.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from cpql.errors import ActingError, ConfigError, CpqlError, DataError, brief

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
        arguments: of each call: a task, the same in all of them, and anything else that can be pickled.
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
    task = arguments[0][0]
    shares = [range(first, len(arguments), count) for first in range(count)]
    start = pickle.dumps(_registration(task.id))
    messages = [start + pickle.dumps((function, [arguments[k] for k in share])) for share in shares]
    answers: queue.SimpleQueue[tuple[int, Arrays | CpqlError]] = queue.SimpleQueue()

    def talk(worker: Worker, share: range, message: bytes) -> None:
        """Send a worker its calls, and pass on its answers."""
        assert worker.stdin is not None and worker.stdout is not None
        k = share.start
        try:
            worker.stdin.write(message)
            worker.stdin.flush()
            for k in share:
                answers.put((k, pickle.load(worker.stdout)))
        except (OSError, EOFError, pickle.UnpicklingError):
            code = worker.wait()
            why = ": the system killed it, perhaps as memory ran out" if code == -9 else ""
            error = f"collecting {task.name}: a worker process ended with exit code {code}{why}"
            answers.put((k, DataError(error)))

    done: dict[int, Arrays] = {}
    # Leaving the block ends the workers first, then joins the threads that wait for their answers.
    with ThreadPoolExecutor(count) as threads, _started(count) as workers:
        for each in zip(workers, shares, messages, strict=True):
            threads.submit(talk, *each)
        while len(done) < len(arguments):
            k, answer = answers.get()
            if isinstance(answer, CpqlError):
                raise answer
            done[k] = answer
            if report is not None:
                report(list(done))
    return [done[k] for k in range(len(arguments))]


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


def _registration(id: str | None) -> Any:
    """How the program registered an environment; None if workers can register it without that."""
    import gymnasium

    from cpql.environments import CONTROL, OGBENCH, ROBOTICS

    spec = gymnasium.registry.get(id or "")
    if spec is None or spec.id.startswith((*ROBOTICS, *OGBENCH, CONTROL)):
        return None
    try:
        if b"__main__" in pickle.dumps(spec):
            raise ValueError("it is the program itself that defines it")
    except Exception as error:  # pickling runs methods of whatever is in the kwargs
        raise ConfigError(
            f"environment '{id}' can't be made in worker processes ({error}): expected a class in a module "
            "that they can import, and plain kwargs"
        ) from error
    return spec


def serve() -> None:
    """Run a worker: answer its calls, until its input ends."""
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what an environment prints doesn't mix with the answers
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):  # the program has ended
        spec = pickle.load(calls)
        if spec is not None:
            import gymnasium

            gymnasium.registry.setdefault(spec.id, spec)
        function, arguments = pickle.load(calls)

        def watch() -> None:
            """Exit when the input ends, even in the middle of a call."""
            os.read(calls.fileno(), 1)
            os._exit(0)

        threading.Thread(target=watch, daemon=True).start()
        for each in arguments:
            answers.write(pickle.dumps(_answer(function, each)))
            answers.flush()


def _answer(function: Callable[..., Arrays], arguments: tuple[Any, ...]) -> Arrays | CpqlError:
    """What a call returns, or its error with the traceback as a note."""
    try:
        return function(*arguments)
    except Exception as error:
        found: CpqlError = ActingError(f"environment '{arguments[0].id}' failed: {brief(error)}")
        if isinstance(error, CpqlError):
            found = error
        elif isinstance(error, MemoryError):
            found = DataError(f"collecting {arguments[0].name}: out of memory in a worker process")
        found.add_note(f"in a worker process:\n{traceback.format_exc()}")
        return found
