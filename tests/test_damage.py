"""Damaged runs: each is gone on with as if nothing had been, or refused in a line that names the file.

Each damage is done to a copy of a run that was killed after 14 of 16 updates, with checkpoints of updates 10
and 12, or of a finished one. Whoever resumes it, acts with it or starts from it meets no other exception.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torture import KINDS, Place, drawn_quickly
from trainings import Killed, everything

from cpql.deploy.policy import Policy
from cpql.errors import CheckpointError
from cpql.training.checkpoint import find_training, load_training
from cpql.training.members import Means

Damage = Callable[[Path], object]

LAST, BEFORE = "checkpoints/step_00000012", "checkpoints/step_00000010"
STATE, JSON = f"{LAST}/training/state.safetensors", f"{LAST}/training/state.json"
WEIGHTS, POLICY = f"{LAST}/policy/model.safetensors", f"{LAST}/policy/config.json"
LINK, EVALUATION = "checkpoints/last", "evaluations/step_00000005.json"


def holds(content: bytes) -> Damage:
    """A file with another content."""
    return lambda path: path.write_bytes(content)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(position: float) -> Damage:
    """One bit is another one, at some fraction of the file's length."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * len(content))] ^= 4
        path.write_bytes(content)

    return damage


def cut(count: int | None) -> Damage:
    """Without its last bytes, or all but 20."""
    return lambda path: os.truncate(path, 20 if count is None else path.stat().st_size - count)


def adding(content: bytes) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes() + content)


def gone(path: Path) -> None:
    path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)


def folder(path: Path) -> None:
    """A folder where a file is expected, or a file where a folder is."""
    is_folder = path.is_dir() and not path.is_symlink()
    if os.path.lexists(path):
        gone(path)
    if is_folder:
        path.write_text("a file")
    else:
        (path / "inside").mkdir(parents=True)


def replaced_by_a_file(path: Path) -> None:
    path.unlink()
    path.touch()


def mode(number: int) -> Damage:
    return lambda path: path.chmod(number)


def points_to(target: str) -> Damage:
    def damage(path: Path) -> None:
        gone(path)
        path.symlink_to(target)

    return damage


def without(key: str) -> Damage:
    """JSON that lacks an entry."""
    return lambda path: path.write_text(json.dumps({k: v for k, v in _json(path).items() if k != key}))


def saying(key: str, value: object) -> Damage:
    """JSON with another entry."""
    return lambda path: path.write_text(json.dumps({**_json(path), key: value}))


def _json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))


def copied_to(name: str) -> Damage:
    return lambda path: shutil.copytree(path, path.parent / name)


def exchanged_with(other: str) -> Damage:
    def damage(path: Path) -> None:
        partner = path.parents[len(Path(other).parts) - 1] / other
        aside = path.with_name("aside")
        path.rename(aside)
        partner.rename(path)
        aside.rename(partner)

    return damage


def words(text: list[str]) -> list[str]:
    return [*text[:-1], text[-1].replace(".", "x")]


def all_states(damage: Damage) -> Damage:
    return lambda path: [damage(file) for file in path.glob("step_*/training/state.safetensors")]


def lines(change: Callable[[list[str]], list[str]]) -> Damage:
    """A table with other lines."""
    return lambda path: path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


NESTED = b"[" * 100_000
GARBAGE = bytes(range(256)) * 4

# How a run ends that was damaged.
SAME = "as it would have"
TAKEN = "as it would have, from the checkpoint before, and a line says so"
LACKS = "with the weights that it would have had, without the metrics that are lost"
REFUSED = "in a line that names the file"
REFUSED_AS_A_RUN = "in a line that names the run, since it isn't the file that is wrong"

