"""Behaviour policies in numpy, and the workers that act with them.

This module runs in worker processes, one a core, which start in a fraction of the time without torch: it
imports neither torch nor anything that does.

A behaviour is a SAC actor: ReLU layers, then a mean and a log standard deviation, squashed by tanh. Its
file is safetensors, float32, weights as [in, out] so that acting is `x @ weight + bias`:

    layers.0.weight [S, 256]   layers.0.bias [256]
    layers.1.weight [256, 256] layers.1.bias [256]
    mean.weight [256, A]       mean.bias [A]
    log_std.weight [256, A]    log_std.bias [A]

Files with flax's own names (`Dense_0.kernel`, ...; the last two layers are the heads) are read as well.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from cpql.environments import action_bounds, make_task_environment, widths
from cpql.errors import DataError
from cpql.tasks import Task

__all__ = ["Behaviour", "Episodes", "play", "rollout"]

Array = NDArray[np.float32]
Layer = tuple[Array, Array]


@dataclass(frozen=True)
class Behaviour:
    """A tanh-squashed Gaussian policy.

    Attributes:
        layers: weight [in, out] and bias [out] of each hidden layer.
        mean: weight [H, A] and bias [A] of the mean, before tanh.
        log_std: the same of the log standard deviation, clipped to [-20, 2].
        sha256: of the file it was read from, "" where there was none.
    """

    layers: tuple[Layer, ...]
    mean: Layer
    log_std: Layer
    sha256: str = ""

    @property
    def state_dim(self) -> int:
        """S, how many numbers an observation has."""
        return int((self.layers or (self.mean,))[0][0].shape[0])

    @property
    def action_dim(self) -> int:
        """A, how many numbers an action has."""
        return int(self.mean[0].shape[1])

    def act(self, observation: Array, generator: np.random.Generator | None) -> Array:
        """Choose an action [A] in [-1, 1] for one observation [S]; without a generator, the mode."""
        x = observation
        for weight, bias in self.layers:
            x = np.maximum(x @ weight + bias, 0)
        action = x @ self.mean[0] + self.mean[1]
        if generator is not None:
            log_std = np.clip(x @ self.log_std[0] + self.log_std[1], -20, 2)
            action = action + np.exp(log_std) * generator.standard_normal(action.shape, dtype=np.float32)
        squashed: Array = np.tanh(action)
        return squashed

    @classmethod
    def read(cls, path: Path) -> Behaviour:
        """Read a behaviour's file, in cpql's names or flax's.

        Raises:
            DataError: the file is missing, isn't safetensors, or holds another network.
        """
        try:
            content = path.read_bytes()
            tensors = safetensors.numpy.load(content)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(
                f"{path.name}: can't be read ({error}): expected safetensors of a behaviour"
            ) from error
        return cls.from_tensors(tensors, where=path.name, sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Any], *, where: str = "behaviour", sha256: str = ""
    ) -> Behaviour:
        """Build a behaviour from named arrays; `where` names them in an error.

        Raises:
            DataError: a key is missing, or the shapes don't fit together.
        """
        if "Dense_0.kernel" in tensors:
            count = sum(key.endswith(".kernel") for key in tensors)
            names = [f"layers.{k}" for k in range(count - 2)] + ["mean", "log_std"]
            tensors = {
                f"{name}.{part}": tensors.get(f"Dense_{k}.{flax}")
                for k, name in enumerate(names)
                for part, flax in (("weight", "kernel"), ("bias", "bias"))
            }

        def layer(name: str) -> Layer:
            weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
            if weight is None or bias is None:
                found = ", ".join(sorted(tensors)) or "nothing"
                raise DataError(f"{where}: {found}: expected {name}.weight and {name}.bias among them")
            if weight.ndim != 2 or bias.shape != weight.shape[1:]:
                raise DataError(
                    f"{where}: '{name}' has weight {list(weight.shape)} and bias {list(bias.shape)}: "
                    "expected [in, out] and [out]"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise DataError(f"{where}: '{name}' holds NaN or infinity: expected finite weights")
            return np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32)

        count = sum(key.startswith("layers.") and key.endswith(".weight") for key in tensors)
        layers = tuple(layer(f"layers.{k}") for k in range(count))
        mean, log_std = layer("mean"), layer("log_std")
        shapes = [list(weight.shape) for weight, _ in (*layers, mean)]
        if list(log_std[0].shape) != shapes[-1] or any(a[1] != b[0] for a, b in itertools.pairwise(shapes)):
            raise DataError(f"{where}: weights of {shapes}: expected each to take what the one before gives")
        return cls(layers, mean, log_std, sha256)

    def to_tensors(self) -> dict[str, Array]:
        """Name the weights as in cpql's files."""
        named = {f"layers.{k}": layer for k, layer in enumerate(self.layers)}
        named |= {"mean": self.mean, "log_std": self.log_std}
        return {
            f"{name}.{part}": array
            for name, layer in named.items()
            for part, array in zip(("weight", "bias"), layer, strict=True)
        }


