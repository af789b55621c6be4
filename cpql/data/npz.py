"""NPZ files: numpy's own archive, with D4RL's keys.

An archive made by `numpy.savez` of observations [N, S], actions [N, A], rewards [N], terminals [N] and,
where known, timeouts [N] and next_observations [N, S]. What the keys mean is told in
`cpql.data.transitions`. Arrays of Python objects are pickles and are never read; what an array declares is
compared with what the archive holds before any of it is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cpql.data.d4rl import KEYS, MOST_EXPANSION, ORIGIN, UNSUSPICIOUS_BYTES, origin, origin_of, replacing
from cpql.data.transitions import Reading, Transitions
from cpql.errors import DataError, did_you_mean

__all__ = ["read", "write"]

TABLES = ("observations", "next_observations", "actions")
# D4RL's own files carry these besides; they say nothing about the transitions.
LEFT_ALONE = ("infos/", "metadata/")
MOST_ORIGIN_BYTES = 1 << 20
# What zipfile, and numpy's parser of headers, raise on damaged bytes.
DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
Member = tuple[tuple[int, ...], np.dtype[Any]]


def read(
    path: str | os.PathLike[str],
    id: str | None = None,
    **reading: Unpack[Reading],
) -> Transitions:
    """Read and check an NPZ file.

    Args:
        path: the file.
        id: the dataset's id, for the provenance; the file's name without its ending by default. A file with
            data that mustn't pass for D4RL's says so itself (see `cpql.data.d4rl.origin_of`), and that wins.
        **reading: see `Reading`.

    Raises:
        DataError: the file is missing or damaged, isn't NPZ, declares more than it holds, lacks a key or has
            one that D4RL's layout doesn't know, or doesn't hold valid transitions.
    """
    path = Path(path)
    name = path.name
    if not path.exists():
        raise DataError(f"{name}: no such file in {path.absolute().parent}: expected NPZ with D4RL's keys")
    if not path.is_file():
        raise DataError(f"{name}: not a file: expected NPZ with D4RL's keys")
    key = "the archive"
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{name}: not NPZ, or cut off: expected what numpy.savez writes, whole")
        with zipfile.ZipFile(path) as archive:
            members = {}
            for key in _keys(archive, name):
                members[key] = _member(archive, key, name)
            _check_sizes(members, path.stat().st_size, name)
            arrays = {}
            for key in members:
                with archive.open(f"{key}.npy") as file:
                    arrays[key] = npy.read_array(file, allow_pickle=False)
        with path.open("rb") as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: damaged, '{key}' can't be read ({reason}): expected whole NPZ") from error
    text = arrays.pop(ORIGIN, None)
    source, id, details = (
        ("file", path.stem if id is None else id, {}) if text is None else origin(str(text), f"{name}:")
    )
    return Transitions.from_dict(
        arrays, source=source, id=id, file=name, sha256=sha256, details=details, **reading
    )


def _keys(archive: zipfile.ZipFile, name: str) -> list[str]:
    """The keys to read, if the archive has no others that could be a slip of the pen."""
    keys = [entry.removesuffix(".npy") for entry in archive.namelist()]
    known = (*KEYS, ORIGIN)
    for key in keys:
        if key not in known and not key.startswith(LEFT_ALONE):
            raise DataError(f"{name}: {key!r} is none of D4RL's keys: {did_you_mean(key, KEYS)}")
        if keys.count(key) > 1:
            raise DataError(f"{name}: '{key}' is there {keys.count(key)} times: expected it once")
    return [key for key in keys if key in known]


def _member(archive: zipfile.ZipFile, key: str, name: str) -> Member:
    """What an array declares, if the archive can hold that."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise DataError(
                f"{name}: '{key}' is NPY {version[0]}.{version[1]}: expected numbers, NPY 1.0 or 2.0"
            )
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        start = file.tell()
    if dtype.kind not in ("U" if key == ORIGIN else "biuf"):
        found = "Python objects" if dtype.hasobject else dtype
        raise DataError(f"{name}: '{key}' holds {found}: expected {'text' if key == ORIGIN else 'numbers'}")
    declared, held = math.prod(shape) * dtype.itemsize, info.file_size - start
    if declared != held or any(size < 0 for size in shape):
        raise DataError(
            f"{name}: '{key}' declares {list(shape)} of {dtype}, {declared:,} bytes, and holds {held:,}: "
            "expected as much as declared"
        )
    if key in TABLES and _implausible(declared, info.compress_size):
        raise _bomb(name, f"'{key}'", declared, info.compress_size)
    if key == ORIGIN and declared > MOST_ORIGIN_BYTES:
        raise DataError(f"{name}: '{key}' is {declared:,} bytes long: expected a line that cpql wrote")
    return shape, dtype


def _check_sizes(members: Mapping[str, Member], size: int, name: str) -> None:
    """Refuse arrays that don't belong together while they cost nothing; `from_dict` looks at the rest."""
    tables = {key: shape for key, (shape, _) in members.items() if key != ORIGIN}
    rows = tables.get("observations", ())[:1]
    for key, shape in tables.items():
        if rows and shape[:1] != rows:
            found = f"{shape[0]:,} rows" if shape else "no rows"
            raise DataError(f"{name}: '{key}' has {found}: expected {rows[0]:,}, as 'observations' has")
    declared = sum(math.prod(shape) * dtype.itemsize for shape, dtype in members.values())
    if _implausible(declared, size):
        raise _bomb(name, "all of it", declared, size)


def _implausible(declared: int, held: int) -> bool:
    return declared > UNSUSPICIOUS_BYTES and declared > MOST_EXPANSION * held


def _bomb(name: str, what: str, declared: int, held: int) -> DataError:
    return DataError(
        f"{name}: {what} declares {declared / 2**20:,.0f} MiB in {held / 2**20:,.2f} MiB compressed: "
        f"expected at most {MOST_EXPANSION} times as much"
    )


def write(transitions: Transitions, path: str | os.PathLike[str]) -> Path:
    """Write transitions as NPZ, uncompressed, whole or not at all.

    Reading them back gives the same arrays to the bit, the actions in [-1, 1].

    Args:
        transitions: what to write.
        path: the file; its folder is made, and a file of that name is replaced.

    Returns:
        The path.

    Raises:
        DataError: it can't be written.
    """
    path = Path(path)
    arrays: dict[str, NDArray[Any]] = transitions.to_dict()
    text = origin_of(transitions.provenance)
    if text is not None:
        arrays[ORIGIN] = np.array(text)
    try:
        # A stream rather than a name, to which numpy would add an ending.
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise DataError(f"{path.name}: can't be written in {path.absolute().parent} ({error})") from error
    return path
