"""Actors, critics, networks with members, the candidates rule, and the optimiser they are trained with."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cpql import consistency
from cpql.actors import ActorConfig, ConsistencyActor, choose
from cpql.critics import TwinCritic, ValueFunction
from cpql.errors import ConfigError
from cpql.networks import MLP, Mish, TimeEmbedding
from cpql.noise import draw
from cpql.optimisation import FlatModule, adam, clip_gradient, value_and_grad
from cpql.settings import build

S, A = 4, 2


def make_actor(refinements: tuple[float, ...] = (2.0, 0.5), **options: Any) -> ConsistencyActor:
    torch.manual_seed(0)
    members = options.pop("members", ())
    config = ActorConfig(t_max=5.0, refinements=refinements, hidden=(16, 16), time_width=8, **options)
    return ConsistencyActor(S, A, config, members=members)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copy_of_member(module: nn.Module, k: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: value[k].clone() for name, value in module.state_dict().items()}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the branches that a compiled update takes, without the compiler."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


# The actor


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(["denoise", "ct", "ict"]),
    st.booleans(),
    st.sampled_from(["end", "inside"]),
    st.sampled_from(["edm", "unscaled"]),
    st.sampled_from([(), (2.0,), (5.0, 2.24, 0.002)]),
)
def test_any_leading_shape(
    shape: list[int],
    objective: str,
    action_norm: bool,
    clamp: Literal["end", "inside"],
    kind: Literal["edm", "unscaled"],
    refinements: tuple[float, ...],
) -> None:
    actor = make_actor(
        refinements, objective=objective, action_norm=action_norm, clamp=clamp, parameterisation=kind
    )
    state, action = 10 * torch.randn(*shape, S), 2 * torch.rand(*shape, A) - 1
    drawn = actor(state)
    assert drawn.shape == action.shape and drawn.isfinite().all() and (drawn.abs() <= 1).all()
    assert actor.noise_shape(*state.shape[:-1]) == (
        1 + len(refinements),
        *shape,
        A,
    ) and actor.steps == 1 + len(refinements)
    loss, metrics = actor.loss(state, action, progress=0.3)
    assert loss.shape == tuple(shape) and loss.isfinite().all()
    assert all(value.shape == () for value in metrics.values())
    assert actor.evaluate(state, action, torch.full(shape, 0.7)).shape == action.shape


def test_samples_stay_in_range_however_wild_the_weights() -> None:
    actor = make_actor()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(50.0)
    drawn = actor(torch.randn(1000, S, generator=seeded()), generator=seeded(1))
    assert drawn.min() == -1 and drawn.max() == 1


def test_t_min_gives_the_action_back() -> None:
    actor, state, x = make_actor(), torch.randn(9, S), torch.randn(9, A)
    assert torch.equal(actor.evaluate(state, x, torch.full((9,), 0.002)), x)
    assert not torch.equal(actor.evaluate(state, x, torch.full((9,), 0.5)), x)


def test_given_dimensions_are_held_and_the_others_made() -> None:
    actor, state = make_actor(), torch.randn(50, S, generator=seeded())
    noise = torch.randn(actor.noise_shape(*state.shape[:-1]), generator=seeded(1))
    known, mask = torch.tensor([0.25, torch.nan]), torch.tensor([True, False])
    action = actor.sample(state, noise=noise, known=known, mask=mask)
    assert (action[:, 0] == 0.25).all() and action[:, 1].abs().max() <= 1 and action[:, 1].std() > 0
    # What is held tells the rest what to be, from the second step on.
    other = actor.sample(state, noise=noise, known=-known, mask=mask)
    assert (action[:, 1] != other[:, 1]).all()
    # An operator may override in some states only.
    some = torch.zeros(50, A, dtype=torch.bool)
    some[:10, 0] = True
    mixed = actor.sample(state, noise=noise, known=known, mask=some)
    torch.testing.assert_close(mixed[:10], action[:10])
    torch.testing.assert_close(
        mixed[10:], actor.sample(state, noise=noise)[10:], msg="nothing is held: as ever"
    )
    with pytest.raises(ValueError, match="known and mask go together"):
        actor.sample(state, known=known)


def test_bounds_may_be_narrower_and_by_state() -> None:
    actor, state = make_actor(), torch.randn(50, S, generator=seeded())
    low, high = torch.full((50, A), -0.1), torch.tensor([0.05, 0.3])
    action = actor.sample(state, generator=seeded(), low=low, high=high)
    assert (action >= low).all() and (action <= high).all() and (action.std(0) > 0).all()
    assert actor.sample(state, generator=seeded(), high=0.2).min() >= -1


def test_a_sample_is_differentiable_in_everything() -> None:
    """Every weight, the state and the noise of every step get a finite gradient that isn't all zero."""
    actor = make_actor()
    state = torch.randn(32, S, generator=seeded()).requires_grad_()
    noise = (0.1 * torch.randn(3, 32, A, generator=seeded(1))).requires_grad_()
    sources = {**dict(actor.named_parameters()), "state": state, "noise": noise}
    gradients = torch.autograd.grad(actor(state, noise=noise).sum(), list(sources.values()))
    for name, gradient in zip(sources, gradients, strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name
    assert (gradients[-1].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("objective", list(consistency.OBJECTIVES))
def test_the_loss_reaches_every_weight(objective: str) -> None:
    actor = make_actor(() if objective == "distill" else (2.0, 0.5), objective=objective)
    state, action = torch.randn(32, S, generator=seeded()), torch.rand(32, A, generator=seeded(1))
    loss, _ = actor.loss(state, action, progress=0.5, generator=seeded(2))
    for gradient in torch.autograd.grad(loss.mean(), list(actor.parameters())):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("action_norm", [False, True])
def test_gradients_are_those_of_differences(action_norm: bool) -> None:
    """In double precision, for one weight of every parameter, of the sample and of the loss."""
    actor = make_actor(action_norm=action_norm).double()
    state = torch.randn(16, S, generator=seeded(), dtype=torch.float64)
    noise = 0.05 * torch.randn(3, 16, A, generator=seeded(1), dtype=torch.float64)
    action = 0.5 * torch.rand(16, A, generator=seeded(2), dtype=torch.float64)
    z, u = noise[0] * 20, torch.rand(16, generator=seeded(3), dtype=torch.float64)

    def value() -> Tensor:
        loss, _ = actor.loss(state, action, noise={"z": z, "u": u})
        drawn: Tensor = actor(state, noise=noise)
        return drawn.square().sum() + loss.mean()

    parameters = list(actor.parameters())
    gradients = torch.autograd.grad(value(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            weight, small = parameter.view(-1)[:1], 1e-6
            weight += small
            above = value()
            weight -= 2 * small
            below = value()
            weight += small
            slope = ((above - below) / (2 * small)).item()
            assert slope == pytest.approx(gradient.view(-1)[0].item(), rel=1e-5, abs=1e-7)


def test_a_generator_draws_the_noise_in_the_documented_order() -> None:
    actor, state = make_actor(), torch.randn(5, 7, S, generator=seeded())
    drawn = actor.sample(state, generator=seeded(3))
    assert torch.equal(drawn, actor.sample(state, generator=seeded(3)))
    assert not torch.equal(drawn, actor.sample(state, generator=seeded(4)))
    noise = torch.randn(actor.noise_shape(*state.shape[:-1]), generator=seeded(3))
    assert noise.shape == (3, 5, 7, A)
    assert torch.equal(drawn, actor.sample(state, noise=noise)) and torch.equal(
        drawn, actor(state, noise=noise)
    )
    for steps in (1, 2):
        fewer = actor.sample(state, steps=steps, generator=seeded(3))
        noise = torch.randn(steps, 5, 7, A, generator=seeded(3))
        assert torch.equal(fewer, actor.sample(state, steps=steps, noise=noise))
        assert not torch.equal(fewer, drawn)


def test_a_generator_draws_the_losss_noise() -> None:
    actor, state, action = make_actor(objective="ict"), torch.randn(6, S), torch.rand(6, A)
    loss, _ = actor.loss(state, action, generator=seeded(3))
    generator = seeded(3)
    z, u = torch.randn(6, A, generator=generator), torch.rand(6, generator=generator)
    assert torch.equal(loss, actor.loss(state, action, noise={"z": z, "u": u})[0])


def test_steps_are_the_first_of_the_configured_ones() -> None:
    actor, state, noise = make_actor(), torch.randn(6, S), torch.randn(3, 6, A)
    f = actor.function(state)
    for steps, refinements in ((1, ()), (2, (2.0,)), (3, (2.0, 0.5))):  # type: tuple[int, tuple[float, ...]]
        expected = consistency.sample(f, noise[:steps], actor.levels, refinements, clamp=1.0)
        assert torch.equal(actor.sample(state, steps=steps, noise=noise[:steps]), expected)


def test_wrong_steps_and_noise_are_refused() -> None:
    actor, state = make_actor(), torch.zeros(6, S)
    for steps in (0, 4, -1):
        with pytest.raises(ValueError, match=rf"steps must be in 1..3 \(1 \+ refinements\), found {steps}"):
            actor.sample(state, steps=steps)
    with pytest.raises(ValueError, match=r"noise must have the shape \[3, 6, 2\], found \[2, 6, 2\]"):
        actor.sample(state, noise=torch.zeros(2, 6, A))
    with pytest.raises(ValueError, match=r"noise must have the shape \[1, 6, 2\], found \[6, 2\]"):
        actor.sample(state, steps=1, noise=torch.zeros(6, A))


@pytest.mark.parametrize("objective", ["denoise", "ct", "ict"])
@pytest.mark.parametrize("action_norm", [False, True])
def test_the_loss_is_the_objectives(objective: str, action_norm: bool) -> None:
    """The teacher is the actor itself unless given; options arrive; action_norm is the objective's tanh."""
    every: dict[str, dict[str, Any]] = {
        "denoise": {"count": 9},
        "ct": {"s1": 30, "weight": "interval"},
        "ict": {"c": 0.2},
    }
    options = every[objective]
    actor = make_actor(objective=objective, objective_options=options, action_norm=action_norm)
    state, action = torch.randn(8, S, generator=seeded()), torch.rand(8, A, generator=seeded(1))
    z, u = torch.randn(8, A, generator=seeded(2)), torch.rand(8, generator=seeded(3))
    f, progress = actor.function(state), torch.tensor(0.4)
    objective_function = consistency.OBJECTIVES[objective].loss
    expected, _ = objective_function(f, f, action, z, u, progress, actor.levels, tanh=action_norm, **options)
    found, _ = actor.loss(state, action, progress=0.4, noise={"z": z, "u": u})
    assert torch.equal(found, expected)
    taught, _ = actor.loss(state, action, progress=0.4, noise={"z": z, "u": u}, teacher=lambda x, t: x)
    assert torch.equal(taught, found) == (objective != "ct")


@pytest.mark.parametrize("objective", ["meanflow", "shortcut", "compose"])
def test_the_loss_passes_on_more_noise(objective: str) -> None:
    actor = make_actor(objective=objective, objective_options={"fraction": 0.6})
    state, action = torch.randn(8, S, generator=seeded()), torch.rand(8, A, generator=seeded(1))
    z, u = torch.randn(8, A, generator=seeded(2)), torch.rand(8, generator=seeded(3))
    f, progress, row = actor.function(state), torch.tensor(0.4), consistency.OBJECTIVES[objective]
    generator = seeded(4)
    more = {name: torch.rand(8, generator=generator) for name in ("u2", "u3") if row.takes(name)}
    expected, _ = row.loss(f, f, action, z, u, progress, actor.levels, **more, fraction=0.6)
    assert torch.equal(actor.loss(state, action, progress=0.4, noise={"z": z, "u": u, **more})[0], expected)
    drawn, _ = actor.loss(state, action, progress=0.4, noise={"z": z, "u": u}, generator=seeded(4))
    assert torch.equal(drawn, expected)


def test_the_levels_that_act() -> None:
    """A share of 0.75 and three steps: a quarter of the examples at each level, the last quarter drawn."""
    actor, u = make_actor((1.0, 0.3), acting_share=0.75), torch.arange(8) / 8
    expected = [5.0, 5.0, 1.0, 1.0, 0.3, 0.3, 0.0, 0.0]
    assert actor.acting_levels(u).tolist() == pytest.approx(expected)
    assert make_actor((), acting_share=1.0).acting_levels(u).tolist() == [5.0] * 8


@pytest.mark.parametrize(
    "objective", [name for name, row in consistency.OBJECTIVES.items() if row.takes("acting")]
)
def test_the_loss_passes_on_the_levels_that_act(objective: str) -> None:
    actor = make_actor((1.0, 0.3), objective=objective, acting_share=0.75)
    state, action = torch.randn(8, S, generator=seeded()), torch.rand(8, A, generator=seeded(1))
    noise = {**draw(actor.loss_noise(8), seeded(2)), "acting": torch.arange(8) / 8}
    plain = make_actor((1.0, 0.3), objective=objective)
    found, without = (each.loss(state, action, progress=0.4, noise=noise)[0] for each in (actor, plain))
    assert torch.equal(found[6:], without[6:])
    assert not torch.isclose(found[:6], without[:6]).all()


def test_without_a_share_nothing_more_is_drawn() -> None:
    assert "acting" not in make_actor().loss_noise(4)
    assert list(make_actor(acting_share=0.1).loss_noise(4)) == ["z", "u", "acting"]


@pytest.mark.parametrize("objective", ["cd", "distill"])
def test_the_loss_trains_a_guide_along(objective: str) -> None:
    """The guide's loss is added, and neither loss reaches the other's weights."""
    actor = make_actor((), objective=objective)
    assert actor.guide is not None
    state, action = torch.randn(8, S, generator=seeded()), torch.rand(8, A, generator=seeded(1))
    z, u = torch.randn(8, A, generator=seeded(2)), torch.rand(8, generator=seeded(3))
    f, progress = actor.function(state), torch.tensor(0.4)
    row = consistency.OBJECTIVES[objective]
    assert row.guide is not None
    guide = consistency.consistency_function(
        partial(actor.guide.predict, state), consistency.Parameterisation(row.guide.parameterisation)
    )
    given = (f, action, z, u, progress, actor.levels)
    own, _ = row.loss(f, *given, guide=guide)
    guides, _ = row.guide.loss(guide, *given)
    loss, metrics = actor.loss(state, action, progress=0.4, noise={"z": z, "u": u})
    assert torch.equal(loss, own + guides) and torch.equal(metrics["guide"], guides)
    theirs = list(actor.guide.parameters())
    mine = [p for name, p in actor.named_parameters() if not name.startswith("guide")]
    for part, reached, not_reached in ((own, mine, theirs), (guides, theirs, mine)):
        found = torch.autograd.grad(part.sum(), [*reached, *not_reached], allow_unused=True)
        assert all(g is not None for g in found[: len(reached)])
        assert all(g is None for g in found[len(reached) :])


def test_dropout_leaves_the_same_units_out_on_both_sides_of_a_target() -> None:
    """Noise decides which, and only the loss has it."""
    actor = make_actor(objective="ict", dropout=0.4)
    state, action = torch.randn(64, S, generator=seeded()), torch.rand(64, A, generator=seeded(1))
    z, u, drop = (torch.rand(64, n, generator=seeded(n)) for n in (A, 1, 32))
    given = {"z": z, "u": u.squeeze(-1)}
    seen: list[Tensor] = []
    for layer in (actor.mlp.layers[2], actor.mlp.layers[4]):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    loss, _ = actor.loss(state, action, progress=0.4, noise={**given, "drop": drop})
    assert len(seen) == 4
    for first, second, part in ((seen[0], seen[2], drop[:, :16]), (seen[1], seen[3], drop[:, 16:])):
        assert torch.equal(first == 0, part < 0.4) and torch.equal(second == 0, part < 0.4)
    x, t = torch.randn(64, A), torch.full((64,), 0.7)
    layers = actor.mlp.layers
    left = layers[:2](torch.cat([x, actor.embed(t), state], -1)) / 0.6  # a unit that stays counts for others
    expected = layers[4](layers[2:4](left) / 0.6)
    torch.testing.assert_close(actor.predict(state, x, t, drop=torch.ones(64, 32)), expected)
    noise = torch.randn(3, 64, A)
    assert torch.equal(actor(state, noise=noise), make_actor(objective="ict")(state, noise=noise))
    drawn, _ = actor.loss(state, action, progress=0.4, generator=seeded(5), noise=given)
    again = torch.rand(64, 32, generator=seeded(5))
    same, _ = actor.loss(state, action, progress=0.4, noise={**given, "drop": again})
    assert torch.equal(drawn, same) and not torch.equal(drawn, loss)
    with pytest.raises(ConfigError, match=r"dropout: Input should be less than 1, found 1.0"):
        build(ActorConfig, {"dropout": 1.0}, "actor")


def test_action_norm_bounds_what_the_network_sees() -> None:
    state, noise = torch.zeros(50, S), 3 * torch.randn(1, 50, A, generator=seeded())
    plain, normed = (make_actor((), parameterisation="unscaled", action_norm=on) for on in (False, True))
    seen: list[Tensor] = []
    for actor in (plain, normed):
        actor.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., :A]))
    assert not torch.equal(plain(state, noise=noise), normed(state, noise=noise))
    torch.testing.assert_close(seen[0], 5 * noise[0])
    torch.testing.assert_close(seen[1], torch.tanh(5 * noise[0]))


def overshoot(actor: ConsistencyActor) -> nn.Parameter:
    """Adds 100 to the network's output, and returns the bias that does it."""
    *_, bias = actor.mlp.parameters()
    with torch.no_grad():
        bias.add_(100.0)
    return bias


def test_clamping_inside_takes_the_gradient_outside_away() -> None:
    """An actor that overshoots at every level: clamped at the end it is pulled back, inside it never is."""
    state, action = torch.zeros(20, S), torch.zeros(20, A)
    z, u = 0.01 * torch.randn(20, A, generator=seeded()), 0.5 + 0.5 * torch.rand(20, generator=seeded(1))
    for clamp, reach, pulled in (("end", 25.0, True), ("inside", 1.0, False)):
        actor = make_actor((), clamp=clamp)
        bias = overshoot(actor)
        t = torch.full((20,), 1.0)
        assert (actor.evaluate(state, z, t).max() > reach - 1e-6) and actor(state).max() <= 1
        assert (actor.evaluate(state, z, t).max() <= 1) == (clamp == "inside")
        loss, _ = actor.loss(state, action, noise={"z": z, "u": u})
        (gradient,) = torch.autograd.grad(loss.sum(), bias)
        assert bool((gradient > 0).all()) == pulled and bool((gradient != 0).any()) == pulled


def test_clamping_inside_holds_at_every_step() -> None:
    """What is noised for the second step has been clamped first."""
    state, noise = torch.zeros(20, S), torch.randn(2, 20, A, generator=seeded())
    seen: dict[str, Tensor] = {}
    for clamp in ("end", "inside"):
        actor = make_actor((2.0,), clamp=clamp, parameterisation="unscaled")
        overshoot(actor)
        calls: list[Tensor] = []
        actor.mlp.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs[0][..., :A]))
        actor(state, noise=noise)
        seen[clamp] = calls[1] - math.sqrt(4 - 0.002**2) * noise[1]
    assert seen["end"].min() > 1.1
    torch.testing.assert_close(seen["inside"], torch.ones(20, A))


