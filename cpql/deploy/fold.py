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

from cpql.actors import (
    Actor,
    ConsistencyActor,
    DeterministicActor,
    DiffusionActor,
    FlowActor,
    GaussianActor,
    OneStepActor,
)
from cpql.critics import TwinCritic
from cpql.deploy.config import PolicyConfig
from cpql.deploy.folded import FoldedPolicy
from cpql.networks import MLP, LayerNorm, Linear

__all__ = ["FOLDS", "fold"]

Arrays = dict[str, Any]


@torch.no_grad()
def fold(actor: Actor, critic: TwinCritic | None, config: PolicyConfig) -> FoldedPolicy:
    """Fold a policy's modules into numpy arrays of float32; `FoldedPolicy.with_rule` chooses how it acts.

    There is no critic for a deterministic actor, whose candidates would all be the same.
    """
    arrays, head = FOLDS[config.actor.kind](actor, config)
    low, high = (np.asarray(bound, np.float32) for bound in (config.action_low, config.action_high))
    arrays |= {"actor.low": low, "actor.span": high - low}
    if critic is not None and actor.draws:
        arrays |= _critic(critic, 0, config) | _critic(critic, 1, config)
    activations = {"actor": head.pop("activation"), "critic": config.critic_activation}
    rule = {"candidates": 1, "temperature": 0.0, "description": {}, "draws": actor.draws}
    rule["norm_after"] = config.critic_layer_norm == "after"
    return FoldedPolicy(arrays, {**rule, "activations": activations, **head})


def _consistency(actor: ConsistencyActor, config: PolicyConfig) -> tuple[Arrays, dict[str, Any]]:
    p, levels, device = actor.parameterisation, actor.levels, next(actor.parameters()).device
    x_part, time_part, arrays = _denoiser(actor, p.times * actor.config.time_width, config)
    steps = []
    for k, level in enumerate((levels.t_max, *actor.config.refinements)):
        t = torch.tensor(level, dtype=torch.float64)
        embedding = actor.embed(*[p.c_time(t).float().to(device)] * p.times).double().cpu()
        arrays[f"actor.steps.{k}.weight"] = _array((p.c_in(t) * x_part).T)
        arrays[f"actor.steps.{k}.bias"] = _array(time_part @ embedding)
        spread = level if k == 0 else math.sqrt(level**2 - levels.t_min**2)
        steps.append([spread, float(p.c_skip(t)), float(p.c_out(t))])
    inside, tanh = actor.config.clamp == "inside", actor.config.action_norm
    return arrays, {"steps": steps, "inside": inside, "tanh": tanh, "activation": "mish"}


def _one_action(
    actor: DeterministicActor | GaussianActor, config: PolicyConfig
) -> tuple[Arrays, dict[str, Any]]:
    first, arrays = _layers(actor.mlp, "actor")
    arrays["actor.state_weight"], arrays["actor.state_bias"] = _first(*first, config)
    return arrays, {"steps": [], "inside": False, "tanh": False, "activation": actor.config.activation}


def _diffusion(actor: DiffusionActor, config: PolicyConfig) -> tuple[Arrays, dict[str, Any]]:
    x_part, time_part, arrays = _denoiser(actor, actor.config.time_width, config)
    steps, spread, blend = [], 1.0, (0.0, 1.0)
    for k, (a, b, c, d, s) in enumerate(actor.coefficients()):
        time = torch.tensor(actor.steps - 1.0 - k, device=next(actor.parameters()).device)
        arrays[f"actor.steps.{k}.weight"] = _array(x_part.T)
        arrays[f"actor.steps.{k}.bias"] = _array(time_part @ actor.embed(time).double().cpu())
        steps.append([spread, a, -b, *blend])
        spread, blend = s, (d, c)
    return arrays, {"steps": steps, "inside": True, "tanh": False, "activation": "mish"}


