"""Zero-shot editing: part of a sample is fixed, the consistency function generates the rest.

    y        the sample whose coordinates A y are fixed in part
    mask     True for the coordinates that keep their value, False for those that are generated

    x = A^-1 [A y where fixed, 0 elsewhere]
    for each level t:  x = f(x + noise of level t, t),  x = A^-1 [A y where fixed, A x elsewhere]

Source: Song et al. 2023 (Consistency Models), Algorithm 4, whose Omega is 1 where this mask is False. The
tasks differ only in A and the mask:

    inpainting          A = 1; the mask is everything but the hole. An action with one joint fixed is a case.
    colourisation       A rotates a pixel's channels so that the first is its brightness, which is fixed
    super-resolution    A rotates a patch's pixels so that the first is their mean, which is fixed
    stroke              nothing is fixed; the first noise is added to a drawing

Images are flat in the last axis, row by row, channels last: [*shape, H W C].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpql.consistency.function import Function, perturb
from cpql.consistency.levels import Levels

__all__ = [
    "LUMA",
    "Coordinates",
    "colour_coordinates",
    "colourise",
    "edit",
    "inpaint",
    "interpolate",
    "patch_coordinates",
    "slerp",
    "stroke",
    "super_resolve",
]

LUMA = (0.2989, 0.5870, 0.1140)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""


@dataclass(frozen=True)
class Coordinates:
    """An orthogonal change of coordinates of small groups of numbers, the same for every group: A.

    Attributes:
        rotation: orthogonal [G, G]; row i gives a group's coordinate i.
        groups: the place in the last axis of each group's numbers, [D / G, G].
    """

    rotation: Tensor
    groups: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Coordinates [*shape, D / G, G] of x [*shape, D]."""
        coordinates: Tensor = x[..., self.groups] @ self.rotation.mT.to(x)
        return coordinates

    def back(self, coordinates: Tensor) -> Tensor:
        """The inverse of `of`."""
        flat: Tensor = (coordinates @ self.rotation.to(coordinates)).flatten(-2)
        return flat[..., self.groups.flatten().argsort()]


def _rotation_onto(first: Tensor) -> Tensor:
    """An orthogonal matrix [G, G] whose first row points along `first` [G]."""
    basis = torch.eye(len(first), dtype=torch.float64)
    basis[:, 0] = first
    rotation: Tensor = torch.linalg.qr(basis).Q.mT
    return rotation * torch.sign(rotation[0] @ first)


def colour_coordinates(pixels: int, weights: Sequence[float] = LUMA) -> Coordinates:
    """Coordinates of each pixel's channels, the first along `weights`: its brightness.

    Args:
        pixels: H W.
        weights: of the channels in the brightness, [C].
    """
    channels = len(weights)
    groups = torch.arange(pixels * channels).view(pixels, channels)
    return Coordinates(_rotation_onto(torch.tensor(weights, dtype=torch.float64)), groups)


