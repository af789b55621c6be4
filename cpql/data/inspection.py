"""What a dataset is like: counts, returns, ranges, and what should make its owner look twice.

`inspect` takes any `Transitions`, in a few seconds for two million; `describe` says what it found as text,
`picture` draws it. Findings are warnings: such data can be trained on, and some of it is meant to be so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpql.data.transitions import Provenance, Transitions
from cpql.errors import DataError
from cpql.io import aside
from cpql.tasks import Task

__all__ = ["Inspection", "Spread", "describe", "inspect", "picture"]

Numbers = NDArray[np.float64]

# An action this near to a bound of [-1, 1] is at it.
AT_BOUND = 1e-3
# Shares of the rows above which they are a finding.
MANY_DUPLICATES = 0.01
MANY_AT_BOUNDS = 0.5
MANY_SEAMS = 0.5
BLOCK_ROWS = 1 << 14
BINS = 10
BAR = 40


@dataclass(frozen=True, eq=False)
class Spread:
    """How each of W numbers is spread over the transitions.

    Attributes:
        low: lowest [W].
        high: highest [W].
        mean: mean [W].
        std: standard deviation [W].
    """

    low: Numbers
    high: Numbers
    mean: Numbers
    std: Numbers

    @property
    def constant(self) -> list[int]:
        """Which of the numbers never change."""
        return [int(k) for k in np.flatnonzero(self.low == self.high)]

    def part(self, start: int, stop: int) -> Spread:
        """The numbers from `start` to before `stop`."""
        return Spread(*(x[start:stop] for x in (self.low, self.high, self.mean, self.std)))


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a dataset is like.

    Attributes:
        provenance: where it came from, and the returns of its complete episodes.
        episodes: how many there are, complete or not.
        terminated: how many ended because the task did.
        truncated: how many ended at a time limit.
        unflagged: how many ended with neither flag: cut by the data's end, where rows don't join up, or, in
            data without next observations, short of the step at a time limit.
        returns: undiscounted [E], of the complete episodes as far as rows tell.
        lengths: of the same [E], in steps.
        observations: spread of each of the S numbers.
        actions: spread of each of the A numbers, in [-1, 1].
        at_bounds: share of the rows [A] in which an action is within 0.001 of -1 or 1.
        rewards: spread of the one number.
        duplicates: how many rows equal an earlier one in every number.
        findings: what should make the owner look twice, a clause each.
    """

    provenance: Provenance
    episodes: int
    terminated: int
    truncated: int
    unflagged: int
    returns: Numbers
    lengths: NDArray[np.int64]
    observations: Spread
    actions: Spread
    at_bounds: Numbers
    rewards: Spread
    duplicates: int
    findings: tuple[str, ...]


def inspect(data: Transitions) -> Inspection:
    """Look at all of a dataset; a few passes over it, and one sort of a number a row."""
    data = data.to("cpu")
    table: NDArray[np.float32] = data.table.numpy()
    terminated, truncated, ends = (x.numpy() for x in (data.terminated, data.truncated, data.ends))
    flagged = terminated | truncated
    unflagged = ends & ~flagged
    returns, lengths = _episodes(table[:, -2], ends, flagged, data.provenance.episodes)
    spread = _spread(table)
    first, last = data.state_dim, data.state_dim + data.action_dim
    observations, actions, rewards = (
        spread.part(0, first),
        spread.part(first, last),
        spread.part(table.shape[1] - 2, table.shape[1] - 1),
    )
    at_bounds = np.count_nonzero(np.abs(table[:, first:last]) >= 1 - AT_BOUND, axis=0) / len(table)
    duplicates = _duplicates(table)

    findings = []
    if duplicates > MANY_DUPLICATES * len(table):
        findings.append(f"{duplicates:,} rows ({duplicates / len(table):.1%}) repeat an earlier one")
    inside = ~flagged[:-1]
    seams = int(unflagged[:-1].sum())
    if seams > MANY_SEAMS * inside.sum():
        findings.append(
            f"{seams:,} of {int(inside.sum()):,} rows without a flag don't lead to the next row: shuffled, "
            "or next_observations in another order"
        )
    if not flagged.any():
        findings.append("no row is terminal or at a time limit")
    if not data.provenance.episodes:
        findings.append("no episode is complete: the behaviour has no return and no score")
    if rewards.constant:
        findings.append(f"all rewards are {rewards.low[0]:g}")
    for name, of in (("observation", observations), ("action", actions)):
        if of.constant:
            findings.append(f"{_named(name, of.constant)} of {len(of.low)}: always the same value")
    for k in np.flatnonzero(at_bounds > MANY_AT_BOUNDS):
        findings.append(f"action {k} is at its bounds in {at_bounds[k]:.1%} of the rows")
    return Inspection(
        provenance=data.provenance,
        episodes=int(ends.sum()),
        terminated=int(terminated.sum()),
        truncated=int(truncated.sum()),
        unflagged=int(unflagged.sum()),
        returns=returns,
        lengths=lengths,
        observations=observations,
        actions=actions,
        at_bounds=at_bounds,
        rewards=rewards,
        duplicates=duplicates,
        findings=tuple(findings),
    )


