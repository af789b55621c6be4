"""Minari's datasets: where they are, how they are downloaded and written, and what scores refer to.

The minari package downloads and writes; `cpql.data.minari_files` reads, and describes the files.

Minari's reference returns are its own, and so are its data, even where their names agree with D4RL's. So
`task` replaces D4RL's references, and no score ever mixes the two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from cpql.data.d4rl import origin_of
from cpql.data.minari_files import ARRAYS, METADATA, NAME, TaskOptions, Where, data_folder, metadata, read
from cpql.data.request import Request, Source
from cpql.data.transitions import Transitions
from cpql.environments import make_environment
from cpql.errors import DataError
from cpql.io import aside, user_folder
from cpql.tasks import Task

__all__ = ["ARRAYS", "ID", "Minari", "data_folder", "find", "metadata", "read", "root", "task", "write"]

ID = re.compile(NAME, re.ASCII)
# The oldest version with this layout, so that every later one reads what is written here.
LAYOUT_VERSION = "0.5.0"


class Minari(Source):
    """Minari's datasets, in its own folder or downloaded by its package."""

    description = "Minari's"
    way = "`cpql-data download {} --source minari` downloads Minari's"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        about = request.about("minari")
        return find(about["id"]) if about else None

    def fetch(self, request: Request) -> Path:
        """See `Source`; the package draws its own progress bars."""
        import minari  # type: ignore[import-untyped]

        id = str(request.about("minari").get("id", ""))
        if not id:
            raise DataError(
                f"{request.task.name}: Minari has no such data: expected dataset.id to name others"
            )
        if found := find(id):
            return found
        request.say(f"downloading {id} from Minari into {root()}")
        try:
            # What the package prints and most of what it warns of are meant for its own command line.
            with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("always")
                # By force, so that the folder of an interrupted download doesn't count as the dataset.
                minari.download_dataset(id, force_download=True)
        except Exception as error:  # the package's client raises errors of every library beneath it
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{id}: no such dataset in {root()}: `minari download {id}`, or put it into "
                f"{root() / id / 'data'} (the download failed: {reason})"
            ) from error
        for warning in caught:
            if warning.category is UserWarning:
                request.say(f"warning: {' '.join(str(warning.message).split())}")
        return root() / id

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`; the request has the task that `Minari.task` returned."""
        return read(path, request.task, time_limits=request.time_limits)

    def task(self, path: Path, request: Request) -> Task:
        """See `Source`."""
        return task(request.task, path)


def root() -> Path:
    """The folder of Minari's datasets: `$MINARI_DATASETS_PATH`, else `~/.minari/datasets`."""
    # The package doesn't expand a `~` in the variable, so it isn't expanded here.
    folder = os.environ.get("MINARI_DATASETS_PATH")
    return Path(folder) if folder else user_folder("MINARI_DATASETS_PATH", "~/.minari/datasets")


def find(id: str) -> Path | None:
    """The folder of a dataset that is complete on this disk, or None.

    Raises:
        DataError: `id` isn't a Minari id.
    """
    folder = root() / _checked(id)
    return folder if all((folder / "data" / name).is_file() for name in (METADATA, ARRAYS)) else None


def _checked(id: str) -> str:
    if ID.fullmatch(id) is None:
        raise DataError(f"'{id}' isn't a Minari id: expected one such as 'D4RL/pen/human-v2'")
    return id


def task(task: Task | None, where: Where) -> Task:
    """The task that a dataset is for: its environment with its options, and its references.

    It evaluates as Minari does, with Minari's references or none, never D4RL's. `task` is what the user
    named, for its name and for what the dataset doesn't say. Options of `reset`, for which Minari has no
    place, are those that `write` was given.

    Raises:
        DataError: there is no such dataset, or neither it nor a task names an environment.
    """
    about = metadata(where)
    id, environment = about.dataset_id, about.environment
    low, high = about.ref_min_score, about.ref_max_score
    note = f"data and references are the Minari dataset {id}'s: its scores are never comparable with D4RL's"
    if low is None or high is None:
        low = high = None
        note = f"the Minari dataset {id} has no references: returns only, never comparable with D4RL's"
    if environment is not None:
        names = [str(wrapper.get("name")) for wrapper in environment.additional_wrappers]
        # Names of classes only; what RescaleAction did is in the action space.
        wrappers = [name for name in names if name.isidentifier() and name != "RescaleAction"]
        if wrappers:
            note += f"; collected through {', '.join(wrappers)}, which evaluation goes without"
        task = task or Task(id, environment.id)
        options = about.cpql_task or TaskOptions(task.observation, {})
        task = dataclasses.replace(
            task, id=environment.id, env_options=environment.options, **dataclasses.asdict(options)
        )
    elif task is not None:
        note += f"; it doesn't say which environment it is from: {task.id} is the task's"
    else:
        raise DataError(f"{id}: no 'env_spec' in {METADATA}: expected a task that names the environment")
    return dataclasses.replace(
        task,
        datasets={"minari": {"id": id}},
        random_return=low,
        expert_return=high,
        note=note,
        benchmark="Minari",
    )


def write(
    transitions: Transitions, path: Where, *, id: str, task: Task | None = None, replace: bool = False
) -> Path:
    """Write transitions as a Minari dataset, completely or not at all.

    In Minari every episode ends terminated or truncated, and step t + 1 starts where step t led. So a row
    that doesn't lead to the next one ends its episode, and an episode that was cut is called truncated.
    `metadata.json` lists those, and `read` takes them for cuts again: it returns the same, to the bit.

    Args:
        transitions: what to write. Actions are in [-1, 1], and the action space says so.
        path: the root to write into, such as `root()`; the dataset's folder becomes `path/ID`.
        id: the dataset's id, `mine/hopper/mixed-v0`.
        task: whose environment and options are named for `recover_environment`, within `RescaleAction` if
            its actions have other bounds than [-1, 1].
        replace: whether an existing dataset may be replaced.

    Raises:
        ConfigError: there is no such environment.
        DataError: `id` isn't a Minari id, there is such a dataset already, the environment has other actions,
            or it can't be written.
    """
    from minari.data_collector import EpisodeBuffer  # type: ignore[import-untyped]
    from minari.dataset.minari_storage import MinariStorage  # type: ignore[import-untyped]

    folder = Path(path) / _checked(id)
    if folder.exists() and replace:
        metadata(folder)  # whatever else is there isn't ours to remove
    elif folder.exists():
        raise DataError(f"{id}: there is one in {path} already: expected a new id, or that one removed")
    rows = transitions.to_dict()
    observations, next_observations = rows["observations"], rows["next_observations"]
    ended = rows["terminals"] | rows["timeouts"]
    last = ended | transitions.ends.cpu().numpy()
    # Bit by bit: one array holds both, and a round trip must not turn -0.0 into 0.0.
    last[:-1] |= (next_observations[:-1].view(np.uint32) != observations[1:].view(np.uint32)).any(1)
    last[-1] = True
    stops = np.flatnonzero(last) + 1
    truncations = rows["timeouts"] | (last & ~rows["terminals"])
    about: dict[str, Any] = {
        "dataset_id": id,
        "minari_version": LAYOUT_VERSION,
        "description": transitions.provenance.line(),
        "cpql_cut_episodes": np.flatnonzero(~ended[stops - 1]).tolist(),
    }
    spec, width = None, rows["actions"].shape[1]
    if task is not None and task.id is not None:
        spec = _spec(task.id, task.env_options, width)
        options = TaskOptions(task.observation, task.reset_options)
        about["cpql_task"] = json.dumps(dataclasses.asdict(options))
    about |= origin_of(transitions.provenance)
    spaces = Box(-math.inf, math.inf, observations.shape[1:]), Box(-1.0, 1.0, (width,))
    episodes = (
        EpisodeBuffer(
            observations=np.concatenate([observations[start:stop], next_observations[stop - 1 : stop]]),
            actions=rows["actions"][start:stop],
            rewards=rows["rewards"][start:stop],
            terminations=rows["terminals"][start:stop],
            truncations=truncations[start:stop],
            infos={},  # Minari can't print an episode without
        )
        for start, stop in itertools.pairwise([0, *stops.tolist()])
    )
    try:
        with aside(folder) as temporary:
            temporary.mkdir()
            # The package gets the size of relative paths wrong.
            storage = MinariStorage.new(temporary.absolute() / "data", *spaces, spec, jpeg_encoding=False)
            storage.update_metadata(about)
            storage.update_episodes(episodes)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{id}: can't be written in {Path(path).absolute()} ({error})") from error
    return folder


def _spec(id: str, options: dict[str, Any], width: int) -> Any:
    """The spec of an environment that takes actions in [-1, 1]."""
    made = make_environment(id, **options)
    with contextlib.closing(made):
        actions = made.action_space
        if not isinstance(actions, Box) or actions.shape != (width,):
            raise DataError(f"{id}: its actions are {actions}: expected a Box of {width}")
        if not ((actions.low == -1) & (actions.high == 1)).all():
            made = gymnasium.wrappers.RescaleAction(made, -1, 1)  # type: ignore[arg-type]
        return made.spec
