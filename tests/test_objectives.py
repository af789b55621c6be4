"""The objectives after iCT against slow loops in numpy, one example at a time.

Derivatives along a path are complex steps there, `Im F(x + ih x') / h`, exact to rounding, and no code is
shared with the objectives: levels, noise and solver steps are written out again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.special import erfinv
from torch import Tensor

from cpql.consistency import (
    OBJECTIVES,
    ConsistencyFunction,
    Levels,
    Parameterisation,
    cd,
    compose,
    consistency_function,
    ct,
    denoise,
    distill,
    easy_ratio,
    ect,
    flow_matching,
    greedy_refinements,
    ict,
    meanflow,
    sample,
    scm,
    shortcut,
)
from cpql.consistency.levels import acting_or_index

D, BATCH = 3, 40
LEVELS = Levels(0.01, 5.0)
Vector = Any  # an array [D]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    z = torch.randn(BATCH, D, dtype=torch.float64, generator=generator)
    return 2 * uniform(BATCH, D) - 1, z, uniform(BATCH), uniform(BATCH)


def net(x: Tensor, time: Tensor, span: Tensor | None = None) -> Tensor:
    """A small nonlinear network, whose elements depend on each other and on every time input."""
    time = time.unsqueeze(-1)
    y = torch.sin(2 * x) * torch.cos(time) + 0.3 * torch.cos(time + x.roll(-1, -1)) + 0.1 * x**2
    return y if span is None else y + 0.4 * torch.sin(span.unsqueeze(-1) * (1 + x))


def net_slowly(x: Vector, time: complex, span: complex | None = None) -> Vector:
    y = np.sin(2 * x) * np.cos(time) + 0.3 * np.cos(time + np.roll(x, -1)) + 0.1 * x**2
    return y if span is None else y + 0.4 * np.sin(span * (1 + x))


def other(x: Tensor, time: Tensor, span: Tensor | None = None) -> Tensor:
    """A network that differs from `net`."""
    y = 0.5 * torch.tanh(x) + 0.2 * torch.sin(time).unsqueeze(-1)
    return y if span is None else y + 0.3 * span.unsqueeze(-1)


def other_slowly(x: Vector, time: float, span: float | None = None) -> Vector:
    y = 0.5 * np.tanh(x) + 0.2 * np.sin(time)
    return y if span is None else y + 0.3 * span


def refuse(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("this objective must not ask here")


def function(kind: Literal["edm", "trig", "flow", "average"], network: Any = net) -> ConsistencyFunction:
    return consistency_function(network, Parameterisation(kind, 0.4, 0.01))


def edm_slowly(network: Callable[[Vector, float], Vector], x: Vector, t: float) -> Vector:
    skip, out = 0.16 / ((t - 0.01) ** 2 + 0.16), 0.4 * (t - 0.01) / math.sqrt(t**2 + 0.16)
    return skip * x + out * network(x / math.sqrt(t**2 + 0.16), 250 * math.log(t))


def karras(n: int) -> list[float]:
    low, high = 0.01 ** (1 / 7), 5.0 ** (1 / 7)
    return [(low + i / (n - 1) * (high - low)) ** 7 for i in range(n)]


def level_slowly(u: float, mean: float, std: float) -> float:
    """The inverse of a truncated lognormal's distribution function."""
    below, above = (math.erf((math.log(t) - mean) / math.sqrt(2) / std) for t in (0.01, 5.0))
    return math.exp(mean + math.sqrt(2) * std * float(erfinv(below + u * (above - below))))


def size(error: Vector, metric: str, c: float) -> Any:
    if metric == "l2":
        return sum(e**2 for e in error) / D
    if metric == "l1":
        return sum(abs(e) for e in error) / D
    return math.sqrt(sum(e**2 for e in error) + c**2) - c


def rows() -> Any:
    return zip(*(tensor.numpy() for tensor in inputs()), strict=True)


