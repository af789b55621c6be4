"""What finished runs came to, by their actor's objective: scores, diversity of actions, bias of values."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cpql.actors import ConsistencyActor
from cpql.consistency import OBJECTIVES
from cpql.deploy.policy import Policy
from measure.episodes import EPISODES, HORIZON, SEED, Array, episodes, q_bias
from measure.results import changes, defaults

__all__ = ["objectives"]

DRAWS = 32


def objectives(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each run, beside those measured before, and print tables as the docs have them."""
    torch.set_num_threads(1)
    kept = Path(__file__).resolve().parents[2] / "benchmarks" / "objectives.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["runs"] if kept.exists() else []
    for folder in options.runs:
        row = of_run(folder)
        rows = [old for old in rows if name(old) != name(row)] + [row]
    rows.sort(key=name)
    for title, table in tables(rows).items():
        print(f"\n{title}\n\n{table}")
    return {"episodes": EPISODES, "draws": DRAWS, "horizon": HORIZON, "runs": rows}


def name(row: dict[str, Any]) -> tuple[str, str, str, int, int]:
    """What tells a run from the others."""
    return row["task"], row["agent"], row["objective"], row["updates"], row["seed"]


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """A table for each agent and length of training, by title."""
    kinds = sorted({(row["agent"], row["updates"]) for row in rows})
    return {
        f"{agent}, {updates:,} updates": table(
            [r for r in rows if (r["agent"], r["updates"]) == (agent, updates)]
        )
        for agent, updates in kinds
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown: a line for each objective, in the order of the docs; mean and spread over seeds."""
    columns = {"score": 1, "diversity": 2, "q_bias": 0}
    tasks = sorted({row["task"] for row in rows})
    lines = ["| objective | eta | " + " | ".join(f"{t}: score | diversity | Q bias" for t in tasks) + " |"]
    lines.append("|---" * (2 + len(columns) * len(tasks)) + "|")
    for objective in OBJECTIVES:
        alike = [row for row in rows if row["objective"] == objective]
        if not alike:
            continue
        cells = [f"`{objective}`", f"{alike[0]['eta']:g}"]
        for task in tasks:
            seeds = [row for row in alike if row["task"] == task]
            cells += [spread([row[c] for row in seeds], places) for c, places in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], places: int) -> str:
    """Mean and standard deviation, in short; empty where nothing was run."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{deviation}"


def of_run(folder: Path) -> dict[str, Any]:
    """A run's row: its score is its own evaluation's; the rest is measured in episodes of its last policy."""
    result = json.loads((folder / "result.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    policy = Policy.load(folder)
    found = episodes(policy)
    states = np.concatenate([episode.observations[: episode.known] for episode in found])
    bias, value = q_bias(policy, found, config["agent"].get("discount", 0.99))
    return {
        "task": result["task"],
        "agent": result.get("algorithm", result["agent"]),
        "objective": policy.actor.config.objective,
        "seed": result["training_seed"],
        "score": round(result["score"], 2),
        "episodes": result["episodes"],
        "diversity": round(diversity(policy, states), 4),
        "q_bias": round(bias, 3),
        "return_to_go": round(value, 3),
        "curve_of_step_score": [
            [e["step"], round(e["score"], 1)]
            for e in (
                json.loads(file.read_text()) for file in sorted((folder / "evaluations").glob("*.json"))
            )
        ],
        "behaviour_score": round(result["behaviour_score"], 2),
        "data": f"{result['data']['source']} {result['data']['id']}",
        "precision": config["precision"],
        "updates": config["budget"]["updates"],
        "eta": config["agent"]["eta"],
        "settings": changes(config["agent"], defaults(config["agent"]["name"])),
        "versions": result["versions"],
    }


@torch.no_grad()
def diversity(policy: Policy, states: Array) -> float:
    """Standard deviation of one-step actions over their noise, mean over states and dimensions."""
    state = policy.normalise(torch.from_numpy(states).float())
    generator = torch.Generator().manual_seed(SEED)
    assert isinstance(policy.actor, ConsistencyActor)
    actions = [policy.actor.sample(state, steps=1, generator=generator) for _ in range(DRAWS)]
    return float(torch.stack(actions).std(0).mean())
