"""A policy as a few products of arrays: all that acting needs, for numpy alone or for torch.

    policy = load("policy.npz")                              # written by `scripts/export.py format=numpy`
    action = policy(observation, **policy.draw(np.random.default_rng()))

This file imports numpy and the standard library, and may be copied to where neither torch nor cpql is.

At a fixed noise level the time embedding is a constant, so it folds into the first layer's bias; so do c_in
and the normalisation of observations into its weights. What is left of an action is a few matrix products,
with the noise as an input, so that it is the same everywhere:

    h = observation W_s + b                                        once
    x = c_skip x + c_out MLP(x W_x + h + b_t)                      for each sampling level t, x noised to t
    action = low + (clip(x, -1, 1) + 1) / 2 (high - low)

The critics that rank candidates are folded too: the state's part of their first product is the same for all.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

__all__ = ["FoldedActor", "FoldedCritic", "FoldedPolicy", "Layer", "Step", "load", "pick"]

FORMAT = 1
# What `load` takes: a file may be a stranger's, and says itself how large it is.
MOST_DIRECTORY_BYTES = 1 << 20
MOST_HEAD_BYTES = 4 << 20
MOST_STEPS = 1_000
MOST_CANDIDATES = 10_000
LARGEST = 1e10  # of a weight: float32 ends at 3e38, which products of much larger ones reach
# How numpy writes the type and shape of what `FoldedPolicy.save` gives it.
HEADER = re.compile(
    rb"\{'descr': '(<f4|<U\d+)', 'fortran_order': False, 'shape': \(((?:\d+, ?)*\d*)\), \} *\n", re.ASCII
)


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
    """Mish and a product, before them a LayerNorm where there is one: `Mish(norm(x)) weight + bias`."""

    weight: Any  # [in, out]
    bias: Any  # [out]
    norm: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class FoldedActor:
    """A policy's actor without its structure: arrays of numpy or torch, weights as [in, out].

    Attributes:
        state_weight: [S, H] and
        state_bias: [H], the first layer for observations as the environment gives them.
        steps: one for each sampling level.
        layers: those after it.
        low: lower bounds [A] of actions.
        span: upper minus lower bounds [A].
        inside: clamp after every step, not just at the end.
        tanh: noise actions before a tanh, see `cpql.consistency.perturb`.
    """

    state_weight: Any
    state_bias: Any
    steps: tuple[Step, ...]
    layers: tuple[Layer, ...]
    low: Any
    span: Any
    inside: bool
    tanh: bool

    def sample(self, observation: Any, noise: Any, xp: ModuleType = np) -> Any:
        """Draw actions in [-1, 1].

        Args:
            observation: [..., S], as the environment gives it.
            noise: standard normal, [steps, ..., A], or what broadcasts against it; zeros are the
                deterministic policy.
            xp: numpy, or torch where the arrays are tensors.

        Returns:
            Actions [..., A].
        """
        return self._unclamped(observation, noise, xp).clip(-1.0, 1.0)

    def _unclamped(self, observation: Any, noise: Any, xp: ModuleType) -> Any:
        """What the last step makes, before it is clamped."""
        shared = observation @ self.state_weight + self.state_bias
        x: Any = None
        for k, step in enumerate(self.steps):
            z = step.spread * noise[k]
            if self.inside and x is not None:
                x = x.clip(-1.0, 1.0)
            if self.tanh:
                x = xp.tanh(z if x is None else xp.arctanh(x.clip(-0.999, 0.999)) + z)
            else:
                x = z if x is None else x + z
            y = _layers(x @ step.weight + (shared + step.bias), self.layers, xp)
            x = step.c_skip * x + step.c_out * y
        return x

    def scale(self, action: Any) -> Any:
        """Actions in [-1, 1] as the environment wants them."""
        return self.low + (action + 1.0) * (0.5 * self.span)

    def __call__(self, observation: Any, noise: Any, xp: ModuleType = np) -> Any:
        """Act: `sample` in the environment's bounds."""
        return self.scale(self.sample(observation, noise, xp))

    def finite(self) -> bool:
        """Whether numpy's arrays overflow nowhere, for observations and noise ten times the usual size."""
        # Of so few rows BLAS makes no work for a second thread, which would take longer.
        random = np.random.default_rng(0)
        observation, noise = (
            10.0 * random.standard_normal(shape, np.float32)
            for shape in ((4, len(self.state_weight)), (len(self.steps), 4, len(self.low)))
        )
        # Each step alone too: a clamp between them would hide an infinity.
        actors = (self, *(replace(self, steps=(step,)) for step in self.steps))
        with np.errstate(all="ignore"):
            return all(np.isfinite(actor._unclamped(observation, noise, np)).all() for actor in actors)

    def to(self, device: Any) -> FoldedActor:
        """The same with tensors on a torch device in the place of numpy's arrays.

        Hidden layers give the negative of what they gave, as `_mish` wants it of tensors.
        """
        sign = _sign(self.layers)
        return FoldedActor(
            _tensor(self.state_weight, device, sign),
            _tensor(self.state_bias, device, sign),
            tuple(
                Step(
                    s.spread,
                    s.c_skip,
                    s.c_out,
                    _tensor(s.weight, device, sign),
                    _tensor(s.bias, device, sign),
                )
                for s in self.steps
            ),
            _tensors(self.layers, device),
            _tensor(self.low, device),
            _tensor(self.span, device),
            self.inside,
            self.tanh,
        )


