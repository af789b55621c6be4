"""The training loop and its run folder: nothing is lost, and the same seed gives the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from trainings import AGENTS, Killed, die, everything, run, run_group, settings, write_dataset

from cpql.agents import TD3BC, CPQLConfig
from cpql.data import d4rl
from cpql.deploy.policy import Policy
from cpql.deploy.summary import summary
from cpql.errors import CheckpointError, ConfigError, CpqlError, Interrupted
from cpql.settings import build
from cpql.tasks import load_task
from cpql.training.checkpoint import load_training, save_checkpoint
from cpql.training.config import BudgetConfig, DatasetConfig
from cpql.training.evaluation import evaluate
from cpql.training.loop import train_group
from cpql.training.members import Means
from cpql.training.runs import Run
from cpql.training.sources import load_source


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "hopper.hdf5")


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the process send itself a signal at some update."""

    def arrange(step: int, action: Any) -> None:
        original = Means.add
        count = 0

        def add(self: Any, metrics: Any) -> None:
            nonlocal count
            count += 1
            original(self, metrics)
            if count == step:
                action()

        monkeypatch.setattr(Means, "add", add)

    yield arrange


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("agent", list(AGENTS))
def test_interrupted_and_resumed_equals_uninterrupted(
    agent: str, dataset: Path, tmp_path: Path, interrupt_at: Any
) -> None:
    run(settings(dataset, tmp_path / "whole", agent))
    interrupt_at(23, ctrl_c)
    with pytest.raises(Interrupted, match=r"stopped after 23 of 40 updates.*resume=true"):
        run(settings(dataset, tmp_path / "parts", agent))
    run(settings(dataset, tmp_path / "parts", agent, resume=True))
    assert everything(tmp_path / "parts") == everything(tmp_path / "whole")