def check(found: Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# The parameterisations: f is what the paper says in the paper's own picture.


def test_trigflow_as_its_paper_writes_it() -> None:
    f, sigma = function("trig"), 0.4
    for x, t in ((np.array([0.3, -1.0, 2.0]), 0.2), (np.array([3.0, 0.1, -4.0]), 5.0)):
        a = math.atan(t / sigma)
        x_a = math.cos(a) * x
        expected = math.cos(a) * x_a - math.sin(a) * sigma * net_slowly(x_a / sigma, a)
        check(f(torch.from_numpy(x), number(t)), expected.tolist())


@pytest.mark.parametrize("kind", ["flow", "average"])
def test_linear_flows_as_their_papers_write_them(kind: Literal["flow", "average"]) -> None:
    f = function(kind)
    for x, t in ((np.array([0.3, -1.0, 2.0]), 0.2), (np.array([3.0, 0.1, -4.0]), 5.0)):
        s = t / (1 + t)
        x_s = (1 - s) * x
        expected = x_s - s * net_slowly(x_s, s, s if kind == "average" else None)
        check(f(torch.from_numpy(x), number(t)), expected.tolist())


@pytest.mark.parametrize("kind", ["trig", "flow", "average"])
def test_without_noise_the_function_is_the_identity(kind: Literal["trig", "flow", "average"]) -> None:
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    f = function(kind)
    assert torch.equal(f(x, torch.zeros(50)), x)
    assert (f(x, torch.full((50,), 0.01)) - x).abs().max() < 0.1 < (f(x, torch.ones(50)) - x).abs().max()


def test_a_clamped_function() -> None:
    x, t = torch.linspace(-2, 2, 5).unsqueeze(-1), torch.full((5,), 0.002)
    f = consistency_function(net, Parameterisation(), clamp=1.0)
    assert f(x, t).flatten().tolist() == [-1, -1, 0, 1, 1]


# The objectives


@pytest.mark.parametrize("metric", ["l2", "l1", "huber"])
@pytest.mark.parametrize("weight", ["none", "interval"])
@pytest.mark.parametrize("target", ["ema", "self"])
@pytest.mark.parametrize("noise", ["uniform", "lognormal"])
@pytest.mark.parametrize("curriculum", ["root", "doubling"])
def test_every_choice_of_consistency_training(
    metric: Any, weight: Any, target: Any, noise: Any, curriculum: Any
) -> None:
    x0, z, u, _ = inputs()
    s1 = 29 if curriculum == "root" else 12
    n = math.ceil(math.sqrt(0.5 * (30**2 - 9) + 9) - 1) + 1 if curriculum == "root" else 3 * 2 + 1
    t, expected = karras(n), []
    cdf = [math.erf((math.log(a) - 0.2) / math.sqrt(2) / 0.7) for a in t]
    for a, b, c, _ in rows():
        i = int(c * (n - 1))
        if noise == "lognormal":
            i = max(j for j in range(n - 1) if (cdf[j] - cdf[0]) / (cdf[-1] - cdf[0]) <= c)
        slow = other_slowly if target == "ema" else net_slowly
        error = edm_slowly(net_slowly, a + t[i + 1] * b, t[i + 1]) - edm_slowly(slow, a + t[i] * b, t[i])
        expected.append(3 * size(error, metric, 0.2) / (t[i + 1] - t[i] if weight == "interval" else 1))
    options = {"curriculum": curriculum, "noise": noise, "mean": 0.2, "std": 0.7, "metric": metric, "c": 0.2}
    loss, metrics = ct(
        function("edm"),
        function("edm", other) if target == "ema" else refuse,
        *(x0, z, u, number(0.5), LEVELS),
        **options,
        target=target,
        weight=weight,
        s0=3,
        s1=s1,
        scale=3.0,
    )
    check(loss, expected)
    assert metrics["levels"].item() == n


def test_ict_is_consistency_training_with_other_choices() -> None:
    x0, z, u, _ = inputs()
    given = (function("edm"), refuse, x0, z, u, number(0.7), LEVELS)
    same = ct(
        *given,
        curriculum="doubling",
        s0=10,
        s1=1280,
        noise="lognormal",
        target="self",
        metric="huber",
        weight="interval",
    )
    assert torch.equal(ict(*given)[0], same[0])


def test_the_ratio_of_ect_by_hand() -> None:
    """With q 2 half the level at first, less where sigmoid pulls: at t = 0 by a factor of 1 + 8 / 2."""
    t = number(1e9)
    assert [easy_ratio(t, number(p), 4, 2.0, 8.0, 1.0).item() for p in (0.0, 0.24, 0.25, 0.99, 1.0)] == [
        0.5,
        0.5,
        0.75,
        0.9375,
        0.9375,
    ]
    near = [easy_ratio(number(0.0), number(p), 4, 2.0, 8.0, 1.0).item() for p in (0.0, 0.5, 1.0)]
    assert near == [0.0, 0.375, 0.6875]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"q": 4.0, "k": 2.0, "b": 3.0, "stages": 3, "c": 0.1, "std": 0.7}])
