"""The baselines whose codes are JAX's, with our weights, batches and noise; see `measure.baselines`.

They are run without `jax.jit`, so that what they draw can be handed to them.
"""

from __future__ import annotations

import functools
import importlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor

from cpql.agents import Agent
from measure.parity import ACTION_DIM, STATE_DIM, UPDATES, Found, inputs
from measure.torch_codes import borrowed, corl_settings

__all__ = ["corl_rebrac", "fql", "iql", "rebrac"]

Flat = dict[str, Any]  # weights by their paths


@functools.cache
def jax() -> Any:
    """JAX in float64; with all that the codes import, so that borrowing doesn't import it anew."""
    for name in ("chex", "distrax", "flax.linen", "flax.training.train_state", "ml_collections", "optax"):
        importlib.import_module(name)
    module = importlib.import_module("jax")
    module.config.update("jax_enable_x64", True)
    return module


def code(folder: Path, name: str) -> ModuleType:
    """A module of a code, not compiled."""
    with mock.patch.object(jax(), "jit", lambda function=None, **_: function or (lambda f: f)):
        return borrowed(folder, name)


@contextmanager
def fed(normals: Sequence[Tensor], uniforms: Sequence[Tensor] = ()) -> Iterator[None]:
    """JAX draws these, and zeros after them, for what is only logged."""
    left = {"normal": deque(normals), "uniform": deque(uniforms)}

    def drawn(kind: str, shape: Sequence[int]) -> Any:
        value = left[kind].popleft().numpy() if left[kind] else np.zeros(shape)
        return jax().numpy.asarray(value.reshape(shape))

    with (
        mock.patch.object(jax().random, "normal", lambda _, shape: drawn("normal", shape)),
        mock.patch.object(jax().random, "uniform", lambda _, shape, **__: drawn("uniform", shape)),
    ):
        yield
    assert not any(left.values())


def mlp(prefix: str, hidden: int, norm: bool = False) -> list[str]:
    """The layers of an MLP, in our order."""
    kinds = ["Dense", "LayerNorm"] if norm else ["Dense"]
    return [f"{prefix}{kind}_{i}" for i in range(hidden + 1) for kind in (kinds if i < hidden else ["Dense"])]


def tensors(layers: Sequence[str | tuple[str, ...]], tree: Flat) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The paths of each of our tensors, two for twins that are two networks, and whether it is transposed."""
    for layer in layers:
        names = (layer,) if isinstance(layer, str) else layer
        if names[0] in tree:
            yield names, False
            continue
        weight = "kernel" if f"{names[0]}/kernel" in tree else "scale"
        for leaf in (weight, "bias"):
            yield tuple(f"{name}/{leaf}" for name in names), leaf == "kernel"


def put(
    tree: Flat, layers: Sequence[Any], weights: Tensor, columns: Mapping[str, Sequence[int]] | None = None
) -> Flat:
    """Their weights with ours in these layers; `columns` are ours in the order of their inputs."""
    tree, start = dict(tree), 0
    for names, transposed in tensors(layers, tree):
        for name in names:
            shape, size = tree[name].shape, tree[name].size
            ours = weights[start : start + size].numpy()
            start += size
            if transposed:
                ours = ours.reshape(*shape[:-2], shape[-1], shape[-2])
                ours = ours[..., list((columns or {}).get(name, range(shape[-2])))].swapaxes(-1, -2)
            tree[name] = jax().numpy.asarray(ours.reshape(shape))
    assert start == len(weights)
    return tree


def take(tree: Flat, layers: Sequence[Any], columns: Mapping[str, Sequence[int]] | None = None) -> Tensor:
    """Their weights in these layers, flat in our order."""
    parts = []
    for names, transposed in tensors(layers, tree):
        for name in names:
            theirs = np.asarray(tree[name])
            if transposed:
                order = np.argsort((columns or {}).get(name, range(theirs.shape[-2])))
                theirs = theirs.swapaxes(-1, -2)[..., order]
            parts.append(torch.tensor(theirs).flatten())
    return torch.cat(parts)


def flat(tree: Any) -> Flat:
    """Nested weights by path."""
    found: Flat = importlib.import_module("flax").traverse_util.flatten_dict(_plain(tree), sep="/")
    return found


def nested(tree: Flat) -> Any:
    """The inverse."""
    return importlib.import_module("flax").traverse_util.unflatten_dict(tree, sep="/")


def _plain(tree: Any) -> Any:
    return importlib.import_module("flax.core").unfreeze(tree)


def arrays(agent: Agent) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Batch and noise of each update; the batch's columns by every name that a code has for them."""
    for batch, noise in inputs(agent):
        columns = {name: one.numpy() for name, one in batch._asdict().items() if one is not None}
        columns |= {"states": columns["observations"], "next_states": columns["next_observations"]}
        columns |= {"masks": columns["discounts"], "dones": 1.0 - columns["discounts"]}
        columns["mc_returns"] = np.full_like(columns["rewards"], -np.inf)
        yield {name: jax().numpy.asarray(one) for name, one in columns.items()}, noise


