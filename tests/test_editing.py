"""Zero-shot editing against a slow loop in numpy, and on a Gaussian, whose consistency function is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpql.consistency import Levels
from cpql.consistency.editing import (
    LUMA,
    Coordinates,
    colour_coordinates,
    colourise,
    edit,
    inpaint,
    interpolate,
    patch_coordinates,
    slerp,
    stroke,
    super_resolve,
)

LEVELS = Levels(0.002, 80.0)
TIMES = (80.0, 20.0, 5.0, 1.0, 0.3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def f(x: Tensor, t: Tensor) -> Tensor:
    """Any function that mixes the elements and doesn't blow up."""
    y: Tensor = torch.tanh(x.flip(-1) / (1.0 + t.unsqueeze(-1)) + 0.3 * x.cos())
    return y


def by_hand(y: NDArray[Any], mask: NDArray[Any], z: NDArray[Any], a: NDArray[Any]) -> NDArray[Any]:
    """Algorithm 4 for one sample, A a matrix, line by line."""
    inverse, kept = np.linalg.inv(a), 1.0 - mask
    x: NDArray[Any]
    y = inverse @ ((a @ y) * kept)
    x = y + TIMES[0] * z[0]
    for n, t in enumerate(TIMES):
        if n:
            x = x + math.sqrt(t**2 - LEVELS.t_min**2) * z[n]
        x = f(torch.from_numpy(x), torch.tensor(t, dtype=torch.float64)).numpy()
        x = inverse @ ((a @ y) * kept + (a @ x) * mask)
    return x


@pytest.mark.parametrize("rotated", [False, True])
def test_editing_is_the_papers_algorithm(rotated: bool) -> None:
    y, z = normal(5, 6), normal(len(TIMES), 5, 6, seed=1)
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    rotation = torch.linalg.qr(normal(3, 3, seed=3)).Q
    places = torch.tensor([[4, 0, 2], [1, 5, 3]])
    coordinates = Coordinates(rotation, places) if rotated else None
    shown = mask.unflatten(-1, (2, 3)) if rotated else mask  # type: ignore[no-untyped-call]
    found = edit(f, y, shown, z, LEVELS, TIMES, coordinates=coordinates)
    a = np.eye(6)
    if rotated:  # the same as one large matrix: permute, then turn each group
        a = np.kron(np.eye(2), rotation.numpy()) @ np.eye(6)[places.flatten().numpy()]
    for i in range(5):
        expected = by_hand(y[i].numpy(), ~mask[i].numpy(), z[:, i].numpy(), a)
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=0, atol=1e-12)


