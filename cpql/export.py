"""A policy as a small program of its own: numpy, torch, or ONNX for everything that isn't Python.

At a fixed noise level the time embedding is a constant, so it folds into the first layer's bias; so do c_in
and the normalisation of observations into its weights. What is left of an action is a few matrix products,
with the noise as an input, so that it is the same everywhere:

    h = observation W_s + b                                        once
    x = c_skip x + c_out MLP(x W_x + h + b_t)                      for each sampling level t, x noised to t
    action = low + (clip(x, -1, 1) + 1) / 2 (high - low)

The critic that ranks candidates is folded too: with 50 candidates of a state, the state's part of its first
product is the same for all.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cpql.errors import ConfigError
from cpql.networks import LayerNorm, Linear, Mish

if TYPE_CHECKING:
    from cpql.policy import Policy

__all__ = ["FoldedActor", "FoldedCritic", "fold", "fold_critic", "to_onnx"]


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
    norm: tuple[Tensor, Tensor] | None = None


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
            y = _layers(x @ step.weight + (shared + step.bias), self.layers)
            x = step.c_skip * x + step.c_out * y
            if self.inside:
                x = x.clip(-1.0, 1.0)
        return x if self.inside else x.clip(-1.0, 1.0)

    def __call__(self, observation: Any, noise: Any, xp: ModuleType = np) -> Any:
        """Act: `sample` in the environment's bounds."""
        return self.low + (self.sample(observation, noise, xp) + 1.0) * (0.5 * self.span)

    def to(self, device: torch.device | str) -> FoldedActor:
        """The same with tensors on a device in the place of numpy's arrays.

        Hidden layers give the negative of what they gave, as `_mish` wants it of tensors.
        """

        def tensor(array: Any, sign: float = 1.0) -> Tensor:
            return torch.from_numpy(sign * array).to(device)

        signs = [-1.0] * len(self.layers) + [1.0]
        first, *rest = signs
        return FoldedActor(
            tensor(self.state_weight, first),
            tensor(self.state_bias, first),
            tuple(
                Step(s.spread, s.c_skip, s.c_out, tensor(s.weight, first), tensor(s.bias, first))
                for s in self.steps
            ),
            tuple(
                Layer(tensor(layer.weight, sign), tensor(layer.bias, sign))
                for layer, sign in zip(self.layers, rest, strict=True)
            ),
            tensor(self.low),
            tensor(self.span),
            self.inside,
            self.tanh,
        )


@dataclass(frozen=True)
class FoldedCritic:
    """A policy's twin critic for the values of many actions of a state: what they share is computed once.

    All are tensors, weights [in, out], a tuple's items one a critic; hidden layers as in `FoldedActor.to`.

    Attributes:
        state_weight: [S, H] and
        action_weight: [A, H] and
        bias: [H], the first layer.
        layers: those after it.
    """

    state_weight: tuple[Tensor, ...]
    action_weight: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    layers: tuple[tuple[Layer, ...], ...]

    def __call__(self, state: Tensor, action: Tensor) -> Tensor:
        """Both values [2, B, C] of states [B, 1, S] and actions [B, C, A], as `TwinCritic` gives them."""
        values = []
        for k, layers in enumerate(self.layers):
            shared = state @ self.state_weight[k] + self.bias[k]
            values.append(_layers(action @ self.action_weight[k] + shared, layers))
        return torch.stack(values).squeeze(-1)


def _layers(y: Any, layers: tuple[Layer, ...]) -> Any:
    """What an MLP makes of its first product; may overwrite it."""
    if not isinstance(y, Tensor):
        for layer in layers:
            y = _mish(y) @ layer.weight + layer.bias
        return y
    # As few tensors and passes over them as can be: at 50 candidates the products are but half of the time.
    rows = y.reshape(-1, y.shape[-1])
    for layer in layers:
        if layer.norm is not None:
            rows = functional.layer_norm(rows, rows.shape[-1:], *layer.norm)
        rows = torch.addmm(layer.bias, _mish(rows), layer.weight)
    return rows.reshape(*y.shape[:-1], rows.shape[-1])


def _mish(x: Any) -> Any:
    """Mish of numpy's `x`, or of minus a tensor `x`, which it overwrites.

    With z = -x and q = sigmoid(z), `x tanh(softplus(x))` is `z - 2 z / (1 + q^2)`: on a CPU that takes torch
    a quarter of the time of its own Mish.
    """
    if isinstance(x, Tensor):
        q = torch.sigmoid(x)
        return x.addcdiv_(x, q.mul_(q).add_(1.0), value=-2.0)
    n = np.exp(x.clip(max=20.0))  # one exponential, as in cpql.networks.Mish
    n *= n + 2.0
    n /= n + 2.0
    n *= x
    return n


