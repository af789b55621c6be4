"""The command line: Hydra composes the configuration, cpql checks it, errors are one line."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpql.deploy.hub import PREFIX
from cpql.errors import CheckpointError, ConfigError, CpqlError, Interrupted, did_you_mean, printable
from cpql.settings import Candidates, Count, NonNegative, Seed, Threads, build
from cpql.tasks import config_folder, load_task, task_names, task_patterns, with_own_references
from cpql.train.config import BudgetConfig, DatasetConfig, OnlineConfig, TrainConfig

if TYPE_CHECKING:
    from cpql.deploy.policy import Policy
    from cpql.tasks import Task
    from cpql.train.evaluation import Evaluation

__all__ = ["evaluate", "export", "train"]

MISSING = (
    "checkpoint=... is missing: a run's folder, one of its checkpoints, a policy's folder, or hf://owner/name"
)

GROUPS = ("mode", "env", "agent", "dataset", "budget")


@dataclass(frozen=True)
class ExportConfig:
    """One export; `configs/export.yaml` has the defaults.

    Attributes:
        checkpoint: a run's folder, one of its checkpoints, or a policy's folder.
        format: see `cpql.deploy.export.export`, as for `noise`.
        candidates: how many actions compete by their value; 1 is the actor alone; None leaves the policy's
            own rule.
        temperature: of that choice, likewise; only for several candidates.
        noise: where it comes from.
        out: the file, which mustn't exist; None puts it beside the policy.
        traceback: show Python's traceback with an error.
    """

    checkpoint: str
    format: Literal["onnx", "torch", "numpy"]
    candidates: Candidates | None
    temperature: NonNegative | None
    noise: Literal["input", "inside"]
    out: str | None
    traceback: bool


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation; `configs/evaluate.yaml` has the defaults.

    Attributes:
        checkpoint: a run's folder, one of its checkpoints, a policy's folder, or the Hub's.
        episodes: how many.
        seed: of the environments and the policy's noise: episode i has seed + i.
        candidates: how many actions compete by their value; 1 is the actor alone; None leaves the policy's
            own rule.
        temperature: of that choice, likewise; only for several candidates that are sampled.
        deterministic: see `cpql.Policy.predict`.
        env_id: Gymnasium's id of another environment than the task's, as wide as that; then there is a return
            and no score.
        episode_limit: steps after which an episode ends that its environment doesn't end.
        device: `auto` takes a GPU where there is one.
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        out: the JSON file; None puts it beside the policy, named by what isn't the policy's own there.
        traceback: show Python's traceback with an error.
    """

    checkpoint: str
    episodes: Count
    seed: Seed
    candidates: Candidates | None
    temperature: NonNegative | None
    deterministic: bool
    env_id: str | None
    episode_limit: Count
    device: Literal["auto", "cpu", "cuda"]
    threads: Threads
    out: str | None
    traceback: bool