@pytest.mark.parametrize("choices", [{}, {"metric": "l1", "weight": "none", "scale": 2.0}])
def test_ect_against_a_loop(progress: float, options: dict[str, Any], choices: dict[str, Any]) -> None:
    x0, z, u, _ = inputs()
    stages = options.get("stages", 8)
    stage = min(int(progress * stages), stages - 1)
    expected, from_data, below = [], 0, 0
    for a, b, c, _ in rows():
        t = level_slowly(c, -1.1, options.get("std", 2.0))
        pull = 1 + options.get("k", 8.0) / (1 + math.exp(options.get("b", 1.0) * t))
        r = max(0.0, t * (1 - pull / options.get("q", 2.0) ** (stage + 1)))
        from_data += r == 0
        if 0 < r < LEVELS.t_min:
            below, r = below + 1, 0.0
        wanted = edm_slowly(net_slowly, a + r * b, r) if r > 0 else a
        error = edm_slowly(net_slowly, a + t * b, t) - wanted
        value = size(error, choices.get("metric", "huber"), options.get("c", 0.00054 * math.sqrt(D)))
        expected.append(choices["scale"] * value if choices else value / (t - r))
    loss, _ = ect(function("edm"), refuse, x0, z, u, number(progress), LEVELS, **options, **choices)
    check(loss, expected)
    assert (from_data > 0) == (progress == 0.0 and not options)
    assert (below > 0) == (progress == 0.3 and not options)  # r between 0 and t_min


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize(
    "options", [{}, {"target": "self", "metric": "huber", "c": 0.1, "weight": "interval", "count": 7}]
)
def test_cd_against_a_loop(solver: Any, options: dict[str, Any]) -> None:
    x0, z, u, _ = inputs()
    n, expected = options.get("count", 18), []
    t = karras(n)

    def denoised(x: Vector, t: float) -> Vector:
        return x / (1 + t)

    for a, b, c, _ in rows():
        i = int(c * (n - 1))
        x = a + t[i + 1] * b
        slope = (x - denoised(x, t[i + 1])) / t[i + 1]
        below = x + (t[i] - t[i + 1]) * slope
        if solver == "heun":
            again = (below - denoised(below, t[i])) / t[i]
            below = x + (t[i] - t[i + 1]) * (slope + again) / 2
        slow = net_slowly if options else other_slowly
        error = edm_slowly(net_slowly, x, t[i + 1]) - edm_slowly(slow, below, t[i])
        value = size(error, options.get("metric", "l2"), options.get("c", 0.0))
        expected.append(value / (t[i + 1] - t[i]) if options else value)
    loss, _ = cd(
        function("edm"),
        refuse if options else function("edm", other),
        *(x0, z, u, number(0.5), LEVELS),
        guide=lambda x, t: x / (1 + t.unsqueeze(-1)),
        solver=solver,
        **options,
    )
    check(loss, expected)


