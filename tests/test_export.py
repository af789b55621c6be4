"""A policy's folded form acts as its modules do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch

from cpql.actors import (
    ACTORS,
    ActorConfig,
    AnyActorConfig,
    DeterministicConfig,
    DiffusionConfig,
    FlowConfig,
    GaussianConfig,
    OneStepConfig,
    choose,
)
from cpql.critics import TwinCritic
from cpql.deploy.export import export
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.errors import ConfigError
from cpql.tasks import Task

CONFIGS: dict[str, AnyActorConfig] = {
    "one step": ActorConfig(hidden=(32, 32)),
    "three steps, clamped inside": ActorConfig(hidden=(32,), refinements=(2.0, 0.3), clamp="inside"),
    "unscaled": ActorConfig(hidden=(32, 32), parameterisation="unscaled", refinements=(2.0,)),
    "trig": ActorConfig("scm", hidden=(32, 32), refinements=(1.0, 0.3)),
    "flow": ActorConfig("ect", parameterisation="flow", hidden=(32,), refinements=(0.5,)),
    "average velocity": ActorConfig("meanflow", hidden=(32, 32), t_max=5.0, refinements=(1.0,)),
    "with a guide": ActorConfig("distill", hidden=(32, 32)),
    "before a tanh": ActorConfig(hidden=(32, 32), t_max=5.0, refinements=(0.8,), action_norm=True),
    "deterministic, ReLU": DeterministicConfig((32, 32)),
    "deterministic, Mish": DeterministicConfig((32,), "mish"),
    "Gaussian": GaussianConfig((32, 32), "gelu"),
    "diffusion": DiffusionConfig(hidden=(32, 32)),
    "flow, Euler": FlowConfig(4, hidden=(32, 32)),
    "distilled from a flow": OneStepConfig((32, 32), flow=FlowConfig(4, hidden=(16,))),
}
MEAN, STD = (1.0, 0.0, -3.0, 0.5, 0.0), (2.0, 1.0, 0.1, 1.0, 5.0)
LOW, HIGH = np.array([-2.0, 0.0]), np.array([2.0, 10.0])


def made(actor: AnyActorConfig, critic: TwinCritic | None = None, **changes: Any) -> Policy:
    """A policy with odd bounds and normalised observations."""
    torch.manual_seed(0)
    module = ACTORS[actor.kind](5, 2, actor)
    for parameter in module.parameters():  # so that actions differ from state to state
        parameter.data *= 1.5
    config = PolicyConfig(
        state_dim=5,
        action_dim=2,
        action_low=tuple(LOW.tolist()),
        action_high=tuple(HIGH.tolist()),
        actor=actor,
        critic_hidden=() if critic is None else (32, 16),
        critic_layer_norm=False,
        candidates=1,
        temperature=1.0,
        task=Task("made", None),
        observation_mean=MEAN,
        observation_std=STD,
    )
    return Policy(module, critic, replace(config, **changes))


@pytest.fixture(params=list(CONFIGS))
def policy(request: pytest.FixtureRequest) -> Policy:
    """A policy without a critic, of every kind of actor."""
    return made(CONFIGS[request.param])


def expected(policy: Policy, observations: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The module's own actions, in the environment's bounds."""
    state = torch.from_numpy((observations - np.array(MEAN, np.float32)) / np.array(STD, np.float32))
    with torch.no_grad():
        unit = policy.actor.sample(state, noise=torch.from_numpy(noise)).numpy()
    return np.asarray(LOW + (unit + 1) / 2 * (HIGH - LOW))


