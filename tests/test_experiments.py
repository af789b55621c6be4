"""Finished runs beside one another: what is averaged, what isn't and why, and what is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cli
import trainings
import yaml

from cpql.errors import CheckpointError
from cpql.experiments.results import Row, compare, find_runs, groups, read_run, rows
from cpql.experiments.statistics import estimate, iqm
from cpql.results_cli import main

KEPT = Path(__file__).parent.parent / "benchmarks" / "results" / "hopper-medium-cpql-seed0.json"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the folder of a finished run: that of a result that is kept, with some changes."""

    def run(
        name: str, score: float | None = 40.0, settings: Any = None, data: Any = None, **changes: Any
    ) -> Path:
        result = json.loads(KEPT.read_text())
        config = result.pop("configuration")
        config["agent"] |= settings or {}
        result |= {"evaluated": True, "score": score, "data": result["data"] | (data or {})} | changes
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return run


@pytest.fixture
def seeds(write: Write) -> Callable[..., None]:
    """Write a run for each score; the first has seed 0."""

    def run(name: str, scores: list[float | None], **changes: Any) -> None:
        for seed, score in enumerate(scores):
            write(f"{name}/seed{seed}", score, training_seed=seed, **changes)

    return run


def read(folder: Path) -> list[Row]:
    return rows(result for run in find_runs([str(folder)]) if (result := read_run(run)))


def test_a_row_is_the_mean_over_the_seeds_of_a_task_and_an_agent(
    tmp_path: Path, seeds: Callable[..., None]
) -> None:
    seeds("a", [30.0, 34.0, 41.0], agent="cpql", behaviour_score=39.5)
    seeds("b", [20.0, 22.0], agent="cpql", task="walker2d-medium")
    seeds("c", [10.0], agent="td3_bc")
    found = {(row.task, row.agent): row for row in read(tmp_path)}
    assert list(found) == [
        ("hopper-medium", "cpql"),
        ("hopper-medium", "td3_bc"),
        ("walker2d-medium", "cpql"),
    ]
    row = found["hopper-medium", "cpql"]
    assert row.scores.tolist() == [30.0, 34.0, 41.0] and row.tried == 1 and not row.reason
    assert [run.seed for run in row.runs] == [0, 1, 2] and row.runs[0].behaviour == 39.5
    assert len(row.runs[0].returns) == 20 and "mujoco" in row.runs[0].versions
    (group,) = groups(found.values())
    assert group.scale == "D4RL score, embedded data"
    assert group.complete.keys() == {"cpql"}  # the other one has no walker
    expected = np.array([30.0, 34.0, 41.0]), np.array([20.0, 22.0])
    for found_scores, scores in zip(group.complete["cpql"], expected, strict=True):
        np.testing.assert_array_equal(found_scores, scores)


