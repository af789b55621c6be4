"""The baselines whose codes are PyTorch's, with our weights, batches and noise; see `measure.baselines`."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from cpql.agents import Agent
from cpql.data.transitions import Batch
from measure.parity import ACTION_DIM, START, STATE_DIM, UPDATES, Found, doubles, inputs, narrowed

__all__ = ["borrowed", "corl_iql", "corl_settings", "corl_td3_bc", "diffusion_ql"]

# What the codes import for the rest of their programs.
ELSEWHERE = ("d4rl", "dateutil", "dateutil.tz", "gym", "pyrallis", "tabulate", "tqdm", "tqdm.auto", "wandb")


def borrowed(folder: Path, name: str) -> ModuleType:
    """Import a module from a checkout, as if nothing had happened to `sys.modules`."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    for absent in ELSEWHERE:
        sys.modules.setdefault(absent, mock.MagicMock())
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        own = {entry.stem for entry in folder.iterdir()}
        for loaded in set(sys.modules) - before:
            if loaded.split(".")[0] in own or loaded in ELSEWHERE:
                del sys.modules[loaded]


class Networks:
    """A code's networks: for each of ours their parameters in our order, those of twins side by side."""

    def __init__(self, **networks: nn.Module | tuple[nn.Module, nn.Module]) -> None:
        self.groups = {
            name: list(zip(*(module.parameters() for module in twins), strict=True))
            for name, one in networks.items()
            for twins in [one if isinstance(one, tuple) else (one,)]
        }

    def start(self, agent: Agent) -> None:
        """Take over our weights."""
        for name, groups in self.groups.items():
            parts = torch.split(agent.state[name], [len(group) * group[0].numel() for group in groups])
            for group, part in zip(groups, parts, strict=True):
                for parameter, values in zip(group, part.chunk(len(group)), strict=True):
                    parameter.data = values.view_as(parameter).clone()

    def weights(self) -> dict[str, Tensor]:
        """Theirs, flat in our order."""
        return {
            name: torch.cat([torch.stack(group).detach().flatten() for group in groups])
            for name, groups in self.groups.items()
        }


@contextmanager
def fed(normals: Sequence[Tensor], index: Tensor, coin: float) -> Iterator[None]:
    """PyTorch and numpy draw these."""
    left = deque(normals)
    with ExitStack() as stack:
        for module, name, function in (
            (torch, "randn", lambda *_, **__: left.popleft()),
            (torch, "randn_like", lambda *_, **__: left.popleft()),
            (torch, "randint", lambda *_, **__: index),
            (np.random, "uniform", lambda: coin),
        ):
            stack.enter_context(mock.patch.object(module, name, function))
        yield
    assert not left


def corl_settings(folder: Path, agent: str, task: str) -> SimpleNamespace:
    """CORL's settings for a task."""
    file = (
        folder
        / "configs"
        / "offline"
        / agent
        / task.split("-")[0]
        / f"{task.split('-', 1)[1].replace('-', '_')}.yaml"
    )
    text = re.sub(r"\b(\d)e-", r"\1.0e-", file.read_text())  # YAML 1.1 takes 3e-4 for a word
    return SimpleNamespace(**yaml.safe_load(text))


def flattened(batch: Batch) -> list[Tensor]:
    """CORL's batches: columns, and terminals."""
    rewards, terminals = batch.rewards.unsqueeze(-1), 1.0 - batch.discounts.unsqueeze(-1)
    return [batch.observations, batch.actions, rewards, batch.next_observations, terminals]


def corl_td3_bc(agent: Agent, task: str, folder: Path) -> Found:
    """CORL's TD3+BC."""
    width = agent.config.critic_hidden[0]
    c = corl_settings(folder, "td3_bc", task)
    with doubles(), narrowed(width):
        module = borrowed(folder, "algorithms.offline.td3_bc")
        actor = module.Actor(STATE_DIM, ACTION_DIM, 1.0)
        critics = [module.Critic(STATE_DIM, ACTION_DIM) for _ in range(2)]
        adam = [torch.optim.Adam(net.parameters(), lr=3e-4) for net in (actor, *critics)]
        code = module.TD3_BC(
            1.0, actor, adam[0], critics[0], adam[1], critics[1], adam[2], discount=c.discount, tau=c.tau,
            policy_noise=c.policy_noise, noise_clip=c.noise_clip, policy_freq=c.policy_freq, alpha=c.alpha,
        )  # fmt: skip
        networks = Networks(
            actor=actor,
            critic=(critics[0], critics[1]),
            actor_target=code.actor_target,
            critic_target=(code.critic_1_target, code.critic_2_target),
        )
        networks.start(agent)
        losses: dict[str, list[float]] = {"critic": [], "actor": []}
        for batch, noise in inputs(agent):
            with fed([noise["next_action"]], torch.empty(0), 0.0):
                found = code.train(flattened(batch))
            for name, values in losses.items():
                values += [found[f"{name}_loss"]] if f"{name}_loss" in found else []
    return Found(losses, networks.weights())


