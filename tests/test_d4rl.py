"""Files in D4RL's layout: reading, writing, finding, downloading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch

from cpql import data
from cpql.data import d4rl, embedded, files
from cpql.data.request import Request
from cpql.data.transitions import Transitions
from cpql.environments import spec_of
from cpql.errors import ConfigError, DataError
from cpql.tasks import Task, load_task, task_names

NAME = "hopper_medium-v2.hdf5"
ID = "hopper-medium-v2"
TASK = Task("hopper-medium", "Hopper-v4", -20.272305, 3234.3, {"d4rl": {"id": ID}})


def with_rows(rows: int) -> Task:
    return dataclasses.replace(TASK, datasets={"d4rl": {"id": ID, "rows": rows}})


def arrays(rows: int = 40) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    states = generator.normal(size=(rows + 1, 11)).astype(np.float32)
    return {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": generator.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": np.arange(rows, dtype=np.float32),
        "terminals": np.arange(rows) % 10 == 9,
        "timeouts": np.zeros(rows, bool),
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """D4RL's cache folder, which doesn't exist yet."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mine.hdf5"
    d4rl.write(path, arrays(), {"note": "hand-made", "number": 3})
    with h5py.File(path, "a") as file:
        file["infos/qpos"] = np.zeros((40, 6))
        file["metadata/algorithm"] = "SAC"
        assert dict(file.attrs) == {"note": "hand-made", "number": 3}
    made = d4rl.read(path, "mine")
    assert torch.equal(made.observations, torch.from_numpy(arrays()["observations"]))
    assert made.terminated.sum() == 4
    provenance = made.provenance
    assert (provenance.source, provenance.id, provenance.file) == ("file", "mine", "mine.hdf5")
    assert provenance.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (provenance.episodes, provenance.return_min) == (4, 45)
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.hdf5"]


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    """A resumed run checks its dataset's SHA-256, and a dataset may have been collected again."""
    contents = arrays()
    d4rl.write(tmp_path / "one.hdf5", contents, {d4rl.ORIGIN: "x"})
    d4rl.write(tmp_path / "two.hdf5", dict(reversed(contents.items())), {d4rl.ORIGIN: "x"})
    assert (tmp_path / "one.hdf5").read_bytes() == (tmp_path / "two.hdf5").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "mine.hdf5"
    d4rl.write(path, arrays(), {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        d4rl.write(path, {"observations": np.zeros(3), "actions": np.array([object()])}, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.hdf5"]
    with pytest.raises(DataError, match=r"no.hdf5: can't be written"):
        d4rl.write(path / "no.hdf5", arrays(), {})


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.hdf5"
    d4rl.write(whole, arrays(4000), {})
    content = whole.read_bytes()
    group = tmp_path / "group.hdf5"
    with h5py.File(group, "w") as file:
        file.create_group("observations")
    other = tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["x"] = 1
    origin = tmp_path / "origin.hdf5"
    d4rl.write(origin, arrays(), {d4rl.ORIGIN: "{"})
    (tmp_path / "truncated.hdf5").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.hdf5").touch()
    (tmp_path / "page.hdf5").write_text("<html>not here</html>")
    (tmp_path / "folder.hdf5").mkdir()
    for name, text in {
        "truncated": "damaged",
        "empty": "damaged",
        "page": "damaged",
        "folder": "not a file",
        "missing": "no such file in",
        "group": "'observations' is a group",
        "other": "none of D4RL's arrays, only x",
        "origin": "'cpql_origin' is damaged",
    }.items():
        with pytest.raises(DataError) as caught:
            d4rl.read(tmp_path / f"{name}.hdf5", "id")
        message = str(caught.value)
        assert message.startswith(f"{name}.hdf5: ") and text in message and "\n" not in message
    (tmp_path / "truncated.hdf5").write_bytes(content[:600])
    with pytest.raises(DataError, match=r"truncated.hdf5"):
        d4rl.read(tmp_path / "truncated.hdf5", "id")


def test_a_file_that_lacks_a_key_names_it(tmp_path: Path) -> None:
    contents = arrays()
    del contents["rewards"]
    d4rl.write(tmp_path / "mine.hdf5", contents, {})
    with pytest.raises(DataError, match=r"mine.hdf5: no 'rewards'"):
        d4rl.read(tmp_path / "mine.hdf5", "mine")


def test_names_and_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert d4rl.filename("hopper-medium-v2") == NAME
    assert d4rl.filename("halfcheetah-medium-expert-v2") == "halfcheetah_medium_expert-v2.hdf5"
    for bad in ("hopper", "../x-v2", "hopper medium-v2", "", "-v2"):
        with pytest.raises(DataError, match="isn't a D4RL id"):
            d4rl.filename(bad)
    assert d4rl.cache_folder() == folder
    assert d4rl.D4RL().locate(Request(TASK)) is None
    d4rl.write(folder / NAME, arrays(), {})
    assert d4rl.D4RL().locate(Request(TASK)) == folder / NAME
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert d4rl.cache_folder() == Path.home() / ".d4rl" / "datasets"


def test_load_takes_a_path_strictly(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"mine.hdf5: no such file"):
        data.load(TASK, path=str(tmp_path / "mine.hdf5"), size=10)
    d4rl.write(tmp_path / "mine.hdf5", arrays(), {})
    assert data.load(TASK, path=str(tmp_path / "mine.hdf5"), size=10)[1].provenance.source == "file"
    with pytest.raises(ConfigError, match="no dataset source 'd4rj': did you mean d4rl"):
        data.load(TASK, source="d4rj", size=10)


def test_auto_takes_the_cache_first_and_says_nothing(folder: Path) -> None:
    d4rl.write(folder / NAME, arrays(), {})
    said: list[str] = []
    assert data.load(TASK, size=10, say=said.append)[1].provenance.source == "d4rl"
    assert said == []
    # A damaged file is the user's to mend: falling back would hide it.
    (folder / NAME).write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        data.load(TASK, size=10, say=said.append)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        (arrays(39), "'observations' has shape [39, 11]: expected [40, 11] of D4RL's hopper-medium-v2"),
        (
            {"observations": np.zeros((40, 17)), "next_observations": np.zeros((40, 17))},
            "'observations' has shape [40, 17]: expected [40, 11] of D4RL's hopper-medium-v2",
        ),
        (
            {"actions": np.zeros((40, 6))},
            "'actions' has shape [40, 6]: expected [40, 3] of D4RL's hopper-medium-v2",
        ),
        ({"actions": np.zeros(40)}, "'actions' has shape [40]: expected [40, 3] of D4RL's hopper-medium-v2"),
    ],
    ids=["fits", "rows", "observations", "actions", "flat"],
)
def test_what_lies_in_the_cache_counts_as_d4rls_only_if_it_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], reason: str
) -> None:
    task = with_rows(40)
    stand_in = Transitions.from_dict(arrays(10), source="embedded", id="hopper-medium")
    monkeypatch.setattr(embedded.Embedded, "locate", lambda *_: None)
    monkeypatch.setattr(embedded.Embedded, "fetch", lambda *_: stand_in)
    d4rl.write(folder / NAME, arrays() | changed, {})
    said: list[str] = []
    if not reason:
        for source in ("auto", "d4rl"):
            assert data.load(task, source=source, size=10, say=said.append)[1].provenance.source == "d4rl"
        assert said == []
        return
    line = f"{NAME}: {reason}"
    strict: list[dict[str, Any]] = [{"source": "d4rl"}, {"id": "hopper-medium-v2"}]
    for options in strict:
        with pytest.raises(DataError) as caught:
            data.load(task, size=10, say=said.append, **options)
        assert str(caught.value) == line and said == []
    provenance = data.load(task, size=10, say=said.append)[1].provenance
    assert provenance.source == "embedded" and provenance.details["fallback"] == line
    assert len(said) == 1 and said[0].endswith(f"not D4RL's hopper-medium-v2, because {line}")


