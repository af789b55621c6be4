"""The consistency core against hand-computed numbers and slow loops in plain Python floats."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpql.consistency import (
    OBJECTIVES,
    Function,
    Levels,
    Parameterisation,
    consistency_function,
    ct,
    ct_discretisation,
    ct_teacher_decay,
    denoise,
    ict,
    ict_discretisation,
    lognormal_index,
    perturb,
    sample,
    uniform_index,
)

Kind = Literal["edm", "unscaled"]
KINDS: tuple[Kind, ...] = ("edm", "unscaled")


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def network(x: Tensor, t: Tensor, span: Tensor | None = None) -> Tensor:
    """Any network: nonlinear, mixes the elements, and is large."""
    return 100.0 * torch.cos(x.flip(-1)) + torch.tanh(t).unsqueeze(-1) * x**2 + 7.0


# The function and its coefficients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t_min", [0.002, 0.01, 1.0])
def test_at_t_min_the_function_is_the_identity(kind: Kind, dtype: torch.dtype, t_min: float) -> None:
    f = consistency_function(network, Parameterisation(kind, 0.5, t_min))
    x = 3.0 * torch.randn(50, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert torch.equal(f(x, torch.full((50,), t_min, dtype=dtype)), x)
    away = f(x, torch.full((50,), 2 * t_min, dtype=dtype))
    assert (away - x).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_of_index_0_is_t_min_to_float_precision(kind: Kind) -> None:
    f = consistency_function(network, Parameterisation(kind))
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    t = Levels().level(torch.zeros(50), torch.tensor(40.0))
    torch.testing.assert_close(f(x, t), x, rtol=0, atol=1e-5)


def test_coefficients_by_hand() -> None:
    """At t = 0.502 the distance from t_min is sigma_data, 0.5."""
    t = tensor(0.502)
    edm, unscaled = Parameterisation("edm"), Parameterisation("unscaled")
    root = math.sqrt(0.502**2 + 0.25)
    for p in (edm, unscaled):
        assert p.c_skip(t).item() == pytest.approx(0.5, rel=1e-12)
        assert p.c_out(t).item() == pytest.approx(0.25 / root, rel=1e-12)
    assert edm.c_in(t).item() == pytest.approx(1 / root, rel=1e-12)
    assert edm.c_time(t).item() == pytest.approx(250 * math.log(0.502), rel=1e-12)
    assert (unscaled.c_in(t).item(), unscaled.c_time(t).item()) == (1.0, 0.502)


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_is_put_together_from_its_coefficients(kind: Kind) -> None:
    p = Parameterisation(kind, 0.3, 0.01)
    seen: list[tuple[Tensor, Tensor]] = []

    def recording(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return network(x, t)

    x, t = tensor(1.0, -2.0).expand(3, 2), tensor(0.01, 0.7, 80.0)
    y = consistency_function(recording, p)(x, t)
    ((inside, time),) = seen
    for i in range(3):
        ti = t[i]
        torch.testing.assert_close(inside[i], p.c_in(ti) * x[i])
        torch.testing.assert_close(time[i], p.c_time(ti))
        by_hand = p.c_skip(ti) * x[i] + p.c_out(ti) * network(inside[i], time[i])
        torch.testing.assert_close(y[i], by_hand, rtol=1e-12, atol=1e-12)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="parameterisation 'karras': choose from edm, unscaled"):
        Parameterisation("karras")  # type: ignore[arg-type]
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="levels need 0 < t_min < t_max"):
            Levels(low, high)


# Noise


def test_noise_is_added_in_units_of_the_level() -> None:
    x, z = tensor(0.1, -0.2).expand(2, 2), tensor(1.0, 2.0).expand(2, 2)
    expected = torch.stack([tensor(0.1, -0.2), tensor(3.1, 5.8)])
    torch.testing.assert_close(perturb(x, tensor(0.0, 3.0), z), expected)
    torch.testing.assert_close(perturb(x, number(3.0), z), expected[1].expand(2, 2))


def test_noise_before_a_tanh() -> None:
    """No noise changes nothing, the ends are taken as +-0.999, and the largest noise stays bounded."""
    x, z = torch.linspace(-0.999, 0.999, 41, dtype=torch.float64).unsqueeze(-1), torch.ones(41, 1).double()
    zero = torch.zeros(41, dtype=torch.float64)
    torch.testing.assert_close(perturb(x, zero, z, tanh=True), x, rtol=1e-12, atol=1e-12)
    ends = perturb(tensor(-1.0, 1.0), number(0.0), tensor(1.0, 1.0), tanh=True)
    torch.testing.assert_close(ends, tensor(-0.999, 0.999))
    moved = perturb(tensor(0.8), number(0.5), tensor(-2.0), tanh=True).item()
    assert moved == pytest.approx(math.tanh(math.atanh(0.8) - 1.0), rel=1e-12)
    for t in (0.002, 0.8, 5.0):
        assert perturb(x, zero + t, z, tanh=True).abs().max() < 1
    far = perturb(x.float(), torch.tensor(80.0), 3 * z.float(), tanh=True)
    assert far.abs().max() <= 1 and far.isfinite().all()


# Levels


def test_levels_by_hand() -> None:
    """From 1 to 128 the seventh roots go from 1 to 2, so the levels are seventh powers of round numbers."""
    levels = Levels(1.0, 128.0)
    index = torch.arange(5, dtype=torch.float64)
    found = levels.level(index, number(5.0))
    expected = tensor(1.0, 1.25**7, 17.0859375, 1.75**7, 128.0)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(levels.index(expected, number(5.0)), index, rtol=0, atol=1e-12)
    assert levels.index(number(1.4**7), number(11.0)).item() == pytest.approx(4.0, rel=1e-12)
    linear = Levels(1.0, 3.0, rho=1.0).level(tensor(0.0, 1.0, 2.0), number(3.0))
    torch.testing.assert_close(linear, tensor(1.0, 2.0, 3.0))


def test_default_levels() -> None:
    """The seventh roots of the ends are 0.41156 and 1.87012; half-way, 1.14084, to the seventh is 2.515."""
    found = Levels().level(tensor(0.0, 1.0, 2.0), number(3.0))
    assert found[[0, 2]].tolist() == pytest.approx([0.002, 80.0], rel=1e-13)
    assert found[1].item() == pytest.approx(((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7, rel=1e-13)
    assert found[1].item() == pytest.approx(2.515, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t_max", [5.0, 80.0])
def test_levels_ascend_within_their_ends(dtype: torch.dtype, t_max: float) -> None:
    levels = Levels(t_max=t_max)
    precision = 1e-6 if dtype == torch.float32 else 1e-14
    for n in (2, 3, 40, 151, 1281):
        t = levels.level(torch.arange(n, dtype=dtype), torch.tensor(float(n), dtype=dtype))
        assert t.dtype == dtype and (t.diff() > 0).all()
        assert t[0].item() >= torch.tensor(0.002, dtype=dtype).item() and t[-1].item() <= t_max
        assert t[[0, -1]].tolist() == pytest.approx([0.002, t_max], rel=precision)


def test_each_example_may_have_its_own_number_of_levels() -> None:
    levels, index, count = Levels(), tensor(3.0, 0.0, 7.0), tensor(5.0, 9.0, 8.0)
    together = levels.level(index, count)
    apart = [levels.level(i, n).item() for i, n in zip(index, count, strict=True)]
    assert together.tolist() == pytest.approx(apart, rel=1e-14)


# Schedules


def test_ct_counts_levels_by_hand() -> None:
    """Half-way: sqrt((151^2 - 4) / 2 + 4) = 106.78, less one, rounded up, plus one."""
    progress = torch.tensor([0.0, 0.5, 1.0])
    assert ct_discretisation(progress).tolist() == [2, 107, 151]
    assert ct_discretisation(progress, s1=149)[[0, 2]].tolist() == [2, 150]
    assert ct_discretisation(number(0.5)).item() == 107
    # The first step of a curriculum adds a level as soon as the root leaves an integer.
    assert ct_discretisation(number(1e-9)).item() == 3
    found = ct_discretisation(torch.linspace(0, 1, 10_001))
    assert (found.diff() >= 0).all() and set(found.tolist()) == set(range(2, 152))


def test_ict_doubles_levels_in_equal_stretches() -> None:
    """log2(1280 / 10) + 1 = 8 stretches."""
    counts = [11, 21, 41, 81, 161, 321, 641, 1281]
    starts = torch.arange(8) / 8
    assert ict_discretisation(starts).tolist() == counts
    assert ict_discretisation(starts + 0.1249).tolist() == counts
    assert ict_discretisation(torch.tensor(1.0)).item() == 1281
    assert ict_discretisation(torch.tensor([0.0, 0.5, 1.0]), 4, 8).tolist() == [5, 9, 9]
    # Without a power of two between them, 30 / 4: the last stretch is cut short and capped.
    # log2(7) + 1 = 3.807 stretches, the second from 0.2627 on.
    assert ict_discretisation(torch.tensor([0.0, 0.26, 0.27, 1.0]), 4, 30).tolist() == [5, 5, 9, 31]


def test_teacher_decay_by_hand() -> None:
    """exp(2 ln 0.95 / N) is the N-th root of 0.95 squared."""
    decay = ct_teacher_decay(tensor(2.0, 4.0, 151.0))
    assert decay.tolist() == pytest.approx([0.95, 0.9746794345, 0.9993208493], rel=1e-9)
    assert ct_teacher_decay(number(10.0), s0=10, mu0=0.9).item() == pytest.approx(0.9, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 11, 151, 1281])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_indices_are_equally_likely_and_never_leave(n: int, dtype: torch.dtype) -> None:
    u = ((torch.arange(16 * (n - 1), dtype=torch.float64) + 0.5) / (16 * (n - 1))).to(dtype)
    index = uniform_index(u, torch.tensor(float(n), dtype=dtype))
    assert index.long().bincount().tolist() == [16] * (n - 1)
    ends = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2, 1.0], dtype=dtype)  # 1 by rounding
    assert uniform_index(ends, torch.tensor(float(n), dtype=dtype)).tolist() == [0, n - 2, n - 2]


def lognormal_probabilities(levels: Levels, n: int, mean: float, std: float) -> list[float]:
    """Equation 10 of iCT, level by level."""
    t = karras(levels, n)
    above = [math.erf((math.log(t[i + 1]) - mean) / (math.sqrt(2) * std)) for i in range(n - 1)]
    below = [math.erf((math.log(t[i]) - mean) / (math.sqrt(2) * std)) for i in range(n - 1)]
    mass = [a - b for a, b in zip(above, below, strict=True)]
    return [m / sum(mass) for m in mass]


@pytest.mark.parametrize("n", [2, 11, 161])
@pytest.mark.parametrize("t_max", [5.0, 80.0])
@pytest.mark.parametrize(("mean", "std"), [(-1.1, 2.0), (0.5, 0.7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 2e-4)])
def test_lognormal_indices_have_the_papers_frequencies(
    n: int, t_max: float, mean: float, std: float, dtype: torch.dtype, tolerance: float
) -> None:
    levels, grid = Levels(t_max=t_max), 100_000
    u = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).to(dtype)
    index = lognormal_index(u, torch.tensor(float(n), dtype=dtype), levels, mean, std)
    assert index.min() >= 0 and index.max() <= n - 2
    found = (index.long().bincount(minlength=n - 1).double() / grid).tolist()
    assert found == pytest.approx(lognormal_probabilities(levels, n, mean, std), rel=0, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lognormal_indices_never_leave(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1 - torch.finfo(dtype).eps / 2, 1.0], dtype=dtype)  # 1 by rounding
    for t_min in (0.001, 0.002, 0.003, 0.01, 0.03, 0.1):
        for t_max in (2.0, 5.0, 80.0):
            for n in (2.0, 11.0, 1281.0):
                index = lognormal_index(ends, torch.tensor(n, dtype=dtype), Levels(t_min, t_max))
                assert index[0] == 0 and (index[1:] >= n - 3).all() and (index[1:] <= n - 2).all()


# Objectives


D = 3
BATCH = 25
Vector = list[float]


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A small nonlinear f, whose elements depend on each other."""
    t = t.unsqueeze(-1)
    return torch.sin(x) / (1 + t) + 0.3 * torch.cos(t + x.roll(-1, -1)) + 0.1 * x.prod(-1, keepdim=True) / t


