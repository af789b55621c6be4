"""What the d4rl package itself makes of a small file: run by hand, its answer lies beside this as JSON.

    python -m venv oracle && oracle/bin/pip install --no-deps d4rl==1.1 gym==0.26.2 gym-notices cloudpickle \
        'numpy<2' h5py termcolor tqdm click
    D4RL_SUPPRESS_IMPORT_ERROR=1 oracle/bin/python tests/oracle/d4rl_qlearning.py

The package can't be imported as it is, because mujoco_py fails in a way that it doesn't expect; here that
import fails as it does expect.
"""

import importlib.abc
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

LIMIT = 7


def rows() -> dict[str, np.ndarray]:
    """Six episodes of at most 7 steps: how each ends, with its length; the last one is cut."""
    episodes = [("terminal", 3), ("timeout", 7), ("both", 7), ("timeout", 7), ("terminal", 1), ("cut", 4)]
    observations, following, terminals, timeouts = [], [], [], []
    for number, (kind, length) in enumerate(episodes):
        states = 100.0 * number + np.arange(length + 1)
        observations += states[:-1].tolist()
        following += states[1:].tolist()
        last = [False] * (length - 1) + [True]
        terminals += [end and kind in ("terminal", "both") for end in last]
        timeouts += [end and kind in ("timeout", "both") for end in last]
    count = len(observations)
    return {
        "observations": np.array([observations, np.sqrt(observations)], np.float32).T,
        "next_observations": np.array([following, np.sqrt(following)], np.float32).T,
        "actions": np.linspace(-1, 1, count, dtype=np.float32)[:, None],
        "rewards": np.arange(count, dtype=np.float32) / 4,
        "terminals": np.array(terminals),
        "timeouts": np.array(timeouts),
    }


class Environment:
    """What the package wants to know of one."""

    _max_episode_steps = LIMIT


def main() -> None:
    """Ask the package and write its answers."""

    class NoMujoco(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name.partition(".")[0] == "mujoco_py":
                raise ImportError(name)

    sys.meta_path.insert(0, NoMujoco())
    import d4rl  # type: ignore[import-not-found]

    everything = rows()
    without = {key: value for key, value in everything.items() if key != "timeouts"}
    cases = {"timeouts": everything, "no timeouts": without}
    answers = {
        name: {
            key: np.asarray(value).tolist()
            for key, value in d4rl.qlearning_dataset(Environment(), data).items()
        }
        for name, data in cases.items()
    }
    content = {"d4rl": version("d4rl"), "cases": answers}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(content) + "\n")
    print(path.name, {name: len(answer["rewards"]) for name, answer in answers.items()})


if __name__ == "__main__":
    main()