def patch_coordinates(height: int, width: int, patch: int, channels: int = 1) -> Coordinates:
    """Coordinates of each channel of each square patch, the first its mean times `patch`.

    Raises:
        ValueError: the image isn't a whole number of patches.
    """
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} don't fill an image of {height} x {width}")
    places = torch.arange(height * width * channels)
    grid = places.view(height // patch, patch, width // patch, patch, channels)
    groups = grid.permute(0, 2, 4, 1, 3).reshape(-1, patch * patch)
    return Coordinates(_rotation_onto(torch.ones(patch * patch, dtype=torch.float64)), groups)


def edit(
    f: Function,
    y: Tensor,
    mask: Tensor,
    z: Tensor,
    levels: Levels,
    times: Sequence[float],
    *,
    coordinates: Coordinates | None = None,
    start: Tensor | None = None,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    tanh: bool = False,
) -> Tensor:
    """Fix a part of y and generate the rest, differentiable from end to end.

    Args:
        f: consistency function on [*shape, D], [*shape].
        y: [*shape, D]; its values where the mask is False are ignored.
        mask: True where y is fixed, bool, broadcastable to the coordinates' shape: [*shape, D], or
            [*shape, D / G, G] with `coordinates`.
        z: standard normal noise [len(times), *shape, D].
        levels: gives t_min and t_max.
        times: noise levels, descending, within [t_min, t_max]. The fixed part conditions the rest at every
            level after the first, so several levels are better than one.
        coordinates: A; the identity by default.
        start: [*shape, D], what the first noise is added to, by default the fixed part with zeros elsewhere.
        low: lower bound of everything that is generated, at every level.
        high: its upper bound.
        tanh: see `perturb`.

    Returns:
        Samples [*shape, D]. Where the mask is True their coordinates are y's: exactly, where A is the
        identity.

    Raises:
        ValueError: not as many noises as levels, or a level out of range.
    """
    if len(z) != len(times) or not len(times):
        raise ValueError(f"{len(times)} levels need as much noise, at least one, found {len(z)}")
    for t in times:
        if not levels.t_min <= t <= levels.t_max:
            raise ValueError(f"level {t} lies outside [{levels.t_min}, {levels.t_max}]")

    def of(x: Tensor) -> Tensor:
        return x if coordinates is None else coordinates.of(x)

    def back(x: Tensor) -> Tensor:
        return x if coordinates is None else coordinates.back(x)

    given = of(y)
    x = back(torch.where(mask, given, 0.0)) if start is None else start
    for i, t in enumerate(times):
        spread = t if i == 0 else math.sqrt(t**2 - levels.t_min**2)
        full = torch.full(y.shape[:-1], t, dtype=y.dtype, device=y.device)
        x = f(perturb(x, torch.full_like(full, spread), z[i], tanh=tanh), full)
        if low is not None:
            x = torch.maximum(x, torch.as_tensor(low).to(x))
        if high is not None:
            x = torch.minimum(x, torch.as_tensor(high).to(x))
        x = back(torch.where(mask, given, of(x)))
    return x


def inpaint(
    f: Function, y: Tensor, mask: Tensor, z: Tensor, levels: Levels, times: Sequence[float]
) -> Tensor:
    """Fill the hole where the mask [*shape, D] is False; see `edit`."""
    return edit(f, y, mask, z, levels, times)


def colourise(
    f: Function,
    brightness: Tensor,
    z: Tensor,
    levels: Levels,
    times: Sequence[float],
    weights: Sequence[float] = LUMA,
) -> Tensor:
    """Colour a grey image, [*shape, H W] to [*shape, H W C], keeping the brightness of each pixel.

    Args:
        f, z, levels, times: see `edit`.
        brightness: `sum of weights x channels` of each pixel.
        weights: of the C channels in the brightness.
    """
    coordinates = colour_coordinates(brightness.shape[-1], weights)
    along = torch.tensor(weights, dtype=brightness.dtype, device=brightness.device)
    # The point nearest the origin of all that are this bright: it has no other coordinate.
    y = (brightness.unsqueeze(-1) * along / along.square().sum()).flatten(-2)
    mask = torch.arange(len(weights), device=y.device) == 0
    return edit(f, y, mask, z, levels, times, coordinates=coordinates)


def super_resolve(
    f: Function,
    small: Tensor,
    z: Tensor,
    levels: Levels,
    times: Sequence[float],
    *,
    height: int,
    width: int,
    patch: int,
    channels: int = 1,
) -> Tensor:
    """Generate an image [*shape, H W C] whose patches have the means in `small` [*shape, H W C / patch^2].

    Args:
        f, z, levels, times: see `edit`.
        small: the image in low resolution, row by row.
        height: H, of the result.
        width: W.
        patch: side of the square that one pixel of `small` becomes.
        channels: C.
    """
    coordinates = patch_coordinates(height, width, patch, channels)
    # Groups go by rows and columns of patches, and then by channels, as the small image's numbers do.
    y = small.unsqueeze(-1).expand(*small.shape, patch * patch).flatten(-2)
    y = y[..., coordinates.groups.flatten().argsort()]
    mask = torch.arange(patch * patch, device=y.device) == 0
    return edit(f, y, mask, z, levels, times, coordinates=coordinates)


def stroke(f: Function, drawing: Tensor, z: Tensor, levels: Levels, times: Sequence[float]) -> Tensor:
    """Generate a sample that resembles a drawing [*shape, D]: the lower the first level, the closer."""
    mask = torch.zeros((), dtype=torch.bool, device=drawing.device)
    return edit(f, drawing, mask, z, levels, times, start=drawing)


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Interpolate on a great circle between a and b [*shape, D], separately for each sample.

    `sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b` (Shoemake 1985), and linearly where the
    two nearly agree. Unlike a linear interpolation of normal noise it keeps the norm of normal noise.

    Args:
        a: noise.
        b: noise.
        weight: 0 gives a, 1 gives b; broadcastable to [*shape, 1].
    """
    cosine = torch.cosine_similarity(a, b, -1).clamp(-1.0, 1.0).unsqueeze(-1)
    angle = torch.arccos(cosine)
    near = angle < 1e-4
    sine = torch.where(near, 1.0, angle.sin())
    first = torch.where(near, 1.0 - weight, torch.sin((1.0 - weight) * angle) / sine)
    second = torch.where(near, weight, torch.sin(weight * angle) / sine)
    return first * a + second * b


def interpolate(f: Function, a: Tensor, b: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """One-step samples between the sample of noise a and the sample of noise b.

    Args:
        f: see `edit`.
        a: standard normal noise [*shape, D].
        b: the same.
        weights: [K], 0 is a's sample and 1 is b's.
        levels: gives t_max.

    Returns:
        [K, *shape, D].
    """
    z = slerp(a, b, weights.view(-1, *(1,) * a.ndim))
    t = torch.full(z.shape[:-1], levels.t_max, dtype=z.dtype, device=z.device)
    return f(perturb(torch.zeros_like(z), t, z), t)
