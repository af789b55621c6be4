"""Latency of an action, by rule, batch and form."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cpql.actors.consistency import ActorConfig, ConsistencyActor
from cpql.critics import TwinCritic
from cpql.deploy.export import export, fold
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
    """Time single actions and batches on the CPU, one thread; rows take turns."""
    torch.set_num_threads(1)
    state_dim, action_dim = 11, 3
    observations = np.random.default_rng(0).normal(size=(256, state_dim)).astype(np.float32)
    calls: dict[str, Any] = {}
    for steps, refinements in ((1, ()), (2, (0.8,))):
        policy = untrained(state_dim, action_dim, ActorConfig(refinements=refinements), candidates=1)
        noise = np.zeros((steps, action_dim), np.float32)
        folded = fold(policy)
        calls[f"folded, numpy, {steps} step(s), batch 1"] = lambda f=folded, n=noise: f(observations[0], n)
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError:
            print("onnxruntime isn't installed: no ONNX rows")
        else:
            with tempfile.TemporaryDirectory() as folder:
                session = onnxruntime.InferenceSession(export(policy, Path(folder) / "actor.onnx").path)
            given = {"observation": observations[:1], "noise": noise[:, None]}
            calls[f"ONNX, {steps} step(s), batch 1"] = lambda s=session, g=given: s.run(None, g)
        calls[f"predict, actor alone, {steps} step(s), batch 1"] = lambda p=policy: p.predict(observations[0])
        for batch in (10, 50, 256):
            several = observations[:batch]
            name = f"predict, actor alone, {steps} step(s), batch {batch}"
            calls[name] = lambda p=policy, o=several: p.predict(o)
    ranked = untrained(state_dim, action_dim, ActorConfig(), candidates=50)
    for batch in (1, 10, 50):
        several = observations[:batch]
        calls[f"predict, 50 candidates, 1 step, batch {batch}"] = lambda o=several: ranked.predict(o)
    medians = latencies(calls, options.rounds)
    table = Table(title="microseconds a call, CPU, one thread")
    for column in ("what", "microseconds"):
        table.add_column(column)
    for name, value in medians.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)
    return {"microseconds": medians}
