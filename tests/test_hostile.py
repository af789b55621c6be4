"""Files that mean harm, or look like it, are refused quickly and in little memory, in both HDF5 layouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest

from cpql.data import d4rl, minari
from cpql.data.transitions import Transitions

ROWS = 40
KEYS = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")


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


def bomb(group: h5py.Group, key: str, shape: tuple[int, ...], width: int = 1 << 20) -> None:
    """Zeros that are written, compressed: a thousandth of what they say they are."""
    chunks = (min(width, shape[0]), *shape[1:])
    dataset = group.create_dataset(key, shape, np.float32, chunks=chunks, compression="gzip")
    packed = zlib.compress(bytes(4 * int(np.prod(chunks))))
    for start in range(0, shape[0], chunks[0]):
        dataset.id.write_direct_chunk((start, *(0 for _ in shape[1:])), packed)


def virtual(group: h5py.Group, key: str) -> None:
    layout = h5py.VirtualLayout((ROWS,), np.float32)
    layout[:] = h5py.VirtualSource("/etc/passwd", "rewards", (ROWS,))
    group.create_virtual_dataset(key, layout)


# What the rewards may be in both forms, and what the error says about them.
REWARDS: dict[str, tuple[Callable[[h5py.Group, str], Any], str]] = {
    "external": (
        lambda g, k: g.update({k: h5py.ExternalLink("/etc/passwd", "/x")}),
        "is a link to elsewhere",
    ),
    "soft": (lambda g, k: g.update({k: h5py.SoftLink(f"/{k}")}), "is a link to elsewhere"),
    "storage": (
        lambda g, k: g.create_dataset(k, (ROWS,), np.float32, external=[("/etc/passwd", 0, 4 * ROWS)]),
        "keeps its numbers in another file",
    ),
    "virtual": (virtual, "keeps its numbers in another file"),
    "group": (lambda g, k: g.create_group(k), "is a group"),
    "object": (lambda g, k: g.create_dataset(k, (ROWS,), h5py.string_dtype()), "holds object"),
    "compound": (lambda g, k: g.create_dataset(k, (ROWS,), [("a", "f4")]), "holds [('a', '<f4')]"),
    "null": (lambda g, k: g.create_dataset(k, data=h5py.Empty("f4")), "has shape []"),
    "long": (
        lambda g, k: g.create_dataset(k, (20_000_000_000,), "f4", chunks=(1 << 20,)),
        "20000000000|declares 74.5 GiB",
    ),
    "absent": (lambda g, k: None, "rewards'"),
}


def tables(file: h5py.File, rows: int) -> None:
    for key, width in zip(KEYS, (11, 11, 3, 0, 0, 0), strict=True):
        file.create_dataset(key, (rows, width) if width else (rows,), np.float32)


# What else a file in D4RL's layout may be: the key to leave out, what to write, and what the error says.
FILES: dict[str, tuple[str, Callable[[h5py.File], Any], str]] = {
    "declared": (
        "observations",
        lambda f: f.create_dataset("observations", (2_000_000_000, 11), np.float32),
        "declares 82.0 GiB in a file of",
    ),
    "zeros": (
        "observations",
        lambda f: bomb(f, "observations", (200 << 20, 11)),
        "declares 8.6 GiB in a file of 8.",
    ),
    "flat": (
        "observations",
        lambda f: f.create_dataset("observations", (20_000_000_000,), np.float32, chunks=(1 << 20,)),
        "declares 74.5 GiB",
    ),
    "cube": (
        "terminals",
        lambda f: f.create_dataset("terminals", (ROWS, 1_000_000_000), bool, chunks=(1, 1 << 20)),
        "declares 37.3 GiB",
    ),
    "everything": ("", lambda f: tables(f, 2_000_000_000), "declares 208.6 GiB"),
}


def make(folder: Path) -> dict[str, str]:
    """Write the files and folders; what the error about each must say."""
    expected = {}
    for name, (key, fill, text) in FILES.items():
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            if key:
                file.update({other: value for other, value in honest().items() if other != key})
            fill(file)
        expected[f"{name}.hdf5"] = text
    data = Transitions.from_dict(honest())
    for name, (write, text) in REWARDS.items():
        path = folder / f"rewards-{name}.hdf5"
        d4rl.write(path, honest(), {})
        dataset = minari.write(data, folder, id=f"{name}-v0")
        for place, within in ((path, ""), (dataset / "data/main_data.hdf5", "episode_0/")):
            with h5py.File(place, "a") as file:
                del file[f"{within}rewards"]
                write(file[within or "/"], "rewards")
        expected |= {path.name: text, dataset.name: text}
    steps = 9_000_000
    dataset = minari.write(data, folder, id="zeros-v0") / "data"
    about = json.loads((dataset / "metadata.json").read_text()) | {"total_steps": steps}
    (dataset / "metadata.json").write_text(json.dumps(about))
    with h5py.File(dataset / "main_data.hdf5", "w") as file:
        group = file.create_group("episode_0")
        for key, shape in (("observations", (steps + 1, 11)), ("actions", (steps, 3)), ("rewards", (steps,))):
            bomb(group, key, shape)
    expected["zeros-v0"] = "declares 0.5 GiB in a file of 0.5"
    (folder / "loop.hdf5").symlink_to("loop.hdf5")
    (folder / "folder.hdf5").mkdir()
    os.mkfifo(folder / "pipe.hdf5")
    return expected | {
        "loop.hdf5": "not a file",
        "folder.hdf5": "not a file",
        "pipe.hdf5": "not a file",
    }


READ = """
import json, resource, sys, time
from pathlib import Path
from cpql.data import d4rl, minari
from cpql.errors import DataError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

found = {}
for name in json.loads(sys.argv[2]):
    before, began, path = peak(), time.monotonic(), Path(sys.argv[1]) / name
    try:
        d4rl.read(path, "id") if name.endswith(".hdf5") else minari.read(path)
        message = "was read"
    except DataError as error:
        message = str(error)
    found[name] = (message, time.monotonic() - began, peak() - before)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pipes, and no way to ask for the peak of memory")
def test_hostile_files_are_refused_quickly_and_in_little_memory(tmp_path: Path) -> None:
    expected = make(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), json.dumps(list(expected))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for name, (message, seconds, megabytes) in json.loads(run.stdout).items():
        where = f"{name}: " if name.endswith(".hdf5") else f"{name}/data/main_data.hdf5: "
        assert message.startswith(where) and any(x in message for x in expected[name].split("|")), message
        assert "\n" not in message
        assert seconds < 5, (name, seconds)
        assert megabytes < 100, (name, megabytes)


def test_what_is_merely_compressed_is_read(tmp_path: Path) -> None:
    """D4RL's own files are compressed, and flags shrink a thousand times."""
    rows = 60_000
    states = np.random.default_rng(0).normal(size=(rows + 1, 11)).astype(np.float32)
    arrays = {"observations": states[:-1], "next_observations": states[1:]}
    arrays |= {"actions": np.zeros((rows, 3), np.float32)}
    arrays |= {key: np.zeros(rows, np.float32) for key in ("rewards", "terminals", "timeouts")}
    with h5py.File(tmp_path / "whole.hdf5", "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    data = d4rl.read(tmp_path / "whole.hdf5", "whole")
    np.testing.assert_array_equal(data.observations.numpy(), states[:-1])
    np.testing.assert_array_equal(data.next_observations.numpy(), states[1:])
