"""Pictures of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["learning_curve"]


def learning_curve(path: Path, evaluations: list[dict[str, Any]], metrics: list[dict[str, float]]) -> None:
    """Draw score, values and losses over gradient steps, as a PNG.

    Args:
        path: of the PNG; replaced in one move.
        evaluations: of the run, in order, as in its `evaluations/`.
        metrics: the rows of its `metrics.csv`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    score, values, losses = figure.subplots(1, 3)
    last = evaluations[-1]
    steps = [e["step"] for e in evaluations]
    scored = last["score"] is not None
    of, behaviour = ("score", "behaviour_score") if scored else ("return_mean", "behaviour_return")
    low, high = zip(*(e["score_interval" if scored else "return_interval"] for e in evaluations), strict=True)
    score.plot(
        steps,
        [e[of] for e in evaluations],
        "o-",
        color="C0",
        label=f"{last['agent']}, seed {last['training_seed']}",
    )
    score.fill_between(steps, low, high, color="C0", alpha=0.2, lw=0)
    if last[behaviour] is not None:
        score.axhline(last[behaviour], color="C1", ls="--", label=f"behaviour {last[behaviour]:.1f}")
    if scored:
        score.axhline(0, color="0.6", lw=1, label="random 0")
        score.set_ylim(bottom=min(0.0, *low) - 2)
    score.set_title(f"{'normalised score' if scored else 'return'}, {last['environment']}")
    score.legend(loc="lower right", fontsize=8)

    x = [row["step"] for row in metrics]
    for axes, names, title in (
        (values, ("critic/q", "actor/q", "critic/v"), "values"),
        (losses, ("critic/loss", "actor/imitation"), "losses"),
    ):
        for name in names:
            if metrics and name in metrics[0]:
                axes.plot(x, [row[name] for row in metrics], label=name)
        axes.set_title(title)
        axes.legend(loc="best", fontsize=8)
    losses.set_yscale("log")
    for axes in (score, values, losses):
        axes.set_xlabel("updates")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
    source = (
        "self-collected data, not D4RL" if last["data"]["source"] == "embedded" else last["data"]["source"]
    )
    figure.suptitle(f"{last['agent']} on {last['task']} ({source})", fontsize=11)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        figure.savefig(aside, dpi=110)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
