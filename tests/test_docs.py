"""The documentation: it builds without a warning, its commands are accepted, its code runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainings
from test_api import LITTLE

from cpql import data_cli, results_cli
from cpql.configuration import check_words, prepared, register

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STANDS_FOR = {
    "TASK": "hopper-medium",
    "AGENT": "cpql",
    "NAME": "hopper-medium",
    "SEED": "0",
    "RUN": "runs/run",
    "ID": "mujoco/hopper/medium-v0",
    "FILE": "mine.hdf5",
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one of these languages, a pattern."""
    return re.findall(rf"^```(?:{language})\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of each of our commands on a page, with placeholders filled in."""
    found = []
    for block in blocks(page, "sh|"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if re.match(r"(python scripts/\w+\.py|cpql-\w+) ", part):
                    words = shlex.split(part, comments=True)
                    known = r"\b(" + "|".join(STANDS_FOR) + r")\b"
                    filled = [re.sub(known, lambda m: STANDS_FOR[m[0]], word) for word in words]
                    found.append([word for word in filled if word != "..."])
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPQL_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_commands_are_accepted() -> None:
    """Every setting and option exists; what the commands do is tested where it is made."""
    register()
    checked = set()
    for page in PAGES:
        for program, *words in commands(page):
            script = words.pop(0) if program == "python" else program
            name = re.sub(r"scripts/|\.py|cpql-", "", script)
            where = f"{page.name}: {name} {' '.join(words)}"
            try:
                if name == "train":
                    check_words(name, prepared(words))
                elif name in ("data", "results"):
                    {"data": data_cli, "results": results_cli}[name]._parser().parse_args(words)
                else:
                    assert (ROOT / "scripts" / f"{name}.py").exists()
            except (Exception, SystemExit) as error:
                raise AssertionError(where) from error
            checked.add(name)
    assert checked >= {"train", "data", "results", "evaluate", "export", "benchmark"}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-qW", str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference.html").read_text()
    assert "cpql.api.train" in page and "ConsistencyActor" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_tutorial(tmp_path: Path) -> None:
    """Its code as it stands, but for little data and few updates."""
    trainings.write_dataset(tmp_path / "mine.hdf5")
    (episodes,) = [code for code in blocks(ROOT / "docs" / "data.md", "python") if "Pendulum" in code]
    exec(episodes.replace("2_000", "400"), {})
    here: dict[str, Any] = {"observation": np.zeros(11)}
    calls = {
        'train("hopper-medium", "td3_bc", updates=5_000, seed=0, settings={"budget": "quick"})': (
            f'train("mine.hdf5", "td3_bc", env="hopper-medium", updates=20, settings={LITTLE})'
        ),
        'train("mine.npz", env="Pendulum-v1", updates=20_000)': (
            f'train("mine.npz", "td3_bc", env="Pendulum-v1", updates=20, settings={LITTLE})'
        ),
        "episodes=20": "episodes=2, episode_limit=10",
    }
    code = "\n".join(blocks(ROOT / "docs" / "tutorial.md", "python"))
    for call, little in calls.items():
        assert call in code
        code = code.replace(call, little)
    exec(code, here)
    assert here["run"].result["environment"] == "Pendulum-v1" and here["metrics"]["actor/loss"] > 0
