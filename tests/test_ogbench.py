"""OGBench's family: its files and rewards as its own loader has them, and datasets made again."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

import cpql.data
from cpql.actors import ActorConfig, ConsistencyActor
from cpql.data import files, ogbench, oracles, regenerated
from cpql.data.oracles import Recipe
from cpql.data.request import Request
from cpql.data.sources import SOURCES
from cpql.deploy import hub
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.deploy.summary import summary
from cpql.environments import make_task_environment, spec_of, widths
from cpql.errors import ConfigError, DataError
from cpql.tasks import Task, load_task, task_names
from cpql.training.evaluation import Evaluation, evaluate

pytest.importorskip("ogbench")

Arrays = dict[str, NDArray[Any]]
LENGTHS = (7, 3, 12, 2)  # rows of the trajectories of a small file
# A task of each kind, and how many numbers the simulator's state has at least.
SINGLE = {
    "pointmaze-medium-navigate-task1": 2,
    "antmaze-large-navigate": 15,
    "humanoidmaze-medium-stitch-task3": 28,
    "antsoccer-arena-navigate-task2": 22,
    "cube-single-play": 21,
    "cube-double-noisy-task5": 28,
    "scene-play-task4": 25,
    "puzzle-3x3-play": 23,
}


def small(task: Task) -> Arrays:
    """A small file in OGBench's layout, in some rows of which the task or parts of it are done."""
    rng = np.random.default_rng(0)
    rows = sum(LENGTHS)
    (states, actions), *_ = spec_of(task)
    environment = make_task_environment(task)
    environment.reset(seed=0)
    base: Any = environment.unwrapped
    qpos = rng.normal(size=(rows, SINGLE.get(task.name, 28)))
    arrays = {"observations": rng.normal(size=(rows, states)), "actions": rng.uniform(-1, 1, (rows, actions))}
    done = rng.uniform(size=(rows, 4)) < 0.5
    done[5:8] = True
    if hasattr(base, "cur_goal_xy"):
        start = 15 if "soccer" in task.name else 0
        qpos[done[:, 0], start : start + 2] = base.cur_goal_xy
    else:
        for k, goal in enumerate(base._data.mocap_pos if hasattr(base, "_num_cubes") else ()):
            qpos[done[:, k], 14 + 7 * k : 17 + 7 * k] = goal
        if hasattr(base, "_target_drawer_pos"):
            qpos[done[:, 2], -2], qpos[done[:, 3], -1] = base._target_drawer_pos, base._target_window_pos
        if hasattr(base, "_target_button_states"):
            states_of = np.tile(base._target_button_states, (rows, 1))
            states_of[~done[:, 1], 0] ^= 1
            arrays["button_states"] = states_of
    arrays |= {"qpos": qpos, "qvel": rng.normal(size=(rows, 3)), "terminals": np.zeros(rows)}
    arrays["terminals"][np.cumsum(LENGTHS) - 1] = 1
    return {key: values.astype(oracles.DTYPES[key]) for key, values in arrays.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OGBench's folder and cpql's cache, both empty."""
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("CPQL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own").mkdir()
    return tmp_path


def keep(task: Task, folder: Path, **changed: Any) -> Path:
    """Put a small file where OGBench's own is expected; None leaves an array out."""
    arrays = {key: value for key, value in (small(task) | changed).items() if value is not None}
    path = folder / "own" / f"{task.dataset}.npz"
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.filterwarnings("ignore:.*precision lowered")  # OGBench's own, where it makes an environment
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "maze" not in name else []) for name in SINGLE],
)
def test_a_file_is_read_as_ogbench_reads_it(name: str, folder: Path) -> None:
    import ogbench as package  # type: ignore[import-untyped]

    task = load_task(name)
    path = keep(task, folder)
    path.with_name(f"{task.dataset}-val.npz").write_bytes(path.read_bytes())
    environment, _, kind = task.id.partition("-singletask") if task.id else ("", "", "")
    named = f"{environment}-any-singletask{kind}"
    _, expected, _ = package.make_env_and_datasets(named, dataset_path=str(path))
    _, data = cpql.data.load(task, source="ogbench", size=1)
    for key in ("observations", "actions", "rewards", "next_observations"):
        assert np.array_equal(getattr(data, key), expected[key]), key
    assert np.array_equal(data.columns.discounts, expected["masks"])
    assert np.array_equal(data.terminated, expected["masks"] == 0) and data.terminated.any()
    ends = expected["terminals"] == 1
    assert np.array_equal(data.truncated, ends & (expected["masks"] == 1)) and ends.sum() == len(LENGTHS)
    assert len(set(expected["rewards"])) > 1 and expected["masks"].any()
    assert (data.provenance.source, data.provenance.id) == ("ogbench", task.dataset)


