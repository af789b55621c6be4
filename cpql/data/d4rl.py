"""D4RL's datasets: files in its layout, their cache folder and the hosts to download them from.

The layout is a flat HDF5 file of observations [N, S], actions [N, A], rewards [N], terminals [N], timeouts
[N] and, since v2, next_observations [N, S]. Anything else in it (`infos/*`, `metadata/*`) is ignored. What
cpql itself collects is kept in the same layout, and carries an attribute that says so. An NPZ file with the
same keys, as `numpy.savez` writes it, will do as well; arrays of Python objects are pickles and never read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import h5py  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from cpql.data.download import fetch, verify_recorded
from cpql.data.request import AnotherDatasetError, Request, Source
from cpql.data.rows import KEYS
from cpql.data.transitions import Provenance, Reading, Transitions
from cpql.errors import DataError, did_you_mean
from cpql.io import aside, sha256_of, user_folder

__all__ = [
    "D4RL",
    "ENDINGS",
    "KEYS",
    "ORIGIN",
    "Form",
    "cache_folder",
    "filename",
    "form",
    "origin",
]
__all__ += ["array_of", "npz", "object_of", "origin_of", "read", "refuse_bomb", "write"]

# D4RL's own host, tried last because it has no https, and a copy of its files without its folders.
HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
ORIGIN = "cpql_origin"
Form = Literal["hdf5", "npz", "minari"]
ENDINGS: dict[str, Form] = {".hdf5": "hdf5", ".h5": "hdf5", ".npz": "npz"}
"""The form of a file by its ending."""
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
        file = cache_folder() / Path(_path(entry)).name if entry else None
        # Unlike `Path.exists`, this doesn't raise where the folder can't be read.
        return file if file and os.path.exists(file) else None

    def fetch(self, request: Request) -> Path:
        """See `Source`; a file that is there already is checked."""
        entry = request.about("d4rl")
        if not entry:
            raise DataError(f"{request.task.name}: D4RL has no counterpart: expected dataset.id to name one")
        _ = request.spec  # raises before the download if the environment can't be made
        path, folders = _path(entry), os.environ.get("CPQL_D4RL_MIRROR", "").split()
        *_, within, name = path.split("/")
        own = [f"{folder.rstrip('/')}/{end}" for folder in folders for end in (f"{within}/{name}", name)]
        return fetch(
            [*own, MIRROR + name, HOST + path],
            cache_folder() / name,
            lambda file: _check_fit(file, entry),
            progress=request.progress,
            say=request.say,
        )

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`."""
        entry = request.about("d4rl")
        _check_fit(path, entry)
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


def _check_fit(path: Path, entry: Mapping[str, Any]) -> None:
    """Check that a file can be the entry's: cpql didn't write it, and known shapes are D4RL's.

    Raises:
        AnotherDatasetError: it can't be.
        DataError: it isn't in D4RL's layout, or is damaged.
    """
    rows, widths = entry.get("rows"), WIDTHS.get(entry["id"].partition("-")[0], (None, None))
    with _opened(path, "hdf5") as (arrays, origin):
        found = f"carries '{ORIGIN}', as cpql's own files do: expected" if origin else ""
        for key, width in zip(("observations", "actions"), widths, strict=True):
            shape = list(arrays[key].shape or ()) if key in arrays else []
            if not found and (
                len(shape) != 2 or rows not in (None, shape[0]) or width not in (None, shape[1])
            ):
                expected = ", ".join("any" if size is None else str(size) for size in (rows, width))
                found = f"'{key}' has shape {shape}: expected [{expected}] of"
    if found:
        raise AnotherDatasetError(f"{path.name}: {found} D4RL's {entry['id']}")


def read(
    path: str | os.PathLike[str], id: str, *, source: str = "file", **reading: Unpack[Reading]
) -> Transitions:
    """Read and check any file in D4RL's layout, HDF5 or NPZ, as dataset `id`.

    The origin in a file that cpql wrote overrides `source` and `id`, so that such a file can't pass for
    D4RL's under another name.

    Raises:
        DataError: the file is missing, empty, truncated, in no such form or doesn't hold valid transitions.
    """
    path = Path(path)
    with _opened(path, form(path)) as (arrays, text):
        about = {"source": source, "id": id} if text is None else origin(text, path.name)
        return Transitions.from_dict(arrays, **about, file=path.name, sha256=sha256_of(path), **reading)


def form(path: str | os.PathLike[str]) -> Form:
    """The form of a dataset: a folder is Minari's; a file's form follows from its ending, or its content."""
    path = Path(path)
    if path.is_dir():
        return "minari"
    by_content: Form = "npz" if path.is_file() and zipfile.is_zipfile(path) else "hdf5"
    return ENDINGS.get(path.suffix.lower(), by_content)


