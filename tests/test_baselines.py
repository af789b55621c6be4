"""The baselines' losses against formulas in plain numpy, and what else their papers and codes fix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpql.actors import (
    ACTORS,
    Actor,
    AnyActorConfig,
    DeterministicConfig,
    DiffusionActor,
    DiffusionConfig,
    FlowConfig,
    GaussianActor,
    GaussianConfig,
    OneStepActor,
    OneStepConfig,
)
from cpql.agents import (
    BC,
    FQL,
    IQL,
    Agent,
    AgentConfig,
    BCConfig,
    DiffusionQL,
    DiffusionQLConfig,
    FQLConfig,
    IQLConfig,
    ReBRAC,
    ReBRACConfig,
    TargetConfig,
)
from cpql.critics import TwinCritic
from cpql.data import transforms
from cpql.data.transitions import Batch, Transitions
from cpql.deploy.config import PolicyConfig
from cpql.deploy.fold import fold
from cpql.networks import MLP
from cpql.noise import draw
from cpql.tasks import load_task

Array = NDArray[np.float64]
S, A, B = 4, 2, 6
HIDDEN = (8, 8)
LITTLE = OneStepConfig(HIDDEN, flow=FlowConfig(hidden=HIDDEN))
CLOSE = partial(pytest.approx, rel=1e-10, abs=1e-12)


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    """Rounding doesn't hide a wrong formula."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Plain numpy: networks, and one update's numbers.


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def mish(x: Array) -> Array:
    return x * np.tanh(np.log1p(np.exp(x)))


def mlp(layers: Sequence[Array], x: Array, activation: Callable[[Array], Array], norm: bool = False) -> Array:
    """Weights in the order of the parameters; `norm` is a LayerNorm after each activation."""
    left = list(layers)
    while left:
        weight, bias = left.pop(0), left.pop(0)
        x = x @ np.swapaxes(weight, -1, -2) + bias[..., None, :]
        if not left:
            break
        x = activation(x)
        if norm:
            gain, offset = left.pop(0), left.pop(0)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * gain[..., None, :] + offset[..., None, :]
    return x


class Made:
    """A small agent whose networks and targets all differ, a batch, its noise, and both in numpy."""

    def __init__(self, kind: type[Agent], config: AgentConfig) -> None:
        changes: dict[str, Any] = {"critic_hidden": HIDDEN} if kind is not BC else {}
        actor = replace(config.actor, hidden=HIDDEN)
        if isinstance(actor, OneStepConfig):
            actor = replace(actor, flow=replace(actor.flow, hidden=HIDDEN, steps=3))
        self.agent = kind(S, A, replace(config, actor=actor, batch_size=B, updates=100, **changes))
        g = torch.Generator().manual_seed(1)
        for name, tensor in self.agent.state.items():
            if name != "step" and not name.endswith(("_mean", "_square")):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=g))
        self.batch = Batch(
            torch.randn(B, S, generator=g),
            torch.randn(B, A, generator=g).tanh(),
            torch.randn(B, generator=g),
            torch.randn(B, S, generator=g),
            torch.tensor([1.0, 0.0, 1.0, 1.0, 0.9, 1.0]),
            torch.randn(B, A, generator=g).tanh(),
        )
        self.noise = draw(self.agent.noise(), g, dtype=torch.float64)
        columns = [column.numpy() for column in self.batch if column is not None]
        self.s, self.a, self.r, self.next_s, self.going, self.next_a = columns

    def layers(self, name: str) -> list[Array]:
        """A network's parameters."""
        return [p.detach().numpy() for p in self.agent.network(name).parameters()]

    def z(self, name: str) -> Array:
        """Noise."""
        return self.noise[name].numpy()

    def q(self, name: str, s: Array, a: Array, activation: Callable[[Array], Array], norm: bool) -> Array:
        """Both critics' values [2, B]."""
        return mlp(self.layers(name), np.concatenate([s, a], -1), activation, norm)[..., 0]

    def loss(self, network: str) -> float:
        """The agent's own loss of a network."""
        (found,) = (step.loss for step in self.agent.steps() if step.network == network)
        value, _ = found(self.agent.state[network], batch=self.batch, noise=self.noise)
        return float(value)

    def target(self, next_value: Array) -> Array:
        """The Bellman target."""
        return self.r + 0.99 * self.going * next_value