def _plain(value: Any) -> Any:
    """A dataclass as nested dicts and lists, which is what YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


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

    store = ConfigStore.instance()
    store.repo["env"] = _Shared()
    for name in task_names():
        node = _plain(load_task(name))
        if node["id"] is None:  # any environment, and called by its id
            node["name"] = "${env.id}"
        store.store(group="env", name=name, node=node)
    store.store(group="schema", name="budget", package="budget", node=_plain(BudgetConfig()))
    store.store(group="schema", name="dataset", package="dataset", node=_plain(DatasetConfig()))
    store.store(group="schema", name="online", package="online", node=_plain(OnlineConfig()))
    for name, agent in AGENTS.items():
        node = _plain(agent.config_class())
        del node["updates"]  # the budget says it
        store.store(group="schema", name=name, package="agent", node=node)
    OmegaConf.register_new_resolver("per_50k", lambda n: max(1, math.ceil(n / 50_000)), replace=True)
    OmegaConf.register_new_resolver("choices", lambda group: ", ".join(_choices(group)), replace=True)
    OmegaConf.register_new_resolver("tasks", lambda: "\n         ".join(task_patterns()), replace=True)
    OmegaConf.register_new_resolver("settings", _settings, replace=True)


def _settings(*, _root_: DictConfig) -> str:
    """All settings as YAML for the help: what they are at present, without the tables that they come from."""
    plain = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    content = cast(dict[str, Any], OmegaConf.to_container(plain, resolve=True))
    content["agent"].pop("published")
    return OmegaConf.to_yaml(content).replace("$", "$$")  # Hydra fills in the help's own $NAMES afterwards


def _choices(group: str) -> list[str]:
    if group == "env":
        return task_names()
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def _check_words(config_name: str, words: list[str]) -> None:
    """Refuse what Hydra would refuse, but name what is nearest."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    if any(word.startswith("-") for word in words):
        return  # Hydra's own flags: --help, --multirun, --cfg
    for word in words:
        key, found, value = word.partition("=")
        if not found:
            raise ConfigError(
                f"{word!r}: expected KEY=VALUE, for example env=hopper-medium; --help shows all"
            )
        if key in GROUPS and config_name == "train" and value not in _choices(key):
            raise ConfigError(f"{key}={value} does not exist: {did_you_mean(value, _choices(key))}")
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            plain = compose(
                config_name,
                [w for w in words if w.partition("=")[0] in GROUPS],
            )
            known = {*GROUPS, *_keys(OmegaConf.to_container(plain, resolve=False))}
            for word in words:
                key = word.partition("=")[0]
                # Of an environment's own options Hydra says better what to type: a + before them.
                free = ("+", "~", "hydra", "env.env_options.", "env.reset_options.")
                if not key.startswith(free) and key not in known:
                    raise ConfigError(f"unknown setting {key!r}: {_instead(key, known)}")
            compose(config_name, words)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    finally:
        GlobalHydra.instance().clear()


def _instead(key: str, known: set[str]) -> str:
    """What a setting that doesn't exist may stand for, wherever that is; else all that its group has."""
    named = {k: k.rpartition(".")[2] for k in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], set(named.values()), cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(sorted(k for k, last in named.items() if last in near))}?"
    group = key.rpartition(".")[0]
    inside = sorted(k for k in known if k.rpartition(".")[0] == group)
    if inside:
        return f"choose from {', '.join(inside)}"
    return f"there are no settings in {group} in this mode" if group in known else _instead(group, known)


