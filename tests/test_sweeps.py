"""Sweeps, and runs that go on: each is finished once, and none takes another along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from trainings import run, write_dataset

from cpql import cli, configuration
from cpql.errors import CheckpointError, Interrupted
from cpql.tasks import config_folder
from cpql.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LITTLE = (
    "agent=td3_bc",
    "budget.updates=8",
    "budget.log_every=4",
    "budget.save_every=4",
    "budget.final_episodes=2",
    "budget.episode_limit=20",
    "agent.actor.hidden=[8,8]",
    "agent.critic_hidden=[8,8]",
    "agent.batch_size=8",
    "dataset.path=data.hdf5",
    "compile=false",
)

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Train:
    """Run cpql-train in this process, in a folder that has a dataset; gives its exit code and its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    write_dataset(tmp_path / "data.hdf5")

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cpql-train", *words])
        capfd.readouterr()
        code: Any = 0
        try:
            cli.train()
        except SystemExit as end:
            code = end.code
        done = capfd.readouterr()
        return code, done.out + done.err

    return call


def settings(*words: str) -> TrainConfig:
    """The run of a command."""
    configuration.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", [*words, "configuration=x"])
    (config,) = configuration.members(content, [word.partition("=")[0] for word in words])
    return config


def finished(folder: Path) -> dict[str, int]:
    """When each run of a folder was finished, in nanoseconds."""
    files = folder.rglob("result.json")
    return {str(file.parent.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def states(text: str) -> dict[str, list[str]]:
    """The cells of the table at a sweep's end."""
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    return {run: rest for run, *rest in cells}


@pytest.mark.slow
def test_a_run_s_folder_knows_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.hdf5")
    begun = settings(
        *LITTLE, "env=hopper-expert", "seed=3", "agent.critic_lr=1e-3", "run_dir=run", "resume=auto"
    )
    with pytest.raises(CheckpointError, match="run holds no run to resume"):
        run(replace(begun, resume=True))
    assert run(begun)[0]["step"] == 8
    with pytest.raises(CheckpointError, match="already holds a run: continue it with resume=true"):
        run(replace(begun, resume=False))
    alone = settings("run_dir=run", "resume=true")
    assert alone == replace(begun, resume=True) and run(alone)[0]["step"] == 8
    longer = settings("run_dir=run", "resume=auto", "budget.updates=12", "threads=2")
    assert longer.threads == 2 and longer.budget == replace(begun.budget, updates=12)
    assert run(longer)[0]["step"] == 12
    for words, message in (
        (("seed=4", "agent.critic_lr=2e-3"), "agent.critic_lr=0.001, not 0.002"),
        (("seed=4",), "seed=3, not 4"),
        (("agent=cpql",), "agent.name=td3_bc, not cpql"),
        (("env=hopper-medium", "dataset.seed=1"), "env.name=hopper-expert, not hopper-medium"),
        (("mode=online",), "online=None, not"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(settings("run_dir=run", "resume=true", *words))


@pytest.mark.slow
def test_a_sweep_goes_on_and_a_failure_takes_no_other_along(train: Train, tmp_path: Path) -> None:
    words = ("--multirun", *LITTLE, "dataset.path=more.hdf5,data.hdf5", "budget.final_episodes=1")
    code, text = train(*words, "budget.updates=4")
    more, data = (
        f"runs/hopper-medium/td3_bc/full/seed0-dataset.path-{name}.hdf5" for name in ("more", "data")
    )
    before = finished(tmp_path)
    assert code == 1 and before.keys() == {data} and "2 runs: 1 finished, 1 failed" in text
    state, score, reason = states(text)[more]
    assert (state, score) == ("failed", "") and "more.hdf5" in reason

    write_dataset(tmp_path / "more.hdf5")
    code, text = train(*words, "budget.updates=4")
    assert code == 0 and "2 runs: 1 finished, 1 skipped as they were finished before" in text
    again = finished(tmp_path)
    assert again.keys() == {data, more} and again[data] == before[data]

    code, text = train(*words)
    assert code == 0 and "2 runs: 2 resumed and finished" in text
    score = json.loads((tmp_path / data / "result.json").read_text())["score"]
    assert states(text)[data] == ["resumed", f"{score:.1f}", ""]
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_what_ends_a_job(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug and damage end their own job, Ctrl-C all that come after it; a sweeper gets the other's score."""
    ends: dict[int, Any] = {0: RuntimeError("out of memory"), 2: Interrupted("stopped after 3 updates")}
    returned: list[float | None] = []
    from cpql import job

    call = job.Job.__call__

    def train_group(configs: list[TrainConfig], console: object) -> list[dict[str, Any]]:
        if configs[0].seed in ends:
            raise ends[configs[0].seed]
        return [run(configs[0])[0]]

    def called(self: job.Job, content: Any) -> float | None:
        returned.append(call(self, content))
        return returned[-1]

    monkeypatch.setattr(job, "train_group", train_group)
    monkeypatch.setattr(job.Job, "__call__", called)
    code, text = train("--multirun", *LITTLE, "seed=0,1,2,3", "run_dir=out")
    assert code == 130 and "RuntimeError: out of memory" in text
    table = states(text)
    assert [row[0] for row in table.values()] == ["failed", "finished", "stopped", "not started"]
    assert list(table) == [f"out-seed{seed}" for seed in range(4)]
    score = json.loads((tmp_path / "out-seed1" / "result.json").read_text())["score"]
    assert returned == [None, score, None, None]
    assert "the same command goes on with those that aren't finished" in text


@pytest.mark.slow
def test_what_a_sweep_refuses(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before the first job."""
    monkeypatch.setitem(sys.modules, "hydra_plugins", None)
    for words, message in (
        (("launcher=joblib",), "launcher=joblib: expected --multirun with it"),
        (("-m", "launcher=ray"), "launcher=ray needs a package: pip install 'cpql[ray]'"),
        (("-m", "launcher=condor"), "launcher=condor does not exist: choose from basic, joblib, ray"),
        (
            ("-m", "env=hopper-medium,hopper-medum"),
            "env=hopper-medum does not exist: did you mean hopper-medium",
        ),
        (("-m", "agent.eta=0.5,-1"), "eta: Input should be greater than or equal to 0, found -1"),
        (("-m", "seed=0,1", "agent.etta=1"), "unknown setting 'agent.etta': did you mean agent.eta"),
        (("-m", "agent.eta=1,1.0", "run_dir=a,a"), "two jobs have the folder a-eta1"),
        (("-m", "seed"), "'seed': expected KEY=VALUE"),
    ):
        code, text = train(*words, "dataset.path=data.hdf5")
        assert code == 1 and text.count("\n") == 1 and message in text, text
    assert not (tmp_path / "runs").exists()

    same = ("-m", *LITTLE, "seed=0,1", "hydra.sweep.dir=sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra.main", lambda **_: lambda _: lambda: seen.append(train(*same)))
        seen: list[tuple[int, str]] = []
        train(*same)
    assert seen[0][0] == 1 and "this sweep is going on already, in process" in seen[0][1]


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (
            ("env=glob(hopper-medium-*)",),
            ("hopper-medium-expert/cpql/full/seed0", "hopper-medium-replay/cpql/full/seed0"),
        ),
        (
            ("agent.eta=0.5,1", "seeds=[3]"),
            ("hopper-medium/cpql/full/seed3-eta0.5", "hopper-medium/cpql/full/seed3-eta1"),
        ),
        (
            ("mode=online", "env.id=Pendulum-v1,Hopper-v4"),
            ("Pendulum-v1/cpql_online/online/seed0", "Hopper-v4/cpql_online/online/seed0"),
        ),
        (("run_dir='runs/${seed}'", "seed=range(1,3)", "dataset=d4rl"), ("1", "2")),
        (("run_dir=runs/x", "agent=cpql,iql", "budget=quick"), ("x-agent-cpql", "x-agent-iql")),
    ],
)
def test_folders(words: tuple[str, ...], folders: tuple[str, ...]) -> None:
    from cpql.sweep import _plan

    configuration.register()
    jobs, _, _ = _plan(words, every=True)
    assert [config.run_dir for job in jobs for config in job] == [f"runs/{folder}" for folder in folders]


def test_a_mark_needs_no_quotes() -> None:
    from cpql.job import _mark

    for key, value, mark in (
        ("eta", "0.5", "eta0.5"),
        ("alpha", "-1e-3", "alpha-1e-3"),
        ("dataset", "minari", "dataset-minari"),
        ("actor.hidden", "[16,16]", "actor.hidden-16-16"),
        ("dataset.path", "'/data/my file.hdf5'", "dataset.path-data-my-file.hdf5"),
    ):
        assert _mark(key, value) == mark


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "plugin", "seeds"),
    [
        ("joblib", "hydra_joblib_launcher", (0, 1)),
        ("submitit_local", "hydra_submitit_launcher", (0,)),
        ("ray", "hydra_ray_launcher", (0,)),
    ],
)
def test_launchers(launcher: str, plugin: str, seeds: tuple[int, ...], tmp_path: Path) -> None:
    """As a command, since they start processes of their own."""
    pytest.importorskip(f"hydra_plugins.{plugin}")
    write_dataset(tmp_path / "data.hdf5")
    words = (*LITTLE, f"seed={','.join(map(str, seeds))}", f"launcher={launcher}")
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--multirun", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f": {len(seeds)} finished" in done.stdout
    folders = {f"runs/hopper-medium/td3_bc/full/seed{seed}" for seed in seeds}
    assert finished(tmp_path).keys() == folders == {*states(done.stdout)}


def test_example_files() -> None:
    """Their words are a command's, and their placeholders the ones that they are filled in by."""
    sky = yaml.safe_load((EXAMPLES / "sky.yaml").read_text())
    assert settings(*sky["envs"]["WORDS"].split()[:2]).resume is False and "resume=auto" in sky["run"]
    sweep = yaml.safe_load((EXAMPLES / "wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists()
    _, _, *words, rest = sweep["command"]
    given = [f"{key}={rule.get('values', [1])[0]}" for key, rule in sweep["parameters"].items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_RUN_ID", "abc")
        config = settings(*words, *given)
    assert rest == "${args_no_hyphens}" and config.run_dir == "runs/wandb/abc" and config.resume == "auto"
    assert config.agent["eta"] == 1 and config.agent["actor"]["t_max"] == 5


@pytest.mark.parametrize("code", [0, 1, 130])
def test_a_slurm_job_is_requeued_when_it_was_stopped(code: int, tmp_path: Path) -> None:
    """With stand-ins for the training and for Slurm, which sends the script SIGTERM."""
    training = f'echo "$@" > words; touch begun; trap "exit 130" TERM; [ {code} = 130 ] || exit {code}\n'
    for name, text in {
        "cpql-train": training + "sleep 20 & wait\n",
        "scontrol": 'echo "$@" > requeued\n',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_JOB_ID": "77",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = subprocess.Popen(
        ["bash", str(EXAMPLES / "slurm.sh"), "env=hopper"], cwd=tmp_path, env={**os.environ, **slurm}
    )
    if code == 130:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == code
    assert (tmp_path / "words").read_text() == "env=hopper seed=3 resume=auto\n"
    requeued = tmp_path / "requeued"
    assert requeued.read_text() == "requeue 77_3\n" if code == 130 else not requeued.exists()
