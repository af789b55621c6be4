"""A policy outside of its modules: folded into a few products, and written for what isn't cpql.

`cpql.deploy.folded` says how, and is all that a policy needs to act without torch.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cpql.deploy.folded import FoldedActor, FoldedCritic, FoldedPolicy, Layer, Step, load
from cpql.errors import ConfigError, CpqlError
from cpql.io import aside
from cpql.networks import LayerNorm, Linear

if TYPE_CHECKING:
    from cpql.deploy.policy import Policy, PolicyConfig

__all__ = ["Exported", "export", "fold", "fold_critic", "fold_policy"]

SUFFIXES = {"onnx": "onnx", "torch": "pt2", "numpy": "npz"}
STATES = 10_000
LIMIT = 1e-4  # of an action in [-1, 1]: rounding makes 1e-6 or so, a wrong program far more

Arrays = dict[str, Any]
Run = Callable[[Arrays], Arrays]


@torch.no_grad()
def fold(policy: Policy) -> FoldedActor:
    """Fold a policy's actor into numpy arrays of float32. Its critic and candidates aren't part of it."""
    actor, config = policy.actor, policy.config
    linear = [layer for layer in actor.mlp.layers if isinstance(layer, Linear)]
    first = linear[0].weight.double().cpu()
    p, levels = actor.parameterisation, actor.levels
    times = p.times * config.actor.time_width
    x_part, time_part, state_part = torch.split(first, [config.action_dim, times, config.state_dim], -1)
    bias = linear[0].bias.double().cpu()
    state_part, bias = _unnormalised(state_part, bias, config)
    steps = []
    for k, level in enumerate((levels.t_max, *config.actor.refinements)):
        t = torch.tensor(level, dtype=torch.float64)
        embedding = actor.embed(*[p.c_time(t).float().to(policy.device)] * p.times).double().cpu()
        spread = level if k == 0 else math.sqrt(level**2 - levels.t_min**2)
        weight, offset = (p.c_in(t) * x_part).T, time_part @ embedding
        steps.append(Step(spread, float(p.c_skip(t)), float(p.c_out(t)), _array(weight), _array(offset)))
    low, high = (np.asarray(bound, np.float32) for bound in (config.action_low, config.action_high))
    return FoldedActor(
        state_weight=_array(state_part.T),
        state_bias=_array(bias),
        steps=tuple(steps),
        layers=tuple(Layer(_array(layer.weight.T), _array(layer.bias)) for layer in linear[1:]),
        low=low,
        span=high - low,
        inside=config.actor.clamp == "inside",
        tanh=config.actor.action_norm,
    )


@torch.no_grad()
def fold_critic(policy: Policy) -> FoldedCritic:
    """Fold a policy's critic likewise, for observations as the environment gives them."""
    config = policy.config
    states, actions, biases, rest = [], [], [], []
    for k in range(2):
        norm: tuple[Any, Any] | None = None
        layers: list[Layer] = []
        first, *others = policy.critic.q.layers
        assert isinstance(first, Linear)
        weight = first.weight[k].double().cpu()
        state_part, action_part = torch.split(weight, [config.state_dim, config.action_dim], -1)
        state_part, bias = _unnormalised(state_part, first.bias[k].double().cpu(), config)
        for layer in others:
            if isinstance(layer, LayerNorm):
                norm = _array(layer.weight[k]), _array(layer.bias[k])
            elif isinstance(layer, Linear):
                layers.append(Layer(_array(layer.weight[k].T), _array(layer.bias[k]), norm))
                norm = None
        states.append(_array(state_part.T))
        actions.append(_array(action_part.T))
        biases.append(_array(bias))
        rest.append(tuple(layers))
    return FoldedCritic(tuple(states), tuple(actions), tuple(biases), tuple(rest))


def _unnormalised(weight: Tensor, bias: Tensor, config: PolicyConfig) -> tuple[Tensor, Tensor]:
    """A first product's weight [H, S] and bias for observations that the policy's modules get normalised."""
    if config.observation_mean:
        mean, std = (torch.tensor(v).double() for v in (config.observation_mean, config.observation_std))
        weight = weight / std
        bias = bias - weight @ mean
    return weight, bias


def _array(tensor: Tensor) -> Any:
    return np.array(tensor.cpu().float().numpy(), order="C")


