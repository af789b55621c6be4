"""A run's folder when things go wrong: no training is lost that was saved, and the user hears of it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from trainings import Killed, die, everything, run, run_group, settings, write_dataset

from cpql.agents import CPQL
from cpql.errors import ActingError, CheckpointError, ConfigError, CpqlError, Interrupted
from cpql.tasks import Task
from cpql.training import checkpoint, runs
from cpql.training.checkpoint import saved_steps
from cpql.training.config import BudgetConfig, OnlineConfig, TrainConfig
from cpql.training.logging import LOGGERS, make_console, say
from cpql.training.loop import group_summary
from cpql.training.members import Means
from cpql.training.runs import claimed

LITTLE = BudgetConfig("test", 40, 4, 20, 10, 2, 3, keep=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "hopper.hdf5")


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    run(settings(dataset, folder / "run"))
    return everything(folder / "run")


@pytest.fixture(scope="module")
def whole_group(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same of a group of two."""
    folder = tmp_path_factory.mktemp("whole")
    run_group(folder, dataset, (0, 1))
    return [everything(folder / f"seed{seed}") for seed in (0, 1)]


class Odd(gymnasium.Env[Any, Any]):
    """As wide as Hopper, and does at its step `at` what the test wants."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    at, act = 7, staticmethod(lambda: None)
    ends = True
    steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(11), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        found = Odd.act() if self.steps == Odd.at else None
        observation, reward = (np.zeros(11), 1.0) if found is None else found
        return observation, reward, Odd.ends and self.steps == 10, False, {}


def make(**_: Any) -> gymnasium.Env[Any, Any]:
    return Odd()


gymnasium.register("cpql-test/Odd-v0", make)
ODD = Task("odd", "cpql-test/Odd-v0")


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what the environment does."""

    def arrange(act: Any = lambda: None, ends: bool = True) -> None:
        monkeypatch.setattr(Odd, "act", staticmethod(act))
        monkeypatch.setattr(Odd, "ends", ends)

    return arrange


def raises(error: BaseException) -> Any:
    raise error


def at_call(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, count: int, act: Any = die) -> None:
    """Let the count-th call of a function do something else first."""
    original, calls = getattr(module, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            act()
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, counted)


def test_killed_before_the_first_checkpoint_again_and_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    """After some metrics, and then before the first update."""
    for count, resume in ((6, False), (1, True)):
        with monkeypatch.context() as patch:
            at_call(patch, Means, "add", count)
            with pytest.raises(Killed):
                run(settings(dataset, tmp_path / "run", resume=resume))
    run(settings(dataset, tmp_path / "run", resume=True))
    assert everything(tmp_path / "run") == whole
    assert (tmp_path / "run" / "metrics.csv").read_text().count("step") == 1


