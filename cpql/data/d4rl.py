"""D4RL's datasets: HDF5 files in its layout, where they lie and where they can be had.

The layout is a flat file of observations [N, S], actions [N, A], rewards [N], terminals [N], timeouts [N]
and, since v2, next_observations [N, S]. Anything else in it (`infos/*`, `metadata/*`) is left alone. What
cpql itself collects is kept in the same layout, and carries an attribute that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import urlsplit

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from cpql.data.download import MOST, fetch, verify_recorded
from cpql.data.request import AnotherDatasetError, Request, Source
from cpql.data.transitions import Provenance, Reading, Transitions
from cpql.errors import DataError
from cpql.io import Progress, sha256_of

__all__ = [
    "D4RL",
    "Progress",
    "cache_folder",
    "clear",
    "download",
    "filename",
    "find",
    "misfit",
    "opened",
    "origin",
    "origin_of",
    "read",
    "replacing",
    "urls",
    "user_folder",
    "write",
]

# D4RL's own host, which is asked last as nobody vouches for what it sends, and a copy without its folders.
HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
ORIGIN = "cpql_origin"
# Whose data a file may say that it holds; there may have been acting besides.
ORIGINS = ("embedded", "minari", "stable-baselines3")
# How wide D4RL's observations and actions are, by the first word of a dataset's id.
WIDTHS = {
    "hopper": (11, 3),
    "halfcheetah": (17, 6),
    "walker2d": (17, 6),
    "ant": (111, 8),
    "antmaze": (29, 8),
    "maze2d": (4, 2),
    "pen": (45, 24),
    "hammer": (46, 26),
    "door": (39, 28),
    "relocate": (39, 30),
    "kitchen": (60, 9),
}
# Ant's rows, the widest, have some 230 numbers of 4 or 8 bytes, and what the simulator said besides.
MOST_ROW_BYTES = 4096
# Compressed floating-point data shrink a few times, sparse ones a few ten times; zeros a thousand times.
MOST_EXPANSION = 100
UNSUSPICIOUS_BYTES = 64 << 20


class D4RL(Source):
    """D4RL's own files, in its cache folder, else downloaded."""

    description = "D4RL's"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        about = request.about("d4rl")
        return find(about["id"], about.get("path", "")) if about else None

    def fetch(self, request: Request) -> Path:
        """See `Source`."""
        about = request.about("d4rl")
        if not about:
            raise DataError(f"{request.task.name}: D4RL has no counterpart: expected dataset.id to name one")
        _ = request.facts  # an environment that can't be made costs no download
        return download(
            about["id"],
            request.progress,
            path=about.get("path", ""),
            rows=about.get("rows"),
            say=request.say,
        )

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`."""
        about = request.about("d4rl")
        if reason := misfit(path, about["id"], about.get("rows")):
            raise AnotherDatasetError(reason)
        return read(path, about["id"], source="d4rl", rows=about.get("rows"), **request.reading)


def user_folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or else `default`; either may begin with `~`.

    Raises:
        DataError: it begins with `~`, and there is no home folder.
    """
    path = os.environ.get(variable) or default
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"there is no home folder for {path}: expected {variable} to name a folder"
        ) from error


def cache_folder() -> Path:
    """Where D4RL keeps its files: `$D4RL_DATASET_DIR`, else `~/.d4rl/datasets`.

    Raises:
        DataError: there is no home folder.
    """
    return user_folder("D4RL_DATASET_DIR", "~/.d4rl/datasets")


def filename(id: str) -> str:
    """Name a dataset's file: `hopper-medium-v2` is `hopper_medium-v2.hdf5`.

    Raises:
        DataError: `id` isn't a D4RL id.
    """
    match = re.fullmatch(r"([A-Za-z0-9]+(?:-[A-Za-z0-9]+)*)-(v\d+)", id)
    if match is None:
        raise DataError(f"'{id}' isn't a D4RL id: expected one such as 'hopper-medium-v2'")
    return f"{match[1].replace('-', '_')}-{match[2]}.hdf5"


def urls(id: str, path: str = "") -> list[str]:
    """Where a dataset's file can be had, by https first.

    Args:
        id: D4RL's.
        path: of the file under D4RL's host, as in `Task.datasets`; by default the locomotion folder and the
            id's name.
    """
    path = path or f"gym_mujoco_v2/{filename(id)}"
    return [MIRROR + path.rpartition("/")[2], HOST + path]


def find(id: str, path: str = "") -> Path | None:
    """Give a dataset's file in the cache folder, or None; see `urls` for the arguments.

    Raises:
        DataError: there is no home folder.
    """
    file = cache_folder() / (path.rpartition("/")[2] or filename(id))
    # Unlike `Path.exists`, it has no objection to a home folder of somebody else's.
    return file if os.path.exists(file) else None


def read(
    path: str | os.PathLike[str],
    id: str,
    *,
    source: str = "file",
    rows: int | None = None,
    **reading: Unpack[Reading],
) -> Transitions:
    """Read and check any HDF5 file in D4RL's layout.

    Args:
        path: the file.
        id: the dataset's id, for the provenance.
        source: "file" or "d4rl". A file that cpql collected says so itself, and that wins, so that it
            can't pass for D4RL under another name.
        rows: that D4RL's file has, see `misfit`.
        **reading: see `Reading`.

    Raises:
        DataError: the file is missing, empty, truncated, not HDF5 or doesn't hold valid transitions; or its
            source is to be "d4rl", and it can't be D4RL's or isn't what was downloaded any more.
    """
    path = Path(path)
    with opened(path) as (arrays, said), ThreadPoolExecutor(1) as beside:
        if source == "d4rl" and said is None and (reason := _misfit(path.name, arrays, id, rows)):
            raise DataError(reason)
        hashing = beside.submit(sha256_of, path)
        details: dict[str, Any] = {}
        if said is not None:
            source, id, details = said
        data = Transitions.from_dict(arrays, source=source, id=id, file=path.name, details=details, **reading)
        sha256 = hashing.result()
    if source == "d4rl":
        verify_recorded(path, sha256)
    return dataclasses.replace(data, provenance=dataclasses.replace(data.provenance, sha256=sha256))


def misfit(path: str | os.PathLike[str], id: str, rows: int | None = None) -> str:
    """Say why a file can't be D4RL's.

    Args:
        path: the file.
        id: D4RL's, whose first word says how wide its rows are.
        rows: of D4RL's file, its entry in `Task.datasets`; None where that isn't known.

    Returns:
        A line that names the file, what was found and what was expected; "" where all that is known fits.

    Raises:
        DataError: it is no file in D4RL's layout at all, or damaged.
    """
    path = Path(path)
    with opened(path) as (arrays, said):
        if said is not None:
            return f"{path.name}: carries '{ORIGIN}', as cpql's own files do: expected D4RL's {id}"
        return _misfit(path.name, arrays, id, rows)


def _misfit(name: str, arrays: Mapping[str, h5py.Dataset], id: str, rows: int | None) -> str:
    widths = WIDTHS.get(id.partition("-")[0], (None, None))
    for key, width in zip(("observations", "actions"), widths, strict=True):
        if key not in arrays:
            return f"{name}: no '{key}': expected D4RL's {id}"
        found: tuple[int, ...] = arrays[key].shape or ()
        if len(found) != 2 or rows not in (None, found[0]) or width not in (None, found[1]):
            expected = ", ".join("any" if size is None else str(size) for size in (rows, width))
            return f"{name}: '{key}' has shape {list(found)}: expected [{expected}] of D4RL's {id}"
    return ""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, h5py.Dataset], tuple[str, str, dict[str, Any]] | None]]:
    """Open a file in D4RL's layout: its arrays, looked at but not read yet, and the origin that cpql wrote.

    What is refused here costs neither time nor memory: a link to elsewhere, and an array that declares far
    more than the file holds.

    Raises:
        DataError: it isn't such a file, or, inside the block, can't be read to its end.
    """
    name = path.name
    if not path.exists():
        found = "a symbolic link that leads nowhere" if path.is_symlink() else "no such file"
        raise DataError(f"{name}: {found} in {path.absolute().parent}: expected HDF5 in D4RL's layout")
    if not path.is_file():
        raise DataError(f"{name}: not a file: expected HDF5 in D4RL's layout")
    if path.stat().st_size == 0:
        raise DataError(f"{name}: an empty file: expected HDF5 in D4RL's layout")
    try:
        if not h5py.is_hdf5(path):
            raise DataError(f"{name}: not HDF5: expected HDF5 in D4RL's layout")
        with h5py.File(path, "r") as file:
            arrays = {key: _dataset(file, key, name) for key in KEYS if file.get(key, getlink=True)}
            if not arrays:
                found = ", ".join(file) or "nothing"
                raise DataError(f"{name}: none of D4RL's arrays, only {found}: expected {', '.join(KEYS)}")
            text = file.attrs.get(ORIGIN)
            yield arrays, None if text is None else origin(text, f"{name}: the attribute")
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, can't be read ({reason}): expected whole HDF5") from error


def _dataset(file: h5py.File, key: str, name: str) -> h5py.Dataset:
    """One array of the file, and of nothing but the file."""
    link = file.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise DataError(f"{name}: '{key}' is a link to elsewhere: expected an array")
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{name}: '{key}' is a group: expected an array")
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{name}: '{key}' keeps its numbers in another file: expected an array")
    declared, held = (
        dataset.size * dataset.dtype.itemsize if dataset.shape else 0,
        dataset.id.get_storage_size(),
    )
    if len(dataset.shape or ()) > 1 and declared > UNSUSPICIOUS_BYTES and declared > MOST_EXPANSION * held:
        raise DataError(
            f"{name}: '{key}' declares {declared / 2**30:,.1f} GiB and holds {held / 2**20:,.1f} MiB: "
            f"expected an array that is written"
        )
    return dataset


def origin_of(provenance: Provenance) -> str | None:
    """What a file of other people's layout must say about data that came from cpql or Minari: JSON, or None.

    D4RL's data carry none: a copy could be changed by anyone, and isn't D4RL's any more.
    """
    if provenance.source in ("d4rl", "file", "dict"):
        return None
    return json.dumps({"source": provenance.source, "id": provenance.id, "details": provenance.details})


def origin(text: str, where: str) -> tuple[str, str, dict[str, Any]]:
    """Read what `origin_of` wrote: source, id and details.

    Anyone can write that. So it can say that data are cpql's own or Minari's, never that they are D4RL's:
    what claims anything else is a file like any other.

    Raises:
        DataError: it is damaged; `where` says what of which file it is.
    """
    try:
        found = json.loads(text)
        source, id, details = str(found["source"]), str(found["id"]), dict(found["details"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{where} '{ORIGIN}' is damaged: expected what cpql wrote") from error
    return (source if source.removesuffix(" + online") in ORIGINS else "file"), id, details


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
        # Where it couldn't be made, there is nothing to remove, and a reason already.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def clear(path: Path) -> None:
    """Remove what processes that were killed in `replacing` left; for whoever alone may write `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.part"):
        with contextlib.suppress(OSError):
            left.unlink()