def drawn(policy: Policy, count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    observations = random.normal(size=(count, 5)) * STD + MEAN
    noise = random.normal(size=policy.actor.noise_shape(count))
    return observations.astype(np.float32), noise.astype(np.float32)


@pytest.mark.slow
def test_numpy_and_onnx_agree_with_the_module(policy: Policy, tmp_path: Path) -> None:
    observations, noise = drawn(policy, 10_000)
    target = expected(policy, observations, noise)
    assert np.ptp(target, axis=0).min() > 0.5  # actions differ, or agreeing would be easy
    actor = policy.folded
    np.testing.assert_allclose(actor.scale(actor.sample(observations, noise)), target, atol=5e-5)
    one = actor.scale(actor.sample(observations[3], noise[:, 3]))
    np.testing.assert_allclose(one, target[3], atol=5e-5)
    path = export(policy, tmp_path / "actor.onnx").path
    assert [file.name for file in tmp_path.iterdir()] == ["actor.onnx"]
    session = onnxruntime.InferenceSession(path)
    names = ["observation", "noise"] if policy.actor.draws else ["observation"]
    assert [each.name for each in session.get_inputs()] == names
    for count in (1, 7, 10_000):
        given = dict(zip(names, (observations[:count], noise[:, :count]), strict=False))
        # of actions ten wide
        np.testing.assert_allclose(session.run(["action"], given)[0], target[:count], atol=5e-5)


def test_one_observation_gets_the_same_action_as_a_batch(policy: Policy) -> None:
    """numpy's folded form acts for the one, the module for the other."""
    observations, _ = drawn(policy, 3)
    for deterministic in (False, True):
        policy.seed(4)
        single = [policy.predict(o, deterministic=deterministic)[0] for o in observations]
        policy.seed(4)
        batch = [policy.predict(o[None], deterministic=deterministic)[0][0] for o in observations]
        np.testing.assert_allclose(single, batch, atol=5e-5)
        assert single[0].dtype == batch[0].dtype == np.float32 and single[0].shape == (2,)


def test_a_batch_gets_the_actions_of_the_module(policy: Policy) -> None:
    observations, _ = drawn(policy, 64)
    noise = torch.randn(policy.actor.noise_shape(64), generator=torch.Generator().manual_seed(3))
    for deterministic in (False, True):
        policy.seed(3)
        actions, _ = policy.predict(observations, deterministic=deterministic)
        used = torch.zeros_like(noise) if deterministic else noise
        np.testing.assert_allclose(actions, expected(policy, observations, used.numpy()), atol=1e-6)


def test_only_a_policy_with_a_critic_has_candidates(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="candidates=3: expected 1 for a policy without a critic"):
        policy.candidates = 3
    with pytest.raises(ConfigError, match="candidates=3: expected 1 for a policy without a critic"):
        replace(policy.config, candidates=3)
    policy.candidates = 1


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("actor", list(CONFIGS))
def test_ranked_candidates_are_those_of_the_modules(actor: str, layer_norm: bool, activation: Any) -> None:
    torch.manual_seed(1)
    critic = TwinCritic(5, 2, (32, 16), layer_norm=layer_norm, activation=activation)
    for parameter in critic.parameters():  # LayerNorm's too, and no two values almost the same
        parameter.data += torch.randn_like(parameter)
    policy = made(CONFIGS[actor], critic, critic_layer_norm=layer_norm, critic_activation=activation)
    policy.candidates, policy.temperature = 20, 0.7
    observations, _ = drawn(policy, 64)
    states = (torch.from_numpy(observations) - torch.tensor(MEAN)) / torch.tensor(STD)
    for deterministic in (False, True):
        for count in (1, 64):
            generator = torch.Generator().manual_seed(0 if deterministic else 3)
            rows = 1 if deterministic else count

            def sample(state: torch.Tensor) -> torch.Tensor:
                noise = torch.randn(policy.actor.noise_shape(rows, 20), generator=generator)  # noqa: B023
                shape = policy.actor.noise_shape(*state.shape[:-1])
                action: torch.Tensor = policy.actor.sample(state, noise=noise.expand(shape))
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
            policy.seed(3)
            actions, _ = policy.predict(observations[:count], deterministic=deterministic)
            same = np.isclose(actions, LOW + (unit + 1) / 2 * (HIGH - LOW), rtol=0, atol=5e-5).all(1)
            assert (~same).sum() <= count // 50, "but for two candidates that are worth the same to rounding"


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_folded_values_are_those_of_the_critic(layer_norm: bool, activation: Any) -> None:
    torch.manual_seed(1)
    critic = TwinCritic(5, 2, (32, 16), layer_norm=layer_norm, activation=activation)
    for parameter in critic.parameters():
        parameter.data += torch.randn_like(parameter)
    policy = made(CONFIGS["one step"], critic, critic_layer_norm=layer_norm, critic_activation=activation)
    observations, _ = drawn(policy, 64)
    observations, candidates = observations[:, None], torch.rand(64, 20, 2) * 2 - 1
    states = (torch.from_numpy(observations) - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        target = critic(states, candidates).numpy()
    spread = float(target.std())
    assert spread > 1.0
    folded, in_torch = policy.folded, policy.folded.to("cpu")
    for k in range(2):
        for values in (
            folded.value(observations, candidates.numpy(), k),
            in_torch.value(torch.from_numpy(observations), candidates, k, torch).numpy(),
        ):
            np.testing.assert_allclose(values, target[k], atol=1e-5 * spread, rtol=0.0)


def test_a_critic_has_the_weights_that_it_first_ranked_with() -> None:
    torch.manual_seed(1)
    policy = made(CONFIGS["one step"], TwinCritic(5, 2, (32, 16)))
    observations, _ = drawn(policy, 8)
    policy.candidates = 30

    def actions(policy: Policy) -> np.ndarray:
        policy.seed(0)
        return policy.predict(observations)[0]

    before = actions(policy)
    assert policy.critic is not None
    for parameter in policy.critic.parameters():
        parameter.data.mul_(-50.0)
    np.testing.assert_array_equal(actions(policy), before)
    again = Policy(policy.actor, policy.critic, policy.config)
    again.candidates = 30
    assert not np.array_equal(actions(again), before)
