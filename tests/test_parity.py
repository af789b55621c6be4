"""The published agents and baselines against what their codes found: 20 updates from the same numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
from measure import baselines, parity  # noqa: E402

RESULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "published": ("parity", parity.CASES),
    "baselines": ("baselines", baselines.CASES),
}
CLOSE = 1e-8
# Its own code doesn't halve the critics' loss, so that Adam's epsilon is half as large beside the gradient.
CLOSER_NOT = {"iql": 1e-5, "iql, antmaze": 1e-5}


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["rows"]
    return found


KEPT = [
    (cases[row["case"]], row) for name, cases in RESULTS.values() for row in rows(name) if "theirs" in row
]


@pytest.fixture(scope="module", autouse=True)
def composed() -> None:
    """The first configuration takes Hydra a second, which is no test's own."""
    parity.settings(parity.CASES["cpql"])


@pytest.mark.parametrize("document", RESULTS)
def test_every_case_was_measured_and_agreed(document: str) -> None:
    name, cases = RESULTS[document]
    assert {row["case"] for row in rows(name)} == set(cases)
    for row in rows(name):
        assert max(row["losses"], row["weights"]) < CLOSER_NOT.get(row["case"], CLOSE), row["case"]
    assert parity.table(rows(name)) in (ROOT / "docs" / f"{document}.md").read_text()


@pytest.mark.parametrize(("case", "row"), KEPT, ids=[row["case"] for _, row in KEPT])
def test_our_half_again(case: Any, row: dict[str, Any]) -> None:
    found = parity.figures(parity.ours(case, row["width"]))
    close = CLOSER_NOT.get(row["case"], CLOSE)
    assert found.keys() == row["theirs"].keys()
    for name, numbers in row["theirs"].items():
        assert found[name] == pytest.approx(numbers, rel=close, abs=close), name
