"""`scripts/data.py` as a person types it, the forms of files beneath it, and the commands of docs/data.md."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cpql.data
from cpql import data_cli
from cpql.data import d4rl, files, minari
from cpql.data.transitions import Transitions
from cpql.data_cli import main
from cpql.errors import CpqlError, DataError
from cpql.tasks import Task, load_task

ROOT = Path(__file__).parent.parent
NOWHERE = "http://127.0.0.1:9/"


class Output(NamedTuple):
    """What a command ended with and printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command, in a folder and a home of its own and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("CPQL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CPQL_D4RL_MIRROR", raising=False)
    monkeypatch.setattr(d4rl, "HOST", NOWHERE)
    monkeypatch.setattr(d4rl, "MIRROR", NOWHERE)

    def run(*words: str | Path) -> Output:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        captured = capsys.readouterr()
        return Output(code, captured.out, captured.err)

    return run


def arrays(rows: int = 60, bound: float = 1.0) -> dict[str, Any]:
    """Pendulum's widths; episodes of 10 steps terminate and time out in turns; the last one is cut."""
    generator = np.random.default_rng(0)
    states = generator.normal(size=(rows + 1, 3)).astype(np.float32)
    return {
        "observations": states[:-1],
        "actions": (bound * generator.uniform(-1, 1, (rows, 1))).astype(np.float32),
        "rewards": generator.normal(size=rows).astype(np.float32),
        "terminals": (np.arange(rows) % 20 == 9) & (np.arange(rows) < rows - 5),
        "timeouts": (np.arange(rows) % 20 == 19) & (np.arange(rows) < rows - 5),
        "next_observations": states[1:],
    }


def hopper(rows: int = 60) -> dict[str, Any]:
    """The same with hopper's widths."""
    generator = np.random.default_rng(1)
    states = generator.normal(size=(rows + 1, 11)).astype(np.float32)
    return arrays(rows) | {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": generator.uniform(-1, 1, (rows, 3)).astype(np.float32),
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world in which D4RL's files have 60 rows."""

    def load(name: str) -> Task:
        task = load_task(name)
        d4rl = {"d4rl": task.datasets["d4rl"] | {"rows": 60}} if task.datasets else {}
        return dataclasses.replace(task, datasets=task.datasets | d4rl)

    monkeypatch.setattr(data_cli, "load_task", load)


def content(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {key: file[key][()] for key in d4rl.KEYS}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.asarray(one[key]).tobytes() == np.asarray(other[key]).tobytes() for key in d4rl.KEYS)


def test_round_trips_between_all_forms_are_exact(data: Any, tmp_path: Path) -> None:
    d4rl.write("in.hdf5", arrays(), {})
    chain = (
        ("in.hdf5", "again.h5", ()),
        ("again.h5", "a.npz", ()),
        ("a.npz", ".", ("--id", "mine/first-v0")),
        ("mine/first-v0", "roots", ("--id", "second-v1")),
        ("roots/second-v1/data", "b.npz", ()),
        ("b.npz", "out.hdf5", ()),
    )
    for source, target, more in chain:
        output = data("convert", source, target, *more)
        assert output.code == 0 and output.err == ""
        assert "60 transitions, read back the same to the bit\n" in output.out
    assert same(content(Path("out.hdf5")), arrays())
    assert minari.metadata("mine/first-v0").cpql_cut_episodes == {5}
    # after a Minari folder a file still says where its rows came from
    assert files.read("out.hdf5").provenance.source == "minari"
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.hdf5", "again.h5", "a.npz", "mine", "roots", "b.npz", "out.hdf5"
    }  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_random_data_survive_every_form_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    rows = draw.draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=rows, max_size=rows)
    number = st.floats(-1, 1, width=32)
    table = [draw.draw(st.lists(number, min_size=4, max_size=4)) for _ in range(rows)]
    columns = np.array(table, np.float32)
    made = Transitions.from_dict(
        {
            "observations": columns[:, :1],
            "next_observations": columns[:, 1:2],
            "actions": columns[:, 2:3],
            "rewards": columns[:, 3],
            "terminals": draw.draw(bits),
            "timeouts": draw.draw(bits),
        }
    )
    folder = tmp_path_factory.mktemp("forms")
    for target in (folder / "a.hdf5", folder / "a.npz", folder):
        path = files.write(made, target, id="x-v0" if target == folder else "")
        again = files.read(path)
        assert torch.equal(again.table.view(torch.int32), made.table.view(torch.int32))
        assert again.truncated.tolist() == made.truncated.tolist()
        assert again.terminated.tolist() == made.terminated.tolist()


