"""What each objective makes of an action with two modes: the toy that tells consistency from denoising.

A state has two good actions, -0.8 and 0.8, each with a standard deviation of 0.05. An actor that has learnt
them puts its samples within three standard deviations of one or the other, and never between them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from cpql import consistency
from cpql.actors.consistency import ActorConfig, ConsistencyActor
from cpql.consistency import Function, Levels, ct_discretisation, ct_teacher_decay, lognormal_index, perturb

MODE, SPREAD = 0.8, 0.05
# Fewer levels than the papers': what 160 levels can tell apart is learnt in 3000 updates, 1280 take far more.
CONFIG = ActorConfig(t_max=5.0, refinements=(MODE,), hidden=(64, 64, 64, 64))
ICT = replace(CONFIG, objective="ict", objective_options={"s0": 40, "s1": 160})
CT = replace(CONFIG, objective="ct", objective_options={"s0": 10, "s1": 50, "weight": "interval"})
COMPOSE = replace(CONFIG, objective="compose", t_max=20.0, refinements=(), acting_share=0.3)
DENOISE = ActorConfig(hidden=(64, 64, 64, 64))
BATCH = 256


@dataclass(frozen=True)
class Coverage:
    """Shares of the samples: near a mode, of those near the rarer mode, and near the mean, 0."""

    covered: float
    rarer: float
    middle: float


def normal(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def train(config: ActorConfig, updates: int, rate: float, seed: int = 0) -> ConsistencyActor:
    """Imitate the two modes. Data and noise are a scrambled Sobol sequence, so that few updates suffice."""
    torch.manual_seed(seed)
    actor, options = ConsistencyActor(1, 1, config), config.objective_options
    ema, state = copy.deepcopy(actor).requires_grad_(False), torch.zeros(BATCH, 1)
    engine = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    optimiser = torch.optim.Adam(actor.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for update in range(updates):
        progress = torch.tensor(update / updates)
        u, noise, side, offset = engine.draw(BATCH).clamp(1e-6, 1 - 1e-6).unsqueeze(-1).unbind(1)
        action = torch.where(side < 0.5, -MODE, MODE) + SPREAD * normal(offset)
        loss, _ = actor.loss(
            state,
            action,
            teacher=ema.function(state),
            progress=progress,
            noise={"z": normal(noise), "u": u.squeeze(-1)},
        )
        optimiser.zero_grad()
        torch.autograd.backward(loss.mean())
        optimiser.step()
        schedule.step()
        if config.objective == "ct":
            count = ct_discretisation(progress, options["s0"], options["s1"])
            decay = ct_teacher_decay(count, options["s0"])
            with torch.no_grad():
                for slow, fast in zip(ema.parameters(), actor.parameters(), strict=True):
                    slow.lerp_(fast, 1 - decay)
    return actor


def coverage(actor: ConsistencyActor, steps: int) -> Coverage:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        action = actor.sample(torch.zeros(10_000, 1), steps=steps, generator=generator)
    sides = [((action - mode).abs() < 3 * SPREAD).double().mean().item() for mode in (-MODE, MODE)]
    covered, middle = sum(sides), (action.abs() < 0.3).double().mean().item()
    return Coverage(covered, min(sides) / max(covered, 1e-9), middle)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ict_finds_both_modes() -> None:
    found = coverage(train(ICT, 3000, 2e-3), steps=2)
    assert found.covered >= 0.9 and found.rarer >= 0.3 and found.middle <= 0.05, found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ct_finds_both_modes() -> None:
    """Squared distances and coarser levels blur what lies between the modes more than iCT does."""
    found = coverage(train(CT, 1500, 5e-3), steps=2)
    assert found.covered >= 0.65 and found.rarer >= 0.3 and found.middle <= 0.15, found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compose_finds_both_modes_in_one_step() -> None:
    """With a share of the examples at the level that acts; without it 0.74 are covered after as long."""
    found = coverage(train(COMPOSE, 1500, 5e-3), steps=1)
    assert found.covered >= 0.8 and found.rarer >= 0.3 and found.middle <= 0.08, found


def test_denoising_in_one_step_finds_the_mean() -> None:
    """Why the objective matters: from pure noise, CPQL's published loss can only return the mean.

    Its minimiser at t_max is E[a | s]: here 0, an action that the data never take. However long it trains,
    one step has one mode; only the Q-function, which this toy leaves out, tells the policy which to take.
    """
    found = coverage(train(DENOISE, 300, 2e-3), steps=1)
    assert found.middle >= 0.95 and found.covered <= 0.01, found


def noised_afresh(
    f: Function,
    teacher: Function,
    x0: Tensor,
    z: Tensor,
    u: Tensor,
    progress: Tensor,
    levels: Levels,
    *,
    tanh: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """iCT with one mistake: the target's noise isn't the student's, so that the two lie on no common path."""
    count = consistency.ict_discretisation(progress, 40, 160)
    index = lognormal_index(u, count, levels)
    low, high = levels.level(index, count), levels.level(index + 1, count)
    target = f(perturb(x0, low, z.roll(1, 0)), low).detach()
    return (f(perturb(x0, high, z), high) - target).abs().sum(-1) / (high - low), {}


def test_a_wrong_objective_finds_neither_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy can fail: a target with noise of its own draws every sample to the middle."""
    monkeypatch.setitem(consistency.OBJECTIVES, "noised_afresh", consistency.Objective(noised_afresh))
    found = coverage(train(replace(CONFIG, objective="noised_afresh"), 500, 3e-3), steps=2)
    assert found.covered <= 0.3, found