def download(
    id: str,
    progress: Progress | None = None,
    *,
    path: str = "",
    rows: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Fetch a dataset into the cache folder, unless it lies there already; see `download.fetch`.

    An own mirror is asked first: each folder in `$CPQL_D4RL_MIRROR` (URLs with spaces between) for the last
    two parts of D4RL's URL, `FOLDER/gym_mujoco_v2/hopper_medium-v2.hdf5`, then for
    `FOLDER/hopper_medium-v2.hdf5`.

    Args:
        id: D4RL's.
        progress: called with bytes.
        path: of the file under D4RL's host; see `urls`. It names the file, as it does for the d4rl package.
        rows: of the file, its entry in `Task.datasets`; None where that isn't known.
        say: takes the line that another process is waited for.

    Raises:
        DataError: no place had it whole, or what it had can't be D4RL's; says what to put where by hand. Or
            what lies there already can't be, or see `download.fetch`.
    """
    places = urls(id, path)
    path = "/".join(urlsplit(places[-1]).path.split("/")[-2:])
    name = path.rpartition("/")[2]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"{id}: '{places[-1]}' names no file: expected one at its end, such as x.hdf5")
    folders = [folder.rstrip("/") for folder in os.environ.get("CPQL_D4RL_MIRROR", "").split()]
    own = [f"{folder}/{place}" for folder in folders for place in (path, name)]

    def check(file: Path) -> None:
        if reason := misfit(file, id, rows):
            raise DataError(reason)

    most = MOST if rows is None else min(MOST, UNSUSPICIOUS_BYTES + rows * MOST_ROW_BYTES)
    return fetch([*own, *places], cache_folder() / name, check, progress=progress, say=say, most=most)
