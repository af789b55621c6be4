"""The house is in order: floors, lengths, style and types."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A file imports from its own floor and those below.
FLOORS = (
    ("errors", "io", "device", "settings", "noise", "migration"),
    ("consistency", "networks", "optimisation", "critics", "tasks", "environments"),
    ("actors", "data"),
    ("agents",),
    ("deploy",),
    ("training",),
    ("experiments", "interop"),
    ("configuration", "commands", "api", "job", "sweep", "cli", "data_cli", "results_cli", "report_cli"),
)
LONGEST = 400


def imports() -> dict[str, set[str]]:
    """What each module of cpql imports of cpql, in functions and for type checking too."""
    paths = {path.relative_to(ROOT).with_suffix("").parts: path for path in (ROOT / "cpql").rglob("*.py")}
    modules = {".".join(parts).removesuffix(".__init__"): path for parts, path in paths.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert not node.level, f"{module}: expected absolute imports"
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                names |= {name if name in modules else node.module for name in inner}
        found[module] = names & modules.keys()
    return found


def test_nothing_imports_upwards_or_in_circles() -> None:
    floor = {f"cpql.{name}": level for level, names in enumerate(FLOORS) for name in names}
    found = imports()
    del found["cpql"]  # the public names, from everywhere
    levels = {module: floor[".".join(module.split(".")[:2])] for module in found}
    upwards = [
        (module, name) for module, names in found.items() for name in names if levels[name] > levels[module]
    ]
    assert not upwards
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / "cpql").rglob("*.py")
    }
    assert not {file: length for file, length in lengths.items() if length > LONGEST}


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        pytest.param(["mypy"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_style_and_types(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
