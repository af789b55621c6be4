"""Making the behaviours that cpql ships: training SAC, evaluating its snapshots, choosing among them.

Only those who maintain cpql need this; `python scripts/collect.py train` and `card` call it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cpql.data.behaviour import Behaviour, steps
from cpql.data.embedded import ACTION_RULE
from cpql.data.workers import Arrays, in_workers
from cpql.environments import make_environment, make_task_environment
from cpql.errors import ConfigError, DataError
from cpql.io import Progress, aside, versions, write_text
from cpql.tasks import Task

__all__ = ["HYPERPARAMETERS", "from_flax", "make_card", "play", "train_behaviour"]

HYPERPARAMETERS: dict[str, Any] = {
    "learning_starts": 10_000,
    "train_freq": 16,
    "gradient_steps": 16,
    "buffer_size": 1_000_000,
}
"""What `train_behaviour` gives to sbx's SAC; everything else is sbx's default."""

# Mean return and score of D4RL's own v2 data, to print beside ours; where no source for it is at hand, the
# return of D4RL's expert that its scores refer to.
D4RL_RETURNS: dict[str, dict[str, dict[str, float]]] = {
    "hopper": {
        "medium": {"return_mean": 1422.0, "score": 44.3},
        "expert": {"return_mean": 3511.0, "score": 108.5},
    },
    "halfcheetah": {"expert": {"return_mean": 12135.0, "score": 100.0}},
    "walker2d": {"expert": {"return_mean": 4592.3, "score": 100.0}},
}


def train_behaviour(
    environment: str,
    out: Path,
    *,
    seed: int = 0,
    total: int = 1_000_000,
    period: int = 5_000,
    progress: Progress | None = None,
) -> Path:
    """Train SAC with sbx and save snapshots on the way; this takes hours on a CPU.

    Args:
        environment: its Gymnasium id.
        out: the folder for `step-0010000.safetensors` and so on, and `training.json`.
        seed: of sbx.
        total: environment steps.
        period: steps between snapshots.
        progress: called at each snapshot.

    Raises:
        ConfigError: sbx isn't installed, or the environment can't be made.
        OSError: the folder can't be made.
    """
    try:
        sac = importlib.import_module("sbx").SAC
    except ImportError as error:
        raise ConfigError(
            f"training a behaviour needs sbx ({error}): pip install 'cpql[behaviours]'"
        ) from error
    made = make_environment(environment)
    out.mkdir(parents=True, exist_ok=True)  # before the hours whose result goes there
    training = {
        "environment": environment,
        "algorithm": "SAC (sbx)",
        "hyperparameters": HYPERPARAMETERS,
        "seed": seed,
        "versions": versions("gymnasium", "mujoco", "numpy", "sbx-rl", "stable-baselines3", "jax"),
    }
    write_text(out / "training.json", json.dumps(training, indent=2) + "\n")
    model = sac("MlpPolicy", made, seed=seed, **HYPERPARAMETERS)

    def snapshot(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        step = model.num_timesteps
        if step % period == 0:
            parameters = model.policy.actor_state.params
            behaviour = from_flax(_flat(parameters.get("params", parameters)))
            _write_behaviour(out / f"step-{step:07d}.safetensors", behaviour)
            if progress is not None:
                progress(f"train {environment}", step, total)
        return True

    model.learn(total, callback=snapshot)
    return out


def _flat(tree: Any, prefix: str = "") -> Arrays:
    """Nested parameters by their names joined with dots."""
    leaves: Arrays = {}
    for key, value in tree.items():
        nested = hasattr(value, "items")
        leaves |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: np.array(value)}
    return leaves


def from_flax(tensors: Arrays) -> Behaviour:
    """A behaviour from flax's names, `Dense_0.kernel` and so on; the last two layers are the heads."""
    count = sum(key.endswith(".kernel") for key in tensors)
    names = [*(f"layers.{k}" for k in range(count - 2)), "mean", "log_std"]
    return Behaviour.from_tensors(
        {
            f"{name}.{part}": tensors[f"Dense_{k}.{flax}"]
            for k, name in enumerate(names)
            for part, flax in (("weight", "kernel"), ("bias", "bias"))
            if f"Dense_{k}.{flax}" in tensors
        }
    )


