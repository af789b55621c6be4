"""The table of tasks, and the published settings by task."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, open_dict

from cpql import configuration
from cpql.agents import ActorCriticConfig, ConsistencyACConfig, CPQLConfig, TargetConfig
from cpql.environments import make_environment
from cpql.errors import ConfigError
from cpql.tasks import Task, config_folder, expand, load_task, task_names, task_patterns
from cpql.training.config import OnlineConfig, TrainConfig, agent_config

ROOT = Path(__file__).parent.parent
AGENTS = (
    "bc",
    "bc_consistency",
    "bc_deterministic",
    "bc_diffusion",
    "bc_flow",
    "consistency_ac",
    "consistency_ac_online",
    "consistency_ac_online_published",
    "consistency_ac_published",
    "cpiql",
    "cpql",
    "cpql_online",
    "cpql_online_published",
    "cpql_published",
    "diffusion_ql",
    "diffusion_ql_published",
    "edp",
    "fql",
    "fql_published",
    "iql",
    "iql_corl",
    "ofql",
    "rebrac",
    "rebrac_published",
    "recommended",
    "td3_bc",
)


# The table.


def test_a_family_spelt_out_by_hand() -> None:
    table = {
        "family": {
            "name": "{animal}-{mood}",
            "where": {"zoo": {"path": "zoo/{file}/{mood}.hdf5"}},
            "id": "Nowhere-v0",
            "episodes": 3,
            "animal": {"cat": {"file": "felis"}, "dog": {"file": "canis", "episodes": 4}},
            "mood": {
                "sad": {},
                "glad": {
                    "episodes": 5,
                    "note": "a {mood} {animal}",
                    "where": {"zoo": {"rows": 7}, "wild": {}},
                },
            },
        },
        "other": {"name": "lonely", "id": "Somewhere-v0"},
    }
    shared = {"id": "Nowhere-v0"}
    assert expand(table) == {
        "cat-sad": {
            "name": "cat-sad",
            "where": {"zoo": {"path": "zoo/felis/sad.hdf5"}},
            "episodes": 3,
            **shared,
        },
        "cat-glad": {
            "name": "cat-glad",
            "where": {"zoo": {"path": "zoo/felis/glad.hdf5", "rows": 7}, "wild": {}},
            "episodes": 5,
            "note": "a glad cat",
            **shared,
        },
        "dog-sad": {
            "name": "dog-sad",
            "where": {"zoo": {"path": "zoo/canis/sad.hdf5"}},
            "episodes": 4,
            **shared,
        },
        "dog-glad": {
            "name": "dog-glad",
            "where": {"zoo": {"path": "zoo/canis/glad.hdf5", "rows": 7}, "wild": {}},
            "episodes": 5,
            "note": "a glad dog",
            **shared,
        },
        "lonely": {"name": "lonely", "id": "Somewhere-v0"},
    }
    assert task_patterns(table) == ["{cat,dog}-{sad,glad}", "lonely"]


WORDS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True)


@given(st.lists(WORDS, min_size=1, max_size=3), st.text("xyz", max_size=3))
def test_a_family_is_the_product_of_its_lists(lists: list[list[str]], shared: str) -> None:
    axes = [f"axis{i}" for i in range(len(lists))]
    family: dict[str, Any] = {"name": "-".join(f"{{{axis}}}" for axis in axes), "id": shared}
    family |= {
        axis: {word: {axis: i} for i, word in enumerate(words)}
        for axis, words in zip(axes, lists, strict=True)
    }
    tasks = expand({"family": family})
    assert list(tasks) == ["-".join(words) for words in itertools.product(*lists)]
    for name, task in tasks.items():
        assert task["name"] == name and task["id"] == shared
        assert [lists[i][task[axis]] for i, axis in enumerate(axes)] == name.split("-")


def test_the_table_holds_every_task_once() -> None:
    names = task_names()
    kinds = ("random", "medium", "medium-replay", "full-replay", "medium-expert", "expert")
    mazes = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
    expected = [f"{robot}-{kind}" for robot in ("hopper", "halfcheetah", "walker2d", "ant") for kind in kinds]
    expected += [f"antmaze-{maze}-{version}" for maze in mazes for version in ("v0", "v2")]
    expected += [f"maze2d-{maze}" for maze in ("umaze", "medium", "large")]
    expected += [
        f"{hand}-{kind}"
        for hand in ("pen", "hammer", "door", "relocate")
        for kind in ("human", "cloned", "expert")
    ]
    expected += [f"kitchen-{kind}" for kind in ("complete", "partial", "mixed")]
    assert len(expected) == 54
    expected += [
        "gymnasium",
        "hopper",
        "halfcheetah",
        "walker2d",
        "ant",
        "humanoid",
        "pendulum",
    ]  # without data
    # `test_ogbench.py` has the others.
    assert [name for name in names if load_task(name).benchmark != "OGBench"] == expected
    for name in names:
        task = load_task(name)
        assert task.name == name
        named = [*task.datasets, *(value for entry in task.datasets.values() for value in entry.values())]
        assert not re.search("[{}]", f"{task.id} {' '.join(map(str, named))} {task.note}")


def test_ids_paths_and_references_are_the_d4rl_package_s() -> None:
    lines = (Path(__file__).parent / "d4rl_1.1_infos.txt").read_text().splitlines()[1:]
    infos = {id: (url, float(low), float(high)) for id, url, low, high in map(str.split, lines)}
    tasks = [task for task in map(load_task, task_names()) if "d4rl" in task.datasets]
    entries = [(task.datasets["d4rl"], task) for task in tasks]
    assert {e["id"]: (e["path"], t.random_return, t.expert_return) for e, t in entries} == infos


SAMPLE = {
    "hopper-medium": Task(
        "hopper-medium",
        "Hopper-v4",
        -20.272305,
        3234.3,
        {
            "d4rl": {
                "id": "hopper-medium-v2",
                "path": "gym_mujoco_v2/hopper_medium-v2.hdf5",
                "rows": 1_000_000,
            },
            "minari": {"id": "mujoco/hopper/medium-v0"},
        },
    ),
    "walker2d-medium-replay": Task(
        "walker2d-medium-replay",
        "Walker2d-v4",
        1.629008,
        4592.3,
        {
            "d4rl": {
                "id": "walker2d-medium-replay-v2",
                "path": "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5",
            },
        },
    ),
    "ant-expert": Task(
        "ant-expert",
        "Ant-v4",
        -325.6,
        3879.7,
        {
            "d4rl": {"id": "ant-expert-v2", "path": "gym_mujoco_v2/ant_expert-v2.hdf5", "rows": 1_000_000},
            "minari": {"id": "mujoco/ant/expert-v0"},
        },
        env_options={"use_contact_forces": True, "contact_force_range": [0.0, 0.0]},
    ),
    "antmaze-large-play-v0": Task(
        "antmaze-large-play-v0",
        "AntMaze_Large-v4",
        0.0,
        1.0,
        {
            "d4rl": {
                "id": "antmaze-large-play-v0",
                "path": "ant_maze_new/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_"
                "sparse.hdf5",
                "rows": 1_000_000,
            },
            "minari": {"id": "D4RL/antmaze/large-play-v1"},
        },
        observation=("achieved_goal", "observation"),
        env_options={"continuing_task": False},
        reset_options={"reset_cell": [1, 1], "goal_cell": [7, 9]},
        episodes=100,
    ),
    "antmaze-umaze-diverse-v2": Task(
        "antmaze-umaze-diverse-v2",
        "AntMaze_UMaze-v4",
        0.0,
        1.0,
        {
            "d4rl": {
                "id": "antmaze-umaze-diverse-v2",
                "path": "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
                "rows": 1_000_000,
            },
            "minari": {"id": "D4RL/antmaze/umaze-diverse-v1"},
        },
        observation=("achieved_goal", "observation"),
        env_options={"continuing_task": False},
        reset_options={"reset_cell": [1, 1], "goal_cell": [3, 1]},
        episodes=100,
    ),
    "maze2d-medium": Task(
        "maze2d-medium",
        "PointMaze_Medium-v3",
        13.13,
        277.39,
        {
            "d4rl": {
                "id": "maze2d-medium-v1",
                "path": "maze2d/maze2d-medium-sparse-v1.hdf5",
                "rows": 2_000_000,
            },
            "minari": {"id": "D4RL/pointmaze/medium-v2"},
        },
        observation=("observation",),
        reset_options={"goal_cell": [6, 6]},
        episodes=100,
    ),
    "pen-cloned": Task(
        "pen-cloned",
        "AdroitHandPen-v1",
        96.262799,
        3076.8331017826877,
        {
            "d4rl": {"id": "pen-cloned-v1", "path": "hand_dapg_v1/pen-cloned-v1.hdf5"},
            "minari": {"id": "D4RL/pen/cloned-v2"},
        },
        env_options={"max_episode_steps": 100},
        episodes=100,
    ),
    "door-human": Task(
        "door-human",
        "AdroitHandDoor-v1",
        -56.512833,
        2880.5693087298737,
        {
            "d4rl": {"id": "door-human-v1", "path": "hand_dapg_v1/door-human-v1.hdf5"},
            "minari": {"id": "D4RL/door/human-v2"},
        },
        episodes=100,
    ),
    "kitchen-mixed": Task(
        "kitchen-mixed",
        "FrankaKitchen-v1",
        0.0,
        4.0,
        {
            "d4rl": {
                "id": "kitchen-mixed-v0",
                "path": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
                "rows": 136_950,
            },
            "minari": {"id": "D4RL/kitchen/mixed-v2"},
        },
        observation=("observation",),
        env_options={"tasks_to_complete": ["microwave", "kettle", "bottom burner", "light switch"]},
        episodes=100,
    ),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_tasks_written_by_hand(name: str) -> None:
    task = load_task(name)
    assert replace(task, note="") == SAMPLE[name]
    assert bool(task.note) == (task.episodes == 100)  # all but locomotion differ from D4RL's environments


def test_score_by_hand() -> None:
    task = Task("a", "A-v0", random_return=-20.0, expert_return=180.0)
    assert [task.score(r) for r in (-20.0, 30.0, 180.0, 280.0)] == [0.0, 25.0, 100.0, 150.0]
    # D4RL's own references, worked out by hand: (1000 + 280.178953) / (12135 + 280.178953)
    assert load_task("halfcheetah-random").score(1000.0) == pytest.approx(10.311401, abs=1e-5)
    assert Task("a", "A-v0").score(1.0) is None
    assert Task("a", "A-v0", 0.0).score(1.0) is None


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("hoper-medium", "hopper-medium"),
        ("antmaze-umaze", "antmaze-umaze-v2 or antmaze-umaze-v0"),
        ("pen_human", "pen-human"),
        ("hopper-medium-v2", "hopper-medium"),
    ],
)
def test_an_unknown_task_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"env={name} is no task: did you mean {near}")):
        load_task(name)


@pytest.mark.parametrize(
    ("name", "width"), [("hopper", 11), ("halfcheetah", 17), ("walker2d", 17), ("ant", 111)]
)
def test_locomotion_is_as_wide_as_d4rl_s(
    name: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo leaves its log where it runs
    task = load_task(f"{name}-random")
    assert task.id is not None
    environment = make_environment(task.id, **task.env_options)
    environment.action_space.seed(0)
    observation, _ = environment.reset(seed=0, options=task.reset_options)
    assert observation.shape == (width,)
    if name == "ant":
        for _ in range(20):  # it falls onto the ground, which D4RL's data don't feel
            observation, reward, _, _, info = environment.step(environment.action_space.sample())
            assert np.all(observation[27:] == 0.0) and np.any(observation[:27] != 0.0)
            control = 0.5 * np.square(environment.unwrapped.data.ctrl).sum()  # type: ignore[attr-defined]
            assert reward == pytest.approx(info["reward_forward"] + info["reward_survive"] - control)
    environment.close()


# What agents and budgets make of a task.

Composed = Callable[[str, str], TrainConfig]


def built(content: DictConfig) -> TrainConfig:
    (config,) = configuration.members(content, [])
    return config


@pytest.fixture(scope="module")
def composed() -> Composed:
    """A maker of configurations. Composing is slow, swapping `env` isn't: each agent is composed once."""
    configuration.register()

    @functools.cache
    def agent_content(agent: str) -> DictConfig:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose("train", [f"agent={agent}", "configuration=x"])

    def make(env: str, agent: str) -> TrainConfig:
        content = agent_content(agent).copy()
        with open_dict(content):
            content.env = asdict(load_task(env))
        return built(content)

    return make


