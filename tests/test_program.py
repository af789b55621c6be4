"""The update recorded as a graph: with a stand-in for CUDA's here, and with CUDA where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpql.agents import CPQL, CPQLConfig
from cpql.data.transitions import Transitions
from cpql.program import Replay, program

SMALL = CPQLConfig(critic_hidden=(16, 16), batch_size=8)


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

    def update(batch: Any, noise: Any) -> dict[str, Tensor]:
        calls.append([tensor.data_ptr() for tensor in (*batch, *noise.values())])
        return recorded.update(batch, noise)

    replay = Replay(recorded, update)

    class Graph:
        def replay(self) -> None:
            for name, value in update(replay.batch, replay.noise).items():
                replay.metrics[name].copy_(value)

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    @contextlib.contextmanager
    def within(_: Any) -> Iterator[None]:
        yield

    for name, stand_in in {
        "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "graph": within, "stream": within
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert_equal_training("cpu", eager.update, replay, (eager, recorded), near=0.0)
    assert len(calls) == Replay.WARM_UP + 1 + 6
    assert all(call == calls[0] for call in calls), "a graph knows only the tensors it was recorded on"


def test_without_a_gpu_there_is_no_graph(tmp_path: Path) -> None:
    assert not isinstance(program(CPQL(4, 2, SMALL), tmp_path), Replay)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_update_is_the_eager_one(tmp_path: Path) -> None:
    eager, recorded = (CPQL(4, 2, SMALL, seed=0, device="cuda") for _ in range(2))
    replay = program(recorded, tmp_path)
    assert_equal_training("cuda", eager.update, replay, (eager, recorded), near=1e-4)
