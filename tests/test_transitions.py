"""What becomes of D4RL's rows and flags, on hand-made arrays and on random episodes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpql.data.transitions import Batch, Transitions
from cpql.errors import DataError


def drawing() -> dict[str, Any]:
    """The eight rows of the module's drawing: 0-2 terminate, 3-5 time out, 6-7 are cut."""
    return {
        "observations": np.array([[0.0], [1], [2], [10], [11], [12], [20], [21]]),
        "actions": np.linspace(-1, 1, 16).reshape(8, 2),
        "rewards": np.arange(8, dtype=np.int64),
        "next_observations": np.array([[1.0], [2], [3], [11], [12], [13], [21], [22]]),
        "terminals": np.array([0, 0, 1, 0, 0, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 0, 0, 1, 0, 0], bool),
    }


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def test_time_limits_truncate_and_never_terminate() -> None:
    data = Transitions.from_dict(drawing(), id="drawn")
    assert data.terminated.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert data.ends.tolist() == [False, False, True, False, False, True, False, True]
    assert data.next_observations[:, 0].tolist() == [1, 2, 3, 11, 12, 13, 21, 22]
    assert data.rewards.tolist() == list(range(8))
    assert (len(data), data.state_dim, data.action_dim) == (8, 1, 2)
    assert data.table.dtype == torch.float32
    assert {data.terminated.dtype, data.truncated.dtype, data.ends.dtype} == {torch.bool}
    assert data.columns.discounts.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def test_statistics_are_over_complete_episodes() -> None:
    provenance = Transitions.from_dict(drawing(), id="drawn", details={"why": "test"}).provenance
    assert (provenance.transitions, provenance.episodes) == (8, 2)
    assert (provenance.return_mean, provenance.return_std) == (7.5, 4.5)
    assert (provenance.return_min, provenance.return_max, provenance.length_mean) == (3, 12, 3)
    assert provenance.line() == (
        "drawn (dict): 8 transitions, 2 complete episodes, return 7.5 ± 4.5 (3.0 to 12.0), mean length 3"
    )
    assert json.loads(json.dumps(provenance.to_dict(), allow_nan=False))["details"] == {"why": "test"}


def test_without_a_complete_episode_there_are_no_figures_and_no_nan() -> None:
    data = {key: value[6:] for key, value in drawing().items()}
    provenance = Transitions.from_dict(data).provenance
    assert provenance.episodes == 0 and provenance.return_mean is None and provenance.length_mean is None
    assert provenance.line() == "dataset (dict): 2 transitions, 0 complete episodes"
    json.dumps(provenance.to_dict(), allow_nan=False)


def test_without_next_observations_rows_at_a_time_limit_are_dropped() -> None:
    data = Transitions.from_dict(without(drawing(), "next_observations"))
    assert data.observations[:, 0].tolist() == [0, 1, 2, 10, 11, 20]
    assert data.next_observations[:, 0].tolist() == [1, 2, 2, 11, 12, 21]
    assert data.terminated.tolist() == [0, 0, 1, 0, 0, 0]
    assert data.ends.tolist() == [False, False, True, False, True, True]
    # The dropped row's reward still belongs to its episode's return.
    assert (data.provenance.episodes, data.provenance.return_max, data.provenance.length_mean) == (2, 12, 3)
    assert data.provenance.transitions == 6


def test_without_timeouts_a_seam_is_the_end_of_an_episode() -> None:
    """`d4rl.qlearning_dataset` drops the row at the time limit, and with it its flag."""
    rows = [0, 1, 2, 3, 4, 6]
    data = {key: value[rows] for key, value in without(drawing(), "timeouts").items()}
    made = Transitions.from_dict(data)
    assert made.ends.tolist() == [False, False, True, False, True, True]
    assert made.terminated.tolist() == [0, 0, 1, 0, 0, 0]
    assert (made.provenance.episodes, made.provenance.return_max) == (2, 7)


def test_with_timeouts_a_seam_without_a_flag_is_a_cut() -> None:
    twice = {key: np.concatenate([value, value]) for key, value in drawing().items()}
    made = Transitions.from_dict(twice)
    assert made.ends.tolist() == [False, False, True, False, False, True, False, True] * 2
    assert made.provenance.episodes == 4


def test_with_neither_only_terminals_end_an_episode() -> None:
    made = Transitions.from_dict(without(drawing(), "timeouts", "next_observations"))
    assert len(made) == 7
    assert made.ends.tolist() == [False, False, True, False, False, False, True]
    assert made.next_observations[:, 0].tolist() == [1, 2, 2, 11, 12, 20, 21]
    assert made.provenance.episodes == 1


