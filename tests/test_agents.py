"""One conformance test that every agent passes, and what is particular to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGS, OPTIONS, small
from torch import Tensor

from cpql.actors import Actor
from cpql.agents import (
    CPQL,
    TD3BC,
    Agent,
    ConsistencyAC,
    ConsistencyACConfig,
    CPQLConfig,
    GenerativeAgent,
    GenerativeAgentConfig,
    TargetConfig,
    TD3BCConfig,
)
from cpql.consistency import OBJECTIVES
from cpql.critics import Critic
from cpql.data import transforms
from cpql.data.transitions import Batch, Transitions
from cpql.errors import ConfigError
from cpql.noise import Noise
from cpql.optimisation import value_and_grad

Maker = Callable[..., Agent]


@pytest.fixture(name="data")
def with_next_actions(data: Transitions) -> Transitions:
    """The data with next actions, which the agents that don't need them ignore."""
    return transforms.next_actions(data)


def run(agent: Agent, data: Transitions, updates: int, seed: int = 0) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(updates):
        batch = data.sample(agent.config.batch_size, generator)
        lines.append({k: float(v) for k, v in agent.update(batch, agent.draw(generator)).items()})
    return lines


def test_update_changes_what_it_should(make_agent: Maker, data: Transitions) -> None:
    agent = make_agent()
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    lines = run(agent, data, 12)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert {f"{step.network}/loss" for step in agent.steps()} <= set(lines[-1])
    assert ("critic/q" in lines[-1]) == ("critic" in agent.state)
    if isinstance(agent.config, GenerativeAgentConfig):
        assert ("actor/imitation" in lines[-1]) == (agent.config.alpha > 0)
    for name, tensor in agent.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
        assert torch.isfinite(tensor).all(), name
    assert agent.state["step"] == 12


def test_same_seed_same_training(make_agent: Maker, data: Transitions) -> None:
    first, second, other = make_agent(), make_agent(), make_agent(seed=1)
    assert run(first, data, 5) == run(second, data, 5)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.state["actor"], other.state["actor"])


def test_making_an_agent_leaves_global_randomness_alone(make_agent: Maker) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    make_agent()
    assert torch.equal(torch.rand(3), expected)


def test_state_dict_goes_on_exactly(make_agent: Maker, data: Transitions) -> None:
    whole, first, second = make_agent(), make_agent(), make_agent(seed=5)
    run(whole, data, 4)
    run(first, data, 4)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert run(whole, data, 4, seed=1) == run(second, data, 4, seed=1)
    with pytest.raises(ValueError, match="expected the tensors"):
        second.load_state_dict({})
    wrong = {**first.state_dict(), "actor": torch.zeros(3)}
    with pytest.raises(ValueError, match="actor: expected shape"):
        second.load_state_dict(wrong)


def test_losses_leave_the_others_weights_alone(make_agent: Maker, data: Transitions) -> None:
    """The policy's step gives no gradient to the critic, nor the critic's to the actor."""
    agent = make_agent()
    generator = torch.Generator().manual_seed(0)
    batch, noise = data.sample(16, generator), agent.draw(generator)
    assert {step.network for step in agent.steps()} == {"critic", "actor", "value"} & agent.state.keys()
    for own, loss, _ in agent.steps():
        leaves = {k: v.requires_grad_() for k, v in agent.state.items() if k != "step"}
        value, _ = loss(leaves[own], batch, noise)
        names = [k for k in leaves if k not in (own, "critic")]
        gradients = torch.autograd.grad(value, [leaves[own], *(leaves[k] for k in names)], allow_unused=True)
        assert gradients[0] is not None
        assert gradients[0].abs().sum() > 0
        assert all(g is None for g in gradients[1:]), names
        for leaf in leaves.values():
            leaf.requires_grad_(False)