def test_what_is_lost_is_named(data: Any) -> None:
    rich = arrays()
    rich["timeouts"][9] = True  # terminal as well
    rich["rewards"] = rich["rewards"].astype(np.float64)
    d4rl.write("rich.hdf5", rich | {"infos": np.zeros(60), "metadata": np.zeros(3)}, {})
    assert data("convert", "rich.hdf5", "rich.npz").out.splitlines()[1:] == [
        "lost: infos, metadata: all of it",
        "lost: rewards: digits beyond float32's",
        "lost: terminals at a time limit: 1, where the time limit wins",
    ]
    assert data("convert", "rich.npz", "clean.hdf5").out.count("\n") == 1
    assert data("convert", "rich.npz", ".", "--id", "m-v0").out.splitlines()[1:] == [
        "lost: cut episodes: 1, which other readers of Minari's files take for truncated"
    ]
    sparse = {key: value for key, value in arrays().items() if key not in ("timeouts", "next_observations")}
    np.savez("sparse.npz", **sparse)
    assert data("convert", "sparse.npz", "s.hdf5").out.splitlines() == [
        "s.hdf5: 59 transitions, read back the same to the bit",
        "lost: rows: 1 of 60, which have no next observation",
    ]
    seamed = {key: value for key, value in arrays().items() if key != "timeouts"}
    seamed["next_observations"] = seamed["next_observations"].copy()
    seamed["next_observations"][19] += 1  # a reset that only the observations show
    np.savez("seamed.npz", **seamed)
    assert data("convert", "seamed.npz", "t.hdf5").out.splitlines()[1:] == [
        "lost: complete episodes: 1 of 4, which no flag marks any more"
    ]
    with h5py.File("m-v0/data/main_data.hdf5", "a") as file:
        file["episode_0/infos/x"] = np.zeros(10)
        file["episode_0/terminations"][9] = True
    assert data("convert", "m-v0", "back.npz").out.splitlines()[1:] == [
        "lost: infos: all of it",
        "lost: terminals at a time limit: 1, where the time limit wins",
    ]


def test_bounds_come_from_the_environment_and_rounding_is_said(data: Any) -> None:
    wide = arrays(bound=2.0)
    d4rl.write("wide.hdf5", wide, {})
    output = data("convert", "wide.hdf5", "wide.npz")
    assert (output.code, output.out) == (1, "")
    assert re.fullmatch(
        r"error wide\.hdf5: 'actions' reaches -?1\.\d+ in row \d+: expected \[-1, 1\], or --env with the "
        r"environment whose bounds they have\n",
        output.err,
    )
    assert not Path("wide.npz").exists()
    output = data("convert", "wide.hdf5", "wide.npz", "--env", "Pendulum-v1")
    assert output.code == 0
    with np.load("wide.npz") as made:
        assert np.abs(made["actions"] - wide["actions"]).max() < 3e-7
        assert np.abs(made["actions"]).max() > 1.5
    assert data("convert", "wide.npz", ".", "--id", "p-v0", "--env", "Pendulum-v1").code == 0
    output = data("convert", "p-v0", "plain.hdf5")
    assert output.err == (
        "error p-v0: its environment's actions aren't in [-1, 1]: expected --env with the environment whose "
        "bounds they are to have in plain.hdf5\n"
    )
    assert data("convert", "p-v0", "plain.hdf5", "--env", "Pendulum-v1").code == 0
    assert np.abs(content(Path("plain.hdf5"))["actions"] - wide["actions"]).max() < 3e-7
    assert files.read("plain.hdf5", action_low=-2, action_high=2).provenance.source == "minari"


