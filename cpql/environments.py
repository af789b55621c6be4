"""Making Gymnasium environments, with errors that say what to type instead."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from cpql.errors import ActingError, ConfigError, brief, did_you_mean
from cpql.tasks import Task

__all__ = [
    "EnvironmentSpec",
    "TaskEnvironment",
    "action_bounds",
    "import_environment",
    "make_environment",
    "make_task_environment",
    "spec_of",
    "widths",
]

CONTROL = "dm_control/"
ROBOTICS = ("AdroitHand", "AntMaze", "Fetch", "FrankaKitchen", "PointMaze")

OGBENCH = ("pointmaze-", "antmaze-", "humanoidmaze-", "antsoccer-", "cube-", "scene-", "puzzle-")

# Prefixes of ids, the module that registers them, and the extra of cpql that installs it.
PACKAGES = (
    (ROBOTICS, "gymnasium_robotics", "robotics"),
    ((CONTROL,), "shimmy", "dmc"),
    (OGBENCH, "ogbench", "ogbench"),
)

# MuJoCo's versions that break environments: from 3.12 on, Gymnasium-Robotics' kitchen fails an assertion over
# MuJoCo's enumerations; dm_control 1.0 asks mujoco 4 for what it no longer has.
MUJOCO_BELOW = (
    ("FrankaKitchen", (3, 12), ", or train without an environment (env.id=null)"),
    (CONTROL, (4,), ""),
)


def import_environment(id: str) -> str:
    """Import the module of `MODULE:ID`, which registers environments, and return the id without it.

    This runs the module's code, so pass only what the user typed, never an id that was read from a file.
    Files store the id alone, and `make_environment` accepts nothing else.

    Raises:
        ConfigError: there is no such module, it fails, or it registers no such environment.
    """
    module, colon, bare = id.rpartition(":")
    if not colon:
        return id
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module):
        raise ConfigError(f"environment {id!r}: expected MODULE:ID, such as my_package.environments:Mine-v0")
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ConfigError(f"environment {id!r}: its module can't be imported: {brief(error)}") from error
    if bare not in gymnasium.registry:
        raise ConfigError(
            f"environment {id!r}: {module} registers no {bare!r}: {did_you_mean(bare, gymnasium.registry)}"
        )
    return bare


def make_environment(id: str, /, **options: Any) -> gymnasium.Env[Any, Any]:
    """Make the environment `id`, without Gymnasium's advice to upgrade from v4.

    D4RL's data came from the v2 physics, and v4 is its closest living relative: here the old version is
    the point. Every other warning passes.

    Args:
        id: Gymnasium's environment id, `Hopper-v4`; Gymnasium-Robotics' are registered when asked for. No
            `MODULE:ID`, which Gymnasium would import: the id may be from a stranger's file. See
            `import_environment`.
        **options: passed on to `gymnasium.make`.

    Raises:
        ConfigError: nothing is registered under `id`, it names a module, it can't be made with these options,
            or what it needs isn't installed.
    """
    if not id:
        raise ConfigError("no environment id given: expected one such as 'Hopper-v4'")
    words = "env_id={0} (evaluate) or env.id={0} (train)"
    if ":" in id:
        raise ConfigError(
            f"environment {id!r}: an id with a module runs the module's code, and is taken from the command "
            f"line alone: {words.format(id)}"
        )
    for prefix, below, instead in MUJOCO_BELOW:
        found, limit = version("mujoco"), ".".join(map(str, below))
        if id.startswith(prefix) and tuple(map(int, found.split(".")[:2])) >= below:
            raise ConfigError(
                f"environment '{id}' needs mujoco below {limit}, found {found}: "
                f"pip install 'mujoco<{limit}'{instead}"
            )
    for prefixes, module, extra in PACKAGES:
        if id.startswith(prefixes) and id not in gymnasium.registry:
            try:
                # Gymnasium-Robotics prints which rewards have changed; the tasks' notes say so, once.
                with contextlib.redirect_stderr(io.StringIO()):
                    gymnasium.register_envs(importlib.import_module(module))
            except ImportError:
                raise ConfigError(
                    f"environment '{id}' needs a package: pip install 'cpql[{extra}]'"
                ) from None
    try:
        with warnings.catch_warnings(), _without_advice_on_models():
            warnings.filterwarnings("ignore", ".*The environment .* is out of date")
            spec = gymnasium.registry.get(id)
            if str(getattr(spec, "entry_point", "")).startswith("ogbench."):
                # OGBench's bounds are wider than its actions, and it looks for a screen, which isn't needed.
                warnings.filterwarnings("ignore", ".*precision lowered by casting")
                warnings.filterwarnings("ignore", module="glfw")
                with _without_leftovers():
                    return OwnRandomness(gymnasium.make(id, **options))
            return gymnasium.make(id, **options)
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigError(
            f"no environment {id!r} in Gymnasium: {did_you_mean(id, gymnasium.registry)}; one that a module "
            f"registers: {words.format(f'MODULE:{id}')}"
        ) from error
    except Exception as error:  # whatever an environment raises at options that it can't have
        raise ConfigError(f"environment {id!r} can't be made: {brief(error)}") from error


@contextlib.contextmanager
def _without_advice_on_models() -> Iterator[None]:
    """Keep MuJoCo's advice on deprecated attributes of the environments' files from those who use them."""
    import mujoco  # type: ignore[import-untyped]

    def warn(text: str) -> None:
        if "is deprecated" not in text:
            print(f"MuJoCo: {text}", file=sys.stderr)

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


@contextlib.contextmanager
def _without_leftovers() -> Iterator[None]:
    """Close and remove the file that each of OGBench's mazes leaves open: soon there would be too many."""
    maze: Any = importlib.import_module("ogbench.locomaze.maze")
    made = []

    def mkstemp(**options: Any) -> tuple[int, str]:
        handle, path = tempfile.mkstemp(**options)
        os.close(handle)
        made.append(path)
        return handle, path

    maze.tempfile = types.SimpleNamespace(mkstemp=mkstemp)
    try:
        yield
    finally:
        maze.tempfile = tempfile
        for path in made:
            os.unlink(path)