def corl_iql(agent: Agent, task: str, folder: Path) -> Found:
    """CORL's IQL."""
    width = agent.config.critic_hidden[0]
    c = corl_settings(folder, "iql", task)
    with doubles(), narrowed(width):
        module = borrowed(folder, "algorithms.offline.iql")
        q = module.TwinQ(STATE_DIM, ACTION_DIM, width)
        v = module.ValueFunction(STATE_DIM, width)
        policy = module.DeterministicPolicy if c.iql_deterministic else module.GaussianPolicy
        actor = policy(STATE_DIM, ACTION_DIM, 1.0, width)
        rates = ((actor, c.actor_lr), (q, c.qf_lr), (v, c.vf_lr))
        adam = [torch.optim.Adam(network.parameters(), lr=rate) for network, rate in rates]
        code = module.ImplicitQLearning(
            1.0, actor, adam[0], q, adam[1], v, adam[2], iql_tau=c.iql_tau, beta=c.beta, max_steps=UPDATES,
            discount=c.discount, tau=c.tau,
        )  # fmt: skip
        networks = Networks(
            actor=actor,
            value=v,
            critic=(q.q1, q.q2),
            critic_target=(code.q_target.q1, code.q_target.q2),
        )
        networks.start(agent)
        losses: dict[str, list[float]] = {"critic": [], "actor": [], "value": []}
        for batch, _ in inputs(agent):
            found = code.train(flattened(batch))
            for name, key in (("critic", "q_loss"), ("actor", "actor_loss"), ("value", "value_loss")):
                losses[name].append(found[key])
    return Found(losses, networks.weights())


def diffusion_ql(agent: Agent, task: str, folder: Path) -> Found:
    """The authors' Diffusion-QL."""
    width = agent.config.critic_hidden[0]
    tables = {
        node.targets[0].id: node.value  # type: ignore[attr-defined]
        for node in ast.parse((folder / "main.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    row = ast.literal_eval(tables["hyperparameters"])[task]
    with doubles(), narrowed(width):
        with mock.patch.object(torch, "float32", torch.float64):  # the schedule's
            module = borrowed(folder, "agents.ql_diffusion")
        code = module.Diffusion_QL(
            STATE_DIM, ACTION_DIM, 1.0, "cpu", 0.99, 0.005, max_q_backup=row["max_q_backup"], eta=row["eta"],
            beta_schedule="vp", n_timesteps=5, lr=row["lr"], grad_norm=row["gn"], step_start_ema=START,
        )  # fmt: skip
        networks = Networks(
            actor=code.actor,
            actor_target=code.ema_model,
            critic=(code.critic.q1_model, code.critic.q2_model),
            critic_target=(code.critic_target.q1_model, code.critic_target.q2_model),
        )
        networks.start(agent)
        losses: dict[str, list[float]] = {"critic": [], "actor": []}
        for batch, noise in inputs(agent):
            # A sampler draws for each of its steps, and once more for the last, where it isn't added.
            next_action, action = ([*noise[name], noise[name][0]] for name in ("next_action", "action"))
            index = torch.floor(noise["u"] * 5).long()
            states, actions, rewards, next_states, terminals = flattened(batch)
            buffer = SimpleNamespace(
                sample=lambda _, row=(states, actions, next_states, rewards, 1.0 - terminals): row
            )
            with fed([*next_action, noise["z"], *action], index, 1.0 - float(noise["coin"])):
                found = code.train(buffer, 1, len(states))
            for name, values in losses.items():
                values += found[f"{name}_loss"]
    return Found(losses, networks.weights())
