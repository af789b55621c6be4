"""Minari: folders read right, refused clearly, written so that Minari reads them; its own references."""

from __future__ import annotations

import hashlib
import json
import shutil
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given, settings
from minari.dataset._storages.hdf5_storage import HDF5Storage  # type: ignore[import-untyped]
from test_npz import assert_same, datasets

from cpql.data import files, minari
from cpql.data.request import Request
from cpql.data.transitions import Transitions
from cpql.environments import make_task_environment
from cpql.errors import ConfigError, DataError
from cpql.tasks import Task

ID = "mine/pendulum/mixed-v0"
SOURCE = minari.Minari()
TASK = Task(
    "hopper-medium",
    "Hopper-v4",
    -20.272305,
    3234.3,
    datasets={"d4rl": {"id": "hopper-medium-v2", "path": "x/y.hdf5"}},
    reset_options={"a": 1},
)
MAZE = Task("maze", "Maze-v0", observation=("achieved_goal", "observation"))


def box(low: list[float], high: list[float], dtype: str = "float32") -> str:
    return json.dumps({"type": "Box", "dtype": dtype, "shape": [len(low)], "low": low, "high": high})


def about(**changes: Any) -> dict[str, Any]:
    """What Minari says of two episodes of three steps and one; a change to None leaves a key out."""
    spec = {"id": "Pendulum-v1", "max_episode_steps": 200, "kwargs": {"g": 9.81, "render_mode": "human"}}
    found = {
        "total_episodes": 2,
        "total_steps": 4,
        "data_format": "hdf5",
        "observation_space": box([-1.0] * 2, [1.0] * 2, "float64"),
        "action_space": box([-1.0], [1.0]),
        "env_spec": json.dumps(spec | {"entry_point": "no.such.module:Trap", "additional_wrappers": []}),
        "dataset_id": ID,
        "minari_version": "0.5.4",
    }
    return {key: value for key, value in (found | changes).items() if value is not None}


def episodes() -> list[dict[str, Any]]:
    """As Minari's own collector has them: float64, one observation more than steps, infos."""
    return [
        {
            "observations": np.array([[0.0, 1], [2, 3], [4, 5], [6, 7]]),
            "actions": np.array([[0.5], [-0.25], [1]]),
            "rewards": np.array([1.0, 2, 3]),
            "terminations": np.array([False, False, True]),
            "truncations": np.array([False, False, False]),
            "infos": {"secret": np.array([b"a", b"b", b"c", b"d"])},
        },
        {
            "observations": np.array([[8.0, 8], [9, 9]]),
            "actions": np.array([[0.0]]),
            "rewards": np.array([10.0]),
            "terminations": np.array([False]),
            "truncations": np.array([True]),
        },
    ]