def test_runs_are_found_from_folders_patterns_and_parents_each_once(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = write("deep/er/one"), write("two", training_seed=1)
    (one / "wandb" / "files").mkdir(parents=True)
    (one / "wandb" / "files" / "config.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for words in (["runs"], ["runs/**"], ["runs/two", "runs/deep"], ["runs", "runs/tw?", str(two)]):
        assert {run.resolve() for run in find_runs(words)} == {one, two}
    for word in ("runs/three*", "nowhere"):
        with pytest.raises(CheckpointError, match=rf"{word.replace('*', '.')}: no run there"):
            find_runs(["runs", word])


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "other data": ({"data": {"sha256": "f" * 64}}, "different data: embedded hopper-medium 6e78095e (A), "
                   "embedded hopper-medium ffffffff (B)"),
    "another source": ({"data": {"source": "d4rl"}}, "d4rl hopper-medium 6e78095e (B)"),
    "fewer episodes": ({"returns": [1.0, 2.0]}, "different episodes: 20 (A), 2 (B)"),
    "another rule": ({"rule": "50 candidates"}, "different rule of acting: actor alone, sampled, 1 step (A), "
                     "50 candidates (B)"),
    "another environment": ({"environment": "Hopper-v5"}, "different environment: Hopper-v4 (A), "
                            "Hopper-v5 (B)"),
    "its options": ({"environment_options": {"max_episode_steps": 5}}, "{'max_episode_steps': 5} (B)"),
    "other references": ({"references": {"of": "D4RL", "random": 0, "expert": 1}}, "0 to 1 (B)"),
    "the same seed": ({"training_seed": 0}, "several runs of seed 0 (A, B)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_differs_is_not_averaged_and_the_table_says_why(
    name: str, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    changes, why = CONFLICTS[name]
    a, b = write("a", 30.0, training_seed=0), write("b", 50.0, **{"training_seed": 1, **changes})
    write("c", 20.0, agent="td3_bc")
    bad, good = read(tmp_path)
    assert why in bad.reason.replace(str(a), "A").replace(str(b), "B") and not good.reason
    assert [row.agent for group in groups([bad, good]) for row in group.rows] == ["td3_bc"]
    main([str(tmp_path), "--json", str(tmp_path / "all.json")])
    out = capsys.readouterr().out
    assert "not averaged" in out and f"not averaged: hopper-medium, cpql: {bad.reason}" in out
    assert "40.0" not in out.replace("40.4", "")
    first, second = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert first["mean"] is None and first["not_averaged"] == bad.reason
    assert second["mean"] == 20.0 and second["not_averaged"] is None


def test_settings_are_told_apart_by_few_names_and_counted(tmp_path: Path, seeds: Callable[..., None]) -> None:
    for eta, scores in ((0.5, [10.0, 12.0]), (1.0, [20.0, 22.0]), (2.0, [30.0, 32.0])):
        seeds(f"{eta}", scores, settings={"eta": eta, "batch_size": int(100 * eta)})  # these go together
    seeds("walker", [5.0], settings={"eta": 1.0}, task="walker2d-medium")
    found = read(tmp_path)
    assert len({row.agent for row in found if row.task == "hopper-medium"}) == 3
    assert {row.tried for row in found if row.task == "hopper-medium"} == {3}
    assert all(row.agent.startswith("cpql batch_size=") and "eta" not in row.agent for row in found)
    best = groups(found)[0].expected_best()
    assert best.keys() == {("hopper-medium", "cpql")}
    # Of the means 11, 21 and 31: each at first, then the best of 9 pairs, then of 27 triples.
    expected = [21.0, (11 + 3 * 21 + 5 * 31) / 9, (11 + 7 * 21 + 19 * 31) / 27]
    np.testing.assert_allclose(best["hopper-medium", "cpql"], expected)


def test_values_published_by_task_are_one_agent(tmp_path: Path, seeds: Callable[..., None]) -> None:
    seeds("a", [1.0, 2.0], settings={"eta": 0.5})
    seeds("b", [3.0, 4.0], settings={"eta": 0.1}, task="walker2d-medium")
    found = read(tmp_path)
    assert [(row.agent, row.tried) for row in found] == [("cpql", 1), ("cpql", 1)]


def test_a_setting_that_a_version_did_not_have_yet_is_its_default(tmp_path: Path, write: Write) -> None:
    write("old", training_seed=0)
    new = write("new", training_seed=1, settings={"q_loss": "normalised"})
    assert "q_loss" not in (tmp_path / "runs/old/config.yaml").read_text()
    assert "q_loss" in (new / "config.yaml").read_text()
    (row,) = read(tmp_path)
    assert row.tried == 1 and len(row.runs) == 2


def test_lengths_of_training_are_settings(tmp_path: Path, write: Write) -> None:
    write("short", training_seed=0, step=1000)
    write("long", training_seed=0)
    assert [(row.agent, row.tried) for row in read(tmp_path)] == [
        ("cpql updates=1000", 2),
        ("cpql updates=50000", 2),
    ]


def test_scores_of_different_scales_are_in_different_groups(
    tmp_path: Path, seeds: Callable[..., None]
) -> None:
    none = {"of": "D4RL", "random": None, "expert": None}
    seeds("a", [1.0, 2.0])
    seeds("b", [3.0, 4.0], task="b", data={"source": "d4rl"})
    seeds("c", [None, None], task="c", references=none, return_mean=900.0, behaviour_return=70.0)
    seeds("d", [None, None], task="d", references=none, return_mean=7.0, behaviour_return=None)
    seeds("e", [5.0, 6.0], task="e", references={"of": "Minari", "random": 0.0, "expert": 1.0})
    found = {group.scale: group for group in groups(read(tmp_path))}
    assert found.keys() == {
        "D4RL score, embedded data",
        "D4RL score, d4rl data",
        "Minari score, embedded data",
        "c, return, embedded data",
        "d, return, embedded data",
    }
    row = found["c, return, embedded data"].rows[0]
    assert row.scores.tolist() == [900.0, 900.0] and row.runs[0].behaviour == 70.0


def test_a_comparison_pairs_seeds_and_leaves_out_other_data(
    tmp_path: Path, seeds: Callable[..., None]
) -> None:
    seeds("a", [10.0, 20.0, 60.0])
    seeds("b", [9.0, 25.0], agent="td3_bc")
    seeds("c", [50.0, 50.0], task="walker2d-medium")
    seeds("d", [40.0, 44.0], task="walker2d-medium", agent="td3_bc")
    seeds("e", [0.0, 0.0], task="halfcheetah-medium")
    seeds("f", [100.0, 100.0], task="halfcheetah-medium", agent="td3_bc", data={"sha256": "f" * 64})
    (group,) = groups(read(tmp_path))
    found = compare(group, "cpql", "td3_bc")
    assert found.tasks == ("hopper-medium", "walker2d-medium") and found.pairs == 4
    assert found.difference and found.improvement
    assert found.difference.value == ((1 - 5) / 2 + (10 + 6) / 2) / 2
    assert found.improvement.value == ((1 + 1 + 2) / 6 + 1.0) / 2
    assert found.difference.low <= found.difference.value <= found.difference.high
    (why,) = found.left_out
    assert why.startswith("halfcheetah-medium: data embedded hopper-medium 6e78095e for cpql, embedded")
    assert group.apart() == [why]
    nothing = compare(group, "cpql", "nobody")
    assert nothing.difference is nothing.improvement is None and nothing.pairs == 0


DAMAGE: dict[str, tuple[str, Callable[[str], str]]] = {
    "cut": ("result.json", lambda text: text[:300]),
    "empty": ("result.json", lambda text: ""),
    "a list": ("result.json", lambda text: "[]"),
    "no score": ("result.json", lambda text: text.replace('"score"', '"skore"')),
    "a score in words": ("result.json", lambda text: text.replace('"score": 40.0', '"score": "good"')),
    "no number": ("result.json", lambda text: text.replace('"score": 40.0', '"score": NaN')),
    "no configuration": ("config.yaml", lambda text: ""),
    "no mapping": ("config.yaml", lambda text: "agent: cpql"),
    "no YAML": ("config.yaml", lambda text: "{"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_folder_is_one_line_that_names_the_file(
    name: str, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file, change = DAMAGE[name]
    write("good", training_seed=1)
    path = write("broken") / file
    path.write_text(change(path.read_text()))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and str(path) in err


def test_runs_without_a_result_are_left_out_and_named(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    unfinished, nowhere = write("unfinished"), write("nowhere", evaluated=False)
    (unfinished / "result.json").unlink()
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no run is finished and evaluated: 2 found" in capsys.readouterr().err
    write("good")
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert f"left out: {nowhere}, {unfinished}" in out and "needs two seeds" in out


def test_another_evaluation_takes_the_place_of_the_last_one(tmp_path: Path, write: Write) -> None:
    run = write("run")
    last = run / "checkpoints" / "last"
    last.mkdir(parents=True)
    content = {"score": 77.0, "returns": [1.0] * 100, "rule": "8 candidates", "policy": {"step": 50_000}}
    (last / "evaluation_100_1000.json").write_text(json.dumps(content))
    found = read_run(run, "evaluation_100_1000.json")
    assert found and found.score == 77.0 and found.conditions["rule of acting"] == "8 candidates"
    assert found.conditions["episodes"] == "100"
    with pytest.raises(CheckpointError, match=r"last.none.json"):
        read_run(run, "none.json")
    (last / "evaluation_100_1000.json").write_text(json.dumps(content | {"policy": {"step": 10}}))
    with pytest.raises(CheckpointError, match="of update 10, and the result of 50000"):
        read_run(run, "evaluation_100_1000.json")


def test_the_files_hold_what_the_table_shows(
    tmp_path: Path, seeds: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    ours, theirs = [30.0, 34.0, 41.0], [10.0, 20.0, 21.0]
    seeds("a", ours)
    seeds("b", theirs, agent="td3_bc")
    files = {kind: tmp_path / f"all.{kind}" for kind in ("csv", "markdown", "json")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    main([str(tmp_path), "--against", "td3_bc", *options])
    out = capsys.readouterr().out
    interval = estimate(iqm, [np.array(ours)])
    figures = f"35.0 [{interval.low:.1f}, {interval.high:.1f}]"
    assert "35.0 ± 5.6" in out and figures in out
    markdown = files["markdown"].read_text()
    assert "| hopper-medium | cpql | 35.0 ± 5.6 | 3 | 1 | 40.4 |" in markdown
    assert (
        f"| cpql | {figures} |" in markdown
        and "| cpql | 18.0 [14.0, 20.0] | 3 | 1.00 [1.00, 1.00] | 1 |" in markdown
    )
    table = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [(row["agent"], float(row["mean"]), row["seeds"]) for row in table] == [
        ("cpql", 35.0, "0 1 2"),
        ("td3_bc", 17.0, "0 1 2"),
    ]
    content = json.loads(files["json"].read_text())
    assert [run["score"] for run in content["rows"][0]["runs"]] == ours
    assert len(content["rows"][0]["runs"][0]["returns"]) == 20
    (group,) = content["groups"]
    assert group["agents"]["cpql"]["IQM"] == {"value": 35.0, "interval": [interval.low, interval.high]}
    share = group["agents"]["td3_bc"]["profile"]["value"]
    assert group["thresholds"][0] == 10.0 and share[0] == pytest.approx(2 / 3) and share[-1] == 0.0
    assert group["comparisons"][0]["difference"]["value"] == pytest.approx(18.0)


def test_an_agent_that_is_not_there_is_named(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("run")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--against", "cpq"])
    assert "--against=cpq: no such agent: did you mean cpql?" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_other_commands_write_is_read(tmp_path: Path) -> None:
    trainings.write_dataset(tmp_path / "data.hdf5")
    words = (*test_cli.QUICK, "env=hopper-medium", "dataset.path=data.hdf5", "run_dir=runs/a", "seeds=[0,1]")
    done = test_cli.run("train.py", *words, folder=tmp_path)
    assert not done.returncode, done.stderr
    (row,) = read(tmp_path / "runs")
    assert row.agent == "cpql" and [run.seed for run in row.runs] == [0, 1] and not row.reason
    for run in row.runs:
        result = json.loads((run.folder / "result.json").read_text())
        assert result["checkpoint"] == "last" and run.score == result["score"]
        assert list(run.returns) == result["returns"] and len(run.returns) == result["episodes"] == 2
        assert run.conditions["rule of acting"] == "actor alone, sampled, 1 step"
        assert run.conditions["data"].split()[-1] == result["data"]["sha256"][:8]
        assert run.settings["updates"] == "30" and run.versions["torch"]

    evaluate = ("checkpoint=runs/a-seed0", "episodes=4", "candidates=3")
    done = test_cli.run("evaluate.py", *evaluate, folder=tmp_path)
    assert not done.returncode, done.stderr
    name = "evaluation_4_1000_3candidates.json"
    done = test_cli.run("results.py", "runs/a-seed0", "--evaluation", name, folder=tmp_path)
    assert not done.returncode and not done.stderr, done.stderr
    assert "scored by 4 episodes, 3 candidates ranked by Q" in done.stdout and "hopper-medium" in done.stdout
