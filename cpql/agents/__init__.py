"""Agents, one file an algorithm."""

from __future__ import annotations

from cpql.agents.agent import Agent, AgentConfig, Step, TargetConfig
from cpql.agents.consistency_ac import ConsistencyAC, ConsistencyACConfig
from cpql.agents.consistency_agent import ConsistencyAgent, ConsistencyAgentConfig
from cpql.agents.cpql import CPQL, CPQLConfig
from cpql.agents.td3_bc import TD3BC, TD3BCConfig

__all__ = [
    "AGENTS",
    "CPQL",
    "TD3BC",
    "Agent",
    "AgentConfig",
    "CPQLConfig",
    "ConsistencyAC",
    "ConsistencyACConfig",
    "ConsistencyAgent",
    "ConsistencyAgentConfig",
    "Step",
    "TD3BCConfig",
    "TargetConfig",
]

AGENTS: dict[str, type[Agent]] = {"consistency_ac": ConsistencyAC, "cpql": CPQL, "td3_bc": TD3BC}
