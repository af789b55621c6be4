"""Checkpoints, which appear whole or not at all, and hold no code.

checkpoints/
    step_00010000/
        policy/      config.json, model.safetensors      all that acting needs
        training/    state.json, state.safetensors       all that resuming needs
    last -> step_00010000

A checkpoint is on the disk before `last` points to it, and `state.json` has the SHA-256 of its tensors.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpql.deploy.policy import Policy, find_policy
from cpql.errors import CheckpointError, brief
from cpql.io import aside, aside_of, flush_folder, sha256_of

__all__ = [
    "find_training",
    "go_back",
    "load_training",
    "point_last",
    "prune",
    "save_checkpoint",
    "saved_steps",
]

NO_RIGHT_TO_LINK = 1314  # Windows' number for it


def save_checkpoint(
    folder: Path, step: int, policy: Policy, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write the checkpoint of a step, and point `last` at it.

    Args:
        folder: of all checkpoints of the run.
        step: gradient steps taken.
        policy: what is deployed.
        tensors: what training needs to resume: weights, moments, generators.
        state: the same, as JSON-able values.

    Raises:
        OSError: it can't be written; then nothing has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flush_folder(folder.parent)
    with aside(folder / _name(step)) as temporary:
        policy.save(temporary / "policy")
        (temporary / "training").mkdir()
        file = temporary / "training" / "state.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        except SafetensorError as error:  # raised for a full disk
            raise OSError(str(error)) from error
        text = json.dumps({"step": step, "sha256": sha256_of(file), **state}, indent=2, allow_nan=False)
        (temporary / "training" / "state.json").write_text(text + "\n")
    point_last(folder, step)


def point_last(folder: Path, step: int) -> None:
    """Let `last` be the checkpoint of a step: a link, or a copy where there are none (FAT, some Windows)."""
    with aside(folder / "last") as last:
        try:
            last.symlink_to(_name(step))
        except OSError as error:
            if error.errno != errno.EPERM and getattr(error, "winerror", None) != NO_RIGHT_TO_LINK:
                raise
            shutil.copytree(folder / _name(step), last)


def go_back(folder: Path, step: int) -> None:
    """Let the checkpoint of a step be the last one, and drop those after it; 0 is the beginning."""
    if step:
        point_last(folder, step)
    else:
        (folder / "last").unlink(missing_ok=True)
    for later in saved_steps(folder):
        if later > step:
            _discard(folder, later)


def prune(folder: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Drop all checkpoints but the newest `keep` (0 keeps all), those of `spare` steps, and altered ones.

    A checkpoint that the user has put something into, such as an evaluation or an export, stays.
    """
    for step in saved_steps(folder)[:-keep] if keep else ():
        if step not in spare and {path.name for path in (folder / _name(step)).iterdir()} <= {
            "policy",
            "training",
        }:
            _discard(folder, step)


def _discard(folder: Path, step: int) -> None:
    path = folder / _name(step)
    holder = aside_of(path)
    path.replace(holder / path.name)  # whole or gone, even if this is where the process is killed
    shutil.rmtree(holder)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    names = (path.parent.parent.name for path in folder.glob("step_*/training/state.json"))
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name))


def load_training(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the training state of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / _name(step) / "training"
    try:
        state = json.loads((path / "state.json").read_text())
        digest = sha256_of(path / "state.safetensors")
        found = (state["step"], state.get("sha256", digest))  # older checkpoints have no sha256
        if found != (step, digest):
            raise ValueError(f"state.json: expected step {step} and SHA-256 {digest}, found {found}")
        return load_file(path / "state.safetensors"), state
    except Exception as error:
        raise CheckpointError(f"{path}: no readable training state: {brief(error)}") from error


def find_training(path: str | Path) -> tuple[Path, int]:
    """The arguments of `load_training` for a run (its last checkpoint) or a checkpoint.

    Raises:
        CheckpointError: there is none, or it is a policy alone.
    """
    folder = find_policy(path).resolve().parent
    try:
        step = int(json.loads((folder / "training" / "state.json").read_text())["step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(
            f"{path}: a policy alone, without the networks and optimisers of its training"
        ) from None
    return folder.parent, step


def _name(step: int) -> str:
    return f"step_{step:08d}"
