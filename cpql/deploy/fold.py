"""From modules to a folded policy: constants of acting go into the weights of the first layers.

Another kind of actor takes one function here and a row in `FOLDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpql.actors import Actor, ConsistencyActor, DeterministicActor
from cpql.critics import TwinCritic
from cpql.deploy.config import PolicyConfig
from cpql.deploy.folded import FoldedActor, FoldedCritic, FoldedPolicy, Layer, Step
from cpql.networks import MLP, LayerNorm, Linear

__all__ = ["FOLDS", "fold"]


@torch.no_grad()
def fold(actor: Actor, critic: TwinCritic | None, config: PolicyConfig) -> FoldedPolicy:
    """Fold a policy's modules into numpy arrays of float32; `FoldedPolicy.with_rule` chooses how it acts.

    There is no critic for a deterministic actor, whose candidates would all be the same.
    """
    critics: tuple[FoldedCritic, ...] = ()
    if critic is not None and actor.draws:
        critics = tuple(_critic(critic, k, config) for k in range(2))
    return FoldedPolicy(FOLDS[config.actor.kind](actor, config), critics)


def _consistency(actor: ConsistencyActor, config: PolicyConfig) -> FoldedActor:
    p, levels, device = actor.parameterisation, actor.levels, next(actor.parameters()).device
    (first, bias), layers = _layers(actor.mlp)
    widths = [actor.action_dim, p.times * actor.config.time_width, actor.state_dim]
    x_part, time_part, state_part = torch.split(first, widths, -1)
    steps = []
    for k, level in enumerate((levels.t_max, *actor.config.refinements)):
        t = torch.tensor(level, dtype=torch.float64)
        embedding = actor.embed(*[p.c_time(t).float().to(device)] * p.times).double().cpu()
        spread = level if k == 0 else math.sqrt(level**2 - levels.t_min**2)
        weight, offset = (p.c_in(t) * x_part).T, time_part @ embedding
        steps.append(Step(spread, float(p.c_skip(t)), float(p.c_out(t)), _array(weight), _array(offset)))
    return FoldedActor(
        *_first(state_part, bias, config),
        layers,
        *_bounds(config),
        tuple(steps),
        inside=actor.config.clamp == "inside",
        tanh=actor.config.action_norm,
    )


def _deterministic(actor: DeterministicActor, config: PolicyConfig) -> FoldedActor:
    first, layers = _layers(actor.mlp)
    return FoldedActor(*_first(*first, config), layers, *_bounds(config), activation=actor.config.activation)


FOLDS: Mapping[str, Callable[[Any, PolicyConfig], FoldedActor]] = {
    "consistency": _consistency,
    "deterministic": _deterministic,
}


def _critic(critic: TwinCritic, k: int, config: PolicyConfig) -> FoldedCritic:
    """One of the twin critics."""
    (first, bias), layers = _layers(critic.q, k)
    state_part, action_part = torch.split(first, [config.state_dim, config.action_dim], -1)
    weight, bias = _first(state_part, bias, config)
    return FoldedCritic(weight, _array(action_part.T), bias, layers, config.critic_activation)


def _layers(mlp: MLP, *member: int) -> tuple[tuple[Tensor, Tensor], tuple[Layer, ...]]:
    """The first layer's weight [out, in] and bias of an MLP's member, in float64, and the folded others."""
    first, *others = mlp.layers
    layers: list[Layer] = []
    norm: tuple[Any, ...] = ()
    for module in others:
        if isinstance(module, LayerNorm):
            norm = (_array(module.weight[member]), _array(module.bias[member]))
        elif isinstance(module, Linear):
            layers.append(Layer(_array(module.weight[member].T), _array(module.bias[member]), *norm))
            norm = ()
    assert isinstance(first, Linear)
    return (first.weight[member].double().cpu(), first.bias[member].double().cpu()), tuple(layers)


def _first(weight: Tensor, bias: Tensor, config: PolicyConfig) -> tuple[Any, Any]:
    """The state's part of a first layer, [S, H] and [H], for observations that aren't normalised yet."""
    if config.observation_mean:
        mean, std = (torch.tensor(v).double() for v in (config.observation_mean, config.observation_std))
        weight = weight / std
        bias = bias - weight @ mean
    return _array(weight.T), _array(bias)


def _bounds(config: PolicyConfig) -> tuple[Any, Any]:
    low, high = (np.asarray(bound, np.float32) for bound in (config.action_low, config.action_high))
    return low, high - low


def _array(tensor: Tensor) -> Any:
    return np.array(tensor.cpu().float().numpy(), order="C")
