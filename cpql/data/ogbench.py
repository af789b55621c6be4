"""OGBench's datasets: its NPZ files, their folder, the hosts that have them, and the rewards of a task.

A file has observations [N, S], actions [N, A] in [-1, 1], terminals [N], and the simulator's state: qpos,
qvel and, where there are buttons, button_states. Its trajectories are a row longer than their transitions:
the last row, with its terminal set, is only a next observation. One file serves all tasks of an environment:
rewards aren't in it but follow from the state before a step and the task's goal, which only the environment
knows.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from cpql.data.d4rl import ORIGIN, npz, origin
from cpql.data.download import fetch, verify_recorded
from cpql.data.request import AnotherDatasetError, Request, Source
from cpql.data.transitions import Reading, Transitions
from cpql.environments import make_task_environment
from cpql.errors import ConfigError, DataError
from cpql.io import sha256_of, user_folder
from cpql.tasks import Task, load_task, task_names

__all__ = ["OGBench", "cache_folder", "fits", "read", "relabel"]

HOST = "https://rail.eecs.berkeley.edu/datasets/ogbench/"
# A copy that OGBench's authors name (OGBench issue 49).
MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main/"
STATE: tuple[str, ...] = ("qpos", "button_states")
NEEDED = ("observations", "actions", "terminals", "qpos")
KEYS = (*NEEDED, "qvel", "button_states")


class OGBench(Source):
    """OGBench's own files, in its folder, else downloaded.

    `$CPQL_OGBENCH_MIRROR` names mirrors of the user's own, URLs of folders with spaces between, which are
    tried first. The id of a dataset's validation file is that of the dataset with `-val` after it.
    """

    description = "OGBench's"
    way = "`cpql-data download {}` downloads OGBench's"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        entry = request.about("ogbench")
        file = cache_folder() / f"{entry['id']}.npz" if entry else None
        return file if file and os.path.exists(file) else None

    def fetch(self, request: Request) -> Path:
        """See `Source`; a file that is there already is checked."""
        entry = request.about("ogbench")
        if not entry:
            raise DataError(
                f"{request.task.name}: OGBench has no counterpart: expected dataset.id to name one"
            )
        if entry["id"].startswith(("visual-", "powderworld-")):
            raise DataError(f"{entry['id']}: its observations are images: expected numbers in one axis")
        _ = request.spec  # raises before the download if the environment can't be made
        name = f"{entry['id']}.npz"
        own = [f"{folder.rstrip('/')}/" for folder in os.environ.get("CPQL_OGBENCH_MIRROR", "").split()]
        return fetch(
            [folder + name for folder in (*own, HOST, MIRROR)],
            cache_folder() / name,
            lambda file: _check(file, entry["id"]),
            progress=request.progress,
            say=request.say,
        )

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`."""
        id = request.about("ogbench")["id"]
        data = read(path, request.task, id, source="ogbench", **request.reading)
        if data.provenance.source != "ogbench":
            raise AnotherDatasetError(
                f"{path.name}: carries '{ORIGIN}', as cpql's own files do: expected OGBench's {id}"
            )
        verify_recorded(path, data.provenance.sha256)
        return data


def cache_folder() -> Path:
    """Where OGBench keeps its files, `~/.ogbench/data`, or else `$OGBENCH_DATASET_DIR`."""
    return user_folder("OGBENCH_DATASET_DIR", "~/.ogbench/data")


def fits(path: Path) -> bool:
    """Whether a file is in OGBench's layout rather than D4RL's."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "qpos.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def read(
    path: Path, task: Task | None, id: str, *, source: str = "file", **reading: Unpack[Reading]
) -> Transitions:
    """Read and check a file in OGBench's layout, with the rewards of a task.

    The origin in a file that cpql wrote overrides `source` and `id`.

    Raises:
        DataError: it isn't such a file, is damaged, or there is no task.
        ConfigError: the task isn't one of OGBench's single tasks, or its environment can't be made.
    """
    arrays, found = _arrays(path)
    if task is not None and task.id is None and task.name in task_names():
        task = load_task(task.name)  # its goal is needed even where nothing is to be evaluated
    if task is None or task.id is None:
        raise DataError(f"{path.name}: has no rewards: expected env to name the task that they are to be of")
    last = arrays["terminals"].astype(np.bool_)
    kept = ~last
    rewards, terminated = relabel(task, {key: arrays[key][kept] for key in STATE if key in arrays})
    observations = arrays["observations"]
    about = found or {"source": source, "id": id}
    return Transitions.from_dict(
        {
            "observations": observations[kept],
            "actions": arrays["actions"][kept],
            "next_observations": observations[1:][kept[:-1]],
            "rewards": rewards,
            "terminals": terminated,
            # A row with both flags would count as truncated; OGBench doesn't bootstrap from it.
            "timeouts": last[1:][kept[:-1]] & ~terminated,
        },
        **about,
        file=path.name,
        sha256=sha256_of(path),
        **reading,
    )


def _arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any] | None]:
    """The arrays of a file in OGBench's layout, and its origin if cpql wrote it."""
    arrays = npz(path, "OGBench's", KEYS)
    for key in NEEDED:
        if key not in arrays:
            raise DataError(f"{path.name}: no '{key}': expected a file in OGBench's layout")
    shape = arrays["observations"].shape
    if len(shape) != 2:
        found = f"images, {list(shape)}" if len(shape) == 4 else f"shape {list(shape)}"
        raise DataError(
            f"{path.name}: 'observations' has {found}: expected [rows, width], as cpql reads no images"
        )
    for key, array in arrays.items():
        if key != ORIGIN and len(array) != shape[0]:
            raise DataError(f"{path.name}: '{key}' has {len(array)} rows: expected {shape[0]}")
    if not (shape[0] and arrays["terminals"][-1]):
        raise DataError(f"{path.name}: its last trajectory has no end: expected a terminal in the last row")
    text = arrays.pop(ORIGIN, None)
    return arrays, None if text is None else origin(str(text), path.name)


def _check(path: Path, id: str) -> None:
    _, found = _arrays(path)
    if found is not None:
        raise AnotherDatasetError(f"{path.name}: cpql's own: expected OGBench's {id}")


def relabel(task: Task, state: dict[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The rewards of a single task and where it ends, by OGBench's rule, from the states before the steps.

    A reward is the number of subtasks that are satisfied less the number that there are: in mazes, which have
    only the goal to reach, -1 or 0. Where it is 0, the task has ended.

    Args:
        task: its environment holds the goal.
        state: `qpos` [N, Q] and, where there are buttons, `button_states` [N, B].

    Returns:
        Rewards [N], and [N] booleans.

    Raises:
        ConfigError: the environment isn't one of OGBench's single tasks, or can't be made.
    """
    if task.id is None or "-singletask" not in task.id:
        raise ConfigError(
            f"environment {task.id}: expected a single task of OGBench, cube-single-singletask-v0"
        )
    environment = make_task_environment(task)
    from ogbench.relabel_utils import relabel_dataset  # type: ignore[import-untyped]

    dataset: dict[str, NDArray[Any]] = dict(state)
    relabel_dataset(task.id, environment, dataset)
    environment.close()
    return dataset["rewards"], dataset["masks"] == 0
