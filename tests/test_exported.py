"""Exported files act as the policy does, where cpql and torch aren't."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from scipy.stats import kstest
from test_cli import run

from cpql.actors import ActorConfig, ConsistencyActor, DeterministicActor, DeterministicConfig
from cpql.cli import ExportConfig
from cpql.critics import TwinCritic
from cpql.deploy import folded
from cpql.deploy.export import export
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.errors import ConfigError, CpqlError
from cpql.settings import build
from cpql.tasks import Task

S, A, C = 5, 2, 6
LOW, HIGH = np.array([-2.0, 0.0]), np.array([2.0, 10.0])
NAMES = {"onnx": "policy.onnx", "torch": "policy.pt2", "numpy": "policy.npz"}


@pytest.fixture
def policy() -> Policy:
    """Two steps, odd bounds, normalised observations, and a critic with LayerNorm and an opinion."""
    torch.manual_seed(0)
    actor = ConsistencyActor(S, A, ActorConfig(hidden=(32, 32), t_max=2.0, refinements=(0.8,)))
    critic = TwinCritic(S, A, (32, 32), layer_norm=True)
    for parameter in critic.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    config = PolicyConfig(
        state_dim=S,
        action_dim=A,
        action_low=tuple(LOW.tolist()),
        action_high=tuple(HIGH.tolist()),
        actor=actor.config,
        critic_hidden=(32, 32),
        critic_layer_norm=True,
        candidates=1,
        temperature=1.0,
        task=Task("made", None),
        origin={"agent": "cpql", "step": 7, "seed": 3},
        observation_mean=(1.0, 0.0, -3.0, 0.5, 0.0),
        observation_std=(2.0, 1.0, 0.1, 1.0, 5.0),
    )
    return Policy(actor, critic, config)


def given(policy: Policy, count: int) -> dict[str, Any]:
    """Observations and all the noise that there may be."""
    random = np.random.default_rng(1)
    rows = (count,) if policy.candidates == 1 else (count, policy.candidates)
    mean, std = np.array(policy.config.observation_mean), np.array(policy.config.observation_std)
    observation = (random.normal(size=(count, S)) * std + mean).astype(np.float32)
    noise = random.standard_normal((policy.actor.steps, *rows, A), np.float32)
    found = {"observation": observation, "noise": noise}
    if policy.candidates > 1 and policy.temperature > 0:
        found["uniform"] = random.random(rows, np.float32)
    return found


@torch.no_grad()
def expected(policy: Policy, arrays: dict[str, Any]) -> Any:
    """The modules' own actions, in the environment's bounds."""
    mean, std = torch.tensor(policy.config.observation_mean), torch.tensor(policy.config.observation_std)
    state = (torch.from_numpy(arrays["observation"]) - mean) / std
    noise = torch.from_numpy(arrays["noise"])
    if policy.candidates == 1:
        unit = policy.actor.sample(state, noise=noise)
    else:
        actions = policy.actor.sample(state[:, None].expand(-1, policy.candidates, -1), noise=noise)
        assert policy.critic is not None
        value = policy.critic(state[:, None], actions).amin(0)
        if policy.temperature > 0:
            gumbel = -torch.log(-torch.log(torch.from_numpy(arrays["uniform"]).double()))
            value = value / policy.temperature + gumbel
        unit = actions[torch.arange(len(state)), value.argmax(-1)]
    return LOW + (unit.numpy() + 1) / 2 * (HIGH - LOW)


def runner(path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The file at `path` in its own runtime."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        return lambda arrays: dict(zip(names, session.run(names, arrays), strict=True))
    if path.suffix == ".npz":
        policy = folded.load(path)
        return lambda arrays: {"action": policy(**arrays)}
    module = torch.export.load(path).module()

    @torch.no_grad()
    def call(arrays: dict[str, Any]) -> dict[str, Any]:
        out = module(*(torch.from_numpy(array) for array in arrays.values()))
        out = [array.numpy() for array in (out if isinstance(out, tuple) else (out,))]
        return dict(zip(("action", "noise", "uniform"), out, strict=False))

    return call


def described(path: Path) -> Any:
    """What the file says of itself."""
    if path.suffix == ".onnx":
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["cpql"])
    if path.suffix == ".npz":
        return folded.load(path).description
    extra = {"cpql.json": ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra["cpql.json"])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("format", list(NAMES))
def test_the_candidates_rule(policy: Policy, format: Any, temperature: float, tmp_path: Path) -> None:
    policy.candidates, policy.temperature = C, temperature
    done = export(policy, tmp_path / NAMES[format], format)
    assert [file.name for file in tmp_path.iterdir()] == [NAMES[format]]
    assert done.difference < 1e-5 and done.states == 10_000 // C
    call = runner(done.path)
    for count in (1, 10_000):
        arrays = given(policy, count)
        assert {name: list(array.shape) for name, array in arrays.items()} == {
            name: [count if size == "batch" else size for size in shape]
            for name, shape in done.description["inputs"].items()
        }
        found, target = call(arrays)["action"], expected(policy, arrays)
        # 1e-5 of half their range; but for two candidates that are worth the same to rounding
        same = (np.abs(found - target) <= 0.5e-5 * (HIGH - LOW)).all(1)
        assert (~same).sum() <= count // 2_000
        assert found.dtype == np.float32 and (found >= LOW).all() and (found <= HIGH).all()
    ranked = expected(policy, given(policy, 100))
    policy.candidates = 1
    assert described(done.path) == done.description
    assert done.description["origin"] == {"agent": "cpql", "step": 7, "seed": 3}
    assert np.ptp(ranked, axis=0).min() > 0.5  # actions differ, or agreeing would be easy


@pytest.mark.slow
@pytest.mark.parametrize("candidates", [1, C])
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_noise_made_inside(policy: Policy, format: Any, candidates: int, tmp_path: Path) -> None:
    """It comes out beside the action that it made, is new for every call, and has the right distribution."""
    policy.candidates = candidates
    done = export(policy, tmp_path / NAMES[format], format, "inside")
    assert list(done.description["inputs"]) == ["observation"]
    observation = given(policy, 4_000)["observation"]
    call = runner(done.path)
    out = call({"observation": observation})
    assert ["action", "noise", "uniform"][: len(out)] == list(out) and ("uniform" in out) == (candidates > 1)
    target = expected(policy, {"observation": observation, **out})
    assert (np.abs(out["action"] - target) <= 0.5e-5 * (HIGH - LOW)).all(1).sum() >= 3_998
    assert kstest(out["noise"].ravel(), "norm").pvalue > 1e-6
    if candidates > 1:
        assert kstest(out["uniform"].ravel(), "uniform").pvalue > 1e-6
    assert not np.array_equal(out["noise"], call({"observation": observation})["noise"])


# What a robot has: numpy and a copy of one file, or onnxruntime.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "cpql"):
            raise ImportError(f"{name} isn't here")

sys.meta_path.insert(0, Refuse())
import numpy as np
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch is here")
given = dict(np.load("given.npz"))
if sys.argv[1].endswith(".npz"):
    import folded
    policy = folded.load(sys.argv[1])
    np.save("found.npy", policy(**given))
    one = {name: array[:, 0] if name == "noise" else array[0] for name, array in given.items()}
    np.save("one.npy", policy(**one))
    drawn = policy.draw(np.random.default_rng(0))
    assert all(one[name].shape == a.shape and one[name].dtype == a.dtype for name, a in drawn.items())
    assert len(drawn) == len(one) - 1
else:
    import onnxruntime
    np.save("found.npy", onnxruntime.InferenceSession(sys.argv[1]).run(["action"], given)[0])
print(sorted(name for name in ("torch", "cpql") if name in sys.modules))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "candidates"), [("a.npz", 1), ("b.npz", C), ("a.onnx", 1)])
def test_without_torch(policy: Policy, name: str, candidates: int, tmp_path: Path) -> None:
    policy.candidates = candidates
    export(policy, tmp_path / name, "onnx" if name.endswith("onnx") else "numpy")
    arrays = given(policy, 200)
    np.savez(tmp_path / "given.npz", **arrays)
    shutil.copy(folded.__file__, tmp_path / "folded.py")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    target, found = expected(policy, arrays), np.load(tmp_path / "found.npy")
    assert ((np.abs(found - target) <= 0.5e-5 * (HIGH - LOW)).all(1)).sum() >= 199
    if name.endswith("npz"):
        np.testing.assert_allclose(np.load(tmp_path / "one.npy"), target[0], atol=5e-5)


def test_a_torch_file_holds_no_pickle(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.candidates = C
    path = export(policy, tmp_path / "policy.pt2", "torch").path

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it unpickles")

    for place in (
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "torch._C._pickle_load_obj",
    ):
        monkeypatch.setattr(place, refuse)
    arrays = given(policy, 3)
    np.testing.assert_allclose(runner(path)(arrays)["action"], expected(policy, arrays), atol=5e-5)


def test_a_numpy_file_that_is_none_of_ours(tmp_path: Path) -> None:
    trap = tmp_path / "trap.npz"
    np.savez(trap, head=np.array([{"format": 1}], object))
    with pytest.raises(
        ValueError, match=r"trap\.npz: not an exported policy: Object arrays cannot be loaded"
    ):
        folded.load(trap)
    trap.write_text("nothing")
    with pytest.raises(ValueError, match=r"trap\.npz: not an exported policy"):
        folded.load(trap)
    with pytest.raises(FileNotFoundError):
        folded.load(tmp_path / "nowhere.npz")


def test_numpy_files_of_older_and_newer_versions(policy: Policy, tmp_path: Path) -> None:
    """Format 1 knew consistency actors, Mish and LayerNorm before it alone, and named none of them."""
    policy.candidates = C
    path = export(policy, tmp_path / "policy.npz", "numpy").path
    with np.load(path) as archive:
        arrays = dict(archive)
    head = json.loads(str(arrays.pop("head")))
    assert head.pop("format") == 3 and head.pop("activations") == {"actor": "mish", "critic": "mish"}
    assert head.pop("draws") == len(head["steps"]) and head.pop("norm_after") is False
    np.savez(path, head=np.array(json.dumps({"format": 1, **head})), **arrays)
    given_to = given(policy, 50)
    np.testing.assert_allclose(runner(path)(given_to)["action"], expected(policy, given_to), atol=5e-5)
    np.savez(path, head=np.array(json.dumps({"format": 4, **head})), **arrays)
    with pytest.raises(
        ValueError, match=r"policy\.npz: not an exported policy: format: expected 1 to 3, found 4"
    ):
        folded.load(path)


def test_a_file_that_acts_otherwise_is_not_written(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.npz"
    export(policy, path, "numpy")
    before, right = path.read_bytes(), policy.folded
    actor = {"actor.state_bias": right.arrays["actor.state_bias"] + np.float32(0.01)}
    critic = {name: -right.arrays[name] for name in ("critic.0.bias", "critic.1.bias")}
    for wrong, candidates in ((actor, 1), (actor, C), (critic, C)):
        folded_wrongly = replace(right, arrays=right.arrays | wrong)
        monkeypatch.setitem(policy.__dict__, "folded", folded_wrongly)
        policy.candidates = candidates
        with pytest.raises(
            CpqlError, match=r"policy\.npz: not written: its actions differ from PyTorch's by"
        ):
            export(policy, path, "numpy")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("noise", ["input", "inside"])
@pytest.mark.parametrize("format", list(NAMES))
def test_a_deterministic_policy_without_a_critic(
    policy: Policy, format: Any, noise: Any, tmp_path: Path
) -> None:
    """There is no noise to give or to get, wherever it would be drawn."""
    if format == "numpy" and noise == "inside":
        return
    actor = DeterministicActor(S, A, DeterministicConfig((32, 32)))
    policy = Policy(actor, None, replace(policy.config, actor=actor.config, critic_hidden=()))
    done = export(policy, tmp_path / NAMES[format], format, noise)
    assert done.difference < 1e-5
    assert done.description["inputs"] == {"observation": ["batch", S]}
    assert done.description["outputs"] == {"action": ["batch", A]}
    observation = given(policy, 100)["observation"]
    target = expected(policy, {"observation": observation, "noise": np.zeros((0, 100, A), np.float32)})
    found = runner(done.path)({"observation": observation})
    np.testing.assert_allclose(found["action"], target, atol=2e-5)
    assert np.ptp(target, axis=0).min() > 0.5


def test_what_there_is_not(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any
    for wrong, message in (
        ({"format": "tflite"}, "format=tflite does not exist: choose from onnx, torch, numpy"),
        ({"noise": "outside"}, "noise=outside does not exist: choose from input, inside"),
        ({"format": "numpy", "noise": "inside"}, "noise=inside: expected input with format=numpy"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(policy, tmp_path / "policy", **wrong)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"format=onnx needs packages: pip install 'cpql\[export\]'"):
        export(policy, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "run" / "policy")
    done = run("export.py", "checkpoint=run", "format=numpy", "candidates=4", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "inputs   observation [batch, 5], noise [2, batch, 4, 2], uniform [batch, 4]" in done.stdout
    assert "(2,500 random states)" in done.stdout and "folded.py along" in done.stdout
    path = Path(done.stdout.splitlines()[-1])
    assert path == tmp_path / "run" / "policy.npz"
    policy.candidates = 4
    arrays = given(policy, 3)
    np.testing.assert_allclose(runner(path)(arrays)["action"], expected(policy, arrays), atol=5e-5)
    before = path.read_bytes()
    for words, message in (
        (("format=numpy",), f"{path} already exists: name another file by out=..."),
        (("temperature=2", "out=x"), "temperature=2: expected candidates above 1, found 1"),
    ):
        done = run("export.py", "checkpoint=run", *words, folder=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert path.read_bytes() == before


def test_wrong_settings() -> None:
    settings = {"checkpoint": "run"}
    assert build(ExportConfig, settings, "configuration").format == "onnx"
    for setting, message in (
        ({"format": "onx"}, "format: Input should be 'onnx', 'torch' or 'numpy', found 'onx'"),
        ({"noise": "outside"}, "noise: Input should be 'input' or 'inside'"),
        ({"candidates": 0}, "candidates: Input should be greater than or equal to 1, found 0"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0, found -1"),
        ({"temprature": 1}, "unknown key 'temprature': did you mean temperature"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(ExportConfig, settings | setting, "configuration")
