"""The command line: Hydra composes the configuration, cpql checks it, errors are one line."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpql.deploy.hub import PREFIX
from cpql.errors import CheckpointError, ConfigError, did_you_mean, errors_in_one_line, printable
from cpql.settings import Candidates, Count, NonNegative, Seed, Threads, build
from cpql.tasks import config_folder, load_task, task_names, task_patterns, with_own_references
from cpql.train.config import BudgetConfig, DatasetConfig, OnlineConfig, TrainConfig

if TYPE_CHECKING:
    from cpql.deploy.policy import Policy
    from cpql.tasks import Task
    from cpql.train.evaluation import Evaluation

__all__ = ["evaluate", "export", "train"]

GROUPS = ("mode", "env", "agent", "preset", "dataset", "budget")

Plain = dict[str, Any]
"""Configuration as nested plain values."""


def train() -> None:
    """`cpql-train`, the same as `python scripts/train.py`."""
    _main("train", _train)


def evaluate() -> None:
    """`cpql-evaluate`, the same as `python scripts/evaluate.py`."""
    _main("evaluate", _evaluate)


def export() -> None:
    """`cpql-export`, the same as `python scripts/export.py`."""
    _main("export", _export)


def _main(config_name: str, command: Callable[[DictConfig], None]) -> None:
    """Run a command under Hydra."""

    def run(content: DictConfig) -> None:
        with errors_in_one_line(content.traceback is True):  # else Hydra would print its own account
            if OmegaConf.is_missing(content, "checkpoint"):
                more = "" if config_name == "train" else ", a policy's folder, or hf://owner/name"
                raise ConfigError(f"checkpoint=... is missing: a run's folder, one of its checkpoints{more}")
            command(content)

    with errors_in_one_line("traceback=true" in sys.argv):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has a ±
        try:
            Path.home()
        except RuntimeError:
            raise ConfigError("HOME isn't set, and this user has no name: set HOME to a folder") from None
        _register()
        # An objective's own settings depend on which it is: ++ lets Hydra take any, ActorConfig checks them.
        own = "agent.actor.objective_options."
        sys.argv[1:] = [f"++{word}" if word.startswith(own) else word for word in sys.argv[1:]]
        _check_words(config_name, sys.argv[1:])
        hydra.main(config_path=str(config_folder()), config_name=config_name, version_base="1.3")(run)()


# What Hydra composes from.


class _Shared(dict[str, Any]):
    """A group of Hydra's store that isn't copied with it.

    Hydra copies its whole store for every composition, and 75 times for a --help: seconds, with all tasks in
    it. What it loads from the store it copies anyway.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def _register() -> None:
    """Give Hydra the tasks, the dataclasses' defaults (so that no YAML repeats them) and our resolvers."""
    from cpql.agents import AGENTS
    from cpql.data.sources import SOURCES

    store = ConfigStore.instance()
    store.repo["env"] = _Shared()
    for name in task_names():
        node = asdict(load_task(name))
        if node["id"] is None:  # any environment, and called by its id
            node["name"] = "${env.id}"
        store.store(group="env", name=name, node=node)
    schemas: dict[str, Any] = {
        "budget": BudgetConfig(),
        "online": OnlineConfig(),
        "evaluate": EvaluateConfig(),
        "export": ExportConfig(),
    }
    for name, config in schemas.items():
        package = "_global_" if isinstance(config, CommandConfig) else name
        store.store(group="schema", name=name, package=package, node=asdict(config))
    for name in ("auto", *SOURCES):
        node = asdict(DatasetConfig(source=name))
        node |= {"size": "${budget.dataset_size}", "reward": "${published:reward,none}"}
        store.store(group="dataset", name=name, node=node)
    for name, agent in AGENTS.items():
        node = asdict(agent.config_class())
        del node["updates"]  # the budget has it
        store.store(group="schema", name=name, package="agent", node=node)
    resolvers: dict[str, Callable[..., Any]] = {
        "choices": lambda group: ", ".join(_choices(group)),
        "per_50k": lambda updates: max(1, math.ceil(updates / 50_000)),
        "published": _published,
        "settings": _settings,
        "tasks": lambda: "\n         ".join(task_patterns()),
    }
    for resolver, function in resolvers.items():
        OmegaConf.register_new_resolver(resolver, function, replace=True)


