"""Learning while acting: what goes into the buffer, when, and what a run goes on from."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from cpql.agents import CPQL, Agent, CPQLConfig
from cpql.data.replay import ReplayBuffer
from cpql.data.transitions import Transitions
from cpql.deploy.policy import Policy
from cpql.errors import CheckpointError, ConfigError
from cpql.settings import build
from cpql.tasks import Task
from cpql.training.config import BudgetConfig, DatasetConfig, OnlineConfig, TrainConfig
from cpql.training.loop import train_group
from cpql.training.online import Explorer
from cpql.training.sources import Source

Maker = Callable[..., Agent]
CPU = torch.device("cpu")
LIMIT = 5


class Walk(gymnasium.Env[Any, Any]):
    """A walk on a line of four numbers: ends beyond 2, and at the limit. The reward is the step's number."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (4,))
    action_space = gymnasium.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.time = self.np_random.uniform(-1, 1), 0
        return self.seen(), {}

    def seen(self) -> Any:
        return np.array([self.x, self.time, 0.0, 1.0], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.x, self.time = self.x + action[0], self.time + 1
        return self.seen(), float(self.time), abs(self.x) > 2, False, {}


@pytest.fixture(autouse=True)
def walk() -> Iterator[None]:
    gymnasium.register("Walk-v0", lambda **_: Walk(), max_episode_steps=LIMIT)
    yield
    del gymnasium.registry["Walk-v0"]


TASK = Task("walk", "Walk-v0")
LITTLE: dict[str, Any] = {"actor": {"hidden": [16]}, "critic_hidden": [16], "batch_size": 8}


def agent_of(seed: Any = 0) -> CPQL:
    return CPQL(4, 2, CPQLConfig(batch_size=8, critic_hidden=(16,)), seed=seed)


# The buffer


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(1, 10))
def test_a_buffer_holds_the_newest(chunks: list[int], capacity: int) -> None:
    buffer = ReplayBuffer(capacity, 2, 1)
    everything: list[float] = []
    for chunk in chunks:
        chunk = min(chunk, capacity)
        first = len(everything)
        numbers = torch.arange(first, first + chunk).float()
        everything += numbers.tolist()
        state = numbers.unsqueeze(-1).expand(-1, 2)
        buffer.add(state, numbers.unsqueeze(-1) / 100, numbers, state + 1, numbers % 2 == 1)
    assert len(buffer) == min(len(everything), capacity)
    assert sorted(buffer.table[: len(buffer), 5].tolist()) == everything[-capacity:]
    if everything:
        batch = buffer.sample(50, torch.Generator().manual_seed(0))
        assert set(batch.rewards.tolist()) <= set(everything[-capacity:])
        assert torch.equal(batch.next_observations, batch.observations + 1)
        assert torch.equal(batch.discounts, 1 - batch.rewards % 2)
        assert torch.equal(batch.actions.squeeze(-1), batch.rewards / 100)
    copy = ReplayBuffer(capacity, 2, 1)
    copy.load_state_dict(buffer.state_dict())
    assert torch.equal(copy.table, buffer.table) and copy.added == buffer.added


def test_a_buffer_refuses_anothers_rows() -> None:
    with pytest.raises(ValueError, match=r"of shape \[0, 7\] doesn't fit into one of \[5, 9\]"):
        ReplayBuffer(5, 3, 1).load_state_dict(ReplayBuffer(5, 2, 1).state_dict())


# Exploring


def explored(steps: int, seed: int = 0, **settings: Any) -> Explorer:
    explorer = Explorer(TASK, OnlineConfig(start_steps=steps, **settings), seed, CPU)
    explorer.explore(agent_of(), 0, torch.Generator().manual_seed(seed))
    return explorer