def test_heuns_step_is_the_more_exact() -> None:
    """Along the path of a known Gaussian, whose denoiser is linear and whose path is a scaling."""
    x0, z, u, _ = inputs()

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5 / torch.sqrt(0.25 + t**2).unsqueeze(-1)

    def guide(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.25 / (0.25 + t**2).unsqueeze(-1)

    euler, heun = (
        cd(exact, exact, x0, z, u, number(0.5), LEVELS, guide=guide, solver=solver)[0].mean().item()
        for solver in ("euler", "heun")  # type: Literal["euler", "heun"]
    )
    assert heun < 0.1 * euler < 1e-3


@pytest.mark.parametrize("progress", [0.0, 0.04, 0.5])
@pytest.mark.parametrize("options", [{}, {"mean": 0.2, "std": 0.7, "warmup": 0.6, "c": 0.3}, {"warmup": 0.0}])
def test_scm_against_a_loop(progress: float, options: dict[str, Any]) -> None:
    x0, z, u, _ = inputs()
    sigma, h, expected = 0.4, 1e-30, []
    warmup = options.get("warmup", 0.1)
    r = min(1.0, progress / warmup) if warmup else 1.0
    for x_0, noise, c, _ in rows():
        a = math.atan(level_slowly(c, options.get("mean", -1.0), options.get("std", 1.4)) / sigma)
        x = math.cos(a) * x_0 + math.sin(a) * sigma * noise
        slope = math.cos(a) * sigma * noise - math.sin(a) * x_0
        change = np.imag(net_slowly((x + 1j * h * slope) / sigma, a + 1j * h)) / h
        g = -(math.cos(a) ** 2) * (sigma * net_slowly(x / sigma, a) - slope)
        g = g - r * math.cos(a) * math.sin(a) * (x + sigma * change)
        g = g / (math.sqrt(sum(g**2)) + options.get("c", 0.1))
        expected.append(sum(g**2) / D)
    loss, _ = scm(function("trig"), refuse, x0, z, u, number(progress), LEVELS, **options)
    check(loss, expected)


def test_the_tangent_of_scm_is_the_derivative_of_f() -> None:
    """After the warm-up, cos(a) df/da along the path, from differences of f itself.

    A gradient step moves F along g, so the gradient of the loss in F is -2 g / D.
    """
    x0, z, u, _ = inputs()
    shift = torch.zeros(BATCH, D, dtype=torch.float64, requires_grad=True)
    f = function("trig", lambda x, a: net(x, a) + shift)
    loss, _ = scm(f, refuse, x0, z, u, number(1.0), LEVELS, c=0.3)
    (found,) = torch.autograd.grad(loss.sum(), shift)
    angle = torch.tensor([math.atan(level_slowly(c, -1.0, 1.4) / 0.4) for c in u.tolist()]).double()

    def along(angle: Tensor) -> Tensor:
        t = 0.4 * torch.tan(angle)
        return function("trig")(x0 + t.unsqueeze(-1) * z, t)

    small = 1e-5
    slope = (along(angle + small) - along(angle - small)) / (2 * small)
    g = torch.cos(angle).unsqueeze(-1) * slope
    g = g / (g.norm(dim=-1, keepdim=True) + 0.3)
    torch.testing.assert_close(found, -2 * g / D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"power": 1.0},
        {"fraction": 1.0, "power": 0.5, "c": 0.1},
        {"fraction": 0.0},
        {"fraction": 0.6, "mean": 0.5, "std": 2.0},
        {"larger": "all"},
        {"larger": "all", "fraction": 0.6, "std": 2.0},
    ],
)
def test_meanflow_against_a_loop(options: dict[str, Any]) -> None:
    x0, z, u, u2 = inputs()
    h, share, expected, apart = 1e-30, options.get("fraction", 0.25), [], 0
    for x_0, noise, c, c2 in rows():

        def time(u: float) -> float:
            t = level_slowly(u, options.get("mean", -0.4), options.get("std", 1.0))
            return t / (1 + t)

        s = r = time(c)
        if c2 < share:
            s, r, apart = max(s, time(c2 / share)), min(s, time(c2 / share)), apart + 1
        elif "larger" in options:
            s = r = max(s, time((c2 - share) / (1 - share)))
        x, v = (1 - s) * x_0 + s * noise, noise - x_0
        change = np.imag(net_slowly(x + 1j * h * v, s + 1j * h, s - r + 1j * h)) / h
        error = sum((net_slowly(x, s, s - r) - v + (s - r) * change) ** 2)
        expected.append(error / (error + options.get("c", 1e-3)) ** options.get("power", 0.0))
    loss, _ = meanflow(function("average"), refuse, x0, z, u, number(0.5), LEVELS, u2=u2, **options)
    check(loss, expected)
    assert apart == {0.0: 0, 1.0: BATCH}.get(share, apart) and 0 <= apart <= BATCH


def test_the_derivative_of_meanflow_is_that_of_differences() -> None:
    """The gradient in F is `2 w (u - v + (s - r) du/ds)`, the derivative at a fixed r."""
    x0, z, u, u2 = inputs()
    shift = torch.zeros(BATCH, D, dtype=torch.float64, requires_grad=True)
    f = function("average", lambda x, s, span: net(x, s, span) + shift)
    loss, _ = meanflow(f, refuse, x0, z, u, number(0.5), LEVELS, u2=u2, fraction=1.0, c=0.2, power=1.0)
    (found,) = torch.autograd.grad(loss.sum(), shift)
    levels = ([level_slowly(c, -0.4, 1.0) for c in v.tolist()] for v in (u, u2))
    first, second = (torch.tensor([t / (1 + t) for t in column]).double() for column in levels)
    s, r = torch.maximum(first, second), torch.minimum(first, second)

    def average(s: Tensor) -> Tensor:
        x = (1 - s).unsqueeze(-1) * x0 + s.unsqueeze(-1) * z
        return net(x, s, s - r)

    small = 1e-5
    slope = (average(s + small) - average(s - small)) / (2 * small)
    error = average(s) - (z - x0) + (s - r).unsqueeze(-1) * slope
    weight = 1 / (error.square().sum(-1, keepdim=True) + 0.2)
    torch.testing.assert_close(found, 2 * weight * error, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"fraction": 1.0}, {"fraction": 0.0}, {"fraction": 0.7, "grid": 8}, {"grid": 0}]
)
def test_shortcut_against_a_loop(options: dict[str, Any]) -> None:
    x0, z, u, u2 = inputs()
    share, grid, expected, spans = options.get("fraction", 0.25), options.get("grid", 128), [], set()
    for x_0, noise, c, c2 in rows():
        if c2 >= share:
            x = (1 - c) * x_0 + c * noise
            error = net_slowly(x, c, 0.0) - (noise - x_0)
        else:
            if grid:
                span = 2.0 ** -int(c2 / share * math.log2(grid))
                s = (int(c / span) + 1) * span
                spans.add(span)
            else:
                s, span = c, c * c2 / share
            x, d = (1 - s) * x_0 + s * noise, span / 2
            first = other_slowly(x, s, d)
            second = other_slowly(x - d * first, s - d, d)
            error = net_slowly(x, s, span) - (first + second) / 2
        expected.append(sum(error**2) / D)
    f, teacher = function("average"), function("average", other)
    loss, _ = shortcut(f, teacher, x0, z, u, number(0.5), LEVELS, u2=u2, **options)
    check(loss, expected)
    if options.get("fraction") == 1.0:
        assert spans == {2.0**-k for k in range(7)}