def _published(column: str, default: Any, *, _root_: DictConfig) -> Any:
    """`${published:COLUMN,DEFAULT}`: what the agent's table in `configs/published/` has for the task."""
    return OmegaConf.select(_root_, f"published.{_root_.env.name}.{column}", default=default)


def _settings(*, _root_: DictConfig) -> str:
    """`${settings:}`: all present settings as YAML for the help."""
    plain = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    return OmegaConf.to_yaml(_resolved(plain)).replace("$", "$$")  # Hydra fills in the help's own $NAMES


def _resolved(content: DictConfig) -> Plain:
    """The settings as plain values, without the table that some of them come from."""
    plain = cast(Plain, OmegaConf.to_container(content, resolve=True))
    plain.pop("published", None)
    return plain


def _choices(group: str) -> list[str]:
    files = {path.name for path in (config_folder() / group).glob("*.yaml")}
    return sorted(
        name.removesuffix(".yaml") for name in files | {*ConfigStore.instance().repo.get(group, ())}
    )


def _check_words(config_name: str, words: list[str]) -> None:
    """Refuse what Hydra would refuse, but name what is nearest."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    if any(word.startswith("-") for word in words):
        return  # Hydra's own flags: --help, --multirun, --cfg
    settings = {word.partition("=")[0]: word for word in words}
    for key, word in settings.items():
        if key == word:
            raise ConfigError(
                f"{word!r}: expected KEY=VALUE, for example env=hopper-medium; --help shows all"
            )
        if key in GROUPS and config_name == "train" and (value := word[len(key) + 1 :]) not in _choices(key):
            raise ConfigError(f"{key}={value} does not exist: {did_you_mean(value, _choices(key))}")
    # Of an environment's own options Hydra says better what to type: a + before them.
    free = ("+", "~", "hydra", "env.env_options.", "env.reset_options.")
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            chosen = compose(config_name, [word for key, word in settings.items() if key in GROUPS])
            known = {*GROUPS, *_keys(OmegaConf.to_container(chosen))}
            for key in settings:
                if not key.startswith(free) and key not in known:
                    raise ConfigError(f"unknown setting {key!r}: {_instead(key, known)}")
            compose(config_name, words)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    finally:
        GlobalHydra.instance().clear()


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


# Training.


def _train(content: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from cpql.train.logging import make_console
    from cpql.train.loop import train_group
    from cpql.train.runs import group_summary

    overrides = [word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task]
    members = _members(content, overrides)
    console = make_console()
    results = train_group(members, console)
    console.print(Text(printable(group_summary(results, [config for config, _ in members]))))


def _members(content: DictConfig, overrides: list[str]) -> list[tuple[TrainConfig, Plain]]:
    """The runs that a command asks for: one, or one for each of `seeds` and of a list of rates.

    Args:
        content: all settings.
        overrides: keys of those that the command line gives.

    Returns:
        The configuration of each, and the same as plain values.
    """
    from cpql.agents import AGENTS
    from cpql.environments import import_environment

    kind = AGENTS.get(content.agent.name)
    names = kind.by_member if kind else ()
    lists = {f"agent.{name}": OmegaConf.select(content, f"agent.{name}") for name in names}
    lists = {key: list(value) for key, value in lists.items() if OmegaConf.is_list(value)}
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
    if "env.id" in overrides and content.env.id is not None:
        OmegaConf.update(content, "env.id", import_environment(content.env.id))
    members = []
    for k in range(count):
        own = content.copy()
        for key, values in lists.items():
            OmegaConf.update(own, key, values[k])
        members.append(_resolved(own))
    if len({member["run_dir"] for member in members}) < count:
        for k, member in enumerate(members):
            values = [f"{key.removeprefix('agent.')}{values[k]}" for key, values in lists.items()]
            member["run_dir"] = f"{member['run_dir']}-{'-'.join(values)}"
    if len({member["run_dir"] for member in members}) < count:
        raise ConfigError(f"two members are alike: {', '.join(f'{k}={v}' for k, v in lists.items())}")
    return [(_checked(member, overrides), member) for member in members]


def _checked(resolved: Plain, overrides: list[str]) -> TrainConfig:
    """One run's configuration, from its resolved settings, which are completed."""
    del resolved["seeds"]
    if resolved["env"]["name"] is None:
        raise ConfigError(
            "no environment: expected env.id, such as env.id=Pendulum-v1, or a task, such as env=hopper"
        )
    if resolved["checkpoint"] is not None:
        _continue_from(resolved, overrides)
    _drop_inapplicable(resolved["agent"], overrides)
    config = build(TrainConfig, resolved, "configuration")
    if config.env.name not in task_names():
        return config
    own = load_task(config.env.name)
    return dataclasses.replace(config, env=with_own_references(config.env, own))