def _flow(actor: FlowActor, config: PolicyConfig) -> tuple[Arrays, dict[str, Any]]:
    x_part, time_part, arrays = _denoiser(actor, 1, config)
    for k in range(actor.steps):
        arrays[f"actor.steps.{k}.weight"] = _array(x_part.T)
        arrays[f"actor.steps.{k}.bias"] = _array(time_part[:, 0] * (k / actor.steps))
    steps = [[float(k == 0), 1.0, 1.0 / actor.steps] for k in range(actor.steps)]
    return arrays, {"steps": steps, "inside": False, "tanh": False, "activation": actor.config.activation}


def _one_step(actor: OneStepActor, config: PolicyConfig) -> tuple[Arrays, dict[str, Any]]:
    z_part, _, arrays = _denoiser(actor, 0, config)
    arrays["actor.steps.0.weight"] = _array(z_part.T)
    arrays["actor.steps.0.bias"] = _array(torch.zeros(len(z_part)))
    activation = actor.config.activation
    return arrays, {"steps": [[1.0, 0.0, 1.0]], "inside": False, "tanh": False, "activation": activation}


FOLDS: Mapping[str, Callable[[Any, PolicyConfig], tuple[Arrays, dict[str, Any]]]] = {
    "consistency": _consistency,
    "deterministic": _one_action,
    "diffusion": _diffusion,
    "flow": _flow,
    "gaussian": _one_action,
    "one_step": _one_step,
}
"""By kind of actor: its arrays and what its `head` has, see `FoldedPolicy`."""


def _denoiser(
    actor: ConsistencyActor | DiffusionActor | FlowActor | OneStepActor, times: int, config: PolicyConfig
) -> tuple[Tensor, Tensor, Arrays]:
    """The parts of a first layer for x and for `times` features of the time; the arrays of all else."""
    (first, bias), arrays = _layers(actor.mlp, "actor")
    x_part, time_part, state_part = torch.split(first, [actor.action_dim, times, actor.state_dim], -1)
    arrays["actor.state_weight"], arrays["actor.state_bias"] = _first(state_part, bias, config)
    return x_part, time_part, arrays


def _critic(critic: TwinCritic, k: int, config: PolicyConfig) -> Arrays:
    (first, bias), arrays = _layers(critic.q, f"critic.{k}", k)
    state_part, action_part = torch.split(first, [config.state_dim, config.action_dim], -1)
    arrays[f"critic.{k}.action_weight"] = _array(action_part.T)
    arrays[f"critic.{k}.state_weight"], arrays[f"critic.{k}.bias"] = _first(state_part, bias, config)
    return arrays


def _layers(mlp: MLP, name: str, *member: int) -> tuple[tuple[Tensor, Tensor], Arrays]:
    """The first layer's weight [out, in] and bias of an MLP's member, in float64; the later ones' arrays."""
    first, *others = mlp.layers
    assert isinstance(first, Linear)
    arrays, k = {}, 0
    for module in others:
        if isinstance(module, LayerNorm):
            arrays[f"{name}.layers.{k}.norm_weight"] = _array(module.weight[member])
            arrays[f"{name}.layers.{k}.norm_bias"] = _array(module.bias[member])
        elif isinstance(module, Linear):
            arrays[f"{name}.layers.{k}.weight"] = _array(module.weight[member].T)
            arrays[f"{name}.layers.{k}.bias"] = _array(module.bias[member])
            k += 1
    return (first.weight[member].double().cpu(), first.bias[member].double().cpu()), arrays


def _first(weight: Tensor, bias: Tensor, config: PolicyConfig) -> tuple[Any, Any]:
    """The state's part of a first layer, [S, H] and [H], for observations that aren't normalised yet."""
    if config.observation_mean:
        mean, std = (torch.tensor(v).double() for v in (config.observation_mean, config.observation_std))
        weight = weight / std
        bias = bias - weight @ mean
    return _array(weight.T), _array(bias)


def _array(tensor: Tensor) -> Any:
    return np.array(tensor.cpu().float().numpy(), order="C")
