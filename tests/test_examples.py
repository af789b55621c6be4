"""The examples run."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


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


def test_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few updates make no digits, but what is given is kept, and all files are there."""
    digits = load("digits", monkeypatch)
    scores = digits.main(["--updates", "20", "--out", str(tmp_path)])
    assert scores["inpainting"]["error_of_known_pixels"] == 0.0
    assert scores["super_resolution"]["error_of_known_means"] < 1e-5
    assert scores == json.loads((tmp_path / "scores.json").read_text())
    names = ("samples", "inpainting", "super_resolution", "interpolation")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5_000 for name in names)


def test_td3_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("td3_actor", monkeypatch)
    returns = module.train(steps=600, warm_up=300, batch_size=16)
    assert len(returns) == 3
    assert np.isfinite(returns).all()
