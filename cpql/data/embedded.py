"""The embedded source: datasets that cpql collects itself, where D4RL's can't be had.

cpql ships small behaviour policies, snapshots of one SAC run, and follows D4RL's recipe with them: medium
is the snapshot at a third of the expert's return, medium-replay mixes the snapshots on the way there.
What comes out has D4RL's form, not its rows: never put the two in one table.

For tasks without behaviours there are uniform random actions (`policy="random"`): no stand-in for anyone's
data, but enough to see a task run from its environment to a score.

A behaviour folder (`behaviours/hopper/`) holds `card.json`, which says what the snapshots are and how well
they do, and one `step-0010000.safetensors` each (`cpql.data.behaviour` describes the format).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cpql.data import d4rl, download
from cpql.data.behaviour import Behaviour, Episodes, play, rollout
from cpql.data.d4rl import Progress
from cpql.data.request import Request, Source
from cpql.data.transitions import Transitions
from cpql.data.workers import in_workers
from cpql.environments import ROBOTICS, facts, make_environment, make_task_environment
from cpql.errors import ConfigError, DataError, did_you_mean
from cpql.tasks import Task

__all__ = [
    "HYPERPARAMETERS",
    "RECIPES",
    "Part",
    "Plan",
    "Policy",
    "behaviours_folder",
    "cache_folder",
    "cached",
    "collect",
    "make_card",
    "prepare",
    "save",
    "train_behaviour",
]

RECIPES: dict[str, tuple[str, ...]] = {
    "random": ("random",),
    "medium": ("medium",),
    "medium-replay": ("random", "replay", "medium"),
    "medium-expert": ("medium", "expert"),
    "expert": ("expert",),
}
"""What a dataset is collected from, in equal shares; `replay` stands for all replay snapshots."""

HYPERPARAMETERS: dict[str, Any] = {
    "learning_starts": 10_000,
    "train_freq": 16,
    "gradient_steps": 16,
    "buffer_size": 1_000_000,
}
"""What `train_behaviour` gives to sbx's SAC; the rest is sbx's default."""

Say = Callable[[str], None]
"""Takes a line for the user."""

Policy = Literal["random"]
"""Whose actions to take, rather than those of the recipe that a dataset's name stands for."""

ACTION_RULE = "sampled from the tanh-squashed Gaussian, as D4RL did"

# Mean return and score of D4RL's own v2 data, to print beside ours; where no source for it is at hand, the
# return of D4RL's expert that its scores refer to.
D4RL_RETURNS: dict[str, dict[str, dict[str, float]]] = {
    "hopper": {
        "medium": {"return_mean": 1422.0, "score": 44.3},
        "expert": {"return_mean": 3511.0, "score": 108.5},
    },
    "halfcheetah": {"expert": {"return_mean": 12135.0, "score": 100.0}},
    "walker2d": {"expert": {"return_mean": 4592.3, "score": 100.0}},
}

# Raised when the same request would give other rows, so that the cache isn't asked for the old ones.
FORMAT = 1
# Chunks depend on the size alone, never on the cores. Short ones cut many episodes, few ones idle the cores.
CHUNK_STEPS = 10_000
MOST_CHUNKS = 32


def behaviours_folder() -> Path:
    """Where behaviour folders lie: `$CPQL_BEHAVIOURS`, else inside the package."""
    return Path(os.environ.get("CPQL_BEHAVIOURS") or Path(__file__).parent / "behaviours").expanduser()


def cache_folder() -> Path:
    """Where collected datasets are kept: `$CPQL_CACHE`, else `~/.cache/cpql`.

    Raises:
        DataError: there is no home folder.
    """
    return d4rl.user_folder("CPQL_CACHE", "~/.cache/cpql")