def test_a_row_that_a_full_disk_has_cut_off_is_written_anew(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    at_call(monkeypatch, Means, "add", 13)
    with pytest.raises(Killed):
        run(settings(dataset, tmp_path / "run"))
    table = tmp_path / "run" / "metrics.csv"
    table.write_bytes(table.read_bytes()[:-9])
    run(settings(dataset, tmp_path / "run", resume=True))
    assert everything(tmp_path / "run") == whole


@pytest.mark.slow
def test_two_cannot_work_on_one_run(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path\n"
         "from cpql.training.runs import claimed\n"
         "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=rf"is in use by process {holder.pid} on \S+: wait"):
            run(settings(dataset, folder, resume=resume))
    # Killed, it holds nobody up, and what it left is cleared away.
    (folder / ".config.yaml.abc.aside").mkdir()
    holder.kill()
    holder.communicate()
    assert (folder / ".lock").exists()
    run(settings(dataset, folder))
    assert not [path for path in folder.rglob(".*")]
    with claimed(tmp_path / "deep" / "empty"):
        pass
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_cannot_be_had(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, reason in (
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(CheckpointError, match=rf"can't be written to \(.*{reason}"):
            run(settings(dataset, folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: raises(RuntimeError("motor\nbroken")), "failed in step: RuntimeError: motor broken"),
        (lambda: (np.full(11, np.nan), 1.0), "gave an observation whose number 0 is nan"),
        (lambda: (np.zeros(11), float("inf")), "gave a reward of inf"),
    ],
)
@pytest.mark.parametrize("online", [False, True])
def test_an_environment_that_fails_is_named_and_training_saved(
    online: bool, act: Any, message: str, dataset: Path, tmp_path: Path, odd: Any
) -> None:
    config = settings(dataset, tmp_path / "run", env=ODD)
    if online:
        config = replace(config, online=OnlineConfig(start_steps=9, buffer_size=200))
    calls = 0

    def later() -> Any:
        nonlocal calls
        calls += 1
        return act() if calls == 4 else None  # in an evaluation, or while acting after a few updates

    odd(later)
    with pytest.raises(
        ActingError, match=rf"'cpql-test/Odd-v0' {message}.*; saved up to update \d+ in .*run"
    ):
        run(config)
    saved = saved_steps(tmp_path / "run" / "checkpoints")
    assert saved and all(
        bool(tensor.isfinite().all())
        for file in (tmp_path / "run").rglob("*.safetensors")
        for name, tensor in load_file(file).items()
        if tensor.is_floating_point()
    )
    assert run(replace(config, resume=True))[0]["step"] == 40


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_one_signal_stops_an_evaluation_that_would_never_end(
    number: str, dataset: Path, tmp_path: Path, odd: Any
) -> None:
    once = iter([getattr(signal, number)])  # a second Ctrl-C would act at once

    def send() -> None:
        for each in once:
            os.kill(os.getpid(), each)

    odd(send, ends=False)
    endless = replace(LITTLE, episode_limit=10**9)
    config = settings(dataset, tmp_path / "run", env=ODD, budget=endless)
    with pytest.raises(Interrupted, match=r"stopped after 20 of 40 updates; saved up to update 20 in"):
        run(config)
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == 20
    odd(ends=False)
    shorter = replace(config, resume=True, budget=replace(endless, episode_limit=30))
    result, _ = run(shorter)
    assert result["lengths"] == [30, 30, 30]
    assert (result["episode_limit"], result["episodes_cut"]) == (30, 3)
    files = sorted(path.name for path in (tmp_path / "run" / "evaluations").iterdir())
    assert files == ["step_00000020.json", "step_00000040.json"], "what the first process owed"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_nohup_is_respected(dataset: Path, tmp_path: Path, odd: Any) -> None:
    odd(lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(settings(dataset, tmp_path / "run", env=ODD))[0]["step"] == 40
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (runs, "write_text", 2),  # between the members' first files
        (runs, "save_checkpoint", 2),  # between their first checkpoints
        (runs, "save_checkpoint", 4),  # and later ones
        (checkpoint, "point_last", 3),
        (runs, "prune", 2),
    ],
)
def test_a_group_killed_anywhere_resumes_as_a_group(
    module: Any,
    name: str,
    count: int,
    keep: int,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole_group: list[dict[str, Any]],
) -> None:
    budget = replace(LITTLE, keep=keep)
    with monkeypatch.context() as patch:
        at_call(patch, module, name, count)
        with pytest.raises(Killed):
            run_group(tmp_path / "parts", dataset, (0, 1), budget=budget)
    results = run_group(tmp_path / "parts", dataset, (0, 1), resume=True, budget=budget)
    assert [result["step"] for result in results] == [40, 40]
    assert [everything(tmp_path / "parts" / f"seed{seed}") for seed in (0, 1)] == whole_group


def test_killed_between_the_last_checkpoint_and_its_link(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, checkpoint, "point_last", 4)
        with pytest.raises(Killed):
            run(settings(dataset, tmp_path / "run"))
    last = tmp_path / "run" / "checkpoints" / "last"
    assert last.resolve().name == "step_00000030"
    run(settings(dataset, tmp_path / "run", resume=True))
    assert last.resolve().name == "step_00000040"
    assert everything(tmp_path / "run") == whole


def test_a_checkpoint_is_on_the_disk_before_last_points_to_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fsync, symlink = os.fsync, os.symlink

    def flushed(handle: int) -> None:
        happened.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def linked(*arguments: Any, **options: Any) -> None:
        happened.append("last")
        symlink(*arguments, **options)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "symlink", linked)
    run(settings(dataset, tmp_path / "run"))
    before = happened[: happened.index("last")]
    assert {"model.safetensors", "config.json", "policy", "state.safetensors", "state.json", "training",
            "step_00000010", "metrics.csv"} <= set(before)  # fmt: skip
    assert before[-1] == "checkpoints", "the folder's new name as well"


@pytest.mark.slow
def test_where_there_are_no_links_last_is_a_copy(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refused)
    at_call(monkeypatch, Means, "add", 25)
    with pytest.raises(Killed):
        run(settings(dataset, tmp_path / "run"))
    run(settings(dataset, tmp_path / "run", resume=True))
    assert everything(tmp_path / "run") == whole
    last = tmp_path / "run" / "checkpoints" / "last"
    assert not last.is_symlink() and checkpoint.find_training(tmp_path / "run") == (last.parent, 40)
    monkeypatch.undo()
    longer = replace(LITTLE, updates=50)  # where there are links again
    run(settings(dataset, tmp_path / "run", resume=True, budget=longer))
    assert last.is_symlink() and last.resolve().name == "step_00000050"


def test_weights_that_are_not_finite_are_never_saved(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = CPQL.update

    def broken(self: Any, batch: Any, noise: Any, phase: int) -> Any:
        metrics = update(self, batch, noise, phase)
        if int(self.state["step"]) == 15:
            self.state["critic_square"][..., 3] = float("nan")  # no loss shows it yet
        return metrics

    monkeypatch.setattr(CPQL, "update", broken)
    config = settings(dataset, tmp_path / "run", budget=replace(LITTLE, log_every=40))
    with pytest.raises(
        CpqlError, match=r"a weight isn't finite at update 20: .*last checkpoint is .*step_00000010"
    ):
        run(config)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [10]
    monkeypatch.setattr(CPQL, "update", update)
    assert run(replace(config, resume=True))[0]["step"] == 40


def test_a_full_disk_ends_in_a_line_and_the_run_goes_on_later(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    text = os.strerror(errno.ENOSPC)
    errors = {"replace": OSError(errno.ENOSPC, text), "save_file": SafetensorError(f"I/O error: {text}")}
    for module, name, count in ((os, "replace", 7), (checkpoint, "save_file", 3)):
        with monkeypatch.context() as patch:
            at_call(patch, module, name, count, partial(raises, errors[name]))
            with pytest.raises(CheckpointError, match=r"No space left on device.* saved up to update \d+ in"):
                run(settings(dataset, tmp_path / name))
        assert not list((tmp_path / name).rglob("*.aside"))
        run(settings(dataset, tmp_path / name, resume=True))
        assert everything(tmp_path / name) == whole


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    at_call(monkeypatch, Means, "add", 36)
    with pytest.raises(Killed):
        run(settings(dataset, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    weights = folder / "step_00000030" / "training" / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(bytes(content))
    (folder / "step_bak").mkdir()
    (folder / "step_99999999").mkdir()
    _, text = run(settings(dataset, tmp_path / "run", resume=True))
    assert re.search(
        r"warning: .*step_00000030.training: no readable training state: .*SHA-256.*before it", text
    )
    assert everything(tmp_path / "run") == whole


def test_the_best_checkpoint_stays(dataset: Path, tmp_path: Path, odd: Any) -> None:
    """Of evaluations at 10, 20, 30 and 40 the first is the best."""
    rewards = iter([9.0, 9.0, *[1.0] * 99])
    odd(lambda: (np.zeros(11), next(rewards)))
    budget = BudgetConfig("test", 40, 4, 10, 40, 2, 3, keep=1)
    result, _ = run(settings(dataset, tmp_path / "run", env=ODD, budget=budget))
    assert result["best_evaluation"]["checkpoint"] == "step_00000010"
    assert saved_steps(tmp_path / "run" / "checkpoints") == [10, 40]


def test_a_checkpoint_that_holds_an_evaluation_of_the_users_stays(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    at_call(monkeypatch, Means, "add", 15, (folder / "step_00000010" / "mine.json").touch)
    run(settings(dataset, tmp_path / "run", budget=replace(LITTLE, keep=1)))
    assert saved_steps(folder) == [10, 40]


def test_a_failed_start_leaves_nothing_behind(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise ConfigError("logger=tensorboard needs a package")

    with monkeypatch.context() as patch:
        patch.setitem(LOGGERS, "tensorboard", missing)
        with pytest.raises(ConfigError, match="needs a package"):
            run_group(tmp_path / "group", dataset, (0, 1), logger="tensorboard")
        patch.setattr(torch, "compile", lambda *_, **__: raises(RuntimeError("unsupported\nhere")))
        with pytest.raises(
            ConfigError, match=r"^compile=true: PyTorch's compiler fails \(RuntimeError: unsup"
        ):
            run(settings(dataset, tmp_path / "run", compile=True))
    assert not list(tmp_path.iterdir())


def test_evaluate_every_0_is_at_the_end_alone(dataset: Path, tmp_path: Path) -> None:
    run(settings(dataset, tmp_path / "run", budget=replace(LITTLE, evaluate_every=0)))
    assert [path.name for path in (tmp_path / "run" / "evaluations").iterdir()] == ["step_00000040.json"]


def test_results_are_called_by_their_configuration(dataset: Path, tmp_path: Path) -> None:
    result, _ = run(settings(dataset, tmp_path / "run", configuration="recommended"))
    assert (result["agent"], result["algorithm"], result["program"]) == ("recommended", "cpql", "uncompiled")
    policy = json.loads((tmp_path / "run" / "checkpoints" / "last" / "policy" / "config.json").read_text())
    assert (policy["origin"]["agent"], policy["origin"]["algorithm"]) == ("recommended", "cpql")


def test_a_mean_is_over_seeds_and_never_over_settings(tmp_path: Path) -> None:
    result = {"evaluated": True, "return_mean": 1.0, "return_std": 0.0, "episodes": 1, "environment": "E-v0",
              "rule": "", "data": {"source": "file", "id": "x"}, "behaviour_return": None, "score": None,
              "note": ""}  # fmt: skip

    def config(seed: int, eta: float) -> TrainConfig:
        return TrainConfig(ODD, {"name": "cpql", "eta": eta}, seed=seed, run_dir=f"{seed}-{eta}")

    def means(*members: tuple[int, float]) -> list[str]:
        results = [result | {"return_mean": eta + seed} for seed, eta in members]
        text = group_summary(results, [config(*member) for member in members])
        return [line for line in text.splitlines() if "between seeds" in line]

    assert means((0, 0.5), (0, 1.0), (0, 2.0)) == []
    assert means((0, 1.0), (2, 1.0)) == ["return of 2 seeds: 2.0 ± 1.4 (between seeds)"]
    assert means((0, 0.5), (1, 0.5), (0, 2.0)) == [
        "return of 2 seeds with agent.eta=0.5: 1.0 ± 0.7 (between seeds)"
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close otherwise there")
def test_training_goes_on_when_nobody_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        console = make_console()
        for _ in range(3):
            console.print("x" * 10_000)
    monkeypatch.setattr(sys, "stdout", None)
    make_console().print("nowhere")


def test_each_member_has_a_wandb_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpql.training.logging import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folders = [tmp_path / f"seed{k}" for k in range(2)]
    for folder in folders:
        folder.mkdir()
    loggers = [WandbLogger(folder, folder.name, {"seed": k}, 0) for k, folder in enumerate(folders)]
    for k, logger in enumerate(loggers):
        logger.log(1, {"x": float(k)})
    assert [(logger.run.name, dict(logger.run.config)) for logger in loggers] == [
        ("seed0", {"seed": 0}),
        ("seed1", {"seed": 1}),
    ]
    for logger in loggers:
        logger.close()
    assert len(list(tmp_path.rglob("*.wandb"))) == 2

    resumed = WandbLogger(folders[0], "seed0", {"wandb": {"project": "mine", "group": "four"}}, 1)
    assert (resumed.run.id, resumed.run.project, resumed.run.group) == (loggers[0].run.id, "mine", "four")
    resumed.close()


def test_text_of_strangers_is_printed_as_text(dataset: Path, tmp_path: Path) -> None:
    console = Console(file=(text := StringIO()), width=200)
    say(console, "a [rows, width] of [/] and \x1b[31m")
    assert text.getvalue() == "a [rows, width] of [/] and \\x1b[31m\n"
