"""What is said of a dataset: hand-made ones, random ones against a plain loop, and each finding."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpql.data.inspection import Inspection, describe, picture
from cpql.data.transitions import Transitions
from cpql.errors import DataError
from cpql.tasks import Task

TASK = Task("drawn", "Drawn-v0", 2.0, 12.0)


def drawing() -> dict[str, Any]:
    """Eight rows: 0-2 terminate, 3-5 time out, 6-7 are cut."""
    return {
        "observations": np.array([[0.0, 5], [1, 5], [2, 5], [10, 5], [11, 5], [12, 5], [20, 5], [21, 5]]),
        "actions": np.array([[-1.0], [0], [0.5], [0.9995], [0.25], [0], [0.1], [-0.2]]),
        "rewards": np.arange(8, dtype=np.float32),
        "next_observations": np.array(
            [[1.0, 5], [2, 5], [3, 5], [11, 5], [12, 5], [13, 5], [21, 5], [22, 5]]
        ),
        "terminals": np.array([0, 0, 1, 0, 0, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 0, 0, 1, 0, 0], bool),
    }


def clean(rows: int = 400) -> dict[str, Any]:
    """Random rows of episodes of 20 steps, with nothing suspicious about them."""
    generator = np.random.default_rng(0)
    states = generator.normal(size=(rows + 1, 3)).astype(np.float32)
    return {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": generator.uniform(-0.9, 0.9, (rows, 2)).astype(np.float32),
        "rewards": generator.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) % 40 == 19,
        "timeouts": np.arange(rows) % 40 == 39,
    }


def test_the_drawing_by_hand() -> None:
    found = Inspection(Transitions.from_dict(drawing(), id="drawn"))
    assert (found.episodes, found.terminated, found.truncated, found.unflagged) == (3, 1, 1, 1)
    assert found.returns.tolist() == [3, 12]
    assert found.lengths.tolist() == [3, 3]
    assert found.observations.low.tolist() == [0, 5]
    assert found.observations.high.tolist() == [21, 5]
    assert found.observations.mean.tolist() == [77 / 8, 5]
    assert found.observations.constant == [1]
    assert (found.rewards.mean.tolist(), found.rewards.std.tolist()) == ([3.5], [np.sqrt(5.25)])
    assert found.at_bounds.tolist() == [2 / 8]
    assert found.duplicates == 0
    assert found.findings == ["observation 1 of 2: always the same value"]


def test_the_drawing_in_words() -> None:
    found = Inspection(Transitions.from_dict(drawing(), id="drawn", file="drawn.hdf5", sha256="ab" * 32))
    expected = f"""\
drawn (dict): 8 transitions, 2 complete episodes, return 7.5 ± 4.5 (3.0 to 12.0), mean length 3
file       drawn.hdf5, SHA-256 {"ab" * 32}
episodes   3: 1 terminated, 1 truncated, 1 without a flag; 2 complete
score      55.0 is the behaviour's, by D4RL's references: 0 is a return of 2.0, 100 of 12.0

returns of 2 complete episodes, lengths 3 to 3, mean 3.0
         3.0 to          3.9        1  ########################################
         3.9 to          4.8        0
         4.8 to          5.7        0
         5.7 to          6.6        0
         6.6 to          7.5        0
         7.5 to          8.4        0
         8.4 to          9.3        0
         9.3 to         10.2        0
        10.2 to         11.1        0
        11.1 to         12.0        1  ########################################

                      mean         std      lowest     highest   at bounds
reward                 3.5       2.291           0           7
action             0.08119      0.5372          -1      0.9995       25.0%
observation 0        9.625       7.664           0          21
observation 1: constant