class Embedded(Source):
    """Data that cpql collects with the behaviours it ships, in a cache folder once they are collected."""

    description = "self-collected data from cpql's own SAC behaviours"

    def locate(self, request: Request) -> Path | None:
        """See `Source`."""
        if request.id is not None:
            raise ConfigError(
                f"dataset.id={request.id}: expected none with dataset=embedded, "
                "which has the task's own alone"
            )
        plan = prepare(request.task, request.size, request.seed)
        with contextlib.suppress(DataError):  # without a folder for them, data are collected all the same
            if os.path.exists(plan.path()):
                return plan.path()
        return None

    def fetch(self, request: Request) -> Transitions:
        """See `Source`."""
        data = cached(request.task, request.size, request.seed, request.progress, request.say)
        if request.time_limits == "keep":
            return data
        # The cache keeps every row.
        p = data.provenance
        about: dict[str, Any] = {"source": p.source, "id": p.id, "file": p.file, "sha256": p.sha256}
        return Transitions.from_dict(
            data.to_dict(), **about, details=p.details, time_limits=request.time_limits
        )

    def read(self, path: Path, request: Request) -> Transitions:
        """See `Source`; what is damaged is collected again, and `request.say` hears of that."""
        return self.fetch(request)


class Part(NamedTuple):
    """One ingredient of a dataset: a behaviour, or None for uniform random actions."""

    role: str
    step: int | None
    behaviour: Behaviour | None


class Plan(NamedTuple):
    """All that a dataset follows from; `id` is what it is called."""

    task: Task
    id: str
    size: int
    seed: int
    parts: tuple[Part, ...]
    details: dict[str, Any]

    def path(self) -> Path:
        """The cached file: its name changes with anything that could change a row.

        Raises:
            DataError: there is no folder for it.
        """
        facts = [
            FORMAT,
            CHUNK_STEPS,
            MOST_CHUNKS,
            self.task.id,
            self.size,
            self.seed,
            self.details["versions"],
            *filter(None, (self.task.observation, self.task.env_options, self.task.reset_options)),
        ]
        weights = [part.behaviour.sha256 if part.behaviour else part.role for part in self.parts]
        key = hashlib.sha256(json.dumps([facts, weights]).encode()).hexdigest()[:16]
        return cache_folder() / f"{self.task.name}-embedded-{self.size}-seed{self.seed}-{key}.hdf5"


def collect(
    task: Task, size: int, seed: int, progress: Progress | None = None, *, workers: int | None = None
) -> Transitions:
    """Collect a dataset with the embedded behaviours.

    Actions are sampled from the behaviours. The work is cut into chunks by the size alone, each with a
    child of the seed, so that the rows are the same on any number of cores; the episode at a chunk's end
    is cut without a flag.

    Args:
        task: what to act in (`task.id`), and by its dataset's name, which recipe.
        size: how many transitions.
        seed: the same seed gives the same rows, with the same versions on the same kind of processor.
        progress: called as chunks come in.
        workers: processes; None for one a core.

    Raises:
        DataError: there are no behaviours for the task, or they are damaged.
    """
    plan = prepare(task, size, seed)
    return _made(plan, _gather(plan, progress, workers))


def save(
    task: Task,
    size: int,
    seed: int,
    path: Path,
    progress: Progress | None = None,
    *,
    policy: Policy | None = None,
    say: Say = print,
) -> Transitions:
    """Collect a dataset into a file in D4RL's layout, which says that it is embedded, and read it back.

    Args:
        task: see `collect`, as are the following.
        size: how many transitions.
        seed: the same seed gives the same rows.
        path: the file, whose actions are in the environment's bounds, as D4RL's are. One there is replaced.
        progress: called as chunks come in.
        policy: "random" takes uniform random actions, in any task's environment; None the task's recipe.
        say: takes the line that another process is waited for.

    Raises:
        DataError: there are no behaviours for the task, they are damaged, or the file can't be written.
        ConfigError: there is no such policy, or the environment can't be made.
    """
    plan = prepare(task, size, seed, policy)
    with _alone(path, say):
        return _save(plan, _gather(plan, progress, None), path)