# What is damaged, how, and how the run ends.
KILLED: dict[str, tuple[str, Damage, str]] = {
    "state.safetensors half": (STATE, half, TAKEN),
    "state.safetensors empty": (STATE, holds(b""), TAKEN),
    "state.safetensors garbage": (STATE, holds(GARBAGE), TAKEN),
    "state.safetensors of zeros": (STATE, holds(bytes(5000)), TAKEN),
    "state.safetensors, a bit of a tensor": (STATE, flip(0.7), TAKEN),
    "state.safetensors, a bit of the header": (STATE, flip(0.01), TAKEN),
    "state.safetensors, a bit of the length": (STATE, flip(0.0), TAKEN),
    "state.safetensors longer": (STATE, adding(b"more"), TAKEN),
    "state.safetensors missing": (STATE, gone, TAKEN),
    "state.safetensors a folder": (STATE, folder, TAKEN),
    "state.safetensors of another step": (
        STATE,
        exchanged_with(f"{BEFORE}/training/state.safetensors"),
        TAKEN,
    ),
    "state.json half": (JSON, half, TAKEN),
    "state.json empty": (JSON, holds(b""), TAKEN),
    "state.json garbage": (JSON, holds(GARBAGE), TAKEN),
    "state.json a list": (JSON, holds(b"[]"), TAKEN),
    "state.json nested": (JSON, holds(NESTED), TAKEN),
    "state.json missing": (JSON, gone, SAME),
    "state.json a folder": (JSON, folder, TAKEN),
    "state.json of another step": (JSON, saying("step", 3), TAKEN),
    "state.json with a number for a digest": (JSON, saying("sha256", 3), TAKEN),
    "state.json without the dataset": (JSON, without("data_sha256"), REFUSED),
    "state.json of another dataset": (JSON, saying("data_sha256", "0"), REFUSED_AS_A_RUN),
    "model.safetensors half": (WEIGHTS, half, SAME),
    "model.safetensors empty": (WEIGHTS, holds(b""), SAME),
    "model.safetensors, a bit": (WEIGHTS, flip(0.7), SAME),
    "model.safetensors missing": (WEIGHTS, gone, SAME),
    "policy/config.json half": (POLICY, half, SAME),
    "policy/config.json garbage": (POLICY, holds(GARBAGE), SAME),
    "policy/config.json nested": (POLICY, holds(NESTED), SAME),
    "policy/config.json missing": (POLICY, gone, SAME),
    "policy/config.json of other widths": (POLICY, saying("state_dim", 4), SAME),
    "config.yaml half": ("config.yaml", half, REFUSED),
    "config.yaml empty": ("config.yaml", holds(b""), REFUSED),
    "config.yaml garbage": ("config.yaml", holds(GARBAGE), REFUSED),
    "config.yaml a list": ("config.yaml", holds(b"[1]"), REFUSED),
    "config.yaml with code": ("config.yaml", holds(b"!!python/object/apply:os.system ['exit 1']"), REFUSED),
    "config.yaml nested": ("config.yaml", holds(NESTED), REFUSED),
    "config.yaml without a budget": ("config.yaml", holds(b"seed: 0"), REFUSED),
    "config.yaml missing": ("config.yaml", gone, REFUSED),
    "config.yaml a folder": ("config.yaml", folder, REFUSED),
    "metrics.csv, half a row": ("metrics.csv", cut(40), LACKS),
    "metrics.csv, half a header": ("metrics.csv", cut(None), LACKS),
    "metrics.csv with two headers": ("metrics.csv", lines(lambda text: [text[0], *text]), SAME),
    "metrics.csv with zeros": ("metrics.csv", adding(bytes(99)), SAME),
    "metrics.csv with a wide row": ("metrics.csv", adding(b"13" + b",1" * 99 + b"\n"), SAME),
    "metrics.csv with words": ("metrics.csv", lines(words), LACKS),
    "metrics.csv empty": ("metrics.csv", holds(b""), LACKS),
    "metrics.csv garbage": ("metrics.csv", holds(GARBAGE), LACKS),
    "metrics.csv missing": ("metrics.csv", gone, LACKS),
    "metrics.csv a folder": ("metrics.csv", folder, REFUSED),
    "timing.csv, half a row": ("timing.csv", half, SAME),
    "timing.csv missing": ("timing.csv", gone, SAME),
    "timing.csv garbage": ("timing.csv", holds(GARBAGE), SAME),
    "timing.csv a folder": ("timing.csv", folder, REFUSED),
    "evaluation half": (EVALUATION, half, REFUSED),
    "evaluation empty": (EVALUATION, holds(b""), REFUSED),
    "evaluation garbage": (EVALUATION, holds(GARBAGE), REFUSED),
    "evaluation nested": (EVALUATION, holds(NESTED), REFUSED),
    "evaluation without its return": (EVALUATION, without("return_mean"), REFUSED),
    "evaluation with a word for its return": (EVALUATION, saying("return_mean", "x"), REFUSED),
    "evaluation missing": (EVALUATION, gone, LACKS),
    "evaluation a folder": (EVALUATION, folder, REFUSED),
    "evaluation of another name": ("evaluations/step_bak.json", holds(b"{}"), SAME),
    "evaluations missing": ("evaluations", gone, LACKS),
    "evaluations a file": ("evaluations", folder, REFUSED),
    "last missing": (LINK, gone, SAME),
    "last dangling": (LINK, points_to("step_00000099"), SAME),
    "last outside": (LINK, points_to("/"), SAME),
    "last itself": (LINK, points_to("last"), SAME),
    "last an older one": (LINK, points_to("step_00000010"), SAME),
    "last a folder": (LINK, folder, SAME),
    "last a file": (LINK, replaced_by_a_file, SAME),
    "step_bak": (LAST, copied_to("step_bak"), SAME),
    "step_ with too few digits": (LAST, copied_to("step_99"), SAME),
    "step_99999999 empty": ("checkpoints/step_99999999", lambda path: path.mkdir(), SAME),
    "step_99999999 a copy": (LAST, copied_to("step_99999999"), REFUSED_AS_A_RUN),
    "step_00000014 a copy": (LAST, copied_to("step_00000014"), TAKEN),
    "step_00000013 a file": ("checkpoints/step_00000013", holds(b""), SAME),
    "training missing": (f"{LAST}/training", gone, SAME),
    "policy missing": (f"{LAST}/policy", gone, SAME),
    "checkpoint missing": (LAST, gone, SAME),
    "checkpoint a file": (LAST, folder, SAME),
    "checkpoints exchanged": (LAST, exchanged_with("step_00000010"), TAKEN),
    "checkpoints missing": ("checkpoints", gone, SAME),
    "checkpoints a file": ("checkpoints", folder, REFUSED),
    "every state half": ("checkpoints", all_states(half), REFUSED),
    "learning_curve.png a folder": ("learning_curve.png", folder, SAME),
    ".lock of a dead process": (".lock", holds(b"process 1 on elsewhere"), SAME),
    ".lock a folder": (".lock", folder, REFUSED_AS_A_RUN),
    "left over by a killed process": (".config.yaml.xxxx.aside", folder, SAME),
}
# Nothing of this keeps root out.
FORBIDDEN: dict[str, tuple[str, Damage, str]] = {
    "state.safetensors not to be read": (STATE, mode(0), TAKEN),
    "config.yaml not to be read": ("config.yaml", mode(0), REFUSED),
    "metrics.csv not to be written": ("metrics.csv", mode(0o400), SAME),
    "checkpoints not to be written": ("checkpoints", mode(0o500), REFUSED),
    "run not to be written": (".", mode(0o500), REFUSED_AS_A_RUN),
}
FINISHED: dict[str, tuple[str, Damage, str]] = {
    "result.json half": ("result.json", half, REFUSED),
    "result.json empty": ("result.json", holds(b""), REFUSED),
    "result.json garbage": ("result.json", holds(GARBAGE), REFUSED),
    "result.json a list": ("result.json", holds(b"[]"), REFUSED),
    "result.json nested": ("result.json", holds(NESTED), REFUSED),
    "result.json without its step": ("result.json", without("step"), REFUSED),
    "result.json missing": ("result.json", gone, SAME),
    "result.json a folder": ("result.json", folder, REFUSED),
}


