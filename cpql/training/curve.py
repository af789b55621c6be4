"""Pictures of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogFormatter

from cpql.agents import ActorCriticConfig

__all__ = ["DPI", "Picture", "learning_curve", "value_of_data"]

DPI = 110
BLUE, ORANGE, GREY = "#1f5fbf", "#c2410c", "#6b7280"


class Picture(Figure):
    """A figure that a notebook shows."""

    def png(self) -> bytes:
        """The picture as a PNG file's content."""
        buffer = io.BytesIO()
        self.savefig(buffer, dpi=DPI, format="png")
        return buffer.getvalue()

    _repr_png_ = png


def value_of_data(config: Mapping[str, Any], data: Mapping[str, Any]) -> float | None:
    """The data's mean reward over 1 - discount: about its mean Q, if no episode ended.

    Where episodes end the true value is nearer to 0. None where it isn't known, or rewards are transformed
    before the critic sees them.

    Args:
        config: a run's settings, as in its config.yaml.
        data: the provenance of its data.
    """
    discount = config["agent"].get("discount", ActorCriticConfig.discount)
    reward = (config.get("dataset") or {}).get("reward", "none")
    total, length = data.get("return_mean"), data.get("length_mean")
    if total is None or not length or reward != "none" or discount == 1:
        return None
    return float(total / length / (1 - discount))


def learning_curve(
    run: dict[str, Any],
    config: Mapping[str, Any],
    evaluations: list[dict[str, Any]],
    metrics: list[dict[str, float]],
) -> Picture:
    """Draw score (or return, without references), values and losses over gradient or environment steps.

    Args:
        run: the entries that every result has, see `Run.provenance`.
        config: the run's settings, as in its config.yaml.
        evaluations: of the run, in order; without any their panel is left out.
        metrics: the rows of `metrics.csv`.
    """
    room = ConstrainedLayoutEngine(rect=(0.0, 0.11, 1.0, 0.89))  # for the legends below
    figure = Picture(figsize=(12, 4.2), layout=room)
    panels = list(figure.subplots(1, 3 if evaluations else 2))
    axis = {0: 0.0, **{int(row["step"]): row.get("online/steps", row["step"]) for row in metrics}}
    if evaluations:
        _scores(panels[0], run, evaluations, [axis.get(e["step"], e["step"]) for e in evaluations])
    values, losses = panels[-2:]
    x = [axis[int(row["step"])] for row in metrics]
    lines = {
        values: {"critic/q": "Q of the batch's actions", "critic/v": "V"},
        losses: {"critic/loss": "critic", "actor/imitation": "imitation"},
    }
    for axes, names in lines.items():
        for colour, (name, label) in zip((BLUE, ORANGE), names.items(), strict=True):
            if metrics and name in metrics[0]:
                axes.plot(x, [row[name] for row in metrics], color=colour, label=label)
    endless = value_of_data(config, run["data"])
    if endless is not None and values.lines:
        label = f"mean reward / (1 - discount): {endless:.0f}"
        values.axhline(endless, color=GREY, ls="--", label=label)
    values.set_title("value (discounted return)", loc="left", fontsize=10)
    losses.set_title("loss", loc="left", fontsize=10)
    losses.set_yscale("log")
    # Plain numbers, no mathtext: its parser keeps exceptions, and they the training's frames and tensors.
    losses.yaxis.set_major_formatter(LogFormatter())
    losses.yaxis.set_minor_formatter(LogFormatter())
    for axes in panels:
        axes.set_xlabel("environment steps" if metrics and "online/steps" in metrics[0] else "updates")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.2)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            below = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.17), "ncols": 2}
            legend = axes.legend(**below, fontsize=8, frameon=False)
            legend.set_in_layout(False)  # or it would narrow the panel
    source = run["data"]["source"].replace("embedded", "self-collected data, not D4RL")
    title = f"{run['agent']} on {run['task']}, seed {run['training_seed']}  ({source})"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _scores(axes: Any, run: dict[str, Any], evaluations: list[dict[str, Any]], x: list[float]) -> None:
    last = evaluations[-1]
    scored = last["score"] is not None
    of, behaviour = ("score", "behaviour_score") if scored else ("return_mean", "behaviour_return")
    interval = "score_interval" if scored else "return_interval"
    y = [e[of] for e in evaluations]
    low, high = zip(*(e[interval] for e in evaluations), strict=True)
    axes.plot(x, y, "-", color=BLUE, marker="o", ms=3)
    axes.fill_between(x, low, high, color=BLUE, alpha=0.15, lw=0, label="95% over episodes")
    best = max(range(len(y)), key=lambda k: y[k])
    if best != len(y) - 1:
        axes.plot(x[best], y[best], "D", color=BLUE, mfc="white", ms=7, label=f"best {y[best]:,.1f}")
    axes.plot(x[-1], y[-1], "o", color=BLUE, ms=8, label="last checkpoint")
    if run[behaviour] is not None:
        axes.axhline(run[behaviour], color=ORANGE, ls="--", label=f"behaviour {run[behaviour]:,.1f}")
    if scored:
        axes.set_ylim(bottom=min(0.0, *low) - 2, top=max(10.0, axes.get_ylim()[1]))
    title = "D4RL score" if scored else "return"
    if last.get("measure") == "success":
        title = "successes in percent"
    axes.set_title(f"{title}, {last['environment']}", loc="left", fontsize=10)
    axes.set_title(f"{y[-1]:,.1f}", loc="right", fontsize=20, fontweight="bold", color=BLUE)
