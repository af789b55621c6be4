"""Ten episodes at once against one after the other, and what of it the environment takes."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cpql.actors.consistency import ActorConfig
from cpql.environments import make_task_environment, widths
from cpql.tasks import Task
from cpql.training.evaluation import evaluate
from measure.acting import untrained

__all__ = ["evaluating"]

EPISODES = 10


def evaluating(options: argparse.Namespace) -> dict[str, Any]:
    """Time whole evaluations on HalfCheetah, whose episodes never end early; rows take turns."""
    torch.set_num_threads(1)
    task = Task("benchmark", "HalfCheetah-v4", env_options={"max_episode_steps": options.steps})
    environment = make_task_environment(task)
    ways: dict[str, Callable[[], object]] = {}
    for rule, candidates in (("actor alone", 1), ("50 candidates", 50)):
        policy = untrained(*widths(environment), ActorConfig(), candidates=candidates)

        def one_by_one(policy: Any = policy) -> None:
            for episode in range(EPISODES):
                observation, over = environment.reset(seed=episode)[0], False
                while not over:
                    action, _ = policy.predict(observation)
                    observation, _, terminated, truncated, _ = environment.step(action)
                    over = terminated or truncated

        ways[f"{rule}, one by one"] = one_by_one
        ways[f"{rule}, at once"] = lambda policy=policy: evaluate(policy, task, EPISODES)  # type: ignore[misc]

    def alone() -> None:
        for episode in range(EPISODES):
            environment.reset(seed=episode)
            for _ in range(options.steps):
                environment.step(np.zeros(policy.config.action_dim, np.float32))

    ways["environment alone"] = alone
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    table = Table(title=f"seconds for {EPISODES} episodes of {options.steps} steps, CPU, 1 thread")
    for column in ("what", "seconds"):
        table.add_column(column)
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    return {"episodes": EPISODES, "steps": options.steps, "rounds": options.rounds, "seconds": medians}