def composed_slowly(x: Vector, s: float, m: float, r: float) -> Vector:
    """Where `net_slowly` jumps from s to m, and from there to r."""
    middle = x - (s - m) * net_slowly(x, s, s - m)
    return middle - (m - r) * net_slowly(middle, m, m - r)


@pytest.mark.parametrize("options", [{}, {"fraction": 1.0}, {"fraction": 0.0, "smallest": 0.3}])
def test_compose_against_a_loop(options: dict[str, Any]) -> None:
    x0, z, u, u2 = inputs()
    u3, share = u2.roll(1), options.get("fraction", 0.5)
    expected, jumps = [], 0
    for (x_0, noise, c, c2), c3 in zip(rows(), u3.tolist(), strict=True):
        if c2 >= share:
            x, d = (1 - c) * x_0 + c * noise, min(c, c3 * options.get("smallest", 1e-3))
            error = net_slowly(x, c, d) - (noise - x_0)
        else:
            s, jumps = c ** (1 / 3), jumps + 1
            r = s * (1 - math.sqrt(c2 / share))
            x = (1 - s) * x_0 + s * noise
            error = x - (s - r) * net_slowly(x, s, s - r) - composed_slowly(x, s, s - c3 * (s - r), r)
        expected.append(sum(error**2) / D)
    loss, _ = compose(function("average"), refuse, x0, z, u, number(0.5), LEVELS, u2=u2, u3=u3, **options)
    check(loss, expected)
    assert jumps == {0.0: 0, 1.0: BATCH}.get(share, jumps) and 0 <= jumps <= BATCH


def test_compose_jumps_between_three_uniform_times() -> None:
    """The moments of three ordered uniform numbers, from the times that the network is asked at."""
    asked: list[Tensor] = []

    def spy(x: Tensor, s: Tensor, span: Tensor) -> Tensor:
        asked.append(torch.stack([s, s - span]))
        return x

    count = 40
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    u, u2, u3 = (v.flatten() for v in torch.meshgrid(grid, grid, grid, indexing="ij"))
    x0 = torch.zeros(len(u), D, dtype=torch.float64)
    compose(function("average", spy), refuse, x0, x0, u, number(0.5), LEVELS, u2=u2, u3=u3, fraction=1.0)
    (s, m), (_, r) = asked[:2]
    assert (0 <= r).all() and (r < m).all() and (m < s).all() and (s <= 1).all()
    found = torch.stack([r, m, s])
    assert found.mean(-1).tolist() == pytest.approx([1 / 4, 1 / 2, 3 / 4], abs=1e-3)
    products = found @ found.T / len(u)
    expected = torch.tensor([[2, 3, 4], [3, 6, 8], [4, 8, 12]], dtype=torch.float64) / 20
    torch.testing.assert_close(products, expected, rtol=0, atol=1e-3)


def test_the_two_jumps_that_are_composed_get_no_gradient() -> None:
    """The gradient in F is `-2 (s - r) error / D`, of the one jump alone."""
    x0, z, u, u2 = inputs()
    shift = torch.zeros(BATCH, D, dtype=torch.float64, requires_grad=True)
    f = function("average", lambda x, s, span: net(x, s, span) + shift)
    loss, _ = compose(f, refuse, x0, z, u, number(0.5), LEVELS, u2=u2, u3=u2.roll(1), fraction=1.0)
    (found,) = torch.autograd.grad(loss.sum(), shift)
    span = u ** (1 / 3) * u2.sqrt()
    torch.testing.assert_close(found.square().sum(-1), 4 * span**2 * loss.detach() / D)


def test_distillation_against_a_loop() -> None:
    x0, z, u, _ = inputs()
    for steps in (1, 10):
        expected = []
        for _, noise, _, _ in rows():
            x = noise
            for i in range(steps):
                x = x - other_slowly(x, 1 - i / steps) / steps
            expected.append(sum((edm_slowly(net_slowly, 5.0 * noise, 5.0) - x) ** 2) / D)
        guide = function("flow", other)
        loss, _ = distill(function("edm"), refuse, x0, z, u, number(0.5), LEVELS, guide=guide, steps=steps)
        check(loss, expected)


# Examples at given levels