def play(
    task: Task, behaviour: Behaviour | None, episodes: int, seed: np.random.SeedSequence, sampled: bool
) -> Arrays:
    """Play whole episodes, with sampled actions or their mode; undiscounted `returns` and `lengths` [E]."""
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    episode = 0
    with contextlib.closing(steps(task, behaviour, seed, sampled=sampled)) as acting:
        while episode < episodes:
            step = next(acting)
            returns[episode] += step.reward
            lengths[episode] += 1
            episode += step.terminated or step.truncated
    return {"returns": returns, "lengths": lengths}


def _summary(played: Arrays) -> dict[str, Any]:
    """The statistics of some episodes as a card has them, in plain numbers."""
    returns: NDArray[np.float64] = played["returns"]
    statistics = {
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "return_min": returns.min(),
        "return_max": returns.max(),
        "length_mean": played["lengths"].mean(),
    }
    return {"episodes": len(returns)} | {key: round(float(value), 2) for key, value in statistics.items()}


def make_card(
    snapshots: Path,
    out: Path,
    environment: str | None = None,
    *,
    seed: int | None = None,
    period: int = 1,
    first_episodes: int = 10,
    episodes: int = 100,
    replay: int = 8,
    expert_step: int | None = None,
    medium_step: int | None = None,
    medium_return: float | None = None,
    packages: dict[str, str] | None = None,
    evaluation_seed: int = 0,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Choose the snapshots of a training run that become behaviours, and write their folder.

    All snapshots play a few episodes with sampled actions; those near a choice play many. The expert is the
    one with the best mean return. Medium is the one before the expert whose return is nearest to a third of
    the expert's; of two alike, the one whose returns vary less. The replay snapshots are evenly spaced
    before medium.

    Args:
        snapshots: the folder of `step-0010000.safetensors` (or `step_0010000.safetensors`), and of
            `training.json` if `train_behaviour` wrote them.
        out: the folder to write, `behaviours/hopper`; its name chooses D4RL's returns to compare with.
        environment: Gymnasium id; by default from training.json.
        seed: of the training; by default from training.json.
        period: consider only steps divisible by this.
        first_episodes: how many episodes each snapshot plays.
        episodes: how many those near a choice play.
        replay: the number of replay snapshots, at most.
        expert_step: take this snapshot instead of choosing one.
        medium_step: take this snapshot instead of choosing one.
        medium_return: what medium should return, instead of a third of the expert's return.
        packages: versions of the packages used in training, where training.json doesn't have them.
        evaluation_seed: of the evaluation.
        progress: called as evaluations finish.
        workers: the number of processes; None starts one per core.

    Returns:
        The card, as written to `out/card.json`.

    Raises:
        DataError: there are too few snapshots, or they can't be read.
        OSError: the folder can't be made.
    """
    training: dict[str, Any] = {
        "algorithm": "SAC (sbx)",
        "hyperparameters": HYPERPARAMETERS,
        "versions": packages or {},
    }
    if (snapshots / "training.json").exists():
        training |= json.loads((snapshots / "training.json").read_text("utf-8"))
    given = {"environment": environment, "seed": seed}
    training |= {key: value for key, value in given.items() if value is not None}
    if "environment" not in training:
        raise DataError(f"{snapshots.name}: no training.json: expected one, or an environment to be named")
    task = Task(name=training["environment"], id=training["environment"])
    make_task_environment(task).close()
    named = {step for step in (expert_step, medium_step) if step is not None}
    behaviours = _read_snapshots(snapshots, training, period, named)
    out.mkdir(parents=True, exist_ok=True)  # before the hours whose result goes there

    def evaluate(chosen: Sequence[int], count: int, sampled: bool, label: str) -> dict[int, Arrays]:
        def report(done: Sequence[int]) -> None:
            if progress is not None:
                progress(label, len(done), len(chosen))

        seeds = [np.random.SeedSequence((evaluation_seed, step, sampled, count)) for step in chosen]
        calls = [
            (task, behaviours[step], count, each, sampled) for step, each in zip(chosen, seeds, strict=True)
        ]
        return dict(zip(chosen, in_workers(play, calls, workers, report), strict=True))

    everywhere = list(behaviours)
    first = evaluate(everywhere, first_episodes, True, "evaluate all")
    mean = {step: _summary(played)["return_mean"] for step, played in first.items()}

    best = [expert_step] if expert_step is not None else sorted(everywhere[1:], key=mean.__getitem__)[-5:]
    sampled = evaluate(best, episodes, True, "evaluate experts")
    expert = max(best, key=lambda step: float(sampled[step]["returns"].mean()))
    target = medium_return or float(sampled[expert]["returns"].mean()) / 3

    near = [medium_step] if medium_step is not None else _near(mean, expert, target)
    if not near:
        raise DataError(
            f"{snapshots.name}: no snapshot before the expert's step {expert}: expected medium among them"
        )
    sampled |= evaluate(near, episodes, True, "evaluate mediums")

    def distance(step: int) -> float:
        returns = sampled[step]["returns"]
        spread = returns.std() / max(abs(returns.mean()), 1.0)
        return float(abs(returns.mean() - target) / abs(target) + 0.25 * spread)

    medium = min(near, key=distance)
    earlier = [step for step in everywhere if step < medium]
    marks = [medium * (k + 1) / (replay + 1) for k in range(replay)]
    replays = sorted({min(earlier, key=lambda step: abs(step - mark)) for mark in marks}) if earlier else []
    sampled |= evaluate(replays, episodes, True, "evaluate replays") if replays else {}
    roles = dict.fromkeys(replays, "replay") | {medium: "medium", expert: "expert"}
    modes = evaluate(list(roles), episodes, False, "evaluate without sampling")

    entries = [
        {
            "step": step,
            "role": role,
            "file": f"step-{step:07d}.safetensors",
            "sha256": _write_behaviour(out / f"step-{step:07d}.safetensors", behaviours[step]),
            "sampled": _summary(sampled[step]),
            "deterministic": _summary(modes[step]),
        }
        for step, role in roles.items()
    ]
    card = training | {
        "action_rule": ACTION_RULE,
        "medium_target": round(target, 2),
        "evaluated_with": versions("gymnasium", "mujoco", "numpy"),
        "snapshots": entries,
        "d4rl": D4RL_RETURNS.get(out.name, {}),
        "falls_short": _falls_short(out.name, entries),
    }
    write_text(out / "card.json", json.dumps(card, indent=2) + "\n")
    return card


def _read_snapshots(
    folder: Path, training: dict[str, Any], period: int, named: set[int]
) -> dict[int, Behaviour]:
    """The snapshots to consider, by step in ascending order."""
    paths = {
        int(path.stem[5:]): path for path in folder.glob("step[-_]*.safetensors") if path.stem[5:].isdigit()
    }
    if missing := named - set(paths):
        raise DataError(f"{folder.name}: no snapshot of step {min(missing)}: there are {len(paths)} others")
    # Until learning starts, the actor is as it was initialised: the recipes' random part covers that.
    starts = int(training["hyperparameters"].get("learning_starts", 0))
    chosen = sorted(step for step in paths if (step > starts and step % period == 0) or step in named)
    if len(chosen) < 2:
        raise DataError(
            f"{folder.name}: {len(chosen)} trained snapshots: expected at least 2 of step-*.safetensors"
        )
    return {step: Behaviour.read(paths[step]) for step in chosen}


def _near(mean: dict[int, float], expert: int, target: float) -> list[int]:
    """The snapshots before the expert that return about the target.

    Only until one returns twice the target: a policy that was far better and forgot is another kind of
    medium.
    """
    before = [step for step in mean if step < expert]
    arrived = next((k for k, step in enumerate(before) if mean[step] > 2 * target), len(before) - 1)
    return sorted(before[: arrived + 1], key=lambda step: abs(mean[step] - target))[:5]


def _falls_short(name: str, entries: Sequence[dict[str, Any]]) -> str | None:
    """A sentence about the behaviours that return less than D4RL's did, or None."""
    short = []
    for entry in entries:
        theirs = D4RL_RETURNS.get(name, {}).get(entry["role"])
        ours = entry["sampled"]["return_mean"]
        if theirs is not None and ours < 0.95 * theirs["return_mean"]:
            short.append(
                f"{entry['role']} returns {ours:.0f} where D4RL's returns {theirs['return_mean']:.0f}"
            )
    return f"Falls short of D4RL: {'; '.join(short)}." if short else None


def _write_behaviour(path: Path, behaviour: Behaviour) -> str:
    """Write a behaviour's file; return its SHA-256."""
    content = safetensors.numpy.save(behaviour.to_tensors())
    with aside(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