def test_the_configuration_refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigError, match="objective 'denoize' does not exist: did you mean denoise"):
        ActorConfig("denoize")
    with pytest.raises(ConfigError, match=r"'itc' does not exist: did you mean .*ict"):
        ActorConfig("itc")
    with pytest.raises(
        ConfigError, match="'gan' does not exist: choose from cd, compose, ct, denoise, distill, ect, ict"
    ):
        ActorConfig("gan")
    bad: list[tuple[float, ...]] = [(0.5, 2.0), (5.1,), (2.0, 0.001), (2.0, -1.0), (math.nan,)]
    for refinements in bad:
        with pytest.raises(ConfigError, match=r"refinements must descend within .* = \[0.002, 5.0\], found"):
            ActorConfig(t_max=5.0, refinements=refinements)
    ActorConfig(refinements=(80.0, 2.24, 0.002))


# Members


def shake(module: nn.Module) -> None:
    """Moves all weights, so that no gain is 1 and no offset 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)


@pytest.mark.parametrize("clamp", ["end", "inside"])
@pytest.mark.parametrize("members", [(3,), (2, 3)])
def test_an_actors_members_are_actors(members: tuple[int, ...], clamp: Literal["end", "inside"]) -> None:
    check_members(members, objective="ict", clamp=clamp)


@pytest.mark.parametrize("objective", ["ect", "cd", "scm", "meanflow", "shortcut", "compose", "distill"])
def test_members_of_every_objective(objective: str) -> None:
    check_members((3,), objective=objective)


def check_members(members: tuple[int, ...], **options: Any) -> None:
    refinements = () if options["objective"] == "distill" else (2.0, 0.5)
    together = make_actor(refinements, members=members, **options)
    apart = make_actor(refinements, **options)
    state, action = torch.randn(*members, 5, S), torch.rand(*members, 5, A)
    noise, u = torch.randn(together.steps, *members, 5, A), torch.rand(*members, 5)
    given = {"z": noise[0], "u": u, "u2": torch.rand(*members, 5), "u3": torch.rand(*members, 5)}
    drawn, (loss, _) = together(state, noise=noise), together.loss(state, action, noise=given)
    assert drawn.shape == (*members, 5, A) and loss.shape == (*members, 5)
    results = []
    for flat in range(math.prod(members)):
        k = (flat,) if len(members) == 1 else divmod(flat, members[1])
        apart.load_state_dict(copy_of_member(together, k))
        alone = apart(state[k], noise=noise[(slice(None), *k)])
        torch.testing.assert_close(drawn[k], alone, rtol=0, atol=1e-6)
        alone_loss, _ = apart.loss(
            state[k], action[k], noise={name: tensor[k] for name, tensor in given.items()}
        )
        torch.testing.assert_close(loss[k], alone_loss, rtol=1e-4, atol=1e-5)
        results.append(alone)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("size", [10, 10_000])
def test_mish_has_its_derivative_under_every_transform(size: int) -> None:
    """Its short cut without gradients works in place, which no transform around it may notice."""
    x = torch.linspace(-30, 30, size, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(functional.mish(x).sum(), x)
    x = x.detach()
    ones = torch.ones_like(x)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            value, derivative = torch.func.jvp(Mish(), (x,), (ones,))  # type: ignore[misc]
        torch.testing.assert_close(value, functional.mish(x))
        torch.testing.assert_close(derivative, slope)

    def along(scale: Tensor) -> Tensor:
        value, derivative = torch.func.jvp(lambda x: Mish()(scale * x), (x,), (ones,))  # type: ignore[misc]
        total: Tensor = (value + derivative.detach()).sum()
        return total

    found = torch.func.grad(along)(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(found, (slope * x).sum())


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_critics_members_are_critics(layer_norm: bool) -> None:
    together = TwinCritic(S, A, (16, 16), layer_norm=layer_norm, members=(2,))
    apart = TwinCritic(S, A, (16, 16), layer_norm=layer_norm)
    shake(together)
    state, action = torch.randn(2, 5, S), torch.randn(2, 5, A)
    values = together(state, action)
    assert values.shape == (2, 2, 5)
    for k in range(2):
        apart.load_state_dict(copy_of_member(together, (k,)))
        torch.testing.assert_close(values[k], apart(state[k], action[k]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_twin_critic_is_two_networks(layer_norm: bool) -> None:
    twins = TwinCritic(S, A, (16, 16), layer_norm=layer_norm)
    shake(twins)
    one = MLP(S + A, (16, 16), 1, layer_norm=layer_norm)
    state, action = torch.randn(5, S), torch.randn(5, A)
    values = twins(state, action)
    assert values.shape == (2, 5) and not torch.equal(values[0], values[1])
    for k in range(2):
        one.load_state_dict(copy_of_member(twins.q, (k,)))
        expected = one(torch.cat([state, action], -1)).squeeze(-1)
        torch.testing.assert_close(values[k], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("members", [(), (3,)])
def test_a_critic_broadcasts_states_against_candidates(members: tuple[int, ...]) -> None:
    critic = TwinCritic(S, A, (16,), members=members)
    state, action = torch.randn(*members, 5, 1, S), torch.randn(*members, 5, 7, A)
    values = critic(state, action)
    assert values.shape == (*members, 2, 5, 7)
    for i in range(7):
        alone = critic(state.squeeze(-2), action[..., i, :])
        torch.testing.assert_close(values[..., i], alone, rtol=0, atol=1e-6)
    assert critic(state[..., 0, 0, :].unsqueeze(-2), action[..., 0, 0, :].unsqueeze(-2)).shape == (
        *members,
        2,
        1,
    )
    assert members or critic(torch.randn(S), torch.randn(A)).shape == (2,)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_value_functions_members_are_value_functions(layer_norm: bool) -> None:
    together = ValueFunction(S, (16, 16), layer_norm=layer_norm, members=(3,))
    shake(together)
    apart = ValueFunction(S, (16, 16), layer_norm=layer_norm)
    shown = torch.randn(5, S)
    values = together(shown)
    assert values.shape == (3, 5) and apart(shown).shape == (5,)
    torch.testing.assert_close(values, together(shown.expand(3, 5, S)))
    for k in range(3):
        apart.load_state_dict(copy_of_member(together, (k,)))
        torch.testing.assert_close(values[k], apart(shown), rtol=0, atol=1e-6)


def test_without_members_layers_are_those_of_torch() -> None:
    mine = MLP(S, (16,), A, layer_norm=True)
    theirs = nn.Sequential(nn.Linear(S, 16), nn.LayerNorm(16), nn.Mish(), nn.Linear(16, A))
    theirs.load_state_dict({name.removeprefix("layers."): value for name, value in mine.state_dict().items()})
    x = torch.randn(3, 5, S)
    torch.testing.assert_close(mine(x), theirs(x))


def test_weights_are_drawn_as_torch_draws_them() -> None:
    """Uniform within 1 / sqrt(inputs), for every member."""
    mlp = MLP(64, (), 1000, members=(3,))
    assert mlp(torch.zeros(5, 64)).shape == (3, 5, 1000)
    for parameter in mlp.parameters():
        assert parameter.abs().max() <= 1 / 8 and parameter.std().item() == pytest.approx(0.072, abs=0.003)
        assert not torch.equal(parameter[0], parameter[1])


def test_time_embedding_by_hand() -> None:
    """Width 4: two frequencies, 1 and 1/10000, sines first."""
    embedding = TimeEmbedding(4)
    t = torch.tensor([0.7, -1500.0])
    features = torch.stack([torch.sin(t), torch.sin(t / 1e4), torch.cos(t), torch.cos(t / 1e4)], -1)
    torch.testing.assert_close(embedding(t), embedding.mlp(features), rtol=1e-4, atol=1e-5)
    for width in (2, 7):
        with pytest.raises(ValueError, match=f"even and at least 4, found {width}"):
            TimeEmbedding(width)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_compiled_mish_is_mish(dtype: torch.dtype, precision: float) -> None:
    """Also far out, where the square of an exponential would overflow, and in its gradient."""
    x = torch.cat([torch.linspace(-50, 50, 4001), torch.tensor([-1e4, -88.0, 20.0, 88.0, 1e4])]).to(dtype)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = Mish()(mine), functional.mish(theirs)
    torch.testing.assert_close(found, expected, rtol=4 * precision, atol=precision)
    (found_slope,) = torch.autograd.grad(found.sum(), mine)
    (expected_slope,) = torch.autograd.grad(expected.sum(), theirs)
    assert found_slope.isfinite().all()
    torch.testing.assert_close(found_slope, expected_slope, rtol=4 * precision, atol=4 * precision)


# The candidates rule


ACTIONS = torch.tensor([[-0.9], [0.1], [0.7]])
VALUES = torch.tensor([1.0, 0.0, 2.5])


def fixed_candidates(state: Tensor) -> Tensor:
    return ACTIONS.expand(*state.shape[:-2], 3, 1)


def values_of(state: Tensor, action: Tensor) -> Tensor:
    """The smaller of the two is VALUES, the larger favours the second candidate."""
    assert state.shape == (len(action), 1, S) and torch.equal(action, ACTIONS.expand_as(action))
    value = VALUES.expand(action.shape[:-1])
    return torch.stack([value, value + torch.tensor([0.0, 100.0, 0.5])])


def test_one_candidate_is_the_actors() -> None:
    def refuse(state: Tensor, action: Tensor) -> Tensor:
        raise AssertionError("the critic isn't to be asked")

    actor, state = make_actor(), torch.randn(5, S)
    noise = torch.randn(3, 5, A)
    found = choose(lambda s: actor(s, noise=noise), refuse, state, candidates=1, temperature=1.0)
    assert torch.equal(found, actor(state, noise=noise))


def test_temperature_0_takes_the_best_of_the_smaller_values() -> None:
    found = choose(fixed_candidates, values_of, torch.zeros(6, S), candidates=3, temperature=0.0)
    assert torch.equal(found, ACTIONS[2].expand(6, 1))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_candidates_are_chosen_by_the_softmax(temperature: float) -> None:
    """40,000 draws: a frequency's standard deviation is at most 0.0025."""
    state = torch.zeros(40_000, S)
    found = choose(
        fixed_candidates, values_of, state, candidates=3, temperature=temperature, generator=seeded()
    )
    frequencies = [(found == action).double().mean().item() for action in ACTIONS]
    assert frequencies == pytest.approx(torch.softmax(VALUES / temperature, 0).tolist(), abs=0.01)
    again = choose(
        fixed_candidates, values_of, state, candidates=3, temperature=temperature, generator=seeded()
    )
    assert torch.equal(found, again)