# Behaviour cloning.


def test_bc_gaussian() -> None:
    made = Made(BC, BCConfig())
    made.agent.state["actor"][0] = 5.0  # the first log std, which counts as 2
    log_std, *layers = made.layers("actor")
    mean, log_std = np.tanh(mlp(layers, made.s, relu)), np.minimum(log_std, 2.0)
    density = np.exp(-0.5 * ((made.a - mean) / np.exp(log_std)) ** 2) / (
        np.exp(log_std) * math.sqrt(2 * math.pi)
    )
    assert made.loss("actor") == CLOSE(-np.log(density.prod(-1)).mean())


def test_bc_deterministic() -> None:
    made = Made(BC, BCConfig(DeterministicConfig()))
    error = np.tanh(mlp(made.layers("actor"), made.s, relu)) - made.a
    assert made.loss("actor") == CLOSE((error**2).mean())


def noised(made: Made, steps: int) -> tuple[Array, Array, Array]:
    """x_t, t - 1 and alphabar_t [B, 1], by the product of 1 - beta_i as Diffusion-QL's code has it."""
    i = np.arange(1, steps + 1)
    alpha = np.exp(-0.1 / steps - 0.5 * (10.0 - 0.1) * (2 * i - 1) / steps**2)
    index = np.floor(made.z("u") * steps).astype(int)
    remaining = np.cumprod(alpha)[index][:, None]
    return np.sqrt(remaining) * made.a + np.sqrt(1 - remaining) * made.z("z"), index, remaining


def predicted(layers: Sequence[Array], s: Array, x: Array, time: Array) -> Array:
    """A diffusion actor's network."""
    angle = time[..., None] * np.exp(-np.log(10_000.0) * np.arange(8) / 7)
    features = mlp(layers[:4], np.concatenate([np.sin(angle), np.cos(angle)], -1), mish)
    return mlp(layers[4:], np.concatenate([x, features, s], -1), mish)


def test_bc_diffusion() -> None:
    made = Made(BC, BCConfig(DiffusionConfig()))
    x, index, _ = noised(made, 5)
    error = predicted(made.layers("actor"), made.s, x, index.astype(float)) - made.z("z")
    assert made.loss("actor") == CLOSE((error**2).mean())


def flow_error(made: Made, layers: Sequence[Array]) -> Array:
    t = made.z("u")[:, None]
    x = (1 - t) * made.z("z") + t * made.a
    return mlp(layers, np.concatenate([x, t, made.s], -1), gelu) - (made.a - made.z("z"))


def test_bc_flow() -> None:
    made = Made(BC, BCConfig(FlowConfig()))
    assert made.loss("actor") == CLOSE((flow_error(made, made.layers("actor")) ** 2).mean())


def one_step(made: Made) -> tuple[Array, Array, Array]:
    """The one-step network's own parameters are the first six: its action, and both losses [B, A]."""
    layers, z = made.layers("actor"), made.z("start")
    action, x = mlp(layers[:6], np.concatenate([z, made.s], -1), gelu), z
    for k in range(3):
        x = x + mlp(layers[6:], np.concatenate([x, np.full((B, 1), k / 3), made.s], -1), gelu) / 3
    return action, flow_error(made, layers[6:]) ** 2, (action - np.clip(x, -1, 1)) ** 2


def test_bc_one_step() -> None:
    made = Made(BC, BCConfig(OneStepConfig()))
    _, flow, distillation = one_step(made)
    assert made.loss("actor") == CLOSE(flow.mean() + distillation.mean())


# IQL.


def iql(made: Made) -> tuple[Array, Array]:
    """`min Q'` and V at the data, [B] each."""
    target = made.q("critic_target", made.s, made.a, relu, norm=False).min(0)
    return target, mlp(made.layers("value"), made.s, relu)[:, 0]