def test_every_task_has_its_environment_and_dataset() -> None:
    import ogbench as package

    assert package
    tasks = [task for name in task_names() if (task := load_task(name)).benchmark == "OGBench"]
    assert len(tasks) == 6 * 47
    for task in tasks:
        assert task.id in gymnasium.registry and (task.measure, task.episodes) == ("success", 50)
        family, kind = task.dataset.removesuffix("-v0").rsplit("-", 1)
        assert task.id.startswith(f"{family}-singletask") and task.name.startswith(f"{family}-{kind}")
        assert task.id.partition("-singletask")[2] == task.name.removeprefix(f"{family}-{kind}") + "-v0"
        if "regenerated" in task.datasets:
            assert oracles.recipe(task.dataset).environment == f"{family}-v0"
    assert not any(name.startswith(("visual", "powder")) for name in task_names())


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("cube-quadruple-noisy-v0", Recipe("cube-quadruple-v0", "noisy", 1001)),
        ("scene-play-v0", Recipe("scene-v0", "play", 1001)),
        ("puzzle-4x6-play-v0", Recipe("puzzle-4x6-v0", "play", 1001)),
        ("pointmaze-giant-navigate-v0", Recipe("pointmaze-giant-v0", "navigate", 2001)),
        ("pointmaze-giant-stitch-v0", Recipe("pointmaze-giant-v0", "stitch", 201)),
        ("antmaze-large-navigate-v0", None),
        ("pointmaze-medium-play-v0", None),
        ("cube-single-navigate-v0", None),
        ("cube-single-play-v0-val", None),
    ],
)
def test_recipes(id: str, expected: Recipe | None) -> None:
    if expected is not None:
        assert oracles.recipe(id) == expected
        return
    with pytest.raises(
        DataError, match=f"{id} can't be regenerated: expected a dataset that scripted oracles"
    ):
        oracles.recipe(id)


def collected(id: str, path: Path, rows: int, episodes: int = 2, seed: int = 0) -> Arrays:
    recipe = oracles.recipe(id)._replace(rows=rows)
    source = np.random.SeedSequence(seed)
    assert oracles.collect(Task("t", None), episodes, source, recipe, path) == {}
    return safetensors.numpy.load_file(path)


@pytest.mark.parametrize(
    "id",
    [
        "pointmaze-medium-navigate-v0",
        "pointmaze-teleport-navigate-v0",
        "pointmaze-large-stitch-v0",
        pytest.param("cube-single-play-v0", marks=pytest.mark.slow),
        pytest.param("cube-triple-noisy-v0", marks=pytest.mark.slow),
        pytest.param("scene-play-v0", marks=pytest.mark.slow),
        pytest.param("scene-noisy-v0", marks=pytest.mark.slow),
        pytest.param("puzzle-3x3-noisy-v0", marks=pytest.mark.slow),
    ],
)
def test_a_seed_determines_every_bit(id: str, tmp_path: Path) -> None:
    one, two = (collected(id, tmp_path / name, 60) for name in "ab")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = collected(id, tmp_path / "c", 60, seed=1)
    shorter = collected(id, tmp_path / "d", 60, episodes=1)
    assert all(np.array_equal(shorter[key], one[key][:60]) for key in one)
    assert not np.array_equal(one["actions"], other["actions"])
    assert {key: value.dtype for key, value in one.items()} == {
        key: np.dtype(kind) for key, kind in oracles.DTYPES.items() if key != "button_states" or key in two
    }
    assert ("button_states" in one) == id.startswith(("scene", "puzzle"))
    assert np.flatnonzero(one["terminals"]).tolist() == [59, 119]
    assert np.abs(one["actions"]).max() <= 1 and one["actions"].std(0).min() > 0.01
    if "teleport" in id:  # an observation is of before the jump
        return
    if id.startswith("pointmaze"):
        assert np.array_equal(one["observations"], one["qpos"])
    elif not id.startswith("puzzle"):  # the state in a row is the one that it observed
        where = (one["qpos"][:, 14:17] - [0.425, 0, 0]) * 10
        assert np.allclose(one["observations"][:, 19:22], where, atol=1e-4)