def curved_slowly(x: Vector, t: float) -> Vector:
    return [
        math.sin(x[i]) / (1 + t) + 0.3 * math.cos(t + x[(i + 1) % D]) + 0.1 * x[0] * x[1] * x[2] / t
        for i in range(D)
    ]


def other(x: Tensor, t: Tensor) -> Tensor:
    """A teacher that differs from `curved`."""
    return 0.5 * torch.tanh(x) + 0.01 * t.unsqueeze(-1)


def other_slowly(x: Vector, t: float) -> Vector:
    return [0.5 * math.tanh(v) + 0.01 * t for v in x]


def karras(levels: Levels, n: int) -> list[float]:
    low, high = levels.t_min ** (1 / levels.rho), levels.t_max ** (1 / levels.rho)
    return [(low + i / (n - 1) * (high - low)) ** levels.rho for i in range(n)]


def noised(x: Vector, t: float, z: Vector, tanh: bool) -> Vector:
    if tanh:
        return [math.tanh(math.atanh(min(max(a, -0.999), 0.999)) + t * b) for a, b in zip(x, z, strict=True)]
    return [a + t * b for a, b in zip(x, z, strict=True)]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = 2 * torch.rand(BATCH, D, dtype=torch.float64, generator=generator) - 1
    z = torch.randn(BATCH, D, dtype=torch.float64, generator=generator)
    return x0, z, torch.rand(BATCH, dtype=torch.float64, generator=generator)


