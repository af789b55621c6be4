"""Environments are made quietly, and bad ids are answered with good ones."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import mujoco  # type: ignore[import-untyped]
import numpy as np
import pytest

from cpql import environments
from cpql.environments import (
    action_bounds,
    import_environment,
    make_environment,
    make_task_environment,
    widths,
)
from cpql.errors import ConfigError
from cpql.tasks import Task, load_task


def test_the_old_version_is_made_without_its_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = make_environment("Hopper-v4")
    assert environment.spec is not None and environment.spec.max_episode_steps == 1000
    environment.close()


@pytest.mark.parametrize("name", ["halfcheetah-medium", "pen-human"])
def test_nobody_is_told_what_they_cannot_mend(name: str, tmp_path: Path) -> None:
    """Neither Gymnasium-Robotics' notice nor MuJoCo's on deprecated attributes, nor its log file."""
    make = (
        "from cpql.tasks import load_task; from cpql.environments import make_task_environment as make;"
        f"make(load_task({name!r})).reset()"
    )
    ran = subprocess.run([sys.executable, "-c", make], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_other_warnings_of_mujoco_pass(capsys: pytest.CaptureFixture[str]) -> None:
    before = mujoco.get_mju_user_warning()
    with environments._without_advice_on_models():
        for text in ("attribute 'x' is deprecated", "Nan, Inf or huge value in QACC"):
            mujoco.get_mju_user_warning()(text)
    assert capsys.readouterr().err == "MuJoCo: Nan, Inf or huge value in QACC\n"
    assert mujoco.get_mju_user_warning() is before


def test_options_reach_gymnasium() -> None:
    environment = make_environment("Hopper-v4", max_episode_steps=7)
    assert environment.spec is not None and environment.spec.max_episode_steps == 7
    environment.close()


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("Hoper-v4", "did you mean Hopper-v4"),
        ("Hopper-v9", "did you mean Hopper-v"),
        ("Hopper-v2", "can't be made"),
        ("", "no environment id"),
        ("nowhere/Hopper-v4", "no environment 'nowhere/Hopper-v4'"),
        ("not an id!", "not an id!"),
        ("two\nlines", r"'two\nlines'"),
    ],
)
def test_an_unknown_id_is_one_line_with_the_nearest(id: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_environment(id)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"'Hopper-v4' can't be made: .*no_such_option"):
        make_environment("Hopper-v4", no_such_option=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_episode_steps": -5}, "can't be made: Expect"),
        ({"xml_file": "nothing.xml"}, "can't be made: OSError: "),
        ({"id": "Walker2d-v4"}, "can't be made: TypeError: "),
        ({"frame_skip": "x"}, "can't be made: TypeError: "),
    ],
)
def test_whatever_an_environment_raises_is_one_line(options: dict[str, Any], text: str) -> None:
    task = Task("t", "Hopper-v5", env_options=options)
    with pytest.raises(ConfigError) as caught:
        make_task_environment(task)
    assert text in str(caught.value) and "\n" not in str(caught.value)


MODULE = """
import gymnasium

class Mine(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,))

