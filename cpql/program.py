"""An agent's update as one program: compiled, and on a GPU recorded as a CUDA graph that is replayed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cpql.agents import Agent
from cpql.data.transitions import Batch

__all__ = ["Replay", "Update", "program"]

Update = Callable[[Batch, dict[str, Tensor]], dict[str, Tensor]]
"""`update(batch, noise)` gives metrics and changes the agent's state in place, as `Agent.update` does."""


def program(agent: Agent, cache: Path) -> Update:
    """Compile an agent's update; on a GPU one call of it is one launch.

    Args:
        agent: whose state the program changes in place.
        cache: folder that keeps what was compiled, so that the next run finds it.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    compiled: Update = torch.compile(agent.update, fullgraph=True)
    return Replay(agent, compiled) if agent.state["step"].is_cuda else compiled


class Replay:
    """An update that is recorded as a CUDA graph when it is first called, and from then on replayed.

    Even compiled, an update is about a hundred launches, each of which takes the CPU longer than the GPU. A
    graph is one. It can be, since an update touches only tensors that stay where they are: the agent's state,
    which it changes in place, and the batch and the noise, which are copied into the graph's own.

    The metrics that a call returns are overwritten by the next one.

    Args:
        agent: whose state the update changes.
        update: `agent.update`, or that compiled.
    """

    WARM_UP = 3  # updates before recording, as CUDA graphs ask for: libraries allocate their workspaces

    def __init__(self, agent: Agent, update: Update) -> None:
        self.agent, self.update = agent, update
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """Update once."""
        if self.graph is None:
            self.graph = self._record(batch, noise)
        for kept, given in zip(self.batch, batch, strict=True):
            kept.copy_(given)
        for name, kept in self.noise.items():
            kept.copy_(noise[name])
        self.graph.replay()
        return self.metrics

    def _record(self, batch: Batch, noise: dict[str, Tensor]) -> torch.cuda.CUDAGraph:
        self.batch = Batch(*(tensor.clone() for tensor in batch))
        self.noise = {name: tensor.clone() for name, tensor in noise.items()}
        before = {name: tensor.clone() for name, tensor in self.agent.state.items()}
        apart = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        apart.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(apart):
            for _ in range(self.WARM_UP):
                self.update(self.batch, self.noise)
        torch.cuda.current_stream().wait_stream(apart)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.metrics = self.update(self.batch, self.noise)
        for name, tensor in self.agent.state.items():
            tensor.copy_(before[name])
        return graph
