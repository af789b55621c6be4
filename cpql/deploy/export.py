"""A policy as one file for other programs: ONNX, a torch program, or numpy arrays.

What is written is the folded policy, see `cpql.deploy.folded`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cpql.deploy.folded import FoldedPolicy, load
from cpql.deploy.policy import Policy
from cpql.errors import ConfigError, CpqlError
from cpql.io import aside

__all__ = ["Exported", "export"]

SUFFIXES = {"onnx": "onnx", "torch": "pt2", "numpy": "npz"}
STATES = 10_000
LIMIT = 1e-4  # of an action in [-1, 1]: rounding makes 1e-6 or so, a wrong program far more

Arrays = dict[str, Any]
Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: of the file.
        description: metadata in the file: its inputs and outputs with their shapes, the rule of acting, the
            bounds of actions, and the policy's provenance.
        states: on how many random states it was compared with PyTorch.
        difference: the largest, of actions scaled to [-1, 1].
    """

    path: Path
    description: dict[str, Any]
    states: int
    difference: float


def export(
    policy: Policy,
    path: str | Path,
    format: Literal["onnx", "torch", "numpy"] = "onnx",
    noise: Literal["input", "inside"] = "input",
) -> Exported:
    """Write a policy, with its present rule of acting, as one file that acts without cpql.

    All arrays are float32, and the batch size B is free. `observation` [B, S] is as the environment gives it,
    `action` [B, A] in the environment's bounds, `noise` standard normal (or zeros, for a deterministic
    action): [draws, B, A], with C candidates [draws, B, C, A]. Candidates and a temperature above 0 take
    `uniform` [B, C] in [0, 1) too (or 0.5, which takes the best). A deterministic actor has neither.

    Before the file is put in place, its actions on 10,000 random states (divided by the candidates) are
    compared with those of the policy's modules on the same noise. Where two candidates have the same value up
    to rounding, either is right.

    Args:
        policy: what to write.
        path: of the file, which is replaced if it exists; written whole or not at all.
        format: `onnx`; `torch`, for `torch.export.load`; `numpy`, for `cpql.deploy.folded.load`.
        noise: `inside` draws the noise in the program, which returns `noise` and `uniform` too.

    Raises:
        ConfigError: there is no such format or place of the noise, or a package isn't installed.
        CpqlError: the file doesn't act as the policy does.
    """
    if format not in WRITERS:
        raise ConfigError(f"format={format} does not exist: choose from {', '.join(WRITERS)}")
    if noise not in ("input", "inside"):
        raise ConfigError(f"noise={noise} does not exist: choose from input, inside")
    if format == "numpy" and noise == "inside":
        raise ConfigError("noise=inside: expected input with format=numpy, whose policy.draw draws it")
    path, inside = Path(path), noise == "inside"
    folded = policy.folded.with_rule(policy.candidates, policy.temperature)
    config, head = policy.config, folded.head
    noise_shapes = {name: list(shape) for name, shape in folded.shapes("batch").items()}
    head["description"] = {
        "inputs": {"observation": ["batch", config.state_dim], **({} if inside else noise_shapes)},
        "outputs": {"action": ["batch", config.action_dim], **(noise_shapes if inside else {})},
        "steps": policy.actor.steps,
        "candidates": head["candidates"],
        "temperature": head["temperature"] if head["candidates"] > 1 else None,
        "action_low": list(config.action_low),
        "action_high": list(config.action_high),
        "task": config.task.name,
        "environment": config.task.id,
        "origin": config.origin,
    }
    states = STATES // head["candidates"]
    random = np.random.default_rng(0)
    observation = random.standard_normal((states, policy.config.state_dim), np.float32)
    if policy.config.observation_mean:
        observation *= np.array(policy.config.observation_std, np.float32)
        observation += np.array(policy.config.observation_mean, np.float32)
    given = {"observation": observation, **({} if inside else folded.draw(random, states))}
    with aside(path) as temporary:
        run = WRITERS[format](folded, temporary, inside)
        difference = _difference(policy, folded, {**given, **run(given)})
        if not difference <= LIMIT:
            raise CpqlError(
                f"{path}: not written: its actions differ from PyTorch's by {difference:.1g} of half their "
                f"range, expected at most {LIMIT:g}"
            )
    return Exported(path, folded.description, states, difference)