class OwnRandomness(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One of OGBench's environments, made reproducible: `reset` seeds all that it draws from.

    OGBench draws from numpy's global generator, of which each environment has a state of its own here, and
    from a space of actions that it makes anew, unseeded, each time.
    """

    def __init__(self, environment: gymnasium.Env[Any, Any]) -> None:
        super().__init__(environment)
        base = environment.unwrapped
        base.__class__ = type(type(base).__name__, (type(base),), {"action_space": base.action_space})
        self.state = np.random.RandomState().get_state()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Begin an episode."""
        if seed is not None:
            self.state = np.random.RandomState(seed).get_state()
            self.env.unwrapped.action_space.seed(seed)
        with self._own():
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act once."""
        with self._own():
            return self.env.step(action)

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        others = np.random.get_state()
        np.random.set_state(self.state)
        try:
            yield
        finally:
            self.state = np.random.get_state()
            np.random.set_state(others)


class TaskEnvironment(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment as a task describes it: flat observations [S], and resets with the task's options.

    Args:
        environment: as Gymnasium makes it.
        task: `observation` names the parts of a dict observation that are laid end to end (dm_control's:
            all, where it names none); `reset_options` go into every reset.

    Raises:
        ConfigError: observations are dicts and the task names no parts, or parts that aren't there, or they
            aren't numbers in one axis.
    """

    def __init__(self, environment: gymnasium.Env[Any, Any], task: Task) -> None:
        super().__init__(environment)
        space, keys = environment.observation_space, task.observation
        inner = dict(space) if isinstance(space, gymnasium.spaces.Dict) else {}
        if inner and not keys and str(task.id).startswith(CONTROL):
            keys = tuple(inner)
        if bool(inner) != bool(keys) or not set(keys) <= inner.keys():
            what = f"dicts of {', '.join(inner)}" if inner else f"{space}, not dicts"
            raise ConfigError(
                f"{task.id}: its observations are {what}: expected env.observation to name "
                f"{'some of them' if inner else 'nothing, []'}, found {list(keys)}"
            )
        parts = [inner[key] for key in keys] or [space]
        boxes = [part for part in parts if isinstance(part, gymnasium.spaces.Box) and len(part.shape) < 2]
        if len(boxes) != len(parts):
            raise ConfigError(f"{task.id}: its observations are {space}: expected numbers in one axis")
        self.task, self.keys = task, keys
        self.observation_space = gymnasium.spaces.Box(
            np.concatenate([box.low.ravel() for box in boxes]),
            np.concatenate([box.high.ravel() for box in boxes]),
            dtype=np.result_type(*(box.dtype for box in boxes)).type,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode, with the task's options and any others.

        Raises:
            ActingError: the environment failed, or gave an observation that isn't finite.
        """
        # Some environments keep the dict they are given, so each gets one of its own.
        both = {key: np.array(value) if isinstance(value, list | tuple) else value
                for key, value in (self.task.reset_options | (options or {})).items()}  # fmt: skip
        with self._failure_in("reset"):
            observation, info = self.env.reset(seed=seed, options=both or None)
        return self._flat(observation), info

    def step(self, action: Any) -> tuple[NDArray[Any], Any, bool, bool, dict[str, Any]]:
        """Act once.

        Raises:
            ActingError: the environment failed, or gave an observation or a reward that isn't finite.
        """
        with self._failure_in("step"):
            observation, reward, terminated, truncated, info = self.env.step(action)
        if not math.isfinite(reward):
            raise ActingError(
                f"environment '{self.task.id}' gave a reward of {reward}: expected a finite number"
            )
        return self._flat(observation), reward, terminated, truncated, info

    def _flat(self, observation: Any) -> NDArray[Any]:
        """The observation in one axis [S], checked."""
        parts = [np.ravel(observation[key]) for key in self.keys]
        flat = np.concatenate(parts) if parts else np.asarray(observation)
        if not np.isfinite(flat).all():
            k = int(np.isfinite(flat).argmin())
            raise ActingError(
                f"environment '{self.task.id}' gave an observation whose number {k} is {flat[k]}: "
                "expected finite numbers"
            )
        return flat

    @contextlib.contextmanager
    def _failure_in(self, call: str) -> Iterator[None]:
        """Raise whatever the environment raises as an `ActingError` that names it."""
        try:
            yield
        except MemoryError:  # the machine's, not the environment's
            raise
        except Exception as error:
            raise ActingError(f"environment '{self.task.id}' failed in {call}: {brief(error)}") from error


def make_task_environment(task: Task, **options: Any) -> TaskEnvironment:
    """Make a task's environment, with options of `gymnasium.make` besides the task's own.

    Raises:
        ConfigError: see `make_environment` and `TaskEnvironment`.
    """
    if task.id is None:
        raise ConfigError(
            f"{task.name} has no environment: expected env.id (env_id, to evaluate) to name one"
        )
    return TaskEnvironment(make_environment(task.id, **(task.env_options | options)), task)


def widths(environment: gymnasium.Env[Any, Any]) -> tuple[int, int]:
    """The widths of observations and actions, S and A.

    Raises:
        ConfigError: actions aren't numbers in one axis.
    """
    observations, actions = environment.observation_space, environment.action_space
    if not isinstance(actions, gymnasium.spaces.Box) or len(actions.shape) != 1:
        raise ConfigError(f"actions are {actions}: expected a Box of one axis")
    assert observations.shape is not None
    return observations.shape[0], actions.shape[0]


def action_bounds(environment: gymnasium.Env[Any, Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lower and upper bounds [A] of the actions.

    Raises:
        ConfigError: there are none.
    """
    actions = environment.action_space
    if not isinstance(actions, gymnasium.spaces.Box) or not actions.is_bounded():
        raise ConfigError(f"actions are {actions}: expected a bounded Box")
    return actions.low.astype(np.float32), actions.high.astype(np.float32)


class EnvironmentSpec(NamedTuple):
    """The widths, action bounds and time limit of a task's environment.

    Attributes:
        widths: of observations and actions, S and A.
        action_low: lower bounds [A] of actions.
        action_high: upper bounds [A].
        episode_limit: steps after which it truncates an episode, or None.
    """

    widths: tuple[int, int]
    action_low: NDArray[np.float32]
    action_high: NDArray[np.float32]
    episode_limit: int | None


def spec_of(task: Task) -> EnvironmentSpec:
    """The specification of a task's environment, which is made for it and closed.

    Raises:
        ConfigError: see `make_task_environment`, `widths` and `action_bounds`.
    """
    environment = make_task_environment(task)
    environment.close()
    limit = environment.spec.max_episode_steps if environment.spec else None
    return EnvironmentSpec(widths(environment), *action_bounds(environment), limit)