ACTING = torch.tensor([5.0, 0.7, 0.011, 0.0], dtype=torch.float64).repeat(BATCH // 4)


def acting_or_drawn(objective: Callable[..., Any], f: Any, teacher: Any, **options: Any) -> list[Tensor]:
    """The losses with `ACTING` and those without, which have to agree where it is 0."""
    x0, z, u, _ = inputs()
    given = (f, teacher, x0, z, u, number(0.5), LEVELS)
    found, drawn = (objective(*given, acting=acting, **options)[0] for acting in (ACTING, None))
    assert torch.equal(found[ACTING == 0], drawn[ACTING == 0])
    return [found[ACTING > 0], drawn[ACTING > 0]]


@pytest.mark.parametrize("noise", ["uniform", "lognormal"])
def test_denoising_at_given_levels(noise: Any) -> None:
    expected = []
    for (a, b, _, _), t in zip(rows(), ACTING.tolist(), strict=True):
        if t:
            error = edm_slowly(net_slowly, a + t * b, t) - a
            expected.append((1 / t**2 + 4) * sum(error**2) / D)
    check(acting_or_drawn(denoise, function("edm"), refuse, noise=noise)[0], expected)


@pytest.mark.parametrize("noise", ["uniform", "lognormal"])
def test_pairs_whose_upper_level_is_at_or_above_a_given_one(noise: Any) -> None:
    """The pair is the one that some u draws, found by hand: the same loss."""
    x0, z, _, _ = inputs()
    low = [sum(level > t for t in karras(24)[1:23]) for level in ACTING.tolist()]
    assert low[:4] == [22, 13, 0, 0]
    u = torch.tensor([(index + 0.5) / 23 for index in low], dtype=torch.float64)
    f, g = function("edm"), function("edm", other)
    for objective, options in ((ct, {"s0": 24, "s1": 23, "noise": noise}), (cd, {"count": 24, "guide": g})):
        found, _ = acting_or_drawn(objective, f, g, **options)
        options = {**options, "noise": "uniform"} if objective is ct else options
        same, _ = objective(f, g, x0, z, u, number(0.5), LEVELS, **options)
        check(found, same[ACTING > 0].tolist())


def test_a_level_of_the_grid_is_the_upper_one_of_its_pair_in_single_precision() -> None:
    for count in (2, 11, 40, 151, 1281):
        n, index = torch.full((count - 1,), float(count)), torch.arange(count - 1.0)
        level = LEVELS.level(index + 1, n)
        assert torch.equal(acting_or_index(level, torch.zeros_like(index), n, LEVELS), index)


@pytest.mark.parametrize(
    ("objective", "kind", "mean", "std"), [(ect, "edm", -1.1, 2.0), (scm, "trig", -1.0, 1.4)]
)
def test_continuous_levels_that_are_given(objective: Any, kind: Any, mean: float, std: float) -> None:
    """As if u had been the level's place in the lognormal's distribution."""
    x0, z, _, _ = inputs()
    below, above, *places = (
        math.erf((math.log(max(t, 1e-9)) - mean) / math.sqrt(2) / std) for t in (0.01, 5.0, *ACTING.tolist())
    )
    u = torch.tensor([(place - below) / (above - below) for place in places], dtype=torch.float64).clamp(0, 1)
    found, _ = acting_or_drawn(objective, function(kind), refuse)
    same, _ = objective(function(kind), refuse, x0, z, u, number(0.5), LEVELS)
    check(found, same[ACTING > 0].tolist())


def test_meanflow_at_given_levels_learns_the_jump_to_the_data() -> None:
    _, _, _, u2 = inputs()
    h, expected = 1e-30, []
    for (x_0, noise, _, _), t in zip(rows(), ACTING.tolist(), strict=True):
        if t:
            s = t / (1 + t)
            x, v = (1 - s) * x_0 + s * noise, noise - x_0
            change = np.imag(net_slowly(x + 1j * h * v, s + 1j * h, s + 1j * h)) / h
            expected.append(sum((net_slowly(x, s, s) - v + s * change) ** 2))
    check(acting_or_drawn(meanflow, function("average"), refuse, u2=u2)[0], expected)


@pytest.mark.parametrize("grid", [0, 8])
def test_shortcuts_at_given_levels_are_jumps_to_the_data(grid: int) -> None:
    _, _, _, u2 = inputs()
    expected = []
    for (x_0, noise, _, _), t in zip(rows(), ACTING.tolist(), strict=True):
        if t:
            s = t / (1 + t)
            x, d = (1 - s) * x_0 + s * noise, s / 2
            first = other_slowly(x, s, d)
            error = net_slowly(x, s, s) - (first + other_slowly(x - d * first, d, d)) / 2
            expected.append(sum(error**2) / D)
    f, teacher = function("average"), function("average", other)
    check(acting_or_drawn(shortcut, f, teacher, u2=u2, grid=grid)[0], expected)


def test_compose_at_given_levels_jumps_to_the_data() -> None:
    _, _, _, u2 = inputs()
    u3, expected = u2.roll(1), []
    for (x_0, noise, _, _), t, c3 in zip(rows(), ACTING.tolist(), u3.tolist(), strict=True):
        if t:
            s = t / (1 + t)
            x = (1 - s) * x_0 + s * noise
            error = x - s * net_slowly(x, s, s) - composed_slowly(x, s, s - c3 * s, 0.0)
            expected.append(sum(error**2) / D)
    check(acting_or_drawn(compose, function("average"), refuse, u2=u2, u3=u3)[0], expected)


def test_flow_matching_against_a_loop() -> None:
    x0, z, u, _ = inputs()
    expected = [sum((net_slowly((1 - c) * a + c * b, c) - (b - a)) ** 2) / D for a, b, c, _ in rows()]
    check(flow_matching(function("flow"), refuse, x0, z, u, number(0.5), LEVELS)[0], expected)


# What is trained, and what is not


def scaled(kind: Any, weight: Tensor) -> ConsistencyFunction:
    return function(kind, lambda x, *times: weight * net(x, *times))


WITH_A_TEACHER: dict[str, Callable[..., Tensor]] = {
    "ct": lambda f, g, *rest: ct(f("edm"), g("edm"), *rest[:-1])[0],
    "cd": lambda f, g, *rest: cd(f("edm"), g("edm"), *rest[:-1], guide=g("edm"))[0],
    "shortcut": lambda f, g, *rest: shortcut(
        f("average"), g("average"), *rest[:-1], u2=rest[-1], fraction=1.0
    )[0],
    "distill": lambda f, g, *rest: distill(f("edm"), g("edm"), *rest[:-1], guide=g("flow"))[0],
}


@pytest.mark.parametrize("name", list(WITH_A_TEACHER))
def test_teachers_and_guides_get_no_gradient(name: str) -> None:
    x0, z, u, u2 = inputs()
    mine, theirs = number(0.7).requires_grad_(), number(0.9).requires_grad_()
    loss = WITH_A_TEACHER[name](
        lambda kind: scaled(kind, mine),
        lambda kind: scaled(kind, theirs),
        *(x0, z, u, number(0.5), LEVELS, u2),
    )
    found, nothing = torch.autograd.grad(loss.sum(), (mine, theirs), allow_unused=True)
    assert nothing is None and found.abs() > 1e-3


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_scheduled_objectives_are_those_that_depend_on_progress(name: str) -> None:
    x0, z, u, u2 = inputs()
    objective = OBJECTIVES[name]
    f = function(objective.parameterisation or "edm")
    given: dict[str, Any] = {}
    if objective.guide is not None:
        given["guide"] = function(objective.guide.parameterisation, other)
    given |= {more: u2 for more in ("u2", "u3") if objective.takes(more)}
    early, late = (
        objective.loss(f, f, x0, z, u, number(progress), LEVELS, **given)[0] for progress in (0.05, 0.9)
    )
    assert torch.equal(early, late) == (not objective.scheduled)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (scm, "trig"),
        (meanflow, "average"),
        (shortcut, "average"),
        (compose, "average"),
        (flow_matching, "flow"),
    ],
)
def test_a_function_of_another_kind_is_refused(objective: Callable[..., Any], kind: str) -> None:
    x0, z, u, u2 = inputs()
    more = {} if kind in ("trig", "flow") else {"u2": u2}
    if objective is compose:
        more["u3"] = u2
    for f in (function("edm"), refuse):
        with pytest.raises(ValueError, match=f"with the parameterisation {kind}"):
            objective(f, f, x0, z, u, number(0.5), LEVELS, **more)


