"""D4RL's datasets: HDF5 files in its layout, where they lie and where they can be had.

The layout is a flat file of observations [N, S], actions [N, A], rewards [N], terminals [N], timeouts [N]
and, since v2, next_observations [N, S]. Anything else in it (`infos/*`, `metadata/*`) is left alone. What
cpql itself collects is kept in the same layout, and carries an attribute that says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import secrets
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from cpql.data.transitions import Transitions
from cpql.errors import DataError

__all__ = ["Progress", "cache_folder", "download", "filename", "find", "read", "replacing", "write"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

URLS = ("http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/",)
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
ORIGIN = "cpql_origin"
TIMEOUT = 10.0


def cache_folder() -> Path:
    """Where D4RL keeps its files: `$D4RL_DATASET_DIR`, else `~/.d4rl/datasets`."""
    return Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets").expanduser()


def filename(id: str) -> str:
    """Name a dataset's file: `hopper-medium-v2` is `hopper_medium-v2.hdf5`.

    Raises:
        DataError: `id` isn't a D4RL id.
    """
    match = re.fullmatch(r"([A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)-(v\d+)", id)
    if match is None:
        raise DataError(f"'{id}' isn't a D4RL id: expected one such as 'hopper-medium-v2'")
    return f"{match[1].replace('-', '_')}-{match[2]}.hdf5"


def find(id: str) -> Path | None:
    """Give a dataset's file in the cache folder, or None."""
    path = cache_folder() / filename(id)
    return path if path.exists() else None


def read(path: str | os.PathLike[str], id: str, *, source: str = "file") -> Transitions:
    """Read and check any HDF5 file in D4RL's layout.

    Args:
        path: the file.
        id: the dataset's id, for the provenance.
        source: "file" or "d4rl". A file that cpql collected says so itself, and that wins, so that it
            can't pass for D4RL under another name.

    Raises:
        DataError: the file is missing, empty, truncated, not HDF5 or doesn't hold valid transitions.
    """
    path = Path(path)
    arrays, origin = _contents(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    details: dict[str, Any] = {}
    if origin is not None:
        source, id, details = origin
    return Transitions.from_dict(arrays, source=source, id=id, file=path.name, sha256=sha256, details=details)


def _contents(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, str, dict[str, Any]] | None]:
    """Read the known keys, and the origin that cpql wrote beside them."""
    name = path.name
    if not path.exists():
        raise DataError(f"{name}: no such file in {path.absolute().parent}: expected HDF5 in D4RL's layout")
    if not path.is_file():
        raise DataError(f"{name}: not a file: expected HDF5 in D4RL's layout")
    if path.stat().st_size == 0:
        raise DataError(f"{name}: an empty file: expected HDF5 in D4RL's layout")
    key = "the file"
    try:
        if not h5py.is_hdf5(path):
            raise DataError(f"{name}: not HDF5: expected HDF5 in D4RL's layout")
        with h5py.File(path, "r") as file:
            arrays = {}
            for key in (key for key in KEYS if key in file):
                if not isinstance(file[key], h5py.Dataset):
                    raise DataError(f"{name}: '{key}' is a group: expected an array")
                arrays[key] = file[key][()]
            if not arrays:
                found = ", ".join(file) or "nothing"
                raise DataError(f"{name}: none of D4RL's arrays, only {found}: expected {', '.join(KEYS)}")
            text = file.attrs.get(ORIGIN)
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, {key} can't be read ({reason}): expected whole HDF5") from error
    if text is None:
        return arrays, None
    try:
        origin = json.loads(text)
        return arrays, (str(origin["source"]), str(origin["id"]), dict(origin["details"]))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{name}: the attribute '{ORIGIN}' is damaged: expected what cpql wrote") from error


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]
) -> None:
    """Write D4RL's layout, whole or not at all.

    Args:
        path: the file; its folder is made, and a file of that name is replaced.
        arrays: by D4RL's keys.
        attributes: of the file, text or numbers. `ORIGIN` is what `read` takes for the provenance: JSON
            of source, id and details.

    Raises:
        DataError: it can't be written.
    """
    path = Path(path)
    try:
        with replacing(path) as aside, h5py.File(aside, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=np.asarray(array))
            for key, value in attributes.items():
                file.attrs[key] = value
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write beside `path`, and rename it into place once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def download(id: str, progress: Progress | None = None) -> Path:
    """Fetch a dataset into the cache folder, from the first place that has it.

    The places are D4RL's host, or those in `$CPQL_D4RL_MIRROR` (folders' URLs with spaces between).

    Raises:
        DataError: no place had it whole; says what to put where by hand.
    """
    name, folder = filename(id), cache_folder()
    path = folder / name
    reasons = []
    for base in os.environ.get("CPQL_D4RL_MIRROR", "").split() or URLS:
        try:
            url = f"{base.rstrip('/')}/{name}"
            # The folder is made once there is something to put into it.
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, replacing(path) as aside:
                _receive(response, aside, name, progress)
                try:
                    _contents(aside)
                except DataError as error:
                    # It names the file aside, which is gone by the time that anyone reads this.
                    raise ValueError(str(error).partition(": ")[2]) from error
            return path
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"{base} ({getattr(error, 'reason', None) or error or type(error).__name__})")
    raise DataError(f"{name} can't be downloaded from {', '.join(reasons)}: put it into {folder} by hand")


def _receive(response: http.client.HTTPResponse, path: Path, name: str, progress: Progress | None) -> None:
    total = int(response.headers.get("Content-Length") or 0)
    done = 0
    with path.open("wb") as file:
        while block := response.read(1 << 20):
            file.write(block)
            done += len(block)
            if progress is not None:
                progress(f"download {name}", done, total)
    if total and done != total:
        raise ValueError(f"cut off after {done} of {total} bytes")