@torch.no_grad()
def fold(policy: Policy) -> FoldedActor:
    """Fold a policy's actor into numpy arrays of float32. Its critic and candidates aren't part of it."""
    actor, config = policy.actor, policy.config
    linear = [layer for layer in actor.mlp.layers if isinstance(layer, Linear)]
    first = linear[0].weight.double()
    p, levels = actor.parameterisation, actor.levels
    times = p.times * config.actor.time_width
    x_part, time_part, state_part = torch.split(first, [config.action_dim, times, config.state_dim], -1)
    bias = linear[0].bias.double()
    if config.observation_mean:
        mean, std = (torch.tensor(v).double() for v in (config.observation_mean, config.observation_std))
        state_part = state_part / std
        bias = bias - state_part @ mean

    def array(tensor: Tensor) -> Any:
        return np.ascontiguousarray(tensor.cpu().float().numpy())

    steps = []
    for k, level in enumerate((levels.t_max, *config.actor.refinements)):
        t = torch.tensor(level, dtype=torch.float64)
        embedding = actor.embed(*[p.c_time(t).float().to(policy.device)] * p.times).double()
        spread = level if k == 0 else math.sqrt(level**2 - levels.t_min**2)
        weight, offset = (p.c_in(t) * x_part.cpu()).T, time_part @ embedding
        steps.append(Step(spread, float(p.c_skip(t)), float(p.c_out(t)), array(weight), array(offset)))
    low, high = (np.asarray(bound, np.float32) for bound in (config.action_low, config.action_high))
    return FoldedActor(
        state_weight=array(state_part.T),
        state_bias=array(bias),
        steps=tuple(steps),
        layers=tuple(Layer(array(layer.weight.T), array(layer.bias)) for layer in linear[1:]),
        low=low,
        span=high - low,
        inside=config.actor.clamp == "inside",
        tanh=config.actor.action_norm,
    )


@torch.no_grad()
def fold_critic(policy: Policy) -> FoldedCritic:
    """Copy a policy's critic, for states as its module takes them: normalised where the policy does that."""
    first, rest = [], []
    for k in range(2):
        norm: tuple[Tensor, Tensor] | None = None
        layers: list[Layer] = []
        for layer, following in itertools.pairwise([*policy.critic.q.layers, None]):
            sign = -1.0 if isinstance(following, Mish) else 1.0
            if isinstance(layer, LayerNorm):
                norm = sign * layer.weight[k], sign * layer.bias[k]
            elif isinstance(layer, Linear):
                layers.append(Layer((sign * layer.weight[k].T).contiguous(), sign * layer.bias[k], norm))
                norm = None
        first.append(layers[0])
        rest.append(tuple(layers[1:]))
    return FoldedCritic(
        tuple(layer.weight[: policy.config.state_dim] for layer in first),
        tuple(layer.weight[policy.config.state_dim :] for layer in first),
        tuple(layer.bias for layer in first),
        tuple(rest),
    )


class _Program(nn.Module):
    """A folded actor as a module, which is what torch exports."""

    def __init__(self, folded: FoldedActor) -> None:
        super().__init__()
        self.folded = folded.to("cpu")

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        action: Tensor = self.folded(observation, noise, torch)
        return action


def to_onnx(policy: Policy, path: str | Path) -> Path:
    """Write the actor alone as an ONNX file.

    Its inputs are `observation` [B, S] and `noise` [steps, B, A], standard normal or zeros; its output is
    `action` [B, A] in the environment's bounds. All are float32, and B is free.

    Args:
        policy: whose actor. Candidates and critics aren't part of it.
        path: of the file, which is written whole or not at all.

    Raises:
        ConfigError: what this needs isn't installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError("ONNX needs packages: pip install 'cpql[export]'") from None
    from cpql.data.d4rl import replacing  # acting alone doesn't load h5py

    config, path = policy.config, Path(path)
    example = (torch.zeros(2, config.state_dim), torch.zeros(policy.actor.steps, 2, config.action_dim))
    batch = torch.export.Dim("batch")
    # What the exporter says of its own parts and of torchvision is no news to whoever exports an actor.
    talker = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Program(fold(policy)),
                example,
                input_names=["observation", "noise"],
                output_names=["action"],
                dynamic_shapes=({0: batch}, {1: batch}),
                dynamo=True,
                verbose=False,
            )
    finally:
        talker.setLevel(level)
    assert program is not None
    with replacing(path) as aside:
        program.save(str(aside), external_data=False)
    return path
