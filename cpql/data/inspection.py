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
BLOCK_ROWS = 1 << 14
BINS = 10
BAR = 40  # characters


class Spread(NamedTuple):
    """Lowest, highest, mean and standard deviation of each of W numbers over the transitions, [W] each."""

    low: Numbers
    high: Numbers
    mean: Numbers
    std: Numbers

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
        duplicates: the number of rows that equal an earlier one in every number.
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
        complete = self.provenance.episodes
        self.returns, self.lengths = _complete_episodes(table[:, -2], ends, flagged, complete)
        actions = slice(data.state_dim, data.state_dim + data.action_dim)
        spread = _spread(table)
        self.observations, self.actions, self.rewards = (
            Spread(*(numbers[part] for numbers in spread))
            for part in (slice(data.state_dim), actions, slice(-2, -1))
        )
        self.at_bounds = np.count_nonzero(np.abs(table[:, actions]) >= 1 - AT_BOUND, axis=0) / len(table)
        self.duplicates = _duplicates(table)
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


def _complete_episodes(
    rewards: NDArray[np.float32], ends: NDArray[np.bool_], flagged: NDArray[np.bool_], complete: int
) -> tuple[Numbers, NDArray[np.int64]]:
    """Returns and lengths of the complete episodes: those that end with a flag.

    The provenance may count more, if the rows with the flags were dropped or if there were no `timeouts` and
    seams stand for them. Then only an episode cut by the end of the data is incomplete.
    """
    episode: NDArray[np.int64] = np.cumsum(ends) - ends
    returns = np.bincount(episode, weights=rewards).astype(np.float64)
    lengths = np.bincount(episode).astype(np.int64)
    whole = flagged[ends]
    if whole.sum() < complete:
        whole = np.arange(len(whole)) < max(complete, len(whole) - 1)
    return returns[whole], lengths[whole]


def _blocks(table: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Views of the rows, so that no copy is larger than a block."""
    return [table[start : start + BLOCK_ROWS] for start in range(0, len(table), BLOCK_ROWS)]


def _spread(table: NDArray[np.float32]) -> Spread:
    """The spread of each column, in float64."""
    blocks = _blocks(table)
    low = np.min([block.min(0) for block in blocks], 0).astype(np.float64)
    high = np.max([block.max(0) for block in blocks], 0).astype(np.float64)
    mean = np.sum([block.sum(0, dtype=np.float64) for block in blocks], 0) / len(table)
    square = np.sum([((block - mean) ** 2).sum(0) for block in blocks], 0) / len(table)
    return Spread(low, high, mean, np.sqrt(square))


def _duplicates(table: NDArray[np.float32]) -> int:
    """The number of rows that equal an earlier one, bit by bit.

    Rows are sorted by a hash, their bits times random odd numbers summed modulo 2^64, and only neighbours
    with the same hash are compared.
    """
    odd = np.random.default_rng(0).integers(2**64, size=table.shape[1], dtype=np.uint64) | np.uint64(1)
    hashes = np.concatenate([block.view(np.uint32).astype(np.uint64) @ odd for block in _blocks(table)])
    bits, order = table.view(np.uint32), np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    parts = (alike[start : start + BLOCK_ROWS] for start in range(0, len(alike), BLOCK_ROWS))
    return sum(int((bits[order[part]] == bits[order[part + 1]]).all(1).sum()) for part in parts)


def _numbered(name: str, which: Sequence[int]) -> str:
    """Name numbers by their indices, with runs in short: `observations 3, 27 to 110`."""
    runs = np.split(np.array(which), np.flatnonzero(np.diff(which) > 1) + 1)
    places = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{name}{'' if len(which) == 1 else 's'} {', '.join(places)}"


def describe(inspection: Inspection, task: Task | None = None) -> str:
    """Put an inspection into lines of text; a task's references give the behaviour's score."""
    i, p = inspection, inspection.provenance
    lines = [p.line()]
    if p.file:
        lines.append(f"file       {p.file}, SHA-256 {p.sha256}")
    lines.append(
        f"episodes   {i.episodes:,}: {i.terminated:,} terminated, {i.truncated:,} truncated, "
        f"{i.unflagged:,} without a flag; {p.episodes:,} complete"
    )
    if task is not None and p.return_mean is not None:
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
        lines += [
            "",
            f"returns of {len(i.returns):,} complete episodes, lengths {low:,} to {high:,}, mean {mean:,.1f}",
            *_histogram(i.returns),
        ]
    lines += ["", f"{'':14}{'mean':>12}{'std':>12}{'lowest':>12}{'highest':>12}{'at bounds':>12}"]
    lines += [*_rows("reward", i.rewards), *_rows("action", i.actions, i.at_bounds)]
    lines += _rows("observation", i.observations)
    return "\n".join([*lines, "", *([f"warning: {each}" for each in i.findings] or ["no findings"])])


def _histogram(returns: Numbers) -> list[str]:
    varied = returns.min() < returns.max()
    counts, edges = np.histogram(returns, bins=BINS if varied else 1)
    edges = edges if varied else returns[:1].repeat(2)
    return [
        f"{low:>12,.1f} to {high:>12,.1f}{count:>9,}  {'#' * -(-BAR * count // counts.max())}".rstrip()
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]


def _rows(name: str, spread: Spread, at_bounds: Numbers | None = None) -> list[str]:
    """A row for each number that changes, and one for all that don't."""
    constant, lines = spread.constant, []
    for k in (k for k in range(len(spread.low)) if k not in constant):
        label = f"{name} {k}" if len(spread.low) > 1 else name
        cells = (f"{numbers[k]:>12.4g}" for numbers in (spread.mean, spread.std, spread.low, spread.high))
        fraction = "" if at_bounds is None else f"{at_bounds[k]:>12.1%}"
        lines.append(f"{label:<14}{''.join(cells)}{fraction}")
    return [*lines, f"{_numbered(name, constant)}: constant"] if constant else lines


def picture(inspection: Inspection, path: str | os.PathLike[str], task: Task | None = None) -> Path:
    """Draw returns, lengths and actions.

    Args:
        inspection: of the dataset.
        path: the PNG file, replaced if it exists.
        task: whose references give the behaviour's score; None if there is none.

    Raises:
        DataError: it can't be written.
    """
    from matplotlib.figure import Figure

    i, p, path = inspection, inspection.provenance, Path(path)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    returns, lengths, actions = figure.subplots(1, 3)
    for axes, values, title in (
        (returns, i.returns, f"returns of {len(i.returns):,} complete episodes"),
        (lengths, i.lengths, "their lengths in steps"),
    ):
        if len(values):
            axes.hist(values, bins=30, color="C0")
        else:
            axes.text(0.5, 0.5, "no episode is complete", ha="center", transform=axes.transAxes)
        axes.set(title=title, ylabel="episodes")
        axes.ticklabel_format(useOffset=False)
    if p.return_mean is not None:
        label = f"mean {p.return_mean:,.1f}"
        if task is not None and (score := task.score(p.return_mean)) is not None:
            label += f", score {score:.1f} ({task.benchmark}'s references)"
        returns.axvline(p.return_mean, color="C1", label=label)
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
