"""Making behaviours with `scripts/behaviours.py`: training, and choosing snapshots by their returns."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from test_embedded import behaviour, task

from cpql.data import embedded
from cpql.data.behaviour import Behaviour
from cpql.errors import ConfigError, DataError
from cpql.tasks import Task

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import behaviours


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluate in this process, which starts sooner, and count the calls."""
    counts: list[int] = []

    def here(function: Callable[..., Any], arguments: Sequence[Any], *_: Any) -> list[Any]:
        counts.append(len(arguments))
        return [function(*each) for each in arguments]

    for module in (behaviours, embedded):
        monkeypatch.setattr(module, "in_workers", here)
    return counts


def test_flax_names_and_our_own_make_the_same_policy() -> None:
    ours = behaviour(0)
    layers = (*ours.layers, ours.mean, ours.log_std)
    flax = {f"Dense_{k}.kernel": weight for k, (weight, _) in enumerate(layers)}
    flax |= {f"Dense_{k}.bias": bias for k, (_, bias) in enumerate(layers)}
    theirs = behaviours.from_flax(flax).to_tensors()
    assert list(theirs) == [
        *(f"layers.{k}.{part}" for k in (0, 1) for part in ("weight", "bias")),
        *(f"{head}.{part}" for head in ("mean", "log_std") for part in ("weight", "bias")),
    ]
    for name, tensor in theirs.items():
        assert np.array_equal(tensor, ours.to_tensors()[name]) and tensor.dtype == np.float32
    del flax["Dense_3.bias"]
    with pytest.raises(DataError, match=r"no log_std.bias: expected it among"):
        behaviours.from_flax(flax)


def test_whole_episodes_are_played() -> None:
    short = Task("pendulum", "Pendulum-v1", env_options={"max_episode_steps": 7})
    for sampled in (True, False):
        policy = behaviour(0, states=3, actions=1)
        played = behaviours.play(short, policy, 3, np.random.SeedSequence(0), sampled)
        assert played["lengths"].tolist() == [7] * 3 and (played["returns"] < 0).all()
        again = behaviours.play(short, policy, 3, np.random.SeedSequence(0), sampled)
        assert np.array_equal(again["returns"], played["returns"])


def test_a_card_is_made_from_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots, out = tmp_path / "run", tmp_path / "made" / "hopper"
    snapshots.mkdir()
    for k in range(1, 9):
        safetensors.numpy.save_file(behaviour(k).to_tensors(), snapshots / f"step_{k * 5000:07d}.safetensors")
    with pytest.raises(DataError, match=r"run: no training.json"):
        behaviours.make_card(snapshots, out)
    with pytest.raises(DataError, match="run: no snapshot of step 7"):
        behaviours.make_card(snapshots, out, "Hopper-v4", medium_step=7)
    card = behaviours.make_card(
        snapshots, out, "Hopper-v4", seed=3, first_episodes=1, episodes=2, replay=3,
        expert_step=40_000, medium_step=30_000, packages={"sbx-rl": "0"},
    )  # fmt: skip
    assert json.loads((out / "card.json").read_text()) == card
    roles = [(entry["step"], entry["role"]) for entry in card["snapshots"]]
    # Until learning_starts the actor is untrained.
    assert roles == [(15_000, "replay"), (20_000, "replay"), (30_000, "medium"), (40_000, "expert")]
    for entry in card["snapshots"]:
        assert entry["sampled"]["episodes"] == entry["deterministic"]["episodes"] == 2
        assert (out / entry["file"]).stat().st_size < 1e6
    assert (card["seed"], card["environment"], card["versions"]) == (3, "Hopper-v4", {"sbx-rl": "0"})
    assert card["falls_short"].startswith("Falls short of D4RL: medium returns")
    assert {entry.name for entry in out.iterdir()} == {"card.json", *(e["file"] for e in card["snapshots"])}
    monkeypatch.setenv("CPQL_BEHAVIOURS", str(out.parent))
    assert embedded.collect(task("medium-replay"), 50, 0).provenance.details["behaviours"]["seed"] == 3