def test_time_limits_bootstrap_and_only_the_end_of_the_task_does_not() -> None:
    explorer = explored(400)
    buffer = explorer.buffer
    table = buffer.table[: len(buffer)]
    state, action, next_state = table[:, :4], table[:, 4:6], table[:, 6:10]
    reward, discount = table[:, 10], table[:, 11]
    assert torch.equal(reward, next_state[:, 1]) and torch.equal(next_state[:, 1], state[:, 1] + 1)
    # actions are kept in [-1, 1] and reach the environment in its own bounds
    assert action.abs().max() <= 1
    torch.testing.assert_close(next_state[:, 0] - state[:, 0], 2 * action[:, 0])
    beyond, limit = next_state[:, 0].abs() > 2, next_state[:, 1] == LIMIT
    assert torch.equal(discount == 0, beyond)
    assert (limit & ~beyond).any() and beyond.any()
    starts = torch.cat([torch.tensor([True]), (beyond | limit)[:-1]])
    assert torch.equal(state[:, 1] == 0, starts)
    assert explorer.episodes == int((beyond | limit).sum())
    stored = explored(400, time_limits="terminal").buffer.table[: len(buffer)]
    assert torch.equal(stored[:, :-1], table[:, :-1]) and torch.equal(stored[:, -1] == 0, beyond | limit)
    lengths = next_state[beyond | limit, 1]
    returns = (lengths * (lengths + 1) / 2).tolist()
    assert list(explorer.recent) == returns[-10:]


def test_random_actions_are_uniform_and_a_seed_gives_the_same() -> None:
    one, two, other = explored(600), explored(600), explored(600, seed=1)
    assert torch.equal(one.buffer.table, two.buffer.table)
    assert not torch.equal(one.buffer.table, other.buffer.table)
    actions = one.buffer.table[:600, 4:6]
    assert actions.mean(0).abs().max() < 0.1 and (actions.std(0) - 3**-0.5).abs().max() < 0.05


@pytest.mark.parametrize("environments", [1, 3])
@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_steps_follow_the_update_ratio(environments: int, ratio: float) -> None:
    config = OnlineConfig(environments=environments, updates_per_step=ratio, start_steps=30)
    experience, agent = Source(TASK, config, [0], CPU), agent_of()
    generator = torch.Generator().manual_seed(0)
    for update in range(1, 25):
        batch = experience.batch(agent, [generator])
        assert batch.observations.shape == (8, 4) and batch.rewards.shape == (8,)
        due = update / ratio
        assert 30 + due <= experience.explorers[0].steps < 30 + due + environments
    assert experience.metrics(0)["online/steps"] == experience.provenance.transitions


def test_the_share_of_random_actions_falls() -> None:
    settings: dict[str, Any] = {"epsilon": 1.0, "epsilon_end": 0.0, "epsilon_steps": 400}
    explorer, agent = Explorer(TASK, OnlineConfig(start_steps=0, **settings), 0, CPU), agent_of()
    fixed = torch.tensor([0.25, -0.25])
    agent.act = lambda state, *rest: fixed.expand(len(state), 2)  # type: ignore[method-assign]
    assert explorer.epsilon == 1.0
    for _ in range(800):
        explorer.step(agent, 0, torch.Generator())
    assert explorer.epsilon == 0.0
    policy = (explorer.buffer.table[:800, 4:6] == fixed).all(-1).float()
    assert policy[400:].all() and 0.4 < policy[:400].mean() < 0.6
    assert policy[:100].mean() < 0.3 < 0.7 < policy[300:400].mean()


def test_noise_is_a_gaussian_on_what_the_policy_chose_and_no_more() -> None:
    explorer, agent = Explorer(TASK, OnlineConfig(start_steps=100, noise=0.2), 0, CPU), agent_of()
    fixed = torch.tensor([0.25, -1.0])
    agent.act = lambda state, *rest: fixed.expand(len(state), 2)  # type: ignore[method-assign]
    for _ in range(2100):
        explorer.step(agent, 0, torch.Generator())
    chosen = explorer.buffer.table[100:2100, 4:6]
    inside, bound = chosen[:, 0] - 0.25, chosen[:, 1]
    assert inside.mean().abs() < 0.015 and 0.19 < inside.std() < 0.21
    assert bound.min() == -1.0 and 0.45 < (bound == -1.0).float().mean() < 0.55
    first = explorer.buffer.table[:100, 4:6]  # random actions stay as they are
    assert first.std() > 0.5


