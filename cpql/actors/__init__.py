"""Actors, one file a kind: modules that turn a state into an action."""

from __future__ import annotations

from cpql.actors.base import Actor, choose
from cpql.actors.consistency import ActorConfig, ConsistencyActor
from cpql.actors.deterministic import DeterministicActor, DeterministicConfig
from cpql.actors.diffusion import DiffusionActor, DiffusionConfig
from cpql.actors.flow import FlowActor, FlowConfig
from cpql.actors.gaussian import GaussianActor, GaussianConfig
from cpql.actors.one_step import OneStepActor, OneStepConfig

__all__ = [
    "ACTORS",
    "Actor",
    "ActorConfig",
    "AnyActorConfig",
    "ConsistencyActor",
    "DeterministicActor",
    "DeterministicConfig",
    "DiffusionActor",
    "DiffusionConfig",
    "FlowActor",
    "FlowConfig",
    "GaussianActor",
    "GaussianConfig",
    "OneStepActor",
    "OneStepConfig",
    "choose",
]

AnyActorConfig = (
    ActorConfig | DeterministicConfig | DiffusionConfig | FlowConfig | GaussianConfig | OneStepConfig
)
"""The config of some actor, told apart by its `kind`."""

ACTORS: dict[str, type[Actor]] = {
    "consistency": ConsistencyActor,
    "deterministic": DeterministicActor,
    "diffusion": DiffusionActor,
    "flow": FlowActor,
    "gaussian": GaussianActor,
    "one_step": OneStepActor,
}
"""Every kind of actor, by the `kind` of its config."""
