"""A consistency model of handwritten digits, 8 x 8 pixels, and what can be made of it without training again.

    python examples/digits.py --out digits            a few minutes on a CPU; needs 'cpql[examples]'

Writes samples.png, inpainting.png, super_resolution.png, interpolation.png and scores.json. No state, no
reward: `cpql.consistency` on pixels.
"""

from __future__ import annotations

import argparse
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpql.consistency import (
    Function,
    Levels,
    Parameterisation,
    consistency_function,
    ect,
    inpaint,
    interpolate,
    sample,
    super_resolve,
)
from cpql.networks import MLP, TimeEmbedding

SIDE, PIXELS = 8, 64
LEVELS = Levels(t_max=20.0)
REFINEMENTS = (1.5, 0.5)
EDITING = (20.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
BATCH, RATE, AVERAGE = 256, 1e-3, 0.002


class Network(nn.Module):
    """F(x, time) on flat images."""

    def __init__(self) -> None:
        super().__init__()
        self.time = TimeEmbedding(32)
        self.mlp = MLP(PIXELS + 32, (512, 512, 512), PIXELS)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map [B, 64] and [B] to [B, 64]."""
        y: Tensor = self.mlp(torch.cat([x, self.time(time)], -1))
        return y


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 64] in [-1, 1] and labels [N]: 1500 for training, 297 for testing."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError:
        raise SystemExit("the digits come with scikit-learn: pip install 'cpql[examples]'") from None
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 8.0 - 1.0, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def train(images: Tensor, updates: int, seed: int = 0) -> Function:
    """Easy consistency tuning from scratch; the function of the averaged weights."""
    torch.manual_seed(seed)
    network, parameterisation = Network(), Parameterisation("edm", sigma_data=float(images.std()))
    average = deepcopy(network).requires_grad_(False)
    f = consistency_function(network, parameterisation)
    optimiser = torch.optim.Adam(network.parameters(), lr=RATE)
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * update / updates))
        x = images[torch.randint(len(images), (BATCH,))]
        z, u, progress = torch.randn_like(x), torch.rand(BATCH), torch.tensor(update / updates)
        loss, _ = ect(f, f, x, z, u, progress, LEVELS)
        optimiser.zero_grad()
        loss.mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, AVERAGE)
        if update % 1000 == 999:
            print(f"{update + 1:,} of {updates:,} updates, loss {loss.mean().item():.3f}", flush=True)
    return consistency_function(average, parameterisation)


def show(path: Path, rows: list[Tensor], names: list[str]) -> None:
    """Rows of images [K, 64], each with its name before it."""
    from matplotlib.figure import Figure

    columns = len(rows[0])
    figure = Figure(figsize=(0.62 * columns + 1.2, 0.66 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, images, name in zip(axes, rows, names, strict=True):
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image.view(SIDE, SIDE).numpy(), cmap="gray_r", vmin=-1, vmax=1)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("0.85")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)


def nearest(images: Tensor, real: Tensor) -> float:
    """Mean distance of images to the nearest real ones."""
    return torch.cdist(images, real).amin(-1).mean().item()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, edit, draw and score; returns what scores.json holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    images, labels, test, test_labels = load()
    f = train(images, options.updates, options.seed)
    random = torch.Generator().manual_seed(options.seed + 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    with torch.no_grad():
        by_steps = {
            steps: sample(f, noise(steps, 1000, PIXELS), LEVELS, REFINEMENTS[: steps - 1], clamp=1.0)
            for steps in (1, 2, 3)
        }
        hole = torch.arange(PIXELS) >= PIXELS // 2
        filled = inpaint(f, test, ~hole, noise(len(EDITING), len(test), PIXELS), LEVELS, EDITING)
        pasted = torch.where(hole, by_steps[3][: len(test)], test)
        small = test.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1)
        z = noise(len(EDITING), len(test), PIXELS)
        large = super_resolve(f, small, z, LEVELS, EDITING, height=SIDE, width=SIDE, patch=2)
        ends = noise(2, 5, PIXELS)
        between = interpolate(f, ends[0], ends[1], torch.linspace(0, 1, 12), LEVELS).clamp(-1, 1)

    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    judge = LogisticRegression(max_iter=2000).fit(images, labels)

    def read(x: Tensor) -> float:
        return float(judge.score(x, test_labels))

    coarse = small.view(-1, 4, 1, 4, 1).expand(-1, 4, 2, 4, 2).reshape(-1, PIXELS)
    scores = {
        "updates": options.updates,
        "distance_to_the_nearest_digit": {
            "held-out digits": nearest(test, images),
            **{f"samples, {steps} steps": nearest(x, images) for steps, x in by_steps.items()},
            "noise of the pixels' means and deviations": nearest(
                (images.mean(0) + images.std(0) * noise(1000, PIXELS)).clamp(-1, 1), images
            ),
        },
        "inpainting": {
            "error_of_known_pixels": (filled - test)[:, ~hole].abs().max().item(),
            "hole_to_the_truth": (filled - test)[:, hole].norm(dim=-1).mean().item(),
            "hole_to_the_truth_pasted": (pasted - test)[:, hole].norm(dim=-1).mean().item(),
            "distance_to_the_nearest_digit": nearest(filled, images),
            "distance_to_the_nearest_digit_pasted": nearest(pasted, images),
            "read_right": read(filled),
            "read_right_pasted": read(pasted),
            "read_right_truth": read(test),
        },
        "super_resolution": {
            "error_of_known_means": (large.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1) - small)
            .abs()
            .max()
            .item(),
            "to_the_truth": (large - test).norm(dim=-1).mean().item(),
            "to_the_truth_coarse": (coarse - test).norm(dim=-1).mean().item(),
            "distance_to_the_nearest_digit": nearest(large, images),
            "distance_to_the_nearest_digit_coarse": nearest(coarse, images),
            "read_right": read(large),
        },
    }
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    grid = [x[:16] for x in (*by_steps.values(), images)]
    show(out / "samples.png", grid, ["1 step", "2 steps", "3 steps", "real"])
    given = torch.where(hole, -1.0, test)
    show(
        out / "inpainting.png",
        [x[:16] for x in (given, filled, pasted, test)],
        ["given", "filled in", "pasted in", "truth"],
    )
    show(
        out / "super_resolution.png",
        [x[:16] for x in (coarse, large, test)],
        ["given", "made of it", "truth"],
    )
    show(out / "interpolation.png", list(between.unbind(1)), [""] * between.shape[1])
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))
    return scores


if __name__ == "__main__":
    main()
