"""An operator holds a joint of an arm, and the actor moves the others so that the hand still arrives.

    python examples/override.py

The arm lies in a plane and has four joints, two more than its hand needs: there are many ways to move the
hand towards the target. The demonstrator takes any of them at random, and a consistency actor learns them
all, so it knows how joints go together. Nothing is trained for what comes then: each step the operator says
how fast the first joint goes, and `actor.sample(state, known=, mask=)` makes the rest of the action to fit;
`low` and `high` keep the other joints slow. The other way is to paste the operator's speed over the action.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from cpql import ActorConfig, ConsistencyActor

JOINTS = 4
SPEED = 0.15  # radians a step, of the fastest joint


class Arm(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A planar arm of length 1, driven by its joints' speeds.

    The observation [2 J + 2] is the links' directions and the way from the hand to the target;
    the action [J] is the joints' speeds; the reward is minus the hand's distance from the target.
    """

    observation_space = gym.spaces.Box(-4.0, 4.0, (2 * JOINTS + 2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (JOINTS,), np.float32)

    def hand(self) -> NDArray[np.float64]:
        """Where it is, [2]."""
        along = np.cumsum(self.angles)
        return np.array([np.cos(along).sum(), np.sin(along).sum()]) / JOINTS

    def jacobian(self) -> NDArray[np.float64]:
        """How the hand moves with each joint, [2, J]."""
        along = np.cumsum(self.angles)
        tails = np.array([-np.sin(along), np.cos(along)])[:, ::-1].cumsum(1)[:, ::-1]
        return tails / JOINTS

    def observe(self) -> NDArray[np.float32]:
        """What the actor sees."""
        along = np.cumsum(self.angles)
        parts = (np.cos(along), np.sin(along), self.target - self.hand())
        return np.concatenate(parts).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Bend the arm and put the target somewhere in its reach, both at random."""
        super().reset(seed=seed)
        self.angles = self.np_random.uniform(-1.5, 1.5, JOINTS)
        radius, angle = self.np_random.uniform(0.3, 0.8), self.np_random.uniform(-np.pi, np.pi)
        self.target = radius * np.array([np.cos(angle), np.sin(angle)])
        return self.observe(), {}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move all joints for a moment."""
        self.angles = self.angles + SPEED * np.clip(action, -1, 1)
        return self.observe(), -float(np.linalg.norm(self.target - self.hand())), False, False, {}


def demonstrate(arm: Arm, random: np.random.Generator) -> NDArray[np.float32]:
    """One of the many actions that move the hand towards the target: what joints are free to do is random."""
    jacobian = arm.jacobian()
    way = arm.target - arm.hand()
    target = way * min(1.0, 0.08 / float(np.linalg.norm(way)))
    inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-3 * np.eye(2))
    free = random.uniform(-1.0, 1.0, JOINTS)
    free -= inverse @ (jacobian @ free)  # only what leaves the hand where it is
    action = inverse @ target / SPEED + free
    return np.asarray(action / max(1.0, np.abs(action).max()), np.float32)


def collect(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations and actions of demonstrations of 40 steps."""
    arm, random = Arm(), np.random.default_rng(seed)
    states, actions = [], []
    for row in range(rows):
        if row % 40 == 0:
            state, _ = arm.reset(seed=seed + row)
        states.append(state)
        actions.append(demonstrate(arm, random))
        state, *_ = arm.step(actions[-1])
    return torch.from_numpy(np.stack(states)), torch.from_numpy(np.stack(actions))


def learn(states: torch.Tensor, actions: torch.Tensor, updates: int) -> ConsistencyActor:
    """Imitate the demonstrations, in seven steps: from the second on, a fixed joint conditions the rest."""
    levels = (2.0, 1.0, 0.7, 0.5, 0.35, 0.25)
    config = ActorConfig("ect", t_max=5.0, refinements=levels, hidden=(128, 128, 128))
    actor = ConsistencyActor(states.shape[1], actions.shape[1], config)
    optimiser = torch.optim.Adam(actor.parameters(), 1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for update in range(updates):
        rows = torch.randint(len(states), (256,))
        loss, _ = actor.loss(states[rows], actions[rows], progress=update / updates)
        optimiser.zero_grad()
        loss.mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        decay.step()
    return actor


def operate(actor: ConsistencyActor, how: str, speed: float, limit: float, arms: int) -> float:
    """The hand's distance from the target in the last ten of 40 steps, while the first joint is fixed."""
    torch.manual_seed(0)
    fixed, which = torch.tensor([speed, 0, 0, 0]), torch.tensor([True, False, False, False])
    environments = [Arm() for _ in range(arms)]
    states = np.stack([arm.reset(seed=1_000_000 + i)[0] for i, arm in enumerate(environments)])
    distances = []
    for _ in range(40):
        seen = torch.from_numpy(states)
        with torch.no_grad():
            if how == "edited":
                actions = actor.sample(seen, known=fixed, mask=which, low=-limit, high=limit)
            else:
                actions = actor.sample(seen, low=-limit, high=limit)
            if how == "pasted":
                actions = torch.where(which, fixed, actions)
        if how != "free":
            assert (actions[:, 0] == fixed[0]).all()
        assert actions[:, 1:].abs().max() <= limit
        results = [arm.step(action) for arm, action in zip(environments, actions.numpy(), strict=True)]
        states = np.stack([result[0] for result in results])
        distances.append([-result[1] for result in results])
    return float(np.mean(distances[-10:]))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Learn, operate, and say how far from the target the hand was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=40_000, help="of demonstrations (default: %(default)s)")
    add("--updates", type=int, default=8_000, help="of the actor (default: %(default)s)")
    add("--speed", type=float, default=0.6, help="of the fixed joint, in [-1, 1] (default: %(default)s)")
    add("--limit", type=float, default=0.8, help="of the other joints' speed (default: %(default)s)")
    add("--arms", type=int, default=50, help="that it is tried on (default: %(default)s)")
    o = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    actor = learn(*collect(o.rows, 0), o.updates)
    means = {}
    for how, words in (
        ("free", "no operator"),
        ("pasted", "first joint fixed, the rest as it was"),
        ("edited", "first joint fixed, the rest made to fit"),
    ):
        means[how] = operate(actor, how, o.speed, o.limit, o.arms)
        print(f"{words}: {means[how]:.3f} from the target (the arm is 1 long)")
    return means


if __name__ == "__main__":
    main()