def put(group: h5py.Group, content: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            put(group.create_group(key), value)
        else:
            group.create_dataset(key, data=value, chunks=True, maxshape=(None, *np.shape(value)[1:]))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Minari's root, which doesn't exist yet."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def make(root: Path) -> Callable[..., Path]:
    """A maker of datasets by hand, in Minari's root; gives the data folder."""

    def make(content: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
        folder = root / ID / "data"
        folder.mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / "main_data.hdf5", "w") as file:
            put(file, {f"episode_{k}": part for k, part in enumerate(content or episodes())})
        (folder / "metadata.json").write_text(json.dumps(about(**changes)))
        return folder

    return make


def official(id: str) -> Any:
    import minari as package  # type: ignore[import-untyped]

    return package.load_dataset(id)


def test_a_dataset_is_read_by_hand_computed_rows(make: Callable[..., Path]) -> None:
    folder = make()
    for where in (folder, str(folder.parent)):
        data = minari.read(where)
        assert_same(
            data.to_dict(),
            {
                "observations": np.array([[0, 1], [2, 3], [4, 5], [8, 8]], np.float32),
                "actions": np.array([[0.5], [-0.25], [1], [0]], np.float32),
                "rewards": np.array([1, 2, 3, 10], np.float32),
                "terminals": np.array([False, False, True, False]),
                "timeouts": np.array([False, False, False, True]),
                "next_observations": np.array([[2, 3], [4, 5], [6, 7], [9, 9]], np.float32),
            },
        )
    found = data.provenance
    assert (found.source, found.id, found.file) == ("minari", ID, "main_data.hdf5")
    assert found.sha256 == hashlib.sha256((folder / "main_data.hdf5").read_bytes()).hexdigest()
    assert (found.episodes, found.return_min, found.return_max) == (2, 6, 10)
    assert found.details == {"environment": "Pendulum-v1"}
    assert minari.read(folder, time_limits="drop").rewards.tolist() == [1, 2, 3]


def test_an_episode_without_a_flag_was_cut(make: Callable[..., Path]) -> None:
    content = episodes()
    content[0]["terminations"][:] = False
    data = minari.read(make(content))
    assert data.terminated.tolist() == [False] * 4 and data.truncated.tolist() == [False] * 3 + [True]
    assert data.ends.tolist() == [False, False, True, True]
    assert data.provenance.episodes == 1


def test_actions_are_scaled_from_the_datasets_space(make: Callable[..., Path]) -> None:
    content = episodes()
    content[0]["actions"] = np.array([[0.0, -2], [1, 2], [4, 0]])
    content[1]["actions"] = np.array([[2.0, 1]])
    data = minari.read(make(content, action_space=box([0.0, -2.0], [4.0, 2.0])))
    assert data.actions.tolist() == [[-1, -1], [-0.5, 1], [1, 0], [0, 0.5]]
    # Without a space, as in old datasets, the environment's bounds count: the pendulum's are ±2.
    content = episodes()
    assert minari.read(make(content, action_space=None)).actions[:, 0].tolist() == [0.25, -0.125, 0.5, 0]
    content[1]["actions"] = np.array([[5.0]])
    with pytest.raises(DataError, match=r"main_data.hdf5: 'actions' reaches 5 in row 3"):
        minari.read(make(content))


def test_dicts_are_laid_end_to_end_in_the_tasks_order(make: Callable[..., Path]) -> None:
    content = episodes()
    for part in content:
        table = part["observations"]
        part["observations"] = {
            "observation": table,
            "achieved_goal": table[:, :1] * 10,
            "inner": {"x": table},
        }
    folder = make(content)
    data = minari.read(folder, MAZE)
    assert data.observations.tolist() == [[0, 0, 1], [20, 2, 3], [40, 4, 5], [80, 8, 8]]
    assert data.next_observations.tolist() == [[20, 2, 3], [40, 4, 5], [60, 6, 7], [90, 9, 9]]
    keys = "is a dict of 'achieved_goal', 'inner', 'observation': expected a task whose `observation` names"
    for observation, text in (
        ((), keys),
        (("desired_goal",), keys + r" some of them, found \['desired_goal'\]"),
        (("inner",), "episode_0: 'observations/inner' is a group: expected an array"),
    ):
        with pytest.raises(DataError, match=text):
            minari.read(folder, Task("maze", "Maze-v0", observation=observation))
    # Whoever wrote one array has laid it end to end already.
    assert minari.read(make(), MAZE).observations.shape == (4, 2)


def test_a_dataset_made_by_minari_reads_as_minari_reads_it(root: Path) -> None:
    import minari as package
    from minari.data_collector.episode_buffer import EpisodeBuffer  # type: ignore[import-untyped]

    generator = np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            observations=generator.normal(size=(length + 1, 3)),
            actions=generator.uniform(-2, 2, (length, 1)).astype(np.float32),
            rewards=generator.normal(size=length).tolist(),
            terminations=[False] * length,
            truncations=[False] * (length - 1) + [True],
            infos={"x": np.zeros(length + 1)},
        )
        for length in (5, 1, 8)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no author, no permalink, ...
        package.create_dataset_from_buffers(
            "D4RL/pendulum/human-v0",
            buffers,
            env="Pendulum-v1",
            eval_env=gymnasium.spec("Pendulum-v1"),
            ref_min_score=-1200.0,
            ref_max_score=-150.0,
        )
    folder = root / "D4RL/pendulum/human-v0"
    found = minari.read(folder).to_dict()
    parts = list(official("D4RL/pendulum/human-v0").iterate_episodes())
    expected = {
        "observations": np.concatenate([part.observations[:-1] for part in parts]),
        "actions": np.concatenate([part.actions for part in parts]) / 2,
        "rewards": np.concatenate([part.rewards for part in parts]),
        "terminals": np.concatenate([part.terminations for part in parts]),
        "timeouts": np.concatenate([part.truncations for part in parts]),
        "next_observations": np.concatenate([part.observations[1:] for part in parts]),
    }
    for key, array in expected.items():
        if key == "actions":
            assert np.allclose(found[key], array, rtol=0, atol=1e-7)
        else:
            assert np.array_equal(found[key], array.astype(found[key].dtype)), key
    task = minari.task(None, folder)
    assert (task.random_return, task.expert_return, task.id) == (-1200, -150, "Pendulum-v1")


