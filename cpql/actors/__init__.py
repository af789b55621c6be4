"""Actors, one file a kind: modules that turn a state into an action."""

from __future__ import annotations

from cpql.actors.base import Actor, choose
from cpql.actors.consistency import ActorConfig, ConsistencyActor
from cpql.actors.deterministic import DeterministicActor, DeterministicConfig

__all__ = [
    "ACTORS",
    "Actor",
    "ActorConfig",
    "AnyActorConfig",
    "ConsistencyActor",
    "DeterministicActor",
    "DeterministicConfig",
    "choose",
]

AnyActorConfig = ActorConfig | DeterministicConfig
"""The config of some actor, told apart by its `kind`."""

ACTORS: dict[str, type[Actor]] = {"consistency": ConsistencyActor, "deterministic": DeterministicActor}
"""Every kind of actor, by the `kind` of its config."""
