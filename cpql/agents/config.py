"""Settings that agents share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from cpql.actors import ActorConfig
from cpql.networks import Activation, Initialisation, Norm
from cpql.settings import Candidates, Count, Natural, NonNegative, Positive, Widths

__all__ = ["ActorCriticConfig", "AgentConfig", "TargetConfig"]


@dataclass(frozen=True)
class TargetConfig:
    """How a target network follows its online network: `target += rate (online - target)`.

    Attributes:
        rate: fraction of the difference that an update of the target takes over.
        period: gradient steps between updates of the target.
        start: the gradient step of the first update, from which on the period counts; 0 counts from the
            beginning. Until then the target keeps its initial weights: in the official codes until step 1,001
            (they count a step after testing for 1,000), which for CPQL freezes the critic's target at random
            values.
        lagged: follow the online network as it was before the update, as ReBRAC's code does for its policy.
    """

    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.005
    period: Count = 1
    start: Natural = 0
    lagged: bool = False


@dataclass(frozen=True)
class AgentConfig:
    """Settings that all agents share.

    Attributes:
        actor: the config of the actor, of the kind that the agent trains.
        updates: gradient steps of the whole training, over which schedules run.
        batch_size: transitions in an update.
        actor_lr: Adam's learning rate for the actor. In a group of agents, this and the agent's other
            settings in `by_member` may be a value for each member.
        lr_decay: `cosine` lets all rates fall to zero over the whole training, `actor_cosine` the actor's
            alone. (Both official codes step their cosine at the wrong pace: it does nothing in
            Consistency-AC and oscillates in CPQL.)
        max_grad_norm: the gradient of each network is clipped to this norm; null doesn't clip.
        adam_epsilon: of Adam, for all networks.
        weight_decay: decoupled from the gradient, as in AdamW (Loshchilov and Hutter 2019): an update takes
            this times the learning rate off each weight.
        actor_average: the rate at which an average of the actor's weights follows them, which then acts and
            is saved as the policy; 0 has none. IDQL acts so, at rate 0.001. At update k the rate is at least
            9 / (9 + k), so that the initial weights don't linger.
    """

    actor: Any = None
    updates: Count = 2_000_000
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    actor_lr: Positive | tuple[Positive, ...] = 3e-4
    lr_decay: Literal["none", "cosine", "actor_cosine"] = "none"
    max_grad_norm: Positive | None = 10.0
    adam_epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    actor_average: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    @property
    def next_actions(self) -> str | None:
        """The setting for which a batch needs the data's actions at the next states, if there is one."""
        return None

    @property
    def schedule(self) -> str | None:
        """The setting whose course depends on `updates`, if there is one."""
        if self.lr_decay != "none":
            return f"agent.lr_decay={self.lr_decay}"
        if isinstance(self.actor, ActorConfig) and self.actor.row.scheduled:
            return f"agent.actor.objective={self.actor.objective}"
        return None


@dataclass(frozen=True)
class ActorCriticConfig(AgentConfig):
    """Settings of agents that have a critic.

    Attributes:
        discount: gamma.
        critic_lr: Adam's learning rate for the critic.
        critic_hidden: widths of the critic's hidden layers.
        critic_layer_norm: LayerNorm before the critic's activations, or `after` them.
        critic_activation: between the critic's layers: `mish`, `relu` or `gelu`.
        critic_init: the critic's initial weights, see `cpql.networks.Initialisation`.
        critic_target: how the target critic follows.
        candidates: actions drawn when acting, of which one is chosen by its value; 1 is the actor alone.
            All published scores of Consistency-AC and CPQL come from 50.
        temperature: of the choice, softmax(min(Q1, Q2) / temperature) under the target critic; 0 is argmax.
    """

    discount: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    critic_lr: Positive | tuple[Positive, ...] = 3e-4
    critic_hidden: Widths = (256, 256, 256)
    critic_layer_norm: Norm = False
    critic_activation: Activation = "mish"
    critic_init: Initialisation = "torch"
    critic_target: TargetConfig = field(default_factory=TargetConfig)
    candidates: Candidates = 1
    temperature: NonNegative = 1.0