def data_to_write() -> Transitions:
    """Seven rows: terminated, truncated, a seam with no flag, and a cut at the end."""
    following = np.array([[1, 0], [2, 0], [11, 0], [12, 0], [21, 0], [31, 0], [-0.0, 1e-45]], np.float32)
    return Transitions.from_dict(
        {
            "observations": np.array(
                [[0, 0], [1, 0], [10, 0], [11, 0], [20, 0], [30, 0], [31, 0]], np.float32
            ),
            "actions": np.array([[0.1], [1], [-1], [1 / 3], [0], [1e-9], [-0.0]], np.float32),
            "rewards": np.arange(7, dtype=np.float32) / 3,
            "terminals": np.array([0, 1, 0, 0, 0, 0, 0]),
            "timeouts": np.array([0, 0, 0, 1, 0, 0, 0]),
            "next_observations": following,
        }
    )


def acts_in(id: str, **others: Any) -> Task:
    return Task("any", id, **others)


def test_what_is_written_is_what_minari_loads(root: Path) -> None:
    data = data_to_write()
    folder = minari.write(data, root, id=ID, task=acts_in("Pendulum-v1"))
    assert folder == root / ID
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["mixed-v0"]
    assert sorted(entry.name for entry in (folder / "data").iterdir()) == ["main_data.hdf5", "metadata.json"]
    loaded = official(ID)
    assert (loaded.total_episodes, loaded.total_steps, loaded.id) == (4, 7, ID)
    assert loaded.action_space == Box(-1, 1, (1,)) and loaded.observation_space == Box(-np.inf, np.inf, (2,))
    rows, spans = data.to_dict(), [(0, 2), (2, 4), (4, 5), (5, 7)]
    for episode, (start, stop) in zip(loaded.iterate_episodes(), spans, strict=True):
        assert episode.observations.tobytes() == (
            rows["observations"][start:stop].tobytes() + rows["next_observations"][stop - 1].tobytes()
        )
        for key in ("actions", "rewards"):
            assert getattr(episode, key).tobytes() == rows[key][start:stop].tobytes()
        assert episode.terminations.tolist() == rows["terminals"][start:stop].tolist()
        assert episode.truncations.tolist() == [False] * (stop - start - 1) + [start != 0]
        assert f"total_steps={stop - start}" in repr(episode)
    steps = [episode["total_steps"] for episode in loaded.storage.get_episode_metadata([0, 3])]
    assert steps == [2, 2] and minari.metadata(folder).cpql_cut_episodes == {2, 3}
    # Actions are in [-1, 1] and the pendulum's in ±2: the environment comes back rescaled.
    environment = loaded.recover_environment()
    assert environment.action_space == Box(-1, 1, (1,)) and environment.spec.id == "Pendulum-v1"
    environment.close()
    # Ours reads cuts as cuts: the flags are the ones that were written.
    again = minari.read(folder)
    assert_same(again.to_dict(), rows)
    assert torch.equal(again.ends, data.ends)
    assert again.provenance.episodes == data.provenance.episodes == 2


