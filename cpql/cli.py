"""The command line: Hydra composes the configuration, cpql checks it, errors are one line."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import hydra
from omegaconf import MISSING, DictConfig, OmegaConf

from cpql.deploy.hub import PREFIX
from cpql.errors import CheckpointError, ConfigError, errors_in_one_line, escape_unknown_characters, printable
from cpql.settings import Candidates, Count, Natural, NonNegative, Seed, Threads, build
from cpql.tasks import config_folder, with_own_references

if TYPE_CHECKING:
    import torch

    from cpql.deploy.policy import Policy
    from cpql.tasks import Task

__all__ = ["evaluate", "export", "train"]

MULTIRUN = ("--multirun", "-m")


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
            if config_name != "train" and OmegaConf.is_missing(content, "checkpoint"):
                expected = "a run's folder, one of its checkpoints, a policy's folder, or hf://owner/name"
                raise ConfigError(f"checkpoint=... is missing: {expected}")
            command(content)

    with errors_in_one_line("traceback=true" in sys.argv):
        escape_unknown_characters()
        try:
            Path.home()
        except RuntimeError:
            raise ConfigError("HOME isn't set, and this user has no name: set HOME to a folder") from None
        from cpql.configuration import check_words, prepared, register  # loads PyTorch

        everything = {"--help", "all"} <= set(sys.argv)
        if everything:
            sys.argv.remove("all")
        register(everything=everything, evaluate=EvaluateConfig(), export=ExportConfig())
        if config_name == "train":
            sys.argv[1:] = prepared(sys.argv[1:])
            words = [word for word in sys.argv[1:] if word not in MULTIRUN]
            if len(words) < len(sys.argv[1:]) and not any(word.startswith("-") for word in words):
                from cpql.sweep import sweep

                sweep(words)
            elif given := [word for word in words if word.startswith("launcher=")]:
                raise ConfigError(f"{given[0]}: expected --multirun with it: one run needs no launcher")
        check_words(config_name, sys.argv[1:])
        hydra.main(config_path=str(config_folder()), config_name=config_name, version_base="1.3")(run)()


def _train(content: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    from cpql.configuration import key_of, members
    from cpql.training.logging import make_console, say
    from cpql.training.loop import group_summary, train_group

    overrides = [key_of(word) for word in HydraConfig.get().overrides.task]
    configs, console = members(content, overrides), make_console()
    say(console, group_summary(train_group(configs, console), configs))


@dataclass(frozen=True)
class CommandConfig:
    """What evaluating and exporting have in common.

    Attributes:
        checkpoint: a run's folder, one of its checkpoints, a policy's folder, or the Hub's `hf://owner/name`.
        candidates: actions of which one is chosen by its value; 1 is the actor alone; None keeps the
            policy's own rule.
        temperature: of that choice; only with several candidates. None keeps the policy's own.
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
    """One evaluation; by default its JSON file is named by the settings that aren't the policy's own.

    Attributes:
        episodes: number of episodes.
        seed: of the environments and the policy's noise: episode i has seed + i.
        deterministic: see `cpql.Policy.predict`.
        env_id: Gymnasium's id of an environment to use instead of the task's, with the same widths; its
            returns have no score.
        episode_limit: steps after which an episode is cut.
        device: `auto` takes a GPU where there is one.
        threads: CPU threads of PyTorch; 0 keeps its default.
        video: of how many episodes to make videos, from the best to the worst: with 3 the best, the median
            and the worst. They are written to the `evaluations/` of the policy's run, or beside `out`.
    """

    episodes: Count = 100
    seed: Seed = 1000
    deterministic: bool = False
    env_id: str | None = None
    episode_limit: Count = 10_000
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: Threads = 1
    video: Natural = 0

    def __post_init__(self) -> None:
        if self.video > self.episodes:
            raise ConfigError(f"video={self.video}: expected at most episodes={self.episodes}")
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


