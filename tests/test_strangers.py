"""Policies from strangers: mutated ones act within their bounds or are refused in a line.

A hundred are tried here. `python tests/test_strangers.py 1400` tries as many as it is told, and says what
came of them.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpql.actors import (
    ACTORS,
    ActorConfig,
    AnyActorConfig,
    DeterministicConfig,
    DiffusionConfig,
    FlowConfig,
    GaussianConfig,
    OneStepConfig,
)
from cpql.critics import TwinCritic
from cpql.deploy import folded
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.environments import make_task_environment
from cpql.errors import CheckpointError, ConfigError, CpqlError
from cpql.tasks import Task

S, A = 5, 2
TRAP = "trap_of_a_stranger"  # a module that would say so if anything imported it
CONFIGS: tuple[AnyActorConfig, ...] = (
    ActorConfig(hidden=(16, 16)),
    ActorConfig("ict", hidden=(16,), t_max=5.0, refinements=(0.8, 0.3), action_norm=True),
    ActorConfig("meanflow", hidden=(16, 16), t_max=5.0, refinements=(1.0,)),
    ActorConfig("distill", hidden=(16, 16)),
    ActorConfig(hidden=(16, 16), refinements=(2.0,), clamp="inside"),
    DeterministicConfig((16, 16)),
    DiffusionConfig(3, hidden=(16, 16)),
    FlowConfig(3, hidden=(16,)),
    OneStepConfig((16, 16), flow=FlowConfig(hidden=(8,))),
    GaussianConfig((16,)),
    DeterministicConfig((16,), "mish"),
)


def made(kind: int = 0) -> Policy:
    """An honest policy; the last of the kinds has no critic."""
    torch.manual_seed(kind)
    several, normalised, activation = kind % 2 == 1, kind > 1, "relu" if kind == 3 else "mish"
    actor = ACTORS[CONFIGS[kind].kind](S, A, CONFIGS[kind])
    critic = TwinCritic(S, A, (12, 12), layer_norm=several, activation=activation)  # type: ignore[arg-type]
    alone = kind == len(CONFIGS) - 1
    config = PolicyConfig(
        state_dim=S,
        action_dim=A,
        action_low=(-1.0, -2.0),
        action_high=(1.0, 3.0),
        actor=CONFIGS[kind],
        critic_hidden=() if alone else (12, 12),
        critic_layer_norm=several,
        candidates=5 if several else 1,
        temperature=0.5 if several else 0.0,
        task=Task(
            "mine",
            "Pendulum-v1",
            -1.0,
            1.0,
            {"d4rl": {"id": "mine-medium-v2"}},
            env_options={"g": 9.8, "max_episode_steps": 9},
        ),
        origin={"agent": "cpql", "step": 5, "seed": 3, "versions": {"torch": "2"}},
        observation_mean=(1.0, 0.0, -3.0, 0.5, 0.0) if normalised else (),
        observation_std=(2.0, 1.0, 0.1, 1.0, 5.0) if normalised else (),
        critic_activation=activation,  # type: ignore[arg-type]
    )
    return Policy(actor, None if alone else critic, config)


def export(policy: Policy, path: Path) -> None:
    """Write a policy with its own rule of acting as an NPZ file."""
    policy.folded.with_rule(policy.candidates, policy.temperature).save(path)


class Deep:
    """Stands in JSON for lists within lists."""


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1 << 31, 10**9, 10**30, -(10**400)),
    *(0.0, -0.5, 1e-320, 1e-30, 1e6, 1e30, 1e200, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "x",
        "x" * 100_000,
        "../../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "~/x.xml",
        "two\nlines",
        "\x1b[2J",
    ),
    *("\ud800", "Hopper-v4", f"{TRAP}:Pendulum-v1", f"{TRAP}:x", "edm", "ict", "cpql"),
    *([], {}, [1.0], [0.0, 0.0], [[]], [None] * 3, [256] * 3, [1] * 5000, [10**6] * 90, [0.5] * 5000),
    *({"a": 1}, {"xml_file": "/x.xml"}, {"render_mode": "human"}, {"entry_point": f"{TRAP}:x"}),
    *({"id": "Hopper-v4"}, {"max_episode_steps": -1}, {"self": 1}, {"source": 1}, Deep()),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested values, as the object and the key that it is under."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def text_of(value: Any, deep: int) -> bytes:
    """JSON, or what Python takes for it: NaN and infinities too."""
    text = json.dumps(value, default=lambda _: "DEEP")
    return text.replace('"DEEP"', "[" * deep + "]" * deep).encode()


def swapped(about: dict[str, Any], r: random.Random) -> bytes:
    """One to three values of an object replaced, taken away or added."""
    for _ in range(r.randint(1, 3)):
        inside, key = r.choice(places(about))
        what = r.random()
        if what < 0.1 and isinstance(inside, dict):
            inside["another"] = copy.deepcopy(r.choice(VALUES))
        elif what < 0.2:
            del inside[key]
        elif what < 0.3 and isinstance(inside[key], int | float):
            inside[key] = inside[key] * r.choice((-1, 2, 0.5, 1e3, 1e12)) + r.choice((0, 1, -1))
        else:
            inside[key] = copy.deepcopy(r.choice(VALUES))
    return text_of(about, r.choice((20, 40, 900, 100_000)))


def flipped(content: bytes, r: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(r.choice((1, 1, 3, 30))):
        changed[r.randrange(len(changed))] ^= 1 << r.randrange(8)
    return bytes(changed)


def cut(content: bytes, r: random.Random) -> bytes:
    what = r.random()
    if what < 0.2:
        return b""
    if what < 0.4:
        return content + r.randbytes(r.choice((1, 100, 100_000)))
    if what < 0.5:
        return r.randbytes(len(content))
    return content[: r.randrange(len(content))]


def wild(array: Any, r: random.Random) -> Any:
    """An array with a number, or all of them, far from where they were."""
    changed = array.copy()
    value = r.choice((np.nan, np.inf, -np.inf, 3e38, -1e37, 1e30, 1e20, 1e10, 1e5, 0.0, 1e-45))
    if r.random() < 0.5:
        changed[...] = value
    else:
        changed.reshape(-1)[r.randrange(changed.size)] = value
    return changed


def unpacked(model: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the rest."""
    length = int.from_bytes(model[:8], "little")
    return json.loads(model[8 : 8 + length]), model[8 + length :]


