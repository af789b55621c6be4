"""The configuration of a command: what Hydra composes it from, and what cpql makes of it."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cpql.actors import ACTORS
from cpql.agents import AGENTS
from cpql.consistency import OBJECTIVES
from cpql.data.sources import SOURCES
from cpql.environments import import_environment
from cpql.errors import CheckpointError, ConfigError, brief, did_you_mean
from cpql.migration import upgrade
from cpql.settings import flat
from cpql.tasks import config_folder, load_task, task_names, task_patterns
from cpql.training.checkpoint import find_training
from cpql.training.config import BudgetConfig, DatasetConfig, OnlineConfig, TrainConfig, train_config

__all__ = [
    "check_words",
    "choices",
    "compose_training",
    "key_of",
    "members",
    "prepared",
    "register",
    "value_text",
]

NOT_TEXT = ("null", "true", "false", "nan", "inf")  # what Hydra takes for something else
GROUPS = ("mode", "env", "agent", "preset", "dataset", "budget", "launcher")
GIVES = {"preset": "agent", "mode": "online"}  # the part of a run's settings that a group's choice is about


class _Tasks(dict[str, Any]):
    """Hydra's group of tasks, hundreds of which one is chosen: each is made then.

    It isn't copied with Hydra's store: the 75 copies for a --help take seconds.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tasks:
        return self

    def __getitem__(self, file: str) -> ConfigNode:
        node = asdict(load_task(file.removesuffix(".yaml")))
        if node["id"] is None:  # any environment, and called by its id
            node["name"] = "${env.id}"
        return ConfigNode(file, OmegaConf.create(node), "env", None, None)


