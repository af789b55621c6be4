"""Consistency policies for offline reinforcement learning.

The names people use are here, imported when first asked for: `import cpql` alone is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpql.actor import ActorConfig as ActorConfig
    from cpql.actor import ConsistencyActor as ConsistencyActor
    from cpql.agents import CPQL as CPQL
    from cpql.agents import ConsistencyAC as ConsistencyAC
    from cpql.critic import TwinCritic as TwinCritic
    from cpql.critic import ValueFunction as ValueFunction
    from cpql.data.transitions import Transitions as Transitions
    from cpql.policy import Policy as Policy

_WHERE = {
    "ActorConfig": "cpql.actor",
    "ConsistencyActor": "cpql.actor",
    "CPQL": "cpql.agents",
    "ConsistencyAC": "cpql.agents",
    "TwinCritic": "cpql.critic",
    "ValueFunction": "cpql.critic",
    "Transitions": "cpql.data.transitions",
    "Policy": "cpql.policy",
}

__all__ = [
    "CPQL",
    "ActorConfig",
    "ConsistencyAC",
    "ConsistencyActor",
    "Policy",
    "Transitions",
    "TwinCritic",
    "ValueFunction",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'cpql' has no attribute {name!r}")