def test_iql() -> None:
    made = Made(IQL, IQLConfig(beta=2.0))
    target, v = iql(made)
    expectile = np.where(target > v, 0.7, 0.3) * (target - v) ** 2
    assert made.loss("value") == pytest.approx(expectile.mean(), rel=1e-6)
    y = made.target(mlp(made.layers("value"), made.next_s, relu)[:, 0])
    error = made.q("critic", made.s, made.a, relu, norm=False) - y
    assert made.loss("critic") == CLOSE((error**2).mean())
    log_std, *layers = made.layers("actor")
    z = (made.a - np.tanh(mlp(layers, made.s, relu))) / np.exp(log_std)
    likelihood = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    assert made.loss("actor") == CLOSE(-(np.exp(2.0 * (target - v)) * likelihood).mean())


def test_iql_with_a_deterministic_actor_has_weights_of_at_most_100() -> None:
    made = Made(IQL, IQLConfig(DeterministicConfig(), beta=1e3))
    target, v = iql(made)
    weight = np.where(target > v, 100.0, 0.0)
    assert 0 < weight.mean() < 100
    error = np.tanh(mlp(made.layers("actor"), made.s, relu)) - made.a
    assert made.loss("actor") == pytest.approx((weight * (error**2).sum(-1)).mean(), rel=1e-6)


# ReBRAC.


def rebrac(made: Made, penalty: float) -> float:
    smoothing = np.clip(0.2 * made.z("next_action"), -0.5, 0.5)
    action = np.clip(np.tanh(mlp(made.layers("actor_target"), made.next_s, relu)) + smoothing, -1, 1)
    known = ~np.isnan(made.next_a)
    distance = (np.where(known, action - made.next_a, 0.0) ** 2).sum(-1)
    next_q = made.q("critic_target", made.next_s, action, relu, norm=True).min(0) - penalty * distance
    error = made.q("critic", made.s, made.a, relu, norm=True) - made.target(next_q)
    return float((error**2).mean(-1).sum())


def test_rebrac() -> None:
    made = Made(ReBRAC, ReBRACConfig(actor_penalty=0.7, critic_penalty=0.3))
    assert made.loss("critic") == CLOSE(rebrac(made, 0.3))
    action = np.tanh(mlp(made.layers("actor"), made.s, relu))
    q = made.q("critic", made.s, action, relu, norm=True).min(0)
    expected = 0.7 * ((action - made.a) ** 2).sum(-1).mean() - q.mean() / np.abs(q).mean()
    assert made.loss("actor") == CLOSE(expected)


def test_rebrac_has_no_penalty_where_the_next_action_is_not_known() -> None:
    made = Made(ReBRAC, ReBRACConfig(critic_penalty=0.3))
    whole = made.loss("critic")
    assert made.batch.next_actions is not None
    made.batch.next_actions[2:4] = torch.nan  # next_a is the same memory
    assert np.isnan(made.next_a).sum() == 4
    assert made.loss("critic") == CLOSE(rebrac(made, 0.3))
    assert made.loss("critic") != pytest.approx(whole)
    made.batch.next_actions[:] = torch.nan
    assert made.loss("critic") == CLOSE(rebrac(made, 0.0))
    assert all(torch.isfinite(metric).all() for metric in made.agent.update(made.batch, made.noise).values())


# FQL.


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("q_loss", ["plain", "normalised"])
def test_fql(aggregation: Any, q_loss: Any) -> None:
    made = Made(FQL, FQLConfig(alpha=3.0, q_loss=q_loss, q_aggregation=aggregation))
    pair = np.concatenate([made.z("next"), made.next_s], -1)
    next_action = np.clip(mlp(made.layers("actor")[:6], pair, gelu), -1, 1)
    next_q = made.q("critic_target", made.next_s, next_action, gelu, norm=True)
    error = made.q("critic", made.s, made.a, gelu, norm=True) - made.target(getattr(next_q, aggregation)(0))
    assert made.loss("critic") == CLOSE((error**2).mean())
    action, flow, distillation = one_step(made)
    q = made.q("critic", made.s, np.clip(action, -1, 1), gelu, norm=True).mean(0)
    size = np.abs(q).mean() if q_loss == "normalised" else 1.0
    assert made.loss("actor") == CLOSE(flow.mean() + 3.0 * distillation.mean() - q.mean() / size)