def _load(config: CommandConfig, device: torch.device | str = "cpu") -> tuple[Policy, Path]:
    """A command's policy, and the folder for its results: the policy's, or this one if it is from the Hub."""
    from cpql.deploy.policy import Policy, find_policy

    folder = find_policy(config.checkpoint)
    policy = Policy.load(folder, device)
    if config.candidates is not None:
        policy.candidates = config.candidates
    if config.temperature is not None:
        if policy.candidates == 1:
            raise ConfigError(f"temperature={config.temperature:g}: expected candidates above 1, found 1")
        policy.temperature = config.temperature
    return policy, Path() if config.checkpoint.startswith(PREFIX) else folder.resolve().parent


def _evaluate(content: DictConfig) -> None:
    import torch

    from cpql.deploy.summary import summary
    from cpql.device import choose_device
    from cpql.environments import import_environment
    from cpql.io import write_text
    from cpql.training.evaluation import evaluate as run
    from cpql.training.video import check_video, record

    config = build(EvaluateConfig, cast(Any, OmegaConf.to_container(content)), "configuration")
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    policy, folder = _load(config, device)
    task = policy.config.task
    if config.env_id is not None:
        task = with_own_references(dataclasses.replace(task, id=import_environment(config.env_id)), task)
    out = Path(config.out) if config.out is not None else folder / _file_name(policy, task, config)
    _check_writable(out)
    if config.video:
        check_video(task)
    evaluation = run(
        policy,
        task,
        config.episodes,
        seed=config.seed,
        deterministic=config.deterministic,
        episode_limit=config.episode_limit,
        keep_actions=config.video > 0,
    )
    result = {"task": task.name, "policy": policy.config.origin, **evaluation.to_dict()}
    print(printable(summary(result)))
    write_text(out, json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(printable(str(out)))
    ours = folder.parent.parent  # of RUN/checkpoints/step_00050000
    place = ours / "evaluations" if (ours / "config.yaml").exists() else out.parent
    for path in record(evaluation, config.video, place, f"{folder.name}_{out.stem}"):
        print(printable(str(path)))


def _file_name(policy: Policy, task: Task, config: EvaluateConfig) -> str:
    """An evaluation's file name: different for every setting that isn't the policy's own."""
    own, name = policy.config, policy.folder.resolve().name if policy.folder else ""
    if config.checkpoint.startswith(PREFIX):
        name = config.checkpoint.removeprefix(PREFIX)
    parts = {
        f"evaluation_{config.episodes}_{config.seed}": True,
        name: name not in ("", "policy"),  # a checkpoint's own is beside its evaluations
        str(task.id): task.id != own.task.id,
        f"{policy.candidates}candidates": policy.candidates != own.candidates,
        f"temperature{policy.temperature:g}": policy.temperature != own.temperature,
        "deterministic": config.deterministic,
        f"limit{config.episode_limit}": config.episode_limit != EvaluateConfig.episode_limit,
    }
    words = (re.sub(r"[^\w.@-]", "-", part.replace("/", "--")) for part, differs in parts.items() if differs)
    return "_".join(words) + ".json"


def _check_writable(path: Path) -> None:
    """Refuse a file that can't be written, before the episodes that it is for."""
    try:
        if path.is_dir():
            raise ConfigError(f"out={path}: expected a file, found a folder")
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent).cleanup()
    except OSError as error:
        raise ConfigError(f"out={path}: can't be written: {error.strerror}") from None


def _export(content: DictConfig) -> None:
    import torch

    from cpql.deploy import folded
    from cpql.deploy.export import SUFFIXES
    from cpql.deploy.export import export as run

    torch.set_num_threads(1)
    config = build(ExportConfig, cast(Any, OmegaConf.to_container(content)), "configuration")
    policy, folder = _load(config)
    out = Path(config.out or folder / f"policy.{SUFFIXES[config.format]}")
    if out.exists():
        raise CheckpointError(f"{out} already exists: name another file by out=...")
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