LEVELS = Levels(0.01, 5.0)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("options", [{}, {"count": 7, "sigma_data": 0.8}])
def test_denoise_against_a_loop(tanh: bool, options: dict[str, Any]) -> None:
    x0, z, u = inputs()
    n, sigma = options.get("count", 40), options.get("sigma_data", 0.5)
    t = karras(LEVELS, n)
    expected = []
    for a, b, c in zip(x0.tolist(), z.tolist(), u.tolist(), strict=True):
        ti = t[int(c * (n - 1)) + 1]
        out = curved_slowly(noised(a, ti, b, tanh), ti)
        expected.append((ti**-2 + sigma**-2) * sum((p - q) ** 2 for p, q in zip(out, a, strict=True)) / D)
    loss, metrics = denoise(curved, refuse, x0, z, u, number(0.3), LEVELS, tanh=tanh, **options)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9) and metrics == {}


def test_denoise_with_the_levels_of_edm() -> None:
    x0, z, u = inputs()
    low, high = (NormalDist(-0.5, 0.9).cdf(math.log(t)) for t in (LEVELS.t_min, LEVELS.t_max))
    expected = []
    for a, b, c in zip(x0.tolist(), z.tolist(), u.tolist(), strict=True):
        ti = math.exp(NormalDist(-0.5, 0.9).inv_cdf(low + c * (high - low)))
        out = curved_slowly(noised(a, ti, b, False), ti)
        expected.append((ti**-2 + 4) * sum((p - q) ** 2 for p, q in zip(out, a, strict=True)) / D)
    options: dict[str, Any] = {"noise": "lognormal", "mean": -0.5, "std": 0.9}
    loss, _ = denoise(curved, refuse, x0, z, u, number(0.3), LEVELS, **options)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9)