def test_an_agent_whose_updates_differ_ends_and_starts_anywhere(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TD3+BC's policy steps at every second update: a run of an odd number, and one that starts there."""
    budget = BudgetConfig("test", 21, 4, 0, 10, 1, 1, keep=2)
    run(settings(dataset, tmp_path / "odd", "td3_bc", budget=budget))
    head, *rows = (tmp_path / "odd" / "metrics.csv").read_text().splitlines()
    assert "actor/loss" in head and ["nan" in row for row in rows] == [False] * 5 + [True]
    update, phases = TD3BC.update, []

    def noted(self: Any, batch: Any, noise: Any, phase: int) -> Any:
        phases.append((phase, int(self.state["step"]) % 2))
        return update(self, batch, noise, phase)

    monkeypatch.setattr(TD3BC, "update", noted)
    run(settings(dataset, tmp_path / "next", "td3_bc", budget=budget, checkpoint=str(tmp_path / "odd")))
    assert phases[0] == (1, 1) and all(phase == taken for phase, taken in phases)


@pytest.mark.slow
def test_members_of_a_group_are_ordinary_runs(dataset: Path, tmp_path: Path, interrupt_at: Any) -> None:
    results = run_group(tmp_path / "group", dataset, (0, 1))
    for seed in (0, 1):
        run(settings(dataset, tmp_path / f"alone{seed}", seed=seed))
        alone, member = everything(tmp_path / f"alone{seed}"), everything(tmp_path / "group" / f"seed{seed}")
        assert alone.keys() == member.keys()
        assert results[seed] == member["result.json"] and results[seed]["training_seed"] == seed
        tables = [np.loadtxt(text["metrics"].splitlines()[1:], delimiter=",") for text in (alone, member)]
        np.testing.assert_allclose(tables[0], tables[1], rtol=1e-3, atol=1e-4)
        assert (tmp_path / "group" / f"seed{seed}" / "learning_curve.png").exists()
    # Interrupted and resumed, in a group: to the bit.
    interrupt_at(23, ctrl_c)
    with pytest.raises(Interrupted, match=r"stopped after 23 of 40 updates.*seed0, .*seed1"):
        run_group(tmp_path / "parts", dataset, (0, 1))
    run_group(tmp_path / "parts", dataset, (0, 1), resume=True)
    for seed in (0, 1):
        parts, whole = (everything(tmp_path / name / f"seed{seed}") for name in ("parts", "group"))
        assert parts == whole


@pytest.mark.slow
def test_a_member_is_resumed_alone_and_a_group_from_the_last_common_step(
    dataset: Path, tmp_path: Path, interrupt_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything_kept = BudgetConfig("test", 40, 4, 20, 10, 2, 3, keep=0)
    interrupt_at(25, ctrl_c)
    with pytest.raises(Interrupted):
        run_group(tmp_path, dataset, (0, 1), budget=everything_kept)
    alone = settings(dataset, tmp_path / "seed1", seed=1, resume=True, budget=everything_kept)
    result, _ = run(alone)
    assert result["step"] == 40 and Policy.load(tmp_path / "seed1").config.origin["seed"] == 1
    # Member 1 is ahead now: both go on from 25, and what it came to is no longer so.
    with monkeypatch.context() as patch:
        patch.setattr(Means, "add", lambda *_: die())
        with pytest.raises(Killed):
            run_group(tmp_path, dataset, (0, 1), resume=True, budget=everything_kept)
    assert not (tmp_path / "seed1" / "result.json").exists()
    assert (tmp_path / "seed1" / "checkpoints" / "last").resolve().name == "step_00000025"
    results = run_group(tmp_path, dataset, (0, 1), resume=True, budget=everything_kept)
    assert [r["step"] for r in results] == [40, 40]
    (tmp_path / "seed0" / "result.json").unlink()
    for step in (10, 20, 25, 30, 40):
        shutil.rmtree(tmp_path / "seed0" / "checkpoints" / f"step_{step:08d}")
    with pytest.raises(CheckpointError, match=r"seed0 at 0, .*seed1 at 40\): resume them one by one"):
        run_group(tmp_path, dataset, (0, 1), resume=True, budget=everything_kept)
    for seed in (0, 1):
        steps = [
            line.split(",")[0] for line in (tmp_path / f"seed{seed}" / "metrics.csv").read_text().split()
        ]
        assert steps == ["step", *map(str, range(4, 41, 4))]


def test_a_member_that_diverges_is_named_and_the_others_finish(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Means.take

    def take(self: Any) -> list[dict[str, float]]:
        means = original(self)
        return [means[0], {**means[1], "actor/loss": float("nan")}]

    monkeypatch.setattr(Means, "take", take)
    with pytest.raises(CpqlError, match=r"actor/loss is nan at update 4: training diverged in .*seed1"):
        run_group(tmp_path, dataset, (0, 1))
    assert (tmp_path / "seed0" / "result.json").exists()
    assert not (tmp_path / "seed1" / "result.json").exists()


def test_members_may_differ_only_in_what_one_program_can_hold(dataset: Path, tmp_path: Path) -> None:
    one, other = (settings(dataset, tmp_path / name) for name in "ab")
    for changed, text in (
        (replace(other, agent={**other.agent, "discount": 0.9}), "not in other settings"),
        (replace(other, device="cuda"), "not in other settings"),
    ):
        with pytest.raises(ConfigError, match=text):
            train_group([one, changed], Console(file=StringIO()))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 17, 29])
def test_killed_and_resumed_equals_uninterrupted(
    step: int, dataset: Path, tmp_path: Path, interrupt_at: Any
) -> None:
    """Before the first checkpoint, and after one with lines of metrics that it doesn't know of."""
    run(settings(dataset, tmp_path / "whole"))
    interrupt_at(step, die)
    with pytest.raises(Killed):
        run(settings(dataset, tmp_path / "parts"))
    run(settings(dataset, tmp_path / "parts", resume=True))
    assert everything(tmp_path / "parts") == everything(tmp_path / "whole")


@pytest.mark.slow
def test_same_seed_same_run_and_another_seed_another(dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(settings(dataset, tmp_path / name, seed=seed))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert everything(tmp_path / "a")["metrics"] != everything(tmp_path / "c")["metrics"]


def test_what_a_run_leaves(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result, text = run(settings(dataset, folder))
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "timing.csv",
        "evaluations",
        "checkpoints",
        "learning_curve.png",
        "result.json",
    }
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "last",
        "step_00000030",
        "step_00000040",
    ]
    assert result == json.loads((folder / "result.json").read_text())
    assert (result["agent"], result["checkpoint"], result["episodes"]) == ("cpql", "last", 3)
    assert result["environment"] == "Hopper-v4"
    assert result["data"]["source"] == "file"
    assert result["data"]["sha256"]
    assert {"torch", "gymnasium", "mujoco", "numpy", "cpql", "python"} <= set(result["versions"])
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 10
    assert "training 40/40" in text
    assert "\x1b" not in text


def test_policy_of_a_run(dataset: Path, tmp_path: Path) -> None:
    run(settings(dataset, tmp_path / "run", "cpiql"))
    policy = Policy.load(tmp_path / "run")
    assert policy.candidates == 3
    assert (policy.config.origin["agent"], policy.config.origin["step"]) == ("cpiql", 40)
    observation = np.linspace(-1, 1, 11)
    policy.seed(0)
    action, state = policy.predict(observation)
    assert action.shape == (3,) and state is None
    policy.seed(0)
    np.testing.assert_array_equal(policy.predict(observation)[0], action)
    batch = policy.predict(np.tile(observation, (5, 1)))[0]
    assert batch.shape == (5, 3)
    assert np.abs(batch).max() <= 1
    for candidates in (1, 4):
        policy.candidates = candidates
        first, second = (policy.predict(observation, deterministic=True)[0] for _ in range(2))
        np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match=r"expected shape \[11\] or \[B, 11\], found \[4\]"):
        policy.predict(np.zeros(4))
    for path in ("checkpoints/last", "checkpoints/last/policy", "checkpoints/step_00000030"):
        Policy.load(tmp_path / "run" / path)