def _continue_from(resolved: Plain, overrides: list[str]) -> None:
    """Take task, agent and dataset from the run of `checkpoint`, except for what the command line gives."""
    import yaml

    from cpql.train.checkpoint import find_training

    file = find_training(Path(resolved["checkpoint"]))[0].parent / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text())
        if not {"env", "agent", "dataset"} <= before.keys():
            raise ValueError("it has no env, agent and dataset")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: no readable configuration of a run: {error}") from error
    if "agent" in overrides:
        raise ConfigError(
            f"agent=...: the agent is that of checkpoint={resolved['checkpoint']}; "
            "agent.KEY=VALUE changes a setting"
        )
    resolved["configuration"] = before.get("configuration", "")
    for part in {"env", "agent", "dataset"} - set(overrides):
        chosen, resolved[part] = resolved[part], before[part]
        for key in overrides:
            if key.startswith(f"{part}."):
                *parents, name = key.split(".")[1:]
                source, target = chosen, resolved[part]
                for parent in parents:
                    source, target = source[parent], target[parent]
                target[name] = source[name]


def _drop_inapplicable(agent: Plain, overrides: list[str]) -> None:
    """Drop what applies to other agents or objectives, unless the command line gives it.

    That is what a preset sets and this agent lacks, and, where the command chooses the objective, options
    of the agent's own one, such as Consistency-AC's weight.
    """
    from cpql.agents import AGENTS
    from cpql.consistency import OBJECTIVES

    def drop(settings: Plain, where: str, keys: Iterable[str]) -> None:
        for key in keys:
            if not any(f"{given}.".startswith(f"{where}.{key}.") for given in overrides):
                settings.pop(key, None)

    if agent.get("name") in AGENTS:
        presets = (cast(DictConfig, OmegaConf.load(file)) for file in (config_folder() / "preset").iterdir())
        fields = AGENTS[agent["name"]].config_class.__dataclass_fields__.keys()
        drop(agent, "agent", {str(key) for preset in presets for key in preset} - fields)
    actor, options = agent["actor"], "agent.actor.objective_options"
    if "agent.actor.objective" in overrides and options not in overrides:
        objective = OBJECTIVES.get(actor["objective"])
        if objective:  # else it is refused later
            drop(actor["objective_options"], options, actor["objective_options"].keys() - objective.settings)


# Evaluating and exporting.


@dataclass(frozen=True)
class CommandConfig:
    """What evaluating and exporting have in common.

    Attributes:
        checkpoint: a run's folder, one of its checkpoints, a policy's folder, or the Hub's `hf://owner/name`.
        candidates: how many actions compete by their value; 1 is the actor alone; None leaves the policy's
            own rule.
        temperature: of that choice, likewise; only for several candidates that are sampled.
        out: the file to write; None puts it beside the policy.
        traceback: show Python's traceback with an error.
    """

    checkpoint: str = MISSING
    candidates: Candidates | None = None
    temperature: NonNegative | None = None
    out: str | None = None
    traceback: bool = False


