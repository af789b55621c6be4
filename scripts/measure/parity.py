"""The papers' own updates beside ours in float64: the same weights, batches and noise go into both.

The codes are read from wherever their repositories were checked out and run as they are, except that random
numbers are handed to them, that what they make float32 is float64, that layers of 256 may be narrower, and
that targets start after update 10, not 1,000. Their settings come from their own tables, ours from
`agent=..._published`, whose targets start 990 updates earlier too. What the codes found is kept, so that
tests/test_parity.py compares without them.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from cpql import configuration
from cpql.actors import OneStepConfig
from cpql.agents import Agent
from cpql.data.transitions import Batch
from cpql.tasks import config_folder
from cpql.training.config import agent_config
from measure.official import borrowed

__all__ = ["CASES", "Case", "Found", "compared", "figures", "ours", "parity", "table"]

STATE_DIM, ACTION_DIM, BATCH, UPDATES = 4, 2, 8, 20
START, EARLIER = 10, 990  # the update after which their targets move, and by how many ours start earlier
CURRICULUM = 10  # updates of one run of Consistency-AC's N(k), which is one call of its train()


class Case(NamedTuple):
    """One comparison.

    Attributes:
        table: file and name of the code's settings.
        task: whose row.
        draws: our normal noise in the order in which the code draws it.
        words: our settings, as on the command line.
    """

    table: str
    task: str
    draws: str
    words: str


CPQL, CPQL_ONLINE = "main.py offline_hyperparameters", "main.py online_hyperparameters"
CAC, CAC_ONLINE = "offline.py consistency_hyperparameters", "online.py hyperparameters"
IN_CPQL, IN_CPIQL, IN_CAC = "next_action z action", "z action", "next_action action z"
CASES = {
    "cpql": Case(CPQL, "hopper-medium-v2", IN_CPQL, "agent=cpql_published"),
    "cpql, antmaze": Case(CPQL, "antmaze-large-play-v0", IN_CPQL, "agent=cpql_published"),
    "cpql, online": Case(CPQL_ONLINE, "mujoco", IN_CPQL, "agent=cpql_online_published mode=online"),
    "cpiql": Case(CPQL, "hopper-medium-v2", IN_CPIQL, "agent=cpql_published agent.critic=expectile"),
    "cpiql, antmaze": Case(
        CPQL, "antmaze-medium-play-v0", IN_CPIQL, "agent=cpql_published agent.critic=expectile"
    ),
    "consistency_ac": Case(CAC, "hopper-medium-v2", IN_CAC, "agent=consistency_ac_published"),
    "consistency_ac, five steps": Case(CAC, "walker2d-medium-v2", IN_CAC, "agent=consistency_ac_published"),
    "consistency_ac, antmaze": Case(CAC, "antmaze-large-play-v0", IN_CAC, "agent=consistency_ac_published"),
    "consistency_ac, online": Case(
        CAC_ONLINE,
        "walker2d-medium-v2",
        "next_action action",
        "agent=consistency_ac_online_published mode=online",
    ),
}


class Found(NamedTuple):
    """What 20 updates gave: the losses [20], and the final weights by network, in our order."""

    losses: dict[str, list[float]]
    weights: dict[str, Tensor]


@functools.cache  # composing takes a second
def settings(case: Case) -> tuple[type[Agent], Any]:
    """Our agent's class and its published settings."""
    task = "hopper" if case.task == "mujoco" else case.task.removesuffix("-v2").removesuffix("-v1")
    words = [*case.words.split(), f"env={task}", f"budget.updates={UPDATES}", "configuration=x"]
    if case.table == CAC:
        words.append(f"agent.curriculum_restarts={UPDATES / CURRICULUM}")
    configuration.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        (config,) = configuration.members(compose("train", words), [])
    return agent_config(config)


def made(case: Case, width: int) -> Agent:
    """Our agent, small."""
    kind, config = settings(case)
    small: dict[str, Any] = {"batch_size": BATCH, "critic_hidden": (width,) * len(config.critic_hidden)}
    small["actor"] = replace(config.actor, hidden=(width,) * len(config.actor.hidden))
    if isinstance(config.actor, OneStepConfig):
        flow = replace(config.actor.flow, hidden=(width,) * len(config.actor.flow.hidden))
        small["actor"] = replace(small["actor"], flow=flow)
    for name in {"actor_target", "critic_target"} & vars(config).keys():
        target = getattr(config, name)
        small[name] = replace(target, start=max(0, target.start - EARLIER))
    return kind(STATE_DIM, ACTION_DIM, replace(config, **small), seed=0)


