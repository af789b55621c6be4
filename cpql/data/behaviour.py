"""Behaviour policies in numpy, and acting with them.

Worker processes import this module and start much faster without torch, so it must not import torch.

A behaviour is a SAC actor: layers with ReLU, then a mean and a log standard deviation, squashed by tanh. Its
file is safetensors in float32, with weights as [in, out], so that a layer is `x @ weight + bias`:

    layers.0.weight [S, 256]   layers.0.bias [256]
    layers.1.weight [256, 256] layers.1.bias [256]
    mean.weight [256, A]       mean.bias [A]
    log_std.weight [256, A]    log_std.bias [A]
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from cpql.environments import action_bounds, make_task_environment, widths
from cpql.errors import DataError
from cpql.tasks import Task

__all__ = ["Behaviour", "Step", "rollout", "steps"]

Array = NDArray[np.float32]
Layer = tuple[Array, Array]
PARTS = ("weight", "bias")


@dataclass(frozen=True)
class Behaviour:
    """A tanh-squashed Gaussian policy.

    Attributes:
        layers: weight [in, out] and bias [out] of each hidden layer.
        mean: weight [H, A] and bias [A] of the mean before tanh.
        log_std: weight and bias of the log standard deviation, which is clipped to [-20, 2].
        sha256: of the file it was read from; "" if there is no file.
    """

    layers: tuple[Layer, ...]
    mean: Layer
    log_std: Layer
    sha256: str = ""

    @property
    def dims(self) -> tuple[int, int]:
        """The widths S and A of an observation and an action."""
        return len((self.layers or (self.mean,))[0][0]), len(self.mean[1])

    def act(self, observation: Array, generator: np.random.Generator | None) -> Array:
        """Sample an action [A] in [-1, 1] for an observation [S]; without a generator, take the mode."""
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
        """Read a behaviour's file.

        Raises:
            DataError: the file is missing, isn't safetensors, or holds another network.
        """
        try:
            content = path.read_bytes()
            tensors = safetensors.numpy.load(content)
        except (OSError, safetensors.SafetensorError) as error:
            text = f"{path.name}: can't be read ({error}): expected a behaviour's weights"
            raise DataError(text) from error
        return cls.from_tensors(tensors, path.name, hashlib.sha256(content).hexdigest())

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Any], where: str = "behaviour", sha256: str = ""
    ) -> Behaviour:
        """Build a behaviour from named arrays; `where` names them in an error.

        Raises:
            DataError: a name is missing, the shapes don't fit together, or a weight isn't finite.
        """
        count = sum(key.startswith("layers.") and key.endswith(".weight") for key in tensors)
        names = [*(f"layers.{k}" for k in range(count)), "mean", "log_std"]
        expected = [f"{name}.{part}" for name in names for part in PARTS]
        if missing := [key for key in expected if key not in tensors]:
            raise DataError(f"{where}: no {missing[0]}: expected it among {', '.join(tensors) or 'nothing'}")
        arrays = [np.ascontiguousarray(tensors[key], np.float32) for key in expected]
        layers = list(zip(arrays[::2], arrays[1::2], strict=True))
        *hidden, mean, log_std = layers
        fit = all(weight.ndim == 2 and bias.shape == weight.shape[1:] for weight, bias in layers)
        fit = fit and mean[0].shape == log_std[0].shape
        if not fit or any(len(b[0]) != len(a[1]) for a, b in itertools.pairwise((*hidden, mean))):
            shapes = [[*array.shape] for array in arrays]
            raise DataError(
                f"{where}: shapes {shapes}: expected each layer to take what the one before gives"
            )
        if not all(np.isfinite(array).all() for array in arrays):
            raise DataError(f"{where}: holds NaN or infinity: expected finite weights")
        return cls(tuple(hidden), mean, log_std, sha256)

    def to_tensors(self) -> dict[str, Array]:
        """The weights by their names in a file."""
        names = [*(f"layers.{k}" for k in range(len(self.layers))), "mean", "log_std"]
        layers = zip(names, (*self.layers, self.mean, self.log_std), strict=True)
        return {f"{name}.{part}": layer[k] for name, layer in layers for k, part in enumerate(PARTS)}


class Step(NamedTuple):
    """One step in an environment; the action [A] is in [-1, 1], whatever the environment's bounds are."""

    observation: Array
    action: Array
    reward: float
    next_observation: Array
    terminated: bool
    truncated: bool


def steps(
    task: Task, behaviour: Behaviour | None, seed: np.random.SeedSequence, *, sampled: bool = True
) -> Generator[Step]:
    """Act in a task's environment without end, one episode after another.

    Args:
        task: its environment, observations and reset options.
        behaviour: the policy; None takes uniform actions.
        seed: of the environment's first episode (the later ones follow from it) and of the actions.
        sampled: whether to sample the behaviour's actions or take their mode.

    Raises:
        DataError: the behaviour's widths aren't the environment's.
    """
    # Gymnasium's checker would wrap every step.
    environment = make_task_environment(task, disable_env_checker=True)
    dims = widths(environment)
    if behaviour is not None and behaviour.dims != dims:
        raise DataError(
            "{}: a behaviour of widths {} and {}: expected {} and {}".format(task.id, *behaviour.dims, *dims)
        )
    low, high = action_bounds(environment)
    generator = np.random.default_rng(seed)
    with contextlib.closing(environment):
        observation = np.array(environment.reset(seed=int(seed.generate_state(1)[0]))[0], np.float32)
        while True:
            if behaviour is None:
                action = generator.uniform(-1, 1, dims[1]).astype(np.float32)
            else:
                action = behaviour.act(observation, generator if sampled else None)
            scaled = low + (action + 1) * ((high - low) / 2)
            found, reward, terminated, truncated, _ = environment.step(scaled)
            following = np.array(found, np.float32)
            yield Step(observation, action, float(reward), following, bool(terminated), bool(truncated))
            over = terminated or truncated
            observation = np.array(environment.reset()[0], np.float32) if over else following


def rollout(
    task: Task, behaviour: Behaviour | None, count: int, seed: np.random.SeedSequence
) -> dict[str, NDArray[Any]]:
    """Collect transitions in D4RL's layout; the last episode is cut without a flag.

    Rewards and flags are the environment's own: one that ends when the task is solved (antmaze, kitchen)
    gives a terminal there. A step with both flags is a timeout only, as in D4RL's files.

    Args:
        task: see `steps`, as are `behaviour` and `seed`.
        behaviour: the policy, whose actions are sampled; None takes uniform actions.
        count: N, the number of transitions.
        seed: the same seed gives the same rows.

    Returns:
        observations [N, S], actions [N, A], rewards [N] and next_observations [N, S] as float32;
        terminals [N] and timeouts [N] as bool, never both in one row.
    """
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    with contextlib.closing(steps(task, behaviour, seed)) as acting:
        columns = zip(*itertools.islice(acting, count), strict=True)
        types = [np.float32] * 4 + [np.bool_] * 2
        made = {key: np.array(*each) for key, *each in zip(keys, columns, types, strict=True)}
    made["terminals"] &= ~made["timeouts"]
    return made
