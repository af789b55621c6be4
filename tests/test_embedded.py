"""The embedded source, with tiny random behaviours in place of the shipped ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import threading
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
from cpql.data.behaviour import Behaviour, rollout
from cpql.data.request import Request
from cpql.data.transitions import Transitions
from cpql.errors import ConfigError, CpqlError, DataError
from cpql.tasks import Task


def task(kind: str = "medium", **options: Any) -> Task:
    name = f"hopper-{kind}"
    datasets = {"d4rl": {"id": f"{name}-v2"}}
    return Task(name, "Hopper-v4", -20.272305, 3234.3, datasets=datasets, env_options=options)


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
    """Work in this process, which starts sooner, and count the chunks of each collection."""
    counts: list[int] = []

    def here(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *_: Any) -> list[Any]:
        counts.append(len(arguments))
        return [function(*each) for each in arguments]

    monkeypatch.setattr(embedded, "in_workers", here)
    return counts


def cached(task: Task, size: int, seed: int = 0, say: Callable[[str], None] = print) -> Transitions:
    """The embedded source's data, as training gets them."""
    return data.load(task, source="embedded", size=size, seed=seed, say=say)[1]


def digest(made: Transitions) -> str:
    parts = (made.table, made.ends, made.terminated, made.truncated)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def test_the_rows_do_not_depend_on_the_number_of_workers() -> None:
    seen: list[tuple[str, int, int]] = []
    one = embedded.collect(task("medium-expert"), 90, 5, workers=1)
    two = embedded.collect(
        task("medium-expert"), 90, 5, progress=lambda *report: seen.append(report), workers=2
    )
    assert digest(one) == digest(two)
    assert seen[-1] == ("collect hopper-medium-expert", 90, 90) and len(seen) == 4


def test_the_seed_decides_on_rows_that_are_the_environments(calls: list[int]) -> None:
    made, same, other = (embedded.collect(task(), 200, seed) for seed in (1, 1, 2))
    assert digest(made) == digest(same) and calls == [10] * 3
    assert not torch.equal(made.observations, other.observations)
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


def test_medium_replay_mixes_its_parts_in_equal_sizes(calls: list[int]) -> None:
    made = embedded.collect(task("medium-replay"), 80, 0)
    details = made.provenance.details
    assert details["recipe"] == ["random", "replay at step 10", "replay at step 20", "medium at step 30"]
    assert [entry["step"] for entry in details["behaviours"]["snapshots"]] == [10, 20, 30]
    assert (details["environment"], details["seed"]) == ("Hopper-v4", 0)
    assert set(details["versions"]) == {"gymnasium", "mujoco", "numpy"}
    second = rollout(task("medium-replay"), behaviour(10), 20, np.random.SeedSequence(0).spawn(4)[1])
    assert torch.equal(made.actions[20:40], torch.from_numpy(second["actions"]))
    json.dumps(made.provenance.to_dict(), allow_nan=False)


def test_a_dataset_is_collected_once_for_each_request(
    calls: list[int], folders: Path, tmp_path: Path
) -> None:
    first, again, direct = cached(task(), 60), cached(task(), 60), embedded.collect(task(), 60, 0)
    assert calls == [3, 3] and digest(first) == digest(again) == digest(direct)
    assert first.provenance == again.provenance
    assert (first.provenance.source, first.provenance.id) == ("embedded", "hopper-medium")
    assert direct.provenance.return_mean == first.provenance.return_mean
    short = task("random", max_episode_steps=3)
    for other in ((task(), 60, 1), (task(), 80, 0), (task("random"), 60, 0), (short, 60, 0)):
        made = cached(*other)
    assert torch.equal(made.truncated.nonzero().flatten()[:3], torch.tensor([2, 5, 8]))
    assert made.provenance.details["environment_options"] == {"max_episode_steps": 3}
    card = json.loads((folders / "card.json").read_text())
    card["snapshots"][2] |= {key: card["snapshots"][3][key] for key in ("file", "sha256")}
    (folders / "card.json").write_text(json.dumps(card))
    cached(task(), 60)  # other weights
    assert len(calls) == 7 and len(list((tmp_path / "cache").iterdir())) == 6


