"""Transitions: the only form of data in cpql, checked once when they are made.

D4RL keeps rows in the order they were collected and two flags that say how an episode ended:

    row          0     1     2  |  3     4     5  |  6     7
    terminals    .     .     X  |  .     .     .  |  .     .      the task ended: stops bootstrapping
    timeouts     .     .     .  |  .     .     X  |  .     .      the time limit was reached: bootstraps
    ends         .     .     X  |  .     .     X  |  .     X      last of its episode; row 7 is cut by
    complete     '--- yes ---'     '--- yes ---'     '- no '      the end of the data, with neither flag

A row with both flags counts as truncated, as in D4RL.

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

Columns are read straight into one table, so that a batch is a single gather.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cpql.data import rows
from cpql.errors import DataError

__all__ = ["Batch", "Provenance", "Reading", "Rows", "TimeLimits", "Transitions", "join", "split"]

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


class Batch(NamedTuple):
    """Transitions drawn for one update, float32; the leading axes are members, then the batch B.

    `discounts` is the weight of the next state's value, besides the agent's gamma: 0 where the task ended,
    else 1, or `gamma^(m - 1)` where the rewards are those of m steps. `next_actions` are the data's actions
    at the next observations, NaN where they aren't known; see `cpql.data.transforms.next_actions`.
    """

    observations: Tensor  # [..., B, S]
    actions: Tensor  # [..., B, A]
    rewards: Tensor  # [..., B]
    next_observations: Tensor  # [..., B, S]
    discounts: Tensor  # [..., B]
    next_actions: Tensor | None = None  # [..., B, A]


def split(rows: Tensor, state_dim: int, action_dim: int) -> Batch:
    """The columns of rows [..., S + A + S + 2 (+ A)], in the order of `Transitions.table`: views."""
    widths = [state_dim, action_dim, state_dim, 2]
    *parts, more = torch.split(rows, [*widths, rows.shape[-1] - sum(widths)], -1)
    observations, actions, next_observations, scalars = parts
    next_actions = more if more.shape[-1] else None
    return Batch(observations, actions, scalars[..., 0], next_observations, scalars[..., 1], next_actions)


def join(batch: Batch) -> Tensor:
    """Rows [..., S + A + S + 2 (+ A)] of a batch: the inverse of `split`."""
    scalars = torch.stack([batch.rewards, batch.discounts], -1)
    more = [] if batch.next_actions is None else [batch.next_actions]
    return torch.cat([batch.observations, batch.actions, batch.next_observations, scalars, *more], -1)


class Rows:
    """Transitions to draw from: what a dataset and a replay buffer have in common.

    Attributes:
        table: [..., S + A + S + 2] float32: observations, actions, next observations, rewards, discounts; the
            first `len` rows are drawn from.
        state_dim: S, the width of an observation.
        action_dim: A, the width of an action.
    """

    table: Tensor
    state_dim: int
    action_dim: int

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.table)

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw rows of the table uniformly, with replacement, [count, ...]."""
        drawn = torch.randint(len(self), (count,), generator=generator, device=self.table.device)
        return self.table.index_select(0, drawn)

    def sample(self, batch_size: int, generator: torch.Generator | Sequence[torch.Generator]) -> Batch:
        """Draw a batch [B, ...] uniformly, with replacement, with a generator on the data's device.

        From several generators each member of a group draws its own batch: [members, B, ...].
        """
        if isinstance(generator, torch.Generator):
            drawn = self.rows(batch_size, generator)
        else:
            drawn = torch.stack([self.rows(batch_size, one) for one in generator])
        return split(drawn, self.state_dim, self.action_dim)


