"""The report: one file that needs no other, with the figures of the tables and a warning for what differs."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trainings
import yaml
from hydra import compose, initialize_config_dir

from cpql.commands import words
from cpql.configuration import members, register
from cpql.errors import CheckpointError
from cpql.experiments import history
from cpql.experiments.figures import number
from cpql.experiments.report import Report, render
from cpql.report_cli import main
from cpql.results_cli import main as results
from cpql.tasks import config_folder

KEPT = Path(__file__).parent.parent / "benchmarks" / "results" / "hopper-medium-cpql-seed0.json"
STEPS = (10_000, 20_000, 30_000, 40_000, 50_000)

Write = Callable[..., Path]


def write_run(folder: Path, level: float = 40.0, finished: bool = True, **changes: Any) -> Path:
    """A run's folder with a curve, metrics and a result: those of a kept result, with some changes."""
    result = json.loads(KEPT.read_text()) | {"evaluated": True}
    config = result.pop("configuration") | {
        "configuration": changes.get("agent", "cpql"),
        "run_dir": str(folder),
    }
    result["data"] = result["data"] | changes.pop("data", {})
    seed = config["seed"] = changes.setdefault("training_seed", 0)
    random = np.random.default_rng([seed, int(level)])
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    curve = []
    for step in STEPS:
        returns = (random.normal(level, 9, 20) * 32.5 - 20).tolist()
        score = (float(np.mean(returns)) + 20.272305) / 32.545
        end = {"step": step, "returns": returns, "return_mean": float(np.mean(returns)), "score": score}
        curve.append(result | end | {"score_interval": [score - 3, score + 3], "episodes": 20} | changes)
        (folder / "evaluations" / f"step_{step:08d}.json").write_text(json.dumps(curve[-1]))
    steps = range(500, STEPS[-1] + 1, 500)
    rows = "".join(f"{step},{step / 200 + seed},{step / 190}\n" for step in steps)
    (folder / "metrics.csv").write_text("step,critic/q,actor/q\n" + rows)
    (folder / "timing.csv").write_text(
        "step,seconds,updates_per_second\n500,60.0,8\n1000,100.0,8\n1500,30.0,8\n"
    )
    if finished:
        best = max(curve, key=lambda each: each["score"] or each["return_mean"])
        (folder / "result.json").write_text(json.dumps(curve[-1] | {"best_evaluation": best}))
    return folder


