"""What the README says was measured is what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
BENCHMARK = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))


def test_the_table_in_the_readme_is_that_of_the_kept_results() -> None:
    assert BENCHMARK["table"]() in (ROOT / "README.md").read_text()


def test_the_tables_in_the_docs_are_those_of_the_kept_runs_of_each_objective() -> None:
    measure = runpy.run_path(str(ROOT / "scripts" / "measure" / "objectives.py"))
    rows = json.loads((ROOT / "benchmarks" / "objectives.json").read_text())["runs"]
    tables = measure["tables"](rows)
    assert list(tables) == ["cpql, 8,000 updates", "cpql, 50,000 updates"]
    for table in tables.values():
        assert table in (ROOT / "docs" / "consistency.md").read_text()


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