def repacked(header: bytes, rest: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + rest


def with_header(model: bytes, r: random.Random) -> bytes:
    header, rest = unpacked(model)
    part = header[r.choice([name for name in header if name != "__metadata__"])]
    what = r.randrange(10)
    if what == 0:
        part["shape"] = r.choice(
            ([], [0], [1 << 62, 4], [2**40, 2**40], part["shape"][::-1], [-1], "x", [1] * 99)
        )
    elif what == 1:
        part["dtype"] = r.choice(("F64", "F16", "BF16", "I32", "U8", "BOOL", "X", "F4", None))
    elif what == 2:
        part["data_offsets"] = r.choice(([0, 0], [0, 1 << 60], [4, 0], [-4, 4], [0, len(rest)], [0, 16], []))
    elif what == 3:
        header["another"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(rest), len(rest) + 4]}
        rest += b"\0\0\0\0"
    elif what == 4:
        name = r.choice(list(header))
        header[r.choice(("x", "actor." + name, "__metadata__"))] = header.pop(name)
    elif what == 5:
        return repacked(
            json.dumps(header).encode(), rest, r.choice((0, 1, 1 << 20, 90 << 20, 1 << 40, (1 << 64) - 1))
        )
    elif what == 6:
        return repacked(json.dumps(header).encode() + b" " * (2 << 20), rest)
    elif what == 7:
        many = {
            f"x{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            for k in range(r.choice((100, 30_000)))
        }
        return repacked(json.dumps(many | header).encode(), rest)
    elif what == 8:
        return repacked(b"[" * 100_000, rest)
    else:
        return repacked(swapped(header, r), rest)
    return repacked(json.dumps(header).encode(), rest)