def fold_policy(policy: Policy) -> FoldedPolicy:
    """Fold a policy with the rule that it acts by at present: its candidates and their temperature."""
    alone = policy.candidates == 1
    return FoldedPolicy(
        fold(policy),
        None if alone else fold_critic(policy),
        policy.candidates,
        0.0 if alone else policy.temperature,
    )


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: of the file.
        description: what the file says of itself: its inputs and outputs with their shapes, the rule of
            acting, the bounds of actions, and the policy's provenance.
        states: on how many random states it was compared with PyTorch.
        difference: the largest one, as a share of half an action's range: of an action in [-1, 1].
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
    """Write a policy, with its rule of acting at present, as one file that acts without cpql.

    All arrays are float32, and the batch B is free. `observation` [B, S] is as the environment gives it,
    `action` [B, A] in the environment's bounds, `noise` standard normal (or zeros, the deterministic
    actor): [steps, B, A], with C candidates [steps, B, C, A]. Candidates and a temperature above 0 take
    `uniform` [B, C] too, in [0, 1) (or 0.5, which takes the best).

    Before the file is put in place, its actions on 10,000 random states (divided by the candidates) are
    compared with those of the policy's modules on the same noise. Where two candidates are worth the same to
    rounding, either is right.

    Args:
        policy: what to write.
        path: of the file, which is replaced where it exists; written whole or not at all.
        format: `onnx`; `torch`, a program for `torch.export.load`; `numpy`, arrays for
            `cpql.deploy.folded.load`, which needs numpy alone.
        noise: `inside` draws it in the program, which then has `noise` and `uniform` as further outputs.

    Raises:
        ConfigError: a format or a place of the noise that isn't there, or a package that isn't installed.
        CpqlError: the file doesn't act as the policy does.
    """
    if format not in WRITERS:
        raise ConfigError(f"format={format} does not exist: choose from {', '.join(WRITERS)}")
    if noise not in ("input", "inside"):
        raise ConfigError(f"noise={noise} does not exist: choose from input, inside")
    if format == "numpy" and noise == "inside":
        raise ConfigError("noise=inside: expected input with format=numpy, whose policy.draw draws it")
    path, folded = Path(path), fold_policy(policy)
    states = max(1, STATES // policy.candidates)
    random = np.random.default_rng(0)
    observation = random.standard_normal((states, policy.config.state_dim), np.float32)
    if policy.config.observation_mean:
        c = policy.config
        mean, std = (np.array(v, np.float32) for v in (c.observation_mean, c.observation_std))
        observation = observation * std + mean
    drawn = folded.draw(random, states)
    folded = replace(folded, description=_describe(policy, list(drawn), noise))
    with aside(path) as temporary:
        run = WRITERS[format](folded, temporary, noise == "inside")
        given = {"observation": observation} if noise == "inside" else {"observation": observation, **drawn}
        out = run(given)
        difference = _difference(policy, folded, {**given, **out})
        if not difference <= LIMIT:
            raise CpqlError(
                f"{path}: not written: its actions differ from PyTorch's by {difference:.1g} of half their "
                f"range, expected at most {LIMIT:g}"
            )
    return Exported(path, folded.description, states, difference)


def _describe(policy: Policy, drawn: list[str], noise: str) -> dict[str, Any]:
    config = policy.config
    candidates = [policy.candidates] if policy.candidates > 1 else []
    shapes: dict[str, list[int | str]] = {
        "noise": [policy.actor.steps, "batch", *candidates, config.action_dim],
        "uniform": ["batch", *candidates],
    }
    extra = {name: shapes[name] for name in drawn}
    return {
        "inputs": {"observation": ["batch", config.state_dim]} | (extra if noise == "input" else {}),
        "outputs": {"action": ["batch", config.action_dim]} | (extra if noise == "inside" else {}),
        "steps": policy.actor.steps,
        "candidates": policy.candidates,
        "temperature": policy.temperature if candidates else None,
        "action_low": list(config.action_low),
        "action_high": list(config.action_high),
        "task": config.task.name,
        "environment": config.task.id,
        "origin": config.origin,
    }


@torch.no_grad()
def _difference(policy: Policy, folded: FoldedPolicy, arrays: Arrays) -> float:
    """How far actions are from what the policy's modules make of the same observations and noise."""
    config = policy.config
    state, noise, action = (
        torch.from_numpy(arrays[name]).to(policy.device) for name in ("observation", "noise", "action")
    )
    low, span = (torch.from_numpy(v).to(policy.device) for v in (folded.actor.low, folded.actor.span))
    action = (action - low) / (0.5 * span) - 1.0
    if config.observation_mean:
        mean, std = (
            torch.tensor(v, device=policy.device) for v in (config.observation_mean, config.observation_std)
        )
        state = (state - mean) / std
    if policy.candidates == 1:
        return float((action - policy.actor.sample(state, noise=noise)).abs().max())
    state = state.unsqueeze(-2)
    candidates = policy.actor.sample(state.expand(-1, policy.candidates, -1), noise=noise)
    value = policy.critic(state, candidates).amin(0)
    if policy.temperature > 0:
        uniform = torch.from_numpy(arrays["uniform"]).to(policy.device).clamp(1e-20, 1 - 1e-7)
        value = value / policy.temperature - (-uniform.log()).log()
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
        shapes = self.folded.shapes(observation.shape[0])
        drawn = {"noise": torch.randn(shapes["noise"])}
        if "uniform" in shapes:
            drawn["uniform"] = torch.rand(shapes["uniform"])
        return self.folded(observation, **drawn, xp=torch), *drawn.values()


def _program(folded: FoldedPolicy, inside: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes: dict[str, tuple[int, ...]] = {"observation": (2, len(folded.actor.state_weight))}
    if not inside:
        shapes |= folded.shapes(2)
    with _quiet():
        return torch.export.export(
            _Program(folded, inside),
            tuple(torch.zeros(shape) for shape in shapes.values()),
            dynamic_shapes=tuple({1 if name == "noise" else 0: batch} for name in shapes),
        )


def _to_onnx(folded: FoldedPolicy, path: Path, inside: bool) -> Run:
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError("format=onnx needs packages: pip install 'cpql[export]'") from None
    drawn = list(folded.shapes())
    with _quiet():
        program = torch.onnx.export(
            _program(folded, inside),
            input_names=["observation", *([] if inside else drawn)],
            output_names=["action", *(drawn if inside else [])],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props["cpql"] = json.dumps(folded.description, allow_nan=False)
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(names, given), strict=True))


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
        out = module(*(torch.from_numpy(array) for array in given.values()))
        names = ("action", *(folded.shapes() if inside else ()))
        return {name: array.numpy() for name, array in zip(names, out if inside else [out], strict=True)}

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
    """Drop what the exporters say of their own parts and of torchvision, no news to who exports a policy."""
    talker = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talker.setLevel(level)