def test_nothing_is_overwritten_without_force(data: Any, tmp_path: Path) -> None:
    d4rl.write("in.hdf5", arrays(), {})
    d4rl.write("other.hdf5", arrays(40), {})
    for source in ("in.hdf5", "other.hdf5"):
        assert data("convert", "in.hdf5", "a.npz", "--force").code == 0
        assert data("convert", "in.hdf5", ".", "--id", "mine/a-v0", "--force").code == 0
        for target in (("a.npz",), (".", "--id", "mine/a-v0"), ("in.hdf5",)):
            output = data("convert", source, *target)
            assert output.code == 1
            assert output.err.endswith(": there is one already: expected a new name, or --force\n")
        assert len(files.read("a.npz")) == len(files.read("mine/a-v0")) == 60
    assert data("convert", "other.hdf5", ".", "--id", "mine/a-v0", "--force").code == 0
    assert len(files.read("mine/a-v0")) == 40
    assert [path.name for path in Path("mine").iterdir()] == ["a-v0"]
    # what isn't a dataset isn't ours to remove
    Path("mine/b-v0").mkdir()
    Path("mine/b-v0/letter.txt").write_text("dear")
    output = data("convert", "in.hdf5", ".", "--id", "mine/b-v0", "--force")
    assert output.err == (
        "error mine/b-v0: no metadata.json in it or in its data folder: expected a Minari dataset's folder\n"
    )
    assert Path("mine/b-v0/letter.txt").read_text() == "dear"
    with pytest.raises(DataError, match=r"a\.npz: there is one in .* already: expected a new name"):
        files.write(files.read("in.hdf5"), tmp_path / "a.npz")


def test_a_replacement_that_fails_leaves_the_old_one(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Transitions.from_dict(arrays())
    files.write(made, ".", id="a-v0")
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if str(target) == "a-v0" and Path(source).name != "old":
            raise OSError("no more")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(DataError, match=r"a-v0: can't be written in .*no more"):
        files.write(made, ".", id="a-v0", replace=True)
    assert len(files.read("a-v0")) == 60
    assert [path.name for path in Path().iterdir()] == ["a-v0"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("convert a.hdf5 b", r"b: expected a name with one of the endings \.hdf5, \.h5, \.npz, or, .*"),
        ("convert a.hdf5 b.npz --id x-v0", r"b\.npz: expected a name with one of the endings .*"),
        ("convert a.hdf5 . --id nonsense", "'nonsense' isn't a Minari id: .*"),
        ("convert gone.npz b.hdf5", r"gone\.npz: no such file in .*"),
        ("show hoper-medium", "env=hoper-medium is no task: did you mean hopper-medium.*"),
        ("show gone.hdf5", r"gone\.hdf5: no such file in .*"),
        ("show mine/gone-v0", "gone-v0: no such file in .*"),
        ("show a.hdf5 --source d4rl", "--source=d4rl: expected none with a file, .*"),
        ("show pen-human --env pen-human", "--env=pen-human: expected none with a task, .*"),
        (
            "show walker2d-full-replay",
            "walker2d-full-replay: no data on this disk: "
            "`cpql-data download walker2d-full-replay` downloads D4RL's",
        ),
        (
            "show hopper-medium --source minari",
            "hopper-medium: no minari data on this disk: `cpql-data download hopper-medium` downloads "
            "D4RL's, `python scripts/collect.py dataset hopper-medium` collects a stand-in, "
            "`cpql-data download hopper-medium --source minari` downloads Minari's",
        ),
        ("list hoper", "no task's name has 'hoper' in it: did you mean hopper.*"),
        ("download hopper-medium-replay --source minari", "hopper-medium-replay: Minari has no .*"),
        ("verify a.hdf5 --env Pendulm-v1", "no environment 'Pendulm-v1' .* did you mean Pendulum-v1.*"),
        ("show hopper", "hopper has no dataset: `cpql-data list` names the tasks that have one"),
        ("download pendulum", "pendulum has no dataset: .*"),
        ("verify .", r"\.: no metadata\.json in it .*"),
    ],
)
def test_errors_are_one_line(data: Any, words: str, error: str) -> None:
    d4rl.write("a.hdf5", arrays(), {})
    output = data(*words.split())
    assert (output.code, output.out) == (1, "")
    assert re.fullmatch(f"error {error}\n", output.err), output.err
    with pytest.raises(CpqlError, match=error):
        main([*words.split(), "--traceback"])