def with_weights(model: bytes, r: random.Random) -> bytes:
    header, rest = unpacked(model)
    begin, end = header[r.choice([name for name in header if name != "__metadata__"])]["data_offsets"]
    array = wild(np.frombuffer(rest[begin:end], "<f4"), r)
    return repacked(json.dumps(header).encode(), rest[:begin] + array.tobytes() + rest[end:])


def mutate_folder(r: random.Random, folder: Path) -> None:
    """Write a policy's folder with something wrong in it, its checksum made to fit or left out."""
    kind = r.randrange(len(CONFIGS))
    made(kind).save(folder)
    about, model = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
    content = json.loads(about)
    what = r.choices(range(7), (2, 1, 6, 1, 3, 3, 1))[0]
    if what == 0:
        model = r.choice((flipped, cut))(model, r)
    elif what == 1:
        about = r.choice((flipped, cut))(about, r)
    elif what == 2:
        about = swapped(content, r)
    elif what == 3:
        made((kind + r.choice((0, 1))) % len(CONFIGS)).save(folder / "other")
        model = (folder / "other" / "model.safetensors").read_bytes()
    elif what == 4:
        model = with_header(model, r)
    elif what == 5:
        model = with_weights(model, r)
    else:
        about = r.choice(
            (about + b" " * (5 << 20), b"[" + b"{}," * 3_000_000 + b"0]", model, b"{}", b"[]", b'"x"')
        )
    if r.random() < 0.8 and about == (folder / "config.json").read_bytes():
        content["sha256"] = hashlib.sha256(model).hexdigest()
        if r.random() < 0.3:
            del content["sha256"]
        about = text_of(content, 0)
    (folder / "config.json").write_bytes(about)
    (folder / "model.safetensors").write_bytes(model)


class Pickled:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return importlib.import_module, (TRAP,)