def test_a_damaged_cache_is_collected_again_with_a_warning(calls: list[int], tmp_path: Path) -> None:
    first = cached(task(), 60)
    (path,) = (tmp_path / "cache").iterdir()
    others = (path.read_bytes()[:3000], b"")
    for content in others:
        path.write_bytes(content)
        lines: list[str] = []
        again = cached(task(), 60, say=lines.append)
        assert len(lines) == 1 and lines[0].startswith(f"warning: {path.name}: ")
        assert digest(again) == digest(first) and again.provenance.sha256 == first.provenance.sha256
    d4rl.write(path, first.to_dict(), {})
    cached(task(), 60, say=lines.append)
    assert lines[-1].endswith("holds other data: expected 60 embedded transitions; collecting it again")
    assert calls == [3] * 4 and list((tmp_path / "cache").iterdir()) == [path]


def test_auto_falls_back_loudly_and_says_why(calls: list[int]) -> None:
    lines: list[str] = []
    _, made = data.load(task(), size=20, say=lines.append)
    assert made.provenance.source == "embedded"
    (warning,) = lines
    assert "self-collected" in warning and "not D4RL" in warning and "127.0.0.1:9" in warning
    assert "127.0.0.1:9" in made.provenance.details["fallback"]
    assert "fallback" not in cached(task(), 20, say=lines.append).provenance.details
    assert len(lines) == 1
    # The medium stand-in is none for a dataset that was named.
    with pytest.raises(DataError, match=r"hopper_expert-v2\.hdf5 can't be downloaded"):
        data.load(task(), size=20, id="hopper-expert-v2")
    with pytest.raises(
        ConfigError, match=r"dataset\.id=hopper-expert-v2: expected none with dataset=embedded"
    ):
        data.load(task(), size=20, source="embedded", id="hopper-expert-v2")
    walker = Task("walker2d-medium", "Walker2d-v4", datasets={"d4rl": {"id": "walker2d-medium-v2"}})
    with pytest.raises(DataError) as caught:
        data.load(walker, size=20, say=print)
    assert "walker2d_medium-v2.hdf5 can't be downloaded" in str(caught.value)
    assert "no embedded behaviours for 'walker2d': choose from hopper" in str(caught.value)


@pytest.mark.parametrize("source", ["embedded", "auto"])
def test_rows_at_a_time_limit_may_be_dropped(calls: list[int], source: str) -> None:
    short = task("random", max_episode_steps=5)
    kept, dropped = (
        data.load(short, size=20, source=source, time_limits=rule, say=lambda _: None)[1]
        for rule in ("keep", "drop")
    )
    assert len(kept) == 20 and kept.truncated.sum() == 4 and calls == [1]
    assert torch.equal(dropped.table, kept.table[~kept.truncated])
    assert dropped.provenance.source == "embedded" and dropped.ends[3]
    assert dropped.provenance.details == kept.provenance.details