@dataclass(frozen=True)
class EvaluateConfig(CommandConfig):
    """One evaluation. Its file, a JSON, is named by what isn't the policy's own.

    Attributes:
        episodes: how many.
        seed: of the environments and the policy's noise: episode i has seed + i.
        deterministic: see `cpql.Policy.predict`.
        env_id: Gymnasium's id of another environment than the task's, as wide as that; then there is a return
            and no score.
        episode_limit: steps after which an episode ends that its environment doesn't end.
        device: `auto` takes a GPU where there is one.
        threads: CPU threads of PyTorch; 0 leaves its own choice.
    """

    episodes: Count = 100
    seed: Seed = 1000
    deterministic: bool = False
    env_id: str | None = None
    episode_limit: Count = 10_000
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: Threads = 1

    def __post_init__(self) -> None:
        if self.deterministic and self.temperature is not None:
            found = f"temperature={self.temperature:g}"
            raise ConfigError(f"{found}: expected none with deterministic=true, where the best wins")


@dataclass(frozen=True)
class ExportConfig(CommandConfig):
    """One export; `out` mustn't exist. See `cpql.deploy.export.export`.

    Attributes:
        format: of the file: `onnx`, `torch` (torch.export's .pt2) or `numpy` (.npz).
        noise: an `input` of the program, or drawn `inside` it and then given out.
    """

    format: Literal["onnx", "torch", "numpy"] = "onnx"
    noise: Literal["input", "inside"] = "input"


def _folder_for_results(checkpoint: str, policy: Path) -> Path:
    """Where what is made of a policy goes: beside it, or here if it came from the Hub."""
    return Path() if checkpoint.startswith(PREFIX) else policy.resolve().parent


def _set_action_rule(policy: Policy, config: CommandConfig) -> None:
    if config.candidates is not None:
        policy.candidates = config.candidates
    if config.temperature is not None:
        if policy.candidates == 1:
            raise ConfigError(f"temperature={config.temperature:g}: expected candidates above 1, found 1")
        policy.temperature = config.temperature


def _evaluate(content: DictConfig) -> None:
    import torch

    from cpql.deploy.policy import Policy, find_policy
    from cpql.device import choose_device
    from cpql.environments import import_environment
    from cpql.io import write_text
    from cpql.train.evaluation import evaluate as run

    config = build(EvaluateConfig, _resolved(content), "configuration")
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = find_policy(config.checkpoint)
    policy = Policy.load(folder, device)
    _set_action_rule(policy, config)
    task = policy.config.task
    if config.env_id is not None:
        task = with_own_references(dataclasses.replace(task, id=import_environment(config.env_id)), task)
    beside = _folder_for_results(config.checkpoint, folder) / _file_name(policy, task, config)
    out = beside if config.out is None else Path(config.out)
    _check_writable(out)
    evaluation = run(
        policy,
        task,
        config.episodes,
        seed=config.seed,
        deterministic=config.deterministic,
        episode_limit=config.episode_limit,
    )
    Console().print(_table(evaluation, policy.config.origin))
    result = {"task": task.name, "policy": policy.config.origin, **evaluation.to_dict()}
    write_text(out, json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(printable(str(out)))


def _file_name(policy: Policy, task: Task, config: EvaluateConfig) -> str:
    """The name of an evaluation's file, with what isn't the policy's own: no two that differ share one."""
    folder = policy.folder.resolve().name if policy.folder else ""
    hub = config.checkpoint.startswith(PREFIX)
    parts: list[tuple[bool, str]] = [
        (True, f"evaluation_{config.episodes}_{config.seed}"),
        (hub, config.checkpoint.removeprefix(PREFIX)),
        (not hub and folder != "policy", folder),  # a checkpoint's own is beside its evaluations
        (task.id != policy.config.task.id, str(task.id)),
        (policy.candidates != policy.config.candidates, f"{policy.candidates}candidates"),
        (policy.temperature != policy.config.temperature, f"temperature{policy.temperature:g}"),
        (config.deterministic, "deterministic"),
        (config.episode_limit != EvaluateConfig.episode_limit, f"limit{config.episode_limit}"),
    ]
    words = (re.sub(r"[^\w.@-]", "-", part.replace("/", "--")) for differs, part in parts if differs)
    return "_".join(words) + ".json"


def _check_writable(path: Path) -> None:
    """Refuse a file that can't be written, before the episodes that it is for."""
    try:
        if path.is_dir():
            raise ConfigError(f"out={path}: expected a file, found a folder")
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent).cleanup()
    except OSError as error:
        raise ConfigError(f"out={path}: can't be written: {error.strerror}") from None


