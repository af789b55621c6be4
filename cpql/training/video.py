"""Videos of evaluated episodes, from the actions that were taken in them."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cpql.environments import make_task_environment
from cpql.errors import ConfigError, brief
from cpql.io import aside
from cpql.tasks import Task
from cpql.training.evaluation import Evaluation

__all__ = ["check_video", "record"]

PLACES = {1: ("best",), 2: ("best", "worst"), 3: ("best", "median", "worst")}


def check_video(task: Task) -> None:
    """Make one picture of a task's environment, so that what is missing is said before the episodes.

    Without a display MuJoCo draws through EGL, unless MUJOCO_GL says otherwise.

    Raises:
        ConfigError: a package is missing, or the environment can't be drawn.
    """
    _writer()
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        with closing(make_task_environment(task, render_mode="rgb_array")) as environment:
            environment.reset(seed=0)
            picture = environment.render()
    except Exception as error:  # MuJoCo, PyOpenGL and pygame raise many kinds
        raise ConfigError(
            f"video: {task.id} can't be drawn here ({brief(error)}): MuJoCo needs EGL or OSMesa "
            "(MUJOCO_GL=egl or osmesa), or a display"
        ) from error
    if not isinstance(picture, np.ndarray):
        raise ConfigError(f"video: {task.id} draws nothing: expected an environment with rgb_array")


def record(evaluation: Evaluation, count: int, folder: Path, name: str) -> list[Path]:
    """Take the actions of some episodes again, from the best to the worst, and write what is to be seen.

    A simulation that gives the same steps from the same seed and actions, as MuJoCo's do, shows the very
    episodes.

    Args:
        evaluation: with its actions.
        count: how many videos, of episodes evenly apart in the order of their returns.
        folder: where to.
        name: the beginning of the files' names.

    Returns:
        The MP4 files.
    """
    if not count:
        return []
    imageio, order = _writer(), np.argsort(evaluation.returns)[::-1]
    chosen = [int(order[k]) for k in np.linspace(0, len(order) - 1, count).round().astype(int)]
    words = PLACES.get(count, tuple(f"rank{k + 1}" for k in range(count)))
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    with closing(make_task_environment(evaluation.task, render_mode="rgb_array")) as environment:
        fps = int(environment.metadata.get("render_fps", 30))
        for word, episode in zip(words, chosen, strict=True):
            path = folder / f"{name}_{word}_{evaluation.returns[episode]:.0f}.mp4"
            environment.reset(seed=evaluation.seed + episode)
            with (
                aside(path) as temporary,
                closing(imageio.get_writer(temporary, format="FFMPEG", fps=fps, macro_block_size=2)) as film,
            ):
                film.append_data(environment.render())
                for action in evaluation.actions[episode]:
                    environment.step(action)
                    film.append_data(environment.render())
            paths.append(path)
    return paths


def _writer() -> Any:
    try:
        import imageio.v2
        import imageio_ffmpeg  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        raise ConfigError("video needs a package: pip install 'cpql[video]'") from None
    return imageio.v2
