"""Is it the critic or the imitation? How a critic ranks actions, and where its actor is beside the data.

docs/diagnosis.md says what each number means.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import yaml
from gymnasium.envs.mujoco import MujocoEnv
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

import cpql.data
from cpql.agents import ActorCriticConfig
from cpql.data import transforms
from cpql.data.sources import SOURCES, Request
from cpql.data.transitions import Transitions
from cpql.deploy.policy import Policy
from cpql.environments import TaskEnvironment, make_task_environment
from cpql.errors import ActingError, ConfigError, CpqlError, DataError, errors_in_one_line
from cpql.experiments import statistics
from cpql.io import versions, write_text
from cpql.migration import upgrade
from cpql.training.config import TrainConfig, agent_config, train_config
from measure.episodes import SEED, Array, episodes, q_bias, values

__all__ = ["critic"]

# Half of a state's actions are the actor's own; the others are noised, with standard deviations that rise
# from the one to the other, of actions in [-1, 1].
NOISE = 0.1, 0.3
# Standard deviation of the noise that actors without any act with in rollouts, likewise.
NUDGE = 0.02
# Steps that returns are summed over, besides the horizon: the longer, the more they depend on noise.
HORIZONS = 10, 30, 100
# Of the comparison with the data: states, and actions drawn at each.
ROWS, DRAWS = 2_000, 32

Rule = Callable[[Array], Array]


class Start(NamedTuple):
    """A state to return to.

    Attributes:
        seed: of the reset;
        before: and the actions [t, A] that lead there.
        observation: [S], there.
    """

    seed: int
    before: Array
    observation: Array

    def reach(self, environment: TaskEnvironment) -> Callable[[TaskEnvironment], object]:
        """Bring an environment into this state, and return a function that brings others of its kind there.

        Gymnasium's MuJoCo robots are put there. What else holds a state can't be known of other environments
        (goals, buttons), which therefore act their way there each time.

        Raises:
            ActingError: it isn't there after the same reset and actions.
        """
        observation, _ = environment.reset(seed=self.seed)
        for action in self.before:
            observation, *_ = environment.step(action)
        if not np.array_equal(observation, self.observation):
            raise ActingError(
                f"{environment.task.id} can't be brought back into a state: the same seed and actions lead "
                "elsewhere"
            )
        robot = environment.unwrapped
        if not isinstance(robot, MujocoEnv):
            return self.reach
        position, velocity = robot.data.qpos.copy(), robot.data.qvel.copy()

        def put(environment: TaskEnvironment) -> None:
            environment.reset(seed=self.seed)
            cast(Any, environment.unwrapped).set_state(position, velocity)

        return put


def critic(options: argparse.Namespace) -> None:
    """Measure each run's last checkpoint, print tables, and write it all to a JSON file if one is named."""
    torch.set_num_threads(1)
    with errors_in_one_line():
        rows = [of_run(folder, options) for folder in track(options.runs, "runs", transient=True)]
    for table in (ranking_table(rows), shift_table(rows)):
        Console().print(table)
    for row in rows:
        for part, reason in row["missing"].items():
            print(f"{row['run']}: no {part}: {reason}")
    if options.json:
        asked = {name: getattr(options, name) for name in ("states", "actions", "rollouts", "horizon")}
        content = {**asked, "noise_seed": SEED, "versions": versions(), "runs": rows}
        write_text(Path(options.json), json.dumps(content, indent=2, allow_nan=False) + "\n")


