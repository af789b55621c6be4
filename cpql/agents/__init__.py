"""Agents, one file an algorithm."""

from __future__ import annotations

from cpql.agents.agent import Agent, Step
from cpql.agents.bc import BC, BCConfig
from cpql.agents.config import ActorCriticConfig, AgentConfig, TargetConfig
from cpql.agents.consistency_ac import ConsistencyAC, ConsistencyACConfig
from cpql.agents.cpql import CPQL, CPQLConfig
from cpql.agents.diffusion_ql import DiffusionQL, DiffusionQLConfig
from cpql.agents.fql import FQL, FQLConfig
from cpql.agents.generative_agent import GenerativeAgent, GenerativeAgentConfig
from cpql.agents.iql import IQL, IQLConfig
from cpql.agents.rebrac import ReBRAC, ReBRACConfig
from cpql.agents.td3_bc import TD3BC, TD3BCConfig

__all__ = [
    "AGENTS",
    "BC",
    "CPQL",
    "FQL",
    "IQL",
    "TD3BC",
    "ActorCriticConfig",
    "Agent",
    "AgentConfig",
    "BCConfig",
    "CPQLConfig",
    "ConsistencyAC",
    "ConsistencyACConfig",
    "DiffusionQL",
    "DiffusionQLConfig",
    "FQLConfig",
    "GenerativeAgent",
    "GenerativeAgentConfig",
    "IQLConfig",
    "ReBRAC",
    "ReBRACConfig",
    "Step",
    "TD3BCConfig",
    "TargetConfig",
]

AGENTS: dict[str, type[Agent]] = {
    "bc": BC,
    "consistency_ac": ConsistencyAC,
    "cpql": CPQL,
    "diffusion_ql": DiffusionQL,
    "fql": FQL,
    "iql": IQL,
    "rebrac": ReBRAC,
    "td3_bc": TD3BC,
}