def test_a_grid_that_is_no_power_of_two_is_refused() -> None:
    x0, z, u, u2 = inputs()
    f = function("average")
    for grid in (1, 3, 100, -2):
        with pytest.raises(ValueError, match=f"0 or a power of two, found {grid}"):
            shortcut(f, f, x0, z, u, number(0.5), LEVELS, u2=u2, grid=grid)


# A perfect model is a fixed point: data at a single point, where everything is known.


POINT = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)


def test_the_solution_has_no_loss() -> None:
    """All data at one point: f is that point at every level, and all jumps go at `(x_s - point) / s`."""
    _, z, u, u2 = inputs()
    u = 0.01 + 0.98 * u
    x0 = POINT.expand(BATCH, D)

    def velocity(x: Tensor, s: Tensor, span: Tensor | None = None) -> Tensor:
        return (x - POINT) / s.unsqueeze(-1)

    def trig(x: Tensor, a: Tensor) -> Tensor:
        cos, sin = torch.cos(a).unsqueeze(-1), torch.sin(a).unsqueeze(-1)
        return (cos * x * 0.4 - POINT) / (0.4 * sin)

    given = (x0, z, u, number(1.0), LEVELS)
    average, angle = function("average", velocity), function("trig", trig)
    t = torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)
    for f in (average, angle, function("flow", velocity)):
        torch.testing.assert_close(f(torch.randn(3, D).double(), t), POINT.expand(3, D))
    losses = {
        "ct": ct(angle, angle, *given)[0],
        "ect": ect(angle, refuse, *given, c=0.1)[0],
        "cd": cd(angle, angle, *given, guide=angle)[0],
        "scm": scm(angle, refuse, *given)[0],
        "meanflow": meanflow(average, refuse, *given, u2=u2, fraction=0.5)[0],
        "shortcut": shortcut(average, average, *given, u2=0.999 * u2, fraction=0.5, grid=0)[0],
        "compose": compose(average, refuse, *given, u2=u2, u3=u2.roll(1), smallest=0.1)[0],
        "flow": flow_matching(function("flow", velocity), refuse, *given)[0],
        "distill": distill(angle, refuse, *given, guide=function("flow", velocity))[0],
    }
    for name, loss in losses.items():
        assert loss.abs().max() < 1e-20 * (1e10 if name == "ect" else 1), name


