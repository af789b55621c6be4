"""Transitions: the only form that data takes in cpql, checked once at the door.

D4RL keeps rows in the order they were collected and two flags that say how an episode ended:

    row          0     1     2  |  3     4     5  |  6     7
    terminals    .     .     X  |  .     .     .  |  .     .      the task ended: stops bootstrapping
    timeouts     .     .     .  |  .     .     X  |  .     .      the clock ran out: bootstraps as ever
    ends         .     .     X  |  .     .     X  |  .     X      last of its episode; row 7 is cut by
    complete     '--- yes ---'     '--- yes ---'     '- no '      the end of the data, with neither flag

A row with both flags was truncated: at the time limit D4RL lets the clock win.

Rows that don't join up, `next_observations[i] != observations[i + 1]`, end an episode whatever the flags
say: medium-expert files are two files laid end to end. Without `timeouts` (`d4rl.qlearning_dataset`) such
a seam is the only sign of a time limit and counts as a complete episode, short of the reward of the last
step, which that function drops; with `timeouts` it is a cut, and the episode isn't complete.

Without `next_observations` each row takes the next row's observation, never across an episode's end: row 5
has no next observation and is dropped, so row 4 becomes the last of its episode; row 7 is dropped as well;
row 2 stays, with its own observation in the place that nothing reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpql.errors import DataError

__all__ = ["Batch", "Provenance", "Transitions"]

# Actions that left [-1, 1] by rounding are clipped; beyond this they are in other units.
ACTION_TOLERANCE = 1e-3


class Batch(NamedTuple):
    """Transitions drawn for one update, float32; the leading axes are members, then the batch B."""

    observations: Tensor  # [..., B, S]
    actions: Tensor  # [..., B, A]
    rewards: Tensor  # [..., B]
    next_observations: Tensor  # [..., B, S]
    terminated: Tensor  # [..., B]


@dataclass(frozen=True)
class Provenance:
    """Where a dataset came from and what it holds.

    Attributes:
        source: "d4rl", "embedded", "file" or "dict".
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
        observations: [N, S].
        actions: [N, A] in [-1, 1].
        rewards: [N].
        next_observations: [N, S].
        terminated: [N] float32, 1 where the task ended and bootstrapping stops.
        ends: [N] bool, the last transition of its episode: terminated, truncated or cut.
        provenance: where it came from.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    ends: Tensor
    provenance: Provenance
    _table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Lay the columns in one table, so that a batch is a single gather; the fields become views of it."""
        flat = (self.rewards[:, None], self.terminated[:, None])
        table = torch.cat([self.observations, self.actions, self.next_observations, *flat], 1)
        batch = self._split(table)
        for name, column in zip(Batch._fields, batch, strict=True):
            object.__setattr__(self, name, column)
        object.__setattr__(self, "_table", table)

    def _split(self, rows: Tensor) -> Batch:
        states, actions = self.observations.shape[1], self.actions.shape[1]
        observations, action, following, scalars = torch.split(rows, [states, actions, states, 2], -1)
        return Batch(observations, action, scalars[..., 0], following, scalars[..., 1])

    def __len__(self) -> int:
        """N, how many transitions."""
        return len(self._table)

    def __repr__(self) -> str:
        """Say where the data came from rather than print it."""
        return f"Transitions({self.provenance.line()})"

    @property
    def state_dim(self) -> int:
        """S, how many numbers an observation has."""
        return self.observations.shape[1]

    @property
    def action_dim(self) -> int:
        """A, how many numbers an action has."""
        return self.actions.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self._table.device

    def to(self, device: torch.device | str) -> Transitions:
        """Give the same data on another device; itself where it is there already."""
        if self._table.to(device) is self._table:
            return self
        return dataclasses.replace(
            self,
            ends=self.ends.to(device),
            **{name: getattr(self, name).to(device) for name in Batch._fields},
        )

    def sample(self, batch_size: int, generator: torch.Generator, members: tuple[int, ...] = ()) -> Batch:
        """Draw uniformly, with replacement, on the device.

        Args:
            batch_size: B.
            generator: on the same device as the data.
            members: leading axes; each member gets a batch of its own.
        """
        shape = (*members, batch_size)
        rows = torch.randint(len(self), shape, generator=generator, device=self.device)
        return self._split(self._table.index_select(0, rows.flatten()).view(*shape, -1))

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
    ) -> Transitions:
        """Check a D4RL-like dict and make transitions of it, on the CPU.

        Args:
            mapping: observations [N, S], actions [N, A], rewards [N], terminals [N], and where known
                timeouts [N] and next_observations [N, S]: what `env.get_dataset()` or
                `d4rl.qlearning_dataset` return. [N, 1] will do for [N]; other keys are ignored.
            source: see `Provenance`, as are the following.
            id: of the dataset.
            file: its name.
            sha256: its hash.
            details: more about the source.

        Raises:
            DataError: in one line, the first thing that is wrong.
        """
        where = file or id or source
        observations = _table(mapping, "observations", where)
        actions = _table(mapping, "actions", where)
        rewards = _column(mapping, "rewards", where)
        terminals = _flags(mapping, "terminals", where)
        timeouts = _flags(mapping, "timeouts", where) if "timeouts" in mapping else None
        following = _table(mapping, "next_observations", where) if "next_observations" in mapping else None

        rows = len(observations)
        lengths = {"actions": actions, "rewards": rewards, "terminals": terminals}
        for key, array in (lengths | {"timeouts": timeouts, "next_observations": following}).items():
            if array is not None and len(array) != rows:
                raise DataError(
                    f"{where}: '{key}' has {len(array)} rows: expected {rows}, as 'observations' has"
                )
        if rows == 0:
            raise DataError(f"{where}: 'observations' has 0 rows: expected at least one transition")
        if following is not None and following.shape != observations.shape:
            raise DataError(
                f"{where}: 'next_observations' is {following.shape[1]} wide: "
                f"expected {observations.shape[1]}, as 'observations' is"
            )
        beyond = np.abs(actions).max(1) - 1
        if beyond.max() > ACTION_TOLERANCE:
            row = int((beyond > ACTION_TOLERANCE).argmax())
            raise DataError(
                f"{where}: 'actions' reaches ±{1 + beyond[row]:.6g} in row {row}: expected [-1, 1]"
            )
        actions = actions.clip(-1, 1)

        truncated = np.zeros(rows, np.bool_) if timeouts is None else timeouts
        terminated = terminals & ~truncated
        ends = terminals | truncated
        complete = ends.copy()
        keep = np.ones(rows, np.bool_)
        if following is not None:
            seams = ~np.isclose(following[:-1], observations[1:], rtol=1e-5, atol=1e-6).all(1)
            ends[:-1] |= seams
            if timeouts is None:
                complete[:-1] |= seams
        else:
            following = np.roll(observations, -1, axis=0)
            following[terminated] = observations[terminated]
            keep = ~truncated
            keep[-1] = terminated[-1]
        ends[-1] = True
        # Before any row is dropped: an episode's return includes its last reward.
        statistics = _statistics(rewards, ends, complete)
        if not keep.all():
            ends[:-1] |= ~keep[1:]
            if not keep.any():
                raise DataError(
                    f"{where}: no row has a next one in its episode: expected 'next_observations'"
                )
            observations, actions, rewards = observations[keep], actions[keep], rewards[keep]
            following, terminated, ends = following[keep], terminated[keep], ends[keep]
        provenance = Provenance(
            source=source,
            id=id,
            file=file,
            sha256=sha256,
            transitions=len(rewards),
            details=dict(details or {}),
            **statistics,
        )
        return cls(
            observations=torch.from_numpy(observations),
            actions=torch.from_numpy(actions),
            rewards=torch.from_numpy(rewards),
            next_observations=torch.from_numpy(following),
            terminated=torch.from_numpy(terminated.astype(np.float32)),
            ends=torch.from_numpy(ends),
            provenance=provenance,
        )


def _numbers(mapping: Mapping[str, Any], key: str, where: str) -> NDArray[np.float32]:
    """One key as float32, all of it finite."""
    if key not in mapping:
        found = ", ".join(sorted(map(str, mapping))) or "nothing"
        raise DataError(
            f"{where}: no '{key}', only {found}: expected observations, actions, rewards, terminals"
        )
    try:
        array = np.asarray(mapping[key])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: '{key}' isn't an array ({error}): expected numbers") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: '{key}' holds {array.dtype}: expected numbers")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32).reshape(array.shape)
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(bad.reshape(len(bad), -1).any(1).argmax()) if array.ndim else 0
        found = f"{int(bad.sum())} NaN or infinite numbers, first in row {row}"
        raise DataError(f"{where}: '{key}' holds {found}: expected finite ones")
    return array


def _table(mapping: Mapping[str, Any], key: str, where: str) -> NDArray[np.float32]:
    array = _numbers(mapping, key, where)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"{where}: '{key}' has shape {list(array.shape)}: expected [rows, width]")
    return array


def _column(mapping: Mapping[str, Any], key: str, where: str) -> NDArray[np.float32]:
    array = _numbers(mapping, key, where)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{where}: '{key}' has shape {list(array.shape)}: expected [rows] or [rows, 1]")
    return array


def _flags(mapping: Mapping[str, Any], key: str, where: str) -> NDArray[np.bool_]:
    array = _column(mapping, key, where)
    odd = (array != 0) & (array != 1)
    if odd.any():
        row = int(odd.argmax())
        raise DataError(f"{where}: '{key}' holds {array[row]:.6g} in row {row}: expected 0 or 1")
    flags: NDArray[np.bool_] = array == 1
    return flags


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
