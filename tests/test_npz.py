"""NPZ: reading, refusing, writing, and that a round trip changes no bit."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpql.data import files
from cpql.data.transitions import Transitions
from cpql.errors import DataError

ROWS = {
    "observations": np.array([[0.0, 1], [2, 3], [4, 5], [6, 7]], np.float32),
    "next_observations": np.array([[2.0, 3], [4, 5], [9, 9], [8, 8]], np.float32),
    "actions": np.array([[0.5], [-0.25], [1], [0]], np.float32),
    "rewards": np.array([1, 2, 3, 4], np.float32),
    "terminals": np.array([False, False, True, False]),
    "timeouts": np.zeros(4, bool),
}


@st.composite
def datasets(draw: st.DrawFn) -> dict[str, NDArray[Any]]:
    """Episodes of any length and end, float32 with every awkward number, D4RL's keys."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    ends = draw(st.lists(st.sampled_from(["terminals", "timeouts", "cut"]), min_size=8, max_size=8))
    state_dim, action_dim = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    odd = np.array([0.0, -0.0, 1e-45, -3.4e38, 1 / 3, 16777217], np.float32)
    rows = sum(lengths)
    observations = np.empty((rows, state_dim), np.float32)
    following = np.empty((rows, state_dim), np.float32)
    flags = {"terminals": np.zeros(rows, bool), "timeouts": np.zeros(rows, bool)}
    start = 0
    for length, end in zip(lengths, ends, strict=False):
        states = generator.normal(size=(length + 1, state_dim)).astype(np.float32)
        states[generator.random(states.shape) < 0.2] = generator.choice(odd)
        observations[start : start + length], following[start : start + length] = states[:-1], states[1:]
        start += length
        if end != "cut":
            flags[end][start - 1] = True
    return {
        "observations": observations,
        "actions": generator.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "rewards": generator.normal(size=rows).astype(np.float32),
        "next_observations": following,
        **flags,
    }


