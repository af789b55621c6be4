"""What the tests share: a small dataset, and small agents of every kind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import absl.logging
import numpy as np
import pytest
import torch

from cpql.actors import ActorConfig, AnyActorConfig, DeterministicConfig, FlowConfig, OneStepConfig
from cpql.agents import (
    BC,
    CPQL,
    FQL,
    IQL,
    TD3BC,
    ActorCriticConfig,
    Agent,
    AgentConfig,
    BCConfig,
    ConsistencyAC,
    ConsistencyACConfig,
    CPQLConfig,
    DiffusionQL,
    DiffusionQLConfig,
    FQLConfig,
    IQLConfig,
    ReBRAC,
    ReBRACConfig,
    TargetConfig,
    TD3BCConfig,
)
from cpql.data.transitions import Transitions

torch.set_num_threads(1)

# OGBench's logger writes to what sys.stderr was when it was made, and closes that when Hydra resets logging,
# unless it is the process's own: here it would be pytest's.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

SMALL = {"hidden": (32, 32)}

CONFIGS: dict[str, tuple[type[Agent], AgentConfig]] = {
    "cpql": (CPQL, CPQLConfig()),
    "cpql-published": (
        CPQL,
        CPQLConfig(
            actor=ActorConfig(clamp="inside"),
            critic_target=TargetConfig(0.005, 5, 3),
            actor_target=TargetConfig(0.005, 5, 3),
        ),
    ),
    "cpql-ict": (CPQL, CPQLConfig(actor=ActorConfig("ict", t_max=5.0, refinements=(0.8,), action_norm=True))),
    "cpiql": (CPQL, CPQLConfig(critic="expectile")),
    "cpiql-online": (CPQL, CPQLConfig(critic="expectile", expectile_q="online")),
    "td3_bc": (TD3BC, TD3BCConfig()),
    "bc": (BC, BCConfig()),
    "bc-flow": (BC, BCConfig(FlowConfig(steps=3))),
    "bc-consistency": (BC, BCConfig(ActorConfig("ict"))),
    "iql": (IQL, IQLConfig()),
    "iql-corl": (IQL, IQLConfig(DeterministicConfig(), critic_layer_norm="after")),
    "rebrac": (ReBRAC, ReBRACConfig()),
    "rebrac-published": (ReBRAC, ReBRACConfig(actor_target=TargetConfig(0.005, 2, lagged=True))),
    "fql": (FQL, FQLConfig()),
    "fql-published": (FQL, FQLConfig(q_loss="plain", q_aggregation="min", alpha=10.0)),
    "diffusion_ql": (DiffusionQL, DiffusionQLConfig(actor_target=TargetConfig(0.005, 5))),
    "diffusion_ql-edp": (
        DiffusionQL,
        DiffusionQLConfig(actor_target=TargetConfig(), policy_action="denoised", candidates=3),
    ),
    "cpql-online-published": (CPQL, CPQLConfig(alpha=0.05, critic_layer_norm=False, q_loss="min")),
    "consistency_ac": (ConsistencyAC, ConsistencyACConfig()),
    "consistency_ac-online-published": (ConsistencyAC, ConsistencyACConfig(alpha=0.0, actor_lr=1e-5)),
    "consistency_ac-published": (
        ConsistencyAC,
        ConsistencyACConfig(
            actor=ActorConfig(
                "ct",
                {"weight": "interval", "scale": 100.0, "s1": 149},
                parameterisation="unscaled",
                refinements=(2.0,),
            ),
            curriculum_restarts=4,
            q_normalisation=True,
            max_q_backup=3,
            lr_decay="cosine",
        ),
    ),
}


# Every objective in both agents, with settings that leave nothing out in a short training.
OPTIONS: dict[str, dict[str, Any]] = {
    "ect": {"refinements": (0.8,), "objective_options": {"stages": 3}},
    "cd": {"t_max": 5.0},
    "scm": {"refinements": (0.8,)},
    "meanflow": {"refinements": (1.0,), "objective_options": {"fraction": 0.5}},
    "shortcut": {"refinements": (1.0, 0.3), "objective_options": {"grid": 8}, "dropout": 0.2},
    "compose": {"refinements": (1.0,), "acting_share": 0.5},
    "distill": {"objective_options": {"steps": 3}},
}
for objective, options in OPTIONS.items():
    CONFIGS[f"cpql-{objective}"] = (CPQL, CPQLConfig(actor=ActorConfig(objective, **options)))
CONFIGS["consistency_ac-meanflow"] = (
    ConsistencyAC,
    ConsistencyACConfig(actor=ActorConfig("meanflow", refinements=(1.0,))),
)


def small(config: AgentConfig, **changes: Any) -> AgentConfig:
    """The same agent with little networks and a short training."""
    if isinstance(config, ActorCriticConfig):
        changes = {"critic_hidden": (32, 32), **changes}
    return replace(config, actor=little(config.actor), batch_size=16, updates=100, **changes)


def little(actor: AnyActorConfig) -> AnyActorConfig:
    """The same actor with two hidden layers of 32."""
    if isinstance(actor, OneStepConfig):
        actor = replace(actor, flow=replace(actor.flow, hidden=(32, 32), steps=3))
    return replace(actor, hidden=(32, 32))


@pytest.fixture(params=list(CONFIGS))
def make_agent(request: pytest.FixtureRequest) -> Callable[..., Agent]:
    """A maker of small agents, for every algorithm and its named options."""
    kind, config = CONFIGS[request.param]

    def make(seed: int | Sequence[int] = 0, matmul_dtype: torch.dtype | None = None, **changes: Any) -> Agent:
        return kind(4, 2, small(config, **changes), seed=seed, matmul_dtype=matmul_dtype)

    return make


@pytest.fixture
def data() -> Transitions:
    """500 random transitions of a 4-wide observation and a 2-wide action, with episodes of 25 steps."""
    random = np.random.default_rng(0)
    ends = np.arange(1, 501) % 25 == 0
    return Transitions.from_dict(
        {
            "observations": random.normal(size=(500, 4)),
            "actions": random.uniform(-1, 1, size=(500, 2)),
            "rewards": random.normal(size=500),
            "next_observations": random.normal(size=(500, 4)),
            "terminals": ends & (np.arange(500) < 250),
            "timeouts": ends & (np.arange(500) >= 250),
        }
    )
