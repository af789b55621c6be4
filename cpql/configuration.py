"""The configuration of a command: what Hydra composes it from, and what cpql makes of it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cpql.agents import AGENTS
from cpql.consistency import OBJECTIVES
from cpql.data.sources import SOURCES
from cpql.environments import import_environment
from cpql.errors import CheckpointError, ConfigError, did_you_mean
from cpql.migration import upgrade
from cpql.settings import build
from cpql.tasks import config_folder, load_task, task_names, task_patterns, with_own_references
from cpql.train.checkpoint import find_training
from cpql.train.config import BudgetConfig, DatasetConfig, OnlineConfig, TrainConfig

__all__ = ["Plain", "check_words", "choices", "members", "register", "resolved"]

Plain = dict[str, Any]
"""Configuration as nested plain values."""

GROUPS = ("mode", "env", "agent", "preset", "dataset", "budget")


class _Shared(dict[str, Any]):
    """A group of Hydra's store that isn't copied with it.

    Hydra copies its whole store for every composition, and 75 times for a --help: seconds, with all tasks in
    it. What it loads from the store it copies anyway.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def register(**commands: Any) -> None:
    """Register the tasks, the dataclasses' defaults (so that no YAML repeats them) and resolvers with Hydra.

    Args:
        **commands: dataclasses with all settings of a command, for `/schema/NAME`.
    """
    store = ConfigStore.instance()
    store.repo["env"] = _Shared()
    for name in task_names():
        node = asdict(load_task(name))
        if node["id"] is None:  # any environment, and called by its id
            node["name"] = "${env.id}"
        store.store(group="env", name=name, node=node)
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
    for name, config in {"budget": BudgetConfig(), "online": OnlineConfig()}.items():
        store.store(group="schema", name=name, package=name, node=asdict(cast(Any, config)))
    for name, config in commands.items():
        store.store(group="schema", name=name, package="_global_", node=asdict(config))
    resolvers: dict[str, Callable[..., Any]] = {
        "choices": lambda group: ", ".join(choices(group)),
        "per_50k": lambda updates: updates / 50_000,
        "published": _published,
        "settings": _settings,
        "tasks": lambda: "\n         ".join(task_patterns()),
    }
    for resolver, function in resolvers.items():
        OmegaConf.register_new_resolver(resolver, function, replace=True)


def _published(column: str, default: Any, *, _root_: DictConfig) -> Any:
    """`${published:COLUMN,DEFAULT}`: from the agent's published table, its row of the task, or of `all`."""
    for row in (_root_.env.name, "all"):
        value = OmegaConf.select(_root_, f"published.{row}.{column}")
        if value is not None:
            return value
    return default


def _settings(*, _root_: DictConfig) -> str:
    """`${settings:}`: all present settings as YAML for the help."""
    plain = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    return OmegaConf.to_yaml(resolved(plain)).replace("$", "$$")  # Hydra fills in the help's own $NAMES


def resolved(content: DictConfig) -> Plain:
    """The settings as plain values, without the table that some of them are read from."""
    plain = cast(Plain, OmegaConf.to_container(content, resolve=True))
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
    groups, values = (GROUPS if command == "train" else ()), {}
    for word in words:
        key, equals, values[key] = word.partition("=")
        if not equals:
            raise ConfigError(
                f"{word!r}: expected KEY=VALUE, for example env=hopper-medium; --help shows all"
            )
        if key in groups and values[key] not in choices(key):
            raise ConfigError(
                f"{key}={values[key]} does not exist: {did_you_mean(values[key], choices(key))}"
            )
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            compose(command, words)
        except HydraException as error:
            chosen = compose(command, [f"{key}={value}" for key, value in values.items() if key in groups])
            known = {*groups, *_keys(OmegaConf.to_container(chosen))}
            # Of an environment's own options Hydra says better what to type: a + before them.
            free = ("+", "~", "hydra", "env.env_options.", "env.reset_options.")
            for key in values:
                if not key.startswith(free) and key not in known:
                    raise ConfigError(f"unknown setting {key!r}: {_instead(key, known)}") from None
            raise ConfigError(" ".join(str(error).split())) from None


def _keys(content: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for key, value in content.items():
        if prefix + key != "published":
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else ()


def _instead(key: str, known: set[str]) -> str:
    """Settings of a similar name, in any group; else all that the key's own group has."""
    names = {k: k.rpartition(".")[2] for k in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], set(names.values()), cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(sorted(k for k, name in names.items() if name in near))}?"
    group = key.rpartition(".")[0]
    inside = sorted(k for k in known if k.rpartition(".")[0] == group)
    if inside:
        return f"choose from {', '.join(inside)}"
    return f"there are no settings in {group} in this mode" if group in known else _instead(group, known)


