"""Consistency policies for offline reinforcement learning.

The names people use are here, imported when first asked for: `import cpql` alone is quick.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpql.actors.consistency import ActorConfig as ActorConfig
    from cpql.actors.consistency import ConsistencyActor as ConsistencyActor
    from cpql.agents import CPQL as CPQL
    from cpql.agents import ConsistencyAC as ConsistencyAC
    from cpql.api import TrainedRun as TrainedRun
    from cpql.api import train as train
    from cpql.api import train_members as train_members
    from cpql.critics import TwinCritic as TwinCritic
    from cpql.critics import ValueFunction as ValueFunction
    from cpql.data.transitions import Transitions as Transitions
    from cpql.deploy.policy import Policy as Policy

_WHERE = {
    "ActorConfig": "cpql.actors.consistency",
    "ConsistencyActor": "cpql.actors.consistency",
    "CPQL": "cpql.agents",
    "ConsistencyAC": "cpql.agents",
    "TwinCritic": "cpql.critics",
    "ValueFunction": "cpql.critics",
    "Transitions": "cpql.data.transitions",
    "Policy": "cpql.deploy.policy",
    "TrainedRun": "cpql.api",
    "train": "cpql.api",
    "train_members": "cpql.api",
}

__all__ = [
    "CPQL",
    "ActorConfig",
    "ConsistencyAC",
    "ConsistencyActor",
    "Policy",
    "TrainedRun",
    "Transitions",
    "TwinCritic",
    "ValueFunction",
    "train",
    "train_members",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name == "__version__":
        return importlib.metadata.version("cpql")
    raise AttributeError(f"module 'cpql' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
