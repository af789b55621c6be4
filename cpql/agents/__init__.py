"""Agents, one file an algorithm."""

from __future__ import annotations

from cpql.agents.agent import BY_MEMBER as BY_MEMBER
from cpql.agents.agent import Agent as Agent
from cpql.agents.agent import AgentConfig as AgentConfig
from cpql.agents.agent import TargetConfig as TargetConfig
from cpql.agents.consistency_ac import ConsistencyAC as ConsistencyAC
from cpql.agents.consistency_ac import ConsistencyACConfig as ConsistencyACConfig
from cpql.agents.cpql import CPQL as CPQL
from cpql.agents.cpql import CPQLConfig as CPQLConfig

AGENTS: dict[str, type[Agent]] = {"consistency_ac": ConsistencyAC, "cpql": CPQL}