def cached(
    task: Task,
    size: int,
    seed: int,
    progress: Progress | None = None,
    say: Say = print,
) -> Transitions:
    """Give what `collect` would, from the cache where it is there.

    Where another process collects the same, that is waited for. A damaged file is collected again, and data
    that can't be kept are still given; `say` hears of all that.
    """
    plan = prepare(task, size, seed)

    def lost(error: DataError) -> None:
        say(f"warning: {error}; the next run will have to collect it again (CPQL_CACHE names the folder)")

    with contextlib.ExitStack() as stack:
        try:
            path = plan.path()
            data = _kept(plan, path, lambda error: say(f"warning: {error}; collecting it again"))
            if data is None:
                stack.enter_context(_alone(path, say))
                data = _kept(plan, path, lambda _: None)
        except DataError as error:
            lost(error)
            return _made(plan, _gather(plan, progress, None))
        if data is not None:
            return data
        arrays = _gather(plan, progress, None)
        try:
            return _save(plan, arrays, path)
        except DataError as error:
            lost(error)
            return _made(plan, arrays)


def _kept(plan: Plan, path: Path, damaged: Callable[[DataError], None]) -> Transitions | None:
    """What the cache has, if it is that."""
    if not os.path.exists(path):
        return None
    try:
        data = _read(plan, path)
        if data.provenance.source != "embedded" or len(data) != plan.size:
            raise DataError(f"{path.name}: holds something else: expected {plan.size} embedded transitions")
        return data
    except DataError as error:
        damaged(error)
        return None


@contextlib.contextmanager
def _alone(path: Path, say: Say) -> Iterator[None]:
    """Be the only process that collects into a file, and clear what killed ones left of theirs.

    Raises:
        DataError: the file's folder can't be written to.
    """
    with download.alone(path, "collecting", say):
        d4rl.clear(path)
        yield


def _made(plan: Plan, arrays: dict[str, NDArray[Any]]) -> Transitions:
    return Transitions.from_dict(arrays, source="embedded", id=plan.id, details=plan.details)


def _save(plan: Plan, arrays: dict[str, NDArray[Any]], path: Path) -> Transitions:
    origin = json.dumps({"source": "embedded", "id": plan.id, "details": plan.details})
    _, low, high, _ = facts(plan.task)
    if (low != -1).any() or (high != 1).any():
        arrays = arrays | {"actions": low + (arrays["actions"] + 1) * ((high - low) / 2)}
    d4rl.write(path, arrays, {d4rl.ORIGIN: origin})
    return _read(plan, path)


def _read(plan: Plan, path: Path) -> Transitions:
    _, low, high, _ = facts(plan.task)
    return d4rl.read(path, plan.id, action_low=low, action_high=high)


def prepare(task: Task, size: int, seed: int, policy: Policy | None = None) -> Plan:
    """Look up the recipe and read the behaviours that it needs, without collecting anything.

    Raises:
        DataError: there are no behaviours for the task, or they are damaged.
        ConfigError: there is no such policy.
    """
    if policy not in (None, "random"):
        raise ConfigError(f"policy={policy!r} is none: expected 'random', or None for the task's recipe")
    name, kind = _recipe(task) if policy is None else ("", "random")
    parts: list[Part] = []
    card: dict[str, Any] = {}
    if kind != "random":
        folder = behaviours_folder() / name
        card = _read_card(folder)
        for role in RECIPES[kind]:
            if role == "random":
                parts.append(Part(role, None, None))
                continue
            snapshots = sorted(
                (s for s in card["snapshots"] if s["role"] == role), key=lambda s: int(s["step"])
            )
            if not snapshots:
                raise DataError(
                    f"{name}/card.json: no snapshot with the role '{role}': '{task.name}' needs one"
                )
            parts += [
                Part(role, snapshot["step"], _read_snapshot(folder, snapshot)) for snapshot in snapshots
            ]
    else:
        parts.append(Part("random", None, None))
    if size < len(parts):
        raise DataError(
            f"{task.name}: a size of {size}: expected at least {len(parts)}, one for each behaviour"
        )
    used = [snapshot for snapshot in card.get("snapshots", []) if snapshot["role"] in RECIPES[kind]]
    robotics = ("gymnasium-robotics",) if (task.id or "").startswith(ROBOTICS) else ()
    details: dict[str, Any] = {
        "environment": task.id,
        "seed": seed,
        "recipe": [part.role if part.step is None else f"{part.role} at step {part.step}" for part in parts],
        "action_rule": ACTION_RULE if kind != "random" else "uniform in [-1, 1]",
        "versions": _versions("gymnasium", *robotics, "mujoco", "numpy"),
        "behaviours": {key: value for key, value in card.items() if key != "snapshots"} | {"snapshots": used},
    }
    if task.env_options or task.reset_options:
        details["environment_options"] = task.env_options | task.reset_options
    id = task.name if policy is None else f"{task.name} with {policy} actions"
    return Plan(task, id, size, seed, tuple(parts), details)