def _keys(content: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in content.items():
        keys.append(prefix + str(key))
        if isinstance(value, dict) and key != "published":
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _ends(error: CpqlError) -> NoReturn:
    """Say in one line what the user can mend, and end."""
    line = Text(printable(" ".join(str(error).splitlines())))
    if not isinstance(error, Interrupted):
        line = Text.assemble(("error", "red"), " ", line)
    Console(stderr=True, soft_wrap=True).print(line)
    sys.exit(error.exit_code)


@contextmanager
def _in_one_line(traceback: bool) -> Iterator[None]:
    """End with one line where the user can mend what went wrong, or has stopped the command."""
    if traceback:
        yield
        return
    try:
        yield
        print(end="", flush=True)
    except CpqlError as error:
        _ends(error)
    except KeyboardInterrupt:
        _ends(Interrupted("interrupted"))
    except OSError as error:
        where = error.filename
        try:
            print(end="", flush=True)
        except OSError:  # nobody reads it any more, or its disk is full: Python would say so once more
            where = "standard output"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = error.strerror or str(error)
        _ends(CpqlError(reason if where is None else f"{where}: {reason}"))


def _main(config_name: str, task: Callable[[DictConfig], None]) -> None:
    """Run a task under Hydra."""
    with _in_one_line("traceback=true" in sys.argv):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has a ±
        _check_home()
        _register()
        # An objective's own settings depend on which it is: ++ lets Hydra take any, ActorConfig checks them.
        own = "agent.actor.objective_options."
        sys.argv[1:] = [f"++{word}" if word.startswith(own) else word for word in sys.argv[1:]]
        _check_words(config_name, sys.argv[1:])
        hydra.main(config_path=str(config_folder()), config_name=config_name, version_base="1.3")(task)()


def _check_home() -> None:
    """See to it that there is a home, where data and what was compiled are looked for and kept."""
    try:
        Path.home()
    except RuntimeError:
        raise ConfigError("HOME isn't set, and this user has no name: set HOME to a folder") from None


def _task(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Carry errors past Hydra, which would print its own account of them."""

    def run(content: DictConfig) -> None:
        with _in_one_line(content.traceback is True):
            function(content)

    return run


def _members(content: DictConfig, told: list[str]) -> list[tuple[TrainConfig, dict[str, Any]]]:
    """The runs that a command asks for: one, or one for each of `seeds` and of a list of rates.

    Args:
        content: all settings.
        told: the keys of those that the command line gave.

    Raises:
        ConfigError: lists of different lengths, or a setting that isn't valid.
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
    if OmegaConf.is_missing(content, "checkpoint"):
        raise ConfigError(
            "mode=finetune: checkpoint=... is missing: the run to go on with, or one of its checkpoints"
        )
    count = len(next(iter(lists.values()))) if lists else 1
    for key, values in lists.items():
        if not values:
            raise ConfigError(f"{key}=[]: expected a value for each member, found none")
        if len(values) != count:
            raise ConfigError(f"{key}={values}: {len(values)} values: expected {count}, one for each member")
    if "env.id" in told and content.env.id is not None:
        OmegaConf.update(content, "env.id", import_environment(content.env.id))
    members = []
    for k in range(count):
        own = content.copy()
        for key, values in lists.items():
            OmegaConf.update(own, key, values[k])
        said = cast(dict[str, Any], OmegaConf.to_container(own, resolve=True))
        del said["seeds"]
        if said["env"]["name"] is None:
            raise ConfigError(
                "no environment: expected env.id, such as env.id=Pendulum-v1, or a task, such as env=hopper"
            )
        if said["checkpoint"] is not None:
            _go_on_from(said, told)
        said["agent"].pop("published", None)
        _leave_out_anothers_options(said["agent"], told)
        config = build(TrainConfig, said, "configuration")
        if config.env.name in task_names():
            config = dataclasses.replace(
                config, env=with_own_references(config.env, load_task(config.env.name))
            )
        members.append((config, said))
    if len({config.run_dir for config, _ in members}) == count:
        return members
    named = []
    for k, (config, said) in enumerate(members):
        what = [f"{key.removeprefix('agent.')}{values[k]}" for key, values in lists.items()]
        said["run_dir"] = f"{config.run_dir}-{'-'.join(what)}"
        named.append((dataclasses.replace(config, run_dir=said["run_dir"]), said))
    if len({config.run_dir for config, _ in named}) < count:
        raise ConfigError(f"two members are alike: {', '.join(f'{k}={v}' for k, v in lists.items())}")
    return named


def _go_on_from(said: dict[str, Any], told: list[str]) -> None:
    """Take task, agent and dataset from the run that this one starts from, but for what the command says.

    The name of the agent's configuration comes along, "" where that run has none.

    Raises:
        CheckpointError: there is no such run, or its configuration can't be read.
        ConfigError: the command chooses another agent.
    """
    import yaml

    from cpql.train.checkpoint import find_training

    file = find_training(Path(said["checkpoint"]))[0].parent / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text())
        if not {"env", "agent", "dataset"} <= before.keys():
            raise ValueError("it has no env, agent and dataset")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: no readable configuration of a run: {error}") from error
    if "agent" in told:
        raise ConfigError(
            f"agent=...: the agent is that of checkpoint={said['checkpoint']}; agent.KEY=VALUE changes it"
        )
    said["configuration"] = before.get("configuration", "")
    for part in ("env", "agent", "dataset"):
        if part in told:
            continue
        chosen, said[part] = said[part], before[part]
        for key in told:
            if key.startswith(f"{part}."):
                *path, last = key.split(".")[1:]
                into, value = said[part], chosen
                for name in path:
                    into, value = into[name], value[name]
                into[last] = value[last]


def _leave_out_anothers_options(agent: dict[str, Any], told: list[str]) -> None:
    """Drop settings, such as Consistency-AC's weight, that the objective which the command chose hasn't."""
    from cpql.consistency import OBJECTIVES

    actor, options = agent["actor"], "agent.actor.objective_options"
    if (
        "objective" not in actor
        or "agent.actor.objective" not in told
        or options in told
        or actor["objective"] not in OBJECTIVES
    ):
        return  # an objective that doesn't exist is told later
    known = OBJECTIVES[actor["objective"]].settings
    for option in list(actor["objective_options"]):
        if option not in known and f"{options}.{option}" not in told:
            del actor["objective_options"][option]


@_task
def _train(content: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from cpql.train.logging import make_console
    from cpql.train.loop import train_group
    from cpql.train.runs import group_summary

    told = [word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.task]
    members = _members(content, told)
    console = make_console()
    results = train_group(members, console)
    text = group_summary(results, [config for config, _ in members])
    console.print(Text(printable(text)))


def _beside(checkpoint: str, folder: Path) -> Path:
    """Where what is made of a checkpoint's policy goes: beside it, or here if it came from the Hub."""
    return Path() if checkpoint.startswith(PREFIX) else folder.resolve().parent


def _acts_by(policy: Policy, config: EvaluateConfig | ExportConfig) -> None:
    """Give a policy another rule of acting, where one is asked for."""
    if config.candidates is not None:
        policy.candidates = config.candidates
    if config.temperature is not None:
        if policy.candidates == 1:
            raise ConfigError(f"temperature={config.temperature:g}: expected candidates above 1, found 1")
        policy.temperature = config.temperature


def _file_of(policy: Policy, task: Task, config: EvaluateConfig) -> str:
    """The name of an evaluation's file, with what isn't the policy's own: no two that differ share one."""
    words = ["evaluation", str(config.episodes), str(config.seed)]
    folder = policy.folder.resolve().name if policy.folder else ""
    if config.checkpoint.startswith(PREFIX):
        words.append(config.checkpoint.removeprefix(PREFIX))
    elif folder != "policy":  # it is in no checkpoint's folder
        words.append(folder)
    if task.id != policy.config.task.id:
        words.append(str(task.id))
    if policy.candidates != policy.config.candidates:
        words.append(f"{policy.candidates}candidates")
    if policy.temperature != policy.config.temperature:
        words.append(f"temperature{policy.temperature:g}")
    if config.deterministic:
        words.append("deterministic")
    if config.episode_limit != BudgetConfig.episode_limit:
        words.append(f"limit{config.episode_limit}")
    return "_".join(re.sub(r"[^\w.@-]", "-", word.replace("/", "--")) for word in words) + ".json"


def _check_writable(path: Path) -> None:
    """See to it that a file can be written, before what is to be in it is worked out."""
    try:
        if path.is_dir():
            raise ConfigError(f"out={path}: expected a file, found a folder")
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent).cleanup()
    except OSError as error:
        raise ConfigError(f"out={path}: can't be written: {error.strerror}") from None


@_task
def _evaluate(content: DictConfig) -> None:
    import torch

    from cpql.deploy.policy import Policy, find_policy
    from cpql.device import choose_device
    from cpql.environments import import_environment
    from cpql.io import write_text
    from cpql.train.evaluation import evaluate as run

    if OmegaConf.is_missing(content, "checkpoint"):
        raise ConfigError(MISSING)
    config = build(EvaluateConfig, cast(dict[str, Any], OmegaConf.to_container(content)), "configuration")
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic and config.temperature is not None:
        raise ConfigError(
            f"temperature={config.temperature:g}: expected none with deterministic=true, where the best wins"
        )
    folder = find_policy(config.checkpoint)
    policy = Policy.load(folder, device)
    _acts_by(policy, config)
    task = policy.config.task
    if config.env_id is not None:
        task = with_own_references(dataclasses.replace(task, id=import_environment(config.env_id)), task)
    beside = _beside(config.checkpoint, folder) / _file_of(policy, task, config)
    out = Path(config.out) if config.out is not None else beside
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


def _table(evaluation: Evaluation, origin: dict[str, Any]) -> Table:
    """What a person wants to read of an evaluation, of the policy that has this origin."""
    task, (low, high) = evaluation.task, evaluation.interval
    data, step = origin.get("data"), origin.get("step")
    data = data if isinstance(data, dict) else {}  # it may be a stranger's
    said = f"{step:,}" if isinstance(step, int) else "unknown"
    title = f"{origin.get('agent')} on {task.name}, update {said}, seed {origin.get('seed')}"
    cut = f", {evaluation.cut} of them cut after {evaluation.episode_limit:,} steps" if evaluation.cut else ""
    rows = [
        ("return", f"{evaluation.mean:,.1f} ± {evaluation.std:,.1f}  [{low:,.1f}, {high:,.1f}]"),
        ("episode length", f"{sum(evaluation.lengths) / len(evaluation.lengths):,.1f}"),
        ("episodes", f"{len(evaluation.returns)}{cut}"),
    ]
    behaviour = data.get("return_mean")
    behaviour = behaviour if isinstance(behaviour, int | float) else None
    said = "unknown" if behaviour is None else f"{behaviour:,.1f}"
    if evaluation.score is None:
        rows += [("behaviour's return", said), ("references", "none: a return, and no score")]
    else:
        score = f"{evaluation.score:.1f}  [{task.score(low):.1f}, {task.score(high):.1f}]"
        references = f"random {task.random_return:,.1f}, expert {task.expert_return:,.1f} ({task.benchmark})"
        rows.insert(0, (f"score ({task.benchmark}-normalised)", score))
        rows += [
            ("behaviour's score", said if behaviour is None else f"{task.score(behaviour):.1f}"),
            ("references", references),
        ]
    rows += [
        ("environment", task.id or ""),
        ("action rule", evaluation.rule),
        ("data", f"{data.get('source', 'unknown')} {data.get('id', '')}"),
    ]
    if task.note:
        rows.append(("note", task.note))
    table = Table(title=Text(printable(title)))
    for column in ("", "value"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


@_task
def _export(content: DictConfig) -> None:
    import torch

    from cpql.deploy import folded
    from cpql.deploy.export import SUFFIXES
    from cpql.deploy.export import export as run
    from cpql.deploy.policy import Policy, find_policy

    if OmegaConf.is_missing(content, "checkpoint"):
        raise ConfigError(MISSING)
    config = build(ExportConfig, cast(dict[str, Any], OmegaConf.to_container(content)), "configuration")
    folder = find_policy(config.checkpoint)
    out = Path(config.out or _beside(config.checkpoint, folder) / f"policy.{SUFFIXES[config.format]}")
    if out.exists():
        raise CheckpointError(f"{out} already exists: name another file by out=...")
    torch.set_num_threads(1)
    policy = Policy.load(folder)
    _acts_by(policy, config)
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


def train() -> None:
    """`cpql-train`, the same as `python scripts/train.py`."""
    _main("train", _train)


def evaluate() -> None:
    """`cpql-evaluate`, the same as `python scripts/evaluate.py`."""
    _main("evaluate", _evaluate)


def export() -> None:
    """`cpql-export`, the same as `python scripts/export.py`."""
    _main("export", _export)