def test_where_the_number_of_rows_is_not_known_any_fits(folder: Path) -> None:
    task = with_rows(1_000_000)
    d4rl.write(folder / "hopper_other-v0.hdf5", arrays(), {})
    assert data.load(task, id="hopper-other-v0", size=1)[1].provenance.source == "d4rl"
    d4rl.write(folder / "robot_other-v0.hdf5", arrays(), {})
    assert data.load(task, id="robot-other-v0", size=1)[1].provenance.source == "d4rl"
    d4rl.write(folder / "pen_other-v0.hdf5", arrays(), {})
    with pytest.raises(DataError, match=r"shape \[40, 11\]: expected \[any, 45\] of D4RL's pen-other-v0$"):
        data.load(task, id="pen-other-v0", size=1)


def test_the_widths_are_those_of_the_tasks_environments() -> None:
    tasks = [task for name in task_names() if "d4rl" in (task := load_task(name)).datasets]
    assert {task.dataset.partition("-")[0] for task in tasks} == set(d4rl.WIDTHS)
    for name in ("hopper-medium", "halfcheetah-medium", "walker2d-medium", "ant-medium"):
        assert spec_of(load_task(name)).widths == d4rl.WIDTHS[name.partition("-")[0]]


def test_a_file_in_the_cache_that_is_not_what_was_downloaded_is_refused(folder: Path) -> None:
    d4rl.write(folder / NAME, arrays(), {})
    found = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    record = folder / f"{NAME}.sha256"
    record.write_text(f"{found}  {NAME}\n")
    assert data.load(TASK, size=1)[1].provenance.sha256 == found
    record.write_text(f"{'0' * 64}  {NAME}\n")
    for source in ("auto", "d4rl"):
        with pytest.raises(
            DataError, match=rf"^{NAME}: changed since it was downloaded: SHA-256 found {found}"
        ):
            data.load(TASK, source=source, size=1)


