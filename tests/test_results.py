"""What the README says was measured is what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCHMARK = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))


def test_the_table_in_the_readme_is_that_of_the_kept_results() -> None:
    assert BENCHMARK["table"]() in (ROOT / "README.md").read_text()


def test_kept_results_say_what_they_depend_on() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        text = file.read_text()
        result = json.loads(text)
        assert result["checkpoint"] == "last" and len(result["returns"]) == result["episodes"] >= 20
        assert result["step"] == result["configuration"]["budget"]["updates"] >= 50_000
        assert result["data"]["source"] == "embedded" and result["data"]["sha256"]
        assert {"torch", "gymnasium", "mujoco"} <= set(result["versions"])
        assert result["training_seed"] == result["configuration"]["seed"]
        assert '"/' not in text  # no path of the machine it ran on