def write_many(folder: Path, agents: dict[str, float], tasks: tuple[str, ...], seeds: int) -> list[Path]:
    """Runs of agents, each at a level of its own, on tasks."""
    return [
        write_run(folder / task / agent / f"seed{seed}", level, agent=agent, task=task, training_seed=seed)
        for task in tasks
        for agent, level in agents.items()
        for seed in range(seeds)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two agents on two tasks, two seeds each."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    write_many(folder, {"cpql": 40.0, "td3_bc": 48.0}, ("hopper-medium", "walker2d-medium"), 2)
    return folder


class Page(HTMLParser):
    """What a page holds; its tags are checked to be closed in the order in which they were opened."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open[-3:])

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.texts.append(data)
        if {"td", "th"} & {*self.open} and "title" not in self.open:
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def rows(self, *begin: str) -> list[list[str]]:
        """The cells of the rows that begin with these, in the order of the page."""
        found = [[" ".join(cell.split()) for cell in row] for row in self.cells]
        return [row for row in found if tuple(row[: len(begin)]) == begin]


def test_the_page_is_whole_and_needs_nothing_else(runs: Path) -> None:
    text = render([str(runs)])
    page = Page(text)
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "poster", "action", "onload", "onclick"), (tag, value)
        if name == "href":
            assert value.startswith("#") and ("section", "id", value[1:]) in page.attributes
        assert "url(" not in value and "//" not in value
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert style and script and not re.search(r"url\(|@import|@font-face", style[1])
    assert not re.search(r"fetch|XMLHttp|import|https?:", script[1])
    assert not re.findall(r"https?://", text)
    charts = [attrs for attrs in page.attributes if attrs[:2] == ("svg", "role")]
    named = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(charts) == len(named) == 2 + 2 + 2 + 1  # curves, episodes and values by task, one profile
    assert "nan" not in " ".join(named + page.texts).replace("Provenance", "")
    for section in ("scores", "curves", "comparison", "episodes", "values", "runs"):
        assert ("section", "id", section) in page.attributes


def test_every_figure_is_that_of_the_results(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    results([str(runs), "--json", str(file), "--against", "td3_bc"])
    expected = json.loads(file.read_text())
    page = Page(render([str(runs)]))

    def shown(estimate: dict[str, Any], digits: int = 1) -> str:
        low, high = (number(end, digits) for end in estimate["interval"])
        return f"{number(estimate['value'], digits)} {low} to {high}"

    for row in expected["rows"]:
        (line,) = [line for line in page.rows(row["task"], row["agent"]) if "[" in line[3]]
        low, high = row["IQM"]["interval"]
        assert line[2] == f"{number(row['mean'])} ± {number(row['std'])}"
        assert line[3] == f"{number(row['IQM']['value'])} [{number(low)}, {number(high)}]"
        assert line[5:8] == ["2", row["episodes"], "1"]
        assert line[8] == ", ".join(number(run["score"]) for run in row["runs"])
        for run in row["runs"]:
            (line,) = page.rows(row["task"], row["agent"], run["seed"].__str__())
            assert line[3] == number(run["score"]) and run["folder"] in line[-1]
    (group,) = expected["groups"]
    for task in group["tasks"]:
        (line,) = page.rows(task)[:1]
        own = {row["agent"]: row for row in expected["rows"] if row["task"] == task}
        cells = [f"{number(row['mean'])} ± {number(row['std'])}" for _, row in sorted(own.items())]
        assert line[1:] == [*cells, number(own["cpql"]["behaviour"])]
    for name in ("IQM", "mean", "median"):
        (line,) = page.rows(name)
        assert [cell.replace(" ", "") for cell in line[1:3]] == [
            shown(group["agents"][agent][name]).replace(" ", "") for agent in ("cpql", "td3_bc")
        ]
    (comparison,) = group["comparisons"]
    line = next(row for row in page.rows("cpql") if row[1] == "–")
    assert line[2].replace(" ", "") == shown(comparison["probability_of_improvement"], 2).replace(" ", "")
    assert shown(group["agents"]["cpql"]["IQM"]).replace(" to ", "to").split()[0] in page.text
    content = Report([str(runs)]).plain
    assert json.loads(json.dumps(content["rows"])) == expected["rows"]


def test_best_and_time_are_those_of_the_folder(runs: Path) -> None:
    page = Page(render([str(runs)]))
    result = json.loads((runs / "hopper-medium" / "cpql" / "seed1" / "result.json").read_text())
    best = result["best_evaluation"]
    (line,) = page.rows("hopper-medium", "cpql", "1")
    assert line[5].split() == [number(best["score"]), "at", f"{best['step']:,}"] or line[5] == (
        f"{number(best['score'])}at {best['step']:,}"
    )
    assert line[7] == "0:02:10"  # 100 s in one process and 30 s in the next
    assert "score again" not in page.text or "episodes=20" in page.text


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "other data": ({"data": {"sha256": "f" * 64}}, "not averaged: hopper-medium, cpql: different data:"),
    "another package": ({"versions": {"torch": "9.9"}}, "torch 2.13.0+cpu (1), 9.9 (1)"),
    "embedded data": ({}, "embedded data, collected by cpql's own behaviours: hopper-medium; these scores"),
    "the same seed": ({"training_seed": 0}, "several runs of seed 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNED)
def test_what_sets_runs_apart_comes_first(name: str, tmp_path: Path) -> None:
    changes, warning = WARNED[name]
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", **{"training_seed": 1, **changes})
    text = Page(render([str(tmp_path)])).text
    assert warning in text and text.index("Before you compare") < text.index(warning) < text.index(
        "IQM [95%]"
    )


def test_the_highest_mean_is_bold_where_conditions_are_the_same(tmp_path: Path, runs: Path) -> None:
    bold = re.findall(r"<strong>(.*?)</strong>", render([str(runs)]))
    found = [row for row in Report([str(runs)]).plain["rows"] if row["agent"] == "td3_bc"]
    assert [float(each.partition("<")[0]) for each in bold] == [round(row["mean"], 1) for row in found]
    write_run(tmp_path / "a", 40.0)
    write_run(tmp_path / "b", 60.0, agent="td3_bc", data={"sha256": "f" * 64})
    assert "<strong>" not in render([str(tmp_path)])


def test_unfinished_runs_have_a_curve_and_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "runs" / "a", finished=False, agent="bc")
    with (folder / "metrics.csv").open("a") as table:
        table.write("50500,1")  # being written
    page = Page(render([str(tmp_path)]))
    assert "1 unfinished" in page.text and "Learning curves" in page.text and "Scores Mean" not in page.text
    (line,) = page.rows("hopper-medium", "bc", "0")
    assert line[3] == "unfinished" and line[6] == "50,000 of 50,000"
    assert any(
        "bc, unfinished ends at" in value for _, name, value in page.attributes if name == "aria-label"
    )
    for file in (folder / "evaluations").iterdir():
        file.unlink()
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "no.html")])
    assert "no run has an evaluation: 1 found" in capsys.readouterr().err
    assert not (tmp_path / "no.html").exists()


def test_a_damaged_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a")
    for file in ("metrics.csv", "evaluations/step_00010000.json", "timing.csv"):
        before = (folder / file).read_text()
        (folder / file).write_text(before[:40] + "?\n?\n")
        with pytest.raises(CheckpointError, match=rf"{file}: can't be used"):
            render([str(tmp_path)])
        (folder / file).write_text(before)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"' onload=x \x1b[31m & {{ 7 * 7 }}"
    write_run(tmp_path / "a<b>&'\"c", agent=evil, task=evil, data={"id": evil})
    write_run(tmp_path / "d", agent=evil + "2", task=evil, data={"id": evil})
    text = render([str(tmp_path)], title=evil, command=lambda settings: [evil])
    page = Page(text)
    assert text.count("<script>") == 1 and "\x1b" not in text and "49" not in " ".join(page.texts[:3])
    assert "<script>alert(1)</script>\"' onload=x \\x1b[31m & {{ 7 * 7 }}" in " ".join(page.texts)
    assert not {name for _, name, _ in page.attributes if name.startswith("on")}


def test_without_a_critic_or_rivals_there_is_no_such_section(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "metrics.csv").write_text("step,actor/loss\n500,1.0\n")
    page = Page(render([str(tmp_path)]))
    sections = {value for tag, name, value in page.attributes if (tag, name) == ("section", "id")}
    assert sections == {"scores", "curves", "episodes", "runs"}


def test_published_figures_stand_beside_the_same_data_only(tmp_path: Path) -> None:
    published = {"source": "d4rl", "id": "hopper-medium-v2"}
    write_run(tmp_path / "a", agent="td3_bc", data=published)
    page = Page(render([str(tmp_path / "a")]))
    score = json.loads((tmp_path / "a" / "result.json").read_text())["score"]
    assert ["hopper-medium", "td3_bc", "60.9 ± 7.6", number(score)] in page.rows("hopper-medium", "td3_bc")
    assert "Tarasov et al. 2023" in page.text and "Before you compare" not in page.text
    for number_of, data in enumerate(
        ({"source": "embedded"}, {"id": "hopper-medium-v0"}, {"source": "minari"})
    ):
        folder = write_run(tmp_path / f"other{number_of}", agent="td3_bc", data=published | data)
        assert "Tarasov" not in Page(render([str(folder)])).text


def test_small_films_are_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpql.experiments.report.FILM_BYTES", 100)
    folder = write_run(tmp_path / "a") / "evaluations"
    (folder / "best_episode.gif").write_bytes(b"GIF89a")
    (folder / "worst_episode.mp4").write_bytes(b"0" * 100)
    (folder / "median_episode.mp4").write_bytes(b"0" * 101)
    page = Page(render([str(tmp_path)]))
    sources = {tag: value for tag, name, value in page.attributes if name == "src"}
    assert sources["img"] == "data:image/gif;base64,R0lGODlh"
    assert sources["video"].startswith("data:video/mp4;base64,MDAw")
    assert "cpql on hopper-medium, seed 0: worst episode" in page.text
    assert f"seed 0: median episode: {folder / 'median_episode.mp4'}" in page.text


@pytest.mark.slow
def test_a_run_s_command_gives_its_settings(tmp_path: Path) -> None:
    """Of the kept run, whose file names more than its command did; and of what no words give."""
    folder = write_run(tmp_path / "a", training_seed=7)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    found = words(settings)
    assert found and found[:3] == ["env=hopper-medium", "budget=full", "agent=cpql"]
    assert {"budget.updates=50000", "dataset=embedded", "seed=7"} < {*found}
    settings["agent"]["eta"] = 0.25
    assert {*(words(settings) or ())} == {*found, "agent.eta=0.25"}
    for changes in ({"configuration": "mine"}, {"checkpoint": "nowhere"}, {"agent": {"name": "nobody"}}):
        assert words(settings | changes) is None
    own = {"mode=online", "budget=online", "env.id=Pendulum-v1", "online.start_steps=9", "agent=cpql_online"}
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", [*own, "configuration=cpql_online", "seed=3", "run_dir=r"])
    (config,) = members(content, [word.partition("=")[0] for word in own])
    assert {*(words(asdict(config)) or ())} == {*own, "dataset=auto", "seed=3", "run_dir=r"}
    (line,) = Page(render([str(tmp_path)], command=words)).rows("hopper-medium", "cpql", "7")
    assert shlex.join(["python", "scripts/train.py", *found]) in line[-1]
    assert f"python scripts/evaluate.py checkpoint={folder} episodes=20 seed=100" in line[-1]


def test_the_command_writes_the_file(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs / "hopper-medium" / "cpql"), "--out", str(tmp_path / "page.html"), "--title", "Mine"])
    assert "page.html (0." in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text())
    assert page.texts.count("Mine") == 1 and "Mine · cpql report" in page.text


@pytest.mark.slow
def test_a_hundred_runs_are_small_and_soon_there(tmp_path: Path) -> None:
    agents = {name: 30.0 + 4 * k for k, name in enumerate("abcdefghij")}
    write_many(tmp_path, agents, ("hopper-medium", "walker2d-medium"), 5)
    began = time.process_time()
    text = render([str(tmp_path)])
    assert time.process_time() - began < 30
    assert len(text.encode()) < 2_000_000 and text.count("/seed") >= 100


@pytest.mark.slow
def test_the_report_of_a_training(tmp_path: Path) -> None:
    trainings.write_dataset(tmp_path / "data.hdf5")
    trainings.run_group(tmp_path / "runs", tmp_path / "data.hdf5", (0, 1))
    page = Page(render([str(tmp_path / "runs")]))
    assert "2 finished runs" in page.text
    for run in (
        history.read_history(tmp_path / "runs" / "seed0"),
        history.read_history(tmp_path / "runs" / "seed1"),
    ):
        (line,) = page.rows("hopper-medium", "cpql", str(run.seed))
        assert line[3] == number(json.loads((run.folder / "result.json").read_text())["score"])
        assert run.points[-1].step == 40 and run.metrics["step"][-1] == 40 and run.value_of_data is not None
