"""Converting a dataset between the forms of `cpql.data.files`, with a comparison of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from cpql.data import files, minari
from cpql.data.transitions import Transitions
from cpql.environments import spec_of
from cpql.errors import DataError
from cpql.tasks import Task

__all__ = ["Conversion", "convert"]


class Conversion(NamedTuple):
    """The result of a conversion.

    Attributes:
        path: the file or the Minari dataset's folder that was written.
        transitions: how many there are.
        same: "to the bit", or how far actions were rounded.
        losses: what the new dataset no longer says or holds, one clause each.
    """

    path: Path
    transitions: int
    same: str
    losses: list[str]


def convert(
    source: Path, target: Path, *, id: str = "", task: Task | None = None, replace: bool = False
) -> Conversion:
    """Convert a dataset, read it back and compare.

    Args:
        source: a file, or a Minari dataset's folder.
        target: a file, whose ending says its form, or the folder that a Minari dataset is put into.
        id: the Minari dataset's id.
        task: its environment's bounds are those of actions in HDF5 and NPZ (by default -1 and 1), and a new
            Minari dataset names it.
        replace: whether an existing dataset may be replaced.

    Raises:
        ConfigError, DataError: the source isn't valid, the target can't be written, or it reads back as other
            transitions.
    """
    bounds = _bounds(source, target, task)
    data = files.read(source, task=task, **bounds)
    made = files.write(data, target, id=id, task=task, replace=replace, **bounds)
    again = files.read(made, **bounds)
    losses = files.left_out(source, data, task)
    ends = int((data.ends & ~again.ends).sum())
    before, after = data.provenance.episodes, again.provenance.episodes
    cuts = len(minari.metadata(made).cpql_cut_episodes) if id else 0
    if ends:
        losses.append(f"ends of episodes: {ends:,}, where no flag says so and rows join up")
    if before != after:
        losses.append(f"complete episodes: {before - after:,} of {before:,}, which no flag marks any more")
    if cuts:
        losses.append(f"cut episodes: {cuts:,}, which other readers of Minari's files take for truncated")
    return Conversion(made, len(data), _compare(data, again, made), losses)


def _bounds(source: Path, target: Path, task: Task | None) -> dict[str, Any]:
    """The bounds that actions in HDF5 and NPZ have, for `files.read` and `files.write`."""
    if files.form(source) == "minari":
        if target.suffix.lower() not in files.ENDINGS:
            return {}
        about = minari.metadata(source)
        space, wrappers = about.action_space, about.env_spec.additional_wrappers if about.env_spec else []
        unit = space is not None and {*space.low} == {-1.0} and {*space.high} == {1.0}
        if unit and not any(wrapper.get("name") == "RescaleAction" for wrapper in wrappers):
            return {}
        if task is None:
            raise DataError(
                f"{source}: its environment's actions aren't in [-1, 1]: expected --env with the environment "
                f"whose bounds they are to have in {target.name}"
            )
    return {} if task is None else dict(zip(("action_low", "action_high"), spec_of(task)[1:3], strict=True))


def _compare(data: Transitions, again: Transitions, made: Path) -> str:
    """Compare what was read back with what was written: to the bit, or but for actions that were rounded."""
    same = torch.equal(data.terminated, again.terminated) and torch.equal(data.truncated, again.truncated)
    bits, others = (x.table.view(torch.int32).clone() for x in (data, again))
    actions = slice(data.state_dim, data.state_dim + data.action_dim)
    rounded = not torch.equal(bits[:, actions], others[:, actions])
    bits[:, actions] = others[:, actions]
    if not (same and torch.equal(bits, others)):
        raise DataError(f"{made}: reads back as other transitions: expected those that were written")
    if not rounded:
        return "to the bit"
    apart = float((data.actions - again.actions).abs().max())
    return f"but for actions, which scaling to their bounds and back has moved by up to {apart:.1g}"
