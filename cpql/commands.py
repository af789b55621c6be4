"""What to type to get a run that is there: the words that Hydra composes its settings from."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from cpql.configuration import choices, key_of, members, register, value_text
from cpql.errors import CpqlError
from cpql.migration import upgrade
from cpql.settings import flat
from cpql.tasks import config_folder
from cpql.training.config import TrainConfig, train_config
from cpql.training.runs import complete

__all__ = ["words"]

HOW = ("device", "threads", "compile")
"""Settings that a result doesn't depend on but for rounding, and which its command names all the same."""


def words(settings: Mapping[str, Any]) -> list[str] | None:
    """The words after `train.py` that give a run these settings, checked by composing them again.

    Args:
        settings: of a run, the content of its config.yaml.

    Returns:
        Groups first, then what they leave to say, then seed and folder. None where no words give these
        settings: of an agent or a task that this version hasn't, or of a checkpoint that is gone.
    """
    try:
        config = train_config(upgrade(settings), "config.yaml")
    except CpqlError:
        return None
    found = _words(json.dumps(asdict(replace(config, seed=0, run_dir=""))))
    own = {"seed": config.seed, "run_dir": config.run_dir}
    return None if found is None else [*found, *(f"{key}={value_text(value)}" for key, value in own.items())]


@functools.cache
def _words(dumped: str) -> list[str] | None:
    config = train_config(json.loads(dumped), "config.yaml")
    register()
    names = {"mode": _mode(config), "env": config.env.name, "budget": config.budget.name}
    if config.checkpoint is None:  # else they are those of the run that it continues
        names |= {"agent": config.configuration, "dataset": config.dataset.source}
        if config.configuration not in choices("agent"):
            return None
    chosen = [
        f"{group}={name}"
        for group, name in names.items()
        if name in choices(group) and (group, name) != ("mode", "offline")
    ]
    if config.env.name not in choices("env"):  # any environment of Gymnasium's
        chosen.append(f"env.id={value_text(config.env.id)}")
    if config.checkpoint is not None:
        chosen.append(f"checkpoint={value_text(config.checkpoint)}")
    try:
        wanted = _everything(config)
        given = _everything(_composed(chosen, config.configuration))
        for key, value in wanted.items():
            if value != given.get(key) and not isinstance(value, Mapping):
                chosen.append(f"{'' if key in given else '+'}{key}={value_text(value)}")
        return chosen if _everything(_composed(chosen, config.configuration)) == wanted else None
    except (CpqlError, HydraException):
        return None


def _mode(config: TrainConfig) -> str:
    if config.online is None:
        return "offline"
    return "online" if config.checkpoint is None else "finetune"


def _composed(chosen: list[str], configuration: str) -> TrainConfig:
    keys = [key_of(word) for word in chosen]
    given = [*chosen, f"configuration={value_text(configuration)}"]  # outside a command Hydra can't tell
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return replace(members(compose("train", given), keys)[0], seed=0, run_dir="")


def _everything(config: TrainConfig) -> dict[str, Any]:
    """All settings that a command can give, by dotted name, in JSON's types; without the lists of data."""
    how = {key: getattr(config, key) for key in HOW}
    every = {**complete(config), **flat({"budget": asdict(config.budget)}), **how}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in every.items()
        if not key.startswith("env.datasets")
    }
