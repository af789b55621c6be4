"""`benchmark.py critic`: on a task whose returns are known, and on runs with and without a critic."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import trainings
from torch import Tensor, nn

from cpql.actors import DeterministicActor, DeterministicConfig
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.errors import ActingError
from cpql.tasks import Task
from cpql.training.config import DatasetConfig

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import benchmark  # noqa: E402
from measure import critic  # noqa: E402
from measure.episodes import episodes, q_bias  # noqa: E402

OPTIONS = argparse.Namespace(states=12, actions=6, rollouts=2, horizon=20)
TURN = np.array([[0.8, 0.6], [-0.6, 0.8]], np.float32)
SETTINGS = {"name": "td3_bc", "discount": 0.8}


class Turning(gymnasium.Env[Any, Any]):
    """A point that turns about the origin and is pushed by actions; the reward is action times position."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    wind = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.x, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action @ self.x)
        self.x = TURN @ self.x + 0.2 * action + np.float32(self.wind)
        return self.x, reward, False, False, {}


class Windy(Turning):
    """The same with noise that no seed repeats."""

    @property
    def wind(self) -> float:  # type: ignore[override]
        return float(np.random.default_rng().normal())


gymnasium.register("cpql-test/Turning-v0", lambda **_: Turning(), max_episode_steps=40)
gymnasium.register("cpql-test/Windy-v0", lambda **_: Windy(), max_episode_steps=40)


class Exact(nn.Module):
    """Both values are `scale` times the return of 20 steps, by following the actor."""

    def __init__(self, actor: DeterministicActor, scale: float) -> None:
        super().__init__()
        self.actor, self.scale = actor, scale

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        total, x = torch.zeros(state.shape[:-1]), state
        for step in range(20):
            total += 0.8**step * (action * x).sum(-1)
            x = x @ torch.from_numpy(TURN).T + 0.2 * action
            action = self.actor(x)
        return self.scale * torch.stack([total, total])


def known(scale: float, id: str = "cpql-test/Turning-v0") -> Policy:
    torch.manual_seed(0)
    actor = DeterministicActor(2, 2, DeterministicConfig((16,)))
    config = PolicyConfig(
        2, 2, (-1.0, -1.0), (1.0, 1.0), actor.config, (16,), False, 1, 1.0, Task("turning", id)
    )
    policy = Policy(actor, None, config)
    policy.critic = Exact(actor, scale)  # type: ignore[assignment]
    return policy


def rank(policy: Policy) -> dict[str, Any]:
    config = replace(trainings.settings(Path("none"), Path("none")), agent=SETTINGS)
    return critic.ranking(policy, config, ValueError, OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 0.2, -1.0])
def test_a_critic_that_knows_the_returns_ranks_them(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(critic, "NUDGE", 0.0)
    found = rank(known(scale))
    first, last = found["by_steps"]
    sign = np.sign(scale)
    assert (first["steps"], last["steps"], last["states_with_an_order"]) == (10, 20, 12)
    assert last["rank_correlation"] == sign and last["interval"] == [sign, sign]
    assert sign * first["rank_correlation"] > 0.9
    assert last["gap_ratio"] == pytest.approx(abs(scale), rel=1e-3)
    assert last["gap_slope"] == pytest.approx(scale, rel=1e-3)
    assert last["attainable"] == 1.0
    # What comes after 20 steps is a hundredth of the value.
    assert found["q_bias"] == pytest.approx((scale - 1) * found["return_to_go"], abs=0.02)


def test_noise_after_the_first_action_is_the_same_for_all_actions_of_a_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(critic, "NUDGE", 0.3)
    found = rank(known(1.0))["by_steps"][-1]
    assert found["rank_correlation"] > 0.95 and found["attainable"] > 0.95  # else 0.5 and 0.2


def test_an_environment_that_no_seed_repeats_is_refused() -> None:
    with pytest.raises(ActingError, match="Windy-v0 can't be brought back into a state"):
        rank(known(1.0, "cpql-test/Windy-v0"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    file = trainings.write_dataset(folder / "data.hdf5")
    changed = DatasetConfig(path=str(file), reward="iql_antmaze")
    configs = {
        "cpiql": trainings.settings(file, folder / "cpiql", "cpiql", dataset=changed),  # 3 candidates
        "bc": replace(trainings.settings(file, folder / "bc"), agent={"name": "bc", "batch_size": 8}),
    }
    for config in configs.values():
        trainings.run(config)
    return {name: folder / name for name in configs} | {"file": file}


def measured(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    words = ["--states", "4", "--actions", "4", "--rollouts", "2", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "critic", str(runs["cpiql"]), str(runs["bc"]), *words])
    benchmark.main()
    content = json.loads((tmp_path / "found.json").read_text())
    assert (content["states"], content["rollouts"], content["horizon"]) == (4, 2, 300)
    assert content["versions"]["cpql"]
    rows: list[dict[str, Any]] = content["runs"]
    return rows


def test_runs_with_and_without_a_critic(
    runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = measured(runs, monkeypatch, tmp_path)
    text = capsys.readouterr().out
    cpiql, bc = first
    assert (cpiql["environment"], cpiql["step"], cpiql["seed"]) == ("Hopper-v4", 40, 0)
    assert [one["steps"] for one in cpiql["ranking"]["by_steps"]] == [10, 30, 100, 300]
    assert cpiql["missing"] == {} and "cpiql, seed" in text and "40 updates" in text
    policy = Policy.load(runs["cpiql"])
    changed = [episode._replace(rewards=episode.rewards - 1) for episode in episodes(policy)]
    bias, value = q_bias(policy, changed, 0.99)
    assert cpiql["ranking"]["q_bias"] == pytest.approx(bias)
    assert cpiql["ranking"]["return_to_go"] == pytest.approx(value)
    assert cpiql["shift"]["diversity"] > 0 and len(cpiql["shift"]["offset_by_dimension"]) == 3
    assert bc["ranking"] is None and bc["missing"] == {"ranking": "the agent bc has no critic"}
    assert bc["shift"]["q_gain"] is None and bc["shift"]["distance"] > bc["shift"]["offset"] > 0
    assert "no ranking: the agent bc has no critic" in text

    with pytest.raises(SystemExit):
        critic.critic(argparse.Namespace(runs=[tmp_path]))
    assert "holds no policy" in capsys.readouterr().err

    runs["file"].rename(runs["file"].with_suffix(".moved"))
    cpiql, bc = measured(runs, monkeypatch, tmp_path)
    assert cpiql["ranking"] is cpiql["shift"] is bc["shift"] is None
    assert "data.hdf5" in cpiql["missing"]["shift"] and "data.hdf5" in cpiql["missing"]["ranking"]
    runs["file"].with_suffix(".moved").rename(runs["file"])
    assert measured(runs, monkeypatch, tmp_path) == first
