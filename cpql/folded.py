"""A policy as a few products of arrays: all that acting needs, for numpy alone or for torch.

    policy = load("policy.npz")                              # written by `scripts/export.py format=numpy`
    action = policy(observation, **policy.draw(np.random.default_rng()))

This file imports numpy and nothing else, and may be copied to where neither torch nor cpql is.

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
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["FoldedActor", "FoldedCritic", "FoldedPolicy", "Layer", "Step", "load", "pick"]

FORMAT = 1


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
        shared = observation @ self.state_weight + self.state_bias
        x: Any = None
        for k, step in enumerate(self.steps):
            z = step.spread * noise[k]
            if self.tanh:
                x = xp.tanh(z if x is None else xp.arctanh(x.clip(-0.999, 0.999)) + z)
            else:
                x = z if x is None else x + z
            y = _layers(x @ step.weight + (shared + step.bias), self.layers, xp)
            x = step.c_skip * x + step.c_out * y
            if self.inside:
                x = x.clip(-1.0, 1.0)
        return x if self.inside else x.clip(-1.0, 1.0)

    def scale(self, action: Any) -> Any:
        """Actions in [-1, 1] as the environment wants them."""
        return self.low + (action + 1.0) * (0.5 * self.span)

    def __call__(self, observation: Any, noise: Any, xp: ModuleType = np) -> Any:
        """Act: `sample` in the environment's bounds."""
        return self.scale(self.sample(observation, noise, xp))

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
    """Read a policy from an NPZ file; nothing is unpickled.

    Raises:
        ValueError: it isn't one that `FoldedPolicy.save` wrote.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        head = json.loads(str(arrays["head"]))
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']}, expected {FORMAT}")
        steps = (
            Step(spread, c_skip, c_out, arrays[f"actor.steps.{k}.weight"], arrays[f"actor.steps.{k}.bias"])
            for k, (spread, c_skip, c_out) in enumerate(head["steps"])
        )
        actor = FoldedActor(
            arrays["actor.state_weight"],
            arrays["actor.state_bias"],
            tuple(steps),
            _found(arrays, "actor"),
            arrays["actor.low"],
            arrays["actor.span"],
            head["inside"],
            head["tanh"],
        )
        critic = None
        if head["candidates"] > 1:
            names = ("state_weight", "action_weight", "bias")
            first = {name: tuple(arrays[f"critic.{k}.{name}"] for k in range(2)) for name in names}
            critic = FoldedCritic(**first, layers=tuple(_found(arrays, f"critic.{k}") for k in range(2)))
    except (OSError, EOFError):
        raise
    except Exception as error:
        raise ValueError(f"{Path(path)}: not an exported policy: {error}") from error
    return FoldedPolicy(actor, critic, head["candidates"], head["temperature"], head["description"])


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


def _found(arrays: dict[str, Any], prefix: str) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    while f"{(name := f'{prefix}.layers.{len(layers)}')}.weight" in arrays:
        norm = None
        if f"{name}.norm_weight" in arrays:
            norm = arrays[f"{name}.norm_weight"], arrays[f"{name}.norm_bias"]
        layers.append(Layer(arrays[f"{name}.weight"], arrays[f"{name}.bias"], norm))
    return tuple(layers)


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
