"""Collecting OGBench's datasets again, with the scripted oracles that the package `ogbench` brings along.

The settings are those with which OGBench's authors collected the published files (`data_gen_scripts` in their
repository). In manipulation an oracle follows a plan with noise ("play"), or a closed-loop rule with more
noise and some random actions ("noisy"), and gets a new target whenever it is done. A point in a maze walks
from cell to cell, towards one random goal after another ("navigate") or towards one four cells away
("stitch").

Runs in worker processes, so it loads neither torch nor anything that does.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from cpql.environments import make_environment
from cpql.errors import DataError
from cpql.io import aside
from cpql.tasks import Task

__all__ = ["DTYPES", "Recipe", "collect", "recipe"]

DTYPES: dict[str, type] = {
    "observations": np.float32,
    "actions": np.float32,
    "terminals": np.bool_,
    "qpos": np.float32,
    "qvel": np.float32,
    "button_states": np.int64,
}
"""OGBench's arrays; `button_states` only where there are buttons."""

# The oracles of a family, of which the environment's current target chooses one.
ORACLES = {"cube": ["cube"], "scene": ["cube", "button", "drawer", "window"], "puzzle": ["button"]}
STYLES = {"play": "Plan", "noisy": "Markov"}
SETTINGS: dict[str, dict[str, Any]] = {
    "play": {"noise": 0.1, "noise_smoothing": 0.5},
    "noisy": {"min_norm": 0.4},
}
# How likely a new target is on top of another cube, drawn for each episode; elsewhere 0.5.
STACKING = {
    "cube-single-v0": (0.0, 0.0),
    "cube-double-v0": (0.0, 0.25),
    "cube-triple-v0": (0.05, 0.35),
    "cube-quadruple-v0": (0.1, 0.5),
}
RANDOM_ACTIONS = {"cube": 0.1, "scene": 0.1, "puzzle": 0.2}
# Noisy actions: the largest standard deviation, of which each episode has a fraction, in x, y, z, yaw,
# gripper.
MOST_NOISE = 0.1 * np.array([1.0, 1.0, 1.0, 3.0, 10.0])
# Where a scene's cube is in `qpos`; it is to stay in view, unless it lies in the drawer.
CUBE = slice(14, 17)
IN_VIEW, IN_DRAWER = (-0.3, 0.29), (0.06, 0.08)

POINT_NOISE = 0.5
STITCH_CELLS = 4

Columns = dict[str, list[Any]]
Environment = gymnasium.Env[Any, Any]
Episode = Callable[[np.random.Generator], Columns]


class Recipe(NamedTuple):
    """How a dataset is collected.

    Attributes:
        environment: Gymnasium's id of the environment, `cube-single-v0`.
        kind: "play", "noisy", "navigate" or "stitch".
        rows: of an episode; the last one has no next observation, so its action counts for nothing.
    """

    environment: str
    kind: str
    rows: int


def recipe(id: str) -> Recipe:
    """The recipe of one of OGBench's datasets, `cube-single-play-v0`.

    Raises:
        DataError: scripted oracles didn't collect it, or it is no dataset of OGBench.
    """
    kinds = {
        "pointmaze-(?:medium|large|giant|teleport)": "navigate|stitch",
        "cube-(?:single|double|triple|quadruple)|scene|puzzle-(?:3x3|4x4|4x5|4x6)": "play|noisy",
    }
    for environment, kind in kinds.items():
        if match := re.fullmatch(f"({environment})-({kind})-v0", id):
            rows = 201 if match[2] == "stitch" else 2001 if match[1] == "pointmaze-giant" else 1001
            return Recipe(f"{match[1]}-v0", match[2], rows)
    raise DataError(
        f"{id} can't be regenerated: expected a dataset that scripted oracles collected, of pointmaze, cube, "
        "scene or puzzle"
    )


def collect(
    task: Task, episodes: int, seed: np.random.SeedSequence, recipe: Recipe, path: Path
) -> dict[str, NDArray[Any]]:
    """Collect whole episodes into a file; see `cpql.data.workers.in_workers`.

    The package also draws from numpy's global generator, which is seeded here for every episode.

    Args:
        task: only names the environment in errors.
        episodes: how many.
        seed: of all of them.
        recipe: how.
        path: the file, in safetensors' format: the arrays of `DTYPES`, [episodes * rows, ...].

    Returns:
        Nothing, as the file has it all.
    """
    run = _maze(recipe) if recipe.environment.startswith("pointmaze") else _manipulation(recipe)
    columns: Columns = defaultdict(list)
    for child in seed.spawn(episodes):
        np.random.seed(child.generate_state(8))
        for key, values in run(np.random.default_rng(child)).items():
            columns[key] += values
    arrays: dict[str, NDArray[Any]] = {key: np.array(values, DTYPES[key]) for key, values in columns.items()}
    with aside(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary)
    return {}


