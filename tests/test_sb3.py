"""Stable-Baselines3 and cpql use each other's parts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import small
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from cpql.actors import ACTORS, ActorConfig, AnyActorConfig, ConsistencyActor, DeterministicConfig
from cpql.agents import CPQL, CPQLConfig
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.errors import ConfigError, DataError
from cpql.interop.sb3 import ConsistencyTD3Policy, batch, transitions
from cpql.tasks import Task
from cpql.training.evaluation import evaluate

PENDULUM = Task("pendulum", "Pendulum-v1")
ACTOR = ActorConfig(t_max=5.0, refinements=(0.8,), hidden=(16, 16))


def make(seed: int = 0, **kwargs: Any) -> TD3:
    """A TD3 with little networks, three seconds of Pendulum for a beginning."""
    policy = {"actor_config": ACTOR, "net_arch": [16]}
    return TD3(
        ConsistencyTD3Policy,
        "Pendulum-v1",
        seed=seed,
        learning_starts=60,
        batch_size=16,
        policy_kwargs=policy,
        **kwargs,
    )


@pytest.fixture(scope="module")
def trained() -> TD3:
    return make().learn(450)


def observations(count: int) -> np.ndarray:
    angle, speed = np.random.default_rng(0).uniform(-1, 1, (2, count))
    return np.stack([np.cos(angle), np.sin(angle), 8 * speed], 1).astype(np.float32)


def test_td3_trains_the_actor(trained: TD3) -> None:
    actor, before = trained.actor.mu, make().actor.mu
    assert isinstance(actor, ConsistencyActor) and actor.config == ACTOR
    for name, weight in actor.named_parameters():
        assert not torch.equal(weight, before.get_parameter(name)), name
    # and its target has followed a part of the way
    start, end, slow = (
        torch.nn.utils.parameters_to_vector(module.parameters())
        for module in (before, actor, trained.actor_target)
    )
    assert 0.1 < (slow - start).norm() / (end - start).norm() < 0.9


def test_a_seed_gives_one_training(trained: TD3) -> None:
    again, other = make().learn(120), make(1).learn(120)
    once_more = make().learn(120)
    for left, right in zip(again.actor.parameters(), once_more.actor.parameters(), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(next(again.actor.parameters()), next(other.actor.parameters()))


def test_actions_are_in_the_bounds_and_deterministic_where_wanted(trained: TD3) -> None:
    seen = observations(200)
    largest = abs(trained.predict(seen)[0]).max()
    assert 1.0 < largest <= 2.0  # Pendulum's bound, not the actor's
    model = make()
    actions = [model.predict(seen, deterministic=which)[0] for which in (False, False, True, True)]
    assert not np.array_equal(actions[0], actions[1])
    np.testing.assert_array_equal(actions[2], actions[3])
    np.testing.assert_allclose(model.predict(seen[3], deterministic=True)[0], actions[2][3], atol=1e-6)


def test_saved_and_loaded_by_sb3(trained: TD3, tmp_path: Path) -> None:
    trained.save(tmp_path / "td3.zip")
    trained.policy.save(str(tmp_path / "policy.pt"))
    loaded = TD3.load(tmp_path / "td3.zip", env=gymnasium.make("Pendulum-v1"))
    policy = ConsistencyTD3Policy.load(str(tmp_path / "policy.pt"))
    assert isinstance(loaded.actor.mu, ConsistencyActor) and loaded.actor.mu.config == ACTOR
    target, _ = trained.predict(observations(20), deterministic=True)
    for other in (loaded, policy):
        np.testing.assert_array_equal(other.predict(observations(20), deterministic=True)[0], target)
    loaded.learn(70, reset_num_timesteps=False)
    assert loaded.num_timesteps >= trained.num_timesteps + 70


def test_the_actors_widths_are_its_own() -> None:
    with pytest.raises(ConfigError, match=r"net_arch: 'pi' is \[8\]: expected \[\], the actor's widths are"):
        TD3(ConsistencyTD3Policy, "Pendulum-v1", policy_kwargs={"net_arch": {"pi": [8], "qf": [8]}})
    model = TD3(ConsistencyTD3Policy, "Pendulum-v1", policy_kwargs={"net_arch": {"pi": [], "qf": [8]}})
    assert model.critic.q_networks[0].get_submodule("0").out_features == 8
    assert model.actor.mu.config == ActorConfig(t_max=5.0)


@pytest.mark.parametrize(
    "actor", [ACTOR, DeterministicConfig((16, 16))], ids=["consistency", "deterministic"]
)
def test_sb3_scores_our_policy_as_we_do(actor: AnyActorConfig) -> None:
    torch.manual_seed(3)
    config = PolicyConfig(3, 1, (-2.0,), (2.0,), actor, (), False, 1, 1.0, PENDULUM)
    policy = Policy(ACTORS[actor.kind](3, 1, actor), None, config)
    ours = evaluate(policy, PENDULUM, 4, seed=7, deterministic=True)
    environments = DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")] * 4)
    environments.seed(7)  # environment i with 7 + i, as cpql's episode i
    theirs, lengths = evaluate_policy(
        policy,  # type: ignore[arg-type]  # SB3's protocol also has observations that are dicts
        VecMonitor(environments),
        n_eval_episodes=4,
        return_episode_rewards=True,
    )
    assert isinstance(theirs, list) and np.ptp(theirs) > 10.0
    np.testing.assert_allclose(sorted(theirs), sorted(ours.returns), rtol=1e-4)
    assert lengths == [200] * 4


def test_our_learner_takes_the_replay_buffer(trained: TD3) -> None:
    assert isinstance(trained.replay_buffer, ReplayBuffer)
    data = transitions(trained.replay_buffer, id="pendulum-replay")
    assert data.provenance.source == "stable-baselines3" and data.provenance.id == "pendulum-replay"
    assert data.provenance.details["buffer"] == "ReplayBuffer"
    # two episodes of 200 steps, both ended by the clock, and the beginning of a third
    assert (len(data), data.provenance.episodes) == (450, 2)
    assert data.truncated.nonzero().squeeze().tolist() == [199, 399]
    assert data.ends.nonzero().squeeze().tolist() == [199, 399, 449]
    assert not data.terminated.any() and (data.columns.discounts == 1).all()
    returns = [episode["r"] for episode in trained.ep_info_buffer or []]
    assert data.provenance.return_mean == pytest.approx(np.mean(returns), rel=1e-4)
    # Pendulum's reward knows the torque: actions are those of the environment, halved
    angle = torch.atan2(data.observations[:, 1], data.observations[:, 0])
    torque = 2 * data.actions[:, 0]
    reward = -(angle**2 + 0.1 * data.observations[:, 2] ** 2 + 0.001 * torque**2)
    torch.testing.assert_close(data.rewards, reward, atol=1e-4, rtol=1e-4)

    agent = CPQL(3, 1, small(CPQLConfig()))
    generator = torch.Generator().manual_seed(0)
    before = agent.state["actor"].clone()
    for _ in range(3):
        metrics = agent.update(data.sample(16, generator), agent.draw(generator))
        live = agent.update(batch(trained.replay_buffer.sample(16)), agent.draw(generator))
    assert metrics.keys() == live.keys()
    assert all(torch.isfinite(value) for value in live.values())
    assert not torch.equal(before, agent.state["actor"])


class Counter(gymnasium.Env[np.ndarray, np.ndarray]):
    """Counts its steps, from a number of its own; terminates or is truncated after five."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = spaces.Box(-1.0, 3.0, (1,), np.float32)

    def __init__(self, first: int, terminates: bool) -> None:
        self.first, self.terminates = first, terminates

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = self.first
        return np.array([self.count], np.float64), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        last = self.count == self.first + 5
        reward = float(action[0])
        return (
            np.array([self.count], np.float64),
            reward,
            last and self.terminates,
            last and not self.terminates,
            {},
        )


