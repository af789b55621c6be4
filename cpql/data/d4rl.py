"""D4RL's datasets: HDF5 files in its layout, their cache folder and the hosts to download them from.

The layout is a flat file of observations [N, S], actions [N, A], rewards [N], terminals [N], timeouts [N]
and, since v2, next_observations [N, S]. Anything else in it (`infos/*`, `metadata/*`) is ignored. What
cpql itself collects is kept in the same layout, and carries an attribute that says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from cpql.data.download import fetch, verify_recorded
from cpql.data.request import AnotherDatasetError, Request, Source
from cpql.data.transitions import Provenance, Reading, Transitions
from cpql.errors import DataError
from cpql.io import aside, sha256_of, user_folder

__all__ = [
    "D4RL",
    "KEYS",
    "ORIGIN",
    "Origin",
    "array_of",
    "cache_folder",
    "check_file",
    "check_fit",
    "filename",
    "is_bomb",
    "object_of",
    "opened",
    "origin",
    "origin_of",
    "read",
    "write",
]

# D4RL's own host, tried last because it has no https, and a copy of its files without its folders.
HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
ORIGIN = "cpql_origin"
# Sources that a file may name, each also with " + online" after it.
ORIGINS = ("embedded", "minari", "regenerated", "stable-baselines3")
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
# Compressed floating-point data shrink a few times, sparse ones a few ten times; zeros a thousand times.
MOST_EXPANSION = 100
UNSUSPICIOUS_BYTES = 64 << 20


class D4RL(Source):
    """D4RL's own files, in its cache folder, else downloaded.

    `$CPQL_D4RL_MIRROR` names mirrors of the user's own, URLs of folders with spaces between, which are tried
    first: `FOLDER/gym_mujoco_v2/hopper_medium-v2.hdf5`, then `FOLDER/hopper_medium-v2.hdf5`.
    """

    description = "D4RL's"
    way = "`cpql-data download {}` downloads D4RL's"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        entry = request.about("d4rl")
        file = cache_folder() / _path(entry).rpartition("/")[2] if entry else None
        # Unlike `Path.exists`, this doesn't raise where the folder can't be read.
        return file if file and os.path.exists(file) else None

    def fetch(self, request: Request) -> Path:
        """See `Source`; a file that is there already is checked."""
        entry = request.about("d4rl")
        if not entry:
            raise DataError(f"{request.task.name}: D4RL has no counterpart: expected dataset.id to name one")
        _ = request.spec  # raises before the download if the environment can't be made
        path = _path(entry)
        name, folders = path.rpartition("/")[2], os.environ.get("CPQL_D4RL_MIRROR", "").split()
        last = "/".join(path.split("/")[-2:])
        own = [f"{folder.rstrip('/')}/{place}" for folder in folders for place in (last, name)]
        return fetch(
            [*own, MIRROR + name, HOST + path],
            cache_folder() / name,
            lambda file: check_fit(file, entry["id"], entry.get("rows")),
            progress=request.progress,
            say=request.say,
        )

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`."""
        entry = request.about("d4rl")
        check_fit(path, entry["id"], entry.get("rows"))
        data = read(path, entry["id"], source="d4rl", **request.reading)
        verify_recorded(path, data.provenance.sha256)
        return data


def cache_folder() -> Path:
    """Where D4RL keeps its files: `$D4RL_DATASET_DIR`, else `~/.d4rl/datasets`."""
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


def _path(entry: Mapping[str, Any]) -> str:
    """A dataset's path under D4RL's host; by default the id's file name in the locomotion folder."""
    return entry.get("path") or f"gym_mujoco_v2/{filename(entry['id'])}"


def check_fit(path: Path, id: str, rows: int | None = None) -> None:
    """Check that a file can be D4RL's `id`: cpql didn't write it, and known shapes are D4RL's.

    Raises:
        AnotherDatasetError: it can't be.
        DataError: it isn't in D4RL's layout, or is damaged.
    """
    with opened(path) as (arrays, origin):
        if origin is not None:
            raise AnotherDatasetError(
                f"{path.name}: carries '{ORIGIN}', as cpql's own files do: expected D4RL's {id}"
            )
        widths = WIDTHS.get(id.partition("-")[0], (None, None))
        for key, width in zip(("observations", "actions"), widths, strict=True):
            if key not in arrays:
                raise AnotherDatasetError(f"{path.name}: no '{key}': expected D4RL's {id}")
            found = list(arrays[key].shape or ())
            if len(found) != 2 or rows not in (None, found[0]) or width not in (None, found[1]):
                expected = ", ".join("any" if size is None else str(size) for size in (rows, width))
                raise AnotherDatasetError(
                    f"{path.name}: '{key}' has shape {found}: expected [{expected}] of D4RL's {id}"
                )


def read(
    path: str | os.PathLike[str], id: str, *, source: str = "file", **reading: Unpack[Reading]
) -> Transitions:
    """Read and check any HDF5 file in D4RL's layout, as dataset `id`.

    The origin in a file that cpql wrote overrides `source` and `id`, so that such a file can't pass for
    D4RL's under another name.

    Raises:
        DataError: the file is missing, empty, truncated, not HDF5 or doesn't hold valid transitions.
    """
    path = Path(path)
    with opened(path) as (arrays, origin):
        about = origin or Origin(source, id, {})
        return Transitions.from_dict(
            arrays, **about._asdict(), file=path.name, sha256=sha256_of(path), **reading
        )