def origin(text: str, name: str) -> dict[str, Any]:
    """Read the `source`, `id` and `details` that `origin_of` wrote; `name` is the file's, for an error.

    Anyone can write an origin. So one may claim that data are cpql's own or Minari's, never that they are
    D4RL's: any other claim is read as "file".

    Raises:
        DataError: it is damaged.
    """
    try:
        found = json.loads(text)
        source, id, details = str(found["source"]), str(found["id"]), dict(found["details"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{name}: '{ORIGIN}' is damaged: expected what cpql wrote") from error
    known = source.removesuffix(" + online") in ORIGINS
    return {"source": source if known else "file", "id": id, "details": details}


def origin_of(provenance: Provenance) -> dict[str, str]:
    """`ORIGIN` to write into a file, as JSON: of data from cpql or Minari; nothing for any other data.

    A copy of D4RL's or OGBench's data gets none: anyone could have changed it, so that it is theirs no more.
    """
    if provenance.source in ("d4rl", "ogbench", "file", "dict"):
        return {}
    return {ORIGIN: json.dumps({key: getattr(provenance, key) for key in ("source", "id", "details")})}


@contextlib.contextmanager
def _opened(path: Path, kind: Form) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The arrays of a file in D4RL's layout, HDF5's not read yet, and the origin if cpql wrote the file.

    Links to other files, and arrays that declare far more bytes than are stored, are refused before anything
    is read.

    Raises:
        DataError: it isn't such a file, or reading it inside the block fails.
    """
    name = path.name
    if not path.is_file():
        found = "not a file" if os.path.lexists(path) else "no such file"
        raise DataError(f"{name}: {found} in {path.absolute().parent}: expected one in D4RL's layout")
    if kind == "npz":
        arrays = npz(path, "D4RL's", tuple(KEYS))
        text = arrays.pop(ORIGIN, None)
        yield arrays, None if text is None else str(text)
        return
    try:
        with h5py.File(path, "r") as file:
            links = file.id.links
            arrays = {k: h5py.Dataset(array_of(file.id, k, name)) for k in KEYS if links.exists(k.encode())}
            if not arrays:
                found = ", ".join(file) or "nothing"
                raise DataError(f"{name}: none of D4RL's arrays, only {found}: expected {', '.join(KEYS)}")
            refuse_bomb(name, sum(array.nbytes for array in arrays.values()), path)
            yield arrays, file.attrs.get(ORIGIN)
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, can't be read ({reason}): expected whole HDF5") from error


def npz(path: Path, whose: str, known: Sequence[str]) -> dict[str, Any]:
    """The arrays of an NPZ file with no keys but known ones and `ORIGIN`; whole: it can't be read in parts.

    Raises:
        DataError: it isn't such a file, or is damaged; says `whose` keys are expected.
    """
    arrays, name, key = {}, path.name, "the archive"
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {each.removesuffix(".npy"): archive.getinfo(each) for each in archive.namelist()}
            keys = {each: info for each, info in keys.items() if not each.startswith(("infos/", "metadata/"))}
            for each in keys.keys() - {*known, ORIGIN}:
                raise DataError(f"{name}: {each!r} is none of {whose} keys: {did_you_mean(each, known)}")
            refuse_bomb(name, sum(info.file_size for info in keys.values()), path)
            for key, info in keys.items():
                with archive.open(info) as file:
                    arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise errors of every kind on damaged bytes
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, '{key}' can't be read ({reason}): expected whole NPZ") from error
    return arrays


def object_of(group: Any, path: str, name: str) -> Any:
    """What a path in an HDF5 group leads to, by hard links alone: then it is in this file.

    With h5py's low-level interface: with the other, looking at a short array takes longer than reading it.
    `group` is a low-level id, `name` the file's name for errors.
    """
    found = group
    for key in path.encode().split(b"/"):
        if not isinstance(found, h5py.h5g.GroupID) or not found.links.exists(key):
            raise DataError(f"{name}: no '{path}': expected an array")
        if found.links.get_info(key).type != h5py.h5l.TYPE_HARD:
            raise DataError(f"{name}: '{path}' is a link to elsewhere: expected an array")
        found = h5py.h5o.open(found, key)
    return found


def array_of(group: Any, path: str, name: str) -> Any:
    """An array of numbers that are in this file, not read yet; see `object_of`."""
    array, found = object_of(group, path, name), ""
    if not isinstance(array, h5py.h5d.DatasetID):
        found = "is a group"
    elif (made := array.get_create_plist()).get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
        found = "keeps its numbers in another file"
    elif array.dtype.kind not in "biuf":
        found = f"holds {array.dtype}"
    if found:
        raise DataError(f"{name}: '{path}' {found}: expected an array of numbers")
    return array


def refuse_bomb(name: str, declared: int, path: Path) -> None:
    """Raise a DataError if arrays of `declared` bytes are far more than a file can hold, compressed."""
    size = path.stat().st_size
    if declared > max(UNSUSPICIOUS_BYTES, MOST_EXPANSION * size):
        raise DataError(
            f"{name}: declares {declared / 2**30:,.1f} GiB in a file of {size / 2**20:,.2f} MiB: expected at "
            f"most {MOST_EXPANSION} times as much"
        )


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]
) -> None:
    """Write arrays by D4RL's keys, whole or not at all; the folder is made, a file of that name replaced.

    The ending says the form, HDF5 or NPZ. Attributes are text or numbers, such as `origin_of` gives.

    Raises:
        DataError: it can't be written.
    """
    path = Path(path)
    try:
        with aside(path) as temporary:
            if ENDINGS.get(path.suffix.lower()) == "npz":
                with temporary.open("wb") as stream:  # to a name numpy would add an ending
                    np.savez(stream, allow_pickle=False, **arrays, **attributes)
                return
            with h5py.File(temporary, "w") as file:
                for key in sorted(arrays):  # the same arrays give the same bytes, and SHA-256
                    file.create_dataset(key, data=np.asarray(arrays[key]), track_times=False)
                file.attrs.update(attributes)
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error
