"""What a person wants to read at the end of a training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from cpql.agents import AGENTS
from cpql.train.config import TrainConfig

__all__ = ["group_summary", "summary"]


def summary(result: dict[str, Any], folder: str) -> str:
    """A run's result in three lines or four."""
    where = f"all in {folder}: learning_curve.png, metrics.csv, result.json, checkpoints/last"
    if not result["evaluated"]:
        lines = [f"trained and not evaluated: {result['task']} has no environment here (env.id=null)"]
        return "\n".join([*lines, *([f"note: {result['note']}"] if result["note"] else []), where])
    returns = f"return {result['return_mean']:,.0f} ± {result['return_std']:,.0f}"
    how = f"over {result['episodes']} episodes of {result['environment']}, last checkpoint, {result['rule']}"
    data = f"data: {result['data']['source']} {result['data']['id']}"
    behaviour = result["behaviour_return"]
    if result["score"] is None:
        beside = "unknown" if behaviour is None else f"{behaviour:,.0f}"
        lines = [f"{returns} {how}", f"behaviour's return {beside}   ({data}, which has no reference scores)"]
    else:
        low, high = result["score_interval"]
        of = result["references"]["of"]
        lines = [f"score {result['score']:.1f} (95% interval {low:.1f} to {high:.1f}; {returns} {how})"]
        if result.get("measure") == "success":
            lines.append(f"the score is the share of successes in percent, as {of} counts them   ({data})")
        else:
            beside = "unknown" if behaviour is None else f"{result['behaviour_score']:.1f}"
            lines.append(f"behaviour {beside}   random 0.0   expert 100.0   ({of}'s references; {data})")
    if result["note"]:
        lines.append(f"note: {result['note']}")
    return "\n".join([*lines, where])


def group_summary(results: Sequence[dict[str, Any]], configs: Sequence[TrainConfig]) -> str:
    """The results of several runs, with the mean over the seeds of each setting."""
    texts = [summary(result, config.run_dir) for result, config in zip(results, configs, strict=True)]
    if not results[0]["evaluated"]:
        return "\n".join(texts)
    of = "return" if results[0]["score"] is None else "score"
    values: dict[str, list[float]] = {}
    for result, config in zip(results, configs, strict=True):
        setting = ", ".join(
            f"agent.{name}={config.agent[name]}"
            for name in AGENTS[config.agent["name"]].by_member
            if name in config.agent
        )
        values.setdefault(setting, []).append(result["return_mean" if of == "return" else "score"])
    for setting, seeds in values.items():
        if len(seeds) > 1:
            mean, spread = statistics.fmean(seeds), statistics.stdev(seeds)
            under = f" with {setting}" if len(values) > 1 else ""
            texts.append(f"{of} of {len(seeds)} seeds{under}: {mean:,.1f} ± {spread:,.1f} (between seeds)")
    return "\n".join(texts)