def fql(agent: Agent, task: str, folder: Path) -> Found:
    """The authors' FQL."""
    c = agent.config
    module = code(folder, "agents.fql")
    config = module.get_config()
    config.actor_hidden_dims, config.value_hidden_dims = c.actor.hidden, c.critic_hidden
    config.update(discount=c.discount, alpha=c.alpha, q_agg=c.q_aggregation)
    config.normalize_q_loss = c.q_loss == "normalised"
    theirs = module.FQLAgent.create(0, np.zeros((1, STATE_DIM)), np.zeros((1, ACTION_DIM)), config)
    one, flow = (f"modules_actor_{name}_flow/mlp/" for name in ("onestep", "bc"))
    hidden = len(c.critic_hidden)
    layers = {
        "actor": mlp(one, len(c.actor.hidden)) + mlp(flow, len(c.actor.flow.hidden)),
        "critic": mlp("modules_critic/value_net/", hidden, norm=True),
        "critic_target": mlp("modules_target_critic/value_net/", hidden, norm=True),
    }
    a, s = ACTION_DIM, STATE_DIM  # ours take x, t, s, theirs s, x, t
    columns = {
        f"{one}Dense_0/kernel": [*range(a, a + s), *range(a)],
        f"{flow}Dense_0/kernel": [*range(a + 1, a + 1 + s), *range(a + 1)],
    }
    tree = flat(theirs.network.params)
    for name, ours in layers.items():
        tree = put(tree, ours, agent.state[name], columns)
    params = nested(tree)
    network = theirs.network.replace(params=params, opt_state=theirs.network.tx.init(params))
    theirs = theirs.replace(network=network)
    losses: dict[str, list[float]] = {"critic": [], "actor": []}
    for batch, noise in arrays(agent):
        with fed([noise["next"], noise["z"], noise["start"]], [noise["u"]]):
            theirs, found = theirs.update(batch)
        for name, values in losses.items():
            values.append(float(found[f"{name}/{name}_loss"]))
    tree = flat(theirs.network.params)
    return Found(losses, {name: take(tree, ours, columns) for name, ours in layers.items()})