def test_swapping_the_task_is_composing_with_it(composed: Composed) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", ["env=pen-human", "agent=consistency_ac", "configuration=x"])
    assert built(content) == composed("pen-human", "consistency_ac")


@pytest.mark.slow
def test_every_task_with_every_agent(composed: Composed) -> None:
    """Each task with two agents, and every sixth with all of them: each composition takes 10 ms."""
    assert sorted(AGENTS) == configuration.choices("agent")
    # OGBench's tasks of one environment differ in their goals alone.
    names = [name for name in task_names() if "-task" not in name]
    some = itertools.product(names, ("cpql", "fql_published"))
    for env, agent in [*some, *itertools.product(names[::6], AGENTS)]:
        config = composed(env, agent)
        assert config.env == load_task(env)
        _, settings = agent_config(config)
        assert settings.updates == config.budget.updates
        assert config.budget.episodes == config.env.episodes
        as_code = agent.endswith("published") or agent == "iql_corl"
        if agent in ("fql_published", "rebrac_published") and config.env.benchmark == "OGBench":
            as_code = False  # whose loader keeps them
        assert config.dataset.time_limits == ("drop" if as_code else "keep")


@pytest.mark.parametrize(
    ("agent", "updates", "settings", "online"),
    [
        ("cpql_online", 1_000_000, {"alpha": 0.05, "q_loss": "normalised", "candidates": 1}, OnlineConfig()),
        (
            "cpql_online_published",
            990_000,
            {"alpha": 0.05, "q_loss": "min", "critic_layer_norm": False, "candidates": 50},
            OnlineConfig(start_steps=10_000, candidates=50, time_limits="terminal"),
        ),
        (
            "consistency_ac_online_published",
            250_000,
            {"alpha": 0.0, "actor_lr": 1e-5, "max_grad_norm": 1.0, "q_normalisation": False},
            OnlineConfig(
                environments=2, start_steps=0, updates_per_step=0.125, candidates=50, epsilon=1.0,
                epsilon_end=0.01, epsilon_steps=200_000, time_limits="terminal", buffer_size=100_000
            ),
        ),
    ],
)  # fmt: skip
def test_what_is_published_for_learning_online(
    agent: str, updates: int, settings: dict[str, Any], online: OnlineConfig
) -> None:
    configuration.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        words = ["mode=online", "env=walker2d-medium", f"agent={agent}", "configuration=x"]
        config = built(compose("train", words))
    assert config.online == online and config.env.id == "Walker2d-v4"
    assert config.budget.updates == updates
    _, found = agent_config(config)
    assert {key: getattr(found, key) for key in settings} == settings