def test_what_is_done_to_the_data_reaches_the_agent_and_the_policy(dataset: Path, tmp_path: Path) -> None:
    chosen = DatasetConfig(path=str(dataset), reward="normalize", normalise_observations=True, n_step=3)
    config = settings(dataset, tmp_path / "run", dataset=chosen)
    source = load_source(config, [0], torch.device("cpu"), Console(file=StringIO()), CPQLConfig(discount=0.9))
    assert source.data is not None
    data = source.data
    # Whole triples of an episode of 20; the file's rewards, normalised, discounted.
    with h5py.File(dataset) as file:
        raw, states = file["rewards"][:], file["observations"][:]
    r = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(
        data.rewards[:3], [r[i] + 0.9 * r[i + 1] + 0.81 * r[i + 2] for i in range(3)], rtol=1e-4
    )
    mean, std = states.mean(0), states.std(0) + 1e-3
    np.testing.assert_allclose(data.observations, (states - mean) / std, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(data.next_observations[0], (states[3] - mean) / std, rtol=1e-3, atol=1e-4)
    assert data.columns.discounts[0].item() == pytest.approx(0.81)

    result, _ = run(config)
    assert result["data"]["details"]["transforms"] == {
        "reward": "normalize",
        "normalise_observations": True,
        "n_step": 3,
    }
    policy = Policy.load(tmp_path / "run")
    np.testing.assert_allclose(policy.config.observation_mean, mean, rtol=1e-4, atol=1e-6)
    seen = torch.from_numpy(((states[:5] - mean) / std).astype(np.float32))
    low, high = np.array(policy.config.action_low), np.array(policy.config.action_high)
    expected = low + (
        policy.actor.sample(seen, noise=torch.zeros(policy.actor.noise_shape(*seen.shape[:-1]))).numpy() + 1
    ) / 2 * (high - low)
    np.testing.assert_allclose(policy.predict(states[:5], deterministic=True)[0], expected, atol=1e-4)


def test_without_references_there_are_returns_and_no_scores(dataset: Path, tmp_path: Path) -> None:
    task = replace(load_task("hopper-medium"), random_return=None, expert_return=None, note="No references.")
    result, text = run(settings(dataset, tmp_path / "run", env=task))
    assert result["score"] is None and result["score_interval"] is None
    assert result["best_evaluation"]["return_mean"] >= result["return_mean"] > 0
    line = summary(result)
    assert line.startswith("return ") and "score 0" not in line and "note: No references." in line
    assert "without reference scores" in line and "return " in text


def test_without_an_environment_training_goes_on_and_says_so(dataset: Path, tmp_path: Path) -> None:
    task = replace(load_task("kitchen-mixed"), id=None)
    result, _ = run(settings(dataset, tmp_path / "run", env=task))
    assert result["evaluated"] is False and result["step"] == 40 and "mujoco below 3.12" in result["note"]
    assert "trained and not evaluated: kitchen-mixed has no environment here" in summary(result)
    assert (tmp_path / "run" / "learning_curve.png").exists()
    policy = Policy.load(tmp_path / "run")
    assert policy.config.action_high == (1, 1, 1) and policy.predict(np.zeros(11))[0].shape == (3,)
    with pytest.raises(ConfigError, match="kitchen-mixed has no environment"):
        evaluate(policy, policy.config.task, 1)


def test_policies_of_before_still_load(dataset: Path, tmp_path: Path) -> None:
    """Their tasks had fewer fields, and no observations were normalised."""
    run(settings(dataset, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints" / "last" / "policy"
    content = json.loads((folder / "config.json").read_text())
    names = ("name", "id", "random_return", "expert_return")
    content["task"] = {name: content["task"][name] for name in names}
    del content["observation_mean"], content["observation_std"]
    (folder / "config.json").write_text(json.dumps(content))
    assert Policy.load(folder).config.task.score(3234.3) == pytest.approx(100)


def test_a_run_is_never_overwritten(dataset: Path, tmp_path: Path) -> None:
    config = settings(dataset, tmp_path / "run")
    run(config)
    before = everything(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"already holds a run.*resume=true.*run_dir="):
        run(config)
    assert run(settings(dataset, tmp_path / "run", resume=True))[0]["step"] == 40
    assert everything(tmp_path / "run") == before


def test_a_setting_that_a_run_was_begun_without_is_its_default(
    dataset: Path, tmp_path: Path, interrupt_at: Any
) -> None:
    interrupt_at(15, ctrl_c)
    with pytest.raises(Interrupted):
        run(settings(dataset, tmp_path / "run"))
    file = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    before = {key: content[key] for key in ("env", "agent", "budget")}  # all that it has of its own
    file.write_text(yaml.safe_dump(before | {"dataset": {"path": str(dataset)}}))
    config = settings(dataset, tmp_path / "run", resume=True)
    agent = {**config.agent, "eta": 1.0, "eta_warmup": 0, "critic_target": {"rate": 0.005}}
    later = replace(config, agent=agent)
    for changed, message in (
        (replace(later, agent={**agent, "eta": 2.0}), "started with agent.eta=1.0, not 2.0"),
        (replace(later, dataset=replace(config.dataset, n_step=2)), "started with dataset.n_step=1, not 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(changed)
    assert run(later)[0]["step"] == 40


def test_a_finished_run_goes_on_for_longer_as_if_it_had_been_meant_to(dataset: Path, tmp_path: Path) -> None:
    longer = BudgetConfig("test", 24, 4, 12, 4, 1, 1, keep=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(settings(dataset, whole, budget=longer))
    run(settings(dataset, parts, budget=replace(longer, updates=12)))
    run(settings(dataset, parts, budget=longer, resume=True))
    assert everything(parts) == everything(whole)
    assert everything(parts)["result.json"]["step"] == 24
    assert yaml.safe_load((parts / "config.yaml").read_text())["budget"] == asdict(longer)


@pytest.mark.parametrize(
    ("agent", "schedule"),
    [({"lr_decay": "cosine"}, "agent.lr_decay=cosine"), ({"actor": {"objective": "ict"}}, "objective=ict")],
)
def test_a_run_whose_course_depends_on_its_length_keeps_it(
    agent: dict[str, Any], schedule: str, dataset: Path, tmp_path: Path
) -> None:
    little = settings(dataset, tmp_path / "run")
    config = replace(little, agent={**little.agent, **agent})
    run(config)
    longer = replace(config, resume=True, budget=replace(config.budget, updates=50))
    with pytest.raises(CheckpointError, match=rf"budget.updates=40, not 50, and .*{schedule} depends on it"):
        run(longer)
    assert run(replace(config, resume=True))[0]["step"] == 40


def test_a_run_is_not_made_shorter_than_it_is(dataset: Path, tmp_path: Path) -> None:
    config = settings(dataset, tmp_path / "run")
    run(config)
    shorter = replace(config, resume=True, budget=replace(config.budget, updates=39))
    with pytest.raises(CheckpointError, match=r"run has 40 updates: .* found 39"):
        run(shorter)


def test_resume_refuses_what_is_not_the_same_run(tmp_path: Path, interrupt_at: Any) -> None:
    dataset = write_dataset(tmp_path / "mine.hdf5")
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        run(settings(dataset, tmp_path / "none", resume=True))
    interrupt_at(15, ctrl_c)
    with pytest.raises(Interrupted):
        run(settings(dataset, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="started with seed=0, not 1"):
        run(settings(dataset, tmp_path / "run", resume=True, seed=1))
    with pytest.raises(CheckpointError, match=r"started with dataset.path=.*, not .*other.hdf5"):
        run(settings(tmp_path / "other.hdf5", tmp_path / "run", resume=True))
    arrays = {"observations": np.zeros((9, 11)), "actions": np.zeros((9, 3)), "rewards": np.zeros(9)}
    d4rl.write(dataset, {**arrays, "terminals": np.arange(9) == 8, "timeouts": np.zeros(9, bool)}, {})
    with pytest.raises(CheckpointError, match="learnt from a dataset with SHA-256"):
        run(settings(dataset, tmp_path / "run", resume=True))


def test_divergence_is_named(dataset: Path, tmp_path: Path) -> None:
    config = settings(dataset, tmp_path / "run")
    config.agent["critic_lr"] = 1e30
    with pytest.raises(CpqlError, match=r"is (nan|inf|-inf) at update 4: training diverged.*agent.eta"):
        run(config)


def test_wrong_widths_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "walker.hdf5"
    arrays = {"observations": np.zeros((9, 17)), "actions": np.zeros((9, 6)), "rewards": np.zeros(9)}
    d4rl.write(path, {**arrays, "terminals": np.arange(9) == 8, "timeouts": np.zeros(9, bool)}, {})
    with pytest.raises(CpqlError, match=r"walker.hdf5: 'actions' is 6 wide: expected 3"):
        run(settings(path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_broken_checkpoints(dataset: Path, tmp_path: Path) -> None:
    run(settings(dataset, tmp_path / "run"))
    last = tmp_path / "run" / "checkpoints" / "last"
    weights = last / "policy" / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:100], b"\x80\x04pickle"):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged|size mismatch|no readable policy"):
            Policy.load(tmp_path / "run")
    weights.write_bytes(whole)
    file = last / "policy" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "state_dim": 5}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.*size mismatch"):
        Policy.load(tmp_path / "run")
    file.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(CheckpointError, match="not a policy of format 1"):
        Policy.load(tmp_path / "run")
    (last / "training" / "state.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="no readable training state"):
        load_training(last.parent, 40)
    with pytest.raises(CheckpointError, match="does not exist"):
        Policy.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no policy"):
        Policy.load(tmp_path)


def test_a_checkpoint_that_fails_leaves_no_trace(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings(dataset, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    before = sorted(p.name for p in folder.iterdir())
    policy = Policy.load(folder / "last")
    with pytest.raises(TypeError):
        save_checkpoint(folder, 99, policy, {"x": torch.zeros(1)}, {"bad": object()})
    assert sorted(p.name for p in folder.iterdir()) == before
    save_checkpoint(folder, 40, policy, {"x": torch.zeros(1)}, {})  # the same step again replaces it
    assert sorted(p.name for p in folder.iterdir()) == before


def test_build_names_key_and_type() -> None:
    with pytest.raises(ConfigError, match=r"budget: unknown key 'update': did you mean updates"):
        build(BudgetConfig, {"update": 3}, "budget")
    with pytest.raises(ConfigError, match=r"budget: updates: .*integer.*found 'many'"):
        build(BudgetConfig, {"updates": "many"}, "budget")


def test_training_off_the_main_thread(dataset: Path, tmp_path: Path) -> None:
    """Signals can't be handled there; training goes on without."""
    thread = threading.Thread(target=lambda: run(settings(dataset, tmp_path / "run")))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "result.json").exists()


def test_run_reads_back_its_evaluations(dataset: Path, tmp_path: Path) -> None:
    config = settings(dataset, tmp_path / "run")
    run(config)
    again = Run(replace(config, resume=True))
    assert [e["step"] for e in again.evaluations()] == [20, 40]
    assert again.finished