def _table(evaluation: Evaluation, origin: Plain) -> Table:
    """The summary of an evaluation that is printed; `origin` is the policy's, and may be a stranger's."""
    task, (low, high) = evaluation.task, evaluation.interval
    step, data = origin.get("step"), origin.get("data")
    data = data if isinstance(data, dict) else {}
    update = f"{step:,}" if isinstance(step, int) else "unknown"
    behaviour = data.get("return_mean")
    if not isinstance(behaviour, int | float):
        behaviour = None
    behaviour_return = "unknown" if behaviour is None else f"{behaviour:,.1f}"
    cut = f", {evaluation.cut} of them cut after {evaluation.episode_limit:,} steps" if evaluation.cut else ""
    rows = {
        "return": f"{evaluation.mean:,.1f} ± {evaluation.std:,.1f}  [{low:,.1f}, {high:,.1f}]",
        "episode length": f"{sum(evaluation.lengths) / len(evaluation.lengths):,.1f}",
        "episodes": f"{len(evaluation.returns)}{cut}",
    }
    if evaluation.score is None:
        rows |= {"behaviour's return": behaviour_return, "references": "none: a return, and no score"}
    else:
        score = f"{evaluation.score:.1f}  [{task.score(low):.1f}, {task.score(high):.1f}]"
        rows = {f"score ({task.benchmark}-normalised)": score} | rows
        rows |= {
            "behaviour's score": "unknown" if behaviour is None else f"{task.score(behaviour):.1f}",
            "references": (
                f"random {task.random_return:,.1f}, expert {task.expert_return:,.1f} ({task.benchmark})"
            ),
        }
    rows |= {
        "environment": task.id or "",
        "action rule": evaluation.rule,
        "data": f"{data.get('source', 'unknown')} {data.get('id', '')}",
    }
    if task.note:
        rows["note"] = task.note
    title = f"{origin.get('agent')} on {task.name}, update {update}, seed {origin.get('seed')}"
    table = Table("", "value", title=Text(printable(title)))
    for row in rows.items():
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _export(content: DictConfig) -> None:
    import torch

    from cpql.deploy import folded
    from cpql.deploy.export import SUFFIXES
    from cpql.deploy.export import export as run
    from cpql.deploy.policy import Policy, find_policy

    config = build(ExportConfig, _resolved(content), "configuration")
    folder = find_policy(config.checkpoint)
    out = Path(
        config.out or _folder_for_results(config.checkpoint, folder) / f"policy.{SUFFIXES[config.format]}"
    )
    if out.exists():
        raise CheckpointError(f"{out} already exists: name another file by out=...")
    torch.set_num_threads(1)
    policy = Policy.load(folder)
    _set_action_rule(policy, config)
    done = run(policy, out, config.format, config.noise)
    for way in ("inputs", "outputs"):
        arrays = (f"{name} [{', '.join(map(str, s))}]" for name, s in done.description[way].items())
        print(f"{way:<8} {', '.join(arrays)}")
    print(
        f"differs from PyTorch by at most {done.difference:.1e} of half an action's range "
        f"({done.states:,} random states)"
    )
    if config.format == "numpy":
        print(f"where cpql isn't installed, take {printable(folded.__file__)} along: it needs numpy alone")
    print(printable(str(out)))
