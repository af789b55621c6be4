"""The actor outside its modules says what it says inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch

from cpql.actors import ActorConfig, ConsistencyActor, choose
from cpql.critics import TwinCritic
from cpql.deploy.export import export, fold, fold_critic
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.tasks import Task

ACTORS = {
    "one step": ActorConfig(hidden=(32, 32)),
    "three steps, clamped inside": ActorConfig(hidden=(32,), refinements=(2.0, 0.3), clamp="inside"),
    "unscaled": ActorConfig(hidden=(32, 32), parameterisation="unscaled", refinements=(2.0,)),
    "trig": ActorConfig("scm", hidden=(32, 32), refinements=(1.0, 0.3)),
    "flow": ActorConfig("ect", parameterisation="flow", hidden=(32,), refinements=(0.5,)),
    "average velocity": ActorConfig("meanflow", hidden=(32, 32), t_max=5.0, refinements=(1.0,)),
    "with a guide": ActorConfig("distill", hidden=(32, 32)),
    "before a tanh": ActorConfig(hidden=(32, 32), t_max=5.0, refinements=(0.8,), action_norm=True),
}


@pytest.fixture(params=list(ACTORS))
def policy(request: pytest.FixtureRequest) -> Policy:
    """A policy with odd bounds and normalised observations."""
    torch.manual_seed(0)
    actor = ConsistencyActor(5, 2, ACTORS[request.param])
    config = PolicyConfig(
        state_dim=5,
        action_dim=2,
        action_low=(-2.0, 0.0),
        action_high=(2.0, 10.0),
        actor=actor.config,
        critic_hidden=(8,),
        critic_layer_norm=False,
        candidates=1,
        temperature=1.0,
        task=Task("made", None),
        observation_mean=(1.0, 0.0, -3.0, 0.5, 0.0),
        observation_std=(2.0, 1.0, 0.1, 1.0, 5.0),
    )
    return Policy(actor, TwinCritic(5, 2, (8,)), config)


def expected(policy: Policy, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The module's own actions, in the environment's bounds."""
    mean, std = (
        np.array(v, np.float32) for v in (policy.config.observation_mean, policy.config.observation_std)
    )
    state = torch.from_numpy((observations - mean) / std)
    with torch.no_grad():
        unit = policy.actor.sample(state, noise=torch.from_numpy(noise)).numpy()
    low, high = np.array(policy.config.action_low), np.array(policy.config.action_high)
    scaled: np.ndarray = low + (unit + 1) / 2 * (high - low)
    return scaled


def drawn(policy: Policy, count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    observations = random.normal(size=(count, 5)).astype(np.float32)
    return observations, random.normal(size=(policy.actor.steps, count, 2)).astype(np.float32)


def test_numpy_and_onnx_agree_with_the_module(policy: Policy, tmp_path: Path) -> None:
    observations, noise = drawn(policy, 10_000)
    wanted = expected(policy, observations, noise)
    assert np.ptp(wanted, axis=0).min() > 0.5  # actions differ, or agreeing would be easy
    folded = fold(policy)
    np.testing.assert_allclose(folded(observations, noise), wanted, atol=1e-5)
    np.testing.assert_allclose(folded(observations[3], noise[:, 3]), wanted[3], atol=1e-5)
    path = export(policy, tmp_path / "actor.onnx").path
    assert [file.name for file in tmp_path.iterdir()] == ["actor.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, i.shape[-1]) for i in session.get_inputs()] == [("observation", 5), ("noise", 2)]
    for count in (1, 7, 10_000):
        given = {"observation": observations[:count], "noise": noise[:, :count]}
        # of actions ten wide, from observations of size 30
        np.testing.assert_allclose(session.run(["action"], given)[0], wanted[:count], atol=2e-5)


def test_one_observation_takes_the_short_way_to_the_same_action(policy: Policy) -> None:
    observations, _ = drawn(policy, 3)
    for deterministic in (False, True):
        policy.seed(4)
        short = [policy.predict(o, deterministic=deterministic)[0] for o in observations]
        policy.seed(4)
        long = [policy.predict(o[None], deterministic=deterministic)[0][0] for o in observations]
        np.testing.assert_allclose(short, long, atol=1e-5)
        assert short[0].dtype == long[0].dtype == np.float32 and short[0].shape == (2,)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_ranked_candidates_are_those_of_the_modules(policy: Policy, layer_norm: bool) -> None:
    critic = TwinCritic(5, 2, (32, 16), layer_norm=layer_norm)
    for parameter in critic.parameters():  # LayerNorm's too, and no two values almost the same
        parameter.data += torch.randn_like(parameter)
    ranked = Policy(policy.actor, critic, policy.config)
    ranked.candidates, ranked.temperature = 20, 0.7
    mean, std = torch.tensor(policy.config.observation_mean), torch.tensor(policy.config.observation_std)
    observations, _ = drawn(policy, 64)
    states = (torch.from_numpy(observations) - mean) / std
    low, high = np.array(policy.config.action_low), np.array(policy.config.action_high)
    for deterministic in (False, True):
        for count in (1, 64):
            generator = torch.Generator().manual_seed(0 if deterministic else 3)
            rows = 1 if deterministic else count

            def sample(state: torch.Tensor) -> torch.Tensor:
                noise = torch.randn((policy.actor.steps, rows, 20, 2), generator=generator)  # noqa: B023
                action: torch.Tensor = policy.actor.sample(
                    state, noise=noise.expand(policy.actor.noise_shape(*state.shape[:-1]))
                )
                return action

            with torch.no_grad():
                unit = choose(
                    sample,
                    critic,
                    states[:count],
                    candidates=20,
                    temperature=0.0 if deterministic else 0.7,
                    generator=generator,
                ).numpy()
            ranked.seed(3)
            actions, _ = ranked.predict(observations[:count], deterministic=deterministic)
            same = np.isclose(actions, low + (unit + 1) / 2 * (high - low), rtol=0, atol=1e-5).all(1)
            assert (~same).sum() <= count // 50, "but for two candidates that are worth the same to rounding"
    candidates = torch.rand(64, 20, 2) * 2 - 1
    with torch.no_grad():
        wanted = critic(states[:, None], candidates).numpy()
    spread = float(wanted.std())
    assert spread > 1.0
    folded = fold_critic(ranked)
    for values in (
        folded(observations[:, None], candidates.numpy()),
        folded.to("cpu")(torch.from_numpy(observations)[:, None], candidates, torch).numpy(),
    ):
        np.testing.assert_allclose(values, wanted, atol=1e-5 * spread, rtol=0.0)


def test_a_critic_has_the_weights_that_it_first_ranked_with(policy: Policy) -> None:
    observations, _ = drawn(policy, 8)
    policy.candidates = 30

    def actions() -> np.ndarray:
        policy.seed(0)
        return policy.predict(observations)[0]

    before = actions()
    for parameter in policy.critic.parameters():
        parameter.data.mul_(-50.0)
    np.testing.assert_array_equal(actions(), before)
    again = Policy(policy.actor, policy.critic, policy.config)
    again.candidates = 30
    again.seed(0)
    assert not np.array_equal(again.predict(observations)[0], before)