@dataclass(frozen=True)
class Provenance:
    """Where a dataset came from and what it holds.

    Attributes:
        source: "d4rl", "minari", "ogbench", "embedded", "regenerated", "file", "dict" or "stable-baselines3".
        id: the dataset's id, `hopper-medium-v2`.
        file: the file's name, without the folder.
        sha256: of the file.
        transitions: number of transitions.
        episodes: number of complete episodes. The statistics below are over these, undiscounted, and None
            where there is none; lengths are in steps.
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

    @property
    def name(self) -> str:
        """What an error calls the data: the file, or else the id, or else the source."""
        return self.file or self.id or self.source

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values, without NaN."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """A summary in one line."""
        source = "embedded: self-collected, not D4RL" if self.source == "embedded" else self.source
        text = f"{self.id or 'dataset'} ({source}): {self.transitions:,} transitions"
        text += f", {self.episodes:,} complete episode{'' if self.episodes == 1 else 's'}"
        if self.return_mean is not None:
            text += f", return {self.return_mean:,.1f} ± {self.return_std:,.1f} ({self.return_min:,.1f} to "
            text += f"{self.return_max:,.1f}), mean length {self.length_mean:,.0f}"
        return text


@dataclass(frozen=True, eq=False, repr=False)
class Transitions(Rows):
    """A dataset of N transitions on one device. Build it with `from_dict`, which checks.

    Attributes:
        table: [N, S + A + S + 2] float32: observations, actions, next observations, rewards, discounts; and
            next actions, A wide, where `cpql.data.transforms.next_actions` has added them.
        state_dim: S, the width of an observation.
        action_dim: A, the width of an action.
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

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.table.device

    def __repr__(self) -> str:
        """The provenance, not the numbers."""
        return f"Transitions({self.provenance.line()})"

    def to(self, device: torch.device | str) -> Transitions:
        """The same data on another device; itself if it is there already."""
        table = self.table.to(device)
        if table is self.table:
            return self
        flags = {name: getattr(self, name).to(device) for name in ("terminated", "truncated", "ends")}
        return dataclasses.replace(self, table=table, **flags)

    def validate_for(self, state_dim: int, action_dim: int) -> None:
        """Raise a DataError unless observations and actions are as wide as an environment's."""
        for key, expected in (("observations", state_dim), ("actions", action_dim)):
            found = getattr(self, key).shape[1]
            if found != expected:
                name = self.provenance.name
                raise DataError(f"{name}: '{key}' is {found} wide: the environment has {expected}")

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """D4RL's six arrays, as numpy, which `from_dict` takes; an episode that was cut ends with no flag."""
        columns = self.columns._asdict() | {"terminals": self.terminated, "timeouts": self.truncated}
        return {key: columns[key].cpu().numpy() for key in rows.KEYS}

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

        `mapping` has observations [N, S], actions [N, A], rewards [N], terminals [N], and where known
        timeouts [N] and next_observations [N, S]: what `env.get_dataset()` or `d4rl.qlearning_dataset`
        return. [N, 1] will do for [N]; other keys are ignored. Arrays may be anything with a shape, a dtype
        and slices of rows: numpy's, torch's, h5py's datasets. The other arguments are described at
        `Provenance` and `Reading`.

        Raises:
            DataError: in one line, the first thing that is wrong.
        """
        where = file or id or source
        if time_limits not in ("keep", "drop"):
            raise DataError(f"{where}: time_limits={time_limits!r}: expected 'keep' or 'drop'")
        arrays, sizes = rows.checked(mapping, where)
        count, states, width = sizes["N"], sizes["S"], sizes["A"]
        given = "next_observations" in arrays
        terminals = rows.read_flags(arrays["terminals"], "terminals", where)
        timeouts = rows.read_flags(arrays["timeouts"], "timeouts", where) if "timeouts" in arrays else None

        table = np.empty((count, 2 * states + width + 2), np.float32)
        observations, actions, next_observations, scalars = np.split(
            table, np.cumsum([states, width, states]), axis=1
        )
        columns = {"observations": observations, "actions": actions, "rewards": scalars[:, :1]}
        if given:
            columns["next_observations"] = next_observations
        for key, column in columns.items():
            for part, block in rows.read_blocks(arrays[key], key, where):
                column[part] = block
        rows.scale_actions(actions, action_low, action_high, where)

        seams = np.zeros(count, np.bool_)
        if given:
            seams[:-1] = rows.find_seams(next_observations, observations)
        truncated = rows.find_limits(terminals | seams, episode_limit) if timeouts is None else timeouts
        terminated = terminals & ~truncated
        ends = terminals | truncated | seams
        complete = ends.copy() if timeouts is None else terminals | truncated
        keep = np.ones(count, np.bool_)
        if not given:
            next_observations[:-1] = observations[1:]
            next_observations[terminated] = observations[terminated]
            keep[-1] = terminated[-1]
        if not given or time_limits == "drop":
            keep &= ~truncated
        ends[-1] = True
        # Before any row is dropped: an episode's return includes its last reward.
        statistics = rows.return_statistics(scalars[:, 0], ends, complete)
        scalars[:, 1] = ~terminated
        if not keep.all():
            if not keep.any():
                raise DataError(
                    f"{where}: every row is at a time limit, and time_limits=drop leaves none"
                    if given
                    else f"{where}: no row has a next one in its episode: expected 'next_observations'"
                )
            ends[:-1] |= ~keep[1:]
            table = rows.compacted(table, keep)
            terminated, truncated, ends = terminated[keep], truncated[keep], ends[keep]
        return cls(
            torch.from_numpy(table),
            states,
            width,
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            torch.from_numpy(ends),
            Provenance(source, id, file, sha256, len(table), **statistics, details=dict(details or {})),
        )
