"""What is saved: checkpoints that appear whole or not at all, and hold no code.

checkpoints/
    step_00010000/
        policy/      config.json, model.safetensors      all that acting needs
        training/    state.json, state.safetensors       all that going on needs
    last -> step_00010000
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cpql.errors import CheckpointError
from cpql.policy import Policy, find_policy

__all__ = ["find_training", "load_training", "save_checkpoint", "saved_steps", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a file aside and put it in place in one move."""
    with _aside(path) as temporary:
        temporary.write_text(text)


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write the checkpoint of a step, point `last` at it, and drop the oldest ones.

    Args:
        folder: of all checkpoints of the run.
        step: gradient steps taken.
        policy: what is deployed.
        tensors: what training needs to go on: weights, moments, generators.
        state: the same, as JSON-able values.
        keep: how many checkpoints stay; 0 keeps all.

    Returns:
        The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:08d}"
    with _aside(final) as temporary:
        policy.save(temporary / "policy")
        (temporary / "training").mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary / "training" / "state.safetensors",
        )
        text = json.dumps({"step": step, **state}, indent=2, allow_nan=False)
        (temporary / "training" / "state.json").write_text(text + "\n")
    with _aside(folder / "last") as link:
        link.symlink_to(final.name)
    if keep:
        for old in sorted(folder.glob("step_*"))[:-keep]:
            if old.name != final.name:
                shutil.rmtree(old)
    return final


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there, ascending."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def load_training(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the training state of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    path = folder / f"step_{step:08d}" / "training"
    try:
        return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())
    except Exception as error:
        raise CheckpointError(f"{path}: no readable training state: {error}") from error


def find_training(path: Path) -> tuple[Path, int]:
    """The folder of checkpoints and the step that `load_training` wants, of a run's last checkpoint or any.

    Raises:
        CheckpointError: there is none, or it is a policy alone.
    """
    step = find_policy(path).resolve().parent
    if not (step / "training" / "state.json").is_file():
        raise CheckpointError(f"{path}: a policy alone, without the networks and optimisers of its training")
    return step.parent, int(step.name.removeprefix("step_"))


@contextmanager
def _aside(final: Path) -> Iterator[Path]:
    """A path beside `final` to write to; it replaces `final` when the block ends well, else it vanishes."""
    holder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        temporary = holder / final.name
        yield temporary
        if temporary.is_dir() and not temporary.is_symlink() and final.exists():
            final.replace(holder / "old")  # a folder can't replace one that isn't empty
        os.replace(temporary, final)
    finally:
        shutil.rmtree(holder)