def test_a_dataset_keeps_its_environments_options(root: Path) -> None:
    """What a task says of its environment evaluates the same where only the converted dataset is at hand."""
    task = acts_in(
        "Pendulum-v1",
        env_options={"g": 9.81, "max_episode_steps": 100},
        reset_options={"x_init": 0.5, "y_init": [1, 2]},
        observation=("achieved_goal", "observation"),
    )
    folder = minari.write(data_to_write(), root, id=ID, task=task)
    environment = official(ID).recover_environment()
    assert environment.spec.max_episode_steps == 100 and environment.unwrapped.g == 9.81
    environment.close()
    found = minari.task(None, folder)
    for name in ("id", "env_options", "reset_options", "observation"):
        assert getattr(found, name) == getattr(task, name), name
    # What the data say wins over what a task says.
    assert (
        minari.task(acts_in("Hopper-v4", reset_options={"a": 1}), folder).reset_options == task.reset_options
    )


def test_rows_that_nearly_join_up_are_two_episodes_of_minaris(root: Path) -> None:
    rows = data_to_write().to_dict()
    rows["next_observations"][0, 0] = np.nextafter(np.float32(1), np.float32(2))
    rows["next_observations"][2, 1] = -0.0
    data = Transitions.from_dict(rows)
    assert not data.ends[0] and not data.ends[2]  # rounding is no seam
    again = minari.read(minari.write(data, root, id=ID))
    assert official(ID).total_episodes == 6
    assert_same(again.to_dict(), rows)
    assert torch.equal(again.ends, data.ends)


@given(arrays=datasets())
@settings(max_examples=40, deadline=None)
def test_a_round_trip_changes_no_bit(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]
) -> None:
    data = Transitions.from_dict(arrays)
    folder = minari.write(data, tmp_path_factory.mktemp("minari"), id="x-v0")
    again = minari.read(folder)
    assert_same(again.to_dict(), data.to_dict())
    assert torch.equal(again.ends, data.ends)
    assert again.provenance.return_mean == data.provenance.return_mean
    with h5py.File(folder / "data" / "main_data.hdf5") as file:
        # Minari's rule: every episode ends with a flag, and none goes on after one.
        for episode in file.values():
            flags = episode["terminations"][:] | episode["truncations"][:]
            assert flags[-1] and not flags[:-1].any()
        assert sum(len(episode["rewards"]) for episode in file.values()) == len(data)


@pytest.mark.parametrize("source", ["embedded", "d4rl"])
def test_what_is_not_minaris_says_where_it_came_from(root: Path, source: str) -> None:
    rows = data_to_write().to_dict()
    data = Transitions.from_dict(rows, source=source, id="hopper-medium", details={"seed": 3})
    found = minari.read(minari.write(data, root, id=ID)).provenance
    if source == "embedded":
        assert (found.source, found.id, found.details) == ("embedded", "hopper-medium", {"seed": 3})
    else:
        assert (found.source, found.id, found.details) == ("minari", ID, {"environment": None})


def test_minaris_data_do_not_pass_for_d4rls_as_npz(make: Callable[..., Path], tmp_path: Path) -> None:
    data = minari.read(make())
    found = files.read(files.write(data, tmp_path / "x.npz"), "hopper-medium-v2").provenance
    assert (found.source, found.id) == ("minari", ID)


