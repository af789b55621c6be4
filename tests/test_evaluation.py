"""Evaluating many episodes at once scores what episode by episode would."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from cpql.actors import ActorConfig, ConsistencyActor, choose
from cpql.critics import TwinCritic
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.environments import make_task_environment
from cpql.errors import ConfigError
from cpql.tasks import load_task
from cpql.training.evaluation import evaluate
from cpql.training.video import check_video, record

CANDIDATES = 6


@pytest.fixture
def policy() -> Policy:
    """An untrained policy of Hopper that ranks candidates."""
    torch.manual_seed(0)
    hidden = (32, 32)
    task = dataclasses.replace(load_task("hopper-medium"), env_options={"max_episode_steps": 12})
    actor = ConsistencyActor(11, 3, ActorConfig(hidden=hidden, clamp="inside"))
    bounds = (-1.0,) * 3, (1.0,) * 3
    config = PolicyConfig(11, 3, *bounds, actor.config, hidden, True, CANDIDATES, 1.0, task)
    return Policy(actor, TwinCritic(11, 3, hidden, layer_norm=True), config)


def test_the_best_candidates_score_as_the_modules_do_one_by_one(policy: Policy) -> None:
    task, returns = policy.config.task, []
    assert policy.critic is not None
    noise = torch.randn((1, 1, CANDIDATES, 3), generator=torch.Generator().manual_seed(0))
    for episode in range(3):
        environment = make_task_environment(task)
        observation, _ = environment.reset(seed=episode)
        total, over = 0.0, False
        while not over:
            state = torch.from_numpy(observation[None].astype(np.float32))
            with torch.no_grad():
                action = choose(
                    lambda s: policy.actor.sample(s, noise=noise),
                    policy.critic,
                    state,
                    candidates=CANDIDATES,
                    temperature=0.0,
                )
            observation, reward, terminated, truncated, _ = environment.step(action[0].numpy())
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    found = evaluate(policy, task, 3, deterministic=True)
    np.testing.assert_allclose(found.returns, returns, rtol=1e-4)
    assert np.ptp(returns) > 0.01  # episodes differ, or agreeing would be easy
    assert evaluate(policy, task, 3, deterministic=True, at_once=2).returns == pytest.approx(
        found.returns, rel=1e-4
    )


def test_a_seed_gives_its_returns_again(policy: Policy) -> None:
    task = policy.config.task
    first, again, other = (evaluate(policy, task, 4, seed=seed).returns for seed in (1, 1, 2))
    assert first == again != other


def test_actions_are_kept_where_they_are_wanted(policy: Policy) -> None:
    """Taken again from the same seed they give the same returns: what a video shows is the episode itself."""
    task = policy.config.task
    found = evaluate(policy, task, 3, seed=5, keep_actions=True, episode_limit=50)
    assert evaluate(policy, task, 1, seed=5, episode_limit=5).actions == ()
    for episode, actions in enumerate(found.actions):
        assert actions.shape == (found.lengths[episode], 3)
        with closing(make_task_environment(task)) as environment:
            environment.reset(seed=5 + episode)
            assert sum(float(environment.step(a)[1]) for a in actions) == found.returns[episode]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_videos(policy: Policy, tmp_path: Path) -> None:
    import imageio_ffmpeg  # type: ignore[import-untyped]

    try:
        check_video(policy.config.task)
    except ConfigError as error:
        pytest.skip(str(error))
    found = evaluate(policy, policy.config.task, 4, seed=5, keep_actions=True, episode_limit=20)
    paths = record(found, 3, tmp_path / "films", "x")
    best, worst = max(found.returns), min(found.returns)
    assert paths[0].name == f"x_best_{best:.0f}.mp4" and paths[-1].name == f"x_worst_{worst:.0f}.mp4"
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(paths[0]))
    assert frames == found.lengths[found.returns.index(best)] + 1
    assert sorted(path.name for path in (tmp_path / "films").iterdir()) == sorted(p.name for p in paths)


def test_a_video_that_can_not_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ConfigError, match=r"pip install 'cpql\[video\]'"):
        check_video(load_task("hopper-medium"))