def _made(recipe: Recipe, **options: Any) -> Environment:
    """The environment, which Gymnasium's checker would reset without a seed: its last targets stay in it."""
    options |= {"terminate_at_goal": False, "max_episode_steps": recipe.rows, "disable_env_checker": True}
    return make_environment(recipe.environment, **options)


def _keep(columns: Columns, observation: Any, action: Any, done: bool, info: dict[str, Any]) -> None:
    """Add a row, with the state before the action."""
    row = {"observations": observation, "actions": action, "terminals": done}
    for key in ("qpos", "qvel", "button_states"):
        if f"prev_{key}" in info:
            row[key] = info[f"prev_{key}"]
    for key, value in row.items():
        columns[key].append(value)


def _manipulation(recipe: Recipe) -> Episode:
    """Episodes of cube, scene or puzzle."""
    environment = _made(recipe, mode="data_collection")
    base: Any = environment.unwrapped
    family, _, _ = recipe.environment.partition("-")
    style, noisy = STYLES[recipe.kind], recipe.kind == "noisy"
    settings = SETTINGS[recipe.kind] | ({"gripper_always_closed": True} if family == "puzzle" else {})
    oracles = {}
    for name in ORACLES[family]:
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style.lower()}.{name}_{style.lower()}")
        oracles[name] = getattr(module, f"{name.title()}{style}Oracle")(env=environment, **settings)

    def episode(rng: np.random.Generator) -> Columns:
        observation, info = environment.reset(seed=int(rng.integers(1 << 31)))
        p_stack = rng.uniform(*STACKING.get(recipe.environment, (0.5, 0.5)))
        noise = rng.uniform() * MOST_NOISE
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        columns: Columns = defaultdict(list)
        done = False
        while not done:
            if noisy and rng.uniform() < RANDOM_ACTIONS[family]:
                action = rng.uniform(-1, 1, 5)
            else:
                action = np.asarray(oracle.select_action(observation, info))
                action = np.clip(action + rng.normal(0, noise) if noisy else action, -1, 1)
            after, _, terminated, truncated, info = environment.step(action)
            done = terminated or truncated
            if oracle.done:
                seen, target = base.set_new_target(p_stack=p_stack)
                oracle = oracles[target["privileged/target_task"]]
                oracle.reset(seen, target)
            _keep(columns, observation, action, done, info)
            observation = after
        return columns

    def healthy(rng: np.random.Generator) -> Columns:
        while True:
            columns = episode(rng)
            _, y, z = np.array(columns["qpos"])[:, CUBE].T
            left, right = y <= IN_VIEW[0], y >= IN_VIEW[1]
            if not (right | left & ((z < IN_DRAWER[0]) | (z > IN_DRAWER[1]))).any():
                return columns

    return healthy if family == "scene" else episode


def _maze(recipe: Recipe) -> Episode:
    """Episodes of a point in a maze."""
    environment = _made(recipe)
    maze: Any = environment.unwrapped
    free = maze.maze_map == 0
    above, below, left, right = (np.roll(free, shift, axis) for axis in (0, 1) for shift in (1, -1))
    corridor = above & below & ~left & ~right | left & right & ~above & ~below
    starts, goals = np.argwhere(free), np.argwhere(free & ~corridor)
    nexts: dict[tuple[Any, Any], NDArray[np.float64]] = {}

    def towards(goal: Any) -> NDArray[np.float64]:
        """The middle of the next cell on the way, which depends on the cells alone."""
        here = maze.get_xy()
        cells = maze.xy_to_ij(here), maze.xy_to_ij(goal)
        if cells not in nexts:
            nexts[cells] = maze.get_oracle_subgoal(here, goal)[0]
        return nexts[cells]

    def episode(rng: np.random.Generator) -> Columns:
        start = rng.choice(starts)
        goal = rng.choice(goals)
        if recipe.kind == "stitch":
            xy = maze.ij_to_xy(start)
            near = np.argwhere(maze.get_oracle_subgoal(xy, xy)[1] == STITCH_CELLS)
            goal = rng.choice(near) if len(near) else start
        observation, _ = environment.reset(
            seed=int(rng.integers(1 << 31)), options={"task_info": {"init_ij": start, "goal_ij": goal}}
        )
        columns: Columns = defaultdict(list)
        done = False
        while not done:
            way = towards(maze.cur_goal_xy) - maze.get_xy()
            way = way / (np.linalg.norm(way) + 1e-6)
            action = np.clip(way + rng.normal(0, POINT_NOISE, 2), -1, 1)
            after, _, terminated, truncated, info = environment.step(action)
            done = terminated or truncated
            if info["success"] and recipe.kind == "navigate":
                maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(rng.choice(goals))))
            _keep(columns, observation, action, done, info)
            observation = after
        return columns

    return episode