@pytest.mark.slow
def test_a_point_walks_to_goals_and_stitches_short_ways(tmp_path: Path) -> None:
    far = collected("pointmaze-medium-navigate-v0", tmp_path / "a", 1001, 4)["qpos"].reshape(4, 1001, 2)
    near = collected("pointmaze-medium-stitch-v0", tmp_path / "b", 201, 20)["qpos"].reshape(20, 201, 2)
    spans = [np.ptp(each, 1).max(1) for each in (far, near)]
    assert spans[0].min() > 12 and spans[1].max() < 4 * 4 + 4 < spans[0].max()


def plan(name: str = "pointmaze-medium-stitch", size: int = 1_500) -> regenerated.Plan:
    return regenerated.prepare(Request(load_task(name), size=size, seed=3))


@pytest.mark.slow
def test_an_interrupted_regeneration_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regenerated, "CHUNK_EPISODES", 2)
    asked = plan()
    assert asked.episodes == 8 and not (folder / "cache").exists()

    class Stop(Exception):
        pass

    def stop(label: str, done: int, total: int) -> None:
        assert (label, total) == ("regenerate pointmaze-medium-stitch-v0", 1_600)
        if done >= 800:
            raise Stop

    with pytest.raises(Stop):
        regenerated.regenerate(asked, workers=1, progress=stop)
    parts = next((folder / "cache").glob(".*.parts"))
    left = sorted(part.name for part in parts.glob("*.safetensors"))
    assert not asked.path.exists() and 2 <= len(left) < 4
    assert regenerated.Regenerated().locate(Request(asked.task, size=1_500, seed=3)) is None
    reports: list[int] = []
    path = regenerated.regenerate(asked, workers=2, progress=lambda _, done, total: reports.append(done))
    assert path == asked.path and reports[-1] == 1_600 and len(reports) == 4 - len(left)
    assert not parts.exists()
    resumed = path.read_bytes()
    path.unlink()
    assert regenerated.regenerate(asked, workers=1).read_bytes() == resumed
    task, data = cpql.data.load(asked.task, source="regenerated", size=1_500, seed=3)
    assert len(data) == 1_600 and task.measure == "success"
    about = data.provenance
    assert (about.source, about.id, about.details["seed"]) == ("regenerated", "pointmaze-medium-stitch-v0", 3)
    assert about.details["versions"]["ogbench"] and "regenerated" in about.line()
    with pytest.raises(DataError, match=r"carries 'cpql_origin'.*expected OGBench's"):
        (folder / "own" / "pointmaze-medium-stitch-v0.npz").write_bytes(resumed)
        cpql.data.load(asked.task, source="ogbench", size=1)


@pytest.mark.slow
def test_auto_takes_ogbenchs_file_or_regenerates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ogbench, "HOST", "http://127.0.0.1:9/")
    monkeypatch.setattr(ogbench, "MIRROR", "http://127.0.0.1:9/")
    task, said = load_task("pointmaze-medium-stitch"), list[str]()
    _, data = cpql.data.load(task, size=200, say=said.append)
    assert (data.provenance.source, len(data)) == ("regenerated", 200)
    assert "is OGBench's, regenerated here" in said[0] and "fallback" in data.provenance.details
    keep(task, folder)
    said.clear()
    _, data = cpql.data.load(task, size=200, say=said.append)
    assert data.provenance.source == "ogbench" and not any("fallback" in line for line in said)