def test_writing_is_whole_or_not_at_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_to_write()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(HDF5Storage, "update_episodes", full)
        with pytest.raises(DataError, match=rf"{ID}: can't be written in .*No space left"):
            minari.write(data, root, id=ID)
    assert [path for path in root.rglob("*") if path.is_file()] == [] and not (root / ID).exists()
    before = minari.write(data, root, id=ID).joinpath("data/main_data.hdf5").read_bytes()
    with pytest.raises(DataError, match=r"there is one in .* already"):
        minari.write(data, root, id=ID)
    assert (root / ID / "data/main_data.hdf5").read_bytes() == before
    for bad in ("", "../x-v0", "x", "a/x-v0", "a//b/x-v0", "/abs/x-v0", "x y-v0"):
        with pytest.raises(DataError, match="isn't a Minari id"):
            minari.write(data, root, id=bad)
    with pytest.raises(ConfigError, match="no environment 'Pendulum-v9'"):
        minari.write(data, root, id="other-v0", task=acts_in("Pendulum-v9"))
    with pytest.raises(DataError, match=r"CartPole-v1: its actions are Discrete\(2\): expected a Box of 1"):
        minari.write(data, root, id="other-v0", task=acts_in("CartPole-v1"))
    assert not (root / "other-v0").exists()


def test_a_task_becomes_the_datasets(make: Callable[..., Path]) -> None:
    folder = make()
    found = minari.task(TASK, folder)
    assert (found.name, found.id) == ("hopper-medium", "Pendulum-v1")
    assert found.datasets == {"minari": {"id": ID}}
    # The collector's window is none of evaluation's, nor is anything of D4RL's.
    assert (found.env_options, found.reset_options) == ({"g": 9.81, "max_episode_steps": 200}, {})
    assert (found.random_return, found.expert_return) == (None, None)
    assert found.score(100.0) is None and found.benchmark == "Minari"
    assert (
        found.note == f"the Minari dataset {ID} has no references: returns only, never comparable with D4RL's"
    )
    environment = make_task_environment(found)
    assert environment.spec is not None and environment.spec.max_episode_steps == 200
    environment.close()

    other: dict[str, Any] = {"id": "Pendulum-v1", "kwargs": {}, "max_episode_steps": None}
    wrappers = [{"name": "FlattenObservation"}, {"name": "RescaleAction"}]
    spec = json.dumps(other | {"additional_wrappers": wrappers})
    make(eval_env_spec=spec, ref_min_score=-10.0, ref_max_score=30.0)
    found = minari.task(None, folder)
    # The environment that Minari evaluates in wins: it made the references in it.
    assert (found.name, found.env_options) == (ID, {})
    assert found.score(10.0) == 50
    assert found.note == (
        f"data and references are the Minari dataset {ID}'s: its scores are never comparable with D4RL's; "
        "collected through FlattenObservation, which evaluation goes without"
    )

    make(env_spec=None)
    found = minari.task(TASK, folder)
    assert (found.id, found.random_return) == ("Hopper-v4", None)
    assert found.note.endswith("it doesn't say which environment it is from: Hopper-v4 is the task's")
    with pytest.raises(DataError, match=r"no 'env_spec' in metadata.json: expected a task"):
        minari.task(None, folder)


