"""The commands as a person types them."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import yaml

from cpql import configuration
from cpql.data import d4rl

ROOT = Path(__file__).parent.parent
QUICK = (
    "budget=quick",
    "budget.updates=30",
    "budget.log_every=10",
    "budget.evaluate_every=30",
    "budget.save_every=30",
    "budget.final_episodes=2",
    "agent.actor.hidden=[16,16]",
    "agent.critic_hidden=[16,16]",
    "agent.batch_size=8",
    "compile=false",
)


def run(
    script: str, *words: str, folder: Path, clone: Path = ROOT, stdout: int | IO[str] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run a script of a clone without a terminal, a home with anything in it, git, or a network."""
    home = folder / "home"
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": str(home),
        "PYTHONPATH": str(clone),
        "PYTHONDONTWRITEBYTECODE": "1",
        "http_proxy": "http://127.0.0.1:9/",  # a world without D4RL's host and its mirror
        "https_proxy": "http://127.0.0.1:9/",
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("D4RL_DATASET_DIR", None)
    environment.pop("CPQL_CACHE", None)
    return subprocess.run(
        [sys.executable, str(clone / "scripts" / script), *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )


def left(folder: Path) -> set[str]:
    """What a command left behind, in its folder and in the home."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "home"}


@pytest.mark.parametrize(
    ("script", "word", "message"),
    [
        ("train.py", "env=hopper-medum", "env=hopper-medum does not exist: did you mean hopper-medium"),
        ("evaluate.py", "chekpoint=.", "unknown setting 'chekpoint': did you mean checkpoint"),
        ("export.py", "checkpoint=nowhere", "nowhere: does not exist"),
    ],
)
def test_an_error_at_a_shell(script: str, word: str, message: str, tmp_path: Path) -> None:
    """One of each command's; tests/test_settings.py has the others, in this process."""
    done = run(script, word, folder=tmp_path)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert not left(tmp_path)


@pytest.mark.slow
def test_learning_online(tmp_path: Path) -> None:
    little = (
        "agent.actor.hidden=[16,16]",
        "agent.critic_hidden=[16,16]",
        "agent.batch_size=8",
        "compile=false",
    )
    words = (
        "env.id=Pendulum-v1",
        "budget.updates=20",
        "budget.final_episodes=2",
        "online.start_steps=250",
        *little,
    )
    done = run("train.py", "mode=online", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "over 2 episodes of Pendulum-v1" in done.stdout
    folder = tmp_path / "runs" / "Pendulum-v1" / "cpql_online" / "online" / "seed0"
    assert json.loads((folder / "result.json").read_text())["data"]["details"]["steps"] == 270
    scored = run("evaluate.py", f"checkpoint={folder}", "episodes=2", folder=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert "without reference scores" in scored.stdout


@pytest.mark.slow
def test_train_from_an_empty_home_then_evaluate_then_resume(tmp_path: Path) -> None:
    """The main job, small: collects data by itself and says so, trains, scores and saves.

    Nothing is written into the clone: it may be read-only.
    """
    clone = tmp_path / "clone"
    for part in ("cpql", "configs", "scripts"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.stat().st_mtime_ns for path in clone.rglob("*")}
    words = ("env=hopper-medium", *QUICK, "dataset.size=2000", "run_dir=run")
    done = run("train.py", *words, folder=tmp_path, clone=clone)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in clone.rglob("*")} == before
    assert "not D4RL" in done.stdout
    assert "score" in done.stdout and "behaviour" in done.stdout and "random 0.0" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["data"]["source"] == "embedded"
    assert result["behaviour_score"] > 20
    assert "published" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["agent"]

    again = run("train.py", *words, folder=tmp_path)
    assert again.returncode == 1
    assert "already holds a run" in again.stderr
    resumed = run("train.py", *words, "resume=true", folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr

    fast = ("compile=false", "budget.updates=6", "budget.evaluate_every=6", "budget.save_every=6",
            "budget.episodes=2", "budget.final_episodes=2", "online.start_steps=20")  # fmt: skip
    tuned = run("train.py", "mode=finetune", "checkpoint=run", "agent.eta=0.3", *fast, folder=tmp_path)
    assert tuned.returncode == 0, tuned.stderr
    assert "embedded + online hopper-medium" in tuned.stdout
    kept = yaml.safe_load((tmp_path / "run-finetune" / "config.yaml").read_text())
    before = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["agent"] == before["agent"] | {"eta": 0.3} and kept["dataset"] == before["dataset"]
    refused = run("train.py", "mode=finetune", "checkpoint=run", "agent=cpiql", folder=tmp_path)
    assert refused.returncode == 1 and "the agent is that of checkpoint=run" in refused.stderr

    scored = run("evaluate.py", "checkpoint=run", "episodes=2", "candidates=5", folder=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert "5 candidates ranked by Q, temperature 1" in scored.stdout
    content = json.loads(Path(scored.stdout.strip().splitlines()[-1]).read_text())
    assert content["episodes"] == 2
    assert content["policy"]["data"]["source"] == "embedded"
    assert content["references"] == {"of": "D4RL", "random": -20.272305, "expert": 3234.3}


@pytest.mark.slow
def test_loggers_without_an_account(tmp_path: Path) -> None:
    """Both at once."""
    random = np.random.default_rng(0)
    arrays = {
        "observations": random.normal(size=(60, 11)),
        "actions": random.uniform(-1, 1, size=(60, 3)),
        "rewards": random.normal(size=60),
        "terminals": np.arange(1, 61) % 20 == 0,
        "timeouts": np.zeros(60, bool),
    }
    d4rl.write(tmp_path / "data.hdf5", arrays, {})
    words = (
        *QUICK,
        "dataset.path=data.hdf5",
        "logger=[wandb,tensorboard]",
        "run_dir=run",
        "wandb.group=mine",
    )
    done = run("train.py", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    written = [p.name for p in (tmp_path / "run").rglob("*")]
    assert any("tfevents" in n for n in written) and any(n.endswith(".wandb") for n in written), written


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "export.py"])
def test_help(script: str, tmp_path: Path) -> None:
    done = run(script, "--help", folder=tmp_path)
    assert done.returncode == 0
    assert f"python scripts/{script}" in done.stdout
    assert "time_width" not in done.stdout and "${" not in done.stdout
    assert "Powered by" not in done.stdout
    assert not left(tmp_path)


def test_data_and_an_environment_of_ones_own_need_two_words() -> None:
    """A task that is named, or continued, keeps its own settings."""
    own = ["dataset.path=mine.npz", "env.id=Pendulum-v1"]
    assert configuration.prepared(own) == ["env=gymnasium", *own]
    for words in (
        [*own, "env=hopper-medium"],
        [own[0], "env.id=null"],
        [*own, "checkpoint=runs/x"],
        own[1:],
    ):
        assert configuration.prepared(words) == words


def test_a_chosen_objective_goes_without_the_settings_that_it_hasnt() -> None:
    """Consistency-AC's are `ct`'s: `ect` has both, `meanflow` neither; what the command says stays."""
    chosen, options = "agent.actor.objective", "agent.actor.objective_options"
    own = {"weight": "interval", "scale": 100.0}
    for overrides, objective, left in (
        ([], "meanflow", own),
        ([chosen], "ct", own),
        ([chosen], "ect", own),
        ([chosen], "meanflow", {}),
        ([chosen, f"{options}.weight"], "meanflow", {"weight": "interval"}),
        ([chosen, options], "meanflow", own),
    ):
        actor = {"objective": objective, "objective_options": dict(own)}
        agent: dict[str, Any] = {"name": "consistency_ac", "actor": actor}
        configuration._drop_inapplicable(agent, overrides)
        assert agent["actor"]["objective_options"] == left


@pytest.mark.slow
@pytest.mark.parametrize(("script", "word"), [("train.py", "--help"), ("data.py", "list")])
def test_standard_output_that_takes_nothing(script: str, word: str, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = run(script, word, folder=tmp_path, stdout=full)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr


def test_minari_and_wandb_come_along_and_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, cpql.cli, cpql.data_cli, cpql.training.loop; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "torch" in loaded and not {"minari", "wandb"} & set(loaded)
    asked: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", asked.update)
    runpy.run_path("setup.py")
    names = {re.split(r"[\[<>=~]", requirement)[0] for requirement in asked["install_requires"]}
    assert {"minari", "wandb"} <= names and not {"minari", "wandb"} & asked["extras_require"].keys()
