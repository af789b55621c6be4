"""Results of finished runs that are kept as data, and the README's table of them."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from cpql.agents import AGENTS
from cpql.io import write_text

__all__ = ["changes", "defaults", "keep", "table"]

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def changes(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that aren't defaults."""
    found = {}
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            value, default = changes(value, default), {}
        if value != default:
            found[key] = value
    return found


def defaults(agent: str) -> dict[str, Any]:
    """All default settings of an agent, as they are in a run's config.yaml."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(AGENTS[agent].config_class())))
    return plain


def keep(options: argparse.Namespace) -> None:
    """Keep the result of each run with its curve and its configuration.

    The result of another run is never replaced: where there is one of the same name, this ends with a line.
    """
    folder = FOLDER / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for path in options.runs:
        config = yaml.safe_load((path / "config.yaml").read_text())
        del config["run_dir"]  # a path of this machine
        result = json.loads((path / "result.json").read_text())
        if result.get("score") is None:
            sys.exit(f"{path / 'result.json'}: has no score: expected a result with reference scores")
        evaluations = [
            json.loads(file.read_text()) for file in sorted((path / "evaluations").glob("step_*.json"))
        ]
        curve = [[e["step"], e["episodes"], round(e["score"], 2)] for e in evaluations]
        content = {"curve_of_step_episodes_score": curve, **result, "configuration": config}
        kind = "-".join((result["agent"], *unusual(config)))
        name = f"{result['task']}-{kind}-seed{result['training_seed']}.json"
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        kept = folder / name
        if kept.exists() and (before := json.loads(kept.read_text())) != json.loads(text):
            apart = difference("configuration", before["configuration"], config) or "only figures differ"
            sys.exit(f"{path}: benchmarks/results/{name} is another run's ({apart}): remove that one first")
        write_text(kept, text)
        print(f"benchmarks/results/{name}: {result['score']:.1f}")


def difference(key: str, before: Any, now: Any) -> str:
    """Name the first setting in which two runs differ, with both values; "" where none does."""
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name))
        return difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"{key} is {before} there, {now} here"


def unusual(config: dict[str, Any]) -> list[str]:
    """An objective or a precision that isn't the agent's default, for the names of results."""
    objective = config["agent"]["actor"]["objective"]
    precision = config.get("precision", "fp32")  # there was no other one at first
    usual = {"fp32", AGENTS[config["agent"]["name"]].config_class().actor.objective}
    return [what for what in (objective, precision) if what not in usual]


def table(options: argparse.Namespace | None = None) -> str:
    """The kept results as Markdown: each seed's last checkpoint over its episodes, and their mean."""
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))]
    head = (
        "task",
        "agent",
        "score, mean over seeds",
        "spread",
        "each seed, mean ± spread over episodes",
        "behaviour",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        agent = ", ".join((f"`{result['agent']}`", *unusual(result["configuration"])))
        cells.setdefault((result["task"], agent), []).append(result)
    for (task, agent), runs in sorted(cells.items()):
        runs = sorted(runs, key=lambda run: int(run["training_seed"]))
        scores = [run["score"] for run in runs]
        spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        percent = [100 / (run["references"]["expert"] - run["references"]["random"]) for run in runs]
        each = ", ".join(
            f"{run['score']:.1f} ± {run['return_std'] * unit:.1f}"
            for run, unit in zip(runs, percent, strict=True)
        )
        behaviour = f"{runs[0]['behaviour_score']:.1f}"
        row = [task, agent, f"**{statistics.mean(scores):.1f}**", spread, each, behaviour]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)