# Diffusion-QL.


def sampled(layers: Sequence[Array], s: Array, noise: Array) -> Array:
    """DDPM with the posterior of Ho et al. 2020, equations 6 and 7, from betas and their products."""
    steps, i = len(noise), np.arange(1, len(noise) + 1)
    beta = 1 - np.exp(-0.1 / steps - 0.5 * (10.0 - 0.1) * (2 * i - 1) / steps**2)
    bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    x: Array = noise[0]
    for t in range(steps, 0, -1):
        guess = predicted(layers, s, x, np.full(len(s), t - 1.0))
        clean = np.clip((x - np.sqrt(1 - bar[t]) * guess) / np.sqrt(bar[t]), -1, 1)
        mean = np.sqrt(bar[t - 1]) * beta[t - 1] * clean + np.sqrt(1 - beta[t - 1]) * (1 - bar[t - 1]) * x
        x = mean / (1 - bar[t])
        if t > 1:
            x += np.sqrt((1 - bar[t - 1]) / (1 - bar[t]) * beta[t - 1]) * noise[steps - t + 1]
    return np.asarray(x)


@pytest.mark.parametrize("policy_action", ["sampled", "denoised"])
@pytest.mark.parametrize("coin", [0, 1])
def test_diffusion_ql(policy_action: Any, coin: int) -> None:
    made = Made(DiffusionQL, DiffusionQLConfig(eta=0.7, policy_action=policy_action))
    made.noise["coin"] = torch.tensor(coin)
    next_action = sampled(made.layers("actor_target"), made.next_s, made.z("next_action"))
    next_q = made.q("critic_target", made.next_s, next_action, mish, norm=False).min(0)
    error = made.q("critic", made.s, made.a, mish, norm=False) - made.target(next_q)
    assert made.loss("critic") == CLOSE((error**2).mean(-1).sum())
    layers = made.layers("actor")
    x, index, remaining = noised(made, 5)
    guess = predicted(layers, made.s, x, index.astype(float))
    action = sampled(layers, made.s, made.z("action"))
    if policy_action == "denoised":
        action = np.clip((x - np.sqrt(1 - remaining) * guess) / np.sqrt(remaining), -1, 1)
    q = made.q("critic", made.s, action, mish, norm=False)
    q_loss = -q[coin].mean() / np.abs(q[1 - coin]).mean()
    assert made.loss("actor") == CLOSE(((guess - made.z("z")) ** 2).mean() + 0.7 * q_loss)


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_diffusions_coefficients_are_those_of_the_cumulative_product(steps: int) -> None:
    actor = DiffusionActor(S, A, DiffusionConfig(steps, hidden=HIDDEN))
    i = np.arange(1, steps + 1)
    alpha = np.exp(-0.1 / steps - 0.5 * (10.0 - 0.1) * (2 * i - 1) / steps**2)
    assert [actor.config.remaining(t + 1) for t in range(steps)] == CLOSE(np.cumprod(alpha).tolist())
    state, noise = torch.randn(B, S), torch.randn(steps, B, A)
    found = actor.sample(state, noise=noise).detach().numpy()
    layers = [p.detach().numpy() for p in actor.parameters()]
    assert found == CLOSE(sampled(layers, state.numpy(), noise.numpy()))
    assert actor.coefficients()[-1][2:] == CLOSE((1.0, 0.0, 0.0))


# The update.


@pytest.mark.parametrize(
    ("kind", "config"), [(IQL, IQLConfig(order="together")), (FQL, FQLConfig())], ids=["iql", "fql"]
)
def test_all_gradients_are_taken_before_any_network_moves(kind: type[Agent], config: AgentConfig) -> None:
    made = Made(kind, config)
    names = [step.network for step in made.agent.steps()]
    before = {name: made.loss(name) for name in names}
    metrics = made.agent.update(made.batch, made.noise)
    assert {name: float(metrics[f"{name}/loss"]) for name in names} == CLOSE(before)
    assert made.loss("critic") != pytest.approx(before["critic"])


