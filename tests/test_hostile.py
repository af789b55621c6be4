"""Files that mean harm, or look like it, are refused quickly and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

ROWS = 40


def honest() -> dict[str, Any]:
    states = np.arange(ROWS + 1, dtype=np.float32)[:, None] * np.ones(11, np.float32)
    return {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": np.zeros((ROWS, 3), np.float32),
        "rewards": np.zeros(ROWS, np.float32),
        "terminals": np.zeros(ROWS, bool),
        "timeouts": np.zeros(ROWS, bool),
    }


def bomb(file: h5py.File, key: str, rows: int, width: int) -> None:
    """Zeros that are written, compressed: a thousandth of what they say they are."""
    chunk = 1 << 20
    shape, chunks = (rows, width), (chunk, width)
    dataset = file.create_dataset(key, shape, np.float32, chunks=chunks, compression="gzip")
    packed = zlib.compress(bytes(4 * chunk * width))
    for start in range(0, rows, chunk):
        dataset.id.write_direct_chunk((start, 0), packed)


def make(folder: Path) -> dict[str, str]:
    """Write the files; what the error about each must say."""
    expected = {}

    def named(name: str, text: str, **replaced: Any) -> h5py.File:
        expected[f"{name}.hdf5"] = text
        file = h5py.File(folder / f"{name}.hdf5", "w")
        for key, value in (honest() | replaced).items():
            if value is not None:
                file[key] = value
        return file

    with named("declared", "'observations' declares 82.0 GiB and holds 0.0 MiB", observations=None) as file:
        file.create_dataset("observations", (2_000_000_000, 11), np.float32)
    with named("zeros", "'observations' declares 8.6 GiB and holds 8.6 MiB", observations=None) as file:
        bomb(file, "observations", 200 << 20, 11)
    with named("long", "'rewards' has 20000000000 rows: expected 40", rewards=None) as file:
        file.create_dataset("rewards", (20_000_000_000,), np.float32, chunks=(1 << 20,))
    with named("flat", "'observations' has shape [20000000000]", observations=None) as file:
        file.create_dataset("observations", (20_000_000_000,), np.float32, chunks=(1 << 20,))
    with named("cube", "'terminals' declares 37.3 GiB", terminals=None) as file:
        file.create_dataset("terminals", (ROWS, 1_000_000_000), bool, chunks=(1, 1 << 20))
    with named("everything", "declares 82.0 GiB", **dict.fromkeys(honest())) as file:
        for key, width in (("observations", 11), ("next_observations", 11), ("actions", 3)):
            file.create_dataset(key, (2_000_000_000, width), np.float32)
        for key in ("rewards", "terminals", "timeouts"):
            file.create_dataset(key, (2_000_000_000,), np.float32)
    with named("external", "'observations' is a link to elsewhere", observations=None) as file:
        file["observations"] = h5py.ExternalLink("/etc/passwd", "/x")
    with named("soft", "'observations' is a link to elsewhere", observations=None) as file:
        file["observations"] = h5py.SoftLink("/observations")
    with named("storage", "'rewards' keeps its numbers in another file", rewards=None) as file:
        file.create_dataset("rewards", (ROWS,), np.float32, external=[("/etc/passwd", 0, 4 * ROWS)])
    with named("virtual", "'actions' keeps its numbers in another file", actions=None) as file:
        layout = h5py.VirtualLayout((ROWS, 3), np.float32)
        layout[:] = h5py.VirtualSource("/etc/passwd", "actions", (ROWS, 3))
        file.create_virtual_dataset("actions", layout)
    with named("group", "'actions' is a group", actions=None) as file:
        file.create_group("actions")
    with named("object", "'rewards' holds object", rewards=None) as file:
        file.create_dataset("rewards", (ROWS,), h5py.string_dtype())
    with named("compound", "'rewards' holds [('a', '<f4')]", rewards=np.zeros(ROWS, [("a", "f4")])):
        pass
    with named("null", "'rewards' has shape []", rewards=h5py.Empty("f4")):
        pass
    (folder / "loop.hdf5").symlink_to("loop.hdf5")
    expected["loop.hdf5"] = "a symbolic link that leads nowhere"
    (folder / "folder.hdf5").mkdir()
    expected["folder.hdf5"] = "not a file"
    os.mkfifo(folder / "pipe.hdf5")
    expected["pipe.hdf5"] = "not a file"
    return expected


READ = """
import json, resource, sys, time
from pathlib import Path
from cpql.data import d4rl
from cpql.errors import DataError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

found = {}
for name in json.loads(sys.argv[2]):
    before, began = peak(), time.monotonic()
    try:
        d4rl.read(Path(sys.argv[1]) / name, "id")
        message = "was read"
    except DataError as error:
        message = str(error)
    found[name] = (message, time.monotonic() - began, peak() - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes, and no way to ask for the peak of memory")
def test_hostile_files_are_refused_quickly_and_in_little_memory(tmp_path: Path) -> None:
    expected = make(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), json.dumps(list(expected))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for name, (message, seconds, megabytes) in json.loads(run.stdout).items():
        assert message.startswith(f"{name}: ") and expected[name] in message, message
        assert "\n" not in message
        assert seconds < 5, (name, seconds)
        assert megabytes < 100, (name, megabytes)


def test_what_is_merely_compressed_is_read(tmp_path: Path) -> None:
    """D4RL's own files are compressed, and flags shrink a thousand times."""
    from cpql.data import d4rl

    rows = 60_000
    states = np.random.default_rng(0).normal(size=(rows + 1, 11)).astype(np.float32)
    arrays = honest() | {"observations": states[:-1], "next_observations": states[1:]}
    arrays |= {"actions": np.zeros((rows, 3), np.float32)}
    arrays |= {key: np.zeros(rows, np.float32) for key in ("rewards", "terminals", "timeouts")}
    with h5py.File(tmp_path / "whole.hdf5", "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    data = d4rl.read(tmp_path / "whole.hdf5", "whole")
    np.testing.assert_array_equal(data.observations.numpy(), states[:-1])
    np.testing.assert_array_equal(data.next_observations.numpy(), states[1:])
