"""Distil a trained policy into an actor of one step that acts alone, DDPG-style.

    python examples/distil.py --checkpoint runs/hopper-medium/cpql/quick/seed0 --folder runs/distilled
    python examples/distil.py --checkpoint ... --candidates 50 --folder ...      # what the papers act by

The teacher is any cpql checkpoint, however it acts: in several steps, or by the best of many candidates. The
pupil is a consistency actor of one step. It acts in the environment, the teacher labels the states that it
visits (Ross et al. 2011, DAgger; in the first round the teacher acts), and the pupil minimises

    mean |a - a_teacher|^2 / A - eta mean min_i Q_i(s, a) / mean |Q|,    a = pupil(s, z)

where the second term is DDPG's (Lillicrap et al. 2016), by the critic in the checkpoint. Without
candidates the teacher starts from the pupil's own noise z, so that the pupil keeps all of its modes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpql import ActorConfig, ConsistencyActor, Policy
from cpql.environments import make_task_environment
from cpql.io import versions
from cpql.tasks import Task
from cpql.training.evaluation import Evaluation, evaluate


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="the teacher: a run's folder, a checkpoint's or a policy's")
    add("--folder", type=Path, help="where to save the pupil; nothing is saved where it isn't given")
    add("--candidates", type=int, help="of the teacher (default: its own)")
    add("--rounds", type=int, default=4, help="of acting and learning (default: %(default)s)")
    add("--steps", type=int, default=5_000, help="of the environment, each round (default: %(default)s)")
    add("--updates", type=int, default=2_000, help="each round (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="default: %(default)s")
    add("--hidden", type=int, nargs="+", help="widths of the pupil's layers (default: the teacher's)")
    add("--rate", type=float, default=1e-3, help="Adam's, falling to 0 (default: %(default)s)")
    add("--eta", type=float, default=0.0, help="weight of DDPG's term (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--episodes", type=int, default=20, help="of each evaluation (default: %(default)s)")
    return parser.parse_args(argv)


def visit(policy: Policy, task: Task, steps: int, seed: int) -> NDArray[np.float32]:
    """Observations [steps, S] that the policy visits, in ten environments at once."""
    policy.seed(seed)
    environments = [make_task_environment(task) for _ in range(10)]
    now = [environment.reset(seed=seed + i)[0] for i, environment in enumerate(environments)]
    seen: list[NDArray[np.float32]] = []
    while 10 * len(seen) < steps:
        seen.append(np.stack(now).astype(np.float32))
        actions, _ = policy.predict(seen[-1])
        for i, environment in enumerate(environments):
            now[i], _, terminated, truncated, _ = environment.step(actions[i])
            if terminated or truncated:
                now[i] = environment.reset()[0]
    for environment in environments:
        environment.close()
    return np.concatenate(seen)[:steps]


class Teacher:
    """A policy's actions in [-1, 1] for given observations."""

    def __init__(self, policy: Policy) -> None:
        self.policy, c = policy, policy.config
        self.low, self.high = np.array(c.action_low), np.array(c.action_high)

    def states(self, observations: NDArray[np.float32]) -> Tensor:
        """The input of actor and critic: normalised, if the policy does that."""
        return self.policy.normalise(torch.from_numpy(observations))

    @torch.no_grad()
    def acts(self, observations: NDArray[np.float32], z: Tensor) -> Tensor:
        """Actions [N, A]; from the noise z [N, A], where no candidates compete."""
        actor, states = self.policy.actor, self.states(observations)
        if self.policy.candidates == 1:
            noise = torch.randn(actor.noise_shape(len(z)))
            noise[:1] = z
            return actor.sample(states, noise=noise)
        parts = np.array_split(observations, 1 + len(observations) // 500)  # each has many candidates
        actions = np.concatenate([self.policy.predict(part)[0] for part in parts])
        return torch.as_tensor((actions - self.low) / (self.high - self.low) * 2 - 1, dtype=torch.float32)


def distil(policy: Policy, o: argparse.Namespace) -> Policy:
    """Train the pupil; returns it as a policy of its own."""
    torch.manual_seed(o.seed)
    policy.seed(o.seed)
    teacher, config = Teacher(policy), policy.config
    # Of an ActorConfig's objective only the parameterisation matters here: what trains the pupil is below.
    made = config.actor if isinstance(config.actor, ActorConfig) else ActorConfig()
    hidden = tuple(o.hidden or config.actor.hidden)
    made = ActorConfig(t_min=made.t_min, t_max=made.t_max, hidden=hidden)
    pupil = ConsistencyActor(config.state_dim, config.action_dim, made)
    origin = {
        "agent": "distilled",
        "seed": o.seed,
        "versions": versions(),
        "teacher": {"candidates": policy.candidates, "steps": policy.actor.steps, "origin": config.origin},
    }
    described = replace(config, actor=made, candidates=1, origin=origin)

    def present() -> Policy:
        copied = ConsistencyActor(config.state_dim, config.action_dim, made)
        copied.load_state_dict(pupil.state_dict())
        return Policy(copied, policy.critic, described)

    optimiser = torch.optim.Adam(pupil.parameters(), o.rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, o.rounds * o.updates)
    states, noises, actions = (torch.empty(0, n) for n in (config.state_dim, *[config.action_dim] * 2))
    for k in range(o.rounds):
        seen = visit(present() if k else policy, config.task, o.steps, o.seed + 1000 * k)
        z = torch.randn(len(seen), config.action_dim)
        states, noises = torch.cat([states, teacher.states(seen)]), torch.cat([noises, z])
        actions = torch.cat([actions, teacher.acts(seen, z)])
        errors = []
        for _ in range(o.updates):
            rows = torch.randint(len(states), (o.batch_size,))
            action = pupil.sample(states[rows], noise=noises[rows][None])
            error = (action - actions[rows]).square().mean()
            loss = error
            if o.eta and policy.critic is not None:
                q = policy.critic(states[rows], action)
                loss = error - o.eta * q.amin(0).mean() / q.abs().mean().detach()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            decay.step()
            errors.append(float(error.detach()))
        print(f"round {k + 1}: {len(states):,} states, squared error {np.mean(errors[-200:]):.4f}")
    return present()


def describe(name: str, policy: Policy, result: Evaluation) -> None:
    """Print its score and the time of an action, in one line."""
    observation = np.zeros(policy.config.state_dim, np.float32)
    policy.predict(observation)
    began = time.perf_counter()
    for _ in range(300):
        policy.predict(observation)
    cost = (time.perf_counter() - began) / 300 * 1e3
    score = "" if result.score is None else f"score {result.score:.1f}, "
    spread = f"return {result.mean:,.0f} ± {result.std:,.0f}"
    print(f"{name}: {score}{spread}; {cost:.2f} ms an action; {result.rule}")


def main(argv: list[str] | None = None) -> Policy:
    """Distil, save and score both."""
    o = arguments(argv)
    if o.folder is not None and o.folder.exists():
        raise SystemExit(f"{o.folder} is there already: name another folder")
    torch.set_num_threads(1)
    teacher = Policy.load(o.checkpoint)
    if o.candidates is not None:
        teacher.candidates = o.candidates
    pupil = distil(teacher, o)
    if o.folder is not None:
        pupil.save(o.folder)
    task = teacher.config.task
    for name, policy in (("teacher", teacher), ("pupil", pupil)):
        describe(name, policy, evaluate(policy, task, o.episodes, seed=10_000))
    return pupil


if __name__ == "__main__":
    main()