def of_run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run's row: what `ranking` and `shift` give, or None, with the reason in `missing`."""
    policy, file = Policy.load(folder), folder / "config.yaml"
    config = train_config(upgrade(yaml.safe_load(file.read_text())), str(file))
    origin = policy.config.origin
    row: dict[str, Any] = {
        "run": str(folder),
        "task": policy.config.task.name,
        "environment": policy.config.task.id,
        **{name: origin[name] for name in ("agent", "algorithm", "step", "seed")},
        "data": {name: origin["data"][name] for name in ("source", "id", "sha256")},
        "trained_with": origin["versions"],
        "missing": {},
    }
    data: Transitions | CpqlError
    try:
        data = dataset(policy, config)
    except CpqlError as error:
        data = error
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "ranking": lambda: ranking(policy, config, data, options),
        "shift": lambda: shift(policy, data),
    }
    for name, measure in parts.items():
        row[name] = None
        try:
            row[name] = measure()
        except CpqlError as error:
            row["missing"][name] = str(error)
    return row


def dataset(policy: Policy, config: TrainConfig) -> Transitions:
    """The dataset that the run learnt from, if it is on this disk.

    Raises:
        DataError: it isn't, or there is another one in its place.
    """
    d, origin = config.dataset, policy.config.origin["data"]
    source = "file" if d.path else origin["source"].removesuffix(" + online")
    if source == "online":
        raise DataError("the run learnt from no dataset")
    request: dict[str, Any] = {
        "path": d.path,
        "id": d.id,
        "size": d.size,
        "seed": d.seed,
        "time_limits": d.time_limits,
    }
    if SOURCES[source].locate(Request(config.env, **request)) is None:
        raise DataError(f"the dataset {origin['file'] or origin['id']} isn't on this disk")
    _, data = cpql.data.load(config.env, source=source, **request, say=lambda line: None)
    if data.provenance.sha256 != origin["sha256"]:
        raise DataError(f"{data.provenance.name} has SHA-256 {data.provenance.sha256}, the run's had another")
    return data


def ranking(
    policy: Policy, config: TrainConfig, data: Transitions | CpqlError, options: argparse.Namespace
) -> dict[str, Any]:
    """The critic beside discounted returns, on states that the policy visits, in training's own rewards.

    Raises:
        CpqlError: there is no critic or no environment, or rewards are changed by a rule that needs the data.
    """
    settings = agent_config(config)[1]
    if policy.critic is None or not isinstance(settings, ActorCriticConfig):
        raise ConfigError(f"the agent {config.agent['name']} has no critic")
    rule: Rule = np.asarray
    if config.dataset.reward != "none":
        if isinstance(data, CpqlError):
            raise data
        changed = transforms.reward_rule(data, config.dataset.reward)
        rule = lambda rewards: changed(torch.as_tensor(rewards)).numpy()  # noqa: E731
    found = [episode._replace(rewards=rule(episode.rewards)) for episode in episodes(policy)]
    visited = [(episode, t) for episode in found for t in range(len(episode.rewards))]
    count = min(options.states, len(visited))
    chosen = np.random.default_rng(SEED).choice(len(visited), count, replace=False)
    starts = [
        Start(episode.seed, episode.actions[:t], episode.observations[t])
        for episode, t in (visited[each] for each in chosen)
    ]
    states = np.stack([start.observation for start in starts])
    actions = first_actions(policy, states, options.actions)
    pairs = np.repeat(states, options.actions, 0), actions.reshape(-1, actions.shape[-1])
    q = values(policy, *pairs).reshape(count, options.actions)
    rewards = follow(policy, starts, actions, options.rollouts, options.horizon, rule)
    discounted = rewards * settings.discount ** np.arange(options.horizon)
    lengths = [steps for steps in HORIZONS if steps < options.horizon] + [options.horizon]
    bias, value = q_bias(policy, found, settings.discount)
    return {
        "q_bias": bias,
        "return_to_go": value,
        "states": count,
        "by_steps": [{"steps": steps, **compare(q, discounted[..., :steps].sum(-1))} for steps in lengths],
    }


