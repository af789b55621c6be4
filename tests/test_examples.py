"""The examples run, and the page on other agents."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from cpql.deploy.policy import Policy
from cpql.training.evaluation import evaluate

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_bandit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two objectives for a moment, one with a single step; the bandit's own actions score as they must."""
    bandit = load("bandit", monkeypatch)
    files = {"--json": tmp_path / "bandit.json", "--picture": tmp_path / "bandit.png"}
    arguments = [str(part) for pair in files.items() for part in pair]
    bandit.main(["--updates", "30", "--objectives", "ect", "distill", *arguments])
    table = json.loads(files["--json"].read_text())
    assert files["--picture"].stat().st_size > 10_000
    for kind in ("fixed", "conditional"):
        assert table[kind]["data"]["covered"] == pytest.approx(1 - math.exp(-4.5), abs=0.01)
        assert table[kind]["data"]["least"] > 0.85
        assert list(table[kind]["ect"]["steps"]) == ["1", "2", "4"] and list(
            table[kind]["distill"]["steps"]
        ) == ["1"]
        assert [len(row["levels"]) for row in table[kind]["ect"]["steps"].values()] == [0, 1, 3]


@pytest.mark.slow
def test_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few updates make no digits, but what is given is kept, and all files are there."""
    digits = load("digits", monkeypatch)
    scores = digits.main(["--updates", "20", "--out", str(tmp_path)])
    assert scores["inpainting"]["error_of_known_pixels"] == 0.0
    assert scores["super_resolution"]["error_of_known_means"] < 1e-5
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    names = ("samples", "inpainting", "super_resolution", "interpolation")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5_000 for name in names)


@pytest.mark.slow
def test_td3_actor_and_its_distillation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One saves a policy of two steps, the other makes one step of it; their scores are evaluate's own."""
    folder = tmp_path / "td3"
    module = load("td3_actor", monkeypatch)
    options = ["--steps", "600", "--warm-up", "300", "--batch-size", "16", "--refinements", "0.8"]
    trained = module.main([*options, "--episodes", "3", "--folder", str(folder)])
    output = capsys.readouterr().out
    assert output.startswith("episodes 1 to 3: mean return -")
    policy = Policy.load(folder)
    assert policy.actor.steps == 2 and policy.config.action_high == (2.0,)
    result = evaluate(policy, policy.config.task, 3, seed=1000)
    assert f"return {result.mean:.0f} ± {result.std:.0f} over 3 episodes of Pendulum-v1" in output
    for name, weight in trained.actor.state_dict().items():
        assert torch.equal(policy.actor.state_dict()[name], weight)
    with pytest.raises(SystemExit, match="is there already: name another folder"):
        module.main(["--folder", str(folder)])

    module = load("distil", monkeypatch)
    few = ["--rounds", "2", "--steps", "200", "--episodes", "3", "--batch-size", "64"]
    options = ["--checkpoint", str(folder), *few, "--updates", "300"]
    pupil = module.main([*options, "--folder", str(tmp_path / "pupil")])
    output = capsys.readouterr().out
    assert (
        "teacher: return -" in output and "pupil: return -" in output and output.endswith("sampled, 1 step\n")
    )
    assert pupil.actor.steps == Policy.load(tmp_path / "pupil").actor.steps == 1
    # it does what the teacher does
    observations = module.visit(policy, policy.config.task, 300, 7)
    z = torch.randn(300, 1)
    states = torch.from_numpy(observations)
    target = policy.actor.sample(states, noise=torch.stack([z, torch.zeros(300, 1)]))
    error = (pupil.actor.sample(states, noise=z[None]) - target).square().mean()
    assert error < 0.2 * (target - target.mean()).square().mean()

    # by the candidates' rule and DDPG's term, its own values are higher
    options = ["--checkpoint", str(folder), *few, "--updates", "100", "--hidden", "32", "32"]
    by_value = [module.main([*options, "--candidates", "8", "--eta", eta]) for eta in ("0", "30")]
    assert policy.critic is not None
    values = [policy.critic(states, p.actor.sample(states, noise=z[None])).mean() for p in by_value]
    assert values[1] > values[0]
    assert "8 candidates ranked by Q" in capsys.readouterr().out
    assert by_value[0].candidates == 1 and by_value[0].actor.config.hidden == (32, 32)


def test_override(monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint that is held and the bounds are asserted on the way, in the example itself."""
    module = load("override", monkeypatch)
    arm = module.Arm()
    check_env(arm, skip_render_check=True)
    arm.reset(seed=1)
    jacobian, hand = arm.jacobian(), arm.hand()
    for joint in range(4):
        arm.angles[joint] += 1e-6
        np.testing.assert_allclose((arm.hand() - hand) / 1e-6, jacobian[:, joint], atol=1e-4)
        arm.angles[joint] -= 1e-6
    assert set(module.main(["--rows", "800", "--updates", "20", "--arms", "5"])) == {
        "free",
        "pasted",
        "edited",
    }


@pytest.mark.slow
def test_the_page_on_other_agents_does_what_it_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (EXAMPLES.parent / "docs" / "elsewhere.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/elsewhere.md", "exec"), names)
    assert (tmp_path / "td3-pendulum.zip").exists()
    assert (
        "pendulum-replay (stable-baselines3): 500 transitions, 2 complete episodes" in capsys.readouterr().out
    )
    assert torch.isfinite(names["metrics"]["actor/loss"])
    assert len(names["buffer"]) == 400 and names["found"]["loss_imitation"] > 0
