"""How each objective covers an action distribution of eight modes, in one, two and four steps.

    python examples/bandit.py --objectives ect scm --updates 3000
    python examples/bandit.py --json benchmarks/bandit.json --picture docs/bandit.png

The actions of a bandit lie at eight places of a circle, each a normal of deviation 0.05. In the conditional
bandit the state turns the circle, by a quarter of the gap between two modes at most. (Were it half of it, the
modes of all states together would be an even ring: denoise, ct and cd then don't notice the state within
15,000 updates, and spread their samples over the ring.) Every objective trains the same network for the same
number of updates of the same batches. The levels of the later steps are then searched for, with other noise:
by how far the fractions of samples near each mode, and near none, are from the true ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cpql import ActorConfig, ConsistencyActor, noise
from cpql.consistency import greedy_refinements, sample
from cpql.optimisation import FlatModule, adam, value_and_grad

MODES, RADIUS, SPREAD = 8, 0.8, 0.05
STEPS = (1, 2, 4)
HIDDEN, BATCH, RATE, TEACHER = (128, 128, 128), 256, 2e-3, 0.01

# What isn't an objective's default, by row. t_max is in the units of actions.
SETTINGS: dict[str, dict[str, Any]] = {
    "denoise": {"t_max": 5.0},
    "ct": {"t_max": 5.0, "objective_options": {"s0": 10, "s1": 50, "weight": "interval"}},
    "ict": {"t_max": 5.0, "objective_options": {"s1": 160}},
    "ect": {"t_max": 5.0},
    "cd": {"t_max": 5.0, "objective_options": {"count": 40, "metric": "huber", "weight": "interval"}},
    "scm": {"t_max": 5.0},
    "meanflow": {"t_max": 20.0, "objective_options": {"fraction": 0.5, "mean": 0.0, "std": 1.6}},
    "shortcut": {"t_max": 80.0},
    "compose": {"t_max": 80.0},
    "distill": {},
}
# Half of the examples at t_max, the level that acts in one step.
SETTINGS |= {
    f"{name}-acting": {"objective": name, **SETTINGS[name], "acting_share": 0.5}
    for name in ("ect", "meanflow", "compose")
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Bandit:
    """Where the modes are: at fixed places, or turned by the state, a number in [-1, 1]."""

    conditional: bool = False

    def centres(self, state: Tensor) -> Tensor:
        """The modes [..., 8, 2] of states [..., 1]."""
        turn = state * (math.pi / (2 * MODES) if self.conditional else 0.0)
        angle = torch.arange(MODES) * (2 * math.pi / MODES) + turn
        return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States [count, 1] and an action [count, 2] of each."""
        state = 2 * torch.rand(count, 1, generator=generator) - 1
        action = self.act(state, generator)
        return (state if self.conditional else torch.zeros_like(state)), action

    def act(self, state: Tensor, generator: torch.Generator) -> Tensor:
        """An action of each state."""
        mode = torch.randint(MODES, (len(state),), generator=generator)
        centre = self.centres(state)[torch.arange(len(state)), mode]
        return centre + SPREAD * torch.randn(len(state), 2, generator=generator)