def _episodes(
    rewards: NDArray[np.float32], ends: NDArray[np.bool_], flagged: NDArray[np.bool_], complete: int
) -> tuple[Numbers, NDArray[np.int64]]:
    """Returns and lengths of the complete episodes.

    Those that ended with a flag, unless the provenance counts more: then the rows that carried the flags were
    dropped, or there were no `timeouts` and seams stand for them, and only an end of the data is incomplete.
    """
    episode: NDArray[np.int64] = np.cumsum(ends) - ends
    returns = np.bincount(episode, weights=rewards).astype(np.float64)
    lengths = np.bincount(episode).astype(np.int64)
    whole = flagged[ends]
    if whole.sum() < complete:
        whole = np.ones_like(whole)
        whole[-1] = complete >= len(whole)
    return returns[whole], lengths[whole]


def _spread(table: NDArray[np.float32]) -> Spread:
    """The spread of each column, in float64 and in blocks, so that the table isn't there twice."""
    blocks = [table[start : start + BLOCK_ROWS] for start in range(0, len(table), BLOCK_ROWS)]
    low = np.min([block.min(0) for block in blocks], 0).astype(np.float64)
    high = np.max([block.max(0) for block in blocks], 0).astype(np.float64)
    mean = np.sum([block.sum(0, dtype=np.float64) for block in blocks], 0) / len(table)
    square = np.sum([((block - mean) ** 2).sum(0) for block in blocks], 0) / len(table)
    return Spread(low, high, mean, np.sqrt(square))


def _duplicates(table: NDArray[np.float32]) -> int:
    """How many rows equal an earlier one, bit by bit.

    Rows are sorted by a hash, their bits times random odd numbers summed modulo 2^64, and only neighbours
    with the same hash are compared.
    """
    random = np.random.default_rng(0)
    odd = random.integers(2**64, size=table.shape[1], dtype=np.uint64) | np.uint64(1)
    bits = table.view(np.uint32)
    hashes = np.concatenate(
        [
            bits[start : start + BLOCK_ROWS].astype(np.uint64) @ odd
            for start in range(0, len(bits), BLOCK_ROWS)
        ]
    )
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    return sum(
        int((bits[order[part]] == bits[order[part + 1]]).all(1).sum())
        for part in (alike[start : start + BLOCK_ROWS] for start in range(0, len(alike), BLOCK_ROWS))
    )


def _named(name: str, which: Sequence[int]) -> str:
    """Name numbers by their places, runs of them in short: `observations 3, 27 to 110`."""
    runs: list[list[int]] = []
    for k in which:
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    places = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{name}{'' if len(which) == 1 else 's'} {', '.join(places)}"


