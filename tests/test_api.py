"""Training from Python: the command line's runs, in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainings
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from cpql.agents import CPQLConfig
from cpql.api import TrainedRun, train, train_members
from cpql.configuration import value_text
from cpql.data import files
from cpql.errors import CheckpointError, ConfigError, DataError
from cpql.tasks import config_folder

EXAMPLES = Path(__file__).parent.parent / "examples"
LITTLE = {
    "agent.actor.hidden": [16, 16],
    "agent.critic_hidden": [16, 16],
    "agent.batch_size": 8,
    "budget.log_every": 20,
    "budget.final_episodes": 2,
    "budget.episode_limit": 20,
    "compile": False,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPQL_CACHE", str(tmp_path / "cache"))
    trainings.write_dataset(tmp_path / "mine.hdf5")


def test_a_run_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[int, dict[str, float]]] = []
    run = train(
        "mine.hdf5",
        env="hopper-medium",
        updates=40,
        seed=3,
        settings=LITTLE,
        callback=lambda step, metrics: heard.append((step, metrics)),
    )
    assert run.folder == Path("runs/hopper-medium/recommended/full/seed3")
    assert run.metrics["step"] == [20, 40] and len(run.metrics["critic/q"]) == 2
    assert [step for step, _ in heard] == [20, 40, 40]
    assert heard[0][1]["critic/q"] == run.metrics["critic/q"][0]
    assert (
        heard[-1][1]["evaluation/score"] == run.score == run.result["score"] == run.evaluations[-1]["score"]
    )
    assert run.policy.predict(np.zeros(11))[0].shape == (3,)
    assert len(run.evaluate(3, episode_limit=5).returns) == 3
    assert run.plot().png().startswith(b"\x89PNG")
    assert "TrainedRun('runs/hopper-medium" in repr(run) and "score" in repr(run)

    capsys.readouterr()
    again = train("mine.hdf5", env="hopper-medium", updates=40, seed=3, settings=LITTLE)
    assert again.result == run.result and "training" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"started with agent.eta=0.35, not 0.5"):
        train("mine.hdf5", env="hopper-medium", updates=40, seed=3, settings={**LITTLE, "agent.eta": 0.5})


def test_the_defaults_are_those_of_the_command_line() -> None:
    """What the paper's code sets for a task comes from the same table."""
    run = train("mine.hdf5", "cpql", env="hopper-medium-expert", updates=20, settings=LITTLE)
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    table = yaml.safe_load((config_folder() / "published/cpql.yaml").read_text())
    assert written["agent"]["eta"] == table["hopper-medium-expert"]["eta"] != CPQLConfig().eta
    assert written["configuration"] == "cpql"


def test_transitions_are_kept() -> None:
    """In the cache, by content: the same call goes on with the same run. Actions come back as they were."""
    data = files.read("mine.hdf5")
    for updates in (20, 40):
        run = train(data, env="hopper-medium", updates=updates, settings=LITTLE)
    assert run.result["step"] == 40
    (kept,) = Path("cache").glob("transitions-*.npz")
    np.testing.assert_allclose(files.read(kept).actions, data.actions, atol=1e-7)


def test_without_an_environment() -> None:
    run = train("mine.hdf5", updates=20, settings=LITTLE)
    assert run.folder.parts[1] == "mine" and run.score is None and run.evaluations == []
    assert run.plot().png().startswith(b"\x89PNG")


def test_an_environment_of_ones_own() -> None:
    run = train("mine.hdf5", env="Hopper-v5", updates=20, settings=LITTLE)
    assert (run.score, run.result["environment"]) == (None, "Hopper-v5")


def test_members(tmp_path: Path) -> None:
    settings = {**LITTLE, "seeds": [0, 1], "agent.eta": [0.1, 1.0]}
    runs = train_members(
        "mine.hdf5", env="hopper-medium", updates=20, settings=settings, run_dir="grid/eta${agent.eta}"
    )
    assert [run.folder.name for run in runs] == ["eta0.1", "eta1.0"]
    assert [run.result["training_seed"] for run in runs] == [0, 1]
    with pytest.raises(ConfigError, match="train_members trains several"):
        train("mine.hdf5", env="hopper-medium", updates=20, settings=settings)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            ("hoper-medium",),
            DataError,
            "expected a task's name, or a file .* did you mean hopper-",
        ),
        (("data/none.hdf5",), DataError, "data/none.hdf5: expected a task's name, or a file or folder"),
        (("hopper-medium", "cpq"), ConfigError, "agent=cpq does not exist: did you mean cpql"),
    ],
)
def test_what_does_not_exist(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        train(*arguments)


def test_other_bad_input() -> None:
    with pytest.raises(ConfigError, match="env=hopper: expected none, as 'hopper-medium' is a task"):
        train("hopper-medium", env="hopper")
    with pytest.raises(ConfigError, match=r"unknown setting 'agent\.etta'"):
        train("hopper-medium", settings={"agent.etta": 1.0})
    with pytest.raises(CheckpointError, match="holds no run"):
        TrainedRun("nowhere")
    with pytest.raises(ConfigError, match="logger=wanddb does not exist: did you mean wandb"):
        train("mine.hdf5", settings={**LITTLE, "logger": ["csv", "wanddb"]})


def test_values_reach_the_command_line_as_they_are(tmp_path: Path) -> None:
    """Quotes, commas and braces in a folder's name, options that are mappings."""
    name = "it's a, {b} $x"
    settings = {**LITTLE, "agent.actor.objective": "ict", "agent.actor.objective_options": {"s1": 20}}
    run = train(
        "mine.hdf5", "cpql", env="hopper-medium", updates=20, settings=settings, run_dir=tmp_path / name
    )
    assert run.folder == tmp_path / name
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["agent"]["actor"]["objective_options"] == {"s1": 20}


@pytest.mark.parametrize(
    "value",
    [
        *("2024", "true", "Null", "", "it's", "a\\", "a\\'b", "a, {b}: [c] $x", "runs/${seed}", "~/x"),
        *(None, True, 3, 1e-4, [0, 1.5, "a b"], {"s1": 20, "noise": "lognormal"}),
    ],
)
def test_hydra_reads_values_as_they_were(value: Any) -> None:
    parsed = OverridesParser.create().parse_override(f"x={value_text(value)}").value()
    assert parsed == value and type(parsed) is type(value)


def test_a_file_may_have_a_number_for_its_name(tmp_path: Path) -> None:
    trainings.write_dataset(tmp_path / "2024.hdf5")
    assert train("2024.hdf5", updates=20, settings=LITTLE).folder.parts[1] == "2024"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, but for little data and few updates."""
    import nbformat
    from nbclient import NotebookClient

    text = (EXAMPLES / "train.ipynb").read_text()
    call = '"hopper-medium", updates=5_000, settings={"budget": "quick"}'
    little = f'"mine.hdf5", env="hopper-medium", updates=20, settings={LITTLE}'
    assert json.dumps(call)[1:-1] in text
    book = nbformat.reads(text.replace(json.dumps(call)[1:-1], json.dumps(little)[1:-1]), 4)  # type: ignore
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
