"""What the docs say was measured is what was measured."""

from __future__ import annotations

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
RESULTS = runpy.run_path(str(ROOT / "scripts" / "measure" / "results.py"))


def test_the_table_in_the_docs_is_that_of_the_kept_results() -> None:
    assert RESULTS["table"]() in (ROOT / "docs" / "results.md").read_text()


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


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Keep a finished run in a folder of its own: the run of a result that is kept, with some changes."""
    monkeypatch.setitem(RESULTS["keep"].__globals__, "FOLDER", tmp_path)
    kept = json.loads((ROOT / "benchmarks" / "results" / "hopper-medium-cpql-seed0.json").read_text())

    def run(eta: float = 2.0, **changes: Any) -> Path:
        resolved, curve = dict(kept["configuration"]), kept["curve_of_step_episodes_score"]
        resolved |= {"run_dir": "run", "agent": resolved["agent"] | {"eta": eta}}
        result = {k: v for k, v in kept.items() if k not in ("configuration", "curve_of_step_episodes_score")}
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        (folder / "evaluations").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
        (folder / "result.json").write_text(json.dumps(result | changes))
        for step, episodes, score in curve:
            content = {"step": step, "episodes": episodes, "score": score}
            (folder / "evaluations" / f"step_{step:08d}.json").write_text(json.dumps(content))
        RESULTS["keep"](Namespace(runs=[folder]))
        return tmp_path / "results"

    return run


def test_a_kept_result_is_not_overwritten_by_another_run(keep: Any) -> None:
    folder = keep()
    file = folder / "hopper-medium-cpql-seed0.json"
    before = file.read_bytes()
    assert before == (ROOT / "benchmarks" / "results" / file.name).read_bytes()
    keep()  # the same once more
    for changes, what in (
        ({"eta": 0.5}, r"\(configuration.agent.eta is 2.0 there, 0.5 here\)"),
        ({"return_mean": 1.0}, r"\(only figures differ\)"),
    ):
        with pytest.raises(SystemExit, match=rf"{file.name} is another run's {what}: remove that one first"):
            keep(**changes)
    assert file.read_bytes() == before and [path.name for path in folder.iterdir()] == [file.name]


def test_a_kept_result_has_the_name_of_its_configuration(keep: Any) -> None:
    keep()
    folder = keep(agent="recommended", algorithm="cpql", eta=0.35)
    assert {path.name for path in folder.iterdir()} == {
        "hopper-medium-cpql-seed0.json",
        "hopper-medium-recommended-seed0.json",
    }
    rows = [line.split(" | ")[1] for line in RESULTS["table"]().splitlines()[2:]]
    assert rows == ["`cpql`", "`recommended`"]


def test_a_result_without_a_score_is_not_kept(keep: Any) -> None:
    with pytest.raises(SystemExit, match=r"result.json: has no score: expected a result with reference"):
        keep(score=None)
