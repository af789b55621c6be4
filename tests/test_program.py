"""The update recorded as a graph: with a stand-in for CUDA's here, and with CUDA where there is one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpql.agents import CPQL, CPQLConfig
from cpql.data.transitions import Transitions
from cpql.errors import ConfigError
from cpql.training.program import CudaGraph, program, record, zeros
from cpql.training.program import _reason as program_reason

SMALL = CPQLConfig(critic_hidden=(16, 16), batch_size=8)


class Stream:
    """A stand-in for CUDA's."""

    def wait_stream(self, other: Any) -> None:
        """There is nothing to wait for."""


@contextlib.contextmanager
def within(_: Any) -> Iterator[None]:
    """A stand-in for being within a stream or a recording."""
    yield


def data() -> Transitions:
    random = torch.Generator().manual_seed(0)
    return Transitions.from_dict(
        {
            "observations": torch.randn(60, 4, generator=random),
            "next_observations": torch.randn(60, 4, generator=random),
            "actions": torch.rand(60, 2, generator=random) * 2 - 1,
            "rewards": torch.randn(60, generator=random),
            "terminals": torch.zeros(60),
        }
    )


def phase_0(update: Any, batch: Any, noise: Any) -> Any:
    return update(batch, noise, 0)


def assert_equal_training(device: str, one: Any, other: Any, agents: tuple[CPQL, CPQL], near: float) -> None:
    rows, generator = data().to(torch.device(device)), torch.Generator(device).manual_seed(0)
    for step in range(6):
        batch, noise = rows.sample(8, generator), agents[0].draw(generator)
        expected, found = one(batch, noise), other(batch, noise)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=near, atol=near, msg=f"{name} at {step}")
    for name, tensor in agents[0].state.items():
        torch.testing.assert_close(agents[1].state[name], tensor, rtol=near, atol=near, msg=name)


def test_recording_leaves_no_trace_and_every_call_has_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in runs what was recorded once more, on the tensors it was recorded on: what a graph does."""
    eager, recorded = (CPQL(4, 2, SMALL, seed=0) for _ in range(2))
    calls = []

    def update(batch: Any, noise: Any, phase: int) -> dict[str, Tensor]:
        calls.append([tensor.data_ptr() for tensor in (*batch[:-1], *noise.values())])
        return recorded.update(batch, noise, phase)

    class Graph:
        def replay(self) -> None:
            for name, value in update(replay.batch, replay.noise, 0).items():
                replay.metrics[name].copy_(value)

    for name, stand_in in {
        "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "graph": within, "stream": within
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replay = CudaGraph(recorded, update, 0, *zeros(recorded))
    assert_equal_training("cpu", eager.update, replay, (eager, recorded), near=0.0)
    assert len(calls) == CudaGraph.WARM_UP + 1 + 6
    assert all(call == calls[0] for call in calls), "a graph knows only the tensors it was recorded on"


COMPILE = """
import sys
from pathlib import Path
from cpql.agents import CPQL, CPQLConfig
from cpql.actors.consistency import ActorConfig
from cpql.errors import ConfigError
from cpql.training.program import program
agent = CPQL(4, 2, CPQLConfig(actor=ActorConfig(hidden=(8,)), critic_hidden=(8,), batch_size=8))
print(program(agent, "auto", Path(sys.argv[1]), print).how)
try:
    program(agent, True, Path(sys.argv[1]), print)
except ConfigError as error:
    print("refused:", error)