def register(*, everything: bool = True, **commands: Any) -> None:
    """Register the tasks, the dataclasses' defaults (so that no YAML repeats them) and resolvers with Hydra.

    Args:
        everything: the help lists all settings, and not the common ones alone.
        **commands: dataclasses with all settings of a command, for `/schema/NAME`.
    """
    store = ConfigStore.instance()
    store.repo["env"] = _Tasks.fromkeys(f"{name}.yaml" for name in task_names())
    for name in ("auto", *SOURCES):
        node = asdict(DatasetConfig(source=name))
        node |= {"size": "${budget.dataset_size}", "reward": "${published:reward,none}"}
        node["normalise_observations"] = "${published:normalise_observations,false}"
        node["time_limits"] = "${published:time_limits,keep}"
        store.store(group="dataset", name=name, node=node)
    for name, agent in AGENTS.items():
        node = asdict(agent.config_class())
        del node["updates"]  # the budget has it
        store.store(group="schema", name=name, package="agent", node=node)
    for kind, actor in ACTORS.items():
        node = asdict(actor.config_class())
        store.store(group="schema", name=f"actor_{kind}", package="agent.actor", node=node)
    for name, config in {"budget": BudgetConfig(), "online": OnlineConfig()}.items():
        store.store(group="schema", name=name, package=name, node=asdict(cast(Any, config)))
    for name, config in commands.items():
        store.store(group="schema", name=name, package="_global_", node=asdict(config))
    resolvers: dict[str, Callable[..., Any]] = {
        "at_once": lambda device, threads: _gpus(device) or max(1, _cores() // (threads or _cores())),
        "choices": lambda group: ", ".join(choices(group)),
        "cores": lambda threads: threads or _cores(),
        "gpus": lambda device: min(1, _gpus(device)),
        "gpus_elsewhere": lambda device: 1 if device == "cuda" else None,
        "per_50k": lambda updates: updates / 50_000,
        "published": _published,
        "settings": _settings if everything else lambda: "",
        "tasks": lambda: "\n         ".join(task_patterns()),
    }
    for resolver, function in resolvers.items():
        OmegaConf.register_new_resolver(resolver, function, replace=True)


def _gpus(device: str) -> int:
    """The GPUs of this machine that a device may be."""
    return 0 if device == "cpu" else torch.cuda.device_count()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _published(column: str, default: Any, *, _root_: DictConfig) -> Any:
    """`${published:COLUMN,DEFAULT}`: from the agent's published table.

    Of its rows the first that fits the task gives the value: a row's key is one pattern or several, such as
    `hopper-*`, with spaces between. A row named as the task itself precedes patterns, `all` comes last.
    """
    table, task = _root_.get("published") or {}, str(_root_.env.name)
    fitting = (row for key, row in table.items() if any(fnmatchcase(task, part) for part in key.split()))
    for row in (table.get(task), next(fitting, None), table.get("all")):
        if row is not None and row.get(column) is not None:
            return row[column]
    return default


def _settings(*, _root_: DictConfig) -> str:
    """`${settings:}`: all present settings as YAML for the help."""
    plain = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    return OmegaConf.to_yaml(_resolved(plain)).replace("$", "$$")  # Hydra fills in the help's own $NAMES


def _resolved(content: DictConfig) -> dict[str, Any]:
    """The settings as plain values, without the table that some of them are read from."""
    plain = cast(dict[str, Any], OmegaConf.to_container(content, resolve=True))
    plain.pop("published", None)
    return plain


def choices(group: str) -> list[str]:
    """The names that `GROUP=NAME` takes."""
    names = {path.stem for path in (config_folder() / group).glob("*.yaml")}
    return sorted(names | {name.removesuffix(".yaml") for name in ConfigStore.instance().repo.get(group, ())})


def check_words(command: str, words: list[str]) -> None:
    """Refuse words that Hydra would refuse, and name the nearest valid ones.

    Args:
        command: name of its configuration, `train`.
        words: `KEY=VALUE`. With a flag of Hydra's among them, such as --help, nothing is checked.

    Raises:
        ConfigError: a word of another form, or a key or a group's choice that doesn't exist.
    """
    if any(word.startswith("-") for word in words):
        return
    values, chosen = {}, []
    for word in words:
        key, equals, values[key] = word.partition("=")
        if not equals:
            raise ConfigError(
                f"{word!r}: expected KEY=VALUE, for example env=hopper-medium; --help shows all"
            )
        if command == "train" and key in GROUPS:
            chosen.append(word)
            if values[key] not in choices(key):
                raise ConfigError(f"{word} does not exist: {did_you_mean(values[key], choices(key))}")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            compose(command, words)
        except HydraException as error:
            content = cast(dict[str, Any], OmegaConf.to_container(compose(command, chosen)))
            content.pop("published", None)
            known = flat(content).keys() | {word.partition("=")[0] for word in chosen}
            # Of an environment's own options Hydra says better what to type: a + before them.
            free = ("+", "~", "hydra", "env.env_options.", "env.reset_options.")
            for key in values:
                if not key.startswith(free) and key not in known:
                    raise ConfigError(f"unknown setting {key!r}: {_instead(key, known)}") from None
            raise ConfigError(" ".join(str(error).split())) from None


def compose_training(words: list[str]) -> list[TrainConfig]:
    """The runs that a command line of these words would train.

    Raises:
        ConfigError: a word that doesn't exist, or a setting that isn't valid.
        CheckpointError: there is no such run to continue from.
    """
    register()
    agent = next((word.partition("=")[2] for word in words if word.startswith("agent=")), "")
    words = prepared(words)
    check_words("train", words)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", [*words, f"configuration={agent}"] if agent else words)
    return members(content, [key_of(word) for word in words])


def prepared(words: Sequence[str]) -> list[str]:
    """The words of a command line as Hydra takes them.

    It can't know an objective's own settings, which ActorConfig checks. A file of one's own with an
    environment's id needs no task: `dataset.path=mine.npz env.id=Pendulum-v1`.
    """
    keys = {word.partition("=")[0] for word in words}
    if {"dataset.path", "env.id"} <= keys and "env.id=null" not in words and not keys & {"env", "checkpoint"}:
        words = ["env=gymnasium", *words]
    return [f"++{word}" if word.startswith("agent.actor.objective_options") else word for word in words]


def key_of(word: str) -> str:
    """The setting that a word `KEY=VALUE` or `+KEY=VALUE` is about."""
    return word.lstrip("+").partition("=")[0]


def value_text(value: Any) -> str:
    """A value in the grammar of Hydra's command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{value_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(value_text, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in NOT_TEXT:
        return value
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _instead(key: str, known: set[str]) -> str:
    """Settings of a similar name, in any group; else all that the key's own group has."""
    names = {k: k.rpartition(".")[2] for k in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], set(names.values()), cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(sorted(k for k, name in names.items() if name in near))}?"
    group = key.rpartition(".")[0]
    inside = sorted(k for k in known if k.rpartition(".")[0] == group)
    return f"choose from {', '.join(inside)}" if inside else f"there are no settings in {group} in this mode"


def members(content: DictConfig, overrides: list[str]) -> list[TrainConfig]:
    """The runs of a command: one, or one for each of `seeds` or of a list of rates.

    Args:
        content: all settings.
        overrides: keys of those that the command line gives.

    Raises:
        ConfigError: lists of different lengths, or a setting that isn't valid.
        CheckpointError: there is no such run to continue from.
    """
    if OmegaConf.is_missing(content, "checkpoint"):
        raise ConfigError("checkpoint=... is missing: a run's folder, or one of its checkpoints")
    agent = AGENTS.get(str(content.agent.name))
    rates = {f"agent.{name}": content.agent.get(name) for name in agent.by_member} if agent else {}
    lists = {key: list(value) for key, value in rates.items() if OmegaConf.is_list(value)}
    if content.seeds is not None:
        if not OmegaConf.is_list(content.seeds):
            raise ConfigError(f"seeds={content.seeds}: expected a list, such as [0,1,2,3]; seed takes one")
        lists["seed"] = list(content.seeds)
    given = ", ".join(f"{key}={values}" for key, values in lists.items())
    count, *others = {len(values) for values in lists.values()} or {1}
    if others or not count:
        raise ConfigError(f"{given}: expected lists of one length, with a value for each member")
    if "env.id" in overrides and isinstance(content.env.id, str):
        OmegaConf.update(content, "env.id", import_environment(content.env.id))
    found = []
    for k in range(count):
        own = content.copy()
        for key, values in lists.items():
            OmegaConf.update(own, key, values[k])
        found.append(_checked(_resolved(own), overrides))
    if len({config.run_dir for config in found}) == count:
        return found
    marks = ["-".join(f"{key.removeprefix('agent.')}{values[k]}" for key, values in lists.items())
             for k in range(count)]  # fmt: skip
    if len(set(marks)) < count:
        raise ConfigError(f"two members are alike: {given}")
    return [replace(c, run_dir=f"{c.run_dir}-{mark}") for c, mark in zip(found, marks, strict=True)]