@torch.no_grad()
def first_actions(policy: Policy, states: Array, count: int) -> Array:
    """Actions [S, K, A] to compare at states [S, ...], in the environment's bounds.

    Half of the K are the actor's draws (the one action of an actor without noise counts once), the others its
    first draw with Gaussian noise.
    """
    state = policy.normalise(torch.from_numpy(states).float())
    generator = torch.Generator().manual_seed(SEED)
    draws = max(1, count // 2) if policy.actor.draws else 1
    own = torch.stack([policy.actor.sample(state, generator=generator) for _ in range(draws)], 1)
    deviations = torch.linspace(*NOISE, count - draws).unsqueeze(-1)
    noise = torch.randn(len(own), *deviations.shape[:1], own.shape[-1], generator=generator)
    noised = (own[:, :1] + deviations * noise).clamp(-1.0, 1.0)
    scaled: Array = policy.folded.scale(torch.cat([own, noised], 1).numpy())
    return scaled


@torch.inference_mode()
def follow(
    policy: Policy, starts: list[Start], actions: Array, rollouts: int, horizon: int, rule: Rule
) -> Array:
    """Rewards [S, K, R, H] of actions [S, K, A] at S states, each followed by the policy; 0 after the end.

    The R rollouts of an action differ in the policy's noise; an actor that has none gets a little. Rollout r
    has the same noise for all actions of a state, so that rewards differ by the actions. The task's time
    limit doesn't count.
    """
    task, draws = policy.config.task, policy.actor.draws
    low, high = (
        np.array(bound, np.float32) for bound in (policy.config.action_low, policy.config.action_high)
    )
    act = policy.folded.with_rule(policy.candidates if draws else 1, policy.temperature).to("cpu")
    jobs = list(np.ndindex(*actions.shape[:2], rollouts))
    rewards = np.zeros((*actions.shape[:2], rollouts, horizon))
    with ExitStack() as stack:
        environments = [
            stack.enter_context(closing(make_task_environment(task, max_episode_steps=-1)))
            for _ in range(min(task.at_once, len(jobs)))
        ]
        enter = [start.reach(environments[0]) for start in starts]
        for begin in range(0, len(jobs), len(environments)):
            running = dict(zip(jobs[begin : begin + len(environments)], environments, strict=False))
            noise = {job: np.random.default_rng([SEED, job[0], job[2]]) for job in running}
            rows = {job: starts[job[0]].observation for job in running}
            for (state, *_), environment in running.items():
                enter[state](environment)
            chosen = np.stack([actions[job[:2]] for job in running])
            for step in range(horizon):
                for job, action in zip(list(running), chosen, strict=True):
                    rows[job], reward, terminated, truncated, _ = running[job].step(action)
                    rewards[*job, step] = rule(reward)
                    if terminated or truncated:
                        del running[job]
                if not running:
                    break
                drawn = [act.draw(noise[job]) for job in running]
                both = {
                    name: torch.from_numpy(
                        np.stack([one[name] for one in drawn], 1 if name == "noise" else 0)
                    )
                    for name in drawn[0]
                }
                states = torch.from_numpy(np.stack([rows[job] for job in running])).float()
                chosen = act(states, **both, xp=torch).numpy()
                if not draws:
                    nudges = np.stack([noise[job].standard_normal(len(low), np.float32) for job in running])
                    chosen = (chosen + NUDGE * (high - low) / 2 * nudges).clip(low, high)
    return rewards


def compare(q: Array, returns: Array) -> dict[str, Any]:
    """Values [S, K] beside returns [S, K, R] of the same actions.

    States where all actions are worth the same, by either, have no order, and no rank correlation.
    """
    true, half = returns.mean(-1), returns.shape[-1] // 2
    ranks = correlations(q, true)
    found = statistics.estimate(statistics.mean, [ranks]) if len(ranks) > 1 else None
    q_gaps, true_gaps = q - q.mean(1, keepdims=True), true - true.mean(1, keepdims=True)
    square = float((true_gaps**2).sum())
    attainable = None
    if half:
        halves = correlations(returns[..., :half].mean(-1), returns[..., half : 2 * half].mean(-1))
        between = max(0.0, float(halves.mean())) if len(halves) else 0.0
        attainable = math.sqrt(2 * between / (1 + between))
    return {
        "rank_correlation": None if found is None else float(found.value),
        "interval": None if found is None else [float(found.low), float(found.high)],
        "states_with_an_order": len(ranks),
        "attainable": attainable,
        "gap_ratio": math.sqrt(float((q_gaps**2).sum()) / square) if square else None,
        "gap_slope": float((q_gaps * true_gaps).sum()) / square if square else None,
        "true_gap": math.sqrt(square / true.size),
    }


def correlations(one: Array, other: Array) -> Array:
    """Spearman's rank correlation along the last axis, of the rows where both have an order."""
    ordered = (np.ptp(one, -1) > 0) & (np.ptp(other, -1) > 0)
    pairs = zip(one[ordered], other[ordered], strict=True)
    return np.array([spearmanr(a, b).statistic for a, b in pairs], np.float64)


@torch.no_grad()
def shift(policy: Policy, data: Transitions | CpqlError) -> dict[str, Any]:
    """Single draws of the actor beside the data's actions, in [-1, 1], on states of the dataset.

    Raises:
        CpqlError: `data`, where it is one.
    """
    if isinstance(data, CpqlError):
        raise data
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randperm(len(data), generator=generator)[:ROWS]
    state, action = policy.normalise(data.observations[rows]), data.actions[rows]
    count = DRAWS if policy.actor.draws else 1
    drawn = torch.stack([policy.actor.sample(state, generator=generator) for _ in range(count)])
    moved = drawn.mean(0) - action
    distance, offset = moved.abs().mean(0), moved.mean(0).abs()
    gain = None
    if policy.critic is not None:
        own, theirs = policy.critic(state, drawn).amin(0), policy.critic(state, action).amin(0)
        gain = float((own.mean() - theirs.mean()) / theirs.abs().mean())
    return {
        "states": len(rows),
        "draws": count,
        "distance": float(distance.mean()),
        "distance_by_dimension": distance.tolist(),
        "offset": float(offset.mean()),
        "offset_by_dimension": offset.tolist(),
        "diversity": float(drawn.std(0, correction=0).mean()),
        "q_gain": gain,
    }


def ranking_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each run and number of steps that returns are summed over."""
    found = Table(title="how the critic ranks actions", title_justify="left")
    for name in ("run", "steps", "rank correlation", "attainable", "gap ratio", "gap slope"):
        found.add_column(name, no_wrap=name == "rank correlation", overflow="fold")
    for row in rows:
        lines = row["ranking"]["by_steps"] if row["ranking"] else []
        for one in lines:
            rank = number(one["rank_correlation"])
            if one["interval"]:
                rank += " [{:.2f}, {:.2f}]".format(*one["interval"])
            gaps = [number(one[name]) for name in ("attainable", "gap_ratio", "gap_slope")]
            name = about(row) if one is lines[0] else ""
            found.add_row(name, str(one["steps"]), rank, *gaps, end_section=one is lines[-1])
    return found


def shift_table(rows: list[dict[str, Any]]) -> Table:
    """A line for each run; empty where something couldn't be measured."""
    columns = {
        "Q bias": ("ranking", "q_bias"),
        "return to go": ("ranking", "return_to_go"),
        "Q gain": ("shift", "q_gain"),
        "distance": ("shift", "distance"),
        "offset": ("shift", "offset"),
        "diversity": ("shift", "diversity"),
    }
    found = Table(title="the critic's level, and where the actor is beside the data", title_justify="left")
    for name in ("run", *columns):
        found.add_column(name, overflow="fold")
    for row in rows:
        cells = [number((row[part] or {}).get(name)) for part, name in columns.values()]
        found.add_row(about(row), *cells, end_section=True)
    return found


def about(row: dict[str, Any]) -> str:
    """What a table calls a run, in three lines."""
    return f"{row['task']}\n{row['agent']}, seed {row['seed']}\n{row['step']:,} updates"


def number(value: float | None) -> str:
    """With two decimals, or none where it is large; nothing for None."""
    return "" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
