"""What is saved: checkpoints that appear whole or not at all, and hold no code.

checkpoints/
    step_00010000/
        policy/      config.json, model.safetensors      all that acting needs
        training/    state.json, state.safetensors       all that going on needs
    last -> step_00010000

A checkpoint is on the disk before `last` points to it, and says what its tensors' SHA-256 is.
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
from cpql.errors import CheckpointError
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
) -> Path:
    """Write the checkpoint of a step, and point `last` at it.

    Args:
        folder: of all checkpoints of the run.
        step: gradient steps taken.
        policy: what is deployed.
        tensors: what training needs to go on: weights, moments, generators.
        state: the same, as JSON-able values.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it can't be written; then nothing has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flush_folder(folder.parent)
    final = folder / _name(step)
    with aside(final) as temporary:
        policy.save(temporary / "policy")
        (temporary / "training").mkdir()
        file = temporary / "training" / "state.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        except SafetensorError as error:  # its own word for a full disk
            raise OSError(str(error)) from error
        whole = {"step": step, "sha256": sha256_of(file), **state}
        text = json.dumps(whole, indent=2, allow_nan=False)
        (temporary / "training" / "state.json").write_text(text + "\n")
    point_last(folder, step)
    return final


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
            _discard(folder / _name(later))


def prune(folder: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Drop the oldest checkpoints, but those that somebody has put something into: an evaluation, an export.

    Args:
        folder: of all checkpoints of the run.
        keep: how many of the newest stay; 0 keeps all.
        spare: steps of others that stay.
    """
    for step in saved_steps(folder)[:-keep] if keep else ():
        old = folder / _name(step)
        if step not in spare and {path.name for path in old.iterdir()} <= {"policy", "training"}:
            _discard(old)


def _discard(path: Path) -> None:
    holder = aside_of(path)
    path.replace(holder / path.name)  # whole or gone, even if this is where the process is killed
    shutil.rmtree(holder)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there, ascending."""
    found = (
        re.fullmatch(r"step_(\d{8,})", path.parent.parent.name)
        for path in folder.glob("step_*/training/state.json")
    )
    return sorted(int(match[1]) for match in found if match)


def load_training(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the training state of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / _name(step) / "training"
    try:
        state = json.loads((path / "state.json").read_text())
        if state["step"] != step:
            raise ValueError(f"state.json says step {state['step']}, expected {step}")
        found = sha256_of(path / "state.safetensors")
        expected = state.get("sha256", found)  # there was none at first
        if found != expected:
            raise ValueError(f"state.safetensors has SHA-256 {found[:12]}..., expected {expected[:12]}...")
        return load_file(path / "state.safetensors"), state
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: no readable training state: {reason}") from error


def find_training(path: Path) -> tuple[Path, int]:
    """The folder of checkpoints and the step that `load_training` wants, of a run's last checkpoint or any.

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