def oracle() -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows that the d4rl package was asked about, and its answers."""
    path = Path(__file__).parent / "oracle" / "d4rl_qlearning.py"
    spec = importlib.util.spec_from_file_location("d4rl_qlearning", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rows(), json.loads(path.with_suffix(".json").read_text())["cases"]


@pytest.mark.parametrize(
    ("dropped", "options"),
    [
        (("next_observations",), {}),
        ((), {"time_limits": "drop"}),
        (("timeouts", "next_observations"), {"episode_limit": 7}),
        (("timeouts",), {"episode_limit": 7, "time_limits": "drop"}),
    ],
)
def test_the_d4rl_package_reads_the_same(dropped: tuple[str, ...], options: dict[str, Any]) -> None:
    rows, answers = oracle()
    theirs = {key: np.array(value) for key, value in answers["timeouts"].items()}
    ours = Transitions.from_dict(without(rows, *dropped), **options).to_dict()
    count = len(theirs["rewards"])
    # The package never keeps the last row; where that row has a next observation we do.
    assert len(ours["rewards"]) - count == (0 if "next_observations" in dropped else 1)
    for key in ("observations", "actions", "rewards", "terminals"):
        np.testing.assert_array_equal(ours[key][:count], theirs[key].astype(ours[key].dtype))
    # Behind a terminal the package puts the next episode's first observation, which nothing may read.
    going = ~theirs["terminals"].astype(bool)
    np.testing.assert_array_equal(
        ours["next_observations"][:count][going], theirs["next_observations"].astype(np.float32)[going]
    )


def test_the_package_miscounts_where_we_do_not() -> None:
    """Without `timeouts` its count of steps starts at 1 after a terminal: a row too early is dropped.

    The one that should have been leads into the next episode. Ours, above, are the rows with `timeouts`.
    """
    _, answers = oracle()
    with_flags, counted = (answers[case]["observations"] for case in ("timeouts", "no timeouts"))
    assert [105.0] in [row[:1] for row in with_flags] and [106.0] not in [row[:1] for row in with_flags]
    row = [row[0] for row in counted].index(106.0)
    assert answers["no timeouts"]["next_observations"][row][0] == 200


def test_what_qlearning_dataset_gives_is_taken_as_it_is() -> None:
    """No `timeouts`, no row at a time limit; the jump to the next episode is all that shows where one was."""
    _, answers = oracle()
    given = {key: np.array(value) for key, value in answers["timeouts"].items()}
    data = Transitions.from_dict(given, episode_limit=7)
    assert len(data) == len(given["rewards"]) and data.truncated.sum() == 0
    assert data.terminated.tolist() == given["terminals"].astype(bool).tolist()
    lengths = np.diff(np.flatnonzero(np.concatenate([[True], data.ends])))
    assert lengths.tolist() == [3, 6, 6, 6, 1, 3]


def test_old_files_count_their_time_limits() -> None:
    data = without(drawing(), "timeouts", "next_observations")
    made = Transitions.from_dict(data, episode_limit=3)
    assert made.to_dict()["observations"][:, 0].tolist() == [0, 1, 10, 11, 20]
    assert made.terminated.sum() == 0  # the limit wins over the terminal of row 2
    longer = Transitions.from_dict(data, episode_limit=4)
    assert longer.to_dict()["observations"][:, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert longer.terminated.tolist() == [False, False, True, False, False, False]


def test_d4rl_s_rule_drops_the_row_at_a_time_limit() -> None:
    data = Transitions.from_dict(drawing(), time_limits="drop")
    assert data.observations[:, 0].tolist() == [0, 1, 2, 10, 11, 20, 21]
    assert data.next_observations[:, 0].tolist() == [1, 2, 3, 11, 12, 21, 22]
    assert data.ends.tolist() == [False, False, True, False, True, False, True]
    assert data.truncated.sum() == 0 and data.provenance.return_max == 12
    with pytest.raises(DataError, match="every row is at a time limit"):
        Transitions.from_dict({key: value[5:6] for key, value in drawing().items()}, time_limits="drop")
    with pytest.raises(DataError, match="time_limits='dorp': expected 'keep' or 'drop'"):
        Transitions.from_dict(drawing(), time_limits="dorp")  # type: ignore[arg-type]


def test_a_row_written_twice_is_a_seam() -> None:
    data = {key: value[[0, 1, 1, 2]] for key, value in drawing().items()}
    made = Transitions.from_dict(data)
    assert made.ends.tolist() == [False, True, False, True]
    assert made.provenance.episodes == 1  # the second half, which terminates; the first is cut


def test_actions_are_scaled_from_the_bounds_they_have() -> None:
    data = drawing() | {"actions": np.array([[-2.0, 0], [2, 10], [0, 5], [1, 7.5]] * 2)}
    made = Transitions.from_dict(data, action_low=[-2, 0], action_high=[2, 10])
    assert made.actions[:4].tolist() == [[-1, -1], [1, 1], [0, 0], [0.5, 0.5]]
    with pytest.raises(DataError, match="reaches 10 in row 1: expected the environment's bounds"):
        Transitions.from_dict(data, action_low=-2, action_high=5)
    with pytest.raises(DataError, match="'actions' is 2 wide: expected 3, as their bounds are"):
        Transitions.from_dict(data, action_low=[-2, 0, 0], action_high=10)
    with pytest.raises(DataError, match="expected finite bounds, lower below upper"):
        Transitions.from_dict(data, action_low=1, action_high=-1)


def test_to_dict_gives_back_what_came() -> None:
    data = drawing()
    back = Transitions.from_dict(data).to_dict()
    assert set(back) == set(data)
    for key, array in data.items():
        np.testing.assert_array_equal(back[key], array.astype(back[key].dtype))
    again = Transitions.from_dict(back)
    assert torch.equal(again.table, Transitions.from_dict(data).table)


def test_where_both_flags_are_set_the_time_limit_wins() -> None:
    data = drawing()
    data["timeouts"][2] = True
    made = Transitions.from_dict(data)
    assert made.terminated.sum() == 0
    assert made.ends.tolist() == [False, False, True, False, False, True, False, True]
    assert made.next_observations[2].item() == 3
    assert len(Transitions.from_dict(without(data, "next_observations"))) == 5


def test_columns_flags_and_extra_keys_come_in_many_forms() -> None:
    data = drawing() | {"infos/qpos": "anything"}
    for key in ("rewards", "terminals", "timeouts"):
        data[key] = data[key].astype(np.float64)[:, None]
    data["actions"] = torch.tensor(data["actions"])
    made, plain = Transitions.from_dict(data), Transitions.from_dict(drawing())
    assert torch.equal(made.table, plain.table) and torch.equal(made.ends, plain.ends)


def test_actions_are_clipped_within_the_tolerance() -> None:
    data = drawing()
    data["actions"][3] = [1.0005, -1.0005]
    assert Transitions.from_dict(data).actions[3].tolist() == [1, -1]
    assert data["actions"][3].tolist() == [1.0005, -1.0005]


def broken(key: str, value: Any) -> dict[str, Any]:
    return drawing() | {key: value}


def spoilt(key: str, row: int, value: float) -> dict[str, Any]:
    array = drawing()[key].astype(np.float64)
    array[row] = value
    return broken(key, array)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (without(drawing(), "rewards"), "no 'rewards', only actions, next_observations, observations"),
        ({}, "no 'observations', only nothing"),
        (broken("observations", np.array([["a"]] * 8)), "'observations' holds <U1"),
        (broken("actions", [[1.0], [1.0, 2.0]]), "'actions' isn't an array"),
        (broken("rewards", np.array([None] * 8)), "'rewards' holds object"),
        (broken("observations", np.arange(8.0)), "'observations' has shape [8]: expected [N, S]"),
        (broken("actions", np.zeros((8, 0))), "'actions' has shape [8, 0]"),
        (broken("rewards", np.zeros((8, 2))), "'rewards' has shape [8, 2]"),
        (broken("rewards", 3.0), "'rewards' has shape []"),
        (broken("rewards", math.nan), "'rewards' has shape []"),
        (broken("rewards", np.zeros(7)), "'rewards' has shape [7]: expected [8]"),
        (broken("timeouts", np.zeros(9)), "'timeouts' has shape [9]: expected [8]"),
        (
            broken("next_observations", np.zeros((8, 2))),
            "'next_observations' has shape [8, 2]: expected [8, 1]",
        ),
        (
            spoilt("observations", 5, math.nan),
            "'observations' holds NaN or infinity, first in row 5",
        ),
        (spoilt("actions", 2, math.inf), "'actions' holds NaN or infinity, first in row 2"),
        (spoilt("rewards", 4, 1e300), "'rewards' holds NaN or infinity, first in row 4"),
        (spoilt("actions", 6, -1.01), "'actions' reaches -1.01 in row 6: expected [-1, 1]"),
        (spoilt("terminals", 1, 0.5), "'terminals' holds 0.5 in row 1: expected 0 or 1"),
        ({key: value[:0] for key, value in drawing().items()}, "'observations' has shape [0, 1]"),
        (
            {key: value[:1] for key, value in without(drawing(), "next_observations").items()},
            "no row has a next one in its episode",
        ),
    ],
)
def test_bad_data_is_refused_in_one_line(data: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as caught:
        Transitions.from_dict(data, file="some.hdf5", id="some")
    message = str(caught.value)
    assert message.startswith("some.hdf5: ") and text in message
    assert "\n" not in message and "expected" in message


def test_widths_are_checked_against_the_environment() -> None:
    data = Transitions.from_dict(drawing(), file="some.hdf5")
    data.validate_for(1, 2)
    with pytest.raises(DataError, match=r"some.hdf5: 'observations' is 1 wide: the environment has 11"):
        data.validate_for(11, 2)
    with pytest.raises(DataError, match="'actions' is 2 wide: the environment has 3"):
        data.validate_for(1, 3)


@pytest.mark.parametrize("members", [(), (3,)])
def test_samples_are_rows_of_the_data(members: tuple[int, ...]) -> None:
    def generators() -> torch.Generator | list[torch.Generator]:
        each = [torch.Generator().manual_seed(1 + k) for k in range(*members or (1,))]
        return each if members else each[0]

    data = Transitions.from_dict(drawing())
    batch, again = data.sample(64, generators()), data.sample(64, generators())
    assert batch.observations.shape == (*members, 64, 1) and batch.actions.shape == (*members, 64, 2)
    assert batch.rewards.shape == batch.discounts.shape == (*members, 64)
    assert batch.next_actions is None
    for column in Batch._fields[:-1]:
        assert torch.equal(getattr(batch, column), getattr(again, column)), column
    alone = data.sample(64, torch.Generator().manual_seed(1))
    assert torch.equal(batch.rewards[0] if members else batch.rewards, alone.rewards)
    # In the drawing the reward is the row's number.
    rows = batch.rewards.long()
    assert set(rows.flatten().tolist()) == set(range(8))
    for column in ("observations", "actions", "rewards"):
        assert torch.equal(getattr(data, column)[rows], getattr(batch, column)), column
    assert torch.equal(data.next_observations[rows], batch.next_observations)
    assert torch.equal(1.0 - data.terminated[rows].float(), batch.discounts)


def test_to_moves_everything_or_nothing() -> None:
    data = Transitions.from_dict(drawing())
    assert data.to("cpu") is data and data.device == torch.device("cpu")
    moved = data.to("meta")
    assert {moved.device, moved.ends.device, moved.actions.device} == {torch.device("meta")}
    assert moved.provenance is data.provenance
    copy = dataclasses.replace(data)
    assert torch.equal(copy.table, data.table) and repr(copy) == repr(data)


episodes = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from(["terminal", "timeout"])), min_size=1, max_size=8
)


@settings(deadline=None, max_examples=80)
@given(episodes=episodes, cut=st.integers(0, 4), seed=st.integers(0, 2**16), given_next=st.booleans())
def test_random_episodes(episodes: list[tuple[int, str]], cut: int, seed: int, given_next: bool) -> None:
    """No transition crosses an episode's end, returns are kept, and counts equal a plain loop's."""
    generator = np.random.default_rng(seed)
    rows: list[tuple[int, int, float, bool, bool]] = []
    returns, expected = [], []
    structure = [*episodes, (cut, "cut")] if cut else episodes
    for number, (length, ending) in enumerate(structure):
        rewards = generator.integers(-8, 8, length).astype(float)
        if ending != "cut":
            returns.append(rewards.sum())
        for step, reward in enumerate(rewards):
            last = step == length - 1
            rows.append((number, step, reward, last and ending == "terminal", last and ending == "timeout"))
            # Without next observations an episode's last row has none, unless it terminated.
            if given_next or not last or ending == "terminal":
                expected.append((number, step, last))
    table = np.array(rows, np.float64)
    mapping = {
        "observations": table[:, :2],
        "actions": np.zeros((len(rows), 1)),
        "rewards": table[:, 2],
        "terminals": table[:, 3],
        "timeouts": table[:, 4],
    }
    if given_next:
        mapping["next_observations"] = table[:, :2] + [0, 1]
    if not expected:
        with pytest.raises(DataError):
            Transitions.from_dict(mapping)
        return
    data = Transitions.from_dict(mapping)
    assert [tuple(map(int, row)) for row in data.observations.tolist()] == [row[:2] for row in expected]
    alive = data.terminated == 0
    assert torch.equal(data.next_observations[alive], data.observations[alive] + torch.tensor([0.0, 1.0]))
    following = [*expected[1:], (-1, 0, True)]
    assert data.ends.tolist() == [a[0] != b[0] for a, b in zip(expected, following, strict=True)]
    assert (data.provenance.transitions, data.provenance.episodes) == (len(expected), len(returns))
    if returns:
        mean, low, high = data.provenance.return_mean, data.provenance.return_min, data.provenance.return_max
        assert mean == pytest.approx(np.mean(returns)) and (low, high) == (min(returns), max(returns))