def members(content: DictConfig, overrides: list[str]) -> list[tuple[TrainConfig, Plain]]:
    """The runs of a command: one, or one for each of `seeds` or of a list of rates.

    Args:
        content: all settings.
        overrides: keys of those that the command line gives.

    Returns:
        The configuration of each, and the same as plain values.

    Raises:
        ConfigError: lists of different lengths, or a setting that isn't valid.
        CheckpointError: there is no such run to continue from.
    """
    agent = AGENTS.get(str(content.agent.name))
    rates = {f"agent.{name}": content.agent.get(name) for name in agent.by_member} if agent else {}
    lists = {key: list(value) for key, value in rates.items() if OmegaConf.is_list(value)}
    if content.seeds is not None:
        if not OmegaConf.is_list(content.seeds):
            raise ConfigError(f"seeds={content.seeds}: expected a list, such as [0,1,2,3]; seed takes one")
        lists["seed"] = list(content.seeds)
    count = len(next(iter(lists.values()))) if lists else 1
    for key, values in lists.items():
        if not values:
            raise ConfigError(f"{key}=[]: expected a value for each member, found none")
        if len(values) != count:
            raise ConfigError(f"{key}={values}: {len(values)} values: expected {count}, one for each member")
    if "env.id" in overrides and isinstance(content.env.id, str):
        OmegaConf.update(content, "env.id", import_environment(content.env.id))
    found = []
    for k in range(count):
        own = content.copy()
        for key, values in lists.items():
            OmegaConf.update(own, key, values[k])
        plain = resolved(own)
        found.append((_checked(plain, overrides), plain))
    if len({config.run_dir for config, _ in found}) == count:
        return found
    for k, (config, plain) in enumerate(found):
        suffix = "-".join(f"{key.removeprefix('agent.')}{values[k]}" for key, values in lists.items())
        plain["run_dir"] = f"{config.run_dir}-{suffix}"
        found[k] = dataclasses.replace(config, run_dir=plain["run_dir"]), plain
    if len({config.run_dir for config, _ in found}) < count:
        raise ConfigError(f"two members are alike: {', '.join(f'{k}={v}' for k, v in lists.items())}")
    return found


def _checked(plain: Plain, overrides: list[str]) -> TrainConfig:
    """Complete one run's settings, and check them."""
    del plain["seeds"]
    if plain["env"]["name"] is None:
        raise ConfigError(
            "no environment: expected env.id, such as env.id=Pendulum-v1, or a task, such as env=hopper"
        )
    if isinstance(plain["checkpoint"], str):
        _continue_from(plain, overrides)
    _drop_inapplicable(plain["agent"], overrides)
    config = build(TrainConfig, plain, "configuration")
    if config.env.name not in task_names():
        return config
    own = load_task(config.env.name)
    return dataclasses.replace(config, env=with_own_references(config.env, own))


def _continue_from(plain: Plain, overrides: list[str]) -> None:
    """Take task, agent and dataset from the run of `checkpoint`, except for what the command line gives."""
    file = find_training(Path(plain["checkpoint"]))[0].parent / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text())
        if not {"env", "agent", "dataset"} <= before.keys():
            raise ValueError("it has no env, agent and dataset")
        before = upgrade(before)
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: no readable configuration of a run: {error}") from error
    if "agent" in overrides:
        raise ConfigError(
            f"agent=...: the agent is that of checkpoint={plain['checkpoint']}; "
            "agent.KEY=VALUE changes a setting"
        )
    plain["configuration"] = before.get("configuration", "")
    for part in {"env", "agent", "dataset"} - set(overrides):
        chosen, plain[part] = plain[part], before[part]
        for key in overrides:
            if key.startswith(f"{part}."):
                *parents, name = key.split(".")[1:]
                source, target = chosen, plain[part]
                for parent in parents:
                    source, target = source[parent], target[parent]
                target[name] = source[name]


def _drop_inapplicable(agent: Plain, overrides: list[str]) -> None:
    """Drop settings of other agents and objectives, unless the command line gives them.

    A preset may set what the agent doesn't have. If the command line chooses the objective, options of the
    agent's own objective, such as Consistency-AC's weight, may not apply.
    """

    def drop(settings: Plain, where: str, keys: Iterable[str]) -> None:
        for key in keys:
            if not any(f"{given}.".startswith(f"{where}.{key}.") for given in overrides):
                settings.pop(key, None)

    if kind := AGENTS.get(str(agent["name"])):
        presets = (cast(DictConfig, OmegaConf.load(file)) for file in (config_folder() / "preset").iterdir())
        fields = kind.config_class.__dataclass_fields__.keys()
        drop(agent, "agent", {str(key) for preset in presets for key in preset} - fields)
    options = "agent.actor.objective_options"
    if "agent.actor.objective" in overrides and options not in overrides:
        objective, own = (
            OBJECTIVES.get(str(agent["actor"]["objective"])),
            agent["actor"].get("objective_options"),
        )
        if objective and own:
            drop(own, options, own.keys() - objective.settings)
