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
from collections.abc import Callable, Iterator, Sequence
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
        plan, path = prepare(request.task, request.size, request.seed), None
        with contextlib.ExitStack() as stack:
            with _warning(request, NOT_KEPT):
                stack.enter_context(alone(plan.path(), "collecting", request.say))
                path = plan.path()
                if os.path.exists(path):
                    return plan.read(path, request.time_limits)
            arrays = plan.gather(request.progress)
            with _warning(request, NOT_KEPT):
                if path is not None:
                    plan.write(arrays, path)
                    return plan.read(path, request.time_limits)
        return plan.transitions(arrays, request.time_limits)

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`; a damaged file is collected again, and `request.say` gets a warning."""
        with _warning(request, "collecting it again"):
            return prepare(request.task, request.size, request.seed).read(path, request.time_limits)
        with contextlib.suppress(OSError):
            path.unlink()
        return self.fetch(request)


@contextlib.contextmanager
def _warning(request: Request, consequence: str) -> Iterator[None]:
    """Go on after the block with a warning in place of a DataError."""
    try:
        yield
    except DataError as error:
        request.say(f"warning: {error}; {consequence}")


class Plan(NamedTuple):
    """Everything that determines a dataset.

    Attributes:
        task: the environment, and the name that a cached file begins with.
        id: the dataset's name.
        size: the number of transitions.
        seed: of the environments and the actions.
        parts: what each of the dataset's equal parts is collected with; None takes uniform random actions.
        details: what its provenance says.
    """

    task: Task
    id: str
    size: int
    seed: int
    parts: dict[str, Behaviour | None]
    details: dict[str, Any]

    def path(self) -> Path:
        """The cached file, whose name changes with anything that could change a row.

        Raises:
            DataError: there is no folder for it.
        """
        task, versions = self.task, self.details["versions"]
        options = [each for each in (task.observation, task.env_options, task.reset_options) if each]
        request = [FORMAT, CHUNK_STEPS, MOST_CHUNKS, task.id, self.size, self.seed, versions, *options]
        weights = [behaviour.sha256 if behaviour else name for name, behaviour in self.parts.items()]
        key = hashlib.sha256(json.dumps([request, weights]).encode()).hexdigest()[:16]
        return cache_folder() / f"{task.name}-embedded-{self.size}-seed{self.seed}-{key}.hdf5"

    def gather(self, progress: Progress | None, workers: int | None = None) -> Arrays:
        """Collect all chunks and concatenate them in the order of the parts."""
        most = max(1, MOST_CHUNKS // len(self.parts))
        chunks: list[tuple[Behaviour | None, int]] = []
        for behaviour, size in zip(self.parts.values(), _split(self.size, len(self.parts)), strict=True):
            count = min(max(1, size // CHUNK_STEPS), most)
            chunks += [(behaviour, steps) for steps in _split(size, count)]
        seeds = np.random.SeedSequence(self.seed).spawn(len(chunks))
        arguments = [(self.task, *chunk, seed) for chunk, seed in zip(chunks, seeds, strict=True)]
        # Made here as well, so that an environment that can't be made is an error of this process.
        make_task_environment(self.task).close()

        def report(done: Sequence[int]) -> None:
            if progress is not None:
                progress(f"collect {self.task.name}", sum(chunks[k][1] for k in done), self.size)

        parts = in_workers(rollout, arguments, workers, report)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def transitions(self, arrays: Arrays, time_limits: TimeLimits) -> Transitions:
        """What was gathered, with its provenance."""
        about: dict[str, Any] = {"source": "embedded", "id": self.id, "details": self.details}
        return Transitions.from_dict(arrays, **about, time_limits=time_limits)

    def write(self, arrays: Arrays, path: Path) -> None:
        """Write what was gathered in D4RL's layout, with actions in the environment's bounds."""
        origin = json.dumps({"source": "embedded", "id": self.id, "details": self.details})
        _, low, high, _ = spec_of(self.task)
        if (low != -1).any() or (high != 1).any():
            arrays = arrays | {"actions": low + (arrays["actions"] + 1) * ((high - low) / 2)}
        d4rl.write(path, arrays, {d4rl.ORIGIN: origin})

    def read(self, path: Path, time_limits: TimeLimits) -> Transitions:
        """Read what `write` wrote; a DataError if the file holds anything else."""
        _, low, high, _ = spec_of(self.task)
        data = d4rl.read(path, self.id, action_low=low, action_high=high, time_limits=time_limits)
        if data.provenance.source != "embedded" or (time_limits == "keep" and len(data) != self.size):
            raise DataError(f"{path.name}: holds other data: expected {self.size} embedded transitions")
        return data


def _split(total: int, count: int) -> list[int]:
    """Split a total into parts that differ by at most one."""
    return [total * (k + 1) // count - total * k // count for k in range(count)]


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
        return plan.transitions(plan.gather(progress, workers), "keep")
    with alone(path, "collecting", say):
        plan.write(plan.gather(progress, workers), path)
        return plan.read(path, "keep")


def prepare(task: Task, size: int, seed: int, policy: Literal["random"] | None = None) -> Plan:
    """Look up the recipe and read its behaviours, without collecting anything; see `collect`.

    Raises:
        DataError: there are no behaviours for the task, or they are damaged.
        ConfigError: there is no such policy.
    """
    if policy not in (None, "random"):
        raise ConfigError(f"policy={policy!r}: expected 'random', or None for the task's recipe")
    # hopper-medium-replay-v2 is collected by hopper's behaviours, with the recipe medium-replay
    wanted, kinds = task.dataset or task.name, "|".join(sorted(RECIPES, key=len, reverse=True))
    match = re.fullmatch(rf"(.+?)-({kinds})(-v\d+)?", "any-random" if policy else wanted)
    if match is None:
        expected = f"expected NAME-KIND, KIND one of {', '.join(RECIPES)}"
        raise DataError(f"no embedded recipe for '{wanted}': {expected}")
    folder, kind = behaviours_folder() / match[1], match[2]
    card: dict[str, Any] = {"snapshots": []} if kind == "random" else _read_card(folder)
    used = [snapshot for snapshot in card["snapshots"] if snapshot["role"] in RECIPES[kind]]
    parts: dict[str, Behaviour | None] = {}
    for role in RECIPES[kind]:
        snapshots = sorted((s for s in used if s["role"] == role), key=lambda s: int(s["step"]))
        if role == "random":
            parts[role] = None
        elif not snapshots:
            where = f"{folder.name}/card.json"
            raise DataError(f"{where}: no snapshot with the role '{role}': '{task.name}' needs one")
        for snapshot in snapshots:
            behaviour = Behaviour.read(folder / Path(snapshot["file"]).name)
            if behaviour.sha256 != snapshot["sha256"]:
                found, expected = behaviour.sha256[:12], snapshot["sha256"][:12]
                raise DataError(f"{snapshot['file']}: its hash is {found}: card.json expected {expected}")
            parts[f"{role} at step {snapshot['step']}"] = behaviour
    if size < len(parts):
        text = f"{task.name}: a size of {size}: expected at least {len(parts)}, one for each behaviour"
        raise DataError(text)
    robotics = ("gymnasium-robotics",) if (task.id or "").startswith(ROBOTICS) else ()
    details: dict[str, Any] = {
        "environment": task.id,
        "seed": seed,
        "recipe": list(parts),
        "action_rule": ACTION_RULE if kind != "random" else "uniform in [-1, 1]",
        "versions": versions("gymnasium", *robotics, "mujoco", "numpy"),
        "behaviours": {key: value for key, value in card.items() if key != "snapshots"} | {"snapshots": used},
    }
    if task.env_options or task.reset_options:
        details["environment_options"] = task.env_options | task.reset_options
    id = task.name if policy is None else f"{task.name} with {policy} actions"
    return Plan(task, id, size, seed, parts, details)


def _read_card(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        there = sorted(path.parent.name for path in folder.parent.glob("*/card.json"))
        hint = did_you_mean(folder.name, there) if there else "none are installed"
        raise DataError(f"no embedded behaviours for '{folder.name}': {hint}")
    try:
        card: dict[str, Any] = json.loads((folder / "card.json").read_text("utf-8"))
        for snapshot in card["snapshots"]:
            int(snapshot["step"]), str(snapshot["role"]), str(snapshot["file"]), str(snapshot["sha256"])
        return card
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"can't be read ({error!r}): expected snapshots of step, role, file, sha256"
        raise DataError(f"{folder.name}/card.json: {reason}") from error
