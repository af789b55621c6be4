"""Steps of `Transitions.from_dict` on numpy arrays: checks, scaling of actions, ends of episodes, statistics.

Arrays are read in blocks of rows, so that a file of many gigabytes is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpql.errors import DataError

KEYS = {
    "observations": "NS",
    "actions": "NA",
    "rewards": "N",
    "terminals": "N",
    "timeouts": "N",
    "next_observations": "NS",
}
"""D4RL's keys and the axes of their arrays: N rows, S and A wide."""

OPTIONAL = ("timeouts", "next_observations")
# Actions that left [-1, 1] by rounding are clipped; beyond this they are in other units.
ACTION_TOLERANCE = 1e-3
BLOCK_BYTES = 1 << 20


def checked(mapping: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A mapping's arrays of numbers by `KEYS`, not read yet, and the sizes of their axes."""
    arrays: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for key, axes in KEYS.items():
        if key in OPTIONAL and key not in mapping:
            continue
        if key not in mapping:
            found = ", ".join(sorted(map(str, mapping))) or "nothing"
            raise DataError(f"{where}: no '{key}', only {found}: expected one besides")
        value = mapping[key]
        if not isinstance(getattr(value, "dtype", None), np.dtype):
            try:
                value = np.asarray(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(f"{where}: '{key}' isn't an array ({error}): expected numbers") from error
        if value.dtype.kind not in "biuf":
            raise DataError(f"{where}: '{key}' holds {value.dtype}: expected numbers")
        shape = list(value.shape or ())
        axis_sizes = shape[:1] if axes == "N" and shape[1:] == [1] else shape
        pairs = zip(axes, axis_sizes, strict=False)
        if len(axes) != len(axis_sizes) or not all(0 < n == sizes.setdefault(axis, n) for axis, n in pairs):
            expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise DataError(f"{where}: '{key}' has shape {shape}: expected [{expected}]")
        arrays[key] = value
    return arrays, sizes


def row_blocks(rows: int, width: int, chunk: int = 1) -> Iterator[slice]:
    """Slices of rows, each about BLOCK_BYTES of float32 and a multiple of `chunk` rows."""
    size = -(-max(1, BLOCK_BYTES // (4 * width)) // chunk) * chunk
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def read_blocks(array: Any, key: str, where: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Read an array in blocks [n, width] of finite numbers, with the slice of rows of each.

    Blocks are whole chunks of an HDF5 dataset, so that none is decompressed twice.
    """
    width = array.shape[1] if len(array.shape) == 2 else 1
    for part in row_blocks(array.shape[0], width, (getattr(array, "chunks", None) or (1,))[0]):
        with np.errstate(over="ignore"):
            block = np.asarray(array[part], np.float32).reshape(-1, width)
        finite = np.isfinite(block).all(1)
        if not finite.all():
            row = part.start + int(finite.argmin())
            raise DataError(
                f"{where}: '{key}' holds NaN or infinity, first in row {row}: expected finite numbers"
            )
        yield part, block


def read_flags(array: Any, key: str, where: str) -> NDArray[np.bool_]:
    """Read an array as booleans [N]."""
    values = np.concatenate([block.ravel() for _, block in read_blocks(array, key, where)])
    odd = (values != 0) & (values != 1)
    if odd.any():
        row = int(odd.argmax())
        raise DataError(f"{where}: '{key}' holds {values[row]:g} in row {row}: expected 0 or 1")
    return values.astype(np.bool_)


def scale_actions(actions: NDArray[np.float32], low: ArrayLike, high: ArrayLike, where: str) -> None:
    """Scale actions from their bounds to [-1, 1], in place."""
    below, above = np.asarray(low, np.float32), np.asarray(high, np.float32)
    if not {below.shape, above.shape} <= {(), actions.shape[1:]}:
        width, found = actions.shape[1], max(below.size, above.size)
        raise DataError(f"{where}: 'actions' is {width} wide: expected {found}, as their bounds are")
    if not (np.isfinite(above - below).all() and (below < above).all()):
        raise DataError(f"{where}: actions in [{low!r}, {high!r}]: expected finite bounds, lower below upper")
    unit = bool((below == -1).all() and (above == 1).all())
    for part in row_blocks(*actions.shape):
        block = actions[part]
        scaled = block if unit else 2 * (block - below) / (above - below) - 1
        out = np.abs(scaled) > 1 + ACTION_TOLERANCE
        if out.any():
            row = int(out.any(1).argmax())
            worst = block[row, np.abs(scaled[row]).argmax()]
            expected = "[-1, 1]" if unit else "the environment's bounds"
            raise DataError(
                f"{where}: 'actions' reaches {worst:.6g} in row {part.start + row}: expected {expected}"
            )
        np.clip(scaled, -1, 1, out=block)


def find_seams(
    next_observations: NDArray[np.float32], observations: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Where a row doesn't lead to the one after it, [N - 1]."""
    seams = np.empty(len(observations) - 1, np.bool_)
    for part in row_blocks(len(seams), observations.shape[1]):
        here, there = next_observations[part], observations[part.start + 1 : part.stop + 1]
        apart = (here != there).any(1)
        rows = np.flatnonzero(apart)
        # Few rows differ at all; rows that differ by rounding still join up.
        apart[rows] = ~np.isclose(here[rows], there[rows], rtol=1e-5, atol=1e-6).all(1)
        seams[part] = apart
    return seams


def find_limits(ends: NDArray[np.bool_], limit: int | None) -> NDArray[np.bool_]:
    """Where episodes reach the limit, in steps since the last end, [N]."""
    if limit is None:
        return np.zeros(len(ends), np.bool_)
    rows = np.arange(len(ends))
    starts = np.maximum.accumulate(np.where(np.concatenate([[True], ends[:-1]]), rows, 0))
    reached: NDArray[np.bool_] = (rows - starts) % limit == limit - 1
    return reached


def compacted(table: NDArray[np.float32], keep: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The kept rows, moved to the front of the same memory."""
    end = 0
    for part in row_blocks(*table.shape):
        kept = table[part][keep[part]]
        table[end : end + len(kept)] = kept
        end += len(kept)
    return table[:end]


def returns_and_lengths(
    rewards: NDArray[np.float32], ends: NDArray[np.bool_], which: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Undiscounted returns and lengths of some of the episodes; `which` has an entry for each episode."""
    episode: NDArray[np.int64] = np.cumsum(ends) - ends
    returns = np.bincount(episode, rewards).astype(np.float64)
    return returns[which], np.bincount(episode).astype(np.int64)[which]


def return_statistics(
    rewards: NDArray[np.float32], ends: NDArray[np.bool_], complete: NDArray[np.bool_]
) -> dict[str, Any]:
    """The number of complete episodes and statistics of their returns; `complete` is read at the ends."""
    returns, lengths = returns_and_lengths(rewards, ends, complete[ends])
    names = ("return_mean", "return_std", "return_min", "return_max", "length_mean")
    if not len(returns):
        return {"episodes": 0} | dict.fromkeys(names)
    values = (returns.mean(), returns.std(), returns.min(), returns.max(), lengths.mean())
    return {"episodes": len(returns)} | dict(zip(names, map(float, values), strict=True))