def train(row: str, bandit: Bandit, updates: int, seed: int = 0) -> ConsistencyActor:
    """Imitate the bandit's actions."""
    torch.manual_seed(seed)
    actor = ConsistencyActor(1, 2, ActorConfig(**{"objective": row, "hidden": HIDDEN, **SETTINGS[row]}))
    network = FlatModule(copy.deepcopy(actor))
    weights = network.initial.clone()
    average, mean, square = weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights)
    generator = torch.Generator().manual_seed(seed)

    def loss(weights: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        each, metrics = network(weights).loss(**given)
        return each.mean(), metrics

    for update in range(updates):
        state, action = bandit.draw(BATCH, generator)
        given: dict[str, Any] = {
            "state": state,
            "action": action,
            "teacher": actor.config.function(partial(network(average).predict, state)),
            "progress": torch.tensor(update / updates),
            "noise": noise.draw(actor.loss_noise(BATCH), generator),
        }
        _, gradient, _ = value_and_grad(partial(loss, given=given), weights)
        rate = RATE * 0.5 * (1 + math.cos(math.pi * update / updates))
        adam(weights, gradient, mean, square, torch.tensor(update + 1.0), rate)
        average.lerp_(weights, TEACHER)
    with torch.no_grad():
        for name, value in network.unflatten(weights).items():
            actor.get_parameter(name).copy_(value)
    return actor


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of samples [N, D], under a Gaussian kernel two deviations wide."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * (2 * SPREAD) ** 2)).mean()

    return float(mean(x, x) + mean(y, y) - 2 * mean(x, y))


def turned_back(action: Tensor, state: Tensor, bandit: Bandit) -> Tensor:
    """Actions in the frame of their state's first mode: there all states have the same modes."""
    first = bandit.centres(state)[:, 0] / RADIUS
    cos, sin = first.unbind(-1)
    x, y = action.unbind(-1)
    return torch.stack([cos * x + sin * y, cos * y - sin * x], -1)


def fractions(action: Tensor, state: Tensor, bandit: Bandit) -> Tensor:
    """The fraction [8] of actions [N, 2] within three deviations of each mode."""
    near: Tensor = (action.unsqueeze(-2) - bandit.centres(state)).norm(dim=-1) < 3 * SPREAD
    return near.double().mean(0)


def variation(found: Tensor) -> float:
    """Total variation distance of the fractions [8], and that near no mode, from an eighth each and zero."""
    missing = 1.0 - found.sum()
    return 0.5 * float((found - 1 / MODES).abs().sum() + missing.abs())


def score(action: Tensor, state: Tensor, bandit: Bandit, fresh: Tensor) -> Row:
    """How actions [N, 2] compare with the bandit's own.

    `covered` is the fraction within three deviations of a mode, `least` that of the least visited mode
    divided by 1/8, `mmd` and `w2` are distances of the first 1000 to fresh actions [1000, 2].
    """
    found = fractions(action, state, bandit)
    first = turned_back(action, state, bandit)[: len(fresh)]
    square = torch.cdist(first, fresh).square().numpy()
    rows, columns = linear_sum_assignment(square)
    return {
        "covered": round(float(found.sum()), 4),
        "least": round(MODES * float(found.min()), 3),
        "mmd": round(math.sqrt(max(0.0, kernel_distance(first, fresh))), 4),
        "w2": round(math.sqrt(square[rows, columns].mean()), 4),
    }


def evaluate(
    actor: ConsistencyActor, bandit: Bandit, seed: int = 1
) -> tuple[dict[int, Row], dict[int, Tensor]]:
    """Scores and samples by the number of steps, whose levels are searched for with other noise."""
    generator = torch.Generator().manual_seed(seed)
    state, _ = bandit.draw(10_000, generator)
    fresh = turned_back(bandit.act(state[:1000], generator), state[:1000], bandit)
    steps = STEPS[:1] if actor.config.objective == "distill" else STEPS
    f, levels = actor.function(state), actor.levels
    trial, _ = bandit.draw(4000, generator)
    found = greedy_refinements(
        actor.function(trial),
        torch.randn(steps[-1], len(trial), 2, generator=generator),
        levels,
        lambda action: variation(fractions(action, trial, bandit)),
        sweeps=1,
        clamp=1.0,
    )
    rows, actions = {}, {}
    for count in steps:
        z = torch.randn(count, len(state), 2, generator=generator)
        with torch.no_grad():
            actions[count] = sample(f, z, levels, found[: count - 1], clamp=1.0)
        rows[count] = score(actions[count], state, bandit, fresh)
        rows[count]["levels"] = [round(level, 3) for level in found[: count - 1]]
    return rows, actions


def reference(bandit: Bandit) -> Row:
    """The scores of the bandit's own actions: what sampling leaves of a perfect model's."""
    generator = torch.Generator().manual_seed(2)
    state, action = bandit.draw(10_000, generator)
    fresh = turned_back(bandit.act(state[:1000], generator), state[:1000], bandit)
    return score(action, state, bandit, fresh)


def draw(path: Path, actions: dict[str, dict[int, Tensor]]) -> None:
    """A picture of samples: a column for each objective, a row for each number of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(actions), 1.6 * len(STEPS)), layout="constrained")
    axes = figure.subplots(len(STEPS), len(actions), squeeze=False, sharex=True, sharey=True)
    for column, (name, by_steps) in enumerate(actions.items()):
        axes[0][column].set_title(name, fontsize=9)
        for row, steps in enumerate(STEPS):
            panel = axes[row][column]
            panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
            panel.set_ylabel(f"{steps} step{'s' * (steps > 1)}" if column == 0 else "", fontsize=9)
            if steps in by_steps:
                panel.scatter(*by_steps[steps][:2000].T.numpy(), s=0.6, alpha=0.4, linewidths=0)
            else:
                panel.set_axis_off()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> Row:
    """Train, score and print; returns what `--json` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--bandits", nargs="+", default=["fixed", "conditional"])
    parser.add_argument("--updates", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the table's file; other rows of the same setting are kept")
    parser.add_argument("--picture", type=Path, help="where to draw the samples of the first bandit")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = {"updates": options.updates, "seed": options.seed, "hidden": list(HIDDEN), "batch": BATCH}
    table: Row = dict(setting)
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())
        if setting.items() <= before.items():
            table = before
    pictures: dict[str, dict[int, Tensor]] = {}
    for kind in options.bandits:
        bandit = Bandit(kind == "conditional")
        table.setdefault(kind, {})["data"] = reference(bandit)
        print(f"{kind:12} {'data':16} -  {table[kind]['data']}", flush=True)
        for name in options.objectives:
            began = time.process_time()
            actor = train(name, bandit, options.updates, options.seed)
            seconds = round(time.process_time() - began)
            rows, actions = evaluate(actor, bandit)
            table[kind][name] = {"settings": SETTINGS[name], "cpu_seconds": seconds, "steps": rows}
            pictures.setdefault(name, actions)
            if options.json:
                options.json.write_text(json.dumps(table, indent=2) + "\n")
            for steps, row in rows.items():
                print(f"{kind:12} {name:16} {steps}  {row}  {seconds} s", flush=True)
    if options.picture:
        draw(options.picture, pictures)
    return table


if __name__ == "__main__":
    main()