# By agent: columns, then a task's published values, from the codes' tables (hyperparameters of main.py and
# offline.py). The antmaze rows stand there for v0.
CPQL = "actor_lr alpha eta max_grad_norm expectile updates max_q_backup reward"
CAC = "actor_lr eta q_normalisation max_grad_norm updates max_q_backup reward"
IQL = "expectile beta discount critic_hidden critic_layer_norm order reward"
REBRAC = "actor_penalty critic_penalty actor_lr critic_lr batch_size discount critic_hidden reward"
FQL = "alpha q_loss q_aggregation discount updates reward"
DQL = "actor_lr eta max_grad_norm max_q_backup updates candidates reward"
TWO, THREE, FOUR = (256, 256), (256, 256, 256), (512, 512, 512, 512)
PUBLISHED: list[tuple[str, str, str, tuple[Any, ...]]] = [
    ("cpql", "hopper-medium", CPQL, (3e-4, 1.0, 2.0, 9.0, 0.6, 2_000_000, 0, "none")),
    ("cpql", "halfcheetah-medium-replay", CPQL, (3e-4, 1.0, 2.0, 2.0, 0.7, 2_000_000, 0, "none")),
    ("cpql", "halfcheetah-medium-expert", CPQL, (3e-4, 1.0, 1.0, 8.0, 0.7, 2_000_000, 0, "none")),
    ("cpql", "walker2d-medium", CPQL, (3e-4, 1.0, 1.0, 1.0, 0.6, 2_000_000, 0, "none")),
    ("cpiql", "hopper-medium-expert", CPQL, (3e-4, 1.0, 0.5, 5.0, 0.6, 2_000_000, 0, "none")),
    ("cpql", "antmaze-umaze-v0", CPQL, (3e-4, 1.0, 1.0, 2.0, 0.9, 1_000_000, 10, "cql_antmaze")),
    ("cpql", "antmaze-umaze-diverse-v2", CPQL, (3e-4, 1.0, 2.0, 3.0, 0.9, 1_000_000, 10, "cql_antmaze")),
    ("cpql", "antmaze-medium-play-v2", CPQL, (1e-3, 1.0, 4.0, 2.0, 0.9, 1_000_000, 10, "cql_antmaze")),
    ("cpql", "antmaze-medium-diverse-v0", CPQL, (3e-4, 1.0, 3.0, 1.0, 0.9, 1_000_000, 10, "cql_antmaze")),
    ("cpql", "antmaze-large-play-v0", CPQL, (3e-4, 1.0, 4.5, 10.0, 0.9, 1_000_000, 10, "cql_antmaze")),
    ("cpql", "antmaze-large-diverse-v0", CPQL, (3e-4, 1.0, 3.5, 7.0, 0.9, 1_000_000, 10, "cql_antmaze")),
    ("cpql_published", "pen-human", CPQL, (3e-5, 1.0, 0.15, 7.0, 0.7, 1_000_000, 0, "none")),
    ("cpql", "pen-cloned", CPQL, (3e-5, 1.0, 0.1, 8.0, 0.7, 1_000_000, 0, "none")),
    # not published: the defaults
    ("cpql", "ant-medium", CPQL, (3e-4, 1.0, 1.0, 5.0, 0.7, 1_000_000, 0, "none")),
    ("consistency_ac", "hopper-medium", CAC, (3e-4, 0.1, False, 9.0, 2_000_000, 0, "none")),
    ("consistency_ac", "halfcheetah-medium-expert", CAC, (3e-4, 1.0, False, 7.0, 2_000_000, 0, "none")),
    ("consistency_ac", "walker2d-medium", CAC, (3e-4, 1.0, True, 1.0, 2_000_000, 0, "none")),
    ("consistency_ac", "walker2d-medium-replay", CAC, (3e-4, 0.1, False, 4.0, 2_000_000, 0, "none")),
    ("consistency_ac", "antmaze-umaze-v2", CAC, (3e-4, 0.01, True, 2.0, 1_000_000, 0, "cql_antmaze")),
    (
        "consistency_ac",
        "antmaze-umaze-diverse-v0",
        CAC,
        (3e-4, 0.01, True, 3.0, 1_000_000, 10, "cql_antmaze"),
    ),
    ("consistency_ac", "antmaze-medium-play-v0", CAC, (1e-3, 0.01, False, 2.0, 1_000_000, 10, "cql_antmaze")),
    (
        "consistency_ac",
        "antmaze-medium-diverse-v0",
        CAC,
        (3e-4, 0.01, True, 1.0, 1_000_000, 10, "cql_antmaze"),
    ),
    ("consistency_ac", "antmaze-large-play-v0", CAC, (3e-4, 4.5, True, 10.0, 1_000_000, 10, "cql_antmaze")),
    ("consistency_ac", "antmaze-large-diverse-v2", CAC, (3e-4, 3.5, True, 2.0, 1_000_000, 10, "cql_antmaze")),
    ("consistency_ac_published", "pen-human", CAC, (3e-5, 0.01, True, 7.0, 1_000_000, 0, "normalize")),
    ("consistency_ac", "pen-cloned", CAC, (3e-5, 0.01, True, 8.0, 500_000, 0, "normalize")),
    ("consistency_ac", "kitchen-mixed", CAC, (3e-4, 0.5, True, 2.0, 1_500_000, 0, "none")),
    ("consistency_ac", "door-human", CAC, (3e-4, 1.0, False, 5.0, 1_000_000, 0, "none")),
    ("iql", "hopper-medium", IQL, (0.7, 3.0, 0.99, TWO, False, "value_first", "iql_locomotion")),
    ("iql", "antmaze-large-play-v2", IQL, (0.9, 10.0, 0.99, TWO, False, "value_first", "iql_antmaze")),
    ("iql", "pen-human", IQL, (0.7, 0.5, 0.99, TWO, False, "value_first", "none")),
    ("iql", "cube-single-play-task2", IQL, (0.9, 1.0, 0.99, (256,) * 4, "after", "value_first", "none")),
    ("iql", "antmaze-medium-navigate", IQL, (0.9, 10.0, 0.99, FOUR, "after", "value_first", "none")),
    ("iql", "humanoidmaze-large-stitch-task1", IQL, (0.9, 10.0, 0.995, FOUR, "after", "value_first", "none")),
    ("iql_corl", "hopper-medium-replay", IQL, (0.7, 3.0, 0.99, TWO, False, "together", "iql_locomotion")),
    ("iql_corl", "hopper-medium-expert", IQL, (0.5, 6.0, 0.99, TWO, False, "together", "none")),
    ("iql_corl", "antmaze-umaze-v2", IQL, (0.9, 10.0, 0.99, TWO, False, "together", "iql_antmaze")),
    # its rewards are -1 and 0 already
    ("iql_corl", "antmaze-large-navigate", IQL, (0.7, 3.0, 0.99, TWO, False, "together", "none")),
    ("iql_corl", "relocate-human", IQL, (0.8, 3.0, 0.99, TWO, False, "together", "none")),
    ("rebrac", "hopper-medium-replay", REBRAC, (0.05, 0.5, 1e-3, 1e-3, 1024, 0.99, THREE, "none")),
    ("rebrac_published", "walker2d-expert", REBRAC, (0.01, 0.5, 1e-3, 1e-3, 1024, 0.99, THREE, "none")),
    ("rebrac", "pen-human", REBRAC, (0.1, 0.5, 3e-4, 3e-4, 256, 0.99, THREE, "none")),
    ("rebrac", "door-cloned", REBRAC, (0.01, 0.1, 3e-4, 3e-4, 256, 0.99, THREE, "none")),
    (
        "rebrac",
        "antmaze-large-play-v2",
        REBRAC,
        (0.002, 0.001, 3e-4, 5e-5, 256, 0.999, THREE, "rebrac_antmaze"),
    ),
    ("rebrac", "cube-single-play-task2", REBRAC, (1.0, 0.0, 3e-4, 3e-4, 256, 0.99, FOUR, "none")),
    ("rebrac", "antmaze-giant-navigate", REBRAC, (0.003, 0.01, 3e-4, 3e-4, 256, 0.99, FOUR, "none")),
    ("fql_published", "cube-single-play-task2", FQL, (300.0, "plain", "mean", 0.99, 1_000_000, "none")),
    ("fql_published", "antmaze-large-play-v2", FQL, (3.0, "plain", "mean", 0.99, 500_000, "iql_antmaze")),
    ("fql_published", "antmaze-umaze-v0", FQL, (10.0, "plain", "mean", 0.99, 500_000, "iql_antmaze")),
    ("fql_published", "antmaze-large-navigate", FQL, (10.0, "plain", "min", 0.99, 1_000_000, "none")),
    ("fql_published", "antmaze-giant-navigate", FQL, (10.0, "plain", "min", 0.995, 1_000_000, "none")),
    ("fql_published", "puzzle-3x3-play-task4", FQL, (1_000.0, "plain", "mean", 0.99, 1_000_000, "none")),
    ("fql_published", "pen-human", FQL, (10_000.0, "plain", "min", 0.99, 500_000, "none")),
    ("fql_published", "hammer-expert", FQL, (30_000.0, "plain", "min", 0.99, 500_000, "none")),
    ("fql", "pen-human", FQL, (1.0, "normalised", "min", 0.99, 500_000, "none")),
    ("diffusion_ql", "hopper-medium", DQL, (3e-4, 1.0, 9.0, 0, 2_000_000, 1, "none")),
    ("diffusion_ql_published", "pen-human", DQL, (3e-5, 0.15, 7.0, 0, 1_000_000, 50, "normalize")),
    ("edp", "kitchen-complete", DQL, (3e-4, 0.005, 9.0, 0, 250_000, 1, "none")),
    ("diffusion_ql", "antmaze-medium-play-v2", DQL, (1e-3, 2.0, 2.0, 10, 1_000_000, 1, "cql_antmaze")),
    ("diffusion_ql", "antmaze-umaze-v0", DQL, (3e-4, 0.5, 2.0, 0, 1_000_000, 1, "cql_antmaze")),
]