def counted(steps: int, size: int = 1000, **kwargs: Any) -> TD3:
    """Two counters, from 0 and from 100, of which the first terminates."""
    environments = DummyVecEnv([lambda: Counter(0, True), lambda: Counter(100, False)])
    model = TD3(
        ConsistencyTD3Policy,
        environments,
        buffer_size=size,
        learning_starts=10_000,
        policy_kwargs={"actor_config": replace(ACTOR, hidden=(8,)), "net_arch": [8]},
        **kwargs,
    )
    return model.learn(steps)


def test_several_environments_come_one_after_the_other() -> None:
    model = counted(24)
    assert isinstance(model.replay_buffer, ReplayBuffer)
    data = transitions(model.replay_buffer)
    counts = [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert data.observations[:, 0].tolist() == [*counts, *(100 + c for c in counts)]
    torch.testing.assert_close(data.next_observations, data.observations + 1)
    assert data.terminated.nonzero().squeeze().tolist() == [4, 9]
    assert data.truncated.nonzero().squeeze().tolist() == [16, 21]
    assert data.ends.nonzero().squeeze().tolist() == [4, 9, 11, 16, 21, 23]
    assert data.provenance.episodes == 4
    torch.testing.assert_close(data.rewards, 1 + 2 * data.actions[:, 0])  # bounds -1 and 3
    live = batch(model.replay_buffer.sample(200))
    stops = live.next_observations == 5
    torch.testing.assert_close(live.discounts, (~stops).float().squeeze(-1))
    assert stops.any() and live.observations.dtype == torch.float32


def test_a_full_buffer_begins_with_its_oldest_step() -> None:
    model = counted(46, 32)  # 23 steps in each environment, of which 16 are kept
    assert isinstance(model.replay_buffer, ReplayBuffer)
    data = transitions(model.replay_buffer)
    counts = [step % 5 for step in range(7, 23)]
    assert data.observations[:, 0].tolist() == [*counts, *(100 + c for c in counts)]
    assert data.provenance.details == {
        "buffer": "ReplayBuffer",
        "environments": 2,
        "overwritten": True,
        "time_limits_known": True,
    }


def test_what_a_buffer_must_hold() -> None:
    def made(observation: spaces.Space[Any], action: spaces.Space[Any], **kwargs: Any) -> ReplayBuffer:
        return ReplayBuffer(10, observation, action, "cpu", **kwargs)

    line, image = spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (3, 8, 8), np.uint8)
    torque = spaces.Box(-2, 2, (1,))
    with pytest.raises(
        DataError, match=r"ReplayBuffer: its spaces are .*Discrete\(2\): expected a Box for both"
    ):
        transitions(made(line, spaces.Discrete(2)))
    with pytest.raises(DataError, match="mine: an episode's last observation isn't kept"):
        transitions(made(line, torque, optimize_memory_usage=True, handle_timeout_termination=False), "mine")
    with pytest.raises(DataError, match=r"'observations' has shape \[0, 3\]: expected \[N, S\]"):
        transitions(made(line, torque))
    for space, action, message in (
        (image, 0.5, r"'observations' has shape \[1, 3, 8, 8\]: expected \[N, S\]"),
        (line, 1.7, "'actions'"),  # filled by hand, with the environment's torques
    ):
        buffer = made(space, torque)
        step = np.zeros((1, *space.shape), space.dtype)
        buffer.add(step, step, np.full((1, 1), action), np.zeros(1), np.zeros(1), [{}])
        with pytest.raises(DataError, match=message):
            transitions(buffer)
    several = TD3(ConsistencyTD3Policy, "Pendulum-v1", n_steps=3, learning_starts=10_000).learn(20)
    assert isinstance(several.replay_buffer, ReplayBuffer)
    with pytest.raises(DataError, match="samples of several steps: expected n_steps=1"):
        batch(several.replay_buffer.sample(4))


@pytest.mark.slow
def test_cpql_alone_loads_neither_and_says_what_is_missing() -> None:
    code = """if True:
        import importlib, sys
        import cpql, cpql.agents, cpql.cli, cpql.data, cpql.deploy.export, cpql.deploy.policy
        import cpql.training.loop
        assert cpql.Policy and cpql.ConsistencyActor
        packages = {"stable_baselines3": "sb3", "torchrl": "torchrl"}
        assert not packages.keys() & set(sys.modules)
        for package, name in packages.items():
            sys.modules[package] = None
            try:
                importlib.import_module(f"cpql.interop.{name}")
            except cpql.errors.ConfigError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "cpql.interop.sb3 needs Stable-Baselines3: pip install 'cpql[sb3]'",
        "cpql.interop.torchrl needs TorchRL: pip install 'cpql[torchrl]'",
    ], done.stderr
