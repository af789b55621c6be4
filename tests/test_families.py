"""A task of every family that steps with the usual dependencies: collected, trained on, scored, in miniature.

Kitchen needs an older simulator. `benchmarks/families.json` has the real runs, its own among them.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
from rich.console import Console

from cpql.data import d4rl, embedded, files
from cpql.deploy.policy import Policy
from cpql.deploy.summary import summary
from cpql.environments import make_task_environment
from cpql.tasks import Task, load_task, task_names
from cpql.training.config import BudgetConfig, DatasetConfig, TrainConfig
from cpql.training.loop import train_group

ROOT = Path(__file__).parent.parent
STEPS = 20
FAMILIES = ("maze2d-umaze", "pen-human", "antmaze-umaze-v2")


def short(name: str, steps: int = STEPS, **resets: Any) -> Task:
    """A task whose episodes are over soon."""
    task = load_task(name)
    return dataclasses.replace(
        task,
        env_options=task.env_options | {"max_episode_steps": steps},
        reset_options=task.reset_options | resets,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect in this process, which starts sooner."""

    def call(
        function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *_: Any, **__: Any
    ) -> list[Any]:
        return [function(*each) for each in arguments]

    monkeypatch.setattr(embedded, "in_workers", call)


def arrays_of(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {key: file[key][:] for key in d4rl.KEYS}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("here")
def test_a_family_is_collected_trained_on_and_scored(name: str, tmp_path: Path) -> None:
    task, path = short(name), tmp_path / "mine.hdf5"
    made = embedded.collect(task, 200, 0, path, policy="random")
    assert (len(made), made.provenance.episodes, made.provenance.length_mean) == (200, 10, STEPS)
    little: dict[str, Any] = {"actor": {"hidden": [16, 16]}, "critic_hidden": [16, 16], "batch_size": 8}
    config = TrainConfig(
        env=task,
        agent={"name": "cpql", **little},
        dataset=DatasetConfig(path=str(path), normalise_observations=True),
        budget=BudgetConfig("test", 3, 1, 3, 3, 2, 2),
        run_dir=str(tmp_path / "run"),
        compile=False,
    )
    text = StringIO()
    result = train_group([config], Console(file=text, width=200))[0]
    assert (result["task"], result["environment"], result["episodes"]) == (name, task.id, 2)
    assert max(result["lengths"]) <= STEPS
    assert result["environment_options"] == task.env_options | task.reset_options
    assert result["score"] == pytest.approx(task.score(float(np.mean(result["returns"]))))
    assert result["behaviour_return"] == pytest.approx(made.provenance.return_mean)
    assert result["versions"]["gymnasium-robotics"][0].isdigit()
    said = summary(result)
    assert f"data: embedded {name} with random actions" in said and f"note: {task.note}" in said
    assert "self-collected, not D4RL" in text.getvalue()

    environment = make_task_environment(task)
    observation, _ = environment.reset(seed=0)
    action, _ = Policy.load(tmp_path / "run").predict(observation)
    assert environment.action_space.contains(action)
    environment.close()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("here")
def test_the_rows_replay_in_the_environment(name: str, tmp_path: Path) -> None:
    """The same seed and the file's actions lead to the file's observations, rewards and flags."""
    task, path = short(name), tmp_path / "mine.hdf5"
    embedded.collect(task, 3 * STEPS // 2, 7, path, policy="random")
    arrays = arrays_of(path)
    environment = make_task_environment(task)
    observation, _ = environment.reset(seed=int(np.random.SeedSequence(7).spawn(1)[0].generate_state(1)[0]))
    assert np.ptp(arrays["actions"]) > 1
    for row in range(len(arrays["actions"])):
        assert arrays["observations"][row] == pytest.approx(observation, abs=1e-4)
        observation, reward, terminated, truncated, _ = environment.step(arrays["actions"][row])
        assert arrays["next_observations"][row] == pytest.approx(observation, abs=1e-4)
        assert arrays["rewards"][row] == pytest.approx(reward, abs=1e-4)
        assert (arrays["terminals"][row], arrays["timeouts"][row]) == (terminated, truncated)
        if terminated or truncated:
            observation, _ = environment.reset()
    environment.close()
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [STEPS - 1]


@pytest.mark.usefixtures("here")
def test_reaching_the_goal_ends_an_antmaze_episode_unless_time_runs_out_with_it(tmp_path: Path) -> None:
    path = tmp_path / "near.hdf5"
    embedded.collect(short("antmaze-umaze-v2", 2, reset_cell=[3, 1]), 300, 0, path, policy="random")
    arrays = arrays_of(path)
    solved, terminals, timeouts = arrays["rewards"] == 1, arrays["terminals"], arrays["timeouts"]
    assert (solved & terminals).any() and (solved & timeouts).any() and (timeouts & ~solved).any()
    assert np.array_equal(terminals, solved & ~timeouts)
    discounts = files.read(path).columns.discounts
    assert np.array_equal(discounts.numpy() == 0, terminals)


@pytest.mark.usefixtures("here")
def test_a_maze2d_episode_goes_on_at_the_goal(tmp_path: Path) -> None:
    path = tmp_path / "there.hdf5"
    embedded.collect(short("maze2d-umaze", reset_cell=[1, 1]), 2 * STEPS, 0, path, policy="random")
    arrays = arrays_of(path)
    assert arrays["rewards"].sum() > STEPS and not arrays["terminals"].any()
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [STEPS - 1, 2 * STEPS - 1]


@pytest.mark.usefixtures("here")
def test_a_recipe_acts_in_the_task_s_own_environment() -> None:
    """Ant-v4 alone shows 27 numbers; as the task has it, D4RL's 111, the last 84 of them 0."""
    made = embedded.collect(load_task("ant-random"), 50, 0)
    assert made.state_dim == 111
    assert made.observations[:, :27].any(0).all() and not made.observations[:, 27:].any()


def test_the_command_collects_in_workers_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["collect.py"])
    main = runpy.run_path(str(ROOT / "scripts" / "collect.py"))["main"]
    words = ["dataset", "pen-human", "--policy", "random", "--size", "150", "--seed", "3"]
    with pytest.raises(SystemExit, match="1"):
        main(words)
    assert capsys.readouterr().err == (
        "error --policy=random: expected --out as well, a file for what it collects\n"
    )

    path = tmp_path / "mine.hdf5"
    main([*words, "--out", str(path)])
    line, where = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "pen-human with random actions (embedded: self-collected, not D4RL): 150 transitions, 1 complete"
    )
    assert where == f"in {path}"
    data = files.read(path)
    assert (data.provenance.source, data.provenance.id) == ("embedded", "pen-human with random actions")
    details = data.provenance.details
    assert (details["recipe"], details["seed"]) == (["random"], 3)
    assert details["environment_options"] == {"max_episode_steps": 100}
    assert "gymnasium-robotics" in details["versions"]


def test_the_real_runs_cover_every_family_and_their_scores_are_their_returns() -> None:
    runs = json.loads((ROOT / "benchmarks" / "families.json").read_text())["runs"]
    assert {run["task"].partition("-")[0] for run in runs} >= {
        "ant", "antmaze", "halfcheetah", "kitchen", "maze2d", "pen", "walker2d"
    }  # fmt: skip
    for run in runs:
        assert run["task"] in task_names() and f"env={run['task']} " in run["train"]
        if run["score"] is not None:
            assert run["score"] == pytest.approx(load_task(run["task"]).score(run["return_mean"]), abs=0.01)