# The search for levels


def test_the_search_finds_the_level_of_the_least_distance() -> None:
    """f returns its level, so that the distance to 0.7 and then to 0.2 is least at these levels."""
    levels, z = Levels(0.01, 5.0), torch.zeros(3, 4, 1, dtype=torch.float64)

    def f(x: Tensor, t: Tensor) -> Tensor:
        return t.unsqueeze(-1) + 0 * x

    wanted = [0.7]

    def distance(x: Tensor) -> float:
        return abs(math.log(x.mean().item() / wanted[0]))

    (first,) = greedy_refinements(f, z[:2], levels, distance, iterations=40)
    assert first == pytest.approx(0.7, rel=1e-5)
    wanted[0] = 20.0  # nothing is best: the largest level, from which the second can't rise
    found = greedy_refinements(f, z, levels, distance, iterations=40)
    assert 5.0 >= found[0] >= found[1] and found == pytest.approx((5.0, 5.0), rel=1e-4)
    sample(f, z, levels, found)


def test_the_search_looks_for_the_deeper_of_two_valleys() -> None:
    """A wide one at 0.05, which a ternary search alone runs into, and a deeper one at 2."""
    levels, z = Levels(0.01, 5.0), torch.zeros(2, 4, 1, dtype=torch.float64)

    def distance(x: Tensor) -> float:
        level = math.log(x.mean().item())
        return min(0.5 + 0.1 * abs(level - math.log(0.05)), abs(level - math.log(2.0)))

    found = [
        greedy_refinements(
            lambda x, t: t.unsqueeze(-1) + 0 * x, z, levels, distance, grid=grid, iterations=40
        )[0]
        for grid in (0, 10)
    ]
    assert found == pytest.approx([0.05, 2.0], rel=1e-5)


def test_sweeps_find_what_greed_misses() -> None:
    """x = t + x / 10 is to end at 0.7: 0.2 is best for two steps, and leaves three at 0.27."""
    levels, z = Levels(0.01, 5.0), torch.zeros(3, 4, 1, dtype=torch.float64)

    def search(sweeps: int) -> tuple[float, ...]:
        return greedy_refinements(
            lambda x, t: t.unsqueeze(-1) + 0.1 * x,
            z,
            levels,
            lambda x: abs(x.mean().item() - 0.7),
            iterations=40,
            sweeps=sweeps,
        )

    assert search(0) == pytest.approx((0.2, 0.2), rel=1e-4)
    assert search(1) == pytest.approx((4.5, 0.2), rel=1e-4)


def test_the_search_is_deterministic_and_keeps_what_it_found() -> None:
    f, levels = function("trig"), Levels(0.01, 5.0)
    z = torch.randn(3, 200, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def distance(x: Tensor) -> float:
        return float((x.std(0) - 0.3).square().sum())

    one, two = (greedy_refinements(f, z[:k], levels, distance, iterations=6, clamp=2.0) for k in (2, 3))
    assert two[:1] == one and two == greedy_refinements(f, z, levels, distance, iterations=6, clamp=2.0)
    coarse = [distance(sample(f, z[:2], levels, (t,), clamp=2.0)) for t in (0.02, 0.1, 0.5, 2.0, 4.0)]
    assert distance(sample(f, z[:2], levels, one, clamp=2.0)) <= min(coarse) + 0.02
