"""Transitions: the only form that data takes in cpql, checked once at the door.

D4RL keeps rows in the order they were collected and two flags that say how an episode ended:

    row          0     1     2  |  3     4     5  |  6     7
    terminals    .     .     X  |  .     .     .  |  .     .      the task ended: stops bootstrapping
    timeouts     .     .     .  |  .     .     X  |  .     .      the clock ran out: bootstraps as ever
    ends         .     .     X  |  .     .     X  |  .     X      last of its episode; row 7 is cut by
    complete     '--- yes ---'     '--- yes ---'     '- no '      the end of the data, with neither flag

A row with both flags was truncated: at the time limit D4RL lets the clock win.

Rows that don't join up, `next_observations[i] != observations[i + 1]`, end an episode whatever the flags
say: medium-expert files are two files laid end to end, and a row that was written twice doesn't lead to
itself. Without `timeouts` (`d4rl.qlearning_dataset`, old files) such a seam is the only sign of a time limit
and counts as a complete episode, short of the reward of the last step, which that function drops; with
`timeouts` it is a cut, and the episode isn't complete. Old files have neither `timeouts` nor
`next_observations`: there a time limit can only be counted, and `episode_limit` says how far.

Without `next_observations` each row takes the next row's observation, never across an episode's end: row 5
has no next observation and is dropped, so row 4 becomes the last of its episode; row 7 is dropped as well;
row 2 stays, with its own observation in the place that nothing reads. `time_limits="drop"` drops row 5
where there are next observations too: D4RL's own rule, for comparing with work that used it.

Columns are read in blocks of rows straight into one table, so that a file of many gigabytes never lies in
memory twice, and a batch is a single gather.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cpql.errors import DataError

__all__ = ["Batch", "Provenance", "Reading", "TimeLimits", "Transitions", "split"]

TimeLimits = Literal["keep", "drop"]


class Reading(TypedDict, total=False):
    """What neither arrays nor files say about themselves: keyword arguments of `Transitions.from_dict`.

    Attributes:
        time_limits: "drop" leaves out the rows at a time limit, as `d4rl.qlearning_dataset` does.
        episode_limit: where there are no `timeouts`, an episode is truncated after this many steps.
        action_low: the actions' lower bounds in the data, [A] or one for all; -1 by default.
        action_high: their upper bounds, 1 by default; actions are scaled from there to [-1, 1].
    """

    time_limits: TimeLimits
    episode_limit: int | None
    action_low: ArrayLike
    action_high: ArrayLike


# Actions that left [-1, 1] by rounding are clipped; beyond this they are in other units.
ACTION_TOLERANCE = 1e-3
BLOCK_BYTES = 1 << 20


class Batch(NamedTuple):
    """Transitions drawn for one update, float32; the leading axes are members, then the batch B.

    `discounts` is what the next state's value counts for, besides the agent's gamma: 0 where the task ended,
    else 1, or `gamma^(m - 1)` where the rewards are those of m steps.
    """

    observations: Tensor  # [..., B, S]
    actions: Tensor  # [..., B, A]
    rewards: Tensor  # [..., B]
    next_observations: Tensor  # [..., B, S]
    discounts: Tensor  # [..., B]


def split(rows: Tensor, state_dim: int, action_dim: int) -> Batch:
    """The columns of rows [..., S + A + S + 2], in the order of `Transitions.table`: views."""
    observations, actions, following, scalars = torch.split(rows, [state_dim, action_dim, state_dim, 2], -1)
    return Batch(observations, actions, scalars[..., 0], following, scalars[..., 1])


@dataclass(frozen=True)
class Provenance:
    """Where a dataset came from and what it holds.

    Attributes:
        source: "d4rl", "minari", "embedded", "file", "dict" or "stable-baselines3".
        id: the dataset's id, `hopper-medium-v2`.
        file: the file's name, without the folder.
        sha256: of the file.
        transitions: how many there are.
        episodes: how many of the episodes are complete. The figures below are over these, undiscounted,
            and None where there is none.
        return_mean: mean return.
        return_std: standard deviation of the returns.
        return_min: lowest return.
        return_max: highest return.
        length_mean: mean length in steps.
        details: what only this source knows, as JSON-able values.
    """

    source: str
    id: str
    file: str | None
    sha256: str | None
    transitions: int
    episodes: int
    return_mean: float | None
    return_std: float | None
    return_min: float | None
    return_max: float | None
    length_mean: float | None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as JSON-able values, without NaN."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """Say it in one line for people."""
        source = "embedded: self-collected, not D4RL" if self.source == "embedded" else self.source
        text = f"{self.id or 'dataset'} ({source}): {self.transitions:,} transitions"
        text += f", {self.episodes:,} complete episode{'' if self.episodes == 1 else 's'}"
        if self.return_mean is not None:
            text += (
                f", return {self.return_mean:,.1f} ± {self.return_std:,.1f}"
                f" ({self.return_min:,.1f} to {self.return_max:,.1f}), mean length {self.length_mean:,.0f}"
            )
        return text


@dataclass(frozen=True, eq=False, repr=False)
class Transitions:
    """A dataset of N transitions on one device. Build it with `from_dict`, which checks.

    Attributes:
        table: [N, S + A + S + 2] float32: observations, actions, next observations, rewards, discounts.
        state_dim: S, how many numbers an observation has.
        action_dim: A, how many numbers an action has.
        terminated: [N] bool, where the task ended and bootstrapping stops.
        truncated: [N] bool, where a time limit ended the episode.
        ends: [N] bool, the last transition of its episode: terminated, truncated or cut.
        provenance: where it came from.
        normalisation: mean and standard deviation [S] that observations were normalised with, or None.
    """

    table: Tensor
    state_dim: int
    action_dim: int
    terminated: Tensor
    truncated: Tensor
    ends: Tensor
    provenance: Provenance
    normalisation: tuple[Tensor, Tensor] | None = None

    @property
    def columns(self) -> Batch:
        """All of it as one batch of N: views of the table."""
        return split(self.table, self.state_dim, self.action_dim)

    @property
    def observations(self) -> Tensor:
        """[N, S]."""
        return self.columns.observations

    @property
    def actions(self) -> Tensor:
        """[N, A] in [-1, 1]."""
        return self.columns.actions

    @property
    def rewards(self) -> Tensor:
        """[N]."""
        return self.columns.rewards

    @property
    def next_observations(self) -> Tensor:
        """[N, S]."""
        return self.columns.next_observations

    def __len__(self) -> int:
        """N, how many transitions."""
        return len(self.table)

    def __repr__(self) -> str:
        """Say where the data came from rather than print it."""
        return f"Transitions({self.provenance.line()})"

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.table.device

    def to(self, device: torch.device | str) -> Transitions:
        """Give the same data on another device; itself where it is there already."""
        table = self.table.to(device)
        if table is self.table:
            return self
        flags = {name: getattr(self, name).to(device) for name in ("terminated", "truncated", "ends")}
        return dataclasses.replace(self, table=table, **flags)

    def sample(self, batch_size: int, generator: torch.Generator | Sequence[torch.Generator]) -> Batch:
        """Draw uniformly, with replacement, on the device.

        Args:
            batch_size: B.
            generator: on the same device as the data; from several, each member of a group draws its own
                batch, and the result has a leading axis for them.
        """
        if isinstance(generator, torch.Generator):
            rows = self.rows(batch_size, generator)
        else:
            draw = [
                torch.randint(len(self), (batch_size,), generator=g, device=self.device) for g in generator
            ]
            drawn = torch.stack(draw)
            rows = self.table.index_select(0, drawn.flatten()).view(*drawn.shape, -1)
        return split(rows, self.state_dim, self.action_dim)

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw rows of the table uniformly, with replacement, [count, ...]."""
        drawn = torch.randint(len(self), (count,), generator=generator, device=self.device)
        return self.table.index_select(0, drawn)

    def validate_for(self, state_dim: int, action_dim: int) -> None:
        """Check the widths against an environment's.

        Raises:
            DataError: one of them differs.
        """
        where = self.provenance.file or self.provenance.id or self.provenance.source
        for key, found, expected in (
            ("observations", self.state_dim, state_dim),
            ("actions", self.action_dim, action_dim),
        ):
            if found != expected:
                raise DataError(f"{where}: '{key}' is {found} wide: the environment has {expected}")

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """Give D4RL's six arrays back, as numpy: what `from_dict` takes.

        The last row of an episode that was cut has neither flag.
        """
        columns = self.columns
        tensors = {
            "observations": columns.observations,
            "actions": columns.actions,
            "rewards": columns.rewards,
            "terminals": self.terminated,
            "timeouts": self.truncated,
            "next_observations": columns.next_observations,
        }
        return {key: tensor.cpu().numpy() for key, tensor in tensors.items()}

    @classmethod
    def from_dict(
        cls,
        mapping: Mapping[str, Any],
        *,
        source: str = "dict",
        id: str = "",
        file: str | None = None,
        sha256: str | None = None,
        details: dict[str, Any] | None = None,
        time_limits: TimeLimits = "keep",
        episode_limit: int | None = None,
        action_low: ArrayLike = -1.0,
        action_high: ArrayLike = 1.0,
    ) -> Transitions:
        """Check a D4RL-like dict and make transitions of it, on the CPU.

        Args:
            mapping: observations [N, S], actions [N, A], rewards [N], terminals [N], and where known
                timeouts [N] and next_observations [N, S]: what `env.get_dataset()` or
                `d4rl.qlearning_dataset` return. [N, 1] will do for [N]; other keys are ignored. Arrays may be
                anything with a shape, a dtype and slices of rows: numpy's, torch's, h5py's datasets.
            source: see `Provenance`, as are the following.
            id: of the dataset.
            file: its name.
            sha256: its hash.
            details: more about the source.
            time_limits: see `Reading`, as are the following.
            episode_limit: steps of an episode, where there are no `timeouts`.
            action_low: the actions' lower bounds.
            action_high: their upper bounds.

        Raises:
            DataError: in one line, the first thing that is wrong.
        """
        where = file or id or source
        if time_limits not in ("keep", "drop"):
            raise DataError(f"{where}: time_limits={time_limits!r}: expected 'keep' or 'drop'")
        columns = {key: _Column(mapping, key, where) for key in REQUIRED}
        columns |= {key: _Column(mapping, key, where) for key in OPTIONAL if key in mapping}
        states, width = columns["observations"].table_width(), columns["actions"].table_width()
        rows = columns["observations"].rows
        for column in columns.values():
            if column.rows != rows:
                raise DataError(
                    f"{where}: '{column.key}' has {column.rows} rows: expected {rows}, as 'observations' has"
                )
        if rows == 0:
            raise DataError(f"{where}: 'observations' has 0 rows: expected at least one transition")
        given = columns.get("next_observations")
        if given is not None and given.table_width() != states:
            raise DataError(
                f"{where}: 'next_observations' is {given.table_width()} wide: "
                f"expected {states}, as 'observations' is"
            )
        terminals = columns["terminals"].flags()
        timeouts = columns["timeouts"].flags() if "timeouts" in columns else None

        table = _empty_table(rows, 2 * states + width + 2, where)
        of = {
            "observations": slice(0, states),
            "actions": slice(states, states + width),
            "next_observations": slice(states + width, 2 * states + width),
            "rewards": slice(2 * states + width, 2 * states + width + 1),
        }
        bounds = _bounds(action_low, action_high, width, where)
        for key in (key for key in of if key in columns):
            for block, part in columns[key].blocks():
                table[part, of[key]] = (
                    _scaled(block, part.start, bounds, where) if key == "actions" else block
                )

        following, observations = table[:, of["next_observations"]], table[:, of["observations"]]
        seams = np.zeros(rows, np.bool_)
        if given is not None:
            seams[:-1] = _seams(following, observations)
        if timeouts is not None:
            truncated = timeouts
        else:
            truncated = _limits(terminals | seams, episode_limit)
        terminated = terminals & ~truncated
        complete = terminals | truncated
        ends = complete | seams
        if timeouts is None:
            complete = ends.copy()
        keep = np.ones(rows, np.bool_)
        if given is None:
            following[:-1] = observations[1:]
            following[terminated] = observations[terminated]
            keep[-1] = terminated[-1]
        if given is None or time_limits == "drop":
            keep &= ~truncated
        ends[-1] = True
        # Before any row is dropped: an episode's return includes its last reward.
        statistics = _statistics(table[:, -2], ends, complete)
        table[:, -1] = ~terminated
        if not keep.all():
            if not keep.any():
                raise DataError(
                    f"{where}: no row has a next one in its episode: expected 'next_observations'"
                    if given is None
                    else f"{where}: every row is at a time limit, and time_limits=drop leaves none"
                )
            ends[:-1] |= ~keep[1:]
            table = _compacted(table, keep)
            terminated, truncated, ends = terminated[keep], truncated[keep], ends[keep]
        provenance = Provenance(
            source=source,
            id=id,
            file=file,
            sha256=sha256,
            transitions=len(table),
            details=dict(details or {}),
            **statistics,
        )
        return cls(
            table=torch.from_numpy(table),
            state_dim=states,
            action_dim=width,
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
            ends=torch.from_numpy(ends),
            provenance=provenance,
        )


REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")


class _Column:
    """One key of a mapping, looked at before it is read, then read in blocks of rows as float32."""

    def __init__(self, mapping: Mapping[str, Any], key: str, where: str) -> None:
        self.key, self.where = key, where
        if key not in mapping:
            found = ", ".join(sorted(map(str, mapping))) or "nothing"
            raise DataError(
                f"{where}: no '{key}', only {found}: expected observations, actions, rewards, terminals"
            )
        value = mapping[key]
        if not (hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype)):
            try:
                value = np.asarray(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(f"{where}: '{key}' isn't an array ({error}): expected numbers") from error
        if value.dtype.kind not in "biuf":
            raise DataError(f"{where}: '{key}' holds {value.dtype}: expected numbers")
        self.value: Any = value
        self.shape: tuple[int, ...] = tuple(value.shape or ())
        if not self.shape:
            raise DataError(f"{where}: '{key}' has shape []: expected a row for each transition")
        self.rows = self.shape[0]

    def table_width(self) -> int:
        """How wide it is, where it is a table."""
        if len(self.shape) != 2 or self.shape[1] == 0:
            raise DataError(
                f"{self.where}: '{self.key}' has shape {list(self.shape)}: expected [rows, width]"
            )
        return self.shape[1]

    def blocks(self) -> Iterator[tuple[NDArray[np.float32], slice]]:
        """Yield blocks [rows, width] that are finite, and which rows they are."""
        if len(self.shape) > 2 or (self.key == "rewards" and self.shape[1:] not in ((), (1,))):
            raise self._wants_a_column()
        width = self.shape[1] if len(self.shape) == 2 else 1
        size = max(1, BLOCK_BYTES // (4 * width))
        chunk = (getattr(self.value, "chunks", None) or (1,))[0]  # of HDF5: none is decompressed twice
        size = -(-size // chunk) * chunk
        for start in range(0, self.rows, size):
            part = slice(start, min(start + size, self.rows))
            with np.errstate(over="ignore"):
                block = np.asarray(self.value[part], np.float32).reshape(part.stop - start, width)
            # NaN and infinity survive a sum; a sum that merely overflows is looked into as well.
            with np.errstate(over="ignore", invalid="ignore"):
                suspicious = not np.isfinite(block.sum())
            if suspicious and not np.isfinite(block).all():
                raise self._not_finite(start + int((~np.isfinite(block)).any(1).argmax()))
            yield block, part

    def flags(self) -> NDArray[np.bool_]:
        """Read all of it as booleans [N]."""
        if self.shape[1:] not in ((), (1,)):
            raise self._wants_a_column()
        values = np.asarray(self.value[:]).reshape(self.rows)
        if values.dtype == np.bool_:
            return values.copy()
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise self._not_finite(int((~np.isfinite(values)).argmax()))
        flags: NDArray[np.bool_] = values != 0
        odd = flags & (values != 1)
        if odd.any():
            row = int(odd.argmax())
            raise DataError(
                f"{self.where}: '{self.key}' holds {values[row].item()!r} in row {row}: expected 0 or 1"
            )
        return flags

    def _wants_a_column(self) -> DataError:
        shape = list(self.shape)
        return DataError(f"{self.where}: '{self.key}' has shape {shape}: expected [rows] or [rows, 1]")

    def _not_finite(self, row: int) -> DataError:
        return DataError(
            f"{self.where}: '{self.key}' holds NaN or infinity, first in row {row}: expected finite numbers"
        )


def _empty_table(rows: int, width: int, where: str) -> NDArray[np.float32]:
    need = 4 * rows * width
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    try:
        if need > have:
            raise MemoryError
        return np.empty((rows, width), np.float32)
    except MemoryError:
        raise DataError(
            f"{where}: {rows:,} transitions need {need / 2**30:,.1f} GiB of memory: "
            f"the machine has {have / 2**30:,.1f}"
        ) from None


def _bounds(low: ArrayLike, high: ArrayLike, width: int, where: str) -> NDArray[np.float32] | None:
    """Lower bounds and widths [2, A] to scale actions from, or None where they are in [-1, 1] already."""
    both = [np.asarray(low, np.float32), np.asarray(high, np.float32)]
    for bound in both:
        if bound.shape not in ((), (width,)):
            raise DataError(f"{where}: 'actions' is {width} wide: expected {bound.size}, as their bounds are")
    stacked = np.stack([np.broadcast_to(bound, (width,)) for bound in both])
    if not (np.isfinite(stacked).all() and (stacked[0] < stacked[1]).all()):
        raise DataError(
            f"{where}: actions between {low!r} and {high!r}: expected finite bounds, lower below upper"
        )
    if (stacked[0] == -1).all() and (stacked[1] == 1).all():
        return None
    return stacked


def _scaled(
    block: NDArray[np.float32], start: int, bounds: NDArray[np.float32] | None, where: str
) -> NDArray[np.float32]:
    """Actions in [-1, 1], or an error that names the first that is out of bounds."""
    unit = block if bounds is None else 2 * (block - bounds[0]) / (bounds[1] - bounds[0]) - 1
    reach = max(float(unit.max()), -float(unit.min()))
    if reach <= 1:
        return unit
    if reach > 1 + ACTION_TOLERANCE:
        row = int((np.abs(unit).max(1) > 1 + ACTION_TOLERANCE).argmax())
        worst = block[row, np.abs(unit[row]).argmax()]
        expected = "[-1, 1]" if bounds is None else "the environment's bounds"
        raise DataError(f"{where}: 'actions' reaches {worst:.6g} in row {start + row}: expected {expected}")
    return unit.clip(-1, 1)


def _seams(following: NDArray[np.float32], observations: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a row doesn't lead to the one after it, [N - 1]."""
    seams = np.empty(len(observations) - 1, np.bool_)
    size = max(1, BLOCK_BYTES // (4 * observations.shape[1]))
    for start in range(0, len(seams), size):
        part = slice(start, min(start + size, len(seams)))
        here, there = following[part], observations[part.start + 1 : part.stop + 1]
        apart = (here != there).any(1)
        rows = np.flatnonzero(apart)
        # Few rows differ at all; files that were rounded on the way may still join up.
        apart[rows] = ~np.isclose(here[rows], there[rows], rtol=1e-5, atol=1e-6).all(1)
        seams[part] = apart
    return seams


def _limits(ends: NDArray[np.bool_], limit: int | None) -> NDArray[np.bool_]:
    """Where episodes reach the limit, counted in steps from the last end."""
    if limit is None:
        return np.zeros(len(ends), np.bool_)
    rows = np.arange(len(ends))
    starts = np.maximum.accumulate(np.where(np.concatenate([[True], ends[:-1]]), rows, 0))
    reached: NDArray[np.bool_] = (rows - starts) % limit == limit - 1
    return reached


def _compacted(table: NDArray[np.float32], keep: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Move the kept rows to the front of the same memory, and give those."""
    size = max(1, BLOCK_BYTES // (4 * table.shape[1]))
    end = 0
    for start in range(0, len(table), size):
        kept = table[start : start + size][keep[start : start + size]]
        table[end : end + len(kept)] = kept
        end += len(kept)
    return table[:end]


def _statistics(
    rewards: NDArray[np.float32], ends: NDArray[np.bool_], complete: NDArray[np.bool_]
) -> dict[str, Any]:
    """Count the complete episodes and describe their returns; `complete` is read at the ends."""
    episode: NDArray[np.int64] = np.cumsum(ends) - ends
    whole = complete[ends]
    returns = np.bincount(episode, weights=rewards)[whole]
    lengths = np.bincount(episode)[whole]
    if not len(returns):
        names = ("return_mean", "return_std", "return_min", "return_max", "length_mean")
        return {"episodes": 0} | dict.fromkeys(names)
    return {
        "episodes": len(returns),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "length_mean": float(lengths.mean()),
    }
