"""How a policy is scored: whole episodes in many environments at once, with everything a score depends on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpql.deploy.policy import Policy
from cpql.environments import make_task_environment, widths
from cpql.errors import ConfigError, Interrupted
from cpql.io import versions
from cpql.tasks import Task

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Returns of some episodes.

    Attributes:
        task: gives the environment and the references of the score.
        returns: undiscounted, one for each episode.
        lengths: in steps.
        seed: episode i was reset with seed + i.
        rule: how actions were chosen, in words.
        episode_limit: steps after which an unfinished episode was cut.
        cut: how many episodes were cut.
        successes: whether each episode succeeded, 1 or 0, where the task's score is made of that; else empty.
        actions: of each episode, [T, A] in the environment's bounds, if they were to be kept; else empty.
    """

    task: Task
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    seed: int
    rule: str
    episode_limit: int = 10_000
    cut: int = 0
    successes: tuple[float, ...] = ()
    actions: tuple[NDArray[np.float32], ...] = field(default=(), repr=False)

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns (N - 1); 0 for one episode."""
        return float(np.std(self.returns, ddof=1)) if len(self.returns) > 1 else 0.0

    @property
    def score(self) -> float | None:
        """The mean return normalised with the task's references, or the share of successes, in percent.

        None without references.
        """
        return 100 * float(np.mean(self.successes)) if self.successes else self.task.score(self.mean)

    @property
    def score_interval(self) -> tuple[float, float] | None:
        """95% interval of the score over episodes: that of the mean return, or Wilson's of a share."""
        if self.successes:
            from scipy.stats import binomtest

            found = binomtest(int(sum(self.successes)), len(self.successes)).proportion_ci(method="wilson")
            return 100 * float(found.low), 100 * float(found.high)
        low, high = map(self.task.score, self.interval)
        return None if low is None or high is None else (low, high)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean return over episodes (Student's t); it doesn't cover training seeds."""
        from scipy.stats import t

        n = len(self.returns)
        if n < 2:
            return self.mean, self.mean
        half = float(t.ppf(0.975, n - 1)) * self.std / n**0.5
        return self.mean - half, self.mean + half

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        low, high = self.interval
        task, interval = self.task, self.score_interval
        references = {"of": task.benchmark, "random": task.random_return, "expert": task.expert_return}
        return {
            "score": self.score,
            "score_interval": None if interval is None else list(interval),
            "measure": task.measure,
            "return_mean": self.mean,
            "return_std": self.std,
            "return_interval": [low, high],
            "length_mean": float(np.mean(self.lengths)),
            "episodes": len(self.returns),
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            **({"successes": list(self.successes)} if self.successes else {}),
            "seed": self.seed,
            "rule": self.rule,
            "episode_limit": self.episode_limit,
            "episodes_cut": self.cut,
            "environment": task.id,
            "environment_options": task.env_options | task.reset_options,
            "note": task.note,
            "references": references,
            "versions": versions(),
        }


def evaluate(
    policy: Policy,
    task: Task,
    episodes: int,
    *,
    seed: int = 0,
    deterministic: bool = False,
    at_once: int | None = None,
    episode_limit: int = 10_000,
    keep_actions: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Run whole episodes and collect their returns.

    Each episode has an environment and a reset seed of its own, so the result doesn't depend on which
    episodes end early. The policy is called once a step for all that are still running.

    Args:
        policy: its noise is seeded with `seed`.
        task: where to act.
        episodes: how many.
        seed: of the environments and the noise.
        deterministic: see `Policy.predict`.
        at_once: how many environments run side by side; None takes the task's number.
        episode_limit: steps after which an unfinished episode is cut.
        keep_actions: keep all actions, from which `cpql.training.video` shows an episode again.
        stopped: called at every step; True ends the evaluation.

    Raises:
        Interrupted: `stopped` returned True.
        ConfigError: the environment can't be made, doesn't fit the policy, or doesn't say what succeeds.
        ActingError: the environment failed.
    """
    policy.seed(seed)
    at_once = at_once or task.at_once
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    successes = np.zeros(episodes) if task.measure == "success" else None
    kept: list[list[NDArray[np.float32]]] = [[] for _ in range(episodes)]
    cut = 0
    for start in range(0, episodes, at_once):
        indices = range(start, min(start + at_once, episodes))
        with ExitStack() as stack:
            environments = [stack.enter_context(closing(make_task_environment(task))) for _ in indices]
            found, expected = widths(environments[0]), (policy.config.state_dim, policy.config.action_dim)
            if found != expected:
                raise ConfigError(
                    f"environment {task.id}: observations and actions are {found[0]} and {found[1]} wide: "
                    f"expected {expected[0]} and {expected[1]}, the policy's"
                )
            observations: list[NDArray[np.float64]] = [
                environments[i].reset(seed=seed + index)[0] for i, index in enumerate(indices)
            ]
            running = list(range(len(environments)))
            for _ in range(episode_limit):
                if stopped():
                    raise Interrupted("the evaluation was stopped")
                rows = np.stack([observations[i] for i in running])
                actions, _ = policy.predict(rows, deterministic=deterministic)
                ended = set()
                for i, action in zip(running, actions, strict=True):
                    observations[i], reward, terminated, truncated, info = environments[i].step(action)
                    if keep_actions:
                        kept[start + i].append(np.array(action, np.float32))
                    returns[start + i] += float(reward)
                    lengths[start + i] += 1
                    if successes is not None:
                        successes[start + i] = _success(info, task)
                    if terminated or truncated:
                        ended.add(i)
                running = [i for i in running if i not in ended]
                if not running:
                    break
            cut += len(running)
    rule, steps = "actor alone", policy.actor.steps
    if policy.candidates > 1:
        rule = f"{policy.candidates} candidates ranked by Q"
        rule += "" if deterministic else f", temperature {policy.temperature:g}"
    sampled = not deterministic and (policy.actor.draws or policy.candidates > 1)
    rule += f", {'sampled' if sampled else 'deterministic'}, {steps} step{'s' if steps > 1 else ''}"
    shares = () if successes is None else tuple(successes.tolist())
    every = tuple(returns.tolist()), tuple(lengths.tolist())
    taken = tuple(np.stack(episode) for episode in kept) if keep_actions else ()
    return Evaluation(task, *every, seed, rule, episode_limit, cut, shares, taken)


def _success(info: dict[str, Any], task: Task) -> float:
    if "success" not in info:
        raise ConfigError(
            f"environment {task.id} says of no step whether it succeeded: expected env.measure=return"
        )
    return float(info["success"])
