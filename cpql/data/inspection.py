"""What a dataset is like: counts, returns, ranges, and findings that its owner should know.

`Inspection` takes any `Transitions` and needs a few seconds for two million rows; `describe` puts it into
words and `picture` draws it. Findings are warnings: such data can be trained on, and may be meant so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpql.data.rows import returns_and_lengths, row_blocks
from cpql.data.transitions import Transitions
from cpql.errors import DataError
from cpql.io import aside
from cpql.tasks import Task

__all__ = ["Inspection", "Spread", "describe", "picture"]

Numbers = NDArray[np.float64]

# An action this near to -1 or 1 counts as at its bounds.
AT_BOUND = 1e-3
# Fractions of the rows above which something is a finding.
MANY_DUPLICATES, MANY_AT_BOUNDS, MANY_SEAMS = 0.01, 0.5, 0.5
BINS = 10
BAR = 40  # characters


class Spread(NamedTuple):
    """Mean, standard deviation, lowest and highest of each of W numbers over the transitions, [W] each."""

    mean: Numbers
    std: Numbers
    low: Numbers
    high: Numbers

    @property
    def constant(self) -> list[int]:
        """The indices of the numbers that never change."""
        return [int(k) for k in np.flatnonzero(self.low == self.high)]


class Inspection:
    """What a dataset is like.

    Args:
        data: the dataset; inspecting it takes a few passes over it and one sort of a number per row.

    Attributes:
        provenance: where it came from, and the returns of its complete episodes.
        episodes: the number of episodes, complete or not.
        terminated: how many of them ended because the task did.
        truncated: how many ended at a time limit.
        unflagged: how many ended without a flag: at the end of the data, where rows don't join up, or, in
            data without next observations, one step short of a time limit.
        returns: undiscounted return [E] of each complete episode, as far as its rows tell.
        lengths: length [E] of each complete episode, in steps.
        observations: `Spread` of the S numbers of an observation.
        actions: `Spread` of the A numbers of an action, in [-1, 1].
        rewards: `Spread` of the reward.
        at_bounds: fraction of the rows [A] in which an action is within 0.001 of -1 or 1.
        duplicates: the number of rows that equal an earlier one in every number, by hashes of 64 bits.
        findings: what the owner should know, one clause each.
    """

    def __init__(self, data: Transitions) -> None:
        data = data.to("cpu")
        table: NDArray[np.float32] = data.table.numpy()
        terminated, truncated, ends = (x.numpy() for x in (data.terminated, data.truncated, data.ends))
        flagged = terminated | truncated
        unflagged = ends & ~flagged
        self.provenance = data.provenance
        self.episodes, self.terminated = int(ends.sum()), int(terminated.sum())
        self.truncated, self.unflagged = int(truncated.sum()), int(unflagged.sum())
        complete = flagged[ends]
        if complete.sum() < self.provenance.episodes:
            # The rows with the flags were dropped, or there were no `timeouts` and seams stand for them. Then
            # only an episode cut by the end of the data is incomplete.
            complete = np.arange(self.episodes) < max(self.provenance.episodes, self.episodes - 1)
        self.returns, self.lengths = returns_and_lengths(table[:, -2], ends, complete)

        blocks = [table[part] for part in row_blocks(*table.shape)]
        mean = np.sum([block.sum(0, dtype=np.float64) for block in blocks], 0) / len(table)
        square = np.sum([((block - mean) ** 2).sum(0) for block in blocks], 0) / len(table)
        low, high = np.min([x.min(0) for x in blocks], 0), np.max([x.max(0) for x in blocks], 0)
        spread = (mean, np.sqrt(square), low.astype(np.float64), high.astype(np.float64))
        self.observations, self.actions, _, self.rewards, _ = (
            Spread(*parts)
            for parts in zip(
                *(
                    np.split(x, np.cumsum([data.state_dim, data.action_dim, data.state_dim, 1]))
                    for x in spread
                ),
                strict=True,
            )
        )
        actions = table[:, data.state_dim : data.state_dim + data.action_dim]
        self.at_bounds = np.count_nonzero(np.abs(actions) >= 1 - AT_BOUND, axis=0) / len(table)
        odd = np.random.default_rng(0).integers(2**64, size=table.shape[1], dtype=np.uint64) | np.uint64(1)
        # Mixed, since floats of few digits end in zeros, which would leave the hashes fewer than 64 bits.
        mixed = (bits ^ (bits >> 16) for bits in (block.view(np.uint32) for block in blocks))
        hashes = np.sort(np.concatenate([bits.astype(np.uint64) @ odd for bits in mixed]))
        self.duplicates = int(np.count_nonzero(hashes[1:] == hashes[:-1]))
        seams, inside = int(unflagged[:-1].sum()), int((~flagged[:-1]).sum())
        self.findings = self._findings(len(table), seams, inside)

    def _findings(self, rows: int, seams: int, inside: int) -> list[str]:
        findings = []
        if self.duplicates > MANY_DUPLICATES * rows:
            findings.append(f"{self.duplicates:,} rows ({self.duplicates / rows:.1%}) repeat an earlier one")
        if seams > MANY_SEAMS * inside:
            findings.append(
                f"{seams:,} of {inside:,} rows without a flag don't lead to the next row: shuffled, "
                "or next_observations in another order"
            )
        if not self.terminated + self.truncated:
            findings.append("no row is terminal or at a time limit")
        if not self.provenance.episodes:
            findings.append("no episode is complete: the behaviour has no return and no score")
        if self.rewards.constant:
            findings.append(f"all rewards are {self.rewards.low[0]:g}")
        for name, spread in (("observation", self.observations), ("action", self.actions)):
            if spread.constant:
                names = _numbered(name, spread.constant)
                findings.append(f"{names} of {len(spread.low)}: always the same value")
        for k in np.flatnonzero(self.at_bounds > MANY_AT_BOUNDS):
            findings.append(f"action {k} is at its bounds in {self.at_bounds[k]:.1%} of the rows")
        return findings


def _numbered(name: str, which: Sequence[int]) -> str:
    """Name numbers by their indices, with runs in short: `observations 3, 27 to 110`."""
    runs = np.split(np.array(which), np.flatnonzero(np.diff(which) > 1) + 1)
    places = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{name}{'' if len(which) == 1 else 's'} {', '.join(places)}"


def describe(inspection: Inspection, task: Task) -> str:
    """Put an inspection into lines of text; the task's references give the behaviour's score."""
    i, p = inspection, inspection.provenance
    lines = [p.line()]
    if p.file:
        lines.append(f"file       {p.file}, SHA-256 {p.sha256}")
    lines.append(
        f"episodes   {i.episodes:,}: {i.terminated:,} terminated, {i.truncated:,} truncated, "
        f"{i.unflagged:,} without a flag; {p.episodes:,} complete"
    )
    if p.return_mean is not None:
        score = task.score(p.return_mean)
        lines.append(
            "score      none: there are no reference returns for these data"
            if score is None
            else f"score      {score:.1f} is the behaviour's, by {task.benchmark}'s references: "
            f"0 is a return of {task.random_return:,.1f}, 100 of {task.expert_return:,.1f}"
        )
    lines += [f"note       {task.note}"] if task.note else []
    if len(i.returns):
        low, mean, high = i.lengths.min(), i.lengths.mean(), i.lengths.max()
        title = (
            f"returns of {len(i.returns):,} complete episodes, lengths {low:,} to {high:,}, mean {mean:,.1f}"
        )
        lines += ["", title]
        counts, edges = np.histogram(i.returns, bins=BINS if i.returns.min() < i.returns.max() else 1)
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
            bar = "#" * -(-BAR * count // counts.max())
            lines.append(f"{left:>12,.1f} to {right:>12,.1f}{count:>9,}  {bar}".rstrip())
    lines += ["", f"{'':14}{'mean':>12}{'std':>12}{'lowest':>12}{'highest':>12}{'at bounds':>12}"]
    for name, spread in (("reward", i.rewards), ("action", i.actions), ("observation", i.observations)):
        constant = spread.constant
        for k in (k for k in range(len(spread.low)) if k not in constant):
            label = f"{name} {k}" if len(spread.low) > 1 else name
            fraction = f"{i.at_bounds[k]:>12.1%}" if name == "action" else ""
            lines.append(f"{label:<14}{''.join(f'{numbers[k]:>12.4g}' for numbers in spread)}{fraction}")
        lines += [f"{_numbered(name, constant)}: constant"] if constant else []
    return "\n".join([*lines, "", *([f"warning: {each}" for each in i.findings] or ["no findings"])])


def picture(inspection: Inspection, path: str | os.PathLike[str], task: Task) -> Path:
    """Draw returns, lengths and actions.

    Args:
        inspection: of the dataset.
        path: the PNG file, replaced if it exists.
        task: whose references give the behaviour's score.

    Raises:
        DataError: it can't be written.
    """
    from matplotlib.figure import Figure

    i, p, path = inspection, inspection.provenance, Path(path)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    returns, lengths, actions = figure.subplots(1, 3)
    returns.set(title=f"returns of {len(i.returns):,} complete episodes", ylabel="episodes")
    lengths.set(title="their lengths in steps", ylabel="episodes")
    for axes, values in ((returns, i.returns), (lengths, i.lengths)):
        axes.hist(values, bins=30)
        axes.ticklabel_format(useOffset=False)
    if p.return_mean is not None:
        score = task.score(p.return_mean)
        scored = "" if score is None else f", score {score:.1f} ({task.benchmark}'s references)"
        returns.axvline(p.return_mean, color="C1", label=f"mean {p.return_mean:,.1f}{scored}")
        returns.legend(fontsize=8)
    places = np.arange(len(i.at_bounds))
    actions.errorbar(places, i.actions.mean, i.actions.std, fmt="o", color="C0", label="mean ± std")
    actions.bar(places, i.at_bounds, color="C1", alpha=0.5, label="fraction at the bounds")
    actions.set(ylim=(-1.05, 1.05), xticks=places, title="actions in [-1, 1]")
    actions.legend(fontsize=8)
    figure.suptitle(f"{p.id or 'dataset'} ({p.source}), {p.transitions:,} transitions", fontsize=11)
    try:
        with aside(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error
    return path