@pytest.mark.parametrize(("agent", "env", "columns", "values"), PUBLISHED)
def test_published_values_arrive(
    agent: str, env: str, columns: str, values: tuple[Any, ...], composed: Composed
) -> None:
    config = composed(env, agent)
    _, settings = agent_config(config)
    found = [
        config.dataset.reward if column == "reward" else getattr(settings, column)
        for column in columns.split()
    ]
    assert dict(zip(columns.split(), found, strict=True)) == dict(zip(columns.split(), values, strict=True))


@pytest.mark.parametrize(
    ("agent", "env", "refinements"),
    [
        ("cpql", "hopper-medium", ()),
        ("cpql_published", "pen-human", ()),
        ("cpql", "antmaze-umaze-v2", (2.24,)),
        ("cpiql", "antmaze-umaze-v0", (2.24,)),
        ("cpql_published", "antmaze-umaze-v0", (80.0, 2.2404397589312026, 0.002)),
        ("consistency_ac", "hopper-medium", (0.8,)),
        ("consistency_ac", "ant-medium", (0.8,)),
        ("consistency_ac", "walker2d-medium-replay", (1.6, 0.8, 0.4, 0.2)),
        ("consistency_ac_published", "hopper-medium", (2.0,)),
        # numpy.linspace(2, 80, 5), after the 80 that sampling starts with: 60.5, 41, 21.5, 2
        ("consistency_ac_published", "walker2d-medium", (60.5, 41.0, 21.5, 2.0)),
    ],
)
def test_sampling_levels(agent: str, env: str, refinements: tuple[float, ...], composed: Composed) -> None:
    _, settings = agent_config(composed(env, agent))
    assert settings.actor.refinements == refinements


