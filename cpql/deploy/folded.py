"""A policy as a few matrix products: all that acting takes, in numpy alone or in torch.

    policy = load("policy.npz")                              # written by `scripts/export.py format=numpy`
    action = policy(observation, **policy.draw(np.random.default_rng()))

This file imports only numpy and the standard library, so it can be copied to where neither torch nor cpql is
installed.

At a fixed noise level the time embedding is a constant, which folds into the first layer's bias; c_in and the
normalisation of observations fold into its weights. An action of a consistency actor is then

    h = observation W_s + b                                        once
    x = c_skip x + c_out MLP(x W_x + h + b_t)                      for each sampling level t, x noised to t
    action = low + (clip(x, -1, 1) + 1) / 2 (high - low)

and one of a deterministic actor has x = tanh(MLP(h)). In the critics, too, the state's part of the first
layer is computed once for all candidates. Noise is an input, so that actions are the same everywhere.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

__all__ = ["FoldedActor", "FoldedCritic", "FoldedPolicy", "Layer", "Step", "load"]

FORMAT = 2  # 1 had neither deterministic actors nor activations other than Mish
# Limits of `load`: a file may come from a stranger, and it states its own sizes.
MOST_DIRECTORY_BYTES = 1 << 20
MOST_HEAD_BYTES = 4 << 20
MOST_CANDIDATES = 10_000
LARGEST = 1e10  # of a weight: products of much larger ones overflow float32, which ends at 3e38


@dataclass(frozen=True)
class Step:
    """One sampling step: `x` is noised by `spread`, then `c_skip x + c_out MLP(x weight + ... + bias)`."""

    spread: float
    c_skip: float
    c_out: float
    weight: Any  # [A, H]
    bias: Any  # [H]


@dataclass(frozen=True)
class Layer:
    """A layer after the first, with the activation before it: `activation(norm(x)) weight + bias`."""

    weight: Any  # [in, out]
    bias: Any  # [out]
    norm_weight: Any = None  # [in], of a LayerNorm, if there is one
    norm_bias: Any = None  # [in]


@dataclass(frozen=True)
class FoldedActor:
    """A policy's actor as arrays of numpy or torch.

    Attributes:
        state_weight: [S, H], the first layer's for observations as the environment gives them.
        state_bias: [H], the first layer's.
        layers: the layers after it.
        low: lower bounds [A] of actions.
        span: upper minus lower bounds [A].
        steps: one for each sampling level; none for a deterministic actor.
        inside: whether to clamp after every step, not only after the last.
        tanh: whether actions are noised before a tanh, see `cpql.consistency.perturb`.
        activation: `mish` or `relu`.
    """

    state_weight: Any
    state_bias: Any
    layers: tuple[Layer, ...]
    low: Any
    span: Any
    steps: tuple[Step, ...] = ()
    inside: bool = False
    tanh: bool = False
    activation: str = "mish"

    def sample(self, observation: Any, noise: Any = None, xp: ModuleType = np) -> Any:
        """Draw actions in [-1, 1].

        Args:
            observation: [..., S], as the environment gives it.
            noise: standard normal, [steps, ..., A], or broadcastable to it; zeros for a deterministic action.
            xp: numpy, or torch where the arrays are tensors.

        Returns:
            Actions [..., A].
        """
        x = self._unbounded(observation, noise, xp)
        return x.clip(-1.0, 1.0) if self.steps else xp.tanh(x)

    def _unbounded(self, observation: Any, noise: Any, xp: ModuleType) -> Any:
        """The output of the last step, before it is clamped (or before the tanh)."""
        shared = observation @ self.state_weight + self.state_bias
        if not self.steps:
            return _mlp(shared, self, xp)
        x: Any = None
        for k, step in enumerate(self.steps):
            z = step.spread * noise[k]
            if self.inside and x is not None:
                x = x.clip(-1.0, 1.0)
            if self.tanh:
                x = xp.tanh(z if x is None else xp.arctanh(x.clip(-0.999, 0.999)) + z)
            else:
                x = z if x is None else x + z
            x = step.c_skip * x + step.c_out * _mlp(x @ step.weight + (shared + step.bias), self, xp)
        return x

    def scale(self, action: Any) -> Any:
        """Map actions in [-1, 1] to the environment's bounds."""
        return self.low + (action + 1.0) * (0.5 * self.span)