@torch.no_grad()
def _difference(policy: Policy, folded: FoldedPolicy, arrays: Arrays) -> float:
    """How far actions are from those of the policy's modules for the same observations and noise."""
    given = {name: torch.from_numpy(array).to(policy.device) for name, array in arrays.items()}
    bounds = (folded.arrays[name] for name in ("actor.low", "actor.span"))
    low, span = (torch.from_numpy(bound).to(policy.device) for bound in bounds)
    action = (given["action"] - low) / (0.5 * span) - 1.0
    state = policy.normalise(given["observation"])
    count = folded.head["candidates"]
    if count == 1:
        return float((action - policy.actor.sample(state, noise=given.get("noise"))).abs().max())
    assert policy.critic is not None
    state = state.unsqueeze(-2)
    candidates = policy.actor.sample(state.expand(-1, count, -1), noise=given["noise"])
    value = policy.critic(state, candidates).amin(0)
    if "uniform" in given:
        value = value / folded.head["temperature"] - (-given["uniform"].clamp(1e-20, 1 - 1e-7).log()).log()
    best = value >= value.amax(-1, keepdim=True) - 1e-5 * value.abs().max()
    distance = (action.unsqueeze(-2) - candidates).abs().amax(-1)
    return float(torch.where(best, distance, torch.inf).amin(-1).max())


class _Program(nn.Module):
    """A folded policy as a module, which is what torch exports."""

    def __init__(self, folded: FoldedPolicy, inside: bool) -> None:
        super().__init__()
        self.folded, self.inside = folded.to("cpu"), inside

    def forward(self, observation: Tensor, noise: Any = None, uniform: Any = None) -> Any:
        if not self.inside:
            return self.folded(observation, noise, uniform, torch)
        draw = {"noise": torch.randn, "uniform": torch.rand}
        drawn = {name: draw[name](s) for name, s in self.folded.shapes(observation.shape[0]).items()}
        return self.folded(observation, **drawn, xp=torch), *drawn.values()


def _program(folded: FoldedPolicy, inside: bool) -> torch.export.ExportedProgram:
    observation = {"observation": (2, len(folded.arrays["actor.state_weight"]))}
    shapes = observation | ({} if inside else folded.shapes(2))
    batch = torch.export.Dim("batch")
    with _quiet():
        return torch.export.export(
            _Program(folded, inside),
            tuple(map(torch.zeros, shapes.values())),
            dynamic_shapes=tuple({1 if name == "noise" else 0: batch} for name in shapes),
        )


def _to_onnx(folded: FoldedPolicy, path: Path, inside: bool) -> Run:
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError("format=onnx needs packages: pip install 'cpql[export]'") from None
    inputs, outputs = (list(folded.description[way]) for way in ("inputs", "outputs"))
    with _quiet():
        program = torch.onnx.export(
            _program(folded, inside), input_names=inputs, output_names=outputs, dynamo=True, verbose=False
        )
    assert program is not None
    program.model.metadata_props["cpql"] = json.dumps(folded.description, allow_nan=False)
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(path)
    return lambda given: dict(zip(outputs, session.run(outputs, given), strict=True))


def _to_torch(folded: FoldedPolicy, path: Path, inside: bool) -> Run:
    program = _program(folded, inside)
    program.example_inputs = None  # torch.export.save would pickle them
    text = json.dumps(folded.description, allow_nan=False)
    with open(path, "wb") as file, _quiet():
        torch.export.save(program, file, extra_files={"cpql.json": text})
    with open(path, "rb") as written:
        module = torch.export.load(written).module()

    @torch.no_grad()
    def run(given: Arrays) -> Arrays:
        out = module(*map(torch.from_numpy, given.values()))
        arrays = [tensor.numpy() for tensor in (out if inside else [out])]
        return dict(zip(folded.description["outputs"], arrays, strict=True))

    return run


def _to_numpy(folded: FoldedPolicy, path: Path, _: bool) -> Run:
    folded.save(path)
    loaded = load(path)
    return lambda given: {"action": loaded(**given)}


WRITERS: dict[str, Callable[[FoldedPolicy, Path, bool], Run]] = {
    "onnx": _to_onnx,
    "torch": _to_torch,
    "numpy": _to_numpy,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' warnings about their own parts and about torchvision, which concern no user."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