def test_iqls_actor_and_critic_see_the_new_v() -> None:
    made = Made(IQL, IQLConfig(value_lr=0.1))
    before = {name: made.loss(name) for name in ("critic", "actor")}
    start = {name: tensor.clone() for name, tensor in made.agent.state.items()}
    metrics = made.agent.update(made.batch, made.noise)
    after = made.agent.state["value"].clone()
    made.agent.load_state_dict({**start, "value": after})
    for name in ("critic", "actor"):
        assert float(metrics[f"{name}/loss"]) == CLOSE(made.loss(name))
        assert made.loss(name) != pytest.approx(before[name])


@pytest.mark.parametrize("lagged", [False, True])
def test_a_lagged_target_follows_the_network_as_it_was(lagged: bool) -> None:
    made = Made(ReBRAC, ReBRACConfig(actor_target=TargetConfig(0.25, period=2, lagged=lagged)))
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in made.agent.state.items()}
        made.agent.update(made.batch, made.noise)
    after = made.agent.state
    assert not torch.equal(after["actor"], before["actor"])
    followed = before["actor"] if lagged else after["actor"]
    torch.testing.assert_close(after["actor_target"], 0.75 * before["actor_target"] + 0.25 * followed)
    expected = 0.995 * before["critic_target"] + 0.005 * after["critic"]
    torch.testing.assert_close(after["critic_target"], expected)


def test_actor_cosine_slows_the_actor_alone() -> None:
    moves: dict[str, dict[str, Tensor]] = {}
    for decay in ("none", "actor_cosine", "cosine"):
        made = Made(IQL, IQLConfig(lr_decay=decay))
        made.agent.state["step"].fill_(25.0)  # of 100: the factor is 0.5 (1 + cos(pi / 4))
        before = {name: tensor.clone() for name, tensor in made.agent.state.items()}
        made.agent.update(made.batch, made.noise)
        moves[decay] = {name: made.agent.state[name] - before[name] for name in ("actor", "value")}
    factor = 0.5 * (1 + math.cos(math.pi / 4))
    for decay, slowed in {"actor_cosine": {"actor"}, "cosine": {"actor", "value"}}.items():
        for name in ("actor", "value"):
            expected = moves["none"][name] * (factor if name in slowed else 1.0)
            torch.testing.assert_close(moves[decay][name], expected)


