"""A policy as a few matrix products: all that acting takes, in numpy alone or in torch.

    policy = load("policy.npz")                              # written by `scripts/export.py format=numpy`
    action = policy(observation, **policy.draw(np.random.default_rng()))

This file imports only numpy and the standard library, so it can be copied to where neither torch nor cpql is
installed.

At a fixed noise level the time embedding is a constant, which folds into the first layer's bias; c_in and the
normalisation of observations fold into its weights. An action of a consistency actor is then

    h = observation W_s + b                                        once
    y = c_skip x + c_out MLP(x W_x + h + b_t)                      for each sampling level t, x noised to t
    action = low + (clip(y, -1, 1) + 1) / 2 (high - low)

and the next x is y with noise. A flow takes steps of the same form without more noise, a diffusion's next x
is a mixture of x and y with noise, and an actor without noise has y = tanh(MLP(h)). In the critics, too, the
state's part of the first layer is computed once for all candidates. Noise is an input, so that actions are
the same everywhere.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
import zipfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

__all__ = ["FoldedPolicy", "load"]

FORMAT = 3  # 1 and 2 had fewer actors and activations, and LayerNorm before activations only
# Limits of `load`: a file may come from a stranger, and it states its own sizes.
MOST_DIRECTORY_BYTES, MOST_HEAD_BYTES, MOST_CANDIDATES = 1 << 20, 4 << 20, 10_000
NAMES = re.compile(
    r"actor\.(low|span|state_bias|state_weight)|critic\.[01]\.(bias|action_weight|state_weight)"
    r"|(actor\.steps|(actor|critic\.[01])\.layers)\.\d+\.(norm_)?(bias|weight)",
    re.ASCII,
)
LARGEST = 1e10  # of a weight: products of much larger ones overflow float32, which ends at 3e38


@dataclass(frozen=True)
class FoldedPolicy:
    """A whole policy: the actor alone, or one of several of its actions, chosen by value.

    Attributes:
        arrays: by name, numpy arrays or tensors, of float32; weights are [in, out].
            `actor.state_weight` [S, H] and `actor.state_bias` [H] are the first layer for observations as the
            environment gives them, `actor.steps.K.weight` [A, H] and `.bias` [H] its part for x and t at
            sampling step K. `actor.layers.K.weight` and `.bias` are the later layers, each
            `activation(norm(y)) weight + bias`, with `.norm_weight` and `.norm_bias` if it has a LayerNorm.
            `actor.low` [A] are the lower bounds of actions, `actor.span` [A] the upper minus the lower ones.
            `critic.K.state_weight`, `.action_weight` [A, H], `.bias` and `.layers` are the twin critics.
        head: everything else. `steps` lists spread (the standard deviation of the noise), c_skip and c_out of
            each sampling step, where x and y are mixed for the next one also the weights of both (else 0 and
            1), and is empty for an actor without noise. The first `draws` steps take a noise of their own.
            `inside` clamps after every step, not only after the last. `norm_after` puts the critics'
            LayerNorm after the activation, with an epsilon of 1e-6, not 1e-5. `tanh` adds the noise before a
            tanh, see `cpql.consistency.perturb`. `activations` of `actor` and `critic` are `mish`, `relu` or
            `gelu`. With more than 1 of `candidates`, one is chosen with probability softmax(min(Q1, Q2) /
            `temperature`), or the best for temperature 0. `description` is metadata on the policy's origin.
    """

    arrays: dict[str, Any]
    head: dict[str, Any]

    @property
    def description(self) -> dict[str, Any]:
        """Metadata on the policy's origin."""
        return dict(self.head["description"])

    def with_rule(self, candidates: int, temperature: float) -> FoldedPolicy:
        """The same policy acting by another rule; without a critic it is always the actor alone."""
        if candidates > 1 and "critic.0.bias" in self.arrays:
            rule = {"candidates": candidates, "temperature": temperature}
            return FoldedPolicy(self.arrays, self.head | rule)
        arrays = {name: array for name, array in self.arrays.items() if name.startswith("actor.")}
        return FoldedPolicy(arrays, self.head | {"candidates": 1, "temperature": 0.0})

    def shapes(self, *batch: Any) -> dict[str, tuple[Any, ...]]:
        """Shapes of the arguments besides observations [*batch, S], by name.

        `noise` is standard normal, [draws, *batch, A], or [draws, *batch, C, A] with C candidates; an actor
        without noise has none. Candidates and a temperature take `uniform`, in [0, 1), [*batch, C].
        """
        draws, candidates = self.head["draws"], self.head["candidates"]
        rows = (*batch, candidates) if candidates > 1 else batch
        noise = {"noise": (draws, *rows, len(self.arrays["actor.low"]))} if draws else {}
        return noise | ({"uniform": rows} if candidates > 1 and self.head["temperature"] > 0 else {})

    def draw(self, generator: np.random.Generator, *batch: int) -> dict[str, Any]:
        """Draw these arguments as numpy arrays of float32."""
        return {
            name: (generator.random if name == "uniform" else generator.standard_normal)(shape, np.float32)
            for name, shape in self.shapes(*batch).items()
        }

    def __call__(self, observation: Any, noise: Any = None, uniform: Any = None, xp: ModuleType = np) -> Any:
        """Act: actions [..., A] in the environment's bounds, in numpy, or torch where the arrays are tensors.

        Args:
            observation: [..., S], as the environment gives it.
            noise: as `draw` gives it, or broadcastable to it; zeros for a deterministic action.
            uniform: as `draw` gives it; 0.5 everywhere takes the best.
            xp: numpy or torch.
        """
        if self.head["candidates"] == 1:
            return self.scale(self.sample(observation, noise, xp))
        rows = observation[..., None, :]
        actions = self.sample(rows, noise, xp)
        value = xp.minimum(*(self.value(rows, actions, k, xp) for k in range(2)))
        if self.head["temperature"] > 0:  # adding Gumbel noise and taking the maximum draws from the softmax
            gumbel = -xp.log(-xp.log(uniform.clip(1e-20, 1 - 1e-7)))
            value = value * (1 / self.head["temperature"]) + gumbel
        best = value.argmax(-1)[..., None, None]
        if xp is np:
            action = np.take_along_axis(actions, best, -2)
        else:
            action = actions.gather(-2, best.expand(*actions.shape[:-2], 1, actions.shape[-1]))
        return self.scale(action[..., 0, :])

    def sample(self, observation: Any, noise: Any = None, xp: ModuleType = np) -> Any:
        """Draw actions [..., A] in [-1, 1] from the actor alone."""
        steps = range(len(self.head["steps"]))
        x = self._unbounded(observation, noise, xp, steps)
        return x.clip(-1.0, 1.0) if steps else xp.tanh(x)

    def _unbounded(self, observation: Any, noise: Any, xp: ModuleType, steps: range) -> Any:
        """The result of these steps, before the last clamp (or the tanh)."""
        shared = observation @ self.arrays["actor.state_weight"] + self.arrays["actor.state_bias"]
        if not steps:
            return self._mlp(shared, "actor", xp)
        x: Any = None
        y: Any = None
        for k in steps:
            spread, c_skip, c_out, *mixed = self.head["steps"][k]
            if self.head["inside"] and y is not None:
                y = y.clip(-1.0, 1.0)
            if mixed and y is not None:
                y = mixed[0] * x + mixed[1] * y
            if k < self.head["draws"]:
                z = spread * noise[k]
            else:
                z = 0.0 if y is not None else noise[0]  # the latter in `check`, which tries steps alone
            if self.head["tanh"]:
                x = xp.tanh(z if y is None else xp.arctanh(y.clip(-0.999, 0.999)) + z)
            else:
                x = z if y is None else y + z
            own = shared + self.arrays[f"actor.steps.{k}.bias"]
            y = c_skip * x + c_out * self._mlp(x @ self.arrays[f"actor.steps.{k}.weight"] + own, "actor", xp)
        return y

    def value(self, observation: Any, action: Any, k: int, xp: ModuleType = np) -> Any:
        """The values [..., C] of critic `k` for observations [..., 1, S] and actions [..., C, A]."""
        name = f"critic.{k}"
        shared = observation @ self.arrays[f"{name}.state_weight"] + self.arrays[f"{name}.bias"]
        return self._mlp(action @ self.arrays[f"{name}.action_weight"] + shared, name, xp)[..., 0]

    def _mlp(self, first: Any, network: str, xp: ModuleType) -> Any:
        """The later layers of a network, applied to the first one's output."""
        activation = ACTIVATIONS[self.head["activations"][network.partition(".")[0]]]
        after = self.head["norm_after"]
        rows = first if xp is np else first.reshape(-1, first.shape[-1])
        for k in itertools.count():
            name = f"{network}.layers.{k}"
            if f"{name}.weight" not in self.arrays:
                break
            norm = self.arrays.get(f"{name}.norm_weight")
            if after:
                rows = activation(rows, xp)
            if norm is not None:
                rows = _layer_norm(rows, norm, self.arrays[f"{name}.norm_bias"], 1e-6 if after else 1e-5, xp)
            if not after:
                rows = activation(rows, xp)
            weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
            rows = rows @ weight + bias if xp is np else xp.addmm(bias, rows, weight)
        return rows.reshape(*first.shape[:-1], rows.shape[-1])

    def scale(self, action: Any) -> Any:
        """Map actions in [-1, 1] to the environment's bounds."""
        return self.arrays["actor.low"] + (action + 1.0) * (0.5 * self.arrays["actor.span"])

    def to(self, device: Any) -> FoldedPolicy:
        """The same with tensors on a torch device in place of numpy arrays."""
        import torch

        arrays = {name: torch.tensor(array, device=device) for name, array in self.arrays.items()}
        return FoldedPolicy(arrays, self.head)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the policy, with numpy arrays, as an NPZ file that `load` reads."""
        head = np.array(json.dumps({"format": FORMAT, **self.head}, allow_nan=False))
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, head=head, **self.arrays)

    def check(self) -> None:
        """Act for a few random observations, in numpy; ValueError or KeyError if arrays don't fit together.

        Actions mustn't overflow where observations and noise are ten times the usual size.
        """
        # For so few rows BLAS starts no second thread, which would take longer.
        random, steps = np.random.default_rng(0), range(len(self.head["steps"]))
        states, width = len(self.arrays["actor.state_weight"]), len(self.arrays["actor.low"])
        observation = 10.0 * random.standard_normal((4, states), np.float32)
        noise = 10.0 * random.standard_normal((self.head["draws"], 4, width), np.float32)
        with np.errstate(all="ignore"):
            few = self.with_rule(min(self.head["candidates"], 2), 0.0)
            if few(observation, **few.draw(random, 4)).shape != (4, width):
                raise ValueError(f"expected actions of {width} numbers, as there are bounds, found others")
            # Each step by itself too: a clamp between steps would hide an infinity.
            for part in (steps, *(steps[k : k + 1] for k in steps)):
                if not np.isfinite(self._unbounded(observation, noise, np, part)).all():
                    raise ValueError("expected finite actions, found products that overflow")
        if not (self.arrays["actor.span"] > 0).all():
            raise ValueError("actor.span: expected upper bounds above the lower ones")


def load(path: str | PathLike[str]) -> FoldedPolicy:
    """Read a policy from an NPZ file, which may come from a stranger.

    Nothing is unpickled or decompressed, and no more is read than the file is long. The content is checked:
    that arrays fit together, and that actions are finite numbers.

    Raises:
        ValueError: the file is damaged, or `FoldedPolicy.save` didn't write it.
        OSError: there is no such file, or it can't be read.
    """
    with open(path, "rb") as file:
        try:
            arrays = _read(file)
            policy = FoldedPolicy(arrays, _head(arrays.pop("head")))
            policy.check()
            return policy
        except Exception as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            reason = " ".join(reason.split())[:500]
            raise ValueError(f"{Path(path)}: not an exported policy: {reason}") from error


def _read(file: BinaryIO) -> dict[str, Any]:
    """The arrays of an NPZ file by name."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 42))
    # The end record, and the bytes before it, which in ZIP64 point to a longer record.
    before, signature, directory, comment = struct.unpack("<4s16x4s8xL4xH", file.read())
    if signature != b"PK\5\6" or before == b"PK\6\7" or comment or directory > MOST_DIRECTORY_BYTES:
        raise ValueError("expected a ZIP file as numpy writes it")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        entries = archive.zip.infolist()
        sizes = [each.file_size for each in entries if each.compress_type == zipfile.ZIP_STORED]
        if not len(set(archive.files)) == len(entries) == len(sizes) or sum(sizes) > size:
            raise ValueError("expected arrays that are stored uncompressed, each once")
        arrays = {name: archive[name] for name in archive.files}
    for name, array in arrays.items():
        if name == "head" and array.dtype.kind == "U" and array.nbytes <= MOST_HEAD_BYTES:
            continue
        axes = 2 if name.endswith("weight") and not name.endswith("norm_weight") else 1
        if array.dtype != "<f4" or not (np.abs(array) <= LARGEST).all():
            raise ValueError(f"{name[:100]}: expected finite float32 of at most {LARGEST:g}, found others")
        if array.ndim != axes or not array.size:
            raise ValueError(f"{name[:100]}: expected a {axes}-D array, found shape {list(array.shape)}")
        if not NAMES.fullmatch(name):
            raise ValueError(f"expected no more arrays, found {name[:100]}")
    return arrays