def test_each_state_chooses_among_its_own_candidates() -> None:
    """The critic's best action is the one nearest to a goal that the state holds."""
    actor, critic_state = make_actor(), torch.randn(50, S, generator=seeded())
    drawn: list[Tensor] = []

    def draw(state: Tensor) -> Tensor:
        drawn.append(actor(state, generator=seeded(1)))
        return drawn[0]

    def q(state: Tensor, action: Tensor) -> Tensor:
        return -(action - state[..., :A]).square().sum(-1).expand(2, -1, -1)

    found = choose(draw, q, critic_state, candidates=8, temperature=0.0)
    assert drawn[0].shape == (50, 8, A) and found.shape == (50, A)
    for i in range(50):
        distance = (drawn[0][i] - critic_state[i, :A]).square().sum(-1)
        assert torch.equal(found[i], drawn[0][i, distance.argmin()])


# Optimisation


@pytest.mark.parametrize(("members", "decay"), [((), 0.0), ((3,), 0.0), ((3,), 0.1)])
def test_adam_is_torchs(members: tuple[int, ...], decay: float) -> None:
    """And AdamW's, where weights decay."""
    start = torch.randn(*members, 11, dtype=torch.float64, generator=seeded())
    mine, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    theirs = nn.Parameter(start.clone())
    optimiser = torch.optim.AdamW([theirs], lr=3e-3, weight_decay=decay)
    generator = seeded(1)
    for step in range(1, 21):
        gradient = torch.randn(start.shape, dtype=torch.float64, generator=generator) * 10.0 ** (step % 5 - 3)
        theirs.grad = gradient.clone()
        optimiser.step()
        count = torch.tensor(float(step), dtype=torch.float64)
        adam(mine, gradient, mean, square, count, 3e-3, decay=decay)
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-14)
    assert (mine - start).abs().max() > 1e-2


