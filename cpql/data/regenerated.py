"""The source `regenerated`: OGBench's datasets, collected again on this machine by the package's own oracles.

They have the settings, the form and the size of the published files (see `cpql.data.oracles`), not their
rows: so they are named `regenerated` wherever data are named, with their seed and the versions of what made
them.

While a dataset is collected, its chunks are files in a hidden folder beside it. An interrupted collection
goes on from there; the dataset itself appears when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from cpql.data import ogbench
from cpql.data.d4rl import ORIGIN
from cpql.data.embedded import cache_folder
from cpql.data.oracles import DTYPES, Recipe, collect, recipe
from cpql.data.request import Request, Source
from cpql.data.transitions import Transitions
from cpql.data.workers import in_workers
from cpql.errors import DataError
from cpql.io import Progress, alone, aside, clear_leftovers, versions
from cpql.tasks import Task

__all__ = ["Plan", "Regenerated", "collected", "prepare", "regenerate"]

SOURCE = "regenerated"
# Raised when the same request would give other rows, so that old files aren't used for it.
FORMAT = 1
# Of a chunk, which has one environment: chunks, and so rows, don't depend on the number of workers.
CHUNK_EPISODES = 20


class Plan(NamedTuple):
    """Everything that determines a regenerated dataset.

    Attributes:
        task: the task that it is for; one dataset serves all tasks of an environment.
        id: of OGBench's dataset.
        recipe: how it is collected.
        episodes: how many.
        seed: of all of them.
        versions: of the packages that determine the rows.
    """

    task: Task
    id: str
    recipe: Recipe
    episodes: int
    seed: int
    versions: dict[str, str]

    @property
    def details(self) -> dict[str, Any]:
        """What the provenance says."""
        return {
            "environment": self.recipe.environment,
            "seed": self.seed,
            "episodes": self.episodes,
            "rows_of_an_episode": self.recipe.rows,
            "oracle": f"ogbench's, {self.recipe.kind}",
            "versions": self.versions,
        }

    @property
    def path(self) -> Path:
        """The cached file, whose name changes with anything that could change a row."""
        key = sha256(json.dumps([FORMAT, CHUNK_EPISODES, self.recipe, self.versions]).encode()).hexdigest()[
            :16
        ]
        size = self.episodes * (self.recipe.rows - 1)
        return cache_folder() / f"{self.id}-{SOURCE}-{size}-seed{self.seed}-{key}.npz"


class Regenerated(Source):
    """OGBench's datasets, made again with its own oracles, and cached."""

    description = "OGBench's, regenerated here with its own oracles"
    way = "`python scripts/collect.py regenerate {}` makes OGBench's again"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        if not request.about(SOURCE):
            return None
        path = prepare(request).path
        return path if os.path.exists(path) else None

    def fetch(self, request: Request) -> Path:
        """See `Source`."""
        _ = request.spec  # raises at once if the environment can't be made
        return regenerate(prepare(request), progress=request.progress, say=request.say)

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`."""
        id = prepare(request).id
        data = ogbench.read(path, request.task, id, **request.reading)
        found = data.provenance
        if (found.source, found.id) != (SOURCE, id):
            raise DataError(f"{path.name}: holds {found.id}, {found.source}: expected {id}, {SOURCE}")
        return data


def collected(task: Task) -> list[Path]:
    """The regenerated datasets of a task, of any size and seed, the newest first."""
    if SOURCE not in task.datasets:
        return []
    found = cache_folder().glob(f"{task.datasets[SOURCE]['id']}-{SOURCE}-*.npz")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def prepare(request: Request) -> Plan:
    """Look up how the data of a request are collected, without collecting anything.

    Whole episodes are collected, so that the size is rounded up.

    Raises:
        DataError: they can't be regenerated.
    """
    id = request.about(SOURCE).get("id") or request.task.dataset or request.task.name
    found = recipe(id)
    episodes = -(-request.size // (found.rows - 1))
    packages = versions("ogbench", "dm_control", "gymnasium", "mujoco", "numpy", "scipy")
    return Plan(request.task, id, found, episodes, request.seed, packages)


def regenerate(
    plan: Plan,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Collect a dataset, or go on with one, and return its file.

    The same plan gives the same bytes, on the same kind of processor, whatever the number of workers.

    Args:
        plan: what to collect.
        workers: the number of processes; None starts one per core.
        progress: called with the number of transitions when a chunk is done.
        say: takes the line that another process is waited for.

    Raises:
        ConfigError: the environment can't be made.
        DataError: the file can't be written.
    """
    path = plan.path
    parts = path.with_name(f".{path.name}.parts")
    counts = [CHUNK_EPISODES] * (plan.episodes // CHUNK_EPISODES)
    counts += [rest] if (rest := plan.episodes % CHUNK_EPISODES) else []
    chunks = [parts / f"{k}.safetensors" for k in range(len(counts))]
    with alone(path, "regenerating", say):
        if not os.path.exists(path):
            clear_leftovers(parts)
            seeds = np.random.SeedSequence(plan.seed).spawn(len(chunks))
            missing = [k for k, chunk in enumerate(chunks) if not chunk.exists()]
            calls = [(plan.task, counts[k], seeds[k], plan.recipe, chunks[k]) for k in missing]

            def report(done: Sequence[int]) -> None:
                if progress is not None:
                    left = sum(counts[k] for k in missing) - sum(counts[missing[i]] for i in done)
                    size = plan.recipe.rows - 1
                    progress(f"regenerate {plan.id}", (plan.episodes - left) * size, plan.episodes * size)

            if calls:
                in_workers(collect, calls, workers, report)
            _join(plan, chunks)
        shutil.rmtree(parts, ignore_errors=True)
    return path


def _join(plan: Plan, chunks: Sequence[Path]) -> None:
    """Write the chunks as one NPZ file, without having more than one of them in memory."""
    origin = json.dumps({"source": SOURCE, "id": plan.id, "details": plan.details})
    rows = plan.episodes * plan.recipe.rows
    try:
        with aside(plan.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for key, dtype in DTYPES.items():
                with safetensors.safe_open(chunks[0], "numpy") as first:
                    if key not in first.keys():
                        continue
                    shape = (rows, *first.get_slice(key).get_shape()[1:])
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, about)
                    for chunk in chunks:
                        with safetensors.safe_open(chunk, "numpy") as part:
                            file.write(np.ascontiguousarray(part.get_tensor(key)).tobytes())
            with archive.open(f"{ORIGIN}.npy", "w") as file:
                np.lib.format.write_array(file, np.array(origin), allow_pickle=False)
    except (OSError, safetensors.SafetensorError) as error:
        name, folder = plan.path.name, plan.path.absolute().parent
        raise DataError(f"{name}: can't be written in {folder} ({error})") from error