def _recipe(task: Task) -> tuple[str, str]:
    """Which behaviours and which recipe a dataset's name stands for."""
    kinds = "|".join(sorted(RECIPES, key=len, reverse=True))
    match = re.fullmatch(rf"(.+?)-({kinds})(-v\d+)?", task.dataset or task.name)
    if match is None:
        raise DataError(
            f"no embedded recipe for '{task.dataset or task.name}': expected NAME-KIND, "
            f"KIND one of {', '.join(RECIPES)}"
        )
    return match[1], match[2]


def _read_card(folder: Path) -> dict[str, Any]:
    where = f"{folder.name}/card.json"
    if not folder.is_dir():
        there = sorted(path.parent.name for path in folder.parent.glob("*/card.json"))
        hint = did_you_mean(folder.name, there) if there else "none are installed"
        raise DataError(f"no embedded behaviours for '{folder.name}': {hint}")
    try:
        card = json.loads((folder / "card.json").read_text("utf-8"))
        for snapshot in card["snapshots"]:
            int(snapshot["step"]), str(snapshot["role"]), str(snapshot["file"]), str(snapshot["sha256"])
        return dict(card)
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


def _shares(total: int, count: int) -> list[int]:
    """Cut `total` into `count` shares that differ by one at most."""
    return [total * (k + 1) // count - total * k // count for k in range(count)]


def _gather(plan: Plan, progress: Progress | None, workers: int | None) -> dict[str, NDArray[Any]]:
    """Collect all chunks and lay them end to end, in order of the recipe."""
    most = max(1, MOST_CHUNKS // len(plan.parts))
    jobs: list[tuple[Behaviour | None, int]] = []
    for part, share in zip(plan.parts, _shares(plan.size, len(plan.parts)), strict=True):
        chunks = min(max(1, share // CHUNK_STEPS), most)
        jobs += [(part.behaviour, steps) for steps in _shares(share, chunks)]
    seeds = np.random.SeedSequence(plan.seed).spawn(len(jobs))
    arguments = [
        (plan.task, behaviour, steps, child) for (behaviour, steps), child in zip(jobs, seeds, strict=True)
    ]
    # Here, so that a bad id is one line from this process and not a trace from a worker.
    make_task_environment(plan.task).close()

    def report(done: Sequence[int]) -> None:
        if progress is not None:
            progress(f"collect {plan.task.name}", sum(jobs[k][1] for k in done), plan.size)

    chunks_ = in_workers(rollout, arguments, workers, report)
    return {key: np.concatenate([chunk[key] for chunk in chunks_]) for key in chunks_[0]}


def train_behaviour(
    environment: str,
    out: Path,
    *,
    seed: int = 0,
    steps: int = 1_000_000,
    period: int = 5_000,
    progress: Progress | None = None,
) -> Path:
    """Train SAC with sbx and keep a snapshot every so often; hours on a CPU.

    Args:
        environment: its Gymnasium id.
        out: folder for `step-0010000.safetensors` and so on, and `training.json`.
        seed: of sbx.
        steps: environment steps in all.
        period: steps between snapshots.
        progress: called at each snapshot.

    Raises:
        ConfigError: sbx isn't installed, or the environment can't be made.
        DataError: the folder can't be made.
    """
    try:
        sac = importlib.import_module("sbx").SAC
    except ImportError as error:
        raise ConfigError(
            f"training a behaviour needs sbx ({error}): pip install 'cpql[behaviours]'"
        ) from error
    made = make_environment(environment)
    _make_folder(out)
    facts = {
        "environment": environment,
        "algorithm": "SAC (sbx)",
        "hyperparameters": HYPERPARAMETERS,
        "seed": seed,
        "versions": _versions("gymnasium", "mujoco", "numpy", "sbx-rl", "stable-baselines3", "jax"),
    }
    _write_json(out / "training.json", facts)
    model = sac("MlpPolicy", made, seed=seed, **HYPERPARAMETERS)

    def flat(tree: Any, prefix: str = "") -> dict[str, NDArray[np.float32]]:
        leaves: dict[str, NDArray[np.float32]] = {}
        for key, value in tree.items():
            leaves |= (
                flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: np.array(value)}
            )
        return leaves

    def snapshot(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        step = model.num_timesteps
        if step % period == 0:
            parameters = model.policy.actor_state.params
            behaviour = Behaviour.from_tensors(flat(parameters.get("params", parameters)))
            _write_behaviour(out / f"step-{step:07d}.safetensors", behaviour)
            if progress is not None:
                progress(f"train {environment}", step, steps)
        return True

    model.learn(steps, callback=snapshot)
    return out


def make_card(
    snapshots: Path,
    out: Path,
    environment: str | None = None,
    *,
    seed: int | None = None,
    period: int = 1,
    first_episodes: int = 10,
    episodes: int = 100,
    replay: int = 8,
    expert_step: int | None = None,
    medium_step: int | None = None,
    medium_return: float | None = None,
    versions: dict[str, str] | None = None,
    evaluation_seed: int = 0,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Choose the snapshots of a training run that become behaviours, and write their folder.

    All snapshots play a few episodes with sampled actions; those near a choice play many. The expert is
    the one with the best mean return; medium the one on the way there nearest a third of that, where of
    two alike the one with less spread wins; replay are evenly spaced before medium.

    Args:
        snapshots: folder of `step-0010000.safetensors` (or `step_0010000.safetensors`), cpql's or flax's
            names, with `training.json` where `train_behaviour` wrote them.
        out: folder to write, `behaviours/hopper`; its name picks D4RL's figures to compare with.
        environment: Gymnasium id; by default from training.json.
        seed: of the training; by default from training.json.
        period: consider only steps divisible by this.
        first_episodes: how many each snapshot plays.
        episodes: how many those near a choice play.
        replay: how many replay snapshots, at most.
        expert_step: take this one, rather than choose.
        medium_step: take this one, rather than choose.
        medium_return: what medium should return, rather than a third of the expert's.
        versions: of the packages used in training, where training.json doesn't say.
        evaluation_seed: of the evaluation.
        progress: called as evaluations come in.
        workers: processes; None for one a core.

    Returns:
        The card, as written to `out/card.json`.

    Raises:
        DataError: there are too few snapshots, they can't be read, or the folder can't be made.
    """
    facts: dict[str, Any] = {
        "algorithm": "SAC (sbx)",
        "hyperparameters": HYPERPARAMETERS,
        "versions": versions or {},
    }
    if (snapshots / "training.json").exists():
        facts |= json.loads((snapshots / "training.json").read_text("utf-8"))
    facts |= {
        key: value for key, value in (("environment", environment), ("seed", seed)) if value is not None
    }
    if "environment" not in facts:
        raise DataError(f"{snapshots.name}: no training.json: expected one, or an environment to be named")
    id = str(facts["environment"])
    task = Task(name=id, id=id)
    make_task_environment(task).close()

    found = {
        int(path.stem[5:]): path
        for path in snapshots.glob("step[-_]*.safetensors")
        if path.stem[5:].isdigit()
    }
    named = {step for step in (expert_step, medium_step) if step is not None}
    if missing := named - set(found):
        raise DataError(
            f"{snapshots.name}: no snapshot of step {min(missing)}: there are {len(found)} others"
        )
    # Up to there the actor is as it was initialised: the random ingredient covers that.
    starts = int(facts["hyperparameters"].get("learning_starts", 0))
    steps = sorted(step for step in found if (step > starts and step % period == 0) or step in named)
    if len(steps) < 2:
        raise DataError(
            f"{snapshots.name}: {len(steps)} trained snapshots: expected at least 2 of step-*.safetensors"
        )
    behaviours = {step: Behaviour.read(found[step]) for step in steps}
    _make_folder(out)

    def evaluate(chosen: Sequence[int], count: int, sampled: bool, label: str) -> dict[int, Episodes]:
        def report(done: Sequence[int]) -> None:
            if progress is not None:
                progress(label, len(done), len(chosen))

        seeds = [np.random.SeedSequence((evaluation_seed, step, sampled, count)) for step in chosen]
        arguments = [
            (task, behaviours[step], count, s, sampled) for step, s in zip(chosen, seeds, strict=True)
        ]
        return dict(zip(chosen, in_workers(play, arguments, workers, report), strict=True))

    first = {s: e.summary() for s, e in evaluate(steps, first_episodes, True, "evaluate all").items()}

    def mean(step: int) -> float:
        return float(first[step]["return_mean"])

    best = [expert_step] if expert_step is not None else sorted(steps[1:], key=mean)[-5:]
    sampled = evaluate(best, episodes, True, "evaluate experts")
    expert = max(best, key=lambda step: sampled[step].returns.mean())
    target = medium_return or float(sampled[expert].returns.mean()) / 3

    # On the way: a policy that has since been far better and forgot is another kind of medium.
    before = [step for step in steps if step < expert]
    arrived = next((k for k, step in enumerate(before) if mean(step) > 2 * target), len(before) - 1)
    way = before[: arrived + 1]
    if not way and medium_step is None:
        raise DataError(
            f"{snapshots.name}: no snapshot before the expert's step {expert}: expected medium among them"
        )
    near = (
        [medium_step]
        if medium_step is not None
        else sorted(way, key=lambda step: abs(mean(step) - target))[:5]
    )
    sampled |= evaluate(near, episodes, True, "evaluate mediums")

    def distance(step: int) -> float:
        returns = sampled[step].returns
        return float(
            abs(returns.mean() - target) / abs(target) + 0.25 * returns.std() / max(abs(returns.mean()), 1.0)
        )

    medium = min(near, key=distance)
    earlier = [step for step in steps if step < medium]
    marks = [medium * (k + 1) / (replay + 1) for k in range(replay)]
    replays = sorted({min(earlier, key=lambda step: abs(step - mark)) for mark in marks}) if earlier else []
    sampled |= evaluate(replays, episodes, True, "evaluate replays") if replays else {}
    chosen = [*replays, medium, expert]
    modes = evaluate(chosen, episodes, False, "evaluate without sampling")

    roles = dict.fromkeys(replays, "replay") | {medium: "medium", expert: "expert"}
    entries = []
    for step in chosen:
        file = f"step-{step:07d}.safetensors"
        entries.append(
            {
                "step": step,
                "role": roles[step],
                "file": file,
                "sha256": _write_behaviour(out / file, behaviours[step]),
                "sampled": sampled[step].summary(),
                "deterministic": modes[step].summary(),
            }
        )
    card = facts | {
        "action_rule": ACTION_RULE,
        "medium_target": round(target, 2),
        "evaluated_with": _versions("gymnasium", "mujoco", "numpy"),
        "snapshots": entries,
        "d4rl": D4RL_RETURNS.get(out.name, {}),
        "falls_short": _falls_short(out.name, entries),
    }
    _write_json(out / "card.json", card)
    return card


def _falls_short(name: str, entries: Sequence[dict[str, Any]]) -> str | None:
    """Say in a sentence where a behaviour returns less than D4RL's did, or None."""
    short = []
    for entry in entries:
        theirs = D4RL_RETURNS.get(name, {}).get(entry["role"])
        ours = entry["sampled"]["return_mean"]
        if theirs is not None and ours < 0.95 * theirs["return_mean"]:
            short.append(
                f"{entry['role']} returns {ours:.0f} where D4RL's returns {theirs['return_mean']:.0f}"
            )
    return f"Falls short of D4RL: {'; '.join(short)}." if short else None


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _make_folder(path: Path) -> None:
    """Make a folder before the hours whose result goes there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{path.name}: can't be made in {path.absolute().parent} ({error.strerror})"
        ) from error


def _write_behaviour(path: Path, behaviour: Behaviour) -> str:
    """Write a behaviour's file and give its hash."""
    content = safetensors.numpy.save(behaviour.to_tensors())
    with d4rl.replacing(path) as aside:
        aside.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with d4rl.replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