def test_a_spec_names_no_file_and_imports_nothing(make: Callable[..., Path]) -> None:
    """Its module is no more imported than its wrappers', whose names are shown."""
    wrappers = [{"name": "Mine", "entry_point": "no.such.module:Mine"}, {"name": "\x1b[2J\nx"}, {"name": 3}]
    spec: dict[str, Any] = {"id": "Hopper-v5", "entry_point": "no.such.module:Trap", "max_episode_steps": 7}
    options = {"kwargs": {"xml_file": "hopper.xml"}, "additional_wrappers": wrappers}
    found = minari.task(None, make(env_spec=json.dumps(spec | options)))
    assert found.env_options == {"xml_file": "hopper.xml", "max_episode_steps": 7}
    assert found.note.endswith("collected through Mine, which evaluation goes without")
    make_task_environment(found)
    cases: list[tuple[str, dict[str, Any]]] = [
        (key, {key: json.dumps(spec | {"kwargs": kwargs})})
        for kwargs in ({"xml_file": "/etc/passwd"}, {"a": [{"b": "../x"}]}, {"model": "~/x"})
        for key in ("env_spec", "eval_env_spec")
    ]
    cases.append(("cpql_task", {"cpql_task": json.dumps({"observation": [], "reset_options": {"f": "/x"}})}))
    for key, change in cases:
        folder = make(action_space=None, **change)
        for ask in (
            lambda folder=folder: minari.task(TASK, folder),
            lambda folder=folder: minari.read(folder),
        ):
            with pytest.raises(
                DataError, match=rf"mixed-v0/data/metadata.json: {key}\..*: .*options: .* could be a path"
            ) as caught:
                ask()
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"env_spec.id: .* found 'os:Pendulum-v1'"):
        minari.task(TASK, make(env_spec=json.dumps({"id": "os:Pendulum-v1"})))


def test_finding(root: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert minari.root() == root and minari.find(ID) is None
    folder = make()
    assert minari.find(ID) == folder.parent == SOURCE.locate(Request(TASK, ID))
    assert SOURCE.locate(Request(TASK)) is None
    with pytest.raises(DataError, match=r"hopper-medium: Minari has no such data"):
        SOURCE.fetch(Request(TASK))
    with pytest.raises(DataError, match=r"'../x' isn't a Minari id"):
        minari.find("../x")
    (root / "loop").symlink_to("loop")
    for path, text in (
        (
            root / "nowhere",
            "nowhere: no metadata.json in it or in its data folder: expected a Minari dataset's folder",
        ),
        (folder / "main_data.hdf5", "main_data.hdf5: no metadata.json"),
        (root, "no metadata.json in it or in its data folder"),
        (root / "loop", "loop: no metadata.json"),
    ):
        with pytest.raises(DataError, match=text):
            minari.read(path)
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    assert minari.root() == Path.home() / ".minari" / "datasets"


def fetched(id: str, say: Callable[[str], None]) -> Transitions:
    """A dataset by its id, as training gets it."""
    request = Request(TASK, id, say=say)
    return SOURCE.read(SOURCE.fetch(request), request)


def test_what_is_absent_is_fetched_by_the_package(
    make: Callable[..., Path], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, bool]] = []

    def download_dataset(id: str, force_download: bool = False) -> None:
        asked.append((id, force_download))
        print("\nDownloading from Farama servers...")
        warnings.warn("We recommend you install a higher dataset version", stacklevel=2)
        if id != ID:
            raise ConnectionError("[Errno -2] Name or service\nnot known")
        make()

    monkeypatch.setattr("minari.download_dataset", download_dataset)
    lines: list[str] = []
    assert len(fetched(ID, lines.append)) == 4
    assert asked == [(ID, True)] and capsys.readouterr().out == ""
    assert lines == [
        f"downloading {ID} from Minari into {root}",
        "warning: We recommend you install a higher dataset version",
    ]
    # What is here isn't fetched again; what a cut download has left is.
    assert len(fetched(ID, lines.append)) == 4 and len(asked) == 1
    (root / ID / "data" / "main_data.hdf5").unlink()
    assert len(fetched(ID, lines.append)) == 4 and len(asked) == 2
    with pytest.raises(DataError) as caught:
        fetched("D4RL/pen/human-v2", lines.append)
    assert str(caught.value) == (
        f"D4RL/pen/human-v2: no such dataset in {root}: `minari download D4RL/pen/human-v2`, or put it into "
        f"{root}/D4RL/pen/human-v2/data (the download failed: [Errno -2] Name or service not known)"
    )


