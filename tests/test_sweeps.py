"""Runs that go on: a folder that knows its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from trainings import run, write_dataset

from cpql import configuration
from cpql.errors import CheckpointError
from cpql.tasks import config_folder
from cpql.train.config import TrainConfig

LITTLE = (
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


def settings(*words: str) -> TrainConfig:
    """The run of a command."""
    configuration.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", [*words, "configuration=x"])
    (config,) = configuration.members(content, [word.partition("=")[0] for word in words])
    return config


def test_a_run_s_folder_knows_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.hdf5")
    words = ("env=hopper-expert", "agent=td3_bc", "seed=3", "agent.critic_lr=1e-3", "run_dir=run", *LITTLE)
    begun = settings(*words, "resume=auto")
    with pytest.raises(CheckpointError, match="run holds no run to resume"):
        run(replace(begun, resume=True))
    assert run(begun)[0]["step"] == 8
    with pytest.raises(CheckpointError, match="already holds a run: continue it with resume=true"):
        run(replace(begun, resume=False))
    for resume in (True, "auto"):
        alone = settings("run_dir=run", f"resume={str(resume).lower()}")
        assert alone == replace(begun, resume=resume) and run(alone)[0]["step"] == 8
    longer = settings("run_dir=run", "resume=true", "budget.updates=12", "threads=2")
    assert longer.threads == 2 and longer.budget == replace(begun.budget, updates=12)
    assert run(longer)[0]["step"] == 12
    for word, message in (
        ("seed=4", "seed=3, not 4"),
        ("agent=cpql", "agent.name=td3_bc, not cpql"),
        ("agent.critic_lr=2e-3", "agent.critic_lr=0.001, not 0.002"),
        ("preset=quick", "agent.name=td3_bc, not cpql"),  # the default one with it
        ("env=hopper-medium", "env.name=hopper-expert, not hopper-medium"),
        ("dataset.seed=1", "dataset.seed=0, not 1"),
        ("mode=online", "online=None, not"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(settings("run_dir=run", "resume=true", word))
