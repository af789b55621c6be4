"""The published agents against what the papers' own codes found: 20 updates from the same numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
from measure.parity import CASES, figures, ours, settings, table  # noqa: E402

ROWS = json.loads((ROOT / "benchmarks" / "parity.json").read_text())["rows"]
CLOSE = 1e-8


@pytest.fixture(scope="module", autouse=True)
def composed() -> None:
    """The first configuration takes Hydra a second, which is no test's own."""
    settings(CASES["cpql"])


def test_every_case_was_measured_and_agreed() -> None:
    assert {row["case"] for row in ROWS} == set(CASES)
    assert max(row["losses"] for row in ROWS) < CLOSE and max(row["weights"] for row in ROWS) < CLOSE
    assert table(ROWS) in (ROOT / "docs" / "published.md").read_text()


@pytest.mark.parametrize("row", [row for row in ROWS if "theirs" in row], ids=lambda row: row["case"])
def test_published_agents_are_the_codes(row: dict[str, Any]) -> None:
    found = figures(ours(CASES[row["case"]], row["width"]))
    assert found.keys() == row["theirs"].keys()
    for name, numbers in row["theirs"].items():
        assert found[name] == pytest.approx(numbers, rel=CLOSE, abs=CLOSE), name
