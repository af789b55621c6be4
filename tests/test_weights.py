"""Training gives the weights that it always gave: the sum of everything that an update draws and computes.

`weights.json` holds a few weights of every agent after 200 updates of small networks. They were recorded at
commit 8ac91e2, before the agents were rewritten, when the two agreed to the bit on one machine. Other
processors round differently; another draw, another order of draws or another formula moves a weight much
further than the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, small

from cpql.data.transitions import split

RECORDED = json.loads((Path(__file__).parent / "weights.json").read_text())


def rows() -> torch.Tensor:
    """500 random transitions of a 4-wide state and a 2-wide action, a sixth of them terminal."""
    table = torch.randn(500, 12, generator=torch.Generator().manual_seed(7))
    table[:, 4:6] = table[:, 4:6].tanh()
    table[:, -1] = (table[:, -1] > -1).float()
    return table


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECORDED))
def test_200_updates_give_the_recorded_weights(name: str) -> None:
    kind, config = CONFIGS["cpql" if name == "group" else name]
    seeds: int | Sequence[int] = [0, 3] if name == "group" else 0
    changes: dict[str, Any] = {"eta": (1.0, 0.5), "actor_lr": (3e-4, 1e-3)} if name == "group" else {}
    agent = kind(4, 2, replace(small(config, **changes), updates=200), seed=seeds)
    table, size = rows(), agent.config.batch_size
    generators = [torch.Generator().manual_seed(seed) for seed in ([0, 3] if name == "group" else [0])]
    for _ in range(200):
        drawn = [table[torch.randint(500, (size,), generator=generator)] for generator in generators]
        batch = split(torch.stack(drawn) if agent.members else drawn[0], 4, 2)
        agent.update(batch, agent.draw(generators if agent.members else generators[0]))
    for network, expected in RECORDED[name].items():
        weights = agent.state[network].flatten()
        found = weights[:: max(1, len(weights) // 6)][:6].tolist()
        assert found == pytest.approx(expected, abs=1e-3), network