def describe(inspection: Inspection, task: Task | None = None) -> str:
    """Say what a dataset is like, in lines for people.

    Args:
        inspection: of the dataset.
        task: whose references give the behaviour's score; None where there is none.
    """
    i = inspection
    p = i.provenance
    lines = [p.line()]
    if p.file:
        lines.append(f"file       {p.file}, SHA-256 {p.sha256}")
    lines.append(
        f"episodes   {i.episodes:,}: {i.terminated:,} terminated, {i.truncated:,} truncated, "
        f"{i.unflagged:,} without a flag; {p.episodes:,} complete"
    )
    lines += _score(p, task)
    if len(i.returns):
        lines += ["", f"returns of {len(i.returns):,} complete episodes, lengths {_lengths(i.lengths)}"]
        lines += _histogram(i.returns)
    lines += ["", f"{'':14}{'mean':>12}{'std':>12}{'lowest':>12}{'highest':>12}{'at bounds':>12}"]
    lines += _rows("reward", i.rewards)
    lines += _rows("action", i.actions, i.at_bounds)
    lines += _rows("observation", i.observations)
    lines += ["", *(f"warning: {finding}" for finding in i.findings)] if i.findings else ["", "no findings"]
    return "\n".join(lines)


def _score(provenance: Provenance, task: Task | None) -> list[str]:
    if task is None or provenance.return_mean is None:
        return []
    lines = []
    score = task.score(provenance.return_mean)
    if score is None:
        lines.append("score      none: there are no reference returns for these data")
    else:
        lines.append(
            f"score      {score:.1f} is the behaviour's, by {task.benchmark}'s references: "
            f"0 is a return of {task.random_return:,.1f}, 100 of {task.expert_return:,.1f}"
        )
    if task.note:
        lines.append(f"note       {task.note}")
    return lines


def _lengths(lengths: NDArray[np.int64]) -> str:
    return f"{lengths.min():,} to {lengths.max():,}, mean {lengths.mean():,.1f}"


def _histogram(returns: Numbers) -> list[str]:
    counts, edges = np.histogram(returns, bins=BINS if returns.min() < returns.max() else 1)
    if len(counts) == 1:
        edges = np.array([returns[0], returns[0]])
    return [
        f"{low:>12,.1f} to {high:>12,.1f}{count:>9,}  {'#' * -(-BAR * count // counts.max())}".rstrip()
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]


def _rows(name: str, spread: Spread, at_bounds: Numbers | None = None) -> list[str]:
    """A row for each number that changes, and one for all that don't."""
    constant, lines = spread.constant, []
    for k in (k for k in range(len(spread.low)) if k not in constant):
        figures = (spread.mean[k], spread.std[k], spread.low[k], spread.high[k])
        label = f"{name} {k}" if len(spread.low) > 1 else name
        share = "" if at_bounds is None else f"{at_bounds[k]:>12.1%}"
        lines.append(f"{label:<14}{''.join(f'{x:>12.4g}' for x in figures)}{share}")
    return [*lines, f"{_named(name, constant)}: constant"] if constant else lines


def picture(inspection: Inspection, path: str | os.PathLike[str], task: Task | None = None) -> Path:
    """Draw returns, lengths and actions, as a PNG.

    Args:
        inspection: of the dataset.
        path: of the PNG; replaced in one move.
        task: whose references are drawn beside the returns; None where there is none.

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
        axes.set_title(title)
        axes.set_ylabel("episodes")
        axes.ticklabel_format(useOffset=False)
    if p.return_mean is not None:
        score = task.score(p.return_mean) if task else None
        said = "" if task is None or score is None else f", score {score:.1f} ({task.benchmark}'s references)"
        returns.axvline(p.return_mean, color="C1", label=f"mean {p.return_mean:,.1f}{said}")
        returns.legend(fontsize=8)
    places = np.arange(len(i.at_bounds))
    actions.errorbar(places, i.actions.mean, i.actions.std, fmt="o", color="C0", label="mean ± std")
    actions.bar(places, i.at_bounds, color="C1", alpha=0.5, label="share at the bounds")
    actions.set_ylim(-1.05, 1.05)
    actions.set_xticks(places)
    actions.set_title("actions in [-1, 1]")
    actions.legend(fontsize=8)
    figure.suptitle(f"{p.id or 'dataset'} ({p.source}), {p.transitions:,} transitions", fontsize=11)
    try:
        with aside(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error
    return path