print(int(agent.state["step"]), "updates")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="its compiler isn't found by PATH")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (
            None,
            "there is no C++ compiler. Install one (apt install g++, conda install gxx), or name it by CXX",
        ),
        ("#!/bin/sh\necho 'fatal error: no headers' >&2; exit 1", "the C++ compiler fails (fatal error: no"),
    ],
)
def test_without_a_compiler_training_goes_on_and_says_why(
    compiler: str | None, reason: str, tmp_path: Path
) -> None:
    """One that isn't there, and one that answers to its name alone."""
    path = tmp_path / "bin"
    path.mkdir()
    if compiler is not None:
        text = compiler.replace("\n", '\ncase "$*" in *--version*) echo "g++ 12.2.0"; exit 0;; esac\n', 1)
        (path / "g++").write_text(text)
        (path / "g++").chmod(0o755)
        for name in ("sh", "echo"):
            (path / name).symlink_to(f"/bin/{name}")
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "TORCHINDUCTOR_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path / "cache")],
        env={**environment, "PATH": str(path)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warning, how, refused, updates = done.stdout.splitlines()
    assert warning.startswith(f"warning: not compiled, so updates take about twice as long: {reason}")
    assert how.startswith(f"uncompiled: {reason}")
    assert refused.startswith(f"refused: compile=true: {reason}") and "or compile=auto" in refused
    assert updates == "0 updates"


@pytest.mark.parametrize(
    ("kind", "text", "cache", "reason"),
    [
        ("CppCompileError", "C++ compile error", "/a b", "as /a b has a space. Set CPQL_CACHE to a"),
        (
            "CppCompileError",
            "C++ compile error\n\nOutput:\nno disk",
            "/a",
            "fails (no disk). Install another",
        ),
        ("TritonMissing", "Cannot find a working triton", "/a", "no working Triton (TritonMissing: Cannot"),
        ("RuntimeError", "not on this system\nmore", "/a", "fails (RuntimeError: not on this system). Use"),
    ],
)
def test_the_reason_says_what_helps(
    kind: str, text: str, cache: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the compiler has it: its own error is inside another one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    outer = RuntimeError("backend failed")
    outer.inner_exception = type(kind, (Exception,), {})(text)  # type: ignore[attr-defined]
    assert reason in program_reason(outer) and "\n" not in program_reason(outer)


def test_compiling_leaves_no_trace_and_there_is_no_graph_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda update, fullgraph: update)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    fresh, agent = (CPQL(4, 2, SMALL, seed=[0, 1]) for _ in range(2))
    made = program(agent, True, tmp_path / "cache", print)
    assert made.compiled and made.how == "compiled" and not isinstance(made.update, CudaGraph)
    for name, tensor in fresh.state.items():
        torch.testing.assert_close(agent.state[name], tensor, rtol=0, atol=0)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert program(agent, False, tmp_path, print).how == "uncompiled"


@pytest.mark.skipif(os.name != "posix", reason="needs a file's mode")
def test_what_others_can_write_to_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    text = rf"others can write to {tmp_path}, and what is compiled is code. Make it your own, of mode 700"
    with pytest.raises(ConfigError, match=rf"compile=true: {text}"):
        program(CPQL(4, 2, SMALL), True, tmp_path, print)
    assert program(CPQL(4, 2, SMALL), "auto", tmp_path, print).how.startswith(f"uncompiled: {text}")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(
        ConfigError, match=r"compile=true: nothing can be kept in .*file \(File exists\). Set"
    ):
        program(CPQL(4, 2, SMALL), True, tmp_path, print)


def test_where_a_graph_cannot_be_recorded_the_compiled_update_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in fails in the middle of the recording, as a driver too old for it would."""

    def fails() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore\nlines")

    for name, stand_in in {
        "CUDAGraph": fails, "Stream": Stream, "current_stream": Stream, "stream": within
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    fresh, agent = (CPQL(4, 2, SMALL, seed=0) for _ in range(2))
    warnings: list[str] = []
    made = record(agent, agent.update, *zeros(agent), warnings.append)
    assert made.how == "compiled, no CUDA graph: RuntimeError: CUDA error: operation not permitted when " \
        "stream is capturing"  # fmt: skip
    assert made.compiled and len(warnings) == 1 and warnings[0].startswith("warning: no CUDA graph")
    assert_equal_training(
        "cpu", fresh.update, lambda batch, noise: made.update(batch, noise, 0), (fresh, agent), near=0.0
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_update_is_the_eager_one(tmp_path: Path) -> None:
    eager, recorded = (CPQL(4, 2, SMALL, seed=0, device="cuda") for _ in range(2))
    made = program(recorded, True, tmp_path, print)
    replay = made.update
    assert made.how == "compiled, CUDA graph"
    assert_equal_training(
        "cuda", eager.update, lambda batch, noise: replay(batch, noise, 0), (eager, recorded), near=1e-4
    )
