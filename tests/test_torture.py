"""No run is lost: the short form of the harness in `torture.py`, and what it would notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torture
from safetensors.numpy import load_file, save_file

# Two kills of each kind of training, a start of the same one twice, and a resume beside a running one.
SHORT = ("--trials", str(2 * len(torture.KINDS)), "--twice", "2")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_trainings_are_continued_as_if_nothing_had_been(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, torture.__file__, *SHORT, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tallies = json.loads(out.read_text())
    assert tallies.keys() == {*torture.KINDS, "started twice"}
    assert all(tally["trials"] == 2 for tally in tallies.values())
    assert all(tallies[kind]["killed"] >= 2 for kind in torture.KINDS)


@pytest.mark.slow
def test_the_harness_sees_what_is_wrong(tmp_path: Path) -> None:
    """One training, and copies of it with something amiss."""
    place, whole = torture.Place(tmp_path), tmp_path / "whole"
    place.start(torture.KINDS["single"], whole)
    copies: list[Path] = []

    def copy() -> Path:
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(whole, copies[-1], symlinks=True)
        return copies[-1] / "seed0"

    def found(run: Path) -> dict[str, list[str]]:
        return {kind: names for kind, names in torture.faults(run.parent, whole).items() if names}

    assert found(copy()) == {}
    run = copy()
    (run / ".config.yaml.x").mkdir()
    assert found(run) == {"left over": ["seed0/.config.yaml.x"]}
    run = copy()
    last = run / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("step_00000015")
    assert "seed0/checkpoints/last: step_00000015, not step_00000016" in found(run)["stale"]
    run = copy()
    (run / "evaluations" / "step_00000005.json").unlink()
    assert found(run) == {"stale": ["seed0/evaluations/step_00000005.json is missing"]}
    run = copy()
    state = run / "checkpoints" / "step_00000015" / "training" / "state.safetensors"
    tensors = load_file(state)
    tensors["agent.actor"] = np.nextafter(tensors["agent.actor"], np.float32(1))
    save_file(tensors, state)
    assert found(run) == {"not identical": ["seed0/checkpoints/step_00000015/training/state.safetensors"]}
    run = copy()
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join([lines[0], *lines[2:]]))
    assert [line.rpartition(": ")[2] for line in found(run)["stale"]] == ["other steps"]