class Runs(NamedTuple):
    place: Place
    whole: Path
    killed: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    place = Place(tmp_path_factory.mktemp("runs"))
    runs, count = Runs(place, place.folder / "whole", place.folder / "killed"), 0
    original = Means.add

    def add(self: Means, metrics: dict[str, torch.Tensor]) -> None:
        nonlocal count
        count += 1
        original(self, metrics)
        if count == 14:
            raise Killed

    with drawn_quickly():
        place.start(KINDS["single"], runs.whole)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Means, "add", add)
            place.start(KINDS["single"], runs.killed)
        yield runs


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_may_not_be_touched(name: str, runs: Runs, tmp_path: Path) -> None:
    check(FORBIDDEN[name], runs.killed, runs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KILLED, *FINISHED])
def test_damage(name: str, runs: Runs, tmp_path: Path) -> None:
    check((KILLED | FINISHED)[name], runs.killed if name in KILLED else runs.whole, runs, tmp_path)


def check(case: tuple[str, Damage, str], original: Path, runs: Runs, tmp_path: Path) -> None:
    """Damage a copy of a run, and read and resume it."""
    run, (path, damage, ends) = tmp_path / "run" / "seed0", case
    shutil.copytree(original, run.parent, symlinks=True)
    damage(run / path)
    reads: tuple[Callable[[], object], ...] = (
        lambda: Policy.load(run),
        lambda: load_training(*find_training(run)),
    )
    for read in reads:
        with suppress(CheckpointError):
            read()
    if ends in (REFUSED, REFUSED_AS_A_RUN):
        with pytest.raises(CheckpointError) as refused:
            runs.place.start(KINDS["single"], run.parent, resume=True)
        message = str(refused.value)
        assert "\n" not in message and str(run) in message
        assert ends == REFUSED_AS_A_RUN or path.partition("/")[0] in message.removeprefix(str(run))
        return
    output = runs.place.start(KINDS["single"], run.parent, resume=True)
    found, expected = everything(run), everything(runs.whole / "seed0")
    found.pop("step_bak.json", None)  # a stranger's
    warnings = [line for line in output.splitlines() if line.startswith("warning: ") and str(run) in line]
    if ends == LACKS:
        assert all(found[name] == expected[name] for name in expected if name.endswith(".safetensors"))
        return
    assert found == expected
    assert bool(warnings) == (ends == TAKEN)
    assert all(str(run / "checkpoints") in line and "checkpoint before it" in line for line in warnings)
