"""Transforms of a dataset before training: other rewards, normalised observations, n-step returns.

Each takes transitions and returns new ones, whose provenance names the transform. They are applied in the
order rewards, observations, n steps, so that n-step returns are sums of the transformed rewards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from cpql.data.transitions import Batch, Transitions, join
from cpql.errors import ConfigError, DataError

__all__ = [
    "REWARD_RULES",
    "RewardRule",
    "n_step",
    "next_actions",
    "normalise_observations",
    "reward",
    "reward_rule",
]

RewardRule = Literal[
    "none",
    "normalize",
    "antmaze",
    "cql_antmaze",
    "iql_antmaze",
    "rebrac_antmaze",
    "iql_locomotion",
    "iql_locomotion_terminals",
]

REWARD_RULES: dict[str, tuple[float, float] | None] = {
    "none": (0.0, 1.0),
    "normalize": None,  # (r - mean r) / std r, over all transitions, std of a sample
    "antmaze": (0.25, 2.0),
    "cql_antmaze": (0.5, 4.0),
    "iql_antmaze": (1.0, 1.0),
    "rebrac_antmaze": (0.0, 100.0),
    "iql_locomotion": None,  # 1000 r / (highest return - lowest return), over complete episodes
    "iql_locomotion_terminals": None,  # the same, over stretches from one terminal row to the next
}
"""The rules by name, as Diffusion-QL's, Consistency-AC's and CPQL's codes name them (`reward_tune`).

A rule (shift, scale) makes scale (r - shift) of a reward r; None depends on the data.
"""

# Added to standard deviations, so that a constant number isn't divided by zero (as in TD3+BC).
EPSILON = 1e-3


def _replaced(data: Transitions, done: dict[str, Any], batch: Batch, **changes: Any) -> Transitions:
    """The same data with other columns; `done` is added to the provenance."""
    details = data.provenance.details
    details = details | {"transforms": details.get("transforms", {}) | done}
    provenance = dataclasses.replace(data.provenance, details=details)
    return dataclasses.replace(data, table=join(batch), provenance=provenance, **changes)


def reward_rule(data: Transitions, rule: str) -> Callable[[Tensor], Tensor]:
    """A rule of `REWARD_RULES` as a function of rewards, with this dataset's statistics.

    Raises:
        ConfigError: there is no such rule.
        DataError: the rule needs rewards or returns that differ, and they don't.
    """
    p = data.provenance
    if rule not in REWARD_RULES:
        raise ConfigError(f"reward={rule!r} is no rule: expected one of {', '.join(REWARD_RULES)}")
    shift, scale = REWARD_RULES[rule] or (0.0, 1.0)
    if rule == "normalize":
        mean, std = data.rewards.mean(), data.rewards.std()
        if not std > 0:
            raise DataError(
                f"{p.name}: all rewards are {data.rewards[0]:g}: reward=normalize expects some to differ"
            )
        return lambda r: (r - mean) / std
    if rule in ("iql_locomotion", "iql_locomotion_terminals"):
        what, count, low, high = "complete episodes", p.episodes, p.return_min, p.return_max
        if rule == "iql_locomotion_terminals":
            what, count = "terminal rows", int(data.terminated.sum())
            stretch = data.terminated.cumsum(0) - data.terminated.int()
            returns = torch.bincount(stretch, data.rewards.double(), count)[:count]
            low, high = (float(returns.min()), float(returns.max())) if count else (None, None)
        if low is None or high is None or low == high:
            raise DataError(
                f"{p.name}: {count} {what}, returns from {low} to {high}: "
                f"reward={rule} expects two with different returns"
            )
        scale = 1000.0 / (high - low)
    return lambda r: (r - shift) * scale


def reward(data: Transitions, rule: str) -> Transitions:
    """Change the rewards by a rule of `REWARD_RULES`; the provenance keeps the environment's returns."""
    changed = reward_rule(data, rule)
    if rule == "none":
        return data
    return _replaced(data, {"reward": rule}, data.columns._replace(rewards=changed(data.rewards)))


def normalise_observations(data: Transitions) -> Transitions:
    """Give observations mean 0 and standard deviation 1, each number of them, over all transitions.

    The policy has to do the same to what it sees: `normalisation` holds the mean and the standard deviation
    (plus 0.001) for that.
    """
    columns = data.columns
    mean = columns.observations.mean(0)
    std = columns.observations.std(0, correction=0) + EPSILON
    changed = {key: (getattr(columns, key) - mean) / std for key in ("observations", "next_observations")}
    batch = columns._replace(**changed)
    return _replaced(data, {"normalise_observations": True}, batch, normalisation=(mean, std))


def next_actions(data: Transitions) -> Transitions:
    """Add the data's action at each next observation, for critics that stay close to it (ReBRAC).

    At the end of an episode it isn't known, and NaN.
    """
    actions = data.actions.roll(-1, 0)
    actions[data.ends] = torch.nan
    return dataclasses.replace(data, table=join(data.columns._replace(next_actions=actions)))


def n_step(data: Transitions, n: int, discount: float) -> Transitions:
    """Let each transition span n steps, or as many as its episode has left.

    For transition i with m steps left to span, m <= n:

        reward              r_i + gamma r_{i+1} + ... + gamma^(m-1) r_{i+m-1}
        next observation    that of row i+m-1
        discounts           gamma^(m-1), or 0 where row i+m-1 terminated

    so that `reward + gamma * discounts * V(next observation)` is the m-step target. It isn't corrected for
    the policy that acted.

    Args:
        data: with one step each.
        n: steps, at least 1.
        discount: gamma.

    Raises:
        ConfigError: n is below 1, or the data span several steps already.
    """
    if n < 1:
        raise ConfigError(f"n_step={n}: expected at least 1")
    if "n_step" in data.provenance.details.get("transforms", {}):
        raise ConfigError("n_step: the data span several steps already")
    if n == 1:
        return data
    columns = data.columns
    rows = torch.arange(len(data), device=data.device)
    last, going = rows.clone(), torch.ones_like(data.ends)
    rewards = columns.rewards.clone()
    powers: Tensor = torch.ones_like(rewards)
    for k in range(1, n):
        ahead = (rows + k).clamp(max=len(data) - 1)
        going = going & ~data.ends[ahead - 1] & (rows + k < len(data))
        rewards += torch.where(going, discount**k * columns.rewards[ahead], 0.0)
        powers = torch.where(going, discount**k, powers)
        last = torch.where(going, ahead, last)
    batch = columns._replace(
        rewards=rewards,
        next_observations=columns.next_observations[last],
        discounts=powers * columns.discounts[last],
        next_actions=None if columns.next_actions is None else columns.next_actions[last],
    )
    return _replaced(data, {"n_step": n}, batch, terminated=data.terminated[last])
