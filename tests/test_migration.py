"""What older runs and policies wrote is read as this version would write it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from cpql.migration import upgrade
from cpql.settings import build
from cpql.tasks import Task, load_task

# As older versions wrote them. The antmaze row is a run's whole `env`, Minari's a policy's `task`.
REFERENCES = {"random_return": -20.272305, "expert_return": 3234.3}
HOPPER: dict[str, Any] = {
    "name": "hopper-medium",
    "id": "Hopper-v4",
    "dataset": "hopper-medium-v2",
    **REFERENCES,
    "url": "gym_mujoco_v2/hopper_medium-v2.hdf5",
    "minari": "mujoco/hopper/medium-v0",
    "observation": [],
    "env_options": {},
    "reset_options": {},
    "episodes": 10,
    "note": "",
    "benchmark": "D4RL",
    "transitions": 1_000_000,
}
REPLAY = HOPPER | {
    "name": "hopper-medium-replay",
    "dataset": "hopper-medium-replay-v2",
    "url": "gym_mujoco_v2/hopper_medium_replay-v2.hdf5",
    "minari": "",
    "transitions": None,
}
PENDULUM = HOPPER | {
    "name": "pendulum",
    "id": "Pendulum-v1",
    "dataset": "",
    "random_return": None,
    "expert_return": None,
    "url": "",
    "minari": "",
    "benchmark": "none",
    "transitions": None,
}
MINARI = HOPPER | {"dataset": "mine/a-v0", "minari": "mine/a-v0", "url": "", "transitions": None}
FIRST = {"name": "a", "id": "Hopper-v4", "dataset": "hopper-medium-v2", **REFERENCES}


@pytest.mark.parametrize("key", ["env", "task"])
@pytest.mark.parametrize("old", [HOPPER, REPLAY, PENDULUM], ids=lambda old: old["name"])
def test_a_task_of_the_table_is_todays(old: dict[str, Any], key: str) -> None:
    today = json.loads(json.dumps(dataclasses.asdict(load_task(old["name"]))))
    before = json.dumps(old)
    since = {"measure": "return", "at_once": 50}  # fields that were added later, by their defaults
    assert upgrade({key: old})[key] | since == today
    assert json.dumps(old) == before
    assert upgrade({key: today})[key] == today


@pytest.mark.parametrize(
    ("old", "datasets"),
    [
        (FIRST, {"d4rl": {"id": "hopper-medium-v2"}}),
        (FIRST | {"dataset": ""}, {}),
        (MINARI, {"minari": {"id": "mine/a-v0"}}),
    ],
    ids=["five fields", "without data", "minari"],
)
def test_tasks_of_other_origins(old: dict[str, Any], datasets: dict[str, Any]) -> None:
    task = build(Task, upgrade({"task": old})["task"], "config.json")
    assert task.datasets == datasets and task.id == "Hopper-v4" and task.score(3234.3) == 100


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"actor": {}}, {"actor": {"kind": "consistency"}}),
        ({"actor": {"kind": "deterministic"}}, {"actor": {"kind": "deterministic"}}),
        ({"agent": {"name": "td3_bc", "actor": {}}}, {"agent": {"name": "td3_bc", "actor": {}}}),
        (
            {"actor": {"objective_options": {"share": 0.5, "s0": 10}, "kind": "consistency"}},
            {"actor": {"objective_options": {"fraction": 0.5, "s0": 10}, "kind": "consistency"}},
        ),
        (
            {"agent": {"name": "cpql", "actor": {"objective_options": {"share": 0.5}}}},
            {
                "agent": {
                    "name": "cpql",
                    "actor": {"kind": "consistency", "objective_options": {"fraction": 0.5}},
                }
            },
        ),
        ({"online": {"offline_share": 0.5}}, {"online": {"offline_fraction": 0.5}}),
        ({"online": None, "seed": 3}, {"online": None, "seed": 3}),
    ],
)
def test_keys_of_other_names(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert upgrade(old) == new
    assert upgrade(new) == new


@pytest.mark.parametrize("odd", [3, None, [], "text", {"objective_options": 3}, {"dataset": {"a": 1}}])
def test_what_is_not_recognised_stays_for_whoever_checks(odd: Any) -> None:
    for key in ("task", "env", "actor", "agent", "online"):
        upgrade({key: odd})
