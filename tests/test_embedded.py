"""The embedded source, with tiny random behaviours in place of the shipped ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
import safetensors.numpy
import torch

from cpql import data
from cpql.data import d4rl, embedded
from cpql.data.behaviour import Behaviour, Episodes, play, rollout
from cpql.errors import ConfigError, CpqlError, DataError
from cpql.tasks import Task


def task(kind: str = "medium") -> Task:
    datasets = {"d4rl": {"id": f"hopper-{kind}-v2"}}
    return Task(f"hopper-{kind}", "Hopper-v4", -20.272305, 3234.3, datasets)


def plain(id: str) -> Task:
    """A task that is its environment and nothing else."""
    return Task(id, id)


def behaviour(seed: int, states: int = 11, actions: int = 3) -> Behaviour:
    generator = np.random.default_rng(seed)

    def layer(width: int, out: int) -> tuple[Any, Any]:
        return tuple(generator.normal(0, 0.3, shape).astype(np.float32) for shape in ((width, out), out))  # type: ignore[return-value]

    return Behaviour((layer(states, 16), layer(16, 16)), layer(16, actions), layer(16, actions))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Behaviours for the hopper, an empty cache, no way to D4RL, and chunks of twenty steps."""
    folder = tmp_path / "behaviours" / "hopper"
    folder.mkdir(parents=True)
    snapshots = []
    for step, role in ((10, "replay"), (20, "replay"), (30, "medium"), (40, "expert")):
        content = safetensors.numpy.save(behaviour(step).to_tensors())
        file = f"step-{step:07d}.safetensors"
        (folder / file).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        snapshots.append({"step": step, "role": role, "file": file, "sha256": sha256})
    (folder / "card.json").write_text(json.dumps({"environment": "Hopper-v4", "snapshots": snapshots}))
    monkeypatch.setenv("CPQL_BEHAVIOURS", str(tmp_path / "behaviours"))
    monkeypatch.setenv("CPQL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setattr(d4rl, "HOST", "http://127.0.0.1:9/")
    monkeypatch.setattr(d4rl, "MIRROR", "http://127.0.0.1:9/mirror/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(embedded, "CHUNK_STEPS", 20)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Work in this process, which starts sooner, and count the calls' jobs."""
    counts: list[int] = []

    def here(
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        workers: int | None,
        report: Callable[[Sequence[int]], None] | None = None,
    ) -> list[Any]:
        counts.append(len(arguments))
        return [function(*each) for each in arguments]

    monkeypatch.setattr(embedded, "in_workers", here)
    return counts


def test_the_rows_do_not_depend_on_the_number_of_workers() -> None:
    seen: list[tuple[str, int, int]] = []
    one = embedded.collect(task("medium-expert"), 90, 5, workers=1)
    two = embedded.collect(task("medium-expert"), 90, 5, lambda *report: seen.append(report), workers=2)
    assert torch.equal(one.table, two.table) and torch.equal(one.ends, two.ends)
    assert seen[-1] == ("collect hopper-medium-expert", 90, 90) and len(seen) == 4
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != ""


def test_the_seed_decides(calls: list[int]) -> None:
    one, same, other = (embedded.collect(task(), 60, seed) for seed in (1, 1, 2))
    assert torch.equal(one.table, same.table)
    assert not torch.equal(one.observations, other.observations)
    assert calls == [3, 3, 3]


def test_the_rows_are_the_environments(calls: list[int]) -> None:
    made = embedded.collect(task(), 200, 0)
    assert (len(made), made.state_dim, made.action_dim) == (200, 11, 3)
    joined = (made.next_observations[:-1] == made.observations[1:]).all(1)
    assert torch.equal(joined, ~made.ends[:-1])
    # An episode at a chunk's end is cut: neither terminated nor counted.
    cut = made.ends & (made.terminated == 0)
    assert set(cut.nonzero().flatten().tolist()) <= set(range(19, 200, 20))
    assert made.provenance.episodes == int(made.terminated.sum()) > 0


def test_random_is_uniform_and_needs_no_behaviours(
    folders: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPQL_BEHAVIOURS", str(folders / "nowhere"))
    made = embedded.collect(task("random"), 2000, 0)
    assert made.actions.abs().max() <= 1
    assert torch.allclose(made.actions.mean(0), torch.zeros(3), atol=0.06)
    assert torch.allclose(made.actions.std(0), torch.full((3,), 3**-0.5), atol=0.03)
    assert made.provenance.details["action_rule"] == "uniform in [-1, 1]"
    assert max(calls) <= embedded.MOST_CHUNKS


def test_medium_replay_mixes_the_way_up_in_equal_shares(calls: list[int]) -> None:
    made = embedded.collect(task("medium-replay"), 80, 0)
    details = made.provenance.details
    assert details["recipe"] == ["random", "replay at step 10", "replay at step 20", "medium at step 30"]
    assert [entry["step"] for entry in details["behaviours"]["snapshots"]] == [10, 20, 30]
    assert (details["environment"], details["seed"]) == ("Hopper-v4", 0)
    assert set(details["versions"]) == {"gymnasium", "mujoco", "numpy"}
    alone = rollout(task("medium-replay"), behaviour(10), 20, np.random.SeedSequence(0).spawn(4)[1])
    assert torch.equal(made.actions[20:40], torch.from_numpy(alone["actions"]))
    json.dumps(made.provenance.to_dict(), allow_nan=False)


def test_a_cached_dataset_is_read_and_not_collected(calls: list[int], tmp_path: Path) -> None:
    first = embedded.cached(task(), 60, 0)
    again = embedded.cached(task(), 60, 0)
    assert calls == [3] and torch.equal(first.table, again.table)
    assert first.provenance == again.provenance
    assert (first.provenance.source, first.provenance.id) == ("embedded", "hopper-medium")
    direct = embedded.collect(task(), 60, 0)
    assert torch.equal(direct.table, first.table) and torch.equal(direct.ends, first.ends)
    assert direct.provenance.return_mean == first.provenance.return_mean
    embedded.cached(task(), 60, 1)
    embedded.cached(task(), 80, 0)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_other_weights_are_another_dataset(calls: list[int], folders: Path) -> None:
    embedded.cached(task(), 20, 0)
    card = json.loads((folders / "card.json").read_text())
    card["snapshots"][2] |= {key: card["snapshots"][3][key] for key in ("file", "sha256")}
    (folders / "card.json").write_text(json.dumps(card))
    embedded.cached(task(), 20, 0)
    assert calls == [1, 1]


def test_a_corrupt_cache_is_collected_again_with_a_warning(calls: list[int], tmp_path: Path) -> None:
    first = embedded.cached(task(), 60, 0)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:3000])
    said: list[str] = []
    again = embedded.cached(task(), 60, 0, say=said.append)
    assert calls == [3, 3] and torch.equal(first.table, again.table)
    assert len(said) == 1 and said[0].startswith(f"warning: {path.name}: ")
    assert again.provenance.sha256 == first.provenance.sha256
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_an_embedded_file_cannot_pass_for_d4rl(calls: list[int], tmp_path: Path) -> None:
    path = tmp_path / "d4rl" / "hopper_medium-v2.hdf5"
    embedded.save(task(), 20, 0, path)
    with pytest.raises(DataError, match=r"hopper_medium-v2.hdf5: carries 'cpql_origin', as cpql's own"):
        data.load(task(), source="d4rl", size=1)
    provenance = d4rl.read(path, "hopper-medium-v2", source="d4rl").provenance
    assert provenance.source == "embedded" and "not D4RL" in provenance.line()


def test_auto_falls_back_loudly_and_says_why(calls: list[int]) -> None:
    said: list[str] = []
    _, made = data.load(task(), size=20, say=said.append)
    assert made.provenance.source == "embedded"
    assert (
        len(said) == 1 and "self-collected" in said[0] and "not D4RL" in said[0] and "127.0.0.1:9" in said[0]
    )
    assert "127.0.0.1:9" in made.provenance.details["fallback"]
    _, strictly = data.load(task(), size=20, source="embedded", say=said.append)
    assert "fallback" not in strictly.provenance.details
    assert len(said) == 1


def test_settings_of_the_data_count_for_what_is_collected(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = embedded.collect(task(), 20, 0)
    made.truncated[4], made.terminated[4], made.ends[4] = True, False, True
    monkeypatch.setattr(embedded, "cached", lambda *_: made)
    for source in ("embedded", "auto"):
        _, kept = data.load(task(), size=20, source=source, say=lambda _: None)
        assert len(kept) == 20
        _, dropped = data.load(task(), size=20, source=source, time_limits="drop", say=lambda _: None)
        assert torch.equal(dropped.table, torch.cat([made.table[:4], made.table[5:]]))
        assert dropped.provenance.source == "embedded" and dropped.ends[3]
        assert dropped.provenance.details.keys() == kept.provenance.details.keys()
    with pytest.raises(
        ConfigError, match=r"dataset\.id=hopper-expert-v2: expected none with dataset=embedded"
    ):
        data.load(task(), size=20, source="embedded", id="hopper-expert-v2")
    # The medium stand-in is none for a dataset that was named.
    with pytest.raises(DataError, match=r"hopper_expert-v2\.hdf5 can't be downloaded"):
        data.load(task(), size=20, id="hopper-expert-v2")


def test_auto_without_behaviours_tells_of_both_ways() -> None:
    datasets = {"d4rl": {"id": "walker2d-medium-v2"}}
    walker = Task("walker2d-medium", "Walker2d-v4", 1.629008, 4592.3, datasets)
    with pytest.raises(DataError) as caught:
        data.load(walker, size=20, say=print)
    assert "walker2d_medium-v2.hdf5 can't be downloaded" in str(caught.value)
    assert "no embedded behaviours for 'walker2d': choose from hopper" in str(caught.value)


def test_what_is_wrong_with_a_behaviour_folder_is_said(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(text: str, kind: str = "medium", size: int = 20) -> None:
        with pytest.raises(CpqlError, match=text) as caught:
            embedded.collect(task(kind), size, 0)
        assert "\n" not in str(caught.value)

    refused("a size of 2: expected at least 4", "medium-replay", 2)
    refused("no embedded recipe for 'hopper-human-v2'", "human")
    card = json.loads((folders / "card.json").read_text())
    weights = folders / card["snapshots"][2]["file"]
    weights.write_bytes(safetensors.numpy.save(behaviour(99).to_tensors()))
    refused("step-0000030.safetensors: its hash is .*: card.json expected")
    weights.write_bytes(b"version https://git-lfs")
    refused("step-0000030.safetensors: can't be read")
    weights.unlink()
    refused("step-0000030.safetensors: can't be read")
    (folders / "card.json").write_text(json.dumps({"snapshots": card["snapshots"][:2]}))
    refused("no snapshot with the role 'medium'")
    (folders / "card.json").write_text('{"snapshots": [{}]}')
    refused("hopper/card.json: damaged")
    (folders / "card.json").unlink()
    refused("hopper/card.json: can't be read")


def test_flax_names_and_our_own_make_the_same_policy() -> None:
    ours = behaviour(0)
    layers = (*ours.layers, ours.mean, ours.log_std)
    flax = {f"Dense_{k}.kernel": weight for k, (weight, _) in enumerate(layers)}
    flax |= {f"Dense_{k}.bias": bias for k, (_, bias) in enumerate(layers)}
    theirs = Behaviour.from_tensors(flax)
    state = np.linspace(-1, 1, 11, dtype=np.float32)
    for seed in (None, 0):
        actions = [
            b.act(state, None if seed is None else np.random.default_rng(seed)) for b in (ours, theirs)
        ]
        assert np.array_equal(actions[0], actions[1]) and actions[0].dtype == np.float32
    assert list(theirs.to_tensors()) == [
        *(f"layers.{k}.{part}" for k in (0, 1) for part in ("weight", "bias")),
        *(f"{head}.{part}" for head in ("mean", "log_std") for part in ("weight", "bias")),
    ]


def test_actions_follow_the_squashed_gaussian() -> None:
    zero = np.zeros((11, 3), np.float32)
    mean, log_std = np.array([0.5, -1, 0], np.float32), np.array([-1.0, 0, -50], np.float32)
    policy = Behaviour((), (zero, mean), (zero, log_std))
    state, generator = np.ones(11, np.float32), np.random.default_rng(0)
    assert policy.act(state, None) == pytest.approx(np.tanh(mean))
    drawn = np.arctanh(np.array([policy.act(state, generator) for _ in range(4000)], np.float64))
    assert drawn.mean(0) == pytest.approx(mean, abs=0.06)
    assert drawn.std(0) == pytest.approx([np.exp(-1), 1, 0], abs=0.04)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mean.bias": None}, "expected mean.weight and mean.bias"),
        ({"mean.bias": np.zeros(4, np.float32)}, "expected mean.weight|expected \\[in, out\\]"),
        ({"layers.1.weight": np.zeros((9, 16), np.float32)}, "expected each to take"),
        ({"mean.bias": np.full(3, np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_networks_that_do_not_fit_are_refused(change: dict[str, Any], text: str) -> None:
    tensors = behaviour(0).to_tensors() | change
    with pytest.raises(DataError, match=text):
        Behaviour.from_tensors({key: value for key, value in tensors.items() if value is not None})
    with pytest.raises(DataError, match="Hopper-v4: a behaviour of widths 5 and 3: expected 11 and 3"):
        play(task(), behaviour(0, states=5), 1, np.random.SeedSequence(0), sampled=True)


def test_discrete_actions_are_refused() -> None:
    with pytest.raises(ConfigError, match="actions are Discrete"):
        rollout(plain("CartPole-v1"), None, 1, np.random.SeedSequence(0))


def test_actions_reach_the_environments_bounds() -> None:
    """Pendulum's bounds are ±2; stored actions stay in [-1, 1]."""
    made = rollout(plain("Pendulum-v1"), None, 250, np.random.SeedSequence(0))
    assert np.abs(made["actions"]).max() <= 1
    assert np.flatnonzero(made["timeouts"]).tolist() == [199] and not made["terminals"].any()
    speed, angle = (
        made["observations"][:, 2],
        np.arctan2(made["observations"][:, 1], made["observations"][:, 0]),
    )
    cost = angle**2 + 0.1 * speed**2 + 0.001 * (2 * made["actions"][:, 0]) ** 2
    assert made["rewards"] == pytest.approx(-cost, abs=1e-4)


def test_a_files_actions_are_in_the_environments_bounds(calls: list[int], tmp_path: Path) -> None:
    made = embedded.save(plain("Pendulum-v1"), 250, 0, tmp_path / "mine.hdf5", policy="random")
    with h5py.File(tmp_path / "mine.hdf5") as file:
        actions, rewards = file["actions"][:, 0], file["rewards"][:]
        x, y, speed = file["observations"][:].T
    assert 1.9 < np.abs(actions).max() <= 2
    cost = np.arctan2(y, x) ** 2 + 0.1 * speed**2 + 0.001 * actions**2
    assert rewards == pytest.approx(-cost, abs=1e-4)
    assert made.actions[:, 0].numpy() == pytest.approx(actions / 2, abs=1e-6)
    assert d4rl.read(tmp_path / "mine.hdf5", "", action_low=-2, action_high=2).table.equal(made.table)
    with pytest.raises(DataError, match="'actions' reaches"):
        d4rl.read(tmp_path / "mine.hdf5", "")


def test_random_actions_say_so_wherever_they_go(
    folders: Path, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPQL_BEHAVIOURS", str(folders / "nowhere"))
    made = embedded.save(task("human"), 40, 0, tmp_path / "hopper_human-v2.hdf5", policy="random")
    read = d4rl.read(tmp_path / "hopper_human-v2.hdf5", "hopper-human-v2", source="d4rl")
    for provenance in (made.provenance, read.provenance):
        assert (provenance.source, provenance.id) == ("embedded", "hopper-human with random actions")
        assert "self-collected, not D4RL" in provenance.line()
        assert provenance.details["recipe"] == ["random"]
        assert provenance.details["action_rule"] == "uniform in [-1, 1]"
    # A task's own recipe of that name collects the same rows.
    assert torch.equal(embedded.collect(task("random"), 40, 0).table, made.table)
    with pytest.raises(ConfigError, match="policy='expert' is none: expected 'random'"):
        embedded.prepare(task(), 40, 0, "expert")  # type: ignore[arg-type]


def test_other_options_of_the_environment_are_another_dataset(calls: list[int]) -> None:
    short = dataclasses.replace(task("random"), env_options={"max_episode_steps": 3})
    made, usual = embedded.cached(short, 20, 0), embedded.cached(task("random"), 20, 0)
    assert calls == [1, 1]
    assert torch.equal(made.truncated.nonzero().flatten(), torch.arange(2, 20, 3))
    assert made.provenance.details["environment_options"] == {"max_episode_steps": 3}
    assert not usual.truncated.any() and "environment_options" not in usual.provenance.details


def test_workers_import_neither_torch_nor_h5py() -> None:
    code = (
        "import sys, cpql.data.behaviour, cpql.data.workers\n"
        "sys.exit(bool({'torch', 'h5py'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(data.__file__).parents[2], check=False
        ).returncode
        == 0
    )


def test_a_card_is_made_from_snapshots(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots, out = tmp_path / "run", tmp_path / "made" / "hopper"
    snapshots.mkdir()
    for k in range(1, 9):
        safetensors.numpy.save_file(behaviour(k).to_tensors(), snapshots / f"step_{k * 5000:07d}.safetensors")
    with pytest.raises(DataError, match=r"run: no training.json"):
        embedded.make_card(snapshots, out)
    with pytest.raises(DataError, match="run: no snapshot of step 7"):
        embedded.make_card(snapshots, out, "Hopper-v4", medium_step=7)
    card = embedded.make_card(
        snapshots, out, "Hopper-v4", seed=3, first_episodes=1, episodes=2, replay=3,
        expert_step=40_000, medium_step=30_000, versions={"sbx-rl": "0"},
    )  # fmt: skip
    assert json.loads((out / "card.json").read_text()) == card
    roles = [(entry["step"], entry["role"]) for entry in card["snapshots"]]
    # Steps up to learning_starts are the untrained actor.
    assert roles == [(15_000, "replay"), (20_000, "replay"), (30_000, "medium"), (40_000, "expert")]
    assert all(
        entry[rule]["episodes"] == 2 for entry in card["snapshots"] for rule in ("sampled", "deterministic")
    )
    assert (card["seed"], card["environment"], card["versions"]) == (3, "Hopper-v4", {"sbx-rl": "0"})
    assert card["falls_short"].startswith("Falls short of D4RL: medium returns")
    assert {entry.name for entry in out.iterdir()} == {"card.json", *(e["file"] for e in card["snapshots"])}
    assert all((out / entry["file"]).stat().st_size < 1e6 for entry in card["snapshots"])
    monkeypatch.setenv("CPQL_BEHAVIOURS", str(out.parent))
    assert embedded.collect(task("medium-replay"), 50, 0).provenance.details["behaviours"]["seed"] == 3


def test_a_card_chooses_by_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns rise with the step, and fall at the end: the expert isn't the last, medium is a third of it."""
    returns = {15: 10.0, 20: 60, 25: 110, 30: 90, 35: 300, 40: 310, 45: 100}
    snapshots = tmp_path / "run"
    snapshots.mkdir()
    for thousand in returns:
        tensors = behaviour(thousand).to_tensors() | {"mean.bias": np.full(3, thousand, np.float32)}
        safetensors.numpy.save_file(tensors, snapshots / f"step-{thousand * 1000:07d}.safetensors")

    def scripted(
        function: Any, arguments: Sequence[tuple[Any, ...]], workers: Any, report: Any = None
    ) -> list[Any]:
        made = []
        for _, policy, count, _, _ in arguments:
            thousand = int(policy.mean[1][0])
            spread = 60 if thousand == 30 else 5
            steps = np.linspace(-spread, spread, count)
            made.append(Episodes(returns[thousand] + steps, np.full(count, 9)))
        return made

    monkeypatch.setattr(embedded, "in_workers", scripted)
    card = embedded.make_card(snapshots, tmp_path / "card" / "thing", "Hopper-v4", replay=8)
    roles = {entry["role"]: entry["step"] for entry in card["snapshots"]}
    # A third of 310 is 103: 25 thousand (110) is as near as 30 thousand (90) and has less spread; 45 thousand
    # (100) is nearest of all, but comes after the expert.
    assert (roles["expert"], roles["medium"]) == (40_000, 25_000)
    assert [e["step"] for e in card["snapshots"] if e["role"] == "replay"] == [15_000, 20_000]
    assert card["falls_short"] is None and card["d4rl"] == {}


def test_training_without_sbx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sbx", None)
    with pytest.raises(ConfigError, match=r"pip install 'cpql\[behaviours\]'"):
        embedded.train_behaviour("Hopper-v4", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_costs_the_cache_and_not_the_data(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    said: list[str] = []
    assert len(embedded.cached(task(), 20, 0, say=said.append)) == 20
    assert len(said) == 1 and "can't be written" in said[0]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="can't be written"):
        embedded.save(task(), 20, 0, tmp_path / "mine.hdf5")


def test_what_killed_processes_left_is_cleared_but_not_what_lives(calls: list[int], tmp_path: Path) -> None:
    path = embedded.prepare(task(), 60, 0).path()
    left = path.with_name(f".{path.name}.00c0ffee.part")
    other = path.with_name(f".other-{path.name}.00c0ffee.part")
    path.parent.mkdir()
    for file in (left, other, path.with_name(f".{path.name}.lock")):
        file.touch()
    said: list[str] = []
    waits = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waits.set()

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    with ThreadPoolExecutor(1) as beside:
        with lock:  # as the process that writes `left` holds it, as long as it lives
            second = beside.submit(embedded.cached, task(), 60, 0, say=say)
            assert waits.wait(30)
            assert left.exists() and calls == []
        assert len(second.result()) == 60
    assert said == [f"{path.name}: another process is collecting it: waiting until that has ended"]
    assert sorted(path.parent.iterdir()) == sorted([path, other])

    out = tmp_path / "out" / "mine.hdf5"
    out.parent.mkdir()
    out.with_name(".mine.hdf5.00c0ffee.part").touch()
    embedded.save(task(), 60, 0, out)
    assert list(out.parent.iterdir()) == [out]


def test_two_first_runs_at_once_collect_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from cpql.tasks import load_task\n"
        "from cpql.data import embedded\n"
        "progress = lambda label, done, total: print('collects', done, total)\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "data = embedded.cached(load_task('hopper-random'), 20_000, 0, progress)\n"
        "print('mean', data.table.double().mean().item())\n"
    )
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both: list[Any] = [subprocess.Popen([sys.executable, str(program)], text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=120) for process in both]
    assert [(process.returncode, errors) for process, (_, errors) in zip(both, said, strict=True)] == [
        (0, ""),
        (0, ""),
    ]
    one, other = sorted((lines.splitlines() for lines, _ in said), key=len)
    assert re.search(r": process \d+ on \S+ is collecting it: waiting until that has ended$", one[0])
    assert len(one) == 2 and len(other) == 3 and other[1] == "collects 20000 20000"
    assert one[-1] == other[-1] and one[-1].startswith("mean")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".hdf5"]


@pytest.fixture(params=["none", "under a file", "of another user"])
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No home that anything can be kept in."""
    if sys.platform == "win32":
        pytest.skip("homes of Unix")
    monkeypatch.delenv("CPQL_CACHE")
    monkeypatch.delenv("D4RL_DATASET_DIR")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        if request.param == "none":

            def unknown(_: int) -> None:
                raise KeyError("uid not found")

            monkeypatch.delenv("HOME", raising=False)
            monkeypatch.setattr("pwd.getpwuid", unknown)
        elif request.param == "under a file":
            Path(folder, "file").touch()
            monkeypatch.setenv("HOME", f"{folder}/file/home")
        else:
            Path(folder, "home").mkdir(mode=0o000)
            monkeypatch.setenv("HOME", f"{folder}/home")
            user = os.geteuid()
            if user == 0:
                os.seteuid(65534)  # root may do anything
            yield request.param
            os.seteuid(user)
            return
        yield request.param


def test_data_are_had_without_a_home(calls: list[int], home: str) -> None:
    said: list[str] = []
    _, made = data.load(task("random"), source="embedded", size=20, say=said.append)
    assert len(made) == 20 and calls == [1]
    (line,) = said
    assert line.startswith("warning: ") and "CPQL_CACHE" in line and "collect it again" in line
    if home == "none":
        with pytest.raises(DataError) as caught:
            d4rl.find("hopper-medium-v2")
        assert str(caught.value) == (
            "there is no home folder for ~/.d4rl/datasets: expected D4RL_DATASET_DIR to name a folder"
        )
        _, made = data.load(task("random"), size=20, say=said.append)
        assert len(made) == 20 and len(said) == 3 and "D4RL_DATASET_DIR" in said[1]
    else:
        assert d4rl.find("hopper-medium-v2") is None


def test_what_cannot_be_written_is_said_before_anything_is_done(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"mine\.hdf5: can't be written in .*file"):
        embedded.save(task(), 20, 0, tmp_path / "file" / "mine.hdf5")
    for k in range(1, 3):
        safetensors.numpy.save_file(behaviour(k).to_tensors(), tmp_path / f"step-{k}.safetensors")
    with pytest.raises(DataError, match=r"hopper: can't be made in .*file \(Not a directory\)"):
        embedded.make_card(tmp_path, tmp_path / "file" / "hopper", "Hopper-v4", expert_step=1, medium_step=2)
    monkeypatch.setitem(sys.modules, "sbx", types.SimpleNamespace(SAC=None))
    with pytest.raises(DataError, match=r"run: can't be made in .*file"):
        embedded.train_behaviour("Hopper-v4", tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="no environment 'Hoper-v4'"):
        embedded.train_behaviour("Hoper-v4", tmp_path / "run")
    assert calls == [] and not (tmp_path / "run").exists()


def test_training_warns_where_verify_does(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    rows = embedded.collect(task(), 200, 0).to_dict()
    rows["actions"][:, 1] = 0.5
    d4rl.write(tmp_path / "mine.hdf5", rows | {"rewards": np.ones(200)}, {})
    data.load(task(), path=str(tmp_path / "mine.hdf5"), size=1, say=said.append)
    expected = ["all rewards are 1", "action 1 of 3: always the same value"]
    assert said == [f"warning: mine.hdf5: {finding}" for finding in expected]
    # What cpql collected itself is known.
    embedded.save(task(), 20, 0, tmp_path / "ours.hdf5")
    data.load(task(), path=str(tmp_path / "ours.hdf5"), size=1, say=said.append)
    assert len(said) == 2
    monkeypatch.setattr(d4rl, "find", lambda *_: tmp_path / "mine.hdf5")
    data.load(task(), source="d4rl", size=1, say=said.append)
    assert said[2:] == said[:2]


def test_the_command_says_that_nothing_is_kept(
    calls: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").touch()
    main = runpy.run_path(str(Path(data.__file__).parents[2] / "scripts" / "collect.py"))["main"]
    assert main(["dataset", "hopper-random", "--size", "20"]) == 1
    printed = capsys.readouterr()
    warning, error = printed.err.splitlines()
    assert printed.out == "" and warning.startswith("warning: hopper-random")
    assert error == "error: hopper-random was collected and isn't kept: expected --out to name a file"