gymnasium.register("Mine-v0", Mine)
gymnasium.register("my_space/Mine-v0", Mine)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that registers two environments, and another that fails."""
    (tmp_path / "mine_of_mine.py").write_text(MODULE)
    (tmp_path / "mine_that_fails.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_of_mine"
    sys.modules.pop("mine_of_mine", None)
    for id in ("Mine-v0", "my_space/Mine-v0"):
        gymnasium.registry.pop(id, None)


def test_an_id_with_a_module_is_for_the_command_line_alone(module: str) -> None:
    id = f"{module}:Mine-v0"
    for make in (make_environment, lambda id: make_task_environment(Task("t", id))):
        with pytest.raises(
            ConfigError, match="runs the module's code, and is taken from the command line"
        ) as no:
            make(id)
        assert f"env_id={id} (evaluate) or env.id={id} (train)" in str(no.value)
        assert "\n" not in str(no.value) and module not in sys.modules
    with pytest.raises(ConfigError, match=r"no environment 'Mine-v0' .*: env_id=MODULE:Mine-v0 \(evaluate\)"):
        make_environment("Mine-v0")
    assert import_environment(id) == "Mine-v0"
    assert import_environment(f"{module}:my_space/Mine-v0") == "my_space/Mine-v0"
    for bare in ("Mine-v0", "my_space/Mine-v0"):
        assert import_environment(bare) == bare and widths(make_environment(bare)) == (3, 2)


@pytest.mark.parametrize(
    ("id", "text"),
    [
        ("nothing_of_mine:Mine-v0", "its module can't be imported: ModuleNotFoundError: No module named"),
        ("mine_that_fails:Mine-v0", "its module can't be imported: ZeroDivisionError: division by zero"),
        ("mine_of_mine:Mine-v1", "mine_of_mine registers no 'Mine-v1': did you mean Mine-v0"),
        (":Mine-v0", "expected MODULE:ID, such as my_package.environments:Mine-v0"),
        ("../mine_of_mine:Mine-v0", "expected MODULE:ID"),
        ("mine of mine:Mine-v0", "expected MODULE:ID"),
    ],
)
def test_a_module_that_registers_nothing_is_one_line(module: str, id: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_environment(id)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "state_dim", "action_dim"),
    [("antmaze-umaze-v2", 29, 8), ("maze2d-large", 4, 2), ("pen-human", 45, 24), ("ant-medium", 111, 8)],
)
def test_a_task_s_environment_is_as_d4rl_s_files_are(name: str, state_dim: int, action_dim: int) -> None:
    task = load_task(name)
    environment = make_task_environment(task)
    assert widths(environment) == (state_dim, action_dim)
    low, high = action_bounds(environment)
    assert low.tolist() == [-1] * action_dim and high.tolist() == [1] * action_dim
    observation, _ = environment.reset(seed=0)
    assert observation.shape == (state_dim,)
    assert environment.observation_space.contains(observation)
    again, *_ = environment.step(environment.action_space.sample())
    assert again.shape == (state_dim,)
    environment.close()


def test_a_maze_s_goal_stays_where_d4rl_has_it() -> None:
    environment = make_task_environment(load_task("maze2d-umaze"))
    goals = []
    for seed in range(3):
        environment.reset(seed=seed)
        goals.append(tuple(environment.unwrapped.goal))  # type: ignore[attr-defined]
    # The cell's own noise moves it a little; the cell is the same.
    assert np.ptp(np.array(goals), axis=0).max() < 0.6
    environment.close()


def test_dict_observations_need_names_that_are_there() -> None:
    maze = load_task("maze2d-umaze")
    for keys, text in (((), "found []"), (("observaton",), "found ['observaton']")):
        with pytest.raises(ConfigError, match=r"its observations are dicts of .*observation") as caught:
            make_task_environment(dataclasses.replace(maze, observation=keys))
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match=r"not dicts: expected env.observation to name nothing"):
        make_task_environment(dataclasses.replace(load_task("hopper-medium"), observation=("observation",)))


def test_kitchen_says_which_simulator_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "version", lambda _: "3.12.1")
    with pytest.raises(
        ConfigError, match=r"'FrankaKitchen-v1' needs mujoco below 3\.12, found 3\.12\.1: pip"
    ):
        make_task_environment(load_task("kitchen-mixed"))


class Suite(gymnasium.Env[Any, Any]):
    """As shimmy gives the DeepMind Control suite: a dict with a number that has no axis."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    observation_space = gymnasium.spaces.Dict(
        {"height": gymnasium.spaces.Box(0.0, 9.0, ()), "angles": gymnasium.spaces.Box(-5.0, 5.0, (3,))}
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return {"angles": np.ones(3, np.float32), "height": np.array(7.0, np.float32)}, {}


def test_the_control_suite_s_observations_are_laid_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("suite", "dm_control/toy-v0")
    with pytest.raises(ConfigError, match=r"'dm_control/toy-v0' needs mujoco below 4, found 4.*'mujoco<4'$"):
        monkeypatch.setattr(environments, "version", lambda _: "4.0.0")
        make_task_environment(task)
    monkeypatch.setattr(environments, "version", lambda _: "3.17.0")
    with pytest.raises(ConfigError, match=r"needs a package: pip install 'cpql\[dmc\]'"):
        make_task_environment(task)
    gymnasium.register("dm_control/toy-v0", lambda **_: Suite())
    try:
        environment = make_task_environment(task)
        assert widths(environment) == (4, 2)
        order = list(Suite.observation_space.spaces)
        parts = {"height": [7.0], "angles": [1.0, 1.0, 1.0]}
        assert environment.reset(seed=0)[0].tolist() == [x for key in order for x in parts[key]]
    finally:
        del gymnasium.registry["dm_control/toy-v0"]