def test_dropout() -> None:
    made = Made(BC, BCConfig(GaussianConfig(dropout=0.25)))
    drop = made.z("drop")
    assert drop.shape == (B, sum(HIDDEN)) and 0 < (drop < 0.25).mean() < 1
    log_std, w1, b1, w2, b2, w3, b3 = made.layers("actor")
    first, second = np.split((drop >= 0.25) / 0.75, 2, -1)
    x = relu(relu(made.s @ w1.T + b1) * first @ w2.T + b2) * second
    z = (made.a - np.tanh(x @ w3.T + b3)) / np.exp(log_std)
    expected = (0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean()
    assert made.loss("actor") == CLOSE(expected)
    actor = made.agent.network("actor")
    assert isinstance(actor, GaussianActor)  # it acts with all units
    mean = np.tanh(mlp([w1, b1, w2, b2, w3, b3], made.s, relu))
    assert actor.sample(made.batch.observations).detach().numpy() == CLOSE(mean)


@pytest.mark.parametrize(("role", "last"), [("policy", 1e-3), ("critic", 3e-3)])
def test_initial_weights(role: Any, last: float) -> None:
    network = MLP(64, (64, 32), 16, (2,), "after", "gelu", "glorot", role)
    layers = [parameter.detach() for parameter in network.parameters()]
    for weight, bias in zip(layers[::4], layers[1::4], strict=True):
        bound = math.sqrt(6 / (weight.shape[-1] + weight.shape[-2]))
        assert 0.98 * bound < float(weight.abs().max()) <= bound and not bias.any()
    network = MLP(64, (64, 32), 16, (2,), False, "relu", "rebrac", role)
    w1, b1, w2, b2, w3, b3 = (parameter.detach() for parameter in network.parameters())
    assert set(b1.flatten().tolist()) == set(b2.flatten().tolist()) == {0.1}
    for weight, bound in ((w1, 1 / 8), (w2, 1 / 8), (w3, last), (b3, last)):
        assert 0.8 * bound < float(weight.abs().max()) <= bound


def test_a_folded_critic_has_the_norms_epsilon() -> None:
    """Activations of a thousandth have variances below it, so that another epsilon shows."""
    critic = TwinCritic(S, A, HIDDEN, layer_norm="after", activation="gelu").float()
    with torch.no_grad():
        for parameter in list(critic.parameters())[:2]:
            parameter.mul_(1e-3)
    config = PolicyConfig(
        S,
        A,
        (-1.0,) * A,
        (1.0,) * A,
        LITTLE,
        HIDDEN,
        "after",
        3,
        1.0,
        load_task("hopper"),
        critic_activation="gelu",
    )
    state, action = torch.randn(B, S, dtype=torch.float32), torch.rand(B, A, dtype=torch.float32)
    folded = fold(OneStepActor(S, A, LITTLE).float(), critic, config)
    found = folded.value(state[:, None].numpy(), action[:, None].numpy(), 1)[:, 0]
    assert found == pytest.approx(critic(state, action)[1].detach().numpy(), rel=1e-4, abs=1e-6)


# Next actions.


def test_next_actions_are_those_of_the_next_rows(data: Transitions) -> None:
    actions = transforms.next_actions(data).columns.next_actions
    assert actions is not None
    for i, (found, end) in enumerate(zip(actions, data.ends, strict=True)):
        assert torch.isnan(found).all() if end else torch.equal(found, data.actions[i + 1])


def test_next_actions_stand_n_steps_ahead(data: Transitions) -> None:
    ahead = transforms.n_step(transforms.next_actions(data), 3, 0.99).columns.next_actions
    assert ahead is not None
    for i in range(len(data)):
        to_come = [k for k in range(3) if not data.ends[i : i + k].any()][-1]  # rows 24, 49, ... end
        row = i + to_come
        assert torch.isnan(ahead[i]).all() if data.ends[row] else torch.equal(ahead[i], data.actions[row + 1])


# Two modes.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "updates"),
    [(DiffusionConfig(15), 2000), (FlowConfig(), 600), (OneStepConfig(), 600), (DeterministicConfig(), 300)],
    ids=["diffusion", "flow", "one_step", "deterministic"],
)
def test_a_generative_actor_finds_both_modes(config: AnyActorConfig, updates: int) -> None:
    """Two good actions, -0.8 and 0.8: their mean is neither, and all that a deterministic actor can learn."""
    torch.set_default_dtype(torch.float32)
    if isinstance(config, OneStepConfig):
        config = replace(config, flow=replace(config.flow, hidden=(64, 64)))
    torch.manual_seed(0)
    actor: Actor = ACTORS[config.kind](1, 1, replace(config, hidden=(64, 64)))
    optimiser = torch.optim.Adam(actor.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    state = torch.zeros(256, 1)
    for _ in range(updates):
        action = torch.where(torch.rand(256, 1) < 0.5, -0.8, 0.8) + 0.05 * torch.randn(256, 1)
        optimiser.zero_grad()
        torch.autograd.backward(actor.loss(state, action)[0].mean())
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        found = actor.sample(torch.zeros(4000, 1))
    shares = [float(((found - mode).abs() < 0.25).float().mean()) for mode in (-0.8, 0.0, 0.8)]
    if isinstance(config, DeterministicConfig):
        assert shares == [0.0, 1.0, 0.0]
    else:
        assert min(shares[0], shares[2]) > 0.35 and shares[1] < 0.1, shares