warning: observation 1 of 2: always the same value"""
    assert describe(found, TASK) == expected
    without = Task("drawn", "Drawn-v0", note="a word of caution")
    assert (
        "score      none: there are no reference returns for these data\nnote       a word of caution\n"
        in (describe(found, without))
    )


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    found = Inspection(Transitions.from_dict(clean()))
    assert found.findings == []
    assert describe(found, TASK).endswith("\n\nno findings")


def shuffled(data: dict[str, Any]) -> dict[str, Any]:
    order = np.random.default_rng(1).permutation(400)
    return {key: value[order] for key, value in data.items()}


def repeated(data: dict[str, Any]) -> dict[str, Any]:
    return {key: np.concatenate([value, value[:100]]) for key, value in data.items()}


def constant(key: str, column: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(data: dict[str, Any]) -> dict[str, Any]:
        data[key][:, column] = 0.5
        return data | {"next_observations": np.roll(data["observations"], -1, 0)}

    return change


@pytest.mark.parametrize(
    ("change", "findings"),
    [
        (repeated, [r"100 rows \(20\.0%\) repeat an earlier one"]),
        (shuffled, [r"3\d\d of 379 rows without a flag don't lead to the next row: shuffled, or .*"]),
        (lambda data: data | {"rewards": np.full(400, -1.0)}, ["all rewards are -1"]),
        (constant("observations", 2), ["observation 2 of 3: always the same value"]),
        (constant("actions", 0), ["action 0 of 2: always the same value"]),
        (
            lambda data: data | {"actions": np.sign(data["actions"]) * [1, 0.998]},
            [r"action 0 is at its bounds in 100\.0% of the rows"],
        ),
        (
            lambda data: data | {"terminals": np.zeros(400), "timeouts": np.zeros(400)},
            [
                "no row is terminal or at a time limit",
                "no episode is complete: the behaviour has no return and no score",
            ],
        ),
    ],
)
def test_findings(change: Callable[[dict[str, Any]], dict[str, Any]], findings: list[str]) -> None:

    found = Inspection(Transitions.from_dict(change(clean()))).findings
    assert len(found) == len(findings), found
    for text, pattern in zip(found, findings, strict=True):
        assert re.fullmatch(pattern, text), text


def test_a_finding_starts_above_its_share() -> None:
    data = clean()
    four = {key: np.concatenate([value[:-4], value[:4]]) for key, value in data.items()}
    assert Inspection(Transitions.from_dict(four)).duplicates == 4
    assert Inspection(Transitions.from_dict(four)).findings == []  # 1% of 400
    data["actions"][:200, 1] = 1
    assert Inspection(Transitions.from_dict(data)).findings == []
    data["actions"][200, 1] = -1
    assert Inspection(Transitions.from_dict(data)).findings == [
        "action 1 is at its bounds in 50.2% of the rows"
    ]


def test_runs_of_constant_numbers_are_named_in_short() -> None:
    data = clean()
    wide = np.zeros((401, 9), np.float32)
    wide[:, [1, 5]] = np.random.default_rng(2).normal(size=(401, 2))
    data |= {"observations": wide[:-1], "next_observations": wide[1:]}
    text = describe(Inspection(Transitions.from_dict(data)), TASK)
    assert "\nobservations 0, 2 to 4, 6 to 8: constant\n" in text
    assert "warning: observations 0, 2 to 4, 6 to 8 of 9: always the same value" in text


@pytest.mark.parametrize(
    "missing", [("timeouts",), ("next_observations",), ("timeouts", "next_observations")]
)
def test_complete_episodes_are_those_that_the_provenance_counts(missing: tuple[str, ...]) -> None:
    data = clean(401)  # one row of an episode that is cut
    # a reset lies between two episodes
    data["next_observations"] = data["next_observations"] + (data["terminals"] | data["timeouts"])[:, None]
    made = Transitions.from_dict({key: value for key, value in data.items() if key not in missing})
    found = Inspection(made)
    assert len(found.returns) == made.provenance.episodes > 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_episodes_equal_a_plain_loop(draw: st.DataObject) -> None:
    endings = draw.draw(
        st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["terminal", "timeout", "cut"])), min_size=1)
    )
    number = st.integers(0, 1)
    rows: list[tuple[int, int, int, bool, bool]] = []  # observation, action, next, terminal, timeout
    returns: list[int] = []
    rewards: list[int] = []
    for length, ending in endings:
        total = 0
        for step in range(length):
            last = step == length - 1
            # the next row begins at 10 or more, so that every episode ends at a seam at least
            following = 5 if last else 10 + draw.draw(number)
            here = rows[-1][2] if step else 10 + draw.draw(number)
            rows.append(
                (
                    here,
                    draw.draw(number),
                    following,
                    last and ending == "terminal",
                    last and ending == "timeout",
                )
            )
            rewards.append(draw.draw(number))
            total += rewards[-1]
        if ending != "cut":
            returns.append(total)
    columns = np.array([row[:3] for row in rows], np.float32)
    found = Inspection(
        Transitions.from_dict(
            {
                "observations": columns[:, :1],
                "actions": columns[:, 1:2],
                "next_observations": columns[:, 2:],
                "rewards": np.array(rewards),
                "terminals": np.array([row[3] for row in rows]),
                "timeouts": np.array([row[4] for row in rows]),
            }
        )
    )
    kinds = [ending for _, ending in endings]
    assert found.episodes == len(endings)
    assert found.terminated == kinds.count("terminal")
    assert found.truncated == kinds.count("timeout")
    assert found.unflagged == kinds.count("cut")
    assert found.returns.tolist() == returns
    # a time limit leaves no trace in the five numbers of a row
    seen = [(*row[:4], reward) for row, reward in zip(rows, rewards, strict=True)]
    assert found.duplicates == len(seen) - len(set(seen))
    assert found.at_bounds[0] == np.mean([row[1] == 1 for row in rows])


def test_the_picture_is_a_png_and_whole_or_absent(tmp_path: Path) -> None:
    path = picture(
        Inspection(Transitions.from_dict(drawing(), id="drawn")), tmp_path / "new" / "drawn.png", TASK
    )
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000
    assert [entry.name for entry in path.parent.iterdir()] == ["drawn.png"]
    nothing = {key: value[6:] for key, value in drawing().items()}
    assert picture(Inspection(Transitions.from_dict(nothing)), tmp_path / "none.png", TASK).exists()
    with pytest.raises(DataError, match=r"x\.png: can't be written in .*drawn\.png"):
        picture(Inspection(Transitions.from_dict(nothing)), path / "x.png", TASK)
