"""TorchRL collects with our actor and trains it by our objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import OPTIONS
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import ActionScaling, GymEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ValueOperator
from torchrl.objectives import DDPGLoss, SoftUpdate

from cpql.actors import ActorConfig, ConsistencyActor, DeterministicActor
from cpql.consistency import OBJECTIVES
from cpql.interop.torchrl import ConsistencyLoss, ConsistencyModule
from cpql.noise import draw

CONFIGS: dict[str, dict[str, Any]] = {name: OPTIONS.get(name, {}) for name in OBJECTIVES}


def make(objective: str = "ct", state_dim: int = 3, action_dim: int = 2, **options: Any) -> ConsistencyModule:
    torch.manual_seed(0)
    config = ActorConfig(objective, **{**CONFIGS[objective], "hidden": (16, 16), **options})
    return ConsistencyModule(ConsistencyActor(state_dim, action_dim, config))


def data(*shape: int) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    return TensorDict(
        {
            "observation": torch.randn(*shape, 3, generator=generator),
            "action": torch.rand(*shape, 2, generator=generator) * 2 - 1,
        },
        shape,
    )


def test_a_collector_and_a_buffer_take_it() -> None:
    policy = make("denoise", action_dim=1, t_max=5.0)
    environment = TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling())
    assert environment.action_spec.space.low == -1.0
    collector = Collector(
        environment, policy, frames_per_batch=120, total_frames=240, auto_register_policy_transforms=False
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(240), batch_size=32)
    for collected in collector:
        buffer.extend(collected)
    collector.shutdown()
    assert len(buffer) == 240
    batch = buffer.sample()
    assert batch["action"].shape == (32, 1) and batch["action"].std() > 0.01
    # what the environment was given is twice as much: its reward knows the torque
    angle, torque = torch.atan2(*batch["observation"][:, [1, 0]].unbind(-1)), 2 * batch["action"][:, 0]
    reward = -(angle**2 + 0.1 * batch["observation"][:, 2] ** 2 + 0.001 * torque**2)
    torch.testing.assert_close(batch["next", "reward"].squeeze(-1), reward, atol=1e-4, rtol=1e-4)

    loss = ConsistencyLoss(policy, delay_actor=False)
    optimiser = torch.optim.Adam(loss.parameters(), 1e-2)

    def measure() -> float:
        torch.manual_seed(0)
        return float(loss(buffer[:])["loss_imitation"].detach())

    before = measure()
    for _ in range(100):
        value = loss(buffer.sample())["loss_imitation"]
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert measure() < 0.8 * before


def test_noise_is_drawn_where_torchrl_explores() -> None:
    policy = make("ect")
    actor, state = policy.module.actor, data(5)["observation"]

    def act() -> torch.Tensor:
        torch.manual_seed(4)
        action: torch.Tensor = policy(TensorDict({"observation": state}, [5]))["action"]
        return action

    torch.manual_seed(4)
    drawn = actor(state)
    fixed = actor.sample(state, noise=torch.zeros(actor.noise_shape(*state.shape[:-1])))
    assert not torch.allclose(drawn, fixed)
    with set_exploration_type(ExplorationType.RANDOM):
        assert torch.equal(act(), drawn)
    for other in (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN):
        with set_exploration_type(other):
            assert torch.equal(act(), fixed)


def test_an_actor_without_noise_is_a_module_too() -> None:
    torch.manual_seed(0)
    policy, state = ConsistencyModule(DeterministicActor(3, 2)), data(5)["observation"]
    for kind in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(kind):
            action = policy(TensorDict({"observation": state}, [5]))["action"]
        assert torch.equal(action, policy.module.actor(state))


@pytest.mark.parametrize("delay_actor", [True, False])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_the_loss_is_the_actors_own(objective: str, delay_actor: bool) -> None:
    policy, batch = make(objective), data(64)
    actor = policy.module.actor
    loss = ConsistencyLoss(policy, delay_actor=delay_actor)
    updater = SoftUpdate(loss, tau=0.5) if delay_actor else None
    teacher = make(objective).module.actor  # the same initial weights
    if updater is not None:
        with torch.no_grad():
            for one, two in zip(actor.parameters(), teacher.parameters(), strict=True):
                one.add_(0.1 * torch.randn_like(one))
                two.lerp_(one, 0.5)
        updater.step()
    loss.progress = 0.3
    torch.manual_seed(7)
    found = loss(batch)
    found["loss_imitation"].backward()
    gradient = {name: parameter.grad.clone() for name, parameter in actor.named_parameters()}

    torch.manual_seed(7)
    state, action = batch["observation"], batch["action"]
    noise = draw(actor.loss_noise(64))
    function = teacher.function(state, noise.get("drop")) if delay_actor else None
    target, metrics = actor.loss(state, action, teacher=function, progress=0.3, noise=noise)
    torch.testing.assert_close(found["loss_imitation"], target.mean())
    actor.zero_grad()
    target.mean().backward()
    for name, parameter in actor.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)
    assert set(found.keys()) == {"loss_imitation", *metrics}
    for name, metric in metrics.items():
        torch.testing.assert_close(found[name], metric.detach().mean())
        assert not found[name].requires_grad
    assert all(one.grad is None for one in loss.target_actor_network_params.values(True, True))


def test_keys_shapes_masks_and_reductions() -> None:
    policy = ConsistencyModule(make().module.actor, ("agent", "state"), "control")
    loss = ConsistencyLoss(policy, delay_actor=False, reduction="none")
    loss.set_keys(action=("expert", "control"))
    assert loss.in_keys == [("agent", "state"), ("expert", "control")]
    flat = data(4, 6)
    batch = TensorDict(
        {"agent": {"state": flat["observation"]}, "expert": {"control": flat["action"]}}, [4, 6]
    )
    torch.manual_seed(0)
    each = loss(batch)["loss_imitation"]
    assert each.shape == (4, 6)
    half = torch.arange(24).view(4, 6) < 12
    for reduction, target in (("mean", each[half].mean()), ("sum", each[half].sum())):
        masked = ConsistencyLoss(policy, delay_actor=False, reduction=reduction)
        masked.set_keys(action=("expert", "control"))
        torch.manual_seed(0)
        batch["collector", "mask"] = half.unsqueeze(-1)  # as TorchRL's SliceSampler pads
        torch.testing.assert_close(masked(batch)["loss_imitation"], target)
    # without TensorDicts
    plain = ConsistencyLoss(make(), delay_actor=False)
    torch.manual_seed(0)
    found = plain(observation=flat["observation"], action=flat["action"])
    torch.manual_seed(0)
    torch.testing.assert_close(found, plain(flat)["loss_imitation"])


def test_torchrls_own_loss_reaches_the_actor_through_its_sampling() -> None:
    """DDPG's loss beside ours: the actor-critic of both papers, of TorchRL's parts."""
    policy = make("ect", t_max=5.0, refinements=(0.8,))
    layers = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Mish(), torch.nn.Linear(16, 1))

    class Critic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            value: torch.Tensor = self.layers(torch.cat([state, action], -1))
            return value

    ddpg = DDPGLoss(policy, ValueOperator(Critic(), ["observation", "action"]))
    ddpg.deterministic_sampling_mode = ExplorationType.RANDOM
    imitation = ConsistencyLoss(policy, delay_actor=False)
    updater = SoftUpdate(ddpg, tau=0.005)
    batch = data(64)
    batch["next"] = TensorDict(
        {
            "observation": torch.randn(64, 3),
            "reward": torch.randn(64, 1),
            "done": torch.zeros(64, 1, dtype=torch.bool),
            "terminated": torch.zeros(64, 1, dtype=torch.bool),
        },
        [64],
    )
    found = ddpg(batch)
    torch.manual_seed(0)
    assert ddpg(batch)["loss_actor"] != found["loss_actor"]  # by another noise
    (found["loss_actor"] + found["loss_value"]).backward()
    actor = policy.module.actor
    by_value = torch.cat([p.grad.flatten() for p in actor.parameters()])
    imitation(batch)["loss_imitation"].backward()
    by_both = torch.cat([p.grad.flatten() for p in actor.parameters()])
    assert by_value.norm() > 0 and (by_both - by_value).norm() > 0
    updater.step()