def assert_same(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    """Equal to the bit: -0.0 isn't 0.0 here."""
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == array.dtype and found[key].shape == array.shape, key
        assert found[key].tobytes() == array.tobytes(), key


def test_what_numpy_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    # What people have: float64, a column of its own for the rewards, 0 and 1 for the flags.
    np.savez_compressed(
        path,
        allow_pickle=False,
        observations=ROWS["observations"].astype(np.float64),
        actions=np.asfortranarray(ROWS["actions"].astype(np.float64)),
        rewards=ROWS["rewards"].astype(np.int64)[:, None],
        terminals=ROWS["terminals"].astype(np.uint8),
        timeouts=ROWS["timeouts"],
        next_observations=ROWS["next_observations"],
        **{"infos/goal": np.zeros((4, 3)), "metadata/algorithm": np.array("SAC")},
    )
    data = files.read(path)
    assert_same(data.to_dict(), ROWS)
    assert data.terminated.tolist() == [False, False, True, False]
    assert data.ends.tolist() == [False, False, True, True]
    found = data.provenance
    assert (found.source, found.id, found.file, found.episodes) == ("file", "mine", "mine.npz", 1)
    assert found.return_mean == 6
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert files.read(path, "hopper-medium-v2").provenance.id == "hopper-medium-v2"


def test_actions_and_time_limits_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(
        path,
        allow_pickle=False,
        **(ROWS | {"actions": np.array([[0.0], [1], [2], [4]]), "timeouts": ROWS["terminals"]}),
    )
    data = files.read(path, action_low=0, action_high=[4], time_limits="drop")
    assert data.actions[:, 0].tolist() == [-1, -0.5, 1]
    assert data.rewards.tolist() == [1, 2, 4]
    np.savez(path, allow_pickle=False, **{key: ROWS[key] for key in ROWS if key != "timeouts"})
    assert files.read(path, episode_limit=2).truncated.tolist() == [False, True, False, False]


def test_next_observations_may_be_missing(tmp_path: Path) -> None:
    old = {key: ROWS[key] for key in ROWS if key != "next_observations"}
    np.savez(tmp_path / "old.npz", allow_pickle=False, **old)
    data = files.read(tmp_path / "old.npz")
    assert data.rewards.tolist() == [1, 2, 3]  # the last row has no next one
    assert data.next_observations[:2].tolist() == [[2, 3], [4, 5]]


def member(array: NDArray[Any], header: str | None = None) -> bytes:
    """An array as NPY, its header replaced by another of the same length."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    content = stream.getvalue()
    if header is None:
        return content
    size = int.from_bytes(content[8:10], "little")
    return content[:10] + header.ljust(size - 1).encode() + b"\n" + content[10 + size :]


def archive(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for key, content in members.items():
            file.writestr(f"{key}.npy", content)


def test_what_is_not_npz_is_refused_in_one_line(tmp_path: Path) -> None:
    files.write(Transitions.from_dict(ROWS), tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    flipped = bytearray(content)
    flipped[content.rindex(ROWS["rewards"].tobytes())] ^= 1
    np.save(tmp_path / "single.npy", ROWS["rewards"])
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    (tmp_path / "truncated.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.npz").write_bytes(flipped)
    (tmp_path / "empty.npz").touch()
    (tmp_path / "page.npz").write_text("<html>not here</html>")
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    with zipfile.ZipFile(tmp_path / "nothing.npz", "w"):
        pass
    for name, text in {
        "single": "not a zip file",
        "truncated": "not a zip file",
        "flipped": "damaged, 'rewards' can't be read",
        "empty": "not a zip file",
        "page": "not a zip file",
        "loop": "not a file",
        "missing": "no such file in",
        "nothing": "no 'observations', only nothing",
    }.items():
        with pytest.raises(DataError) as caught:
            files.read(tmp_path / f"{name}.npz")
        message = str(caught.value)
        assert message.startswith(f"{name}.npz: ") and text in message and "\n" not in message


def test_bad_arrays_are_refused_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    good = {key: member(array) for key, array in ROWS.items()}
    table = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
    objects = member(np.array([{}, {}, {}, {}], object))
    for changes, text in (
        ({"rewards": objects}, "damaged, 'rewards' can't be read (Object arrays cannot be loaded"),
        ({"rewards": member(np.array(["a", "b", "c", "d"]))}, "'rewards' holds <U1: expected numbers"),
        ({"rewards": member(np.zeros(4, [("x", "f4")]))}, "'rewards' holds [('x', '<f4')]: expected numbers"),
        ({"rewards": b"junk"}, "damaged, 'rewards' can't be read"),
        ({"rewards": good["rewards"][:-3]}, "damaged, 'rewards' can't be read"),
        ({"actions": member(ROWS["actions"], "{'descr': '<f4'")}, "damaged, 'actions' can't be read"),
        (
            {"actions": member(ROWS["actions"], table % "20000000000, 1")},
            "damaged, 'actions' can't be read",
        ),
        ({"actions": member(ROWS["actions"], table % "-4, -1")}, "damaged, 'actions' can't be read"),
        (
            {"rewards": member(ROWS["rewards"][:3])},
            "'rewards' has shape [3]: expected [4]",
        ),
        ({"rewards": member(np.array(3, np.float32))}, "'rewards' has shape []: expected [4]"),
        ({"timeout": good["timeouts"]}, "'timeout' is none of D4RL's keys: did you mean timeouts"),
        ({"cpql_origin": member(np.array("{"))}, "'cpql_origin' is damaged"),
        ({"cpql_origin": member(np.zeros(4))}, "'cpql_origin' is damaged"),
        ({"cpql_origin": member(np.array("x" * 300_000))}, "'cpql_origin' is damaged"),
    ):
        archive(path, **(good | changes))
        with pytest.raises(DataError) as caught:
            files.read(path)
        message = str(caught.value)
        assert message.startswith("bad.npz: ") and text in message and "\n" not in message, message
    archive(path, **{key: good[key] for key in good if key != "rewards"})
    with pytest.raises(DataError, match=r"bad.npz: no 'rewards', only actions"):
        files.read(path)


def test_an_object_is_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    # The pickle of a global that can't be imported: whoever unpickles it raises something else.
    pickle = b"\x80\x04\x8c\x07no_such\x8c\x06module\x93."
    header = member(np.array([None], object))
    size = 10 + int.from_bytes(header[8:10], "little")
    good = {key: member(array) for key, array in ROWS.items()}
    archive(path, **(good | {"rewards": header[:size] + pickle}))
    with pytest.raises(
        DataError, match=r"bad.npz: damaged, 'rewards' can't be read \(Object arrays cannot be loaded"
    ):
        files.read(path)


@pytest.mark.parametrize("key", ["observations", "rewards"])
def test_a_bomb_is_refused_before_it_is_read(tmp_path: Path, key: str) -> None:
    path = tmp_path / "bomb.npz"
    rows = 9_000_000
    shapes = {"observations": (rows, 1), "actions": (rows, 1), "rewards": (rows,), "terminals": (rows,)}
    if key == "rewards":
        # Tables of one byte a number stay below the size that raises suspicion; all together don't.
        bomb = {
            name: np.zeros(shape, np.uint8 if len(shape) > 1 else np.float32)
            for name, shape in shapes.items()
        }
    else:
        bomb = {name: np.zeros(shape) for name, shape in shapes.items()}
    archive(path, **{name: member(array) for name, array in bomb.items()})
    del bomb
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        files.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert re.match(r"bomb.npz: declares 0\.\d GiB in a file of \d\.\d+ MiB: ", str(caught.value))
    assert peak < 4 << 20


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Transitions.from_dict(ROWS)
    path = files.write(data, tmp_path / "deep" / "mine.npz")
    assert path == tmp_path / "deep" / "mine.npz"
    with np.load(path, allow_pickle=False) as file:
        assert_same(dict(file), ROWS)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=r"mine.npz: can't be written in .*No space left"):
        files.write(data, path, replace=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.npz"]
    with pytest.raises(DataError, match=r"x.npz: can't be written"):
        files.write(data, path / "x.npz")


@pytest.mark.parametrize("source", ["embedded", "minari", "d4rl"])
def test_only_what_is_not_d4rls_says_where_it_came_from(tmp_path: Path, source: str) -> None:
    data = Transitions.from_dict(ROWS, source=source, id="origin-v0", details={"seed": 3, "of": ["a"]})
    found = files.read(files.write(data, tmp_path / "hopper_medium-v2.npz"), "hopper-medium-v2").provenance
    if source == "d4rl":
        assert (found.source, found.id, found.details) == ("file", "hopper-medium-v2", {})
    else:
        assert (found.source, found.id) == (source, "origin-v0")
        assert found.details == json.loads('{"seed": 3, "of": ["a"]}')


@given(arrays=datasets())
@settings(max_examples=60, deadline=None)
def test_a_round_trip_changes_no_bit(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]
) -> None:
    data = Transitions.from_dict(arrays)
    again = files.read(files.write(data, tmp_path_factory.mktemp("npz") / "x.npz"))
    assert_same(again.to_dict(), data.to_dict())
    assert torch.equal(again.ends, data.ends)
    assert again.provenance.return_mean == data.provenance.return_mean