def test_a_card_chooses_by_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns rise with the step and fall at the end: the expert isn't the last, medium is a third of it."""
    returns = {15: 10.0, 20: 60, 25: 110, 30: 90, 35: 300, 40: 310, 45: 100}
    snapshots = tmp_path / "run"
    snapshots.mkdir()
    for thousand in returns:
        tensors = behaviour(thousand).to_tensors() | {"mean.bias": np.full(3, thousand, np.float32)}
        safetensors.numpy.save_file(tensors, snapshots / f"step-{thousand * 1000:07d}.safetensors")

    def scripted(function: Any, arguments: Sequence[Any], *_: Any) -> list[Any]:
        played = []
        for _, policy, count, _, _ in arguments:
            thousand = int(policy.mean[1][0])
            spread = 60 if thousand == 30 else 5
            steps = np.linspace(-spread, spread, count)
            played.append({"returns": returns[thousand] + steps, "lengths": np.full(count, 9)})
        return played

    monkeypatch.setattr(behaviours, "in_workers", scripted)
    card = behaviours.make_card(snapshots, tmp_path / "card" / "thing", "Hopper-v4", replay=8)
    roles = {entry["role"]: entry["step"] for entry in card["snapshots"]}
    # A third of 310 is 103: 25 thousand (110) is as near as 30 thousand (90) and varies less; 45 thousand
    # (100) is nearest of all but comes after the expert.
    assert (roles["expert"], roles["medium"]) == (40_000, 25_000)
    assert [e["step"] for e in card["snapshots"] if e["role"] == "replay"] == [15_000, 20_000]
    assert card["falls_short"] is None and card["d4rl"] == {}


def test_what_cannot_be_written_is_an_error_before_anything_is_done(
    calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sbx", None)
    with pytest.raises(ConfigError, match=r"pip install 'cpql\[behaviours\]'"):
        behaviours.train_behaviour("Hopper-v4", tmp_path / "run")
    (tmp_path / "file").touch()
    for k in range(1, 3):
        safetensors.numpy.save_file(behaviour(k).to_tensors(), tmp_path / f"step-{k}.safetensors")
    with pytest.raises(NotADirectoryError, match="file/hopper"):
        behaviours.make_card(
            tmp_path, tmp_path / "file" / "hopper", "Hopper-v4", expert_step=1, medium_step=2
        )
    monkeypatch.setitem(sys.modules, "sbx", types.SimpleNamespace(SAC=None))
    with pytest.raises(NotADirectoryError, match="file/run"):
        behaviours.train_behaviour("Hopper-v4", tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="no environment 'Hoper-v4'"):
        behaviours.train_behaviour("Hoper-v4", tmp_path / "run")
    assert calls == [] and not (tmp_path / "run").exists()


def test_training_writes_snapshots_and_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = behaviour(0, states=3, actions=1)
    flax = {
        f"Dense_{k}": {"kernel": weight, "bias": bias}
        for k, (weight, bias) in enumerate((*layers.layers, layers.mean, layers.log_std))
    }

    class SAC:
        policy = types.SimpleNamespace(actor_state=types.SimpleNamespace(params={"params": flax}))
        num_timesteps = 0

        def __init__(self, *_: Any, seed: int, **options: Any) -> None:
            assert seed == 4 and options == behaviours.HYPERPARAMETERS

        def learn(self, total: int, callback: Callable[[Any, Any], bool]) -> None:
            for step in range(1, total + 1):
                self.num_timesteps = step
                assert callback({}, {})

    monkeypatch.setitem(sys.modules, "sbx", types.SimpleNamespace(SAC=SAC))
    out = behaviours.train_behaviour("Pendulum-v1", tmp_path / "run", seed=4, total=5, period=2)
    names = {"step-0000002.safetensors", "step-0000004.safetensors", "training.json"}
    assert {path.name for path in out.iterdir()} == names
    read = Behaviour.read(out / "step-0000002.safetensors")
    assert read.dims == (3, 1) and np.array_equal(read.mean[0], layers.mean[0])
    assert json.loads((out / "training.json").read_text())["environment"] == "Pendulum-v1"
