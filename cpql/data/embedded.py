"""The embedded source: datasets that cpql collects itself where D4RL's can't be had.

cpql ships small behaviour policies, snapshots of one SAC run for each robot, and follows D4RL's recipe:
medium is the snapshot at a third of the expert's return, medium-replay mixes the snapshots before it. The
result has the form of D4RL's data but other rows, so the two never belong in one table.

Uniform random actions (`policy="random"`) work in every task's environment. They are no stand-in for a
dataset but enough to see a task run from its environment to a score.

A folder of behaviours (`behaviours/hopper/`) holds `card.json`, which describes the snapshots and their
returns, and a file for each snapshot (see `cpql.data.behaviour`). `scripts/collect.py` makes such folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cpql.data import d4rl
from cpql.data.behaviour import Behaviour, rollout
from cpql.data.request import Request, Source
from cpql.data.transitions import TimeLimits, Transitions
from cpql.data.workers import Arrays, in_workers
from cpql.environments import ROBOTICS, make_task_environment, spec_of
from cpql.errors import ConfigError, DataError, did_you_mean
from cpql.io import Progress, alone, user_folder, versions
from cpql.tasks import Task

__all__ = ["ACTION_RULE", "Embedded", "cache_folder", "collect", "collected", "prepare"]

RECIPES: dict[str, tuple[str, ...]] = {
    "random": ("random",),
    "medium": ("medium",),
    "medium-replay": ("random", "replay", "medium"),
    "medium-expert": ("medium", "expert"),
    "expert": ("expert",),
}
"""What a dataset is collected with, in equal parts; `replay` stands for all replay snapshots."""

ACTION_RULE = "sampled from the tanh-squashed Gaussian, as D4RL did"

# Raised when the same request would give other rows, so that old cached files aren't used for it.
FORMAT = 1
# Chunks depend on the size alone, not on the cores. Short ones cut many episodes, too few leave cores idle.
CHUNK_STEPS = 10_000
MOST_CHUNKS = 32
NOT_KEPT = "the next run will have to collect it again (CPQL_CACHE names the folder)"


class Embedded(Source):
    """Data collected with the behaviours that cpql ships, and cached."""

    description = "self-collected data from cpql's own SAC behaviours"
    way = "`python scripts/collect.py dataset {}` collects a stand-in"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        if request.id is not None:
            raise ConfigError(
                f"dataset.id={request.id}: expected none with dataset=embedded, which only has the task's own"
            )
        plan = prepare(request.task, request.size, request.seed)
        with contextlib.suppress(DataError):  # without a cache folder, data are collected all the same
            return plan.path() if os.path.exists(plan.path()) else None
        return None

    def fetch(self, request: Request) -> Transitions:
        """See `Source`; waits for another process that collects the same, and warns if it can't be cached."""
        plan = prepare(request.task, request.size, request.seed)
        path = None
        with contextlib.ExitStack() as stack:
            try:
                path = plan.path()
                stack.enter_context(alone(path, "collecting", request.say))
                if os.path.exists(path):
                    return _read(plan, path, request.time_limits)
            except DataError as error:
                request.say(f"warning: {error}; {NOT_KEPT}")
                path = None
            arrays = _gather(plan, request.progress, None)
            if path is not None:
                try:
                    _write(plan, arrays, path)
                    return _read(plan, path, request.time_limits)
                except DataError as error:
                    request.say(f"warning: {error}; {NOT_KEPT}")
        return _transitions(plan, arrays, request.time_limits)

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`; a damaged file is collected again, and `request.say` gets a warning."""
        try:
            return _read(prepare(request.task, request.size, request.seed), path, request.time_limits)
        except DataError as error:
            request.say(f"warning: {error}; collecting it again")
        with contextlib.suppress(OSError):
            path.unlink()
        return self.fetch(request)


class Part(NamedTuple):
    """One part of a recipe: a behaviour, or None for uniform random actions."""

    role: str
    step: int | None
    behaviour: Behaviour | None


class Plan(NamedTuple):
    """Everything that determines a dataset; `id` is its name."""

    task: Task
    id: str
    size: int
    seed: int
    parts: tuple[Part, ...]
    details: dict[str, Any]

    def path(self) -> Path:
        """The cached file, whose name changes with anything that could change a row.

        Raises:
            DataError: there is no folder for it.
        """
        task, versions = self.task, self.details["versions"]
        options = [each for each in (task.observation, task.env_options, task.reset_options) if each]
        request = [FORMAT, CHUNK_STEPS, MOST_CHUNKS, task.id, self.size, self.seed, versions, *options]
        weights = [part.behaviour.sha256 if part.behaviour else part.role for part in self.parts]
        key = hashlib.sha256(json.dumps([request, weights]).encode()).hexdigest()[:16]
        return cache_folder() / f"{task.name}-embedded-{self.size}-seed{self.seed}-{key}.hdf5"


def behaviours_folder() -> Path:
    """The folder with a folder of behaviours for each robot: `$CPQL_BEHAVIOURS`, else inside the package."""
    return Path(os.environ.get("CPQL_BEHAVIOURS") or Path(__file__).parent / "behaviours").expanduser()


def cache_folder() -> Path:
    """The folder that collected datasets are cached in: `$CPQL_CACHE`, else `~/.cache/cpql`.

    Raises:
        DataError: there is no home folder.
    """
    return user_folder("CPQL_CACHE", "~/.cache/cpql")


def collected(task: Task) -> list[Path]:
    """The cached datasets of a task, of any size and seed, the newest first."""
    found = cache_folder().glob(f"{task.name}-embedded-*.hdf5")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def collect(
    task: Task,
    size: int,
    seed: int,
    path: Path | None = None,
    *,
    policy: Literal["random"] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> Transitions:
    """Collect a dataset with the embedded behaviours, without the cache.

    Actions are sampled. The work is cut into chunks by the size alone, and each chunk has a child of the
    seed, so the rows don't depend on the number of cores. The episode at a chunk's end is cut without a flag.

    Args:
        task: its environment, and its dataset's name, which says the recipe.
        size: the number of transitions.
        seed: the same seed gives the same rows, with the same versions on the same kind of processor.
        path: a file in D4RL's layout to write, marked as embedded; replaced if it exists. As in D4RL's files,
            actions are in the environment's bounds.
        policy: "random" takes uniform random actions in any task's environment; None follows the recipe.
        progress: called when a chunk is done.
        say: called with a line if another process is writing the file and has to be waited for.
        workers: the number of processes; None starts one per core.

    Raises:
        DataError: there are no behaviours for the task, they are damaged, or the file can't be written.
        ConfigError: there is no such policy, or the environment can't be made.
    """
    plan = prepare(task, size, seed, policy)
    if path is None:
        return _transitions(plan, _gather(plan, progress, workers), "keep")
    with alone(path, "collecting", say):
        _write(plan, _gather(plan, progress, workers), path)
        return _read(plan, path, "keep")


def _transitions(plan: Plan, arrays: Arrays, time_limits: TimeLimits) -> Transitions:
    about: dict[str, Any] = {"source": "embedded", "id": plan.id, "details": plan.details}
    return Transitions.from_dict(arrays, **about, time_limits=time_limits)


def _write(plan: Plan, arrays: Arrays, path: Path) -> None:
    origin = json.dumps({"source": "embedded", "id": plan.id, "details": plan.details})
    _, low, high, _ = spec_of(plan.task)
    if (low != -1).any() or (high != 1).any():
        arrays = arrays | {"actions": low + (arrays["actions"] + 1) * ((high - low) / 2)}
    d4rl.write(path, arrays, {d4rl.ORIGIN: origin})


def _read(plan: Plan, path: Path, time_limits: TimeLimits) -> Transitions:
    _, low, high, _ = spec_of(plan.task)
    data = d4rl.read(path, plan.id, action_low=low, action_high=high, time_limits=time_limits)
    if data.provenance.source != "embedded" or (time_limits == "keep" and len(data) != plan.size):
        raise DataError(f"{path.name}: holds other data: expected {plan.size} embedded transitions")
    return data


def prepare(task: Task, size: int, seed: int, policy: Literal["random"] | None = None) -> Plan:
    """Look up the recipe and read its behaviours, without collecting anything; see `collect`.

    Raises:
        DataError: there are no behaviours for the task, or they are damaged.
        ConfigError: there is no such policy.
    """
    if policy not in (None, "random"):
        raise ConfigError(f"policy={policy!r}: expected 'random', or None for the task's recipe")
    name, kind = _recipe(task) if policy is None else ("", "random")
    folder = behaviours_folder() / name
    card = {"snapshots": []} if kind == "random" else _read_card(folder)
    parts: list[Part] = []
    for role in RECIPES[kind]:
        snapshots = sorted((s for s in card["snapshots"] if s["role"] == role), key=lambda s: int(s["step"]))
        if role != "random" and not snapshots:
            raise DataError(f"{name}/card.json: no snapshot with the role '{role}': '{task.name}' needs one")
        parts += [Part(role, each["step"], _read_snapshot(folder, each)) for each in snapshots]
        parts += [Part(role, None, None)] if role == "random" else []
    if size < len(parts):
        raise DataError(
            f"{task.name}: a size of {size}: expected at least {len(parts)}, one for each behaviour"
        )
    robotics = ("gymnasium-robotics",) if (task.id or "").startswith(ROBOTICS) else ()
    used = [snapshot for snapshot in card["snapshots"] if snapshot["role"] in RECIPES[kind]]
    details: dict[str, Any] = {
        "environment": task.id,
        "seed": seed,
        "recipe": [part.role if part.step is None else f"{part.role} at step {part.step}" for part in parts],
        "action_rule": ACTION_RULE if kind != "random" else "uniform in [-1, 1]",
        "versions": versions("gymnasium", *robotics, "mujoco", "numpy"),
        "behaviours": {key: value for key, value in card.items() if key != "snapshots"} | {"snapshots": used},
    }
    if task.env_options or task.reset_options:
        details["environment_options"] = task.env_options | task.reset_options
    id = task.name if policy is None else f"{task.name} with {policy} actions"
    return Plan(task, id, size, seed, tuple(parts), details)


def _recipe(task: Task) -> tuple[str, str]:
    """The behaviours and the recipe that a dataset's name stands for: hopper and medium-replay."""
    kinds = "|".join(sorted(RECIPES, key=len, reverse=True))
    name = task.dataset or task.name
    match = re.fullmatch(rf"(.+?)-({kinds})(-v\d+)?", name)
    if match is None:
        raise DataError(
            f"no embedded recipe for '{name}': expected NAME-KIND, KIND one of {', '.join(RECIPES)}"
        )
    return match[1], match[2]


def _read_card(folder: Path) -> dict[str, Any]:
    where = f"{folder.name}/card.json"
    if not folder.is_dir():
        there = sorted(path.parent.name for path in folder.parent.glob("*/card.json"))
        hint = did_you_mean(folder.name, there) if there else "none are installed"
        raise DataError(f"no embedded behaviours for '{folder.name}': {hint}")
    try:
        card: dict[str, Any] = json.loads((folder / "card.json").read_text("utf-8"))
        for snapshot in card["snapshots"]:
            int(snapshot["step"]), str(snapshot["role"]), str(snapshot["file"]), str(snapshot["sha256"])
        return card
    except OSError as error:
        raise DataError(
            f"{where}: can't be read ({error.strerror}): expected a card of behaviours"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{where}: damaged ({error!r}): expected snapshots of step, role, file, sha256"
        ) from error


def _read_snapshot(folder: Path, snapshot: dict[str, Any]) -> Behaviour:
    behaviour = Behaviour.read(folder / Path(snapshot["file"]).name)
    if behaviour.sha256 != snapshot["sha256"]:
        found, expected = behaviour.sha256[:12], snapshot["sha256"][:12]
        raise DataError(f"{snapshot['file']}: its hash is {found}: card.json expected {expected}")
    return behaviour


def _split(total: int, count: int) -> list[int]:
    """Split a total into parts that differ by at most one."""
    return [total * (k + 1) // count - total * k // count for k in range(count)]


def _gather(plan: Plan, progress: Progress | None, workers: int | None) -> Arrays:
    """Collect all chunks and concatenate them in the order of the recipe."""
    most = max(1, MOST_CHUNKS // len(plan.parts))
    chunks: list[tuple[Behaviour | None, int]] = []
    for part, size in zip(plan.parts, _split(plan.size, len(plan.parts)), strict=True):
        count = min(max(1, size // CHUNK_STEPS), most)
        chunks += [(part.behaviour, steps) for steps in _split(size, count)]
    seeds = np.random.SeedSequence(plan.seed).spawn(len(chunks))
    arguments = [(plan.task, *chunk, seed) for chunk, seed in zip(chunks, seeds, strict=True)]
    # Made here as well, so that an environment that can't be made is an error of this process.
    make_task_environment(plan.task).close()

    def report(done: Sequence[int]) -> None:
        if progress is not None:
            progress(f"collect {plan.task.name}", sum(chunks[k][1] for k in done), plan.size)

    parts = in_workers(rollout, arguments, workers, report)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
