"""Rewards, normalised observations and n-step returns, against hand-made rows and a plain loop."""

from __future__ import annotations

from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpql.data import transforms
from cpql.data.transitions import Transitions
from cpql.errors import ConfigError, DataError
from cpql.training.config import DatasetConfig


def made(rewards: list[float], terminals: list[int], timeouts: list[int]) -> Transitions:
    """Rows whose observations count up, with a jump between episodes."""
    ends = np.asarray(terminals) | np.asarray(timeouts)
    states = np.arange(len(rewards), dtype=np.float32) + 100 * np.concatenate([[0], np.cumsum(ends)[:-1]])
    return Transitions.from_dict(
        {
            "observations": states[:, None],
            "actions": np.zeros((len(rewards), 1)),
            "rewards": rewards,
            "next_observations": states[:, None] + 1,
            "terminals": terminals,
            "timeouts": timeouts,
        },
        id="made",
    )


def two_episodes() -> Transitions:
    return made([1, 2, 3, 10, 20], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [1, 2, 3, 10, 20]),
        ("antmaze", [1.5, 3.5, 5.5, 19.5, 39.5]),
        ("cql_antmaze", [2, 6, 10, 38, 78]),
        ("iql_antmaze", [0, 1, 2, 9, 19]),
        # Returns are 6 and 30.
        ("iql_locomotion", [1000 / 24, 2000 / 24, 3000 / 24, 10_000 / 24, 20_000 / 24]),
        # Mean 7.2, variance 63.7: of a sample, as in the codes that the rule is from.
        ("normalize", [(r - 7.2) / 63.7**0.5 for r in (1, 2, 3, 10, 20)]),
    ],
)
def test_reward_rules(rule: str, expected: list[float]) -> None:
    data = two_episodes()
    changed = transforms.reward(data, rule)
    np.testing.assert_allclose(changed.rewards, expected, rtol=1e-6)
    assert data.rewards.tolist() == [1, 2, 3, 10, 20]  # the data themselves stay as they are
    assert torch.equal(changed.next_observations, data.next_observations)
    assert torch.equal(changed.columns.discounts, data.columns.discounts)
    assert changed.provenance.return_max == 30
    assert changed.provenance.details.get("transforms") == (None if rule == "none" else {"reward": rule})


def test_stretches_between_terminal_rows_ignore_time_limits_and_what_is_left_at_the_end() -> None:
    data = made([1, 2, 3, 10, 20, 5, 1000], [0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0])
    changed = transforms.reward(data, "iql_locomotion_terminals")
    np.testing.assert_allclose(changed.rewards, data.rewards * (1000 / 29), rtol=1e-6)  # 6 and 35
    with pytest.raises(DataError, match=r"made: 1 terminal rows, returns from 6\.0 to 6\.0"):
        transforms.reward(two_episodes(), "iql_locomotion_terminals")
    with pytest.raises(DataError, match="made: 0 terminal rows, returns from None to None"):
        transforms.reward(made([1, 2], [0, 0], [0, 1]), "iql_locomotion_terminals")


def test_reward_rules_that_cannot_be_applied_say_why() -> None:
    flat = made([2, 2, 2], [0, 0, 1], [0, 0, 0])
    with pytest.raises(DataError, match="made: all rewards are 2: reward=normalize expects"):
        transforms.reward(flat, "normalize")
    with pytest.raises(DataError, match=r"made: 1 complete episodes, returns from 6\.0 to 6\.0"):
        transforms.reward(flat, "iql_locomotion")
    with pytest.raises(ConfigError, match="reward='iql' is no rule: expected one of none, normalize"):
        transforms.reward(flat, "iql")


def test_every_rule_is_described() -> None:
    assert set(transforms.REWARD_RULES) == set(transforms.RewardRule.__args__)  # type: ignore[attr-defined]
    # The configuration says them again, so as not to load torch for a --help.
    assert get_type_hints(DatasetConfig)["reward"] == transforms.RewardRule


def test_normalised_observations_can_be_undone() -> None:
    random = np.random.default_rng(0)
    raw = random.normal(5, [1, 20, 0], (200, 3))
    columns: dict[str, Any] = {
        "observations": raw,
        "next_observations": raw + 1,
        "actions": np.zeros((200, 1)),
    }
    data = Transitions.from_dict(columns | {"rewards": np.zeros(200), "terminals": np.zeros(200)})
    normal = transforms.normalise_observations(data)
    assert normal.normalisation is not None
    mean, std = normal.normalisation
    np.testing.assert_allclose(mean, raw.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std, raw.std(0) + 1e-3, rtol=1e-4)
    np.testing.assert_allclose(normal.observations[:, :2].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(normal.observations[:, :2].std(0, correction=0), 1, atol=2e-3)
    assert (normal.observations[:, 2].abs() < 1e-2).all()  # a number that never changes
    np.testing.assert_allclose(normal.next_observations * std + mean, data.next_observations, atol=1e-4)
    assert normal.provenance.details["transforms"] == {"normalise_observations": True}


def test_two_steps_by_hand() -> None:
    data = transforms.n_step(two_episodes(), 2, 0.5)
    assert data.rewards.tolist() == [1 + 0.5 * 2, 2 + 0.5 * 3, 3, 10 + 0.5 * 20, 20]
    # Rows 1 and 2 see the end of the task; 3 sees the time limit two steps on and bootstraps there.
    assert data.columns.discounts.tolist() == [0.5, 0, 0, 0.5, 1]
    assert data.next_observations[:, 0].tolist() == [2, 3, 3, 105, 105]
    assert data.terminated.tolist() == [False, True, True, False, False]
    assert data.observations[:, 0].tolist() == [0, 1, 2, 103, 104]


def test_one_step_changes_nothing_and_steps_cannot_be_taken_twice() -> None:
    data = two_episodes()
    assert transforms.n_step(data, 1, 0.9) is data
    with pytest.raises(ConfigError, match="n_step=0: expected at least 1"):
        transforms.n_step(data, 0, 0.9)
    with pytest.raises(ConfigError, match="span several steps already"):
        transforms.n_step(transforms.n_step(data, 2, 0.9), 2, 0.9)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.sampled_from("TLC")), min_size=1, max_size=6),
    n=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_n_steps_equal_a_plain_loop(lengths: list[tuple[int, str]], n: int, seed: int) -> None:
    last = [(row, kind) for count, kind in lengths for row in [0] * (count - 1) + [1] for kind in [kind]]
    terminals = [int(row and kind == "T") for row, kind in last]
    timeouts = [int(row and kind == "L") for row, kind in last]
    rewards = np.random.default_rng(seed).normal(size=len(last)).astype(np.float32)
    # A cut has no flag: a jump in the observations ends the episode.
    states = np.arange(len(last)) + 100.0 * np.concatenate([[0], np.cumsum([row for row, _ in last])[:-1]])
    data = Transitions.from_dict(
        {
            "observations": states[:, None],
            "actions": np.zeros((len(last), 1)),
            "rewards": rewards,
            "next_observations": states[:, None] + 1,
            "terminals": terminals,
            "timeouts": timeouts,
        }
    )
    found, gamma = transforms.n_step(data, n, 0.9), 0.9
    for i in range(len(last)):
        total, power, j = 0.0, 1.0, i
        while True:
            total += power * float(rewards[j])
            if last[j][0] or j - i + 1 == n:
                break
            power, j = power * gamma, j + 1
        assert found.rewards[i].item() == pytest.approx(total, abs=1e-5)
        assert found.columns.discounts[i].item() == pytest.approx(0.0 if terminals[j] else power)
        assert found.next_observations[i].item() == states[j] + 1