@pytest.mark.parametrize(
    ("agent", "target", "expected"),
    [
        ("diffusion_ql_published", "actor_target", TargetConfig(0.005, period=5, start=1001)),
        ("rebrac_published", "actor_target", TargetConfig(0.005, period=2, lagged=True)),
        ("fql_published", "critic_target", TargetConfig(0.005, lagged=True)),
        ("iql_corl", "critic_target", TargetConfig(0.001)),
    ],
)
def test_a_published_baseline(agent: str, target: str, expected: TargetConfig, composed: Composed) -> None:
    config = composed("hopper-medium", agent)
    _, settings = agent_config(config)
    assert getattr(settings, target) == expected and config.dataset.time_limits == "drop"


def test_the_rest_of_a_published_agent(composed: Composed) -> None:
    _, settings = agent_config(composed("hopper-medium", "consistency_ac_published"))
    assert isinstance(settings, ConsistencyACConfig)
    assert isinstance(settings, ActorCriticConfig)
    assert settings.actor.objective_options == {"weight": "interval", "scale": 100.0, "s1": 149}
    assert settings.curriculum_restarts == 40
    assert settings.candidates == 50
    assert settings.actor_target == TargetConfig(0.005, period=5, start=1001)
    _, settings = agent_config(composed("hopper-medium", "cpql"))
    assert isinstance(settings, CPQLConfig) and settings.candidates == 1