@dataclass(frozen=True)
class FoldedCritic:
    """One critic of a policy, for the values of many actions in a state.

    Attributes:
        state_weight: [S, H], the first layer's for observations as the environment gives them.
        action_weight: [A, H], the first layer's for actions in [-1, 1].
        bias: [H], the first layer's.
        layers: the layers after it.
        activation: `mish` or `relu`.
    """

    state_weight: Any
    action_weight: Any
    bias: Any
    layers: tuple[Layer, ...]
    activation: str = "mish"

    def __call__(self, observation: Any, action: Any, xp: ModuleType = np) -> Any:
        """Values [..., C] of observations [..., 1, S] and actions [..., C, A]."""
        shared = observation @ self.state_weight + self.bias
        return _mlp(action @ self.action_weight + shared, self, xp)[..., 0]


@dataclass(frozen=True)
class FoldedPolicy:
    """A whole policy: the actor alone, or one of several of its actions, chosen by value.

    Attributes:
        actor: draws actions.
        critic: the twin critics that rank them; empty for the actor alone.
        candidates: how many actions are ranked; 1 for the actor alone.
        temperature: one is chosen with probability softmax(min(Q1, Q2) / temperature); 0 takes the best.
        description: what the policy was exported from.
    """

    actor: FoldedActor
    critic: tuple[FoldedCritic, ...] = ()
    candidates: int = 1
    temperature: float = 0.0
    description: dict[str, Any] = field(default_factory=dict)

    def with_rule(self, candidates: int, temperature: float) -> FoldedPolicy:
        """The same policy, acting by another rule; without a critic it is always the actor alone."""
        if candidates == 1 or not self.critic:
            return replace(self, critic=(), candidates=1, temperature=0.0)
        return replace(self, candidates=candidates, temperature=temperature)

    def shapes(self, *batch: Any) -> dict[str, tuple[Any, ...]]:
        """Shapes of the arguments besides observations [*batch, S], by name.

        `noise` is standard normal, [steps, *batch, A], or [steps, *batch, C, A] with C candidates; a
        deterministic actor has none. Candidates and a temperature take `uniform`, in [0, 1), [*batch, C].
        """
        rows = (*batch, self.candidates) if self.critic else batch
        steps = len(self.actor.steps)
        noise = {"noise": (steps, *rows, len(self.actor.low))} if steps else {}
        return noise | ({"uniform": rows} if self.temperature > 0 else {})

    def draw(self, generator: np.random.Generator, *batch: int) -> dict[str, Any]:
        """Draw these arguments as numpy arrays of float32."""
        return {
            name: (generator.random if name == "uniform" else generator.standard_normal)(shape, np.float32)
            for name, shape in self.shapes(*batch).items()
        }

    def __call__(self, observation: Any, noise: Any = None, uniform: Any = None, xp: ModuleType = np) -> Any:
        """Act, in the environment's bounds.

        Args:
            observation: [..., S], as the environment gives it.
            noise: as `draw` gives it.
            uniform: as `draw` gives it; 0.5 everywhere takes the best.
            xp: numpy, or torch where the arrays are tensors.

        Returns:
            Actions [..., A].
        """
        if not self.critic:
            return self.actor.scale(self.actor.sample(observation, noise, xp))
        rows = observation[..., None, :]
        actions = self.actor.sample(rows, noise, xp)
        value = reduce(xp.minimum, [critic(rows, actions, xp) for critic in self.critic])
        if self.temperature > 0:  # adding Gumbel noise and taking the maximum draws from the softmax
            value = value * (1 / self.temperature) - xp.log(-xp.log(uniform.clip(1e-20, 1 - 1e-7)))
        best = value.argmax(-1)[..., None, None]
        if xp is np:
            action = np.take_along_axis(actions, best, -2)
        else:
            action = actions.gather(-2, best.expand(*actions.shape[:-2], 1, actions.shape[-1]))
        return self.actor.scale(action[..., 0, :])

    def check(self) -> None:
        """Act for a few random observations, in numpy, and refuse a policy whose arrays don't fit together.

        Raises:
            ValueError: arrays don't fit together, or actions overflow where observations and noise are ten
                times the usual size.
        """
        # For so few rows BLAS starts no second thread, which would take longer.
        random, width, few = np.random.default_rng(0), len(self.actor.low), min(self.candidates, 2)
        policy = self.with_rule(few, self.temperature)
        observation = 10.0 * random.standard_normal((4, len(self.actor.state_weight)), np.float32)
        noise = 10.0 * random.standard_normal((len(self.actor.steps), 4, width), np.float32)
        with np.errstate(all="ignore"):
            if policy(observation, **policy.draw(random, 4)).shape != (4, width):
                raise ValueError(f"expected actions of {width} numbers, as bounds have, found others")
            # Each step by itself too: a clamp between steps would hide an infinity.
            for steps in (self.actor.steps, *zip(self.actor.steps)):
                actor = replace(self.actor, steps=steps)
                if not np.isfinite(actor._unbounded(observation, noise, np)).all():
                    raise ValueError("expected finite actions, found products that overflow")
        if not (self.actor.span > 0).all():
            raise ValueError("actor.span: expected upper bounds above the lower ones")

    def to(self, device: Any) -> FoldedPolicy:
        """The same with tensors on a torch device in place of numpy arrays."""
        import torch

        moved: FoldedPolicy = _map(self, lambda _, array: torch.tensor(array, device=device))
        return moved

    def save(self, path: str | PathLike[str]) -> None:
        """Write the policy, with numpy arrays, as an NPZ file that `load` reads."""
        head = {
            "format": FORMAT,
            "steps": [[step.spread, step.c_skip, step.c_out] for step in self.actor.steps],
            "inside": self.actor.inside,
            "tanh": self.actor.tanh,
            "activation": self.actor.activation,
            "critic_activation": self.critic[0].activation if self.critic else "mish",
            "candidates": self.candidates,
            "temperature": self.temperature,
            "description": self.description,
        }
        arrays = {"head": np.array(json.dumps(head, allow_nan=False))}
        _map(self, lambda name, array: arrays.setdefault(name[1:], array))
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)