def npy(array: Any, **changes: Any) -> bytes:
    """An array as numpy writes it, or with another header."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    if not changes:
        return file.getvalue()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | changes
    file, body = io.BytesIO(), file.getvalue()[128:]
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + body


def mutate_file(r: random.Random, path: Path) -> None:
    """Write an exported policy with something wrong in it."""
    file = io.BytesIO()
    policy = made(r.randrange(len(CONFIGS)))
    export(policy, path)
    content = path.read_bytes()
    with np.load(path) as arrays:
        parts = {name: npy(array) for name, array in arrays.items()}
        head, name = json.loads(str(arrays["head"])), r.choice([n for n in arrays if n != "head"])
        array = arrays[name]
    what, compression, comment = r.randrange(13), zipfile.ZIP_STORED, b""
    if what == 0:
        path.write_bytes(r.choice((flipped, cut))(content, r))
        return
    if what == 1:  # its end, or a size or a place in its directory
        changed = bytearray(content)
        for _ in range(r.choice((1, 4))):
            changed[-r.randrange(1, 400)] = r.randrange(256)
        path.write_bytes(bytes(changed))
        return
    if what == 2:
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, r.choice((0, 1 << 60)), 1)
        path.write_bytes(content[:-22] + locator + content[-22:])
        return
    if what in (3, 4):
        parts["head"] = npy(np.array(swapped(head, r).decode()))
    elif what in (5, 6):
        parts[name] = npy(wild(array, r))
    elif what == 7:
        shape = r.choice(
            ((), (0,), (1 << 40, 1 << 40), (10**30,), array.shape[::-1], (*array.shape, 1), (-1,))
        )
        parts[name] = npy(array, shape=shape)
    elif what == 8:
        parts[name] = npy(array.astype(r.choice(("f8", "i4", "f2", ">f4", "U5", "S4", "c8"))))
    elif what == 9:
        parts[r.choice((name, "head"))] = npy(np.array([Pickled()], object))
    elif what == 10:
        if r.random() < 0.5:
            del parts[r.choice(list(parts))]
        else:
            parts[r.choice(("x", "../x", "/etc/x", "critic.0.bias"))] = parts.pop(name)
    elif what == 11:
        compression = r.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        if compression == zipfile.ZIP_DEFLATED:
            parts[name] = npy(np.zeros(250_000_000, np.uint8))
    else:
        comment = b"x" * 70
        parts[name] = r.choice(
            (npy(array.T.copy().T), npy(array[:-1]), npy(array * 0), b"", parts[name][:-4])
        )
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.comment = comment if r.random() < 0.2 else b""
        for key, part in parts.items():
            archive.writestr(f"{key}.npy", part)
    path.write_bytes(file.getvalue())


def check(actions: Any, low: Any, high: Any) -> None:
    assert np.isfinite(actions).all(), "an action that isn't finite"
    rounding = 1e-6 * (np.abs(low) + np.abs(high))
    assert (actions >= low - rounding).all() and (actions <= high + rounding).all(), "an action out of bounds"


def act_from_folder(folder: Path) -> None:
    policy = Policy.load(folder)
    config = policy.config
    low, high = (np.array(bound, np.float64) for bound in (config.action_low, config.action_high))
    observations = np.random.default_rng(0).normal(size=(6, config.state_dim))
    for candidates in (policy.candidates, 1, 3) if policy.critic is not None else (1,):
        policy.candidates = candidates
        for deterministic in (False, True):
            check(policy.predict(observations, deterministic=deterministic)[0], low, high)
            check(policy.predict(observations[0], deterministic=deterministic)[0], low, high)
    for more in (
        lambda: policy.save_pretrained(folder / "again"),
        lambda: make_task_environment(config.task),
        lambda: config.task.score(1.0),
    ):
        try:
            more()
        except CpqlError as error:
            one_line(error)


def act_from_file(path: Path) -> None:
    policy = folded.load(path)
    low = policy.arrays["actor.low"].astype(np.float64)
    generator = np.random.default_rng(0)
    observations = generator.standard_normal((6, len(policy.arrays["actor.state_weight"])), np.float32)
    for rows, batch in ((observations, [6]), (observations[0], [])):
        check(policy(rows, **policy.draw(generator, *batch)), low, low + policy.arrays["actor.span"])


def one_line(error: Exception) -> None:
    assert "\n" not in str(error) and 0 < len(str(error)) < 2_000, "an error that isn't a line"


Trial = tuple[Callable[[random.Random, Path], None], Callable[[Path], None], tuple[type[Exception], ...]]
TRIALS: dict[str, Trial] = {
    "folder": (mutate_folder, act_from_folder, (CheckpointError, ConfigError)),
    "file": (mutate_file, act_from_file, (ValueError,)),
}


def mutant(seed: int, folder: Path) -> None:
    """Write a trial, `folder/SEED.folder` or `folder/SEED.file`."""
    name = ("folder", "folder", "file")[seed % 3]
    TRIALS[name][0](random.Random(seed), folder / f"{seed}.{name}")


def try_all(folder: Path) -> dict[str, Any]:
    """Try what is in a folder: how it came out, what shouldn't have happened, and at what cost.

    In a process of its own, so that nothing else takes memory.
    """
    import resource

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

    sys.path.insert(0, str(folder))
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    for path in sorted((folder / "honest").iterdir()):  # what these take isn't counted
        TRIALS[path.suffix[1:]][1](path)
    slowest, before = 0.0, peak()
    for path in sorted(folder.glob("*.*"), key=lambda path: path.stem):
        if path.suffix == ".py":
            continue
        _, act, expected = TRIALS[path.suffix[1:]]
        began = time.monotonic()
        try:
            act(path)
            outcomes[f"{path.suffix[1:]} acts"] += 1
        except expected as error:
            outcomes[f"{path.suffix[1:]} refused"] += 1
            if "\n" in str(error) or not 0 < len(str(error)) < 2_000:
                failures.append(f"{path.name}: not a line: {str(error)[:300]!r}")
        except BaseException:
            failures.append(f"{path.name}: {traceback.format_exc()}")
        slowest = max(slowest, time.monotonic() - began)
        if sys.modules.pop(TRAP, None) is not None:
            failures.append(f"{path.name}: imported a module that it named")
    return {"outcomes": outcomes, "failures": failures, "seconds": slowest, "megabytes": peak() - before}


def torture(count: int) -> dict[str, Any]:
    """Try so many mutants, a hundred in a process: the sum of what `try_all` says."""
    total: dict[str, Any] = {"outcomes": Counter(), "failures": [], "seconds": 0.0, "megabytes": 0.0}
    for start in range(0, count, 100):
        with tempfile.TemporaryDirectory() as holder:
            folder = Path(holder)
            (folder / f"{TRAP}.py").write_text("")
            (folder / "honest").mkdir()
            for kind in range(len(CONFIGS)):
                made(kind).save(folder / "honest" / f"{kind}.folder")
                export(made(kind), folder / "honest" / f"{kind}.file")
            for seed in range(start, min(start + 100, count)):
                mutant(seed, folder)
            command = [sys.executable, __file__, holder]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert ran.returncode == 0, ran.stderr
        found = json.loads(ran.stdout)
        total["outcomes"] += Counter(found["outcomes"])
        total["failures"] += found["failures"]
        for key in ("seconds", "megabytes"):
            total[key] = max(total[key], found[key])
    return total


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no way to ask for the peak of memory")
def test_mutated_policies_act_in_their_bounds_or_are_refused_in_a_line() -> None:
    found = torture(100)
    assert not found["failures"], found["failures"][0]
    assert set(found["outcomes"]) == {"folder acts", "folder refused", "file acts", "file refused"}
    assert sum(found["outcomes"].values()) == 100
    assert found["seconds"] < 30 and found["megabytes"] < 200, found


def saved(folder: Path, kind: int = 0, **changes: Any) -> Path:
    """An honest policy's folder with other values in its config."""
    made(kind).save(folder)
    content = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and key != "origin":
            content[key] |= value
        else:
            content[key] = value
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def refused(folder: Path, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Policy.load(folder)
    assert text in str(caught.value), str(caught.value)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"state_dim": 6},
            "size mismatch for actor.mlp.layers.0.weight: copying a param with shape torch.Size([16, 23])",
        ),
        ({"critic_hidden": [12, 13]}, "size mismatch for critic.q.layers.2.weight: copying a param with"),
        (
            {"actor": {"hidden": [1 << 14] * 64}},
            "Missing key(s) in state_dict",
        ),  # terabytes, if they were made
        ({"actor": {"hidden": [16] * 101}}, "actor.hidden: Tuple should have at most 64 items"),
        (
            {"actor": {"hidden": [1 << 40]}},
            "actor.hidden.0: Input should be less than or equal to 16384, found 1099511627776",
        ),
        ({"critic_hidden": [0]}, "critic_hidden.0: Input should be greater than or equal to 1, found 0"),
        (
            {"actor": {"refinements": [1.0] * 1000}},
            "actor.refinements: Tuple should have at most 999 items",
        ),
        ({"candidates": 0}, "candidates: Input should be greater than or equal to 1, found 0"),
        ({"candidates": 10**9}, "candidates: Input should be less than or equal to 10000, found 1000000000"),
        ({"temperature": -1.0}, "temperature: Input should be greater than or equal to 0, found -1.0"),
        (
            {"temperature": float("nan")},
            "config.json: no readable policy: expected value at line 1 column ",
        ),
        ({"action_low": [-1.0]}, "action_low: expected 2 values, found 1"),
        (
            {"action_high": [1.0, -2.0]},
            "action_low, action_high: expected the lower first, found -2.0 and -2.0",
        ),
        (
            {"action_high": [1.0, 1e39]},
            "action_high.1: Input should be less than or equal to 10000000000, found 1e+39",
        ),
        ({"observation_mean": [0.0] * 5}, "observation_std: expected 5 values, found 0"),
        (
            {"observation_mean": [0.0] * 4, "observation_std": [1.0] * 4},
            "observation_mean: expected 5 values",
        ),
        (
            {"observation_mean": [0.0] * 5, "observation_std": [0.0] * 5},
            "observation_std.0: Input should be greater than 0, found 0.0",
        ),
        (
            {"actor": {"sigma_data": 1e300}},
            "no readable policy: OverflowError: (34, 'Numerical result out of range')",
        ),
        (
            {"observation_mean": [0.0] * 5, "observation_std": [2e-38] * 5},
            "expected finite actions, found products that overflow",
        ),
        ({"actor": {"kind": "gaussian"}}, "actor"),
        (
            {"critic_activation": "tanh"},
            "critic_activation: Input should be 'mish', 'relu' or 'gelu', found 'tanh'",
        ),
        ({"critic_hidden": [], "candidates": 2}, "candidates=2: expected 1 for a policy without a critic"),
        ({"critic_hidden": []}, "Unexpected key(s) in state_dict"),
        ({"origin": {"a": [[[[]]]] * 2_000_000}}, "no readable policy: expected at most 4,194,304 bytes"),
        (
            {"task": {"name": "../../x"}},
            "name '../../x': expected a name such as 'hopper-medium', not a path",
        ),
        ({"task": {"datasets": {"d4rl": {"id": "/etc/x"}}}}, "datasets.d4rl.id '/etc/x': expected a name"),
        (
            {"task": {"datasets": {"d4rl": {"id": "a", "path": "a/..\\x.hdf5"}}}},
            "datasets.d4rl.path 'a/..\\\\x.hdf5': expected a name",
        ),
        ({"task": {"env_options": {"xml_file": "/x.xml"}}}, "env_options: '/x.xml' could be a path"),
        ({"task": {"env_options": {"a": [{"b": "../x"}]}}}, "env_options: '../x' could be a path"),
        ({"task": {"reset_options": {"file": "~/x"}}}, "reset_options: '~/x' could be a path"),
        ({"task": {"env_options": {"render_mode": "human"}}}, "render_mode='human': expected none"),
        ({"task": {"expert_return": -1.0}}, "random_return and expert_return: expected two numbers"),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_what_a_config_may_not_say(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    refused(saved(tmp_path / "policy", **changes), text)


def test_nesting_has_an_end(tmp_path: Path) -> None:
    folder = saved(tmp_path / "policy")
    honest = (folder / "config.json").read_text()
    for depth in (150, 300, 100_000):
        deep = honest.replace('"origin": {', '"origin": {"x": ' + "[" * depth + "]" * depth + ", ")
        assert deep != honest
        (folder / "config.json").write_text(deep)
        if depth == 150:
            Policy.load(folder).save_pretrained(tmp_path / "again")
        else:
            refused(folder, "no readable policy: recursion limit exceeded")


def test_a_task_has_names_of_environments_and_files_of_its_own() -> None:
    """What looks like a path, and isn't one."""
    options = {
        "xml_file": "hopper.xml",
        "tasks_to_complete": ["bottom burner"],
        "maze_map": [[1, 0], ["r", "g"]],
    }
    task = Task(
        "dm_control/walker-v0",
        "dm_control/walker-v0",
        datasets={"minari": {"id": "D4RL/pen/human-v2"}},
        env_options=options,
    )
    assert task.env_options == options
    assert Task("my.module:Mine-v0", "Mine-v0").name == "my.module:Mine-v0"


def test_damage_is_noticed_by_the_checksum(tmp_path: Path) -> None:
    """Even where it leaves a policy that acts; one saved before there were checksums has none to compare."""
    folder = saved(tmp_path / "policy")
    model = folder / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(bytes(content))
    refused(folder, f"{model}: no readable policy: damaged, or another policy's: expected SHA-256 ")
    about = json.loads((folder / "config.json").read_text())
    assert len(about.pop("sha256")) == 64
    (folder / "config.json").write_text(json.dumps(about))
    assert Policy.load(folder).predict(np.zeros(S))[0].shape == (A,)


def test_a_policy_of_an_older_version_acts_as_it_did(tmp_path: Path) -> None:
    """Actors had no kind, critics no activation, and a task one dataset with places of its own."""
    folder = saved(tmp_path / "policy", kind=1)
    content = json.loads((folder / "config.json").read_text())
    assert content["actor"].pop("kind") == "consistency" and content.pop("critic_activation") == "mish"
    content["task"] |= {"dataset": "mine-medium-v2", "url": "", "minari": "", "transitions": None}
    del content["task"]["datasets"]
    (folder / "config.json").write_text(json.dumps(content))
    policy, honest = Policy.load(folder), made(1)
    assert policy.config.actor == honest.config.actor
    assert policy.config.task.datasets == {"d4rl": {"id": "mine-medium-v2"}}
    left, right = (p.predict(np.ones((3, S)), deterministic=True)[0] for p in (policy, honest))
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e11])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    policy = made()
    assert policy.critic is not None
    policy.critic.q.layers[0].bias.data[0] = value  # type: ignore[operator]
    policy.save(tmp_path / "policy")
    refused(tmp_path / "policy", "critic.q.layers.0.bias: expected finite float32 of at most 1e+10")