class Origin(NamedTuple):
    """Where a file's data came from; see `Provenance`."""

    source: str
    id: str
    details: dict[str, Any]


def origin(text: str, where: str) -> Origin:
    """Read what `origin_of` wrote; `where` names the file and the place in it in an error.

    Anyone can write an origin. So one may claim that data are cpql's own or Minari's, never that they are
    D4RL's: any other claim is read as "file".

    Raises:
        DataError: it is damaged.
    """
    try:
        found = json.loads(text)
        source, id, details = str(found["source"]), str(found["id"]), dict(found["details"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{where} '{ORIGIN}' is damaged: expected what cpql wrote") from error
    return Origin(source if source.removesuffix(" + online") in ORIGINS else "file", id, details)


def origin_of(provenance: Provenance) -> str | None:
    """The origin to write into a file, as JSON: of data from cpql or Minari; None for any other data.

    A copy of D4RL's data gets none: anyone could have changed it, so that it isn't D4RL's any more.
    """
    if provenance.source in ("d4rl", "file", "dict"):
        return None
    return json.dumps({"source": provenance.source, "id": provenance.id, "details": provenance.details})


def check_file(path: Path, expected: str) -> None:
    """Raise a DataError, which says what is expected, unless there is a file."""
    if not path.is_file():
        found = "not a file" if os.path.lexists(path) else "no such file"
        raise DataError(f"{path.name}: {found} in {path.absolute().parent}: expected {expected}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, h5py.Dataset], Origin | None]]:
    """Open a file in D4RL's layout: its arrays, not read yet, and the origin if cpql wrote the file.

    Links to other files, and arrays that declare far more bytes than are stored, are refused before anything
    is read.

    Raises:
        DataError: it isn't such a file, or reading it inside the block fails.
    """
    name = path.name
    check_file(path, "HDF5 in D4RL's layout")
    try:
        with h5py.File(path, "r") as file:
            links = file.id.links
            arrays = {k: h5py.Dataset(array_of(file.id, k, name)) for k in KEYS if links.exists(k.encode())}
            if not arrays:
                found = ", ".join(file) or "nothing"
                raise DataError(f"{name}: none of D4RL's arrays, only {found}: expected {', '.join(KEYS)}")
            for key, array in arrays.items():
                stored = array.id.get_storage_size()
                if len(array.shape or ()) > 1 and is_bomb(array.nbytes, stored):
                    raise DataError(
                        f"{name}: '{key}' declares {array.nbytes / 2**30:,.1f} GiB and holds "
                        f"{stored / 2**20:,.1f} MiB: expected an array that is written"
                    )
            text = file.attrs.get(ORIGIN)
            yield arrays, None if text is None else origin(text, f"{name}: the attribute")
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, can't be read ({reason}): expected whole HDF5") from error


def object_of(file: Any, path: str, name: str) -> Any:
    """What a path in an HDF5 file leads to, by hard links alone: then it is in this file.

    With h5py's low-level interface: with the other, looking at a short array takes longer than reading it.
    `file` is the file's low-level id, `name` its name for errors.
    """
    found = file
    for key in path.encode().split(b"/"):
        if not isinstance(found, h5py.h5g.GroupID) or not found.links.exists(key):
            raise DataError(f"{name}: no '{path}': expected an array")
        if found.links.get_info(key).type != h5py.h5l.TYPE_HARD:
            raise DataError(f"{name}: '{path}' is a link to elsewhere: expected an array")
        found = h5py.h5o.open(found, key)
    return found


def array_of(file: Any, path: str, name: str) -> Any:
    """An array of numbers that are in this file, not read yet; see `object_of`."""
    array, found = object_of(file, path, name), ""
    if not isinstance(array, h5py.h5d.DatasetID):
        found = "is a group"
    elif (made := array.get_create_plist()).get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
        found = "keeps its numbers in another file"
    elif array.dtype.kind not in "biuf":
        found = f"holds {array.dtype}"
    if found:
        raise DataError(f"{name}: '{path}' {found}: expected an array of numbers")
    return array


def is_bomb(declared: int, stored: int) -> bool:
    """Whether `declared` bytes are far more than `stored` bytes can hold, compressed."""
    return declared > UNSUSPICIOUS_BYTES and declared > MOST_EXPANSION * stored


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]
) -> None:
    """Write arrays by D4RL's keys, whole or not at all; the folder is made, a file of that name replaced.

    Attributes are text or numbers; `ORIGIN` is what `origin_of` gives.

    Raises:
        DataError: it can't be written.
    """
    path = Path(path)
    try:
        with aside(path) as temporary, h5py.File(temporary, "w") as file:
            for key in sorted(arrays):  # the same arrays give the same bytes, and SHA-256
                file.create_dataset(key, data=np.asarray(arrays[key]), track_times=False)
            file.attrs.update(attributes)
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error
