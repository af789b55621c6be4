"""Pictures of a run."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter

__all__ = ["Picture", "learning_curve"]


class Picture(Figure):
    """A figure that a notebook shows."""

    def png(self) -> bytes:
        """The picture as a PNG file's content."""
        buffer = io.BytesIO()
        self.savefig(buffer, dpi=110, format="png")
        return buffer.getvalue()

    _repr_png_ = png


def learning_curve(
    run: dict[str, Any], evaluations: list[dict[str, Any]], metrics: list[dict[str, float]]
) -> Picture:
    """Draw score (or return, without references), values and losses over gradient steps.

    Args:
        run: the entries that every result has, see `Run.provenance`.
        evaluations: of the run, in order; without any their panel is left out.
        metrics: the rows of `metrics.csv`.
    """
    figure = Picture(figsize=(11, 3.6), layout="constrained")
    panels = list(figure.subplots(1, 3 if evaluations else 2))
    if evaluations:
        _scores(panels[0], run, evaluations)
    values, losses = panels[-2:]
    x = [row["step"] for row in metrics]
    for axes, names, title in (
        (values, ("critic/q", "actor/q", "critic/v"), "values"),
        (losses, ("critic/loss", "actor/imitation"), "losses"),
    ):
        for name in names:
            if metrics and name in metrics[0]:
                axes.plot(x, [row[name] for row in metrics], label=name)
        axes.set_title(title)
        if axes.lines:
            axes.legend(loc="best", fontsize=8)
    losses.set_yscale("log")
    # Plain numbers, no mathtext: its parser keeps exceptions, and they the training's frames and tensors.
    losses.yaxis.set_major_formatter(LogFormatter())
    losses.yaxis.set_minor_formatter(LogFormatter())
    for axes in panels:
        axes.set_xlabel("updates")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
    source = run["data"]["source"].replace("embedded", "self-collected data, not D4RL")
    figure.suptitle(f"{run['agent']} on {run['task']} ({source})", fontsize=11)
    return figure


def _scores(axes: Any, run: dict[str, Any], evaluations: list[dict[str, Any]]) -> None:
    steps = [e["step"] for e in evaluations]
    scored = evaluations[-1]["score"] is not None
    of, behaviour = ("score", "behaviour_score") if scored else ("return_mean", "behaviour_return")
    interval = "score_interval" if scored else "return_interval"
    low, high = zip(*(e[interval] for e in evaluations), strict=True)
    label = f"{run['agent']}, seed {run['training_seed']}"
    axes.plot(steps, [e[of] for e in evaluations], "o-", color="C0", label=label)
    axes.fill_between(steps, low, high, color="C0", alpha=0.2, lw=0)
    if run[behaviour] is not None:
        axes.axhline(run[behaviour], color="C1", ls="--", label=f"behaviour {run[behaviour]:.1f}")
    if scored:
        axes.axhline(0, color="0.6", lw=1, label="random 0")
        axes.set_ylim(bottom=min(0.0, *low) - 2, top=max(10.0, axes.get_ylim()[1]))
    title = "normalised score" if scored else "return"
    if evaluations[-1].get("measure") == "success":
        title = "successes in percent"
    axes.set_title(f"{title}, {evaluations[-1]['environment']}")
    axes.legend(loc="lower right", fontsize=8)