def test_the_policy_can_act_from_the_start() -> None:
    agent = agent_of()
    calls: list[tuple[int, int | None]] = []

    def act(state: Tensor, generator: Any, member: int, candidates: int | None) -> Tensor:
        calls.append((member, candidates))
        return torch.zeros(len(state), 2)

    agent.act = act  # type: ignore[method-assign,assignment]
    explorer = Explorer(TASK, OnlineConfig(start="policy", start_steps=20, candidates=7), 0, CPU)
    explorer.explore(agent, 3, torch.Generator())
    assert calls == [(3, 7)] * 21
    assert (explorer.buffer.table[:21, 4:6] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environments": 0}, r"online: environments: .* greater than or equal to 1, found 0"),
        ({"updates_per_step": 0.0}, r"online: updates_per_step: .* greater than 0, found 0"),
        ({"offline_fraction": 1.5}, r"online: offline_fraction: .* less than or equal to 1, found 1\.5"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(OnlineConfig, settings, "online")


# Batches for agents


def test_every_agent_learns_from_its_own_experience(make_agent: Maker) -> None:
    if "critic" not in make_agent().state:
        pytest.skip("it has no critic, and isn't trained online")
    agent = make_agent(candidates=2)
    experience = Source(TASK, OnlineConfig(start_steps=20, candidates=2), [0], CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        metrics = agent.update(experience.batch(agent, [generator]), agent.draw(generator))
        assert all(torch.isfinite(value).all() for value in metrics.values())


def test_a_member_explores_as_it_would_alone() -> None:
    config, seeds = OnlineConfig(start_steps=10, environments=2), [3, 4]
    group, together = agent_of(seeds), Source(TASK, config, seeds, CPU)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    batches = [together.batch(group, generators) for _ in range(6)]
    for member, seed in enumerate(seeds):
        alone, generator = Source(TASK, config, [seed], CPU), torch.Generator().manual_seed(seed)
        agent = agent_of(seed)
        for batch in batches:
            for found, expected in zip(batch, alone.batch(agent, [generator]), strict=True):
                if found is None or expected is None:  # next actions
                    assert found is expected
                    continue
                torch.testing.assert_close(found[member], expected, rtol=1e-4, atol=1e-4)


def test_a_share_of_each_batch_is_the_datasets(data: Transitions) -> None:
    data.rewards.fill_(-7.0)
    config = OnlineConfig(start_steps=10, offline_fraction=0.25)
    experience, agent = Source(TASK, config, [0], CPU, data), agent_of()
    for _ in range(5):
        batch = experience.batch(agent, [torch.Generator().manual_seed(0)])
        assert (batch.rewards == -7.0).sum() == 2 and len(batch.rewards) == 8
    assert experience.provenance.source == "dict + online"
    assert experience.provenance.details["online"] == {"environment": "Walk-v0", "steps": 15}


def test_rewards_and_observations_are_changed_as_the_datasets_are(data: Transitions) -> None:
    mean, std = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 1.0, 4.0])
    offline = replace(data, normalisation=(mean, std))
    config = OnlineConfig(start_steps=50, offline_fraction=0.5)
    changed = Source(TASK, config, [0], CPU, offline, lambda r: 10.0 * r - 1.0).explorers[0]
    plain = Source(TASK, config, [0], CPU, data).explorers[0]
    for explorer in (changed, plain):
        for _ in range(50):
            explorer.step(agent_of(), 0, torch.Generator())
    a, b = (explorer.buffer.sample(20, torch.Generator().manual_seed(0)) for explorer in (changed, plain))
    assert torch.equal(a.rewards, 10.0 * b.rewards - 1.0)
    torch.testing.assert_close(a.observations, (b.observations - mean) / std)
    torch.testing.assert_close(a.next_observations, (b.next_observations - mean) / std)


# Runs


def settings(run_dir: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        env=TASK,
        agent={**LITTLE, "name": "cpql"},
        budget=BudgetConfig("test", 40, 4, 20, 10, 2, 3, keep=0),
        online=OnlineConfig(start_steps=15),
        run_dir=str(run_dir),
        compile=False,
    )
    return replace(config, **changes)


def run(config: TrainConfig) -> dict[str, Any]:
    return train_group([config], Console(file=StringIO(), width=200))[0]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("save_buffer", [True, False])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_buffer: bool
) -> None:
    config = settings(tmp_path / "run", online=OnlineConfig(start_steps=15, save_buffer=save_buffer))
    update = CPQL.update

    def stop(self: CPQL, batch: Any, noise: Any, phase: int) -> Any:
        if self.state["step"] == 25:
            raise Stopped
        return update(self, batch, noise, phase)

    with monkeypatch.context() as patch:
        patch.setattr(CPQL, "update", stop)
        with pytest.raises(Stopped):
            run(config)
    result = run(replace(config, resume=True))
    assert result["evaluated"] and result["data"]["source"] == "online"
    # 15 first steps and one an update; an unsaved buffer is filled again
    steps = 15 + 40 + (0 if save_buffer else 15)
    assert result["data"]["details"] == {"environment": "Walk-v0", "steps": steps}
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 11 and {"online/steps", "online/return"} <= set(lines[0].split(","))