@dataclass(frozen=True)
class FoldedCritic:
    """A policy's twin critic for the values of many actions of a state: what they share is computed once.

    Weights are [in, out], a tuple's items one a critic.

    Attributes:
        state_weight: [S, H], for observations as the environment gives them, and
        action_weight: [A, H], for actions in [-1, 1], and
        bias: [H], the first layer.
        layers: those after it.
    """

    state_weight: tuple[Any, ...]
    action_weight: tuple[Any, ...]
    bias: tuple[Any, ...]
    layers: tuple[tuple[Layer, ...], ...]

    def __call__(self, observation: Any, action: Any, xp: ModuleType = np) -> Any:
        """Both values [2, ..., C] of observations [..., 1, S] and actions [..., C, A]."""
        values = []
        for k, layers in enumerate(self.layers):
            shared = observation @ self.state_weight[k] + self.bias[k]
            values.append(_layers(action @ self.action_weight[k] + shared, layers, xp)[..., 0])
        return xp.stack(values)

    def to(self, device: Any) -> FoldedCritic:
        """As `FoldedActor.to`."""

        def first(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
            pairs = zip(arrays, self.layers, strict=True)
            return tuple(_tensor(array, device, _sign(layers)) for array, layers in pairs)

        return FoldedCritic(
            first(self.state_weight),
            first(self.action_weight),
            first(self.bias),
            tuple(_tensors(layers, device) for layers in self.layers),
        )


@dataclass(frozen=True)
class FoldedPolicy:
    """A whole policy: the actor alone, or one of several of its actions, by their values.

    Attributes:
        actor: draws actions.
        critic: ranks them, where there are several.
        candidates: how many; 1 is the actor alone.
        temperature: of the choice, see `pick`; 0 for the actor alone.
        description: what it was exported from.
    """

    actor: FoldedActor
    critic: FoldedCritic | None = None
    candidates: int = 1
    temperature: float = 0.0
    description: dict[str, Any] = field(default_factory=dict)

    def shapes(self, *batch: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what acting takes besides observations [*batch, S], by name.

        `noise` is standard normal, [steps, *batch, A], with C candidates [steps, *batch, C, A]. Candidates
        and a temperature take `uniform` too, in [0, 1), [*batch, C].
        """
        rows = batch if self.critic is None else (*batch, self.candidates)
        shapes = {"noise": (len(self.actor.steps), *rows, len(self.actor.low))}
        return shapes | ({"uniform": rows} if self.temperature > 0 else {})

    def draw(self, generator: np.random.Generator, *batch: int) -> dict[str, Any]:
        """Draw it: numpy arrays of float32."""
        return {
            name: (generator.random if name == "uniform" else generator.standard_normal)(shape, np.float32)
            for name, shape in self.shapes(*batch).items()
        }

    def __call__(self, observation: Any, noise: Any, uniform: Any = None, xp: ModuleType = np) -> Any:
        """Act, in the environment's bounds.

        Args:
            observation: [..., S], as the environment gives it.
            noise: as `draw` gives it.
            uniform: likewise; 0.5 everywhere takes the best.
            xp: numpy, or torch where the arrays are tensors.

        Returns:
            Actions [..., A].
        """
        if self.critic is None:
            return self.actor(observation, noise, xp)
        rows = observation[..., None, :]
        actions = self.actor.sample(rows, noise, xp)
        values = xp.amin(self.critic(rows, actions, xp), 0)
        return self.actor.scale(pick(actions, values, uniform, self.temperature, xp))

    def to(self, device: Any) -> FoldedPolicy:
        """As `FoldedActor.to`."""
        critic = None if self.critic is None else self.critic.to(device)
        return FoldedPolicy(
            self.actor.to(device), critic, self.candidates, self.temperature, self.description
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write numpy's arrays as an NPZ file, which `load` reads."""
        alone = ("state_weight", "state_bias", "low", "span")
        arrays = {f"actor.{name}": getattr(self.actor, name) for name in alone}
        for k, step in enumerate(self.actor.steps):
            arrays |= {f"actor.steps.{k}.weight": step.weight, f"actor.steps.{k}.bias": step.bias}
        arrays |= _named(self.actor.layers, "actor")
        if self.critic is not None:
            for k, layers in enumerate(self.critic.layers):
                arrays[f"critic.{k}.state_weight"] = self.critic.state_weight[k]
                arrays[f"critic.{k}.action_weight"] = self.critic.action_weight[k]
                arrays[f"critic.{k}.bias"] = self.critic.bias[k]
                arrays |= _named(layers, f"critic.{k}")
        head = {
            "format": FORMAT,
            "steps": [[step.spread, step.c_skip, step.c_out] for step in self.actor.steps],
            "inside": self.actor.inside,
            "tanh": self.actor.tanh,
            "candidates": self.candidates,
            "temperature": self.temperature,
            "description": self.description,
        }
        with open(path, "wb") as file:
            np.savez(file, head=np.array(json.dumps(head, allow_nan=False)), **arrays)


def load(path: str | PathLike[str]) -> FoldedPolicy:
    """Read a policy from an NPZ file, which may be a stranger's.

    Nothing is unpickled or decompressed, and no more is read than the file is long. What is in it is checked:
    shapes against each other, and that actions are finite numbers.

    Raises:
        ValueError: it isn't one that `FoldedPolicy.save` wrote, or it is damaged.
        OSError: there is no such file, or it can't be read.
    """
    with open(path, "rb") as file:
        try:
            return _policy(_read(file))
        except Exception as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            reason = " ".join(reason.split())
            raise ValueError(f"{Path(path)}: not an exported policy: {reason[:500]}") from error


def _read(file: BinaryIO) -> dict[str, Any]:
    """The arrays of an NPZ file by name, `head` as text."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 42))
    # The end record and what is before it, where ZIP64 would have a longer record looked for.
    before, signature, directory, comment = struct.unpack("<4s16x4s8xL4xH", file.read())
    if signature != b"PK\5\6" or before == b"PK\6\7" or comment or directory > MOST_DIRECTORY_BYTES:
        raise ValueError("expected a ZIP file as numpy writes it")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = all(
            entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            for entry in entries
        )
        names = [entry.filename.removesuffix(".npy") for entry in entries]
        if not stored or len(set(names)) != len(names) or sum(e.file_size for e in entries) > size:
            raise ValueError("expected arrays that are stored as they are, each once")
        contents = map(archive.read, entries)
        return {name: _array(name, content) for name, content in zip(names, contents, strict=True)}


def _array(name: str, content: bytes) -> Any:
    """An array of float32, or a text, from what numpy writes of it."""
    magic, length = content[:8], int.from_bytes(content[8:10], "little")
    header, body = HEADER.fullmatch(content[10 : 10 + length]), content[10 + length :]
    if magic != b"\x93NUMPY\1\0" or header is None:
        raise ValueError(f"{name[:100]}: expected an array of float32, or a text, as numpy writes it")
    kind = header[1].decode()
    shape = [int(n) for n in header[2].decode().split(",") if n.strip()]
    width = 4 if kind == "<f4" else 4 * int(kind[2:])
    if width * math.prod(shape) != len(body):
        raise ValueError(f"{name[:100]}: expected {len(body):,} bytes, as there are, found shape {shape[:9]}")
    if kind != "<f4":
        if len(body) > MOST_HEAD_BYTES:
            raise ValueError(f"{name[:100]}: expected at most {MOST_HEAD_BYTES:,} bytes, found {len(body):,}")
        return body.decode("utf-32-le")
    array = np.frombuffer(body, "<f4").reshape(shape).copy()
    if not (np.abs(array) <= LARGEST).all():
        raise ValueError(f"{name[:100]}: expected finite numbers of at most {LARGEST:g}, found others")
    return array


def _policy(arrays: dict[str, Any]) -> FoldedPolicy:
    """The policy whose arrays these are, each of the shape that the others ask for."""
    head = json.loads(arrays.pop("head"))
    if head["format"] != FORMAT:
        raise ValueError(f"format {head['format']}, expected {FORMAT}")
    candidates, temperature, description = (head[k] for k in ("candidates", "temperature", "description"))
    if type(candidates) is not int or not 1 <= candidates <= MOST_CANDIDATES:
        raise ValueError(f"candidates: expected 1 to {MOST_CANDIDATES:,}, found {candidates}")
    if not _finite(temperature) or temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, found {temperature}")
    if not all(isinstance(head[key], bool) for key in ("inside", "tanh")) or type(description) is not dict:
        raise ValueError("inside, tanh, description: expected true or false, and an object")
    if not 1 <= len(head["steps"]) <= MOST_STEPS:
        raise ValueError(f"steps: expected 1 to {MOST_STEPS:,}, found {len(head['steps']):,}")

    def take(name: str, *shape: int | None) -> Any:
        """An array of this shape; None is any number."""
        array = arrays.pop(name)
        found = np.shape(array)
        fits = len(found) == len(shape) and all(
            m > 0 and n in (None, m) for n, m in zip(shape, found, strict=True)
        )
        if not fits:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(found)}")
        return array

    def layers(prefix: str, width: int, outputs: int) -> tuple[Layer, ...]:
        """Those after a first one of this width."""
        found: list[Layer] = []
        while f"{(name := f'{prefix}.layers.{len(found)}')}.weight" in arrays:
            norm = None
            if f"{name}.norm_weight" in arrays:
                norm = take(f"{name}.norm_weight", width), take(f"{name}.norm_bias", width)
            weight = take(f"{name}.weight", width, None)
            width = weight.shape[1]
            found.append(Layer(weight, take(f"{name}.bias", width), norm))
        if width != outputs:
            raise ValueError(f"{prefix}.layers: expected {outputs} outputs, found {width}")
        return tuple(found)

    low = take("actor.low", None)
    span = take("actor.span", len(low))
    weight = take("actor.state_weight", None, None)
    states, width = weight.shape
    bias = take("actor.state_bias", width)
    steps = []
    for k, numbers in enumerate(head["steps"]):
        spread, c_skip, c_out = numbers
        if not all(map(_finite, numbers)):
            raise ValueError(f"steps: expected finite numbers, found {numbers}")
        first = take(f"actor.steps.{k}.weight", len(low), width), take(f"actor.steps.{k}.bias", width)
        steps.append(Step(spread, c_skip, c_out, *first))
    rest = layers("actor", width, len(low))
    actor = FoldedActor(weight, bias, tuple(steps), rest, low, span, head["inside"], head["tanh"])
    critic = None
    if candidates > 1:
        parts = []
        for name in ("critic.0", "critic.1"):
            weight = take(f"{name}.state_weight", states, None)
            width = weight.shape[1]
            shared = take(f"{name}.action_weight", len(low), width), take(f"{name}.bias", width)
            parts.append((weight, *shared, layers(name, width, 1)))
        critic = FoldedCritic(*zip(*parts, strict=True))
    if arrays:
        raise ValueError(f"expected no more arrays, found {', '.join(arrays)}")
    if not (span > 0).all():
        raise ValueError("actor.span: expected upper bounds above the lower ones")
    if not actor.finite():
        raise ValueError("expected finite actions, found products that overflow")
    return FoldedPolicy(actor, critic, candidates, temperature, description)


def _finite(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def pick(action: Any, value: Any, uniform: Any, temperature: float, xp: ModuleType = np) -> Any:
    """Pick one of several actions with probability softmax(value / temperature).

    Args:
        action: [..., C, A].
        value: [..., C].
        uniform: noise [..., C] in [0, 1); not looked at with temperature 0.
        temperature: 0 picks the best.
        xp: numpy, or torch where these are tensors.

    Returns:
        Actions [..., A].
    """
    if temperature > 0:  # adding Gumbel noise and taking the maximum draws from the softmax
        value = value * (1 / temperature) - xp.log(-xp.log(uniform.clip(1e-20, 1 - 1e-7)))
    best = value.argmax(-1)[..., None, None]
    if xp is np:
        return np.take_along_axis(action, best, -2)[..., 0, :]
    return action.gather(-2, best.expand(*action.shape[:-2], 1, action.shape[-1])).squeeze(-2)


def _named(layers: tuple[Layer, ...], prefix: str) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for k, layer in enumerate(layers):
        name = f"{prefix}.layers.{k}"
        named |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        if layer.norm is not None:
            named |= {f"{name}.norm_weight": layer.norm[0], f"{name}.norm_bias": layer.norm[1]}
    return named


def _tensor(array: Any, device: Any, sign: float = 1.0) -> Any:
    import torch

    return torch.tensor(sign * array, device=device)  # a copy: products want torch's alignment


def _sign(following: tuple[Layer, ...]) -> float:
    """What a product of tensors is multiplied by: -1 where Mish comes next, see `_mish`."""
    return -1.0 if following and following[0].norm is None else 1.0


def _tensors(layers: tuple[Layer, ...], device: Any) -> tuple[Layer, ...]:
    found = []
    for k, layer in enumerate(layers):
        sign = _sign(layers[k + 1 :])
        norm = layer.norm and (_tensor(layer.norm[0], device, -1.0), _tensor(layer.norm[1], device, -1.0))
        found.append(Layer(_tensor(layer.weight, device, sign), _tensor(layer.bias, device, sign), norm))
    return tuple(found)


def _layers(y: Any, layers: tuple[Layer, ...], xp: ModuleType) -> Any:
    """What an MLP makes of its first product; may overwrite it."""
    if xp is np:
        for layer in layers:
            if layer.norm is not None:
                y = y - y.mean(-1, keepdims=True)
                y /= np.sqrt(np.mean(y * y, -1, keepdims=True) + np.float32(1e-5))
                y = y * layer.norm[0] + layer.norm[1]
            y = _mish(y, xp) @ layer.weight + layer.bias
        return y
    # As few tensors and passes over them as can be: at 50 candidates the products are but half of the time.
    rows = y.reshape(-1, y.shape[-1])
    for layer in layers:
        if layer.norm is not None:
            rows = xp.nn.functional.layer_norm(rows, rows.shape[-1:], *layer.norm)
        rows = xp.addmm(layer.bias, _mish(rows, xp), layer.weight)
    return rows.reshape(*y.shape[:-1], rows.shape[-1])


def _mish(x: Any, xp: ModuleType) -> Any:
    """Mish of numpy's `x`, or of minus a tensor `x`, which it overwrites.

    With z = -x and q = sigmoid(z), `x tanh(softplus(x))` is `z - 2 z / (1 + q^2)`: on a CPU that takes torch
    a quarter of the time of its own Mish.
    """
    if xp is not np:
        q = xp.sigmoid(x)
        return x.addcdiv_(x, q.mul_(q).add_(1.0), value=-2.0)
    n = np.exp(x.clip(max=20.0))  # one exponential, as in cpql.networks.Mish
    n *= n + 2.0
    n /= n + 2.0
    n *= x
    return n