@dataclass(frozen=True)
class Episodes:
    """Returns [E] (undiscounted) and lengths [E] of whole episodes."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]

    def summary(self) -> dict[str, Any]:
        """Give the statistics that a card states, as plain numbers."""
        return {
            "episodes": len(self.returns),
            "return_mean": round(float(self.returns.mean()), 2),
            "return_std": round(float(self.returns.std()), 2),
            "return_min": round(float(self.returns.min()), 2),
            "return_max": round(float(self.returns.max()), 2),
            "length_mean": round(float(self.lengths.mean()), 2),
        }


class _Actor:
    """A behaviour in a task's environment: actions in [-1, 1] outside, in the environment's bounds inside."""

    def __init__(
        self, task: Task, behaviour: Behaviour | None, seed: np.random.SeedSequence, sampled: bool
    ) -> None:
        # The checker wraps every step, and looks at the environment rather than at what is done with it.
        self.environment = make_task_environment(task, disable_env_checker=True)
        self.state_dim, self.action_dim = widths(self.environment)
        if behaviour is not None and (behaviour.state_dim, behaviour.action_dim) != (
            self.state_dim,
            self.action_dim,
        ):
            raise DataError(
                f"{task.id}: a behaviour of widths {behaviour.state_dim} and {behaviour.action_dim}: "
                f"expected {self.state_dim} and {self.action_dim}"
            )
        self.low, high = action_bounds(self.environment)
        self.half = (high - self.low) / 2
        self.behaviour = behaviour
        self.sampled = sampled
        self.seed = int(seed.generate_state(1)[0])
        self.generator = np.random.default_rng(seed)

    def reset(self) -> Array:
        """Begin an episode; only the first one is seeded, the others follow from it."""
        seed, self.seed = self.seed, -1
        observation, _ = self.environment.reset(seed=None if seed < 0 else seed)
        return np.asarray(observation, np.float32)

    def step(self, observation: Array) -> tuple[Array, Array, float, bool, bool]:
        """Act once: the action [A] in [-1, 1], next observation [S], reward, terminated, truncated."""
        if self.behaviour is None:
            action = self.generator.uniform(-1, 1, self.action_dim).astype(np.float32)
        else:
            action = self.behaviour.act(observation, self.generator if self.sampled else None)
        following, reward, terminated, truncated, _ = self.environment.step(
            self.low + (action + 1) * self.half
        )
        return action, np.asarray(following, np.float32), float(reward), bool(terminated), bool(truncated)


def rollout(
    task: Task, behaviour: Behaviour | None, steps: int, seed: np.random.SeedSequence
) -> dict[str, NDArray[Any]]:
    """Collect `steps` transitions in D4RL's layout, episode after episode, the last one cut without a flag.

    Rewards and flags are the environment's own. One that ends where the task is solved (antmaze, kitchen) has
    a terminal there; at the time limit the clock wins, as in D4RL's files.

    Args:
        task: what to act in: its environment, observations laid end to end, resets with its options.
        behaviour: whose sampled actions to take; None for uniform ones.
        steps: N, how many transitions.
        seed: of the environment and the actions. The same seed gives the same rows.

    Returns:
        observations [N, S], actions [N, A], next_observations [N, S], rewards [N] as float32; terminals
        [N] and timeouts [N] as bool, never both in one row.
    """
    actor = _Actor(task, behaviour, seed, sampled=True)
    observations = np.empty((steps, actor.state_dim), np.float32)
    next_observations = np.empty((steps, actor.state_dim), np.float32)
    actions = np.empty((steps, actor.action_dim), np.float32)
    rewards = np.empty(steps, np.float32)
    terminals, timeouts = np.zeros(steps, np.bool_), np.zeros(steps, np.bool_)
    state = actor.reset()
    for row in range(steps):
        action, following, reward, terminated, truncated = actor.step(state)
        observations[row], actions[row], next_observations[row], rewards[row] = (
            state,
            action,
            following,
            reward,
        )
        terminals[row], timeouts[row] = terminated and not truncated, truncated
        state = actor.reset() if terminated or truncated else following
    actor.environment.close()
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "next_observations": next_observations,
        "terminals": terminals,
        "timeouts": timeouts,
    }


def play(
    task: Task, behaviour: Behaviour | None, episodes: int, seed: np.random.SeedSequence, sampled: bool
) -> Episodes:
    """Play whole episodes, with sampled actions or with the distribution's mode."""
    actor = _Actor(task, behaviour, seed, sampled)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    for episode in range(episodes):
        state, over = actor.reset(), False
        while not over:
            _, state, reward, terminated, truncated = actor.step(state)
            over = terminated or truncated
            returns[episode] += reward
            lengths[episode] += 1
    actor.environment.close()
    return Episodes(returns, lengths)