def test_act_and_modules(make_agent: Maker) -> None:
    learns = "critic" in make_agent().state
    agent = make_agent(candidates=7) if learns else make_agent()
    states = torch.randn(5, 4)
    actions = agent.act(states, torch.Generator().manual_seed(0))
    assert actions.shape == (5, 2)
    assert actions.abs().max() <= 1
    assert torch.equal(actions, agent.act(states, torch.Generator().manual_seed(0)))
    actor, critic = agent.deployed()
    noise = torch.randn(actor.noise_shape(5))
    weights = agent.state["actor"]
    torch.testing.assert_close(
        actor.sample(states, noise=noise), agent.actor(weights).sample(states, noise=noise)
    )
    assert (critic is not None) == learns
    if critic is not None:
        value = agent.critic(agent.state["critic_target"]).q(states, actions)
        torch.testing.assert_close(critic(states, actions), value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "inductor") for name in ("cpql", "consistency_ac", "td3_bc", "group")),
        *((name, "aot_eager") for name in ("cpiql", "bc-flow", "iql", "rebrac", "fql", "diffusion_ql")),
    ],
)
def test_compiled_is_one_graph_and_equals_eager(name: str, backend: str, data: Transitions) -> None:
    """Tracing is what may fail, so that the compiler proper is tried with a few alone."""
    kind, config = CONFIGS["cpql" if name == "group" else name]
    seed: int | tuple[int, ...] = (0, 1) if name == "group" else 0
    eager, compiled = (kind(4, 2, small(config), seed=seed) for _ in range(2))
    torch._dynamo.reset()
    update = torch.compile(compiled.update, fullgraph=True, backend=backend)
    each = [torch.Generator().manual_seed(k) for k in range(2)]
    generator = each if name == "group" else each[0]
    for step in range(200):
        batch, noise = data.sample(16, generator), eager.draw(generator)
        expected = eager.update(batch, noise)
        with torch.compiler.set_stance("default" if step < eager.cycle else "fail_on_recompile"):
            found = update(batch, noise, step % eager.cycle)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=f"{key} at {step}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "backend"), [*((name, "aot_eager") for name in OPTIONS), ("meanflow", "inductor")]
)
def test_every_objective_compiles_as_one_graph_and_equals_eager(
    objective: str, backend: str, data: Transitions
) -> None:
    """The imitation's gradient alone, in a group: what differs between objectives.

    Tracing is what may fail, so one is enough for the code that comes of it: the one with most inputs and a
    derivative.
    """
    config = small(CONFIGS[f"cpql-{objective}"][1])
    share = 0.5 if OBJECTIVES[objective].takes("acting") else 0.0
    actor = replace(config.actor, acting_share=share)
    agent = CPQL(4, 2, replace(config, actor=actor), seed=(0, 1))
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    torch._dynamo.reset()

    def step(batch: Batch, noise: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss = partial(agent.imitation_loss, batch=batch, noise=noise, progress=agent.progress)
        value, gradient, _ = value_and_grad(loss, agent.state["actor"])
        return value, gradient

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for progress in (5, 40):
        agent.state["step"].fill_(progress)
        batch = data.sample(16, generators)
        noise = agent.draw(generators)
        for found, expected in zip(compiled(batch, noise), step(batch, noise), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def group_run(agent: Agent, data: Transitions, updates: int, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    lines = []
    for _ in range(updates):
        batch = data.sample(agent.config.batch_size, generators)
        metrics = agent.update(batch, agent.draw(generators))
        lines.append({k: v.expand(len(seeds)).tolist() for k, v in metrics.items()})
    return lines


@pytest.mark.slow
def test_a_member_of_a_group_trains_as_it_would_alone(make_agent: Maker, data: Transitions) -> None:
    seeds = (3, 0, 7)
    group = make_agent(seed=seeds)
    singles = [make_agent(seed=seed) for seed in seeds]
    for member, single in enumerate(singles):
        for name, tensor in single.state_dict().items():
            assert torch.equal(tensor, group.state_dict(member)[name]), name
    lines = group_run(group, data, 200, seeds)
    for member, (single, seed) in enumerate(zip(singles, seeds, strict=True)):
        for found, expected in zip(lines, run(single, data, 200, seed), strict=True):
            for name, value in expected.items():
                assert found[name][member] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        for name in {"actor", "actor_target", "critic", "critic_target"} & single.state.keys():
            torch.testing.assert_close(
                group.state_dict(member)[name], single.state_dict()[name], rtol=1e-4, atol=1e-4
            )
            state, generators = torch.randn(5, 4), [torch.Generator().manual_seed(0) for _ in range(2)]
            torch.testing.assert_close(
                group.act(state, generators[0], member),
                single.act(state, generators[1]),
                rtol=1e-4,
                atol=1e-3,
            )


def test_bf16_products_are_near_and_everything_else_is_float32(make_agent: Maker, data: Transitions) -> None:
    plain, coarse = make_agent(), make_agent(matmul_dtype=torch.bfloat16)
    first = [run(agent, data, 1)[0] for agent in (plain, coarse)]
    assert first[0] != first[1]
    for name, value in first[0].items():
        assert first[1][name] == pytest.approx(value, rel=0.15, abs=0.15), name
    lines = run(coarse, data, 50, seed=1)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert {tensor.dtype for tensor in coarse.state_dict().values()} == {torch.float32}
    actor, _ = coarse.deployed()
    state, noise = torch.randn(3, 4), torch.randn(actor.noise_shape(3))
    # What is deployed computes in float32.
    exact = actor.double().sample(state.double(), noise=noise.double())
    torch.testing.assert_close(actor.float().sample(state, noise=noise).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_member_that_diverges_leaves_the_others_alone(make_agent: Maker, data: Transitions) -> None:
    whole, broken = make_agent(seed=(0, 1)), make_agent(seed=(0, 1))
    for name in {"actor", "critic"} & broken.state.keys():
        broken.state[name][1] = torch.nan
    expected, found = group_run(whole, data, 4, (0, 1)), group_run(broken, data, 4, (0, 1))
    for a, b in zip(expected, found, strict=True):
        assert all(a[name][0] == b[name][0] for name in a)
        assert not np.isfinite(b["actor/loss" if "actor/loss" in b else "critic/loss"][1])
    assert torch.equal(whole.state["actor"][0], broken.state["actor"][0])


def test_members_may_differ_in_rates_and_in_eta(data: Transitions) -> None:
    config = small(CPQLConfig(eta=(0.0, 2.0), actor_lr=(1e-3, 3e-4), critic_lr=(1e-4, 1e-3)))
    assert isinstance(config, CPQLConfig)
    group = CPQL(4, 2, config, seed=(5, 5))
    group_run(group, data, 20, (5, 5))
    for member, (eta, actor, critic) in enumerate(((0.0, 1e-3, 1e-4), (2.0, 3e-4, 1e-3))):
        single = CPQL(4, 2, replace(config, eta=eta, actor_lr=actor, critic_lr=critic), seed=5)
        run(single, data, 20, 5)
        for name in ("actor", "critic"):
            torch.testing.assert_close(
                group.state_dict(member)[name], single.state_dict()[name], rtol=1e-4, atol=1e-4
            )
    with pytest.raises(ConfigError, match=r"eta=\[1.0, 2.0\]: 2 values: expected one, or 3, by member"):
        CPQL(4, 2, small(CPQLConfig(eta=(1.0, 2.0))), seed=(0, 1, 2))


def test_a_member_goes_on_alone_and_back_in_a_group(make_agent: Maker, data: Transitions) -> None:
    group, again, alone = make_agent(seed=(1, 2)), make_agent(seed=(8, 9)), make_agent(seed=4)
    group_run(group, data, 3, (1, 2))
    alone.load_state_dict({k: v.clone() for k, v in group.state_dict(1).items()})
    assert torch.equal(alone.state["actor"], group.state["actor"][1]) and alone.state["step"] == 3
    for member in (0, 1):
        again.load_state_dict({k: v.clone() for k, v in group.state_dict(member).items()}, member)
    for name, tensor in group.state.items():
        assert torch.equal(tensor, again.state[name]), name
    states = torch.randn(5, 4)
    actor = group.network("actor", 1)
    assert isinstance(actor, Actor)
    noise = torch.randn(actor.noise_shape(5))
    expected = alone.actor(alone.state["actor"]).sample(states, noise=noise)
    torch.testing.assert_close(actor.sample(states, noise=noise), expected)
    if "critic" in group.state:
        critic, actions = group.network("critic", 1), torch.zeros(5, 2)
        assert isinstance(critic, Critic)
        value = alone.critic(alone.state["critic"]).q(states, actions)
        torch.testing.assert_close(critic.q(states, actions), value)


def filled(state: float = 0.0, reward: float = 0.0, terminated: float = 0.0, size: int = 16) -> Batch:
    flat = torch.full((size,), 1.0)
    states = torch.full((size, 4), state)
    return Batch(states, torch.zeros(size, 2), reward * flat, states, (1.0 - terminated) * flat)


def target(agent: GenerativeAgent, batch: Batch, noise: Noise) -> Tensor:
    return agent.bellman_target(batch, agent.next_q(batch, noise))


def test_termination_stops_bootstrapping() -> None:
    agent = CPQL(4, 2, small(CPQLConfig()))
    noise = agent.draw(torch.Generator().manual_seed(0))
    assert torch.equal(target(agent, filled(1.0, 3.0, 1.0), noise), torch.full((16,), 3.0))
    assert not torch.equal(target(agent, filled(1.0, 3.0, 0.0), noise), torch.full((16,), 3.0))


def test_targets_start_and_period() -> None:
    agent = CPQL(4, 2, small(CPQLConfig(), critic_target=TargetConfig(rate=0.5, period=2, start=3)))
    generator = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(6):
        before = agent.state["critic_target"].clone()
        agent.update(filled(1.0, 1.0), agent.draw(generator))
        after = agent.state["critic_target"]
        moved.append(not torch.equal(before, after))
        if moved[-1]:
            torch.testing.assert_close(after, 0.5 * (before + agent.state["critic"]))
    assert moved == [False, False, True, False, True, False]


def test_learning_rate_decays_to_zero_over_the_whole_training(data: Transitions) -> None:
    agent = CPQL(4, 2, small(CPQLConfig(), lr_decay="cosine"))
    run(agent, data, 100)
    before = agent.state["actor"].clone()
    run(agent, data, 1)
    assert torch.equal(agent.state["actor"], before)


def test_eta_rises_over_its_warmup(data: Transitions) -> None:
    agent = CPQL(4, 2, small(CPQLConfig(eta=2.0), eta_warmup=10))
    weights = []
    for _ in range(13):
        weights.append(float(agent.eta))
        run(agent, data, 1)
    torch.testing.assert_close(torch.tensor(weights), torch.tensor([0.2 * i for i in range(10)] + [2.0] * 3))


def test_imitation_may_come_first(data: Transitions) -> None:
    for warmup, expected in ((0, [0.0] * 3 + [2.0] * 4), (2, [0.0] * 4 + [1.0] + [2.0] * 2)):
        agent = CPQL(4, 2, small(CPQLConfig(eta=2.0), eta_start=3, eta_warmup=warmup))
        weights = []
        for _ in range(7):
            weights.append(float(agent.eta))
            run(agent, data, 1)
        assert weights == expected


def test_ct_curriculum_runs_once_over_the_training(data: Transitions) -> None:
    """N(k) ends at the paper's 151 levels, and `curriculum_restarts` gives the published sawtooth."""
    agent = ConsistencyAC(4, 2, small(ConsistencyACConfig()))
    levels = [line["actor/levels"] for line in run(agent, data, 100)]
    assert levels[0] == 2
    assert levels[-1] >= 149
    assert levels == sorted(levels)
    saw = ConsistencyAC(4, 2, small(ConsistencyACConfig(), curriculum_restarts=4))
    levels = [line["actor/levels"] for line in run(saw, data, 100)]
    assert [levels[i] for i in (0, 25, 50, 75)] == [2, 2, 2, 2]
    parts = ConsistencyAC(4, 2, small(ConsistencyACConfig(), curriculum_restarts=100 / 40))
    parted = [line["actor/levels"] for line in run(parts, data, 100)]
    assert [k for k, n in enumerate(parted) if n == 2] == [0, 40, 80]  # and ends in half of one
    assert parted[:40] == parted[40:80] and parted[80:] == parted[:20] and parted[39] > 148


def test_q_normalisation_and_backups(data: Transitions) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = data.sample(16, generator)
    plain = ConsistencyAC(4, 2, small(ConsistencyACConfig()))
    scaled = ConsistencyAC(4, 2, small(ConsistencyACConfig(), q_normalisation=True))
    noise = plain.draw(torch.Generator().manual_seed(1))
    expected = target(plain, batch, noise)
    _, metrics = scaled.critic_loss(scaled.state["critic"], batch, noise)
    torch.testing.assert_close(metrics["critic/target"], (expected / (expected.std() + 1e-6)).mean())
    many = CPQL(4, 2, small(CPQLConfig(), max_q_backup=10))
    noise = many.draw(torch.Generator().manual_seed(1))
    one = CPQL(4, 2, small(CPQLConfig()))
    first = {**noise, "next_action": noise["next_action"][:, ::10]}
    assert (target(many, batch, noise) >= target(one, batch, first) - 1e-6).all()


def test_backup_actor_is_the_one_that_is_named(data: Transitions) -> None:
    batch = data.sample(16, torch.Generator().manual_seed(0))
    targets = {}
    for name in ("online", "target"):
        agent = CPQL(4, 2, small(CPQLConfig(), backup_actor=name))
        noise = agent.draw(torch.Generator().manual_seed(0))
        agent.state["actor"].mul_(3.0)
        before = target(agent, batch, noise)
        agent.state["actor_target"].mul_(5.0)
        targets[name] = torch.equal(before, target(agent, batch, noise))
    assert targets == {"online": True, "target": False}


def test_expectile_value_by_hand(data: Transitions) -> None:
    """CPIQL's value loss against a loop."""
    agent = CPQL(4, 2, small(replace(CPQLConfig(), critic="expectile", expectile=0.9)))
    batch = data.sample(16, torch.Generator().manual_seed(0))
    _, metrics = agent.critic_loss(agent.state["critic"], batch, agent.draw(torch.Generator().manual_seed(1)))
    critic = agent.network("critic")
    assert isinstance(critic, Critic)
    q = critic.q(batch.observations, batch.actions).amin(0)
    v = critic.v(batch.observations)
    total = 0.0
    for u in (q - v).tolist():
        total += (0.1 if u < 0 else 0.9) * u**2
    assert float(metrics["critic/v_loss"]) == pytest.approx(total / 16, rel=1e-5)


def test_the_coin_chooses_the_critic(data: Transitions) -> None:
    agent = CPQL(4, 2, small(CPQLConfig()))
    batch = data.sample(16, torch.Generator().manual_seed(0))
    noise = agent.draw(torch.Generator().manual_seed(0))
    action = agent.actor(agent.state["actor"]).sample(batch.observations, noise=noise["action"])
    q = agent.critic(agent.state["critic"]).q(batch.observations, action)
    for coin in (0, 1):
        loss = agent.q_loss(q, batch, {**noise, "coin": torch.tensor(coin)})
        torch.testing.assert_close(loss, -q[coin].mean() / q[1 - coin].abs().mean())


def test_the_spread_of_q_ignores_a_constant(data: Transitions) -> None:
    """It is measured between the data's action at a state and at the one before in the batch."""
    agent = CPQL(4, 2, small(CPQLConfig(q_loss="spread")))
    batch = data.sample(16, torch.Generator().manual_seed(0))
    q, critic = torch.randn(2, 16), agent.network("critic")
    assert isinstance(critic, Critic)
    own = critic.q(batch.observations, batch.actions)
    other = critic.q(batch.observations, batch.actions[torch.arange(-1, 15)])
    for coin in (0, 1):
        loss = agent.q_loss(q, batch, {"coin": torch.tensor(coin)})
        torch.testing.assert_close(loss, -q[coin].mean() / (own - other)[1 - coin].abs().mean())


@pytest.mark.parametrize("rule", ["softmax", "exponential"])
def test_better_actions_of_the_data_count_more(rule: Any, data: Transitions) -> None:
    config = CPQLConfig(imitation_weight=rule, imitation_temperature=0.5)
    agent = CPQL(4, 2, small(config))
    generator = torch.Generator().manual_seed(0)
    batch, noise = data.sample(16, generator), agent.draw(generator)
    actor, critic = agent.network("actor"), agent.network("critic")
    assert isinstance(actor, Actor) and isinstance(critic, Critic)
    with torch.no_grad():
        action = actor.sample(batch.observations, noise=noise["action"])
        mine, theirs = (critic.q(batch.observations, a).numpy().min(0) for a in (action, batch.actions))
        each = actor.loss(batch.observations, batch.actions, noise=noise)[0].numpy()
    x = (theirs - mine) / np.abs(mine).mean() / 0.5
    pair = np.exp(np.stack([theirs, mine]) / np.abs(mine).mean() / 0.5)
    weight = 2 * pair[0] / pair.sum(0) if rule == "softmax" else np.minimum(np.exp(x), 100)
    _, metrics = agent.actor_loss(agent.state["actor"], batch, noise)
    assert float(metrics["actor/imitation"]) == pytest.approx((weight * each).mean(), rel=1e-4)


def test_smoothing_and_the_mean_of_the_twins(data: Transitions) -> None:
    agent = CPQL(4, 2, small(CPQLConfig(policy_noise=0.4, noise_clip=0.3, q_aggregation="mean")))
    generator = torch.Generator().manual_seed(0)
    batch, noise = data.sample(16, generator), agent.draw(generator)
    actor, critic = agent.network("actor"), agent.network("critic_target")
    assert isinstance(actor, Actor) and isinstance(critic, Critic)
    with torch.no_grad():
        action = actor.sample(batch.next_observations, noise=noise["next_action"]).numpy()
        action = np.clip(action + np.clip(0.4 * noise["smoothing"].numpy(), -0.3, 0.3), -1, 1)
        expected = critic.q(batch.next_observations, torch.from_numpy(action)).mean(0)
    torch.testing.assert_close(agent.next_q(batch, noise), expected)


def test_a_delayed_policy_waits(data: Transitions) -> None:
    agent = CPQL(4, 2, small(CPQLConfig(policy_period=3)))
    moved = []
    for _ in range(6):
        before = agent.state["actor"].clone()
        run(agent, data, 1)
        moved.append(not torch.equal(before, agent.state["actor"]))
    assert moved == [False, False, True] * 2


@pytest.mark.parametrize("name", ["cpql", "td3_bc", "iql", "bc-flow", "fql"])
def test_an_average_of_the_actor_acts(name: str, data: Transitions) -> None:
    """By hand over six updates: rate 9 / (9 + k), and at least 0.8; resumed as everything is."""
    kind, config = CONFIGS[name]
    agent = kind(4, 2, replace(small(config), actor_average=0.8))
    data, average = transforms.next_actions(data), agent.state["actor"].clone()
    for k in range(1, 7):
        run(agent, data, 1, seed=k)
        average += max(0.8, 9 / (9 + k)) * (agent.state["actor"] - average)
    torch.testing.assert_close(agent.state["actor_average"], average)
    states = torch.randn(5, 4)
    actor, _ = agent.deployed()
    noise = torch.randn(actor.noise_shape(5))
    expected = agent.actor(average).sample(states, noise=noise)
    torch.testing.assert_close(actor.sample(states, noise=noise), expected)
    acts = agent.act(states, torch.Generator().manual_seed(0))
    torch.testing.assert_close(acts, actor.sample(states, generator=torch.Generator().manual_seed(0)))


def test_td3_bc_by_hand(data: Transitions) -> None:
    """Both losses, in numpy: smoothed targets, the smaller critic, lambda from the first one."""
    agent = TD3BC(4, 2, small(TD3BCConfig()))
    batch, noise = (
        data.sample(16, torch.Generator().manual_seed(0)),
        agent.draw(torch.Generator().manual_seed(1)),
    )
    actor, critic = agent.network("actor"), agent.network("critic")
    assert isinstance(actor, Actor) and isinstance(critic, Critic)
    with torch.no_grad():
        smoothing = np.clip(0.2 * noise["next_action"].numpy(), -0.5, 0.5)
        next_action = np.clip(actor(batch.next_observations).numpy() + smoothing, -1, 1)
        next_q = critic.q(batch.next_observations, torch.from_numpy(next_action)).numpy().min(0)
        q = critic.q(batch.observations, batch.actions).numpy()
        action = actor(batch.observations)
        first = critic.q(batch.observations, action).numpy()[0]
    goal = batch.rewards.numpy() + 0.99 * batch.discounts.numpy() * next_q
    loss, _ = agent.critic_loss(agent.state["critic"], batch, noise)
    assert float(loss) == pytest.approx(((q - goal) ** 2).mean(1).sum(), rel=1e-5)
    loss, _ = agent.actor_loss(agent.state["actor"], batch, noise)
    imitation = ((action - batch.actions).numpy() ** 2).mean()
    assert float(loss) == pytest.approx(imitation - 2.5 / np.abs(first).mean() * first.mean(), rel=1e-5)


def test_td3_bc_steps_its_policy_and_targets_at_every_second_update(data: Transitions) -> None:
    agent = TD3BC(4, 2, small(TD3BCConfig(), actor_lr=1e-2))
    generator, moved = torch.Generator().manual_seed(0), list[list[bool]]()
    names = ("critic", "actor", "actor_target", "critic_target")
    for _ in range(4):
        before = {name: agent.state[name].clone() for name in names}
        metrics = agent.update(data.sample(16, generator), agent.draw(generator))
        assert ("actor/loss" in metrics) == (len(moved) % 2 == 1)
        moved.append([not torch.equal(before[name], agent.state[name]) for name in names])
    assert moved == [[True, False, False, False], [True] * 4] * 2
    # Adam's first step is as long as the learning rate, whichever update it is taken at.
    other = TD3BC(4, 2, small(TD3BCConfig(), actor_lr=1e-2))
    start = other.state["actor"].clone()
    run(other, data, 2)
    step = (other.state["actor"] - start).abs()
    assert float(step[step > 1e-4].median()) == pytest.approx(1e-2, rel=1e-3)
