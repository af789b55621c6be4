"""An agent's update as one program: compiled, and on a GPU recorded as a CUDA graph that is replayed.

If either fails, the update runs without it, and training says why.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cpql.agents import Agent
from cpql.data.transitions import Batch, split
from cpql.errors import ConfigError

__all__ = ["CudaGraph", "Program", "Update", "program", "record", "zeros"]

Update = Callable[[Batch, dict[str, Tensor], int], dict[str, Tensor]]
"""`update(batch, noise, phase)` returns metrics and changes the agent in place, as `Agent.update` does."""


@dataclass(frozen=True)
class Program:
    """An update that is ready to run, whether it is compiled, and in words how it runs and why."""

    update: Update
    how: str
    compiled: bool


def program(
    agent: Agent, compile: bool | Literal["auto"], cache: Path, say: Callable[[str], None]
) -> Program:
    """Make an agent's update ready: compiled, and on a GPU recorded so that one call of it is one launch.

    Each phase is tried once, on zeros, so that any failure occurs here; the agent's state stays as it was.

    Args:
        agent: whose state the program changes in place.
        compile: whether to compile; with "auto" an update that can't be compiled runs uncompiled.
        cache: folder that keeps compiled programs for later runs. They are pickles of torch's, so nobody
            else may have write access to it.
        say: takes a line that says what failed, why, and what helps.

    Raises:
        ConfigError: `compile` is True and compiling fails.
    """
    if not compile:
        return Program(agent.update, "uncompiled", False)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    batch, noise = zeros(agent)
    try:
        _check_cache(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        compiled: Update = torch.compile(agent.update, fullgraph=True)
        with _unchanged(agent):
            for phase in range(agent.cycle):
                compiled(batch, noise, phase)
    except Exception as error:  # from any part of the compiler
        reason = _reason(error)
        if compile is True:
            raise ConfigError(f"compile=true: {reason}, or compile=auto to train uncompiled") from error
        say(f"warning: not compiled, so updates take about twice as long: {reason}")
        return Program(agent.update, f"uncompiled: {reason}", False)
    if not agent.state["step"].is_cuda:
        return Program(compiled, "compiled", True)
    return record(agent, compiled, batch, noise, say)


def record(
    agent: Agent, compiled: Update, batch: Batch, noise: dict[str, Tensor], say: Callable[[str], None]
) -> Program:
    """Record a compiled update as CUDA graphs, one a phase; if that fails, say why and use it without."""
    try:
        graphs = [CudaGraph(agent, compiled, phase, batch, noise) for phase in range(agent.cycle)]
    except Exception as error:  # of the driver, the libraries or the compiler
        reason = _first_line(error)
        say(f"warning: no CUDA graph, so the compiled update is launched piece by piece: {reason}")
        return Program(compiled, f"compiled, no CUDA graph: {reason}", True)
    return Program(lambda batch, noise, phase: graphs[phase](batch, noise), "compiled, CUDA graph", True)


@contextmanager
def _unchanged(agent: Agent) -> Iterator[None]:
    """Restore the agent's state after the block."""
    before = {name: tensor.clone() for name, tensor in agent.state.items()}
    try:
        yield
    finally:
        for name, tensor in agent.state.items():
            tensor.copy_(before[name])


def zeros(agent: Agent) -> tuple[Batch, dict[str, Tensor]]:
    """A batch of zeros, laid out in memory as batches are, and some noise."""
    device, c = agent.state["step"].device, agent.config
    width = 2 * agent.state_dim + agent.action_dim * (2 if c.next_actions else 1) + 2
    rows = torch.zeros(*agent.members, c.batch_size, width, device=device)
    generators = [torch.Generator(device) for _ in range(*agent.members or (1,))]
    noise = agent.draw(generators if agent.members else generators[0])
    return split(rows, agent.state_dim, agent.action_dim), noise


def _check_cache(folder: Path) -> None:
    """Refuse a cache that others can write to: what is read from it is unpickled."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError as error:
        raise ConfigError(f"nothing can be kept in {folder} ({error.strerror}). Set CPQL_CACHE") from error
    if os.name == "posix" and (about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise ConfigError(
            f"others can write to {folder}, and what is compiled is code. Make it your own, of mode 700, or "
            "set CPQL_CACHE to another folder"
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _reason(error: BaseException) -> str:
    """Why compiling failed and what helps, from the compiler's error."""
    if isinstance(error, ConfigError):
        return str(error)
    error = getattr(error, "inner_exception", None) or error
    name, text = type(error).__name__, str(error)
    if name == "InvalidCxxCompiler":
        return "there is no C++ compiler. Install one (apt install g++, conda install gxx), or name it by CXX"
    if name == "CppCompileError":
        found = re.search(r"(?:error: .*|Output:\n.*)", text)
        what = found[0].removeprefix("Output:\n") if found else text.partition("\n")[0]
        if " " in (cache := os.environ["TORCHINDUCTOR_CACHE_DIR"]):  # which PyTorch doesn't quote
            return f"the C++ compiler fails, as {cache} has a space. Set CPQL_CACHE to a folder without one"
        return f"the C++ compiler fails ({what.strip()}). Install another one, or name it by CXX"
    if "triton" in name.lower() or "triton" in text.lower():
        return f"there is no working Triton ({_first_line(error)}). Install it (pip install triton)"
    return f"PyTorch's compiler fails ({_first_line(error)}). Use compile=false"


class CudaGraph:
    """One phase of an update, recorded as a CUDA graph that every call replays.

    Even compiled, an update is about a hundred launches, each of which takes the CPU longer than the GPU; a
    graph is a single launch. It is possible because an update uses only tensors that stay in place: the
    agent's state, which it changes in place, and the batch and the noise, which are copied into the graph's.

    The metrics that a call returns are overwritten by the next one.
    """

    WARM_UP = 3  # updates before recording, as CUDA graphs require: libraries allocate their workspaces

    def __init__(
        self, agent: Agent, update: Update, phase: int, batch: Batch, noise: dict[str, Tensor]
    ) -> None:
        self.batch = Batch._make(None if tensor is None else tensor.clone() for tensor in batch)
        self.noise = {name: tensor.clone() for name, tensor in noise.items()}
        with _unchanged(agent):
            apart = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            apart.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(apart):
                for _ in range(self.WARM_UP):
                    update(self.batch, self.noise, phase)
            torch.cuda.current_stream().wait_stream(apart)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.metrics = update(self.batch, self.noise, phase)

    def __call__(self, batch: Batch, noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """Update once."""
        for kept, given in zip(self.batch, batch, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        for name, kept in self.noise.items():
            kept.copy_(noise[name])
        self.graph.replay()
        return self.metrics