def _checked(plain: dict[str, Any], overrides: list[str]) -> TrainConfig:
    """Complete one run's settings, and check them."""
    del plain["seeds"]
    file = Path(str(plain["run_dir"])) / "config.yaml"
    if plain["resume"] and "run_dir" in overrides and file.exists():
        plain = _resumed(plain, file, overrides)
    elif plain["env"]["name"] is None:
        raise ConfigError(
            "no environment: expected env.id, such as env.id=Pendulum-v1, or a task, such as env=hopper"
        )
    elif isinstance(plain["checkpoint"], str):
        plain |= _continued(plain, overrides)
    _drop_inapplicable(plain["agent"], overrides)
    return train_config(plain, "configuration")


def _resumed(plain: dict[str, Any], file: Path, overrides: list[str]) -> dict[str, Any]:
    """The settings of the run of a folder, with those of the command line in their place."""
    words = {GIVES.get(key, key) for key in overrides} | {"resume", "run_dir", "traceback"}
    given = {key: value for key, value in plain.items() if key in words}
    return plain | _with_overrides(_read(file), plain, overrides) | given


def _continued(plain: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Task, agent and dataset of the run of `checkpoint`, except for what the command line gives."""
    before = _read(find_training(plain["checkpoint"])[0].parent / "config.yaml")
    if "agent" in overrides:
        raise ConfigError(
            f"agent=...: the agent is that of checkpoint={plain['checkpoint']}; "
            "agent.KEY=VALUE changes a setting"
        )
    parts = {part: before[part] for part in ("env", "agent", "dataset") if part not in overrides}
    kept = _with_overrides(parts, plain, overrides)
    return {**kept, "configuration": before.get("configuration", "")}


def _read(file: Path) -> dict[str, Any]:
    """A run's configuration, as this version would write it."""
    try:
        before = upgrade(yaml.safe_load(file.read_text()))
        if not all(isinstance(before[part], dict) for part in ("env", "agent", "dataset")):
            raise ValueError("env, agent or dataset has no settings")
        return before
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: no readable configuration of a run: {brief(error)}") from error


def _with_overrides(before: dict[str, Any], plain: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A run's settings with those of single keys, `agent.eta`, as the command line gives them."""
    now, then = OmegaConf.create(plain), OmegaConf.create(before)
    for key in overrides:
        part, dot, _ = key.partition(".")
        if dot and isinstance(before.get(part), dict):
            OmegaConf.update(then, key, OmegaConf.select(now, key), merge=False, force_add=True)
    return cast(dict[str, Any], OmegaConf.to_container(then))


def _drop_inapplicable(agent: dict[str, Any], overrides: list[str]) -> None:
    """Drop settings of other agents, actors and objectives, unless the command line gives them.

    A preset may set what the agent doesn't have. If the command line chooses the objective, options of the
    agent's own objective, such as Consistency-AC's weight, may not apply.
    """

    def drop(settings: dict[str, Any], where: str, keys: Iterable[str]) -> None:
        for key in keys:
            if not any(f"{given}.".startswith(f"{where}.{key}.") for given in overrides):
                settings.pop(key, None)

    if kind := AGENTS.get(str(agent["name"])):
        presets = (cast(DictConfig, OmegaConf.load(file)) for file in (config_folder() / "preset").iterdir())
        fields = kind.config_class.__dataclass_fields__.keys()
        drop(agent, "agent", {str(key) for preset in presets for key in preset} - fields)
    actor = ACTORS.get(str(agent["actor"].get("kind"))) if isinstance(agent["actor"], dict) else None
    if actor:
        drop(agent["actor"], "agent.actor", agent["actor"].keys() - actor.config_class.__dataclass_fields__)
    options = "agent.actor.objective_options"
    if "agent.actor.objective" in overrides and options not in overrides:
        objective = OBJECTIVES.get(str(agent["actor"]["objective"]))
        if objective and (own := agent["actor"].get("objective_options")):
            drop(own, options, own.keys() - objective.settings)
