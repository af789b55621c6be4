"""Latency of an action, by rule, batch and form."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cpql.actors import ActorConfig, ConsistencyActor, choose
from cpql.critics import TwinCritic
from cpql.deploy.export import export
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.tasks import Task
from measure.turns import latencies

__all__ = ["acting", "untrained"]


def untrained(
    state_dim: int,
    action_dim: int,
    actor_config: ActorConfig,
    *,
    candidates: int,
    layer_norm: bool = True,
) -> Policy:
    """A policy with its initial weights."""
    hidden = (256, 256, 256)
    actor = ConsistencyActor(state_dim, action_dim, actor_config)
    critic = TwinCritic(state_dim, action_dim, hidden, layer_norm=layer_norm)
    bounds = (-1.0,) * action_dim, (1.0,) * action_dim
    task = Task("benchmark", None)
    config = PolicyConfig(
        state_dim, action_dim, *bounds, actor_config, hidden, layer_norm, candidates, 1.0, task
    )
    return Policy(actor, critic, config)


def acting(options: argparse.Namespace) -> dict[str, Any]:
    """Time single actions and batches on the CPU, one thread; rows take turns.

    Each is timed as `Policy.predict` acts, and in each form that it could act in: the modules, and the folded
    policy in numpy (whose threads the environment sets: OPENBLAS_NUM_THREADS=1) and in torch.
    """
    torch.set_num_threads(1)
    state_dim, action_dim = 11, 3
    observations = np.random.default_rng(0).normal(size=(50, state_dim)).astype(np.float32)
    calls: dict[str, Any] = {}
    for candidates, refinements in ((1, ()), (1, (0.8,)), (50, ())):
        config = ActorConfig(refinements=refinements)
        policy = untrained(state_dim, action_dim, config, candidates=candidates)
        rule = "actor alone" if candidates == 1 else f"{candidates} candidates"
        steps = policy.actor.steps
        for batch in (1, 10, 50):
            several = observations[0] if batch == 1 else observations[:batch]
            for form, call in forms(policy, several).items():
                calls[f"{form}, {rule}, {steps} step(s), batch {batch}"] = call
    medians = latencies(calls, options.rounds)
    table = Table(title="microseconds a call, CPU, one thread")
    for column in ("what", "microseconds"):
        table.add_column(column)
    for name, value in medians.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)
    return {"microseconds": medians}


def forms(policy: Policy, observation: NDArray[np.float32]) -> dict[str, Callable[[], object]]:
    """Calls that act on observations [S] or [B, S], each drawing its noise, by the form of the policy."""
    folded = policy.folded.with_rule(policy.candidates, policy.temperature)
    in_torch, batch = folded.to("cpu"), observation.shape[:-1]
    random, state = np.random.default_rng(0), torch.from_numpy(np.atleast_2d(observation))

    def draw(rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
        shapes = folded.shapes(*rows).items()
        return {name: (torch.rand if name == "uniform" else torch.randn)(shape) for name, shape in shapes}

    @torch.inference_mode()
    def modules() -> object:
        return choose(
            policy.actor,
            cast(TwinCritic, policy.critic),
            policy.normalise(state),
            candidates=policy.candidates,
            temperature=policy.temperature,
        ).numpy()

    @torch.inference_mode()
    def tensors() -> object:
        return in_torch(state, **draw((len(state),)), xp=torch).numpy()

    calls: dict[str, Callable[[], object]] = {
        "predict": lambda: policy.predict(observation),
        "modules": modules,
        "folded, numpy": lambda: folded(observation, **folded.draw(random, *batch)),
        "folded, torch": tensors,
    }
    if batch == () and policy.candidates == 1:
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError:
            print("onnxruntime isn't installed: no ONNX rows")
        else:
            with tempfile.TemporaryDirectory() as folder:
                session = onnxruntime.InferenceSession(export(policy, Path(folder) / "actor.onnx").path)
            given = {"observation": state.numpy(), **folded.draw(random, 1)}
            calls["ONNX"] = lambda: session.run(None, given)
    return calls