def test_form_follows_folder_then_ending_then_content(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    with (tmp_path / "archive.dat").open("wb") as file:
        np.savez(file, **arrays())
    for name, expected in (
        ("folder.npz", "minari"),
        ("archive.dat", "npz"),
        ("a.H5", "hdf5"),
        ("a.hdf5", "hdf5"),
        ("a.npz", "npz"),
        ("gone", "hdf5"),
    ):
        assert files.form(tmp_path / name) == expected
    assert len(files.read(tmp_path / "archive.dat")) == 60


def test_list_says_what_is_on_this_disk(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    d4rl.write("d4rl/hopper_medium-v2.hdf5", hopper(), {})
    d4rl.write("d4rl/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5", arrays(), {})
    d4rl.write("cache/hopper-expert-embedded-60-seed0-abc.hdf5", hopper(), {})
    files.write(Transitions.from_dict(hopper()), "minari", id="mujoco/hopper/medium-v0")
    lines = data("list").out.splitlines()
    assert lines[0] == "name\ttransitions\td4rl\tminari\togbench\there\tnote"
    table = {line.split("\t")[0]: line.split("\t")[1:] for line in lines[1:]}
    assert table["hopper-medium"] == [
        *("1000000", "hopper_medium-v2.hdf5", "mujoco/hopper/medium-v0", ""),
        *("d4rl, minari, can be collected", ""),
    ]
    assert table["hopper-expert"][4] == "embedded"
    assert table["hopper-medium-replay"][0] == ""
    assert table["antmaze-umaze-v0"][4] == "d4rl"
    assert table["antmaze-umaze-v2"][4] == ""
    assert table["cube-single-play-task2"][3:] == ["cube-single-play-v0", "can be collected", ""]
    assert table["antmaze-large-navigate"][3:] == ["antmaze-large-navigate-v0", "", ""]
    assert "hopper" not in table and "gymnasium" not in table  # which have no dataset
    assert table["kitchen-mixed"][5].startswith("FrankaKitchen-v1 works only with mujoco below 3.12")
    assert [line.split("\t")[0] for line in data("list", "antmaze-*-v2").out.splitlines()[1:]] == [
        f"antmaze-{maze}-v2"
        for maze in (
            "umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"
        )
    ]  # fmt: skip
    (row,) = [r for r in json.loads(data("list", "hopper", "--json").out) if r["name"] == "hopper-medium"]
    path = Path("d4rl/hopper_medium-v2.hdf5").absolute()
    assert (row["here"]["d4rl"], row["bytes"]) == (str(path), path.stat().st_size)
    assert (row["environment"], row["transitions"], row["collectable"]) == ("Hopper-v4", 1_000_000, True)

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = data("list").out
    assert re.search(r"hopper-medium\s+│\s+1000000\s+│ hopper_medium-v2.hdf5\s+│ mujoco/", shown)
    assert "antmaze-umaze-v2 *" in shown and shown.count("\n* antmaze: the living ant has") == 1


@pytest.mark.usefixtures("small")
def test_show_gives_each_source_its_own_score(data: Any) -> None:
    made = Transitions.from_dict(hopper())
    mean = made.provenance.return_mean
    assert mean is not None
    score = f"{100 * (mean + 20.272305) / (3234.3 + 20.272305):.1f}"
    files.write(made, "minari", id="mujoco/hopper/medium-v0")
    output = data("show", "hopper-medium")
    assert output.out.startswith(
        "mujoco/hopper/medium-v0 (minari): 60 transitions, 5 complete episodes, return "
    )
    assert "\nscore      none: there are no reference returns for these data\n" in output.out
    origin = {"source": "embedded", "id": "hopper-medium", "details": {}}
    d4rl.write("cache/hopper-medium-embedded-60-seed0-a.hdf5", hopper(), {d4rl.ORIGIN: json.dumps(origin)})
    assert data("show", "hopper-medium").out.startswith("hopper-medium (embedded: self-collected, not D4RL)")
    d4rl.write("d4rl/hopper_medium-v2.hdf5", hopper(), {})
    output = data("show", "hopper-medium", "--png", "pictures/hopper.png")
    assert output.out.startswith("hopper-medium-v2 (d4rl): 60 transitions")
    assert f"\nscore      {score} is the behaviour's, by D4RL's references" in output.out
    assert output.out.endswith("\ndrawn in pictures/hopper.png\n")
    assert Path("pictures/hopper.png").read_bytes().startswith(b"\x89PNG")
    assert data("show", "hopper-medium", "--source", "embedded").out.startswith("hopper-medium (embedded")
    assert data("show", "mujoco/hopper/medium-v0").out.startswith("mujoco/hopper/medium-v0 (minari)")
    # a name is the task's; a path is a file's
    Path("hopper-medium").mkdir()
    assert data("show", "hopper-medium").code == 0
    assert data("show", "./hopper-medium").code == 1


def test_minari_data_in_a_file_are_never_scored_by_d4rls_references(data: Any) -> None:
    task = load_task("hopper-medium")
    files.write(Transitions.from_dict(hopper()), ".", id="m-v0")
    files.write(files.read("m-v0"), "m.npz")
    changed = files.without_foreign_references(task, files.read("m.npz"))
    assert (changed.random_return, changed.expert_return, changed.benchmark) == (None, None, "Minari")
    assert changed.note == (
        "the data are Minari's m-v0, from a file: returns only, never comparable with D4RL's"
    )
    assert files.without_foreign_references(task, Transitions.from_dict(hopper())) is task
    assert files.without_foreign_references(changed, files.read("m.npz")) is changed
    for path in ("m.npz", "m-v0"):
        assert cpql.data.load(task, path=path, size=1)[0].score(1000.0) is None


def test_verify_tells_good_files_from_bad_ones(data: Any) -> None:
    d4rl.write("good.hdf5", arrays(), {})
    odd = arrays() | {"rewards": np.zeros(60), "terminals": np.zeros(60), "timeouts": np.zeros(60)}
    np.savez("odd.npz", **odd)
    files.write(Transitions.from_dict(arrays()), ".", id="m-v0")
    Path("cut.hdf5").write_bytes(Path("good.hdf5").read_bytes()[:3000])
    broken = arrays()
    broken["rewards"][7] = np.nan
    d4rl.write("broken.hdf5", broken, {})

    line = "good.hdf5: can be trained on: 60 transitions, 5 complete episodes, no warnings\n"
    assert data("verify", "good.hdf5") == Output(0, line, "")
    assert data("verify", "good.hdf5", "m-v0").code == 0
    assert data("verify", "odd.npz") == Output(
        0,
        "warning: odd.npz: no row is terminal or at a time limit\n"
        "warning: odd.npz: no episode is complete: the behaviour has no return and no score\n"
        "warning: odd.npz: all rewards are 0\n"
        "odd.npz: can be trained on: 60 transitions, 0 complete episodes, 3 warnings\n",
        "",
    )
    output = data("verify", "cut.hdf5", "good.hdf5", "broken.hdf5")
    assert (output.code, output.out) == (1, line)
    assert re.fullmatch(
        r"error cut\.hdf5: damaged, .*\n"
        r"error broken\.hdf5: 'rewards' holds NaN or infinity, first in row 7: expected finite numbers\n",
        output.err,
    )


def test_verify_holds_widths_and_bounds_against_an_environment(data: Any) -> None:
    d4rl.write("wide.hdf5", arrays(bound=2.0), {})
    assert data("verify", "wide.hdf5").err.endswith("or --env with the environment whose bounds they have\n")
    assert data("verify", "wide.hdf5", "--env", "Pendulum-v1").code == 0
    d4rl.write("too_wide.hdf5", arrays(bound=3.0), {})
    assert data("verify", "too_wide.hdf5", "--env", "Pendulum-v1").err.endswith(
        "expected the environment's bounds\n"
    )
    output = data("verify", "wide.hdf5", "--env", "MountainCarContinuous-v0")
    assert output.err.startswith("error wide.hdf5: 'actions' reaches")
    d4rl.write("narrow.hdf5", arrays(), {})
    assert data("verify", "narrow.hdf5", "--env", "MountainCarContinuous-v0").err == (
        "error narrow.hdf5: 'observations' is 3 wide: the environment has 2\n"
    )
    d4rl.write("hopper.hdf5", hopper(), {})
    for task in ("hopper-medium", "Hopper-v4"):
        assert data("verify", "hopper.hdf5", "--env", task).code == 0


@pytest.mark.usefixtures("small")
def test_a_file_that_is_no_longer_what_was_downloaded_is_an_error(data: Any) -> None:
    d4rl.write("d4rl/hopper_medium-v2.hdf5", hopper(), {})
    path = Path("d4rl/hopper_medium-v2.hdf5")
    record = Path("d4rl/hopper_medium-v2.hdf5.sha256")
    record.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    assert data("verify", path).code == 0
    record.write_text(f"{'0' * 64}  {path.name}\n")
    for words in (("verify", path), ("show", path), ("show", "hopper-medium")):
        output = data(*words)
        assert (output.code, output.out) == (1, "")
        assert output.err.startswith(
            "error hopper_medium-v2.hdf5: changed since it was downloaded: SHA-256 found"
        )


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """A mirror on the loopback that has hopper-medium alone."""
    d4rl.write(tmp_path / "served" / "hopper_medium-v2.hdf5", hopper(), {})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.usefixtures("small")
def test_download_says_file_size_and_checksum(
    data: Any, mirror: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CPQL_D4RL_MIRROR", mirror)
    path = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    output = data("download", "hopper-expert", "hopper-medium")
    served = (tmp_path / "served" / path.name).read_bytes()
    line = f"{path}: {len(served):,} bytes, SHA-256 {hashlib.sha256(served).hexdigest()}\n"
    # one that can't be had doesn't keep the others from coming
    assert (output.code, output.out) == (1, line)
    error, progress = output.err.splitlines()
    assert re.fullmatch(r"error hopper_expert-v2\.hdf5 can't be downloaded from .* by hand", error)
    assert progress.startswith(f"download {path.name} {len(served):,}/{len(served):,}")
    assert path.read_bytes() == served
    monkeypatch.setenv("CPQL_D4RL_MIRROR", NOWHERE)
    assert data("download", "hopper-medium") == Output(0, line, "")
    # put there by hand, so that nothing is recorded
    Path(f"{path}.sha256").unlink()
    assert data("download", "hopper-medium") == Output(0, line, "")
    assert data("verify", path, "--env", "hopper-medium").code == 0


def test_a_file_of_another_size_does_not_pass_for_d4rls(
    data: Any, mirror: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CPQL_D4RL_MIRROR", mirror)
    misfit = "'observations' has shape [60, 11]: expected [1000000, 11] of D4RL's hopper-medium-v2"
    output = data("download", "hopper-medium")
    assert output.code == 1 and f"{mirror}hopper_medium-v2.hdf5 ({misfit})" in output.err
    assert not (tmp_path / "d4rl").exists()
    d4rl.write("d4rl/hopper_medium-v2.hdf5", hopper(), {})
    line = f"error hopper_medium-v2.hdf5: {misfit}\n"
    assert data("download", "hopper-medium") == data("show", "hopper-medium") == Output(1, "", line)
    assert data("show", "d4rl/hopper_medium-v2.hdf5").out.startswith("hopper_medium-v2 (file): 60 trans")


def test_download_finds_local_minari_datasets(data: Any, tmp_path: Path) -> None:
    files.write(Transitions.from_dict(hopper()), "minari", id="mujoco/hopper/medium-v0")
    path = tmp_path / "minari/mujoco/hopper/medium-v0/data/main_data.hdf5"
    for name in ("hopper-medium", "mujoco/hopper/medium-v0"):
        output = data("download", name, "--source", "minari")
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        assert output == Output(0, f"{path}: {path.stat().st_size:,} bytes, SHA-256 {checksum}\n", "")


@pytest.mark.slow
def test_the_script_is_the_same_program_and_survives_a_closed_pipe(tmp_path: Path) -> None:
    d4rl.write(tmp_path / "a.hdf5", arrays(), {})
    script = shlex.join([sys.executable, str(ROOT / "scripts" / "data.py")])
    command = f"{script} verify a.hdf5 && {script} verify gone.hdf5; echo $?; {script} show a.hdf5 | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[0].startswith("a.hdf5: can be trained on: 60 transitions")
    assert done.stdout.splitlines()[1:] == ["1"]
    assert done.stderr == (f"error gone.hdf5: no such file in {tmp_path}: expected one in D4RL's layout\n")


def test_the_page_on_data_does_what_it_says(data: Any) -> None:
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    ran = []
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "docs/data.md", "exec"), names)
        elif kind == "sh":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "scripts/data.py"] and words[2] != "download":
                    output = data(*words[2:])
                    assert output.code == 0, f"{line}: {output.err}"
                    ran.append(words[2])
    assert ran == ["verify", "show", "convert", "convert", "convert", "list", "list"]
    assert "Transitions(dataset (dict): 2,000 transitions, 10 complete episodes," in repr(names["data"])
    # training, which is in no block that is run here, starts from the file as it starts from the dict
    known = load_task("hopper-medium")
    task = dataclasses.replace(known, id="Pendulum-v1", random_return=None, expert_return=None)
    _, loaded = cpql.data.load(task, path="mine.npz", size=1)
    assert torch.equal(loaded.table, names["data"].table)