def test_the_package_itself_fetches_what_is_asked_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minari.storage import remotes  # type: ignore[import-untyped]

    data, remote = data_to_write(), tmp_path / "remote"
    minari.write(data, remote, id=ID)
    storage = types.SimpleNamespace(
        list_datasets=lambda prefix=None: [ID] if ID.startswith(prefix or "") else [],
        get_dataset_metadata=lambda id: json.loads((remote / id / "data/metadata.json").read_text()),
        download_dataset=lambda id, path: shutil.copytree(remote / id, path / id, dirs_exist_ok=True),
        list_namespaces=lambda: ["mine", "mine/pendulum"],
        download_namespace_metadata=lambda name, path: (path / name / "namespace_metadata.json").touch(),
    )
    monkeypatch.setitem(remotes._registry, "here", lambda: lambda name, token: storage)
    monkeypatch.setenv("MINARI_REMOTE", "here://x")
    lines: list[str] = []
    assert_same(fetched(ID, lines.append).to_dict(), data.to_dict())
    assert lines == [f"downloading {ID} from Minari into {root}"]
    with pytest.raises(
        DataError, match=r"other-v0: no such dataset .*Couldn't find any version for dataset other"
    ):
        fetched("other-v0", lines.append)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data_format": "arrow"}, "data_format: Input should be 'hdf5', found 'arrow'"),
        ({"total_steps": 5}, "2 episodes, 4 steps read: expected 2 and 5, as metadata.json says"),
        (
            {"total_steps": 3},
            "episode_1: 'rewards' has shape [1] after 3 steps: expected at least 1, and 3 in all",
        ),
        ({"total_episodes": 3}, "no 'episode_2': expected an array"),
        ({"total_episodes": 1, "total_steps": 3}, "2 episodes, 3 steps read: expected 1 and 3"),
        ({"total_episodes": "2"}, "total_episodes: Input should be a valid integer, found '2'"),
        ({"total_steps": 10**400}, "total_steps: Input should be less than"),
        ({"total_steps": None}, "total_steps: Field required"),
        ({"total_steps": 10**10}, "declares 149.0 GiB in a file of"),
        ({"dataset_id": "two\nlines"}, r"found 'two\nlines'"),
        ({"dataset_id": "a/x-v0"}, "dataset_id: String should match pattern"),
        (
            {"action_space": '{"type": "Discrete", "n": 3}'},
            "action_space.type: Input should be 'Box', found 'Disc",
        ),
        ({"action_space": box([-1], [1], dtype="int64")}, "action_space.dtype: String should match pattern"),
        ({"action_space": box([-1.0, 0.0], [1.0])}, "has 2 lower and 1 upper bounds: expected 1"),
        ({"action_space": box([-1.0], [float("inf")])}, "action_space.high.0: Input should be less than"),
        ({"action_space": box([-1.0], [float("nan")])}, "action_space.high.0: Input should be"),
        ({"action_space": box([-1.0], [1e300])}, "action_space.high.0: Input should be less than"),
        ({"action_space": "{"}, "action_space: Invalid JSON"),
        ({"action_space": 5}, "action_space: JSON input should be string, bytes or bytearray, found 5"),
        ({"env_spec": "[]"}, "env_spec: Input should be an object, found []"),
        ({"env_spec": "{}"}, "env_spec.id: Field required"),
        ({"action_space": None, "env_spec": None}, "neither 'action_space' nor 'env_spec'"),
        ({"cpql_cut_episodes": [True]}, "cpql_cut_episodes.0: Input should be a valid integer"),
        ({"cpql_origin": {"source": 1}}, "'cpql_origin' is damaged"),
        ({"cpql_task": json.dumps({"observation": 3, "reset_options": {}})}, "cpql_task.observation: "),
        ({"cpql_task": json.dumps({"observation": [3], "reset_options": {}})}, "cpql_task.observation.0: "),
        ({"cpql_task": json.dumps({"observation": [], "reset_options": [1]})}, "cpql_task.reset_options: "),
        ({"ref_min_score": 1.0, "ref_max_score": float("nan")}, "ref_max_score: Input should be a finite"),
        ({"ref_min_score": "low", "ref_max_score": 1.0}, "ref_min_score: Input should be a valid number"),
        ({"ref_min_score": 2.0, "ref_max_score": 1.0}, "expected the lower first"),
    ],
)
def test_damaged_metadata_are_refused_in_one_line(
    make: Callable[..., Path], changes: dict[str, Any], text: str
) -> None:
    folder = make(**changes)
    with pytest.raises(DataError) as caught:
        minari.read(folder)
    message = str(caught.value)
    assert text in message and "\n" not in message, message