@pytest.mark.parametrize(
    ("said", "believed"),
    [
        ("embedded", "embedded"),
        ("minari", "minari"),
        ("stable-baselines3", "stable-baselines3"),
        ("embedded + online", "embedded + online"),
        ("d4rl", "file"),
        ("D4RL", "file"),
        (" d4rl", "file"),
        ("d4rl + online", "file"),
        ("d4rl + embedded", "file"),
        ("embedded, and d4rl", "file"),
        ("d4\u200brl", "file"),
        ("", "file"),
    ],
)
@pytest.mark.parametrize("form", ["hdf5", "npz", "minari"])
def test_no_file_can_call_itself_d4rls(
    tmp_path: Path, folder: Path, said: str, believed: str, form: str
) -> None:
    claim = json.dumps({"source": said, "id": "hopper-medium-v2", "details": {}})
    path = tmp_path / f"mine.{form}"
    if form == "hdf5":
        d4rl.write(path, arrays(), {d4rl.ORIGIN: claim})
    elif form == "npz":
        np.savez(path, **arrays(), cpql_origin=np.array(claim))
    else:
        path = files.write(Transitions.from_dict(arrays()), tmp_path, id="mine-v0")
        about = json.loads((path / "data/metadata.json").read_text())
        (path / "data/metadata.json").write_text(json.dumps(about | {d4rl.ORIGIN: claim}))
    provenance = files.read(path).provenance
    assert provenance.source == believed
    assert (believed == "file") or provenance.id == "hopper-medium-v2"
    if form != "hdf5":
        return
    # Not even where it fits, under D4RL's name and in D4RL's folder.
    folder.mkdir()
    path.rename(folder / NAME)
    assert d4rl.read(folder / NAME, ID, source="d4rl").provenance.source == believed
    with pytest.raises(DataError, match=rf"^{NAME}: carries 'cpql_origin', as cpql's own files do: expected"):
        data.load(with_rows(40), source="d4rl", size=1)