def inputs(agent: Agent) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Batch and noise of each update: float64 that float32 can hold, as the codes round some of them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float32)

    for _ in range(UPDATES):
        states, actions, next_states = normal(STATE_DIM), normal(ACTION_DIM).tanh(), normal(STATE_DIM)
        columns = [states, actions, normal(), next_states, (normal() < 1.0).float()]
        if agent.config.next_actions:
            columns.append(normal(ACTION_DIM).tanh())
        noise = agent.draw(generator).items()
        floats = {name: one.double() if one.is_floating_point() else one for name, one in noise}
        yield Batch(*(column.double() for column in columns)), floats


def ours(case: Case, width: int) -> Found:
    """Run our updates."""
    with doubles():
        agent = made(case, width)
        metrics = [agent.update(batch, noise) for batch, noise in inputs(agent)]
    trained = {step.network for step in agent.steps()}
    losses = {name: [float(m[key]) for m in metrics if (key := f"{name}/loss") in m] for name in trained}
    names = [name for name in agent.state if name.removesuffix("_target") in losses]
    return Found(losses, {name: agent.state[name] for name in names})


@contextmanager
def doubles() -> Iterator[None]:
    """What is made is float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def narrowed(width: int) -> Iterator[None]:
    """Layers of 256 have another width."""
    linear, norm = nn.Linear, nn.LayerNorm

    def size(n: int) -> int:
        return width if n == 256 else n

    with (
        mock.patch.object(nn, "Linear", lambda i, o: linear(size(i), size(o))),
        mock.patch.object(nn, "LayerNorm", lambda n: norm(size(n))),
    ):
        yield


@contextmanager
def fed(agent: Agent, case: Case) -> Iterator[Callable[[int], Any]]:
    """What the code draws is our noise; gives its buffer's `sample`.

    A sampler draws for each of its steps by itself.
    """
    given = list(inputs(agent))
    draws = [noise[name] for _, noise in given for name in case.draws.split()]
    normals = (one for tensor in draws for one in (tensor if tensor.ndim == 3 else [tensor]))
    uniforms, coins = ([noise[name] for _, noise in given] for name in ("u", "coin"))
    batches = (batch for batch, _ in given)

    def index(low: int, high: int, size: tuple[int, ...], **_: Any) -> Tensor:
        n = torch.floor(uniforms.pop(0) * high).long().view(size)
        return high - 1 - n if "main.py" in case.table else n  # CPQL's levels descend

    def sample(_: int) -> Any:
        batch = next(batches)
        states, actions, next_states = batch.observations, batch.actions, batch.next_observations
        rewards, going_on = batch.rewards.unsqueeze(-1), batch.discounts.unsqueeze(-1)
        if case.table != CAC_ONLINE:
            return states, actions, next_states, rewards, going_on
        return SimpleNamespace(
            observations=states, actions=actions, next_observations=next_states, rewards=rewards,
            dones=1.0 - going_on,
        )  # fmt: skip

    with ExitStack() as stack:
        for module, name, function in (
            (torch, "randn", lambda *_, **__: next(normals)),
            (torch, "randn_like", lambda *_, **__: next(normals)),
            (torch, "randint", index),
            (torch, "float32", torch.float64),
            (np.random, "uniform", lambda: 1.0 - float(coins.pop(0))),
        ):
            stack.enter_context(mock.patch.object(module, name, function))
        yield sample


def theirs(case: Case, width: int, folders: dict[str, Path]) -> Found:
    """Run the code's updates from our weights."""
    file, name = case.table.split()
    folder = folders["cpql" if file == "main.py" else "cac"]
    tables = {
        node.targets[0].id: node.value  # type: ignore[attr-defined]
        for node in ast.parse((folder / file).read_text()).body
        if isinstance(node, ast.Assign)
    }
    row = ast.literal_eval(tables[name])[case.task]
    common = {"lr": row["lr"], "grad_norm": row["gn"], "step_start_ema": START}
    with doubles(), narrowed(width):
        if file == "main.py":  # as its main program makes it
            (module,) = borrowed(folder, "agents.ql_cm")
            antmaze = "antmaze" in case.task
            code = module.CPQL(
                "cpu", STATE_DIM, ACTION_DIM, rl_type="online" if "online" in case.words else "offline",
                q_mode="q_v" if "expectile" in case.words else "q", max_q_backup=antmaze,
                sampler="multistep" if antmaze else "onestep", alpha=row["alpha"], eta=row["eta"],
                expectile=row.get("expectile", 0), **common,
            )  # fmt: skip
            actors = code.actor, code.actor_target
        elif case.table == CAC:
            (module,) = borrowed(folder, "agents.ql_consistency")
            code = module.Consistency_QL(
                STATE_DIM, ACTION_DIM, 1.0, "cpu", 0.99, 0.005, row["max_q_backup"], row["eta"], row["T"],
                q_norm=row["q_norm"], **common,
            )  # fmt: skip
            actors = code.actor, code.ema_actor
        else:
            (module,) = borrowed(folder, "agents.online_agent")
            code = module.OnlineAgent(
                STATE_DIM, ACTION_DIM, 1.0, "consistency", "cpu", 0.99, 0.005, row["max_q_backup"],
                n_timesteps=5, **common,
            )  # fmt: skip
            actors = code.actor, code.ema_model
        agent = made(case, width)
    networks: dict[str, list[tuple[nn.Parameter, ...]]] = {}
    for end, actor, critic in zip(("", "_target"), actors, (code.critic, code.critic_target), strict=True):
        networks[f"actor{end}"] = [(p,) for p in actor.parameters()]
        twins = (critic.q1_model.parameters(), critic.q2_model.parameters())
        networks[f"critic{end}"] = list(zip(*twins, strict=True))
        if "expectile" in case.words:
            networks[f"critic{end}"] += [(p,) for p in critic.v_model.parameters()]
    for key, groups in networks.items():
        parts = torch.split(agent.state[key], [len(group) * group[0].numel() for group in groups])
        for group, part in zip(groups, parts, strict=True):
            for parameter, values in zip(group, part.chunk(len(group)), strict=True):
                parameter.data = values.view_as(parameter).clone()
    losses: dict[str, list[float]] = {"critic": [], "actor": []}
    with doubles(), fed(agent, case) as sample:
        buffer = SimpleNamespace(sample=sample)
        calls, arguments = (UPDATES // CURRICULUM, (CURRICULUM,)) if file != "main.py" else (UPDATES, ())
        for _ in range(calls):
            found = code.train(buffer, *arguments, BATCH)
            for key, series in losses.items():
                series += found[f"{key}_loss"]
    final = {
        key: torch.cat([torch.stack(group).detach().flatten() for group in groups])
        for key, groups in networks.items()
    }
    return Found(losses, final)


def figures(found: Found) -> dict[str, list[float]]:
    """The losses, and three numbers for each network's weights: sum, norm and a projection."""
    numbers = dict(found.losses)
    for name, w in found.weights.items():
        along = torch.arange(len(w)).double().cos()
        numbers[f"{name}_weights"] = [float(n) for n in (w.sum(), torch.linalg.vector_norm(w), w @ along)]
    return numbers


def table(rows: list[dict[str, Any]]) -> str:
    """The largest differences, as the documents have them."""
    lines = ["| case | width | losses, relative | weights |", "|---|---|---|---|"]
    lines += ["| {case} | {width} | {losses:.0e} | {weights:.0e} |".format(**row) for row in rows]
    return "\n".join(lines)


def compared(
    cases: Mapping[str, Any], theirs: Callable[[Any, int], Found], widths: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each case and width, theirs in figures at the smallest; prints a table."""
    rows = []
    for name, case in cases.items():
        for width in widths:
            a, b = ours(case, width), theirs(case, width)
            pairs = [pair for key in a.losses for pair in zip(a.losses[key], b.losses[key], strict=True)]
            losses = max(abs(x - y) / abs(y) for x, y in pairs)
            weights = max(float((a.weights[key] - b.weights[key]).abs().max()) for key in a.weights)
            row = {"case": name, "width": width, "losses": losses, "weights": weights}
            rows.append(row | {"theirs": figures(b)} if width == min(widths) else row)
    print(table(rows))
    return rows


def parity(options: argparse.Namespace) -> dict[str, Any]:
    """Compare all cases at the given widths."""
    folders = {"cpql": options.cpql, "cac": options.cac}
    rows = compared(CASES, lambda case, width: theirs(case, width, folders), options.widths)
    files = {"cpql": "main.py agents/ql_cm.py", "cac": "offline.py online.py agents/ql_consistency.py"}
    sha256 = {
        f"{name}/{file}": hashlib.sha256((folder / file).read_bytes()).hexdigest()
        for name, folder in folders.items()
        for file in files[name].split()
    }
    return {"about": __doc__, "sha256": sha256, "rows": rows}