def test_metadata_that_are_no_json_are_refused_in_one_line(make: Callable[..., Path]) -> None:
    path = make() / "metadata.json"
    for content, text in (
        (path.read_bytes()[:50], "damaged: Invalid JSON"),
        (b"\xff\xfe", "damaged: Invalid JSON"),
        (b"[" * 100_000, "damaged: Invalid JSON: recursion limit exceeded"),
        (b"[]", "damaged: Input should be an object, found []"),
        (b" " * (17 << 20), "17,825,792 bytes long"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            minari.read(path.parent)
        message = str(caught.value)
        assert message.startswith("mixed-v0/data/metadata.json: ") and text in message and "\n" not in message
        assert len(message) < 300


def test_arrays_that_do_not_fit_are_refused_by_name(make: Callable[..., Path]) -> None:
    for key, value, text in (
        ("observations", np.zeros((3, 2)), "episode_0: 'observations' has shape [3, 2]: expected [4, 2]"),
        (
            "observations",
            np.zeros((4, 32, 32, 3)),
            "episode_0: 'observations' has shape [4, 32, 32, 3]: expected a vector a step",
        ),
        ("observations", np.zeros(4), "episode_0: 'observations' has shape [4]: expected a vector a step"),
        ("actions", np.zeros(3), "episode_0: 'actions' has shape [3]: expected a vector a step"),
        ("actions", np.zeros((2, 1)), "episode_0: 'actions' has shape [2, 1]: expected [3, 1]"),
        ("actions", np.zeros((3, 2)), "episode_1: 'actions' has shape [1, 1]: expected [1, 2]"),
        ("rewards", np.zeros((3, 2)), "episode_0: 'rewards' has shape [3, 2] after 0 steps"),
        ("rewards", np.zeros(0), "episode_0: 'rewards' has shape [0] after 0 steps"),
        ("rewards", {"x": np.zeros(3)}, "episode_0: 'rewards' is a group: expected an array"),
        (
            "rewards",
            np.array([b"a", b"b", b"c"]),
            "episode_0: 'rewards' holds |S1: expected an array of numbers",
        ),
        ("rewards", np.array([1, np.nan, 2]), "'rewards' holds NaN or infinity, first in row 1"),
        ("rewards", np.array([1, 1e300, 2]), "'rewards' holds NaN or infinity, first in row 1"),
        ("truncations", np.array([0.0, 2, 0]), "'timeouts' holds 2"),
    ):
        content = episodes()
        content[0][key] = value
        folder = make(content)
        with pytest.raises(DataError) as caught:
            minari.read(folder)
        message = str(caught.value)
        assert text in message and "main_data.hdf5: " in message and "\n" not in message, message


def test_files_that_are_no_hdf5_are_refused_by_name(make: Callable[..., Path]) -> None:
    path = make() / "main_data.hdf5"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^mixed-v0/data/main_data.hdf5: damaged"):
            minari.read(path.parent)
    path.unlink()
    with pytest.raises(
        DataError, match=rf"main_data.hdf5: damaged, .*No such file .*`minari download --force {ID}`"
    ):
        minari.read(path.parent)