def test_adam_takes_its_rate_as_a_tensor_and_its_own_constants() -> None:
    start, gradient = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 1e-3]).double()
    theirs = nn.Parameter(start.clone())
    optimiser = torch.optim.Adam([theirs], lr=0.1, betas=(0.5, 0.9), eps=1e-3)
    mine, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 4):
        theirs.grad = gradient.clone()
        optimiser.step()
        rate, count = torch.tensor([0.1, step], dtype=torch.float64)
        adam(mine, gradient, mean, square, count, rate, beta1=0.5, beta2=0.9, epsilon=1e-3)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 1e4])
def test_clipping_is_torchs(scale: float) -> None:
    gradient = scale * torch.randn(3, 11, dtype=torch.float64, generator=seeded())
    gradient[1] *= 0.01
    clipped, norms = clip_gradient(gradient, 1.5)
    assert norms.shape == (3,)
    for k in range(3):
        parameter = nn.Parameter(torch.zeros(11, dtype=torch.float64))
        parameter.grad = gradient[k].clone()
        norm = nn.utils.clip_grad_norm_([parameter], 1.5)
        torch.testing.assert_close(norms[k], norm)
        torch.testing.assert_close(clipped[k], parameter.grad)


@pytest.mark.parametrize("members", [(), (3,)])
def test_flat_weights_and_back(members: tuple[int, ...]) -> None:
    actor = make_actor(members=members)
    parameters = {name: value.detach().clone() for name, value in actor.named_parameters()}
    network = FlatModule(actor, members)
    assert network.initial.shape == (*members, sum(network.sizes)) and not network.initial.requires_grad
    named = network.unflatten(network.initial)
    assert named.keys() == parameters.keys()
    for name, value in named.items():
        assert torch.equal(value, parameters[name])
        assert value.untyped_storage().data_ptr() == network.initial.untyped_storage().data_ptr()
    flat = torch.cat([value.reshape(*members, -1) for value in named.values()], -1)
    assert torch.equal(flat, network.initial)