def test_denoise_uses_every_level_but_t_min() -> None:
    x0, levels, calls = torch.zeros(39, 1, dtype=torch.float64), Levels(), []  # type: Tensor, Levels, list[Tensor]
    u = (torch.arange(39, dtype=torch.float64) + 0.5) / 39
    denoise(weighted(number(1.0), calls), refuse, x0, x0, u, number(0.0), levels)
    assert calls[0].tolist() == pytest.approx(karras(levels, 40)[1:], rel=1e-12)


def refuse(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("this function isn't to be called")


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options", [{}, {"weight": "interval", "scale": 100.0, "s1": 149}, {"s0": 5, "s1": 20}]
)
def test_ct_against_a_loop(tanh: bool, progress: float, options: dict[str, Any]) -> None:
    x0, z, u = inputs()
    s0, s1 = options.get("s0", 2), options.get("s1", 150)
    n = math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
    t = karras(LEVELS, n)
    expected = []
    for a, b, c in zip(x0.tolist(), z.tolist(), u.tolist(), strict=True):
        low, high = t[int(c * (n - 1))], t[int(c * (n - 1)) + 1]
        target = other_slowly(noised(a, low, b, tanh), low)
        out = curved_slowly(noised(a, high, b, tanh), high)
        value = options.get("scale", 1.0) * sum((p - q) ** 2 for p, q in zip(out, target, strict=True)) / D
        expected.append(value / (high - low) if "weight" in options else value)
    loss, metrics = ct(curved, other, x0, z, u, number(progress), LEVELS, tanh=tanh, **options)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9)
    assert metrics["levels"].item() == n


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"c": 0.1, "mean": 0.3, "std": 0.6}, {"s0": 3, "s1": 24}])
def test_ict_against_a_loop(tanh: bool, progress: float, options: dict[str, Any]) -> None:
    x0, z, u = inputs()
    s0, s1 = options.get("s0", 10), options.get("s1", 1280)
    stretch = 1 / (math.log2(s1 // s0) + 1)
    n = int(min(s0 * 2 ** math.floor(progress / stretch), s1)) + 1
    t = karras(LEVELS, n)
    p = lognormal_probabilities(LEVELS, n, options.get("mean", -1.1), options.get("std", 2.0))
    huber = options.get("c", 0.00054 * math.sqrt(D))
    expected = []
    for a, b, c in zip(x0.tolist(), z.tolist(), u.tolist(), strict=True):
        i, mass = 0, p[0]
        while mass <= c:
            i += 1
            mass += p[i]
        target = curved_slowly(noised(a, t[i], b, tanh), t[i])
        out = curved_slowly(noised(a, t[i + 1], b, tanh), t[i + 1])
        square = sum((q - r) ** 2 for q, r in zip(out, target, strict=True))
        expected.append((math.sqrt(square + huber**2) - huber) / (t[i + 1] - t[i]))
    loss, metrics = ict(curved, refuse, x0, z, u, number(progress), LEVELS, tanh=tanh, **options)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9)
    assert metrics["levels"].item() == n


def weighted(weight: Tensor, calls: list[Tensor]) -> Function:
    """`weight * curved`, which also records the levels it is called at."""

    def f(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return weight * curved(x, t)

    return f


def test_ct_trains_the_student_alone() -> None:
    """The student is asked at the higher level, the teacher at the lower, which gets no gradient."""
    x0, z, u = inputs()
    student, teacher = number(0.7).requires_grad_(), number(0.9).requires_grad_()
    high, low = [], []  # type: list[Tensor], list[Tensor]
    loss, _ = ct(weighted(student, high), weighted(teacher, low), x0, z, u, number(0.2), LEVELS)
    found, nothing = torch.autograd.grad(loss.sum(), (student, teacher), allow_unused=True)
    assert nothing is None and len(high) == len(low) == 1 and (low[0] < high[0]).all()
    with torch.no_grad():
        out, target = (curved(perturb(x0, t, z), t) for t in (high[0], low[0]))
        expected = (2 * (0.7 * out - 0.9 * target) * out / D).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_ict_has_no_gradient_through_its_target() -> None:
    x0, z, u = inputs()
    weight, calls = number(0.7).requires_grad_(), []  # type: Tensor, list[Tensor]
    loss, _ = ict(weighted(weight, calls), refuse, x0, z, u, number(0.2), LEVELS, c=0.05)
    (found,) = torch.autograd.grad(loss.sum(), weight)
    low, high = sorted(calls, key=lambda t: t.sum().item())
    with torch.no_grad():
        out, target = (curved(perturb(x0, t, z), t) for t in (high, low))
        error = 0.7 * (out - target)
        slope = (error * out).sum(-1) / torch.sqrt(error.square().sum(-1) + 0.05**2) / (high - low)
    assert found.item() == pytest.approx(slope.sum().item(), rel=1e-9)


def test_ict_has_a_finite_gradient_where_both_levels_agree() -> None:
    x0, z, u = inputs()
    weight = number(0.0).requires_grad_()
    loss, _ = ict(weighted(weight, []), refuse, x0, z, u, number(1.0), LEVELS)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    assert loss.abs().max() == 0 and gradient.isfinite()


def test_denoise_compares_with_the_data_at_one_level() -> None:
    x0, z, u = inputs()
    weight, calls = number(0.7).requires_grad_(), []  # type: Tensor, list[Tensor]
    loss, _ = denoise(weighted(weight, calls), refuse, x0, z, u, number(0.2), LEVELS)
    (found,) = torch.autograd.grad(loss.sum(), weight)
    (t,) = calls
    with torch.no_grad():
        out = curved(perturb(x0, t, z), t)
        expected = (2 * (0.7 * out - x0) * out / D * (t**-2 + 4).unsqueeze(-1)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


# Sampling


class Recorder:
    """`x -> x / 2 + 1`, remembering what it was asked."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.x.append(x)
        self.t.append(t)
        return x / 2 + 1


def test_one_step_starts_and_denoises_at_t_max() -> None:
    f, z = Recorder(), tensor(0.1, -0.2, 0.3, 0.4).reshape(1, 2, 2)
    x = sample(f, z, Levels(0.01, 5.0))
    assert [t.tolist() for t in f.t] == [[5.0, 5.0]]
    torch.testing.assert_close(f.x[0], 5 * z[0])
    torch.testing.assert_close(x, 2.5 * z[0] + 1)


def test_two_and_three_steps_by_hand() -> None:
    """With t_min 3, the levels 5 and 3.4 take noise of 4 and 1.6, and f is asked at the levels."""
    levels, z = Levels(3.0, 10.0), tensor(0.1, -0.5, 2.0).reshape(3, 1, 1)
    f = Recorder()
    assert sample(f, z[:2], levels, (5.0,)).item() == pytest.approx((0.5 * 10 * 0.1 + 1 - 0.5 * 4) / 2 + 1)
    assert [t.item() for t in f.t] == pytest.approx([10, 5])
    assert [x.item() for x in f.x] == pytest.approx([1.0, 1.5 - 2.0])
    f = Recorder()
    assert sample(f, z, levels, (5.0, 3.4)).item() == pytest.approx((0.75 + 1.6 * 2.0) / 2 + 1)
    assert [t.item() for t in f.t] == pytest.approx([10, 5, 3.4])
    assert [x.item() for x in f.x] == pytest.approx([1.0, -0.5, 0.75 + 3.2])


def test_a_refinement_at_t_min_adds_no_noise() -> None:
    f, z = Recorder(), torch.full((2, 1, 1), 9.0)
    sample(f, z, Levels(0.01, 5.0), (0.01,))
    assert f.x[1].item() == pytest.approx(0.5 * 45 + 1) and f.t[1].item() == pytest.approx(0.01)


def test_the_end_is_clamped_and_not_the_steps() -> None:
    f, z = Recorder(), tensor(1.0, 1.0, -6.0, 0.0).reshape(2, 2, 1)
    x = sample(f, z, Levels(0.01, 5.0), (2.0,), clamp=1.0)
    assert f.x[1][1].item() == 3.5 and x.tolist() == [[-1.0], [1.0]]


def test_sampling_under_a_tanh() -> None:
    """Starts at tanh(t_max z), and refines from the unbounded space."""
    f, z = Recorder(), tensor(0.1, -0.3).reshape(2, 1, 1)
    out = sample(lambda x, t: f(x, t) - 1.1, z, Levels(0.6, 5.0), (1.0,), tanh=True).item()
    first = math.tanh(0.5) / 2 - 0.1
    assert [x.item() for x in f.x] == pytest.approx([math.tanh(0.5), math.tanh(math.atanh(first) - 0.24)])
    assert out == pytest.approx(math.tanh(math.atanh(first) - 0.24) / 2 - 0.1)


def test_wrong_steps_are_refused() -> None:
    levels, z = Levels(0.01, 5.0), torch.zeros(2, 3, 1)
    for bad in ((), (2.0, 1.0)):
        with pytest.raises(ValueError, match=f"{1 + len(bad)} steps need as much noise, found 2"):
            sample(refuse, z, levels, bad)
    for level in (0.009, 5.1, math.nan):
        with pytest.raises(ValueError, match=r"lies outside \[0.01, 5.0\]"):
            sample(refuse, z, levels, (level,))


def test_samples_are_differentiable_in_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 2, dtype=torch.float64, generator=generator).requires_grad_()
    f = consistency_function(curved, Parameterisation())

    def draw(z: Tensor) -> Tensor:
        return sample(f, z, Levels(0.002, 5.0), (2.0, 0.5))

    assert torch.autograd.gradcheck(draw, (z,))


# Shapes

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(1, 5), st.booleans(), st.sampled_from(KINDS))
def test_any_leading_shape(shape: tuple[int, ...], width: int, tanh: bool, kind: Any) -> None:
    x, z, u = torch.rand(*shape, width), torch.randn(*shape, width), torch.rand(shape)
    levels = Levels()
    t = levels.level(uniform_index(u, torch.tensor(9.0)), torch.tensor(9.0))
    f = consistency_function(network, Parameterisation(kind))
    assert perturb(x, t, z, tanh=tanh).shape == f(x, t).shape == x.shape
    for name, objective in OBJECTIVES.items():
        f = consistency_function(network, Parameterisation(objective.parameterisation or kind))
        given: dict[str, Any] = {"tanh": tanh, "guide": f}
        given |= dict.fromkeys(("u2", "u3"), u.flip(-1) if shape else u)
        if name == "distill":
            given["guide"] = consistency_function(lambda x, s: network(x, s).tanh(), Parameterisation("flow"))
        taken = {key: value for key, value in given.items() if objective.takes(key)}
        loss, metrics = objective.loss(f, f, x, z, u, torch.tensor(0.4), levels, **taken)
        assert loss.shape == shape and loss.isfinite().all() and (loss >= 0).all(), name
        assert all(value.shape == () for value in metrics.values())
    noise = torch.randn(3, *shape, width)
    drawn = sample(f, noise, levels, (2.0, 0.1), tanh=tanh, clamp=1.0)
    assert drawn.shape == x.shape and drawn.isfinite().all() and (drawn.abs() <= 1).all()