def _head(text: Any) -> dict[str, Any]:
    """Everything but the arrays, checked."""
    head: dict[str, Any] = {"activations": {"actor": "mish", "critic": "mish"}, "norm_after": False}
    head |= json.loads(str(text))
    head.setdefault("draws", len(head["steps"]))
    version, candidates, temperature = head.pop("format"), head["candidates"], head["temperature"]
    for key, valid, expected in (
        ("format", version in range(1, FORMAT + 1), f"1 to {FORMAT}"),
        ("draws", head["draws"] in range(len(head["steps"]) + 1), "at most a draw for each step"),
        ("candidates", type(candidates) is int and 1 <= candidates <= MOST_CANDIDATES, "1 to 10,000"),
        ("temperature", _finite(temperature) and temperature >= 0, "0 or more"),
        ("steps", all(_finite(each) for step in head["steps"] for each in step), "finite numbers"),
        *((key, type(head[key]) is bool, "true or false") for key in ("inside", "tanh", "norm_after")),
        ("description", type(head["description"]) is dict, "an object"),
    ):
        if not valid:
            raise ValueError(f"{key}: expected {expected}, found {head.get(key, version)}")
    return head


def _finite(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number)


def _layer_norm(x: Any, weight: Any, bias: Any, epsilon: float, xp: ModuleType) -> Any:
    if xp is not np:
        return xp.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(epsilon))
    return x * weight + bias


def _mish(x: Any, xp: ModuleType) -> Any:
    """`x tanh(softplus(x))`, with fewer passes over the array than torch's own takes on a CPU."""
    if xp is not np:
        z = -x
        q = xp.sigmoid(z)
        return z.addcdiv_(z, q.mul_(q).add_(1.0), value=-2.0)  # z - 2 z / (1 + q^2)
    n = np.exp(x.clip(max=20.0))  # one exponential, as in cpql.networks.Mish
    n *= n + 2.0
    n /= n + 2.0
    n *= x
    return n


def _relu(x: Any, xp: ModuleType) -> Any:
    return x.clip(min=0.0)


def _gelu(x: Any, xp: ModuleType) -> Any:
    """Its tanh approximation."""
    if xp is not np:
        return xp.nn.functional.gelu(x, approximate="tanh")
    return 0.5 * x * (1.0 + np.tanh(np.float32(math.sqrt(2.0 / math.pi)) * (x + np.float32(0.044715) * x**3)))


ACTIVATIONS = {"mish": _mish, "relu": _relu, "gelu": _gelu}