@pytest.mark.parametrize("members", [(), (3,)])
def test_a_networks_calls_are_the_modules_own(members: tuple[int, ...]) -> None:
    """Any method, with any weights, differentiable in them; the module's own weights aren't touched."""
    actor = make_actor(members=members)
    network = FlatModule(make_actor(members=members), members)
    state, noise = torch.randn(*members, 5, S), torch.randn(3, *members, 5, A)
    expected = actor(state, noise=noise)
    assert torch.equal(network(network.initial).sample(state, noise=noise), expected)
    assert torch.equal(network(network.initial).forward(state, noise=noise), expected)
    weights = (1.1 * network.initial).requires_grad_()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.1)
    found, own = network(weights).forward(state, noise=noise), actor(state, noise=noise)
    assert torch.equal(found, own)
    (flat,) = torch.autograd.grad(found.sum(), weights)
    named = dict(zip(network.names, torch.autograd.grad(own.sum(), list(actor.parameters())), strict=True))
    for name, part in network.unflatten(flat).items():
        torch.testing.assert_close(part, named[name])
    assert torch.equal(network(network.initial).sample(state, noise=noise), expected)


def cubes(weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return weights.pow(3).sum(), {"largest": weights.max()}


def check_value_and_grad() -> None:
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    value, gradient, metrics = value_and_grad(cubes, weights)
    assert (value.item(), metrics["largest"].item()) == (20.125, 3.0)
    assert torch.equal(gradient, 3 * weights**2)
    assert not (weights.requires_grad or gradient.requires_grad or metrics["largest"].requires_grad)


def test_value_and_gradient() -> None:
    check_value_and_grad()


@pytest.mark.usefixtures("compiling")
def test_value_and_gradient_as_a_compiler_sees_it() -> None:
    check_value_and_grad()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clamp": "foo"}, "clamp 'foo' does not exist: choose from end, inside"),
        (
            {"parameterisation": "xyz"},
            "parameterisation 'xyz' does not exist: choose from auto, average, edm, ",
        ),
        (
            {"objective": "ict", "objective_options": {"metric": "hubber"}},
            "objective_options: metric 'hubber' does not exist: did you mean huber",
        ),
        (
            {"objective": "scm", "parameterisation": "edm"},
            "=edm doesn't go with objective=scm: leave it at auto",
        ),
        ({"parameterisation": "average"}, "=average doesn't go with objective=denoise"),
        (
            {"objective": "shortcut", "objective_options": {"grid": 100}},
            "objective_options: the grid of shortcuts must be 0 or a power of two, found 100",
        ),
        ({"objective": "meanflow", "clamp": "inside"}, "clamp=inside doesn't go with objective=meanflow"),
        ({"objective": "cd", "action_norm": True}, "action_norm doesn't go with objective=cd"),
        ({"objective": "distill", "refinements": (0.8,)}, "distill learns one step"),
        ({"objective": "distill", "acting_share": 0.5}, "acting_share doesn't go with objective=distill"),
        ({"objective": "meanflow", "objective_options": {"u2": 1}}, "meanflow has no 'u2'"),
        ({"t_max": 0.001}, "need 0 < t_min < t_max, found 0.002 and 0.001"),
        ({"objective": "ct", "objective_options": {"s2": 3}}, "ct has no 's2': did you mean s1 or s0"),
    ],
)
def test_the_configuration_refuses_what_it_does_not_know(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActorConfig(**values)