def _rebrac(agent: Agent, module: ModuleType, c: Mapping[str, Any]) -> Found:
    """ReBRAC by either copy of its code."""
    width = agent.config.critic_hidden[0]
    optax = importlib.import_module("optax")
    key, state, action = jax().random.PRNGKey(0), np.zeros((1, STATE_DIM)), np.zeros((1, ACTION_DIM))
    actor_module = module.DetActor(ACTION_DIM, width, layernorm=c["actor_ln"], n_hiddens=c["actor_n_hiddens"])
    critic_module = module.EnsembleCritic(
        width, num_critics=2, layernorm=c["critic_ln"], n_hiddens=c["critic_n_hiddens"]
    )
    layers = {
        "actor": mlp("params/", c["actor_n_hiddens"]),
        "critic": mlp("params/VmapCritic_0/", c["critic_n_hiddens"], norm=True),
    }

    def made(name: str, kind: Any, network: Any, *example: Any) -> Any:
        tree = flat(network.init(key, *example))
        trees = [nested(put(tree, layers[name], agent.state[f"{name}{end}"])) for end in ("", "_target")]
        optimiser = optax.adam(learning_rate=c[f"{name}_learning_rate"])
        return kind.create(apply_fn=network.apply, params=trees[0], target_params=trees[1], tx=optimiser)

    actor = made("actor", module.ActorTrainState, actor_module, state)
    critic = made("critic", module.CriticTrainState, critic_module, state, action)
    shared = {
        name: c[name]
        for name in ("actor_bc_coef", "critic_bc_coef", "gamma", "noise_clip", "policy_noise", "tau")
    }
    names = ["critic_loss", "q_min", "actor_loss", "bc_mse_policy", "bc_mse_random", "action_mse"]
    losses: dict[str, list[float]] = {"critic": [], "actor": []}
    for step, (batch, noise) in enumerate(arrays(agent)):
        steps_actor = (step + 1) % c["policy_freq"] == 0
        given = {"actor": actor, "critic": critic, "batch": batch, "metrics": module.Metrics.create(names)}
        given |= {name: c[name] for name in shared}
        with fed([noise["next_action"]]):
            if steps_actor:
                found = module.update_td3(key, normalize_q=c["normalize_q"], **given)
            else:
                found = module.update_td3_no_targets(key, **given)
        _, actor, critic, measured = found
        for name in ("critic", "actor") if steps_actor else ("critic",):
            losses[name].append(float(measured.accumulators[f"{name}_loss"][0][0]))
    weights = {}
    for name, trained in (("actor", actor), ("critic", critic)):
        weights[name] = take(flat(trained.params), layers[name])
        weights[f"{name}_target"] = take(flat(trained.target_params), layers[name])
    return Found(losses, weights)


def corl_rebrac(agent: Agent, task: str, folder: Path) -> Found:
    """CORL's copy of ReBRAC."""
    module = code(folder, "algorithms.offline.rebrac")
    return _rebrac(agent, module, vars(corl_settings(folder, "rebrac", task)))


def iql(agent: Agent, task: str, folder: Path) -> Found:
    """The authors' IQL."""
    kind = "antmaze" if "antmaze" in task else "mujoco"
    config = dict(code(folder, f"configs.{kind}_config").get_config())
    flax = importlib.import_module("flax")
    with (  # as in their day
        flax.config.temp_flip_flag("return_frozendict", True),
        mock.patch.object(jax(), "tree_multimap", jax().tree_util.tree_map, create=True),
    ):
        module = code(folder, "learner")
        states, actions = np.zeros((1, STATE_DIM)), np.zeros((1, ACTION_DIM))
        config["hidden_dims"] = agent.config.critic_hidden
        theirs = module.Learner(0, states, actions, max_steps=UPDATES, **config)
        twins = [(f"Critic_0/MLP_0/Dense_{i}", f"Critic_1/MLP_0/Dense_{i}") for i in range(3)]
        layers: dict[str, list[Any]] = {
            "actor": ["log_stds", *mlp("MLP_0/", 1), "Dense_0"],
            "value": mlp("MLP_0/", 2),
            "critic": twins,
            "critic_target": twins,
        }
        attributes = {name: name for name in layers} | {"critic_target": "target_critic"}
        for name, attribute in attributes.items():
            model = getattr(theirs, attribute)
            params = nested(put(flat(model.params), layers[name], agent.state[name]))
            moments = model.opt_state if model.tx is None else model.tx.init(params)
            setattr(theirs, attribute, model.replace(params=params, opt_state=moments))
        losses: dict[str, list[float]] = {"critic": [], "actor": [], "value": []}
        columns = ("observations", "actions", "rewards", "masks", "next_observations")
        for batch, _ in arrays(agent):
            found = theirs.update(module.Batch(*(batch[name] for name in columns)))
            for name, values in losses.items():
                # Ours is the twins' mean.
                values.append(float(found[f"{name}_loss"]) * (0.5 if name == "critic" else 1.0))
    trees = {name: flat(getattr(theirs, attribute).params) for name, attribute in attributes.items()}
    return Found(losses, {name: take(tree, layers[name]) for name, tree in trees.items()})


def rebrac(agent: Agent, task: str, folder: Path) -> Found:
    """The authors' ReBRAC."""
    robot, dataset = task.removesuffix("-v2").replace("-", "_").split("_", 1)
    file = folder / "configs" / "rebrac" / robot / f"{robot}_{dataset}.yaml"
    module = code(folder, "src.algorithms.rebrac")
    return _rebrac(agent, module, yaml.safe_load(file.read_text()))