def test_ofql_is_meanflow_in_the_learner_of_diffusion_ql(composed: Composed) -> None:
    for env in ("hopper-medium", "antmaze-umaze-diverse-v2"):
        (_, ofql), (_, dql) = (agent_config(composed(env, agent)) for agent in ("ofql", "diffusion_ql"))
        own = {"actor", "eta", "actor_lr"}
        shared = {field.name for field in fields(dql) if hasattr(ofql, field.name)} - own
        assert {name: getattr(ofql, name) for name in shared} == {name: getattr(dql, name) for name in shared}
        assert ofql.actor.hidden == dql.actor.hidden and ofql.actor.resolved == "average"


def test_what_is_said_on_the_command_line_wins() -> None:
    configuration.register()
    words = [
        "env=antmaze-umaze-v2",
        "agent=cpql",
        "budget=quick",
        "configuration=x",
        "env.id=AntMaze_UMaze-v5",
    ]
    words += ["agent.actor.refinements=[0.8]", "dataset.reward=none", "env.episodes=7", "dataset=minari"]
    words += ["env.env_options.continuing_task=true", "+env.env_options.max_episode_steps=50"]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = built(compose("train", words))
    assert config.env.id == "AntMaze_UMaze-v5"
    assert config.env.env_options == {"continuing_task": True, "max_episode_steps": 50}
    assert config.env.reset_options == load_task("antmaze-umaze-v2").reset_options
    assert agent_config(config)[1].actor.refinements == (0.8,)
    assert (config.dataset.source, config.dataset.reward, config.env.episodes) == ("minari", "none", 7)