def test_a_header_has_an_end(tmp_path: Path) -> None:
    folder = saved(tmp_path / "policy")
    model = folder / "model.safetensors"
    model.write_bytes(struct.pack("<Q", 90 << 20) + model.read_bytes()[8:])
    refused(folder, f"{model}: no readable policy: ")
    model.write_bytes(model.read_bytes() + bytes(2 << 20))
    refused(folder, f"{model}: no readable policy: size mismatch: expected 9,168 bytes")


def test_fresh_policies_draw_noise_of_their_own() -> None:
    one, other = made(), made()
    observations = np.zeros((4, S))
    assert not np.array_equal(one.predict(observations)[0], other.predict(observations)[0])
    for policy in (one, other):
        policy.seed(3)
    np.testing.assert_array_equal(one.predict(observations)[0], other.predict(observations)[0])


def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "policy")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (Policy.load, Policy.from_pretrained):
        with pytest.raises(ConfigError, match="device=cuda: PyTorch finds no such CUDA device here"):
            load(folder, device="cuda")
        assert load(folder, device="auto").device.type == "cpu"
    with pytest.raises(ConfigError, match="device=gpu: expected auto, cpu or cuda"):
        Policy.load(folder, "gpu")


def exported(path: Path, **changes: bytes) -> Path:
    """An honest exported policy with two candidates' arrays, some replaced by other bytes."""
    export(made(1), path)
    with np.load(path) as arrays:
        parts = {name: npy(array) for name, array in arrays.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (parts | changes).items():
            archive.writestr(f"{name}.npy", content)
    return path


def headed(**changes: Any) -> bytes:
    """The head of an exported policy with other values in it."""
    with tempfile.TemporaryDirectory() as folder:
        export(made(1), Path(folder) / "policy.npz")
        with np.load(Path(folder) / "policy.npz") as arrays:
            return npy(np.array(json.dumps(json.loads(str(arrays["head"])) | changes)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"actor.low": npy(np.zeros(A, "f4"), shape=(1 << 40, 1 << 40))},
            "cannot reshape array of size 0 into shape (1099511627776,1099511627776)",
        ),
        ({"actor.low": npy(np.zeros(A))}, "actor.low: expected finite float32 of at most 1e+10"),
        ({"actor.low": npy(np.array([Pickled()]))}, "Object arrays cannot be loaded"),
        ({"actor.low": npy(np.array("text"))}, "actor.low: expected finite float32 of at most 1e+10"),
        ({"actor.span": npy(np.ones(3, "f4"))}, "operands could not be broadcast together"),
        ({"actor.span": npy(np.zeros(2, "f4"))}, "actor.span: expected upper bounds above the lower ones"),
        (
            {"actor.span": npy(np.full(2, np.nan, "f4"))},
            "actor.span: expected finite float32 of at most 1e+10",
        ),
        (
            {"actor.layers.0.bias": npy(np.ones((1, 2), "f4"))},
            "actor.layers.0.bias: expected a 1-D array, found shape [1, 2]",
        ),
        ({"another": npy(np.ones(3, "f4"))}, "expected no more arrays, found another"),
        (
            {"head": headed(candidates=10**9)},
            "candidates: expected 1 to 10,000, found 1000000000",
        ),
        ({"head": headed(candidates=True)}, "candidates: expected 1 to 10,000, found True"),
        ({"head": headed(temperature=-1)}, "temperature: expected 0 or more, found -1"),
        ({"head": headed(steps=[[1, 2, 3]] * 4)}, "no 'actor.steps.3.bias'"),
        ({"head": headed(steps=[[1.0, float("nan"), 1.0]] * 3)}, "steps: expected finite numbers"),
        (
            {"head": headed(steps=[[1.0, 1.0, 1e300]] * 3)},
            "expected finite actions, found products that overflow",
        ),
        ({"head": headed(inside=1)}, "inside: expected true or false, found 1"),
        ({"head": headed(description=[])}, "description: expected an object, found []"),
        ({"head": headed(activations={"actor": "tanh", "critic": "mish"})}, "no 'tanh'"),
        ({"head": headed(steps=[[1.0, 1.0]] * 3)}, "not enough values to unpack"),
        ({"actor.layers.0.low": npy(np.ones(3, "f4"))}, "expected no more arrays, found actor.layers.0.low"),
        ({"actor.low.x": npy(np.ones(3, "f4"))}, "expected no more arrays, found actor.low.x"),
        ({"actor.inside": npy(np.ones(3, "f4"))}, "expected no more arrays, found actor.inside"),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_what_an_exported_file_may_not_hold(changes: dict[str, bytes], text: str, tmp_path: Path) -> None:
    path = exported(tmp_path / "policy.npz")
    act_from_file(path)  # zipfile's own entries are as good as numpy's
    with pytest.raises(ValueError, match=r"policy\.npz: not an exported policy") as caught:
        folded.load(exported(path, **changes))
    assert text in str(caught.value), str(caught.value)
    one_line(caught.value)
    assert TRAP not in sys.modules


def test_an_exported_file_s_own_tricks(tmp_path: Path) -> None:
    path = exported(tmp_path / "policy.npz")
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("head.npy", npy(np.zeros(10_000_000, np.uint8)))
    bomb = path.read_bytes()
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("head.npy", headed())
        archive.writestr("head.npy", headed())
    twice = path.read_bytes()
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    stored, zipped = "arrays that are stored uncompressed, each once", "a ZIP file as numpy writes it"
    for wrong, text in (
        (bomb, stored),
        (twice, stored),
        (content[:-22] + locator + content[-22:], zipped),  # a longer record elsewhere
        (content[:-10] + struct.pack("<LLH", 2 << 20, 0, 0), zipped),  # a directory of 2 MiB
        (content[:-2] + b"\5\0trick", zipped),
        (content[:40], "not an exported policy"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=text) as caught:
            folded.load(path)
        one_line(caught.value)


def test_what_a_policy_says_of_itself_ends_no_block_of_its_card(tmp_path: Path) -> None:
    text = "```\n# heading\n---\n| a |"
    for k, origin in enumerate(
        ({"step": text, text: 5}, {"versions": text}, {"data": {"source": text}}, {"data": [1]})
    ):
        policy = Policy.load(saved(tmp_path / f"policy{k}", origin=origin))
        policy.save_pretrained(tmp_path / f"card{k}")
        card = (tmp_path / f"card{k}" / "README.md").read_text()
        section = card.partition("## Where it comes from\n\n")[2].partition("\n## Files")[0]
        assert "heading" in section or k == 3
        assert all(line.startswith("    ") or not line for line in section.split("\n"))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if sys.argv[1].isdigit():
        result = torture(int(sys.argv[1]))
        print(*result["failures"], sep="\n")
        print(dict(result["outcomes"]), f"{len(result['failures'])} failed")
        print(f"{result['seconds']:.2f} s, {result['megabytes']:.0f} MB more than honest ones, at most")
    else:
        print(json.dumps(try_all(Path(sys.argv[1]))))