def test_what_is_kept_is_kept_to_the_bit() -> None:
    y, z = normal(50, 6).float(), normal(len(TIMES), 50, 6, seed=1).float()
    mask = torch.rand(50, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    out = inpaint(f, y, mask, z, LEVELS, TIMES)
    assert torch.equal(out[mask], y[mask]) and (out[~mask] != y[~mask]).all()
    # What lies in the hole is nobody's business, not even where it is no number.
    assert torch.equal(out, inpaint(f, torch.where(mask, y, torch.nan), mask, z, LEVELS, TIMES))


def test_what_is_kept_tells_the_rest_what_to_be() -> None:
    """Of a Gaussian with covariance C the consistency function is C^(1/2) (C + t^2)^(-1/2) x."""
    c = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(c)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        scale = (values / (values + t.unsqueeze(-1) ** 2)).sqrt()
        y: Tensor = ((x @ vectors) * scale) @ vectors.mT
        return y

    levels = Levels(0.002, 20.0)
    times = [20.0 * 0.75**k for k in range(24)]
    y = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(4000, 2)
    mask = torch.tensor([True, False])
    out = inpaint(exact, y, mask, normal(24, 4000, 2), levels, times)[:, 1]
    # Given x_1 = 1 the mean of x_2 is 0.9. The algorithm is no exact sampler of it, but goes most of the way.
    assert 0.65 < out.mean() < 0.95
    alone = inpaint(exact, y, mask, normal(1, 4000, 2), levels, times[:1])[:, 1]
    assert abs(alone.mean().item()) < 0.1, "in one step from pure noise nothing can be told"


def test_bounds_hold_for_what_is_made() -> None:
    y, z = normal(200, 2), normal(len(TIMES), 200, 2, seed=1)
    mask = torch.tensor([False, True])
    low, high = (torch.tensor(bounds, dtype=torch.float64) for bounds in ([-0.1, -1.0], [0.2, 1.0]))
    out = edit(f, y, mask, z, LEVELS, TIMES, low=low, high=high)
    assert out[:, 0].min() == -0.1 and out[:, 0].max() == 0.2 and torch.equal(out[:, 1], y[:, 1])
    assert edit(f, y, mask, z, LEVELS, TIMES, high=0.0)[:, 0].max() == 0.0


def test_levels_and_noise_that_cannot_be_are_refused() -> None:
    y, mask = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(ValueError, match="2 levels need as much noise, at least one, found 1"):
        edit(f, y, mask, torch.zeros(1, 2), LEVELS, (80.0, 2.0))
    with pytest.raises(ValueError, match="0 levels need as much noise"):
        edit(f, y, mask, torch.zeros(0, 2), LEVELS, ())
    with pytest.raises(ValueError, match=r"level 81.0 lies outside \[0.002, 80.0\]"):
        edit(f, y, mask, torch.zeros(1, 2), LEVELS, (81.0,))
    with pytest.raises(ValueError, match="patches of 3 don't fill an image of 8 x 8"):
        patch_coordinates(8, 8, 3)


@pytest.mark.parametrize(
    "coordinates", [colour_coordinates(6), patch_coordinates(4, 6, 2), patch_coordinates(4, 4, 2, channels=3)]
)
def test_coordinates_are_orthogonal_and_go_back(coordinates: Coordinates) -> None:
    r = coordinates.rotation
    torch.testing.assert_close(r @ r.mT, torch.eye(len(r), dtype=torch.float64))
    x = normal(7, coordinates.groups.numel())
    torch.testing.assert_close(coordinates.back(coordinates.of(x)), x)
    assert (r[0] > 0).all()


def test_a_coloured_image_is_as_bright_as_the_grey_one() -> None:
    grey, z = torch.rand(3, 16, dtype=torch.float64), normal(len(TIMES), 3, 48)
    colours = colourise(f, grey, z, LEVELS, TIMES).view(3, 16, 3)
    torch.testing.assert_close(colours @ torch.tensor(LUMA, dtype=torch.float64), grey)
    assert colours.std(-1).min() > 1e-3, "and it isn't grey any more"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_image_s_patches_have_the_small_one_s_values(channels: int) -> None:
    small = torch.rand(5, 2 * 3 * channels, dtype=torch.float64)
    z = normal(len(TIMES), 5, 4 * 6 * channels)
    large = super_resolve(f, small, z, LEVELS, TIMES, height=4, width=6, patch=2, channels=channels)
    means = large.view(5, 2, 2, 3, 2, channels).mean((2, 4))
    torch.testing.assert_close(means, small.view(5, 2, 3, channels))
    assert large.view(5, 2, 2, 3, 2, channels).std((2, 4)).min() > 1e-3


def test_a_stroke_shows_the_more_the_less_it_is_noised() -> None:
    drawing, z = torch.full((2000, 4), 0.5, dtype=torch.float64), normal(2, 2000, 4)

    def shrink(x: Tensor, t: Tensor) -> Tensor:
        return x / (1.0 + t.unsqueeze(-1) ** 2)

    torch.testing.assert_close(
        stroke(shrink, drawing, z[:1], LEVELS, (2.0,)), shrink(drawing + 2 * z[0], torch.tensor([2.0] * 2000))
    )
    near = stroke(shrink, drawing, z, LEVELS, (0.3, 0.1)).mean()
    far = stroke(shrink, drawing, z, LEVELS, (80.0, 0.1)).mean()
    assert near > 0.4 and abs(far) < 0.1


def test_slerp_by_hand_and_sample_by_sample() -> None:
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    half = torch.tensor(0.5, dtype=torch.float64)
    root = math.sqrt(0.5)
    expected = torch.tensor([[root, root], [2 * root, 2 * root], [3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(slerp(a, b, half), expected)
    third = slerp(a[:1], b[:1], torch.tensor(1 / 3, dtype=torch.float64))
    torch.testing.assert_close(third, torch.tensor([[math.cos(math.pi / 6), 0.5]], dtype=torch.float64))
    a, b = normal(100, 8), normal(100, 8, seed=1)
    assert torch.equal(slerp(a, b, half)[7], slerp(a[7], b[7], half))
    assert slerp(a, b, half).norm(dim=-1).mean().item() == pytest.approx(
        a.norm(dim=-1).mean().item(), rel=0.05
    )


def test_interpolation_begins_and_ends_at_the_samples() -> None:
    a, b = normal(3, 4), normal(3, 4, seed=1)
    weights = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    between = interpolate(f, a, b, weights, LEVELS)
    assert between.shape == (5, 3, 4)
    top = torch.full((3,), 80.0, dtype=torch.float64)
    torch.testing.assert_close(between[0], f(80.0 * a, top))
    torch.testing.assert_close(between[-1], f(80.0 * b, top))


def test_editing_is_differentiable() -> None:
    scale = torch.ones((), requires_grad=True)
    y, mask, z = torch.ones(3, 2), torch.tensor([False, True]), normal(2, 3, 2).float()
    out = inpaint(lambda x, t: scale * f(x, t), y, mask, z, LEVELS, (80.0, 1.0))
    (gradient,) = torch.autograd.grad(out.sum(), scale)
    assert gradient.abs() > 0