def test_a_finished_run_leaves_no_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that ends in a cycle holds on to a training: its memory is free at once."""
    buffers: list[weakref.ref[ReplayBuffer]] = []
    init = ReplayBuffer.__init__

    def noted(self: ReplayBuffer, *arguments: Any) -> None:
        buffers.append(weakref.ref(self))
        init(self, *arguments)

    monkeypatch.setattr(ReplayBuffer, "__init__", noted)
    gc.disable()
    try:
        run(settings(tmp_path / "run"))
        assert [buffer() for buffer in buffers] == [None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_group_learns_online(tmp_path: Path) -> None:
    members = [replace(settings(tmp_path / f"seed{seed}"), seed=seed) for seed in (0, 1)]
    results = train_group(members, Console(file=StringIO()))
    assert [r["training_seed"] for r in results] == [0, 1]
    assert (tmp_path / "seed1" / "learning_curve.png").exists()


def dataset() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "observations": random.normal(size=(200, 4)),
        "actions": random.uniform([-2, 0], [2, 1], size=(200, 2)),
        "rewards": random.normal(size=200),
        "terminals": np.arange(1, 201) % 20 == 0,
        "timeouts": np.zeros(200, bool),
    }


def test_fine_tuning_starts_where_the_checkpoint_is(tmp_path: Path) -> None:
    path = tmp_path / "walk.npz"
    np.savez(path, **dataset())
    offline = settings(tmp_path / "offline", online=None, dataset=DatasetConfig(path=str(path)))
    run(offline)
    tuned = settings(
        tmp_path / "tuned",
        dataset=offline.dataset,
        checkpoint=str(tmp_path / "offline"),
        online=OnlineConfig(start_steps=10, start="policy", offline_fraction=0.5),
    )
    result = run(tuned)
    assert result["data"]["source"] == "file + online"
    first = json.loads((tmp_path / "tuned" / "evaluations" / "step_00000000.json").read_text())
    last = json.loads((tmp_path / "offline" / "evaluations" / "step_00000040.json").read_text())
    assert first["returns"] == last["returns"][: len(first["returns"])]
    # the optimiser's count of updates goes on
    assert Policy.load(tmp_path / "tuned").config.origin["step"] == 80


def test_fine_tuning_needs_a_whole_checkpoint(tmp_path: Path) -> None:
    run(settings(tmp_path / "run"))
    alone = tmp_path / "alone"
    Policy.load(tmp_path / "run").save(alone / "policy")
    with pytest.raises(CheckpointError, match=r"alone: a policy alone, without the networks and optimisers"):
        run(settings(tmp_path / "tuned", checkpoint=str(alone)))
    other = {**LITTLE, "name": "cpql", "critic_hidden": [8]}
    with pytest.raises(CheckpointError, match=r"checkpoint=.*run: critic.*: expected shape"):
        run(settings(tmp_path / "tuned", checkpoint=str(tmp_path / "run"), agent=other))
    ended = {**LITTLE, "name": "cpql", "lr_decay": "cosine"}
    with pytest.raises(ConfigError, match=r"lr_decay=cosine: checkpoint=.*run is at its end.*lr_decay=none"):
        run(settings(tmp_path / "tuned", checkpoint=str(tmp_path / "run"), agent=ended))
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (DatasetConfig(reward="normalize"), r"dataset\.reward=normalize: expected none without a dataset"),
        (DatasetConfig(n_step=3), r"dataset\.n_step=3: expected 1 without a dataset"),
    ],
)
def test_a_datasets_settings_without_one(tmp_path: Path, dataset: DatasetConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(settings(tmp_path / "run", dataset=dataset))