@pytest.mark.parametrize("env", ["hopper-medium", "pen-human", "antmaze-medium-play-v2", "kitchen-partial"])
def test_a_quick_budget_is_the_same_for_every_task(env: str) -> None:
    configuration.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = built(compose("train", [f"env={env}", "budget=quick", "configuration=x"]))
    _, settings = agent_config(config)
    assert isinstance(settings, CPQLConfig)
    assert (config.budget.updates, config.budget.episodes, config.budget.final_episodes) == (5_000, 10, 50)
    assert (settings.actor_lr, settings.eta_warmup, settings.critic_target.rate) == (3e-4, 10_000, 0.02)


# At a shell.


def run(*words: str, folder: Path, **environment: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *words]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_completion_offers_the_tasks(tmp_path: Path) -> None:
    line = "python train.py env=antmaze-umaze-d"
    offered = run("-sc", "query=bash", folder=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert offered.split() == ["env=antmaze-umaze-diverse-v0", "env=antmaze-umaze-diverse-v2"]


@pytest.mark.slow
def test_help_names_every_task_in_a_few_lines(tmp_path: Path) -> None:
    text = run("--help", "all", "env=pen-human", "agent=consistency_ac", folder=tmp_path)
    start = text.index("env      ")
    lines = text[start : text.index("agent    ")].split()[1:]
    assert lines == task_patterns() and len(lines) == 11
    named = []
    for line in lines:  # as a shell would expand the braces
        lists = [part.split(",") for part in re.findall(r"\{(.*?)\}", line)]
        named += [re.sub(r"\{.*?\}", "{}", line).format(*chosen) for chosen in itertools.product(*lists)]
    assert named == task_names()
    # the present settings are values, not where values come from
    assert "actor_lr: 3.0e-05" in text and "reward: normalize" in text and "max_episode_steps: 100" in text
    assert "published" not in text[start:].split("agent:")[1] and "${" not in text
