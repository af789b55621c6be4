"""Converting a dataset between the forms of `cpql.data.files`, with a comparison of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpql.data import files, minari
from cpql.data.transitions import Transitions
from cpql.environments import spec_of
from cpql.errors import DataError
from cpql.tasks import Task

__all__ = ["convert"]


def convert(
    source: Path, target: Path, *, id: str = "", task: Task | None = None, replace: bool = False
) -> list[str]:
    """Convert a dataset, read it back and compare.

    Args:
        source: a file, or a Minari dataset's folder.
        target: a file, whose ending says its form, or the folder that a Minari dataset is put into.
        id: the Minari dataset's id.
        task: its environment's bounds are those of actions in HDF5 and NPZ (by default -1 and 1), and a new
            Minari dataset names it.
        replace: whether an existing dataset may be replaced.

    Returns:
        What was written, and how exactly it reads back; then a line for each thing that it no longer says.

    Raises:
        ConfigError, DataError: the source isn't valid, the target can't be written, or it reads back as other
            transitions.
    """
    bounds = _bounds(source, target, task)
    data = files.read(source, task=task, **bounds)
    made = files.write(data, target, id=id, task=task, replace=replace, **bounds)
    again = files.read(made, **bounds)
    before, after = data.provenance.episodes, again.provenance.episodes
    losses = files.left_out(source, data, task)
    if ends := int((data.ends & ~again.ends).sum()):
        losses.append(f"ends of episodes: {ends:,}, where no flag says so and rows join up")
    if before != after:
        losses.append(f"complete episodes: {before - after:,} of {before:,}, which no flag marks any more")
    if cuts := len(minari.metadata(made).cpql_cut_episodes) if id else 0:
        losses.append(f"cut episodes: {cuts:,}, which other readers of Minari's files take for truncated")
    same = _compare(data, again, made)
    return [f"{made}: {len(data):,} transitions, read back the same {same}", *(f"lost: {x}" for x in losses)]


def _bounds(source: Path, target: Path, task: Task | None) -> dict[str, Any]:
    """The bounds that actions in HDF5 and NPZ have, for `files.read` and `files.write`."""
    if files.form(source) == "minari" and target.suffix.lower() in files.ENDINGS:
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
    others = again.to_dict()
    changed = [key for key, array in data.to_dict().items() if array.tobytes() != others[key].tobytes()]
    if not changed:
        return "to the bit"
    if changed != ["actions"]:
        raise DataError(f"{made}: reads back with other {', '.join(changed)}: expected what was written")
    apart = float((data.actions - again.actions).abs().max())
    return f"but for actions, which scaling to their bounds and back has moved by up to {apart:.1g}"