def test_what_is_wrong_with_a_behaviour_folder_is_one_line(folders: Path) -> None:
    def refused(text: str, kind: str = "medium", size: int = 20) -> None:
        with pytest.raises(CpqlError, match=text) as caught:
            embedded.collect(task(kind), size, 0)
        assert "\n" not in str(caught.value)

    refused("a size of 2: expected at least 4", "medium-replay", 2)
    refused("no embedded recipe for 'hopper-human-v2'", "human")
    card, path = json.loads((folders / "card.json").read_text()), folders / "card.json"
    weights = folders / card["snapshots"][2]["file"]
    weights.write_bytes(safetensors.numpy.save(behaviour(99).to_tensors()))
    refused("step-0000030.safetensors: its hash is .*: card.json expected")
    weights.write_bytes(b"version https://git-lfs")
    refused("step-0000030.safetensors: can't be read")
    weights.unlink()
    refused("step-0000030.safetensors: can't be read")
    path.write_text(json.dumps({"snapshots": card["snapshots"][:2]}))
    refused("no snapshot with the role 'medium'")
    for content in ('{"snapshots": [{}]}', "[]", "{", '{"snapshots": [{"step": "x"}]}'):
        path.write_text(content)
        refused("hopper/card.json: can't be read")
    path.unlink()
    refused("hopper/card.json: can't be read")
    with pytest.raises(ConfigError, match="policy='expert': expected 'random'"):
        embedded.prepare(task(), 40, 0, "expert")  # type: ignore[arg-type]


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
        ({"mean.bias": None}, "no mean.bias: expected it among layers.0.weight"),
        ({"mean.bias": np.zeros(4, np.float32)}, "expected each layer to take"),
        ({"layers.1.weight": np.zeros((9, 16), np.float32)}, "expected each layer to take"),
        ({"mean.bias": np.full(3, np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_networks_that_do_not_fit_are_refused(change: dict[str, Any], text: str) -> None:
    tensors = behaviour(0).to_tensors() | change
    with pytest.raises(DataError, match=text):
        Behaviour.from_tensors({key: value for key, value in tensors.items() if value is not None})


def test_environments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="Hopper-v4: a behaviour of widths 5 and 3: expected 11 and 3"):
        rollout(task(), behaviour(0, states=5), 1, np.random.SeedSequence(0))
    with pytest.raises(ConfigError, match="actions are Discrete"):
        rollout(plain("CartPole-v1"), None, 1, np.random.SeedSequence(0))


def test_actions_are_in_the_environments_bounds_there_and_in_a_file(calls: list[int], tmp_path: Path) -> None:
    """Pendulum's bounds are ±2; transitions keep actions in [-1, 1]."""

    def cost(observations: Any, actions: Any) -> Any:
        x, y, speed = observations.T
        return -(np.arctan2(y, x) ** 2 + 0.1 * speed**2 + 0.001 * actions[:, 0] ** 2)

    rows = rollout(plain("Pendulum-v1"), None, 250, np.random.SeedSequence(0))
    assert np.abs(rows["actions"]).max() <= 1
    assert np.flatnonzero(rows["timeouts"]).tolist() == [199] and not rows["terminals"].any()
    assert rows["rewards"] == pytest.approx(cost(rows["observations"], 2 * rows["actions"]), abs=1e-4)
    path = tmp_path / "mine.hdf5"
    made = embedded.collect(plain("Pendulum-v1"), 250, 0, path, policy="random")
    with h5py.File(path) as file:
        actions = file["actions"][:]
        assert file["rewards"][:] == pytest.approx(cost(file["observations"][:], actions), abs=1e-4)
    assert 1.9 < np.abs(actions).max() <= 2
    assert made.actions.numpy() == pytest.approx(actions / 2, abs=1e-6)
    assert d4rl.read(path, "", action_low=-2, action_high=2).table.equal(made.table)
    with pytest.raises(DataError, match="'actions' reaches"):
        d4rl.read(path, "")


def test_collected_data_say_so_wherever_they_go(calls: list[int], tmp_path: Path) -> None:
    """They can't pass for D4RL's, under its name and in its folder, whatever the policy was."""
    for kind, policy in (("human", "random"), ("medium", None)):
        path = tmp_path / "d4rl" / f"hopper_{kind}-v2.hdf5"
        made = embedded.collect(task(kind), 40, 0, path, policy=policy)  # type: ignore[arg-type]
        read = d4rl.read(path, f"hopper-{kind}-v2", source="d4rl")
        for provenance in (made.provenance, read.provenance):
            assert provenance.source == "embedded" and "self-collected, not D4RL" in provenance.line()
            assert provenance.id == f"hopper-{kind}" + (" with random actions" if policy else "")
            assert (provenance.details["recipe"] == ["random"]) == (policy == "random")
        with pytest.raises(DataError, match=rf"hopper_{kind}-v2.hdf5: carries 'cpql_origin', as cpql's own"):
            data.load(task(kind), source="d4rl", size=1)
        if policy:  # a task's own recipe of that name collects the same rows
            assert digest(embedded.collect(task("random"), 40, 0)) == digest(made)


def test_workers_import_neither_torch_nor_h5py() -> None:
    code = (
        "import sys, cpql.data.behaviour, cpql.data.workers\n"
        "sys.exit(bool({'torch', 'h5py'} & set(sys.modules)))"
    )
    root = Path(data.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_full_disk_costs_the_cache_and_not_the_data(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    lines: list[str] = []
    assert len(cached(task(), 20, say=lines.append)) == 20
    assert len(lines) == 1 and "can't be written" in lines[0]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="can't be written"):
        embedded.collect(task(), 20, 0, tmp_path / "mine.hdf5")


def test_what_cannot_be_written_is_an_error_before_anything_is_collected(
    calls: list[int], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"mine\.hdf5: can't be written in .*file"):
        embedded.collect(task(), 20, 0, tmp_path / "file" / "mine.hdf5")
    assert calls == []


def test_what_killed_processes_left_is_cleared_but_not_what_lives(calls: list[int], tmp_path: Path) -> None:
    path = embedded.prepare(task(), 60, 0).path()
    left = path.with_name(f".{path.name}.00c0ffee.aside")
    other = path.with_name(f".other-{path.name}.00c0ffee.aside")
    for folder in (left, other):
        folder.mkdir(parents=True)
    path.with_name(f".{path.name}.lock").touch()
    lines: list[str] = []
    waits = threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        waits.set()

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    with ThreadPoolExecutor(1) as beside:
        with lock:  # as the process that writes `left` holds it, as long as it lives
            second = beside.submit(cached, task(), 60, say=say)
            assert waits.wait(30)
            assert left.exists() and calls == []
        assert len(second.result()) == 60
    assert lines == [f"{path.name}: another process is collecting it: waiting until that has ended"]
    assert sorted(path.parent.iterdir()) == sorted([path, other])

    out = tmp_path / "out" / "mine.hdf5"
    out.parent.mkdir()
    out.with_name(".mine.hdf5.00c0ffee.aside").mkdir()
    embedded.collect(task(), 60, 0, out)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_two_first_runs_at_once_collect_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from cpql.tasks import load_task\n"
        "import cpql.data.sources\n"
        "progress = lambda label, done, total: print('collects', done, total)\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "_, data = cpql.data.load(\n"
        "    load_task('hopper-random'), source='embedded', size=20_000, progress=progress\n"
        ")\n"
        "print('mean', data.table.double().mean().item())\n"
    )
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both: list[Any] = [subprocess.Popen([sys.executable, str(program)], text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0] and [err for _, err in printed] == ["", ""]
    one, other = sorted((out.splitlines() for out, _ in printed), key=len)
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
    lines: list[str] = []
    assert len(cached(task("random"), 20, say=lines.append)) == 20 and calls == [1]
    (line,) = lines
    assert line.startswith("warning: ") and "CPQL_CACHE" in line and "collect it again" in line
    if home == "none":
        with pytest.raises(DataError) as caught:
            d4rl.D4RL().locate(Request(task()))
        assert str(caught.value) == (
            "there is no home folder for ~/.d4rl/datasets: expected D4RL_DATASET_DIR to name a folder"
        )
        _, made = data.load(task("random"), size=20, say=lines.append)
        assert len(made) == 20 and len(lines) == 3 and "D4RL_DATASET_DIR" in lines[1]
    else:
        assert d4rl.D4RL().locate(Request(task())) is None


def test_training_warns_where_verify_does(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    rows = embedded.collect(task(), 200, 0).to_dict()
    rows["actions"][:, 1] = 0.5
    d4rl.write(tmp_path / "mine.hdf5", rows | {"rewards": np.ones(200)}, {})
    data.load(task(), path=str(tmp_path / "mine.hdf5"), size=1, say=lines.append)
    expected = ["all rewards are 1", "action 1 of 3: always the same value"]
    assert lines == [f"warning: mine.hdf5: {finding}" for finding in expected]
    # What cpql collected itself is known.
    embedded.collect(task(), 20, 0, tmp_path / "ours.hdf5")
    data.load(task(), path=str(tmp_path / "ours.hdf5"), size=1, say=lines.append)
    assert len(lines) == 2
    monkeypatch.setattr(d4rl.D4RL, "locate", lambda *_: tmp_path / "mine.hdf5")
    data.load(task(), source="d4rl", size=1, say=lines.append)
    assert lines[2:] == lines[:2]


def test_the_command_collects_and_says_what_is_not_kept(
    calls: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(Path(data.__file__).parents[2] / "scripts" / "collect.py"))["main"]
    for words in (["--out", str(tmp_path / "mine.hdf5")], []):
        main(["dataset", "hopper-random", "--size", "20", *words])
        first, place = capsys.readouterr().out.splitlines()
        assert first.startswith("hopper-random (embedded: self-collected, not D4RL): 20 transitions")
        assert Path(place.removeprefix("in ")).is_file()
    with pytest.raises(SystemExit, match="1"):
        main(["dataset", "hopper-random", "--policy", "random"])
    assert capsys.readouterr().err.startswith("error --policy=random: expected --out as well")
    Path(place.removeprefix("in ")).unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").touch()
    with pytest.raises(SystemExit, match="1"):
        main(["dataset", "hopper-random", "--size", "20"])
    printed = capsys.readouterr()
    warning, error = printed.err.splitlines()
    assert printed.out == "" and warning.startswith("warning: hopper-random")
    assert error == "error hopper-random was collected and isn't kept: expected --out to name a file"