def _map(part: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """A part of a policy with `change(path, array)` in place of each array, at `.actor.layers.0.weight`."""
    if isinstance(part, np.ndarray):
        return change(name, part)
    if isinstance(part, tuple):
        return tuple(_map(each, change, f"{name}.{k}") for k, each in enumerate(part))
    if hasattr(part, "__dataclass_fields__"):
        names = [each.name for each in fields(part)]
        return replace(part, **{each: _map(getattr(part, each), change, f"{name}.{each}") for each in names})
    return part


def load(path: str | PathLike[str]) -> FoldedPolicy:
    """Read a policy from an NPZ file, which may come from a stranger.

    Nothing is unpickled or decompressed, and no more is read than the file is long. The content is checked:
    that arrays fit together, and that actions are finite numbers.

    Raises:
        ValueError: the file is damaged, or `FoldedPolicy.save` didn't write it.
        OSError: there is no such file, or it can't be read.
    """
    with open(path, "rb") as file:
        try:
            return _policy(_read(file))
        except Exception as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            reason = " ".join(reason.split())[:500]
            raise ValueError(f"{Path(path)}: not an exported policy: {reason}") from error


def _read(file: BinaryIO) -> dict[str, Any]:
    """The arrays of an NPZ file by name."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 42))
    # The end record, and the bytes before it, which in ZIP64 point to a longer record.
    before, signature, directory, comment = struct.unpack("<4s16x4s8xL4xH", file.read())
    if signature != b"PK\5\6" or before == b"PK\6\7" or comment or directory > MOST_DIRECTORY_BYTES:
        raise ValueError("expected a ZIP file as numpy writes it")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        entries = archive.zip.infolist()
        sizes = [each.file_size for each in entries if each.compress_type == zipfile.ZIP_STORED]
        if not len(set(archive.files)) == len(entries) == len(sizes) or sum(sizes) > size:
            raise ValueError("expected arrays that are stored uncompressed, each once")
        arrays = {name: archive[name] for name in archive.files}
    for name, array in arrays.items():
        if name == "head" and array.dtype.kind == "U" and array.nbytes <= MOST_HEAD_BYTES:
            continue
        if array.dtype != "<f4" or not (np.abs(array) <= LARGEST).all():
            raise ValueError(f"{name[:100]}: expected finite float32 of at most {LARGEST:g}, found others")
    return arrays


def _policy(arrays: dict[str, Any]) -> FoldedPolicy:
    """The policy made of these arrays, once they are known to fit together."""
    head = {"activation": "mish", "critic_activation": "mish"} | json.loads(str(arrays.pop("head")))
    candidates, temperature, steps = (head[key] for key in ("candidates", "temperature", "steps"))
    for key, valid, expected in (
        ("format", head["format"] in (1, FORMAT), f"1 or {FORMAT}"),
        ("candidates", type(candidates) is int and 1 <= candidates <= MOST_CANDIDATES, "1 to 10,000"),
        ("temperature", _finite(temperature) and temperature >= 0, "0 or more"),
        ("steps", all(_finite(number) for step in steps for number in step), "finite numbers"),
        *((key, type(head[key]) is bool, "true or false") for key in ("inside", "tanh")),
        ("description", type(head["description"]) is dict, "an object"),
    ):
        if not valid:
            raise ValueError(f"{key}: expected {expected}, found {head[key]}")
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        axes = 2 if last.endswith("weight") and last != "norm_weight" else 1
        if np.ndim(array) != axes or not np.size(array):
            raise ValueError(f"{name}: expected a {axes}-D array, found shape {list(np.shape(array))}")
        reduce(lambda node, part: node.setdefault(part, {}), path, tree)[last] = array

    def layers(node: dict[str, Any]) -> tuple[Layer, ...]:
        return tuple(Layer(**each) for each in _numbered(node.pop("layers")))

    node = tree.pop("actor")
    actor = FoldedActor(
        layers=layers(node),
        steps=tuple(Step(*n, **a) for n, a in zip(steps, _numbered(node.pop("steps", {})), strict=True)),
        **{key: head[key] for key in ("inside", "tanh", "activation")},
        **node,
    )
    critic = tuple(
        FoldedCritic(layers=layers(node), activation=head["critic_activation"], **node)
        for node in _numbered(tree.pop("critic", {}))
    )
    if tree or len(critic) != (2 if candidates > 1 else 0):
        names = ", ".join(tree) or f"{len(critic)} critics"
        raise ValueError(f"expected no other arrays for candidates={candidates}, found {names}")
    policy = FoldedPolicy(actor, critic, candidates, temperature, head["description"])
    policy.check()
    return policy


def _numbered(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(node[str(k)]) for k in range(len(node))]


def _finite(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def _mlp(first: Any, network: FoldedActor | FoldedCritic, xp: ModuleType) -> Any:
    """The layers after the first, applied to the first one's output."""
    activation = ACTIVATIONS[network.activation]
    rows = first if xp is np else first.reshape(-1, first.shape[-1])
    for layer in network.layers:
        if layer.norm_weight is not None:
            rows = _layer_norm(rows, layer, xp)
        rows = activation(rows, xp)
        rows = rows @ layer.weight + layer.bias if xp is np else xp.addmm(layer.bias, rows, layer.weight)
    return rows.reshape(*first.shape[:-1], rows.shape[-1])


def _layer_norm(x: Any, layer: Layer, xp: ModuleType) -> Any:
    if xp is not np:
        return xp.nn.functional.layer_norm(x, x.shape[-1:], layer.norm_weight, layer.norm_bias)
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(1e-5))
    return x * layer.norm_weight + layer.norm_bias


def _mish(x: Any, xp: ModuleType) -> Any:
    """`x tanh(softplus(x))`, with fewer passes over the array than torch's own takes on a CPU."""
    if xp is not np:
        z = -x
        q = xp.sigmoid(z)
        return z.addcdiv_(z, q.mul_(q).add_(1.0), value=-2.0)  # z - 2 z / (1 + q^2)
    n = np.exp(x.clip(max=20.0))  # one exponential, as in cpql.networks.Mish
    n *= n + 2.0
    n /= n + 2.0
    n *= x
    return n


def _relu(x: Any, xp: ModuleType) -> Any:
    return x.clip(min=0.0)


ACTIVATIONS = {"mish": _mish, "relu": _relu}