def test_what_cannot_be_regenerated_says_so(folder: Path) -> None:
    with pytest.raises(DataError, match="antmaze-large-navigate-v0 can't be regenerated"):
        cpql.data.load(load_task("antmaze-large-navigate"), source="regenerated", size=1_000)
    assert SOURCES["regenerated"].locate(Request(load_task("antmaze-large-navigate"))) is None


DAMAGE = {
    "images": ({"observations": np.zeros((24, 64, 64, 3), np.uint8)}, "has images.*cpql reads no images"),
    "no state": ({"qpos": None}, "no 'qpos': expected a file in OGBench's layout"),
    "no end": ({"terminals": np.zeros(24, bool)}, "its last trajectory has no end"),
    "short": ({"actions": np.zeros((23, 2), np.float32)}, "'actions' has 23 rows: expected 24"),
    "another key": ({"rewards": np.zeros(24)}, "'rewards' is none of OGBench's keys"),
    "pickles": ({"qvel": np.array([{}] * 24)}, "damaged, 'qvel' can't be read"),
    "wide": (
        {"observations": np.zeros((24, 3), np.float32)},
        "'observations' is 3 wide: the environment has 2",
    ),
}


@pytest.mark.parametrize(("changed", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(changed: Any, message: str, folder: Path) -> None:
    task = load_task("pointmaze-medium-navigate")
    keep(task, folder, **changed)
    with pytest.raises(DataError, match=message) as error:
        cpql.data.load(task, source="ogbench", size=1)
    assert "\n" not in str(error.value) and "pointmaze-medium-navigate-v0.npz" in str(error.value)


def test_images_are_refused_before_they_are_downloaded(folder: Path) -> None:
    id = "visual-cube-single-play-v0"
    with pytest.raises(DataError, match=f"^{id}: its observations are images: expected numbers in one axis$"):
        cpql.data.load(load_task("pointmaze-medium-navigate"), source="ogbench", id=id, size=1)


def test_a_file_of_ones_own_has_the_rewards_of_the_task(folder: Path) -> None:
    task = load_task("pointmaze-medium-navigate")
    path = keep(task, folder).rename(folder / "mine.npz")
    _, data = cpql.data.load(task, path=path, size=1)
    assert (data.provenance.source, data.provenance.file) == ("file", "mine.npz") and data.terminated.any()
    with pytest.raises(DataError, match=r"mine.npz: has no rewards: expected env to name the task"):
        files.read(path)
    written = files.write(data, folder / "as-d4rls.npz")
    assert np.array_equal(files.read(written).table, data.table)


def test_the_rewards_need_a_single_task(folder: Path) -> None:
    task = load_task("pointmaze-medium-navigate")
    keep(task, folder)
    with pytest.raises(ConfigError, match="pointmaze-medium-v0: expected a single task of OGBench"):
        cpql.data.load(dataclasses.replace(task, id="pointmaze-medium-v0"), source="ogbench", size=1)
    _, without = cpql.data.load(dataclasses.replace(task, id=None), source="ogbench", size=1)
    assert np.array_equal(without.table, cpql.data.load(task, source="ogbench", size=1)[1].table)


@pytest.fixture
def mirror(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror of the user's own, and the folder that it serves."""
    served = folder / "mirror"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(served))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("CPQL_OGBENCH_MIRROR", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield served
        server.shutdown()
        thread.join()


def test_a_dataset_and_its_validation_file_are_downloaded(folder: Path, mirror: Path) -> None:
    task = load_task("pointmaze-medium-navigate-task4")
    path = keep(task, folder)
    content = path.read_bytes()
    path.rename(mirror / path.name)
    (mirror / "pointmaze-medium-navigate-v0-val.npz").write_bytes(content)
    _, data = cpql.data.load(task, source="ogbench", size=1)
    assert path.read_bytes() == content and path.with_name(f"{path.name}.sha256").exists()
    assert len(data) == sum(LENGTHS) - len(LENGTHS)
    _, validation = cpql.data.load(task, source="ogbench", id="pointmaze-medium-navigate-v0-val", size=1)
    assert validation.provenance.file == "pointmaze-medium-navigate-v0-val.npz"
    (mirror / "pointmaze-large-stitch-v0.npz").write_bytes(b"no archive")
    with pytest.raises(
        DataError, match=r"pointmaze-large-stitch-v0.npz can't be downloaded.*expected whole NPZ"
    ):
        cpql.data.load(load_task("pointmaze-large-stitch"), source="ogbench", size=1)


@pytest.mark.parametrize(
    "name",
    ["pointmaze-teleport-navigate", "antsoccer-arena-navigate",
     pytest.param("cube-single-play", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_seed_determines_an_episode_and_nothing_else(name: str) -> None:
    def episode(other: int) -> list[NDArray[Any]]:
        np.random.seed(other)
        before = np.random.get_state(legacy=False)["state"]["key"].copy()
        environment = make_task_environment(load_task(name))
        seen = [environment.reset(seed=5)[0]]
        actions = np.random.default_rng(0).uniform(-1, 1, (40, widths(environment)[1]))
        seen += [environment.step(action)[0] for action in actions]
        environment.close()
        assert np.array_equal(before, np.random.get_state(legacy=False)["state"]["key"])
        return seen

    assert np.array_equal(episode(0), episode(1))


def test_an_environment_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = make_task_environment(load_task("antmaze-large-navigate"))
    environment.reset(seed=0)
    assert not list(tmp_path.iterdir())
    environment.close()


def test_without_ogbench_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(gymnasium, "registry", {})
    monkeypatch.setattr("cpql.environments.gymnasium.registry", {})
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(ConfigError, match=r"needs a package: pip install 'cpql\[ogbench\]'"):
        make_task_environment(load_task("cube-single-play"))


def test_the_score_is_the_share_of_successes() -> None:
    task = load_task("cube-single-play")
    returns, lengths = (-10.0, -200.0, -30.0, -200.0), (11, 200, 31, 200)
    found = Evaluation(task, returns, lengths, 0, "actor alone", successes=(1.0, 0.0, 1.0, 1.0))
    assert found.score == 75 and found.score_interval is not None
    low, high = found.score_interval
    assert (round(low, 2), round(high, 2)) == (30.06, 95.44)  # Wilson's, for 3 of 4
    content = found.to_dict()
    assert content["score_interval"] == [low, high] and content["successes"] == [1, 0, 1, 1]
    assert content["measure"] == "success" and content["references"]["of"] == "OGBench"
    data = {"source": "regenerated", "id": "cube-single-play-v0", "return_mean": -40.0}
    run = {"evaluated": True, "behaviour_return": -40.0, "behaviour_score": None, "data": data}
    text = summary(content | run)
    assert "score 75.0 (95% interval 30.1 to 95.4; return -110 ± 104 over 4 episodes" in text
    assert "share of successes in percent, as OGBench counts them   (data: regenerated cube-single" in text
    assert hub._entry(content)["metrics"][1]["type"] == "success_rate"


def test_an_evaluation_counts_successes() -> None:
    task = dataclasses.replace(load_task("pointmaze-medium-navigate"), env_options={"max_episode_steps": 3})

    def policy(states: int, actions: int) -> Policy:
        actor = ConsistencyActor(states, actions, ActorConfig(hidden=(8,)))
        bounds = (-1.0,) * actions, (1.0,) * actions
        config = PolicyConfig(states, actions, *bounds, actor.config, (8,), True, 1, 1.0, task)
        return Policy(actor, None, config)

    found = evaluate(policy(2, 2), task, 2)
    assert found.successes == (0, 0) and found.score == 0 and found.returns == (-3, -3)
    here = make_task_environment(task)
    here.reset(seed=0)
    where = here.get_wrapper_attr("cur_task_info")["goal_ij"]
    assert isinstance(here.unwrapped, gymnasium.Env) and where == (6, 6)
    other = dataclasses.replace(task, id="Pendulum-v1")
    with pytest.raises(ConfigError, match="Pendulum-v1 says of no step whether it succeeded"):
        evaluate(policy(3, 1), other, 1)
