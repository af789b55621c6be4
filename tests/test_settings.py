"""Settings are checked before anything is loaded; what is wrong ends in one line and leaves nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from cpql import cli, configuration, data_cli
from cpql.actors.consistency import ActorConfig, ConsistencyActor
from cpql.agents import AGENTS, ActorCriticConfig
from cpql.cli import EvaluateConfig, ExportConfig
from cpql.critics import TwinCritic
from cpql.data import d4rl
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.errors import ConfigError, errors_in_one_line
from cpql.settings import Positive, build
from cpql.tasks import Task, config_folder, load_task, with_own_references
from cpql.training.config import TrainConfig, agent_config


@dataclasses.dataclass
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str

    def is_one_line(self, *messages: str) -> bool:
        """Whether it ended in one line that says these."""
        one = self.err.count("\n") == 1 and "Traceback" not in self.err
        return self.code == 1 and one and all(message in self.err for message in messages)


Command = Callable[..., Done]
COMMANDS: dict[str, Callable[[], Any]] = {
    "train": cli.train,
    "evaluate": cli.evaluate,
    "export": cli.export,
    "data": data_cli.main,
}


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run a command in this process, in a folder of its own and a home that is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    for name in ("D4RL_DATASET_DIR", "CPQL_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def run(name: str, *words: str) -> Done:
        monkeypatch.setattr(sys, "argv", [name, *words])
        capsys.readouterr()
        try:
            code = COMMANDS[name]()
        except SystemExit as end:
            code = end.code
        found = capsys.readouterr()
        return Done(code or 0, found.out, found.err)

    yield run


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Ranges


def numbers_without_a_range(kind: Any, ranged: bool = False) -> list[Any]:
    """The numbers in a field's type, a dataclass's own left out, that have no range."""
    if typing.get_origin(kind) is typing.Annotated:
        inner = typing.get_args(kind)[0]
        return numbers_without_a_range(inner, ranged=typing.get_origin(inner) is None)
    if kind in (int, float):
        return [] if ranged else [kind]
    return [bare for part in typing.get_args(kind) for bare in numbers_without_a_range(part)]


def inside(kind: Any) -> set[type[Any]]:
    """The dataclasses in a type, and in their fields' types."""
    if not dataclasses.is_dataclass(kind):
        return set().union(*(inside(part) for part in typing.get_args(kind)))
    found: set[Any] = {kind}
    return found.union(*(inside(hint) for hint in typing.get_type_hints(kind).values()))


def test_every_number_among_the_settings_has_a_range() -> None:
    kinds = set().union(*(inside(kind) for kind in (TrainConfig, EvaluateConfig, ExportConfig)))
    kinds |= set().union(*(inside(agent.config_class) for agent in AGENTS.values())) - {Task}
    assert len(kinds - {Task}) == 22
    without = [
        f"{kind.__name__}.{name}"
        for kind in kinds - {Task}  # returns may be anything, and its rows are ours
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
        if numbers_without_a_range(hint)
    ]
    assert not without
    assert numbers_without_a_range(int | None) and numbers_without_a_range(tuple[float, ...])


BELOW_1 = "Input should be greater than or equal to 1, found "
BELOW_0 = "Input should be greater than or equal to 0, found "
NOT_POSITIVE = "Input should be greater than 0, found "

OUT_OF_RANGE = [
    ("budget.updates", 0, BELOW_1 + "0"),
    ("budget.updates", 10**30, "less than or equal to 1000000000000"),
    ("budget.log_every", 0, BELOW_1 + "0"),
    ("budget.log_every", -5, BELOW_1 + "-5"),
    ("budget.evaluate_every", -1, BELOW_0 + "-1"),
    ("budget.save_every", 0, BELOW_1 + "0"),
    ("budget.episodes", 0, BELOW_1 + "0"),
    ("budget.final_episodes", 0, BELOW_1 + "0"),
    ("budget.keep", -1, BELOW_0 + "-1"),
    ("budget.episode_limit", 0, BELOW_1 + "0"),
    ("env.episodes", 0, "budget.episodes: " + BELOW_1 + "0"),
    ("threads", -1, BELOW_0 + "-1"),
    ("threads", 100_000, "less than or equal to 1024"),
    ("seed", -1, BELOW_0 + "-1"),
    ("seed", 2**31, "less than 2147483648"),
    ("seeds", [], "seed=[]: expected lists of one length, with a value for each member"),
    ("traceback", 5, "traceback: Input should be a valid boolean, found 5"),
    ("seeds", [0, -1], "seed: " + BELOW_0 + "-1"),
    ("compile", "maybe", "compile: Input should be a valid boolean or 'auto', found 'maybe'"),
    ("dataset.size", 0, BELOW_1 + "0"),
    ("dataset.n_step", 0, BELOW_1 + "0"),
    ("dataset.seed", -1, BELOW_0 + "-1"),
    ("agent.batch_size", 0, BELOW_1 + "0"),
    ("agent.batch_size", 10**12, "less than or equal to 1000000, found 1000000000000"),
    ("agent.discount", 0.0, NOT_POSITIVE + "0.0"),
    ("agent.discount", 1.5, "less than or equal to 1, found 1.5"),
    ("agent.actor_lr", 0.0, NOT_POSITIVE + "0.0"),
    ("agent.actor_lr", -3e-4, NOT_POSITIVE + "-0.0003"),
    ("agent.critic_lr", float("inf"), "finite number, found inf"),
    ("agent.critic_lr", float("nan"), "finite number, found nan"),
    ("agent.eta", -1.0, BELOW_0 + "-1.0"),
    ("agent.eta", [1.0, -1.0], BELOW_0 + "-1.0"),
    ("agent.eta", "much", "Input should be a valid number, found 'much'"),
    ("agent.eta_warmup", -1, BELOW_0 + "-1"),
    ("agent.alpha", -0.1, BELOW_0 + "-0.1"),
    ("agent.max_grad_norm", 0.0, NOT_POSITIVE + "0.0"),
    ("agent.max_q_backup", -1, BELOW_0 + "-1"),
    ("agent.candidates", 0, BELOW_1 + "0"),
    ("agent.temperature", -1.0, BELOW_0 + "-1.0"),
    ("agent.expectile", 1.0, "less than 1, found 1.0"),
    ("agent.critic_hidden", [], "at least 1 item"),
    ("agent.critic_hidden", [256, 0], "critic_hidden.1: " + BELOW_1 + "0"),
    ("agent.actor.hidden", [], "actor.hidden: "),
    ("agent.actor.hidden", [1_000_000], "less than or equal to 16384, found 1000000"),
    ("agent.critic_target.rate", 0.0, "critic_target.rate: " + NOT_POSITIVE + "0.0"),
    ("agent.critic_target.rate", 1.5, "less than or equal to 1, found 1.5"),
    ("agent.critic_target.period", 0, BELOW_1 + "0"),
    ("agent.actor_target.start", -1, BELOW_0 + "-1"),
    ("agent.actor.t_min", 0.0, NOT_POSITIVE + "0.0"),
    ("agent.actor.t_min", 100.0, "noise levels need 0 < t_min < t_max, found 100.0 and 80.0"),
    ("agent.actor.t_max", float("inf"), "finite number, found inf"),
    ("agent.actor.sigma_data", 0.0, NOT_POSITIVE + "0.0"),
    ("agent.actor.dropout", 1.0, "less than 1, found 1.0"),
    ("agent.actor.time_width", 7, "multiple of 2, found 7"),
    ("agent.actor.refinements", [-1.0], NOT_POSITIVE + "-1.0"),
    ("agent.actor.objective_options", {"count": "x"}, "count: expected a count, found 'x'"),
    ("agent.actor.objective_options", {"count": 0}, "count: expected a count, found 0"),
    ("agent.actor.objective_options", {"std": float("nan")}, "std: expected a finite number, found nan"),
    ("agent.actor.objective_options", {"mean": "low"}, "mean: expected a finite number, found 'low'"),
    ("online.environments", 0, BELOW_1 + "0"),
    ("online.updates_per_step", 0.0, NOT_POSITIVE + "0.0"),
    ("online.start_steps", -1, BELOW_0 + "-1"),
    ("online.candidates", 0, BELOW_1 + "0"),
    ("online.epsilon", 2.0, "less than or equal to 1, found 2.0"),
    ("online.epsilon_steps", -1, BELOW_0 + "-1"),
    ("online.noise", -0.1, BELOW_0 + "-0.1"),
    ("online.buffer_size", 0, BELOW_1 + "0"),
    ("online.offline_fraction", 1.5, "less than or equal to 1, found 1.5"),
]


@pytest.fixture(scope="module")
def contents() -> dict[str, DictConfig]:
    """All settings by mode. Composing them is slow, changing one isn't."""
    configuration.register()
    words = {"offline": ["env=hopper-medium"], "online": ["mode=online", "env=hopper"]}
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return {mode: compose("train", [*own, "configuration=cpql"]) for mode, own in words.items()}


@pytest.mark.parametrize(("key", "value", "message"), OUT_OF_RANGE)
def test_out_of_range(
    key: str,
    value: Any,
    message: str,
    contents: dict[str, DictConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = contents["online" if key.startswith("online") else "offline"].copy()
    OmegaConf.update(content, key, value, force_add=True)

    with pytest.raises(SystemExit) as end, errors_in_one_line():
        for config in configuration.members(content, [key]):
            agent_config(config)
    done = Done(int(str(end.value)), *capsys.readouterr())
    assert done.is_one_line(message, key.rpartition(".")[2].removesuffix("seeds")), done


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("budget.evaluate_every", 0),
        ("budget.keep", 0),
        ("threads", 0),
        ("seed", 2**31 - 1),
        ("compile", True),
        ("agent.eta", [0.0, 1.0]),
        ("agent.discount", 1.0),
        ("agent.critic_target.rate", 1.0),
    ],
)
def test_ends_of_ranges_are_in_them(key: str, value: Any, contents: dict[str, DictConfig]) -> None:
    content = contents["offline"].copy()
    OmegaConf.update(content, key, value)
    for config in configuration.members(content, [key]):
        assert agent_config(config)[1].updates == 2_000_000


@pytest.mark.parametrize(
    ("words", "actor_lr", "eta_warmup", "rate"),
    [
        (["env=pen-human"], 3e-5, 0, 0.005),
        (["env=pen-human", "budget=quick"], 3e-4, 10_000, 0.02),
        (["env=pen-human", "budget=quick", "agent.eta_warmup=7"], 3e-4, 7, 0.02),
        (["env=pen-human", "budget=quick", "preset=none"], 3e-5, 0, 0.005),
        (["env=pen-human", "preset=quick"], 3e-4, 10_000, 0.02),
        (["agent=td3_bc", "budget=quick"], 3e-4, None, 0.02),
    ],
)
def test_a_quick_budget_chooses_a_preset(
    words: list[str], actor_lr: float, eta_warmup: int | None, rate: float
) -> None:
    configuration.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", [*words, "configuration=x"])
    (config,) = configuration.members(content, [word.partition("=")[0] for word in words])
    _, agent = agent_config(config)
    assert isinstance(agent, ActorCriticConfig)
    assert (agent.actor_lr, agent.critic_target.rate) == (actor_lr, rate)
    assert getattr(agent, "eta_warmup", None) == eta_warmup


def test_the_largest_seed_fits_every_generator() -> None:
    seed = 2**31 - 1
    torch.Generator().manual_seed(seed + 100)
    np.random.RandomState(seed + 100)
    np.random.default_rng(seed + 100)


# Unions of dataclasses


@dataclasses.dataclass
class Circle:
    radius: Positive = 1.0
    kind: typing.Literal["circle"] = "circle"


@dataclasses.dataclass
class Square:
    sides: tuple[Positive, ...] = (1.0,)
    kind: typing.Literal["square"] = "square"


@dataclasses.dataclass
class Drawing:
    shape: Circle | Square | None = None
    scale: Positive = 1.0


@dataclasses.dataclass
class Page:
    drawing: Drawing


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (None, None),
        ({}, Circle()),
        ({"radius": 2}, Circle(2.0)),
        ({"kind": "circle", "radius": 2}, Circle(2.0)),
        ({"kind": "square", "sides": [1, 2]}, Square((1.0, 2.0))),
        (Square((3.0,)), Square((3.0,))),
    ],
)
def test_kind_chooses_among_dataclasses(shape: Any, expected: Any) -> None:
    assert build(Page, {"drawing": {"shape": shape}}, "page") == Page(Drawing(expected))


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        ({"shape": {"kind": "star"}}, "page: drawing.shape.kind: expected circle or square, found 'star'"),
        (
            {"shape": {"kind": ["circle"]}},
            "page: drawing.shape.kind: expected circle or square, found ['circle']",
        ),
        ({"shape": {"sides": [1]}}, "page: drawing.shape: unknown key 'sides': choose from kind, radius"),
        (
            {"shape": {"kind": "square", "side": [1]}},
            "page: drawing.shape: unknown key 'side': did you mean sides or kind?",
        ),
        (
            {"shape": {"kind": "square", "sides": [1, 0]}},
            "page: drawing.shape.sides.1: Input should be greater than 0, found 0",
        ),
        ({"shape": {"radius": -1}}, "page: drawing.shape.radius: Input should be greater than 0, found -1"),
        ({"scale": 0}, "page: drawing.scale: Input should be greater than 0, found 0"),
    ],
)
def test_errors_name_the_field_of_the_kind(drawing: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(Page, {"drawing": drawing}, "page")
    assert str(error.value) == message


# Policies


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained policy for Hopper, as a checkpoint has it."""
    torch.manual_seed(0)
    task = dataclasses.replace(load_task("hopper-medium"), env_options={"max_episode_steps": 5})
    actor, critic = ConsistencyActor(11, 3, ActorConfig(hidden=(8,))), TwinCritic(11, 3, (8,))
    config = PolicyConfig(11, 3, (-1.0,) * 3, (1.0,) * 3, actor.config, (8,), False, 1, 1.0, task, ORIGIN)
    folder = tmp_path_factory.mktemp("checkpoints") / "step_00000005"
    Policy(actor, critic, config).save(folder / "policy")
    return folder


ORIGIN: dict[str, Any] = {
    "agent": "cpql",
    "step": 5000,
    "seed": 0,
    "versions": {},
    "data": {"source": "embedded", "id": "hopper-medium", "return_mean": 1000.0, "sha256": "0"},
}


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> str:
    """A copy of it that a command may write beside."""
    shutil.copytree(saved, tmp_path / "run")
    return "run"


# Commands that can't go well: what the world is made like before, the words, and what the line says.

Prepare = Callable[[Path], object]


def nothing(folder: Path) -> None: ...


def a_file(name: str, content: str = "") -> Prepare:
    return lambda folder: (folder / name).write_text(content)


def a_folder(name: str) -> Prepare:
    return lambda folder: (folder / name).mkdir()


def data_and_a_file(folder: Path) -> None:
    """Hopper's widths in `data.hdf5`, and `file`."""
    ends = np.arange(1, 41) % 20 == 0
    arrays = {"observations": np.zeros((40, 11)), "actions": np.zeros((40, 3)), "rewards": np.zeros(40)}
    d4rl.write(folder / "data.hdf5", {**arrays, "terminals": ends, "timeouts": ~ends & ends}, {})
    (folder / "file").write_text("")


LONG = "x" * 300
DATA = ("train", "dataset.path=data.hdf5", "compile=false")

HOSTILE: list[tuple[Prepare, tuple[str, ...], str]] = [
    # words that Hydra doesn't know
    (nothing, ("train", "env=hopper-medum"), "env=hopper-medum does not exist: did you mean hopper-medium"),
    (nothing, ("train", "agent=cpq"), "agent=cpq does not exist: did you mean cpql"),
    (nothing, ("train", "budget=fast"), "does not exist: choose from finetune, full, online, quick"),
    (nothing, ("train", "preset=slow"), "preset=slow does not exist: choose from none, quick"),
    (nothing, ("train", "mode=finetun"), "mode=finetun does not exist: did you mean finetune"),
    (nothing, ("train", "hopper-medium"), "'hopper-medium': expected KEY=VALUE"),
    (nothing, ("train", "agent.etaa=1"), "unknown setting 'agent.etaa': did you mean agent.eta?"),
    (nothing, ("train", "eta=1"), "unknown setting 'eta': did you mean agent.eta?"),
    (nothing, ("train", "foo=1"), "unknown setting 'foo': choose from agent, budget,"),
    (nothing, ("train", "budget.foo=1"), "setting 'budget.foo': choose from budget.dataset_size,"),
    (nothing, ("train", "online.start_steps=3"), "there are no settings in online in this mode"),
    (nothing, ("train", "agent.actor.hidden=[1,]]"), "no viable alternative at input '[1,]'"),
    (nothing, ("train", "env.env_options.x=1"), "Could not override 'env.env_options.x'. To append"),
    (nothing, ("train", "agent.actor.objective=itc"), "'itc' does not exist: did you mean ict"),
    (nothing, ("train", "agent.actor.objective_options.coun=3"), "denoise has no 'coun': did you mean count"),
    (nothing, ("evaluate", "chekpoint=."), "unknown setting 'chekpoint': did you mean checkpoint"),
    (nothing, ("evaluate", "env=hopper"), "unknown setting 'env': choose from candidates,"),
    # settings, checked before anything is loaded
    (nothing, ("train", "seeds=3"), "seeds=3: expected a list, such as [0,1,2,3]"),
    (
        nothing,
        ("train", "seeds=[1,2,3]", "agent.eta=[0.5,1]"),
        "agent.eta=[0.5, 1], seed=[1, 2, 3]: expected lists of one length",
    ),
    (nothing, ("train", "seeds=[1,1]"), "two members are alike: seed=[1, 1]"),
    (nothing, ("train", "seed=x"), "seed: Input should be a valid integer"),
    (nothing, ("train", "device=tpu"), "device: Input should be 'auto', 'cpu' or 'cuda'"),
    (nothing, ("train", "agent.eta=much"), "agent: eta: Input should be a valid number"),
    (nothing, ("train", "agent.actor=3"), "agent: actor: Input should be a dictionary"),
    (nothing, ("train", "env.id=3"), "env.id: Input should be a valid string, found 3"),
    (nothing, ("train", "agent.actor.objective=[1]"), "actor.objective: Input should be"),
    (nothing, ("train", "checkpoint=3"), "checkpoint: Input should be a valid string, found 3"),
    (nothing, ("train", "mode=online"), "no environment: expected env.id, such as env.id=Pendulum-v1"),
    (
        nothing,
        ("train", "mode=online", "env=hopper", "dataset.n_step=2"),
        "dataset.n_step=2: expected 1 without a dataset",
    ),
    (nothing, ("train", "env=hopper"), "hopper has no dataset: expected mode=online"),
    (nothing, ("train", "mode=finetune"), "checkpoint=... is missing: a run's folder"),
    (nothing, ("train", "mode=finetune", "checkpoint=nowhere"), "nowhere: does not exist"),
    (nothing, ("evaluate",), "checkpoint=... is missing: a run's folder, one of its checkpoints, a policy's"),
    (nothing, ("evaluate", "checkpoint=nowhere"), "nowhere: does not exist"),
    (nothing, ("train", "budget.log_every=0"), "budget.log_every: " + BELOW_1 + "0"),
    (nothing, ("train", "seed=99999999999999999999"), "seed: Input should be less than 2147483648"),
    (nothing, ("train", "compile=perhaps"), "compile: Input should be a valid boolean or 'auto'"),
    (nothing, ("train", "mode=online", "env=hopper", "online.buffer_size=0"), "online.buffer_size: "),
    (nothing, ("train", "run_dir=null"), "run_dir: Input should be a valid string, found None"),
    # environments that aren't there, or aren't for this
    (nothing, ("train", "env.id=Hoper-v4"), "no environment 'Hoper-v4' in Gymnasium: did you mean Hopper-v4"),
    (nothing, ("train", "mode=online", "env.id=CartPole-v1"), "actions are Discrete(2)"),
    (nothing, ("train", "+env.env_options.no_such=1"), "environment 'Hopper-v4' can't be made"),
    # data
    (nothing, ("train", "dataset.path=nowhere.hdf5"), "nowhere.hdf5"),
    (nothing, ("train", f"dataset.path={LONG}.hdf5"), "File name too long"),
    (a_folder("data.hdf5"), ("train", "dataset.path=data.hdf5"), "data.hdf5"),
    (a_file("data.hdf5"), ("train", "dataset.path=data.hdf5"), "data.hdf5"),
    (a_file("data.npz", "no"), ("train", "dataset.path=data.npz"), "data.npz"),
    (nothing, ("train", "dataset.path=/dev/null"), "null: not a file"),
    (nothing, ("train", "dataset=d4rl"), "hopper_medium-v2.hdf5"),
    (nothing, ("train", "dataset=minari", "env=hopper-random"), "Minari has no such data"),
    # where it is to be written, and what it is to continue
    (nothing, ("train", "resume=true"), "holds no run to resume"),
    (nothing, ("train", f"run_dir={LONG}"), f"{LONG}: can't be written to (File name too long)"),
    (data_and_a_file, (*DATA, "run_dir=file"), "file: "),
    (data_and_a_file, (*DATA, "run_dir=file/run"), "file/run: "),
    (data_and_a_file, (*DATA, "run_dir=/proc/run"), "/proc/run: "),
    (nothing, ("train", "checkpoint=nowhere"), "nowhere: does not exist"),
    (nothing, ("train", f"checkpoint={LONG}"), ": does not exist; give a run"),
    (nothing, ("train", "mode=finetune", "checkpoint=hf://no one/nothing"), "no one/nothing"),
    (a_file("file"), ("train", "mode=finetune", "checkpoint=file"), "file: does not exist"),
    # evaluation
    (nothing, ("evaluate", "checkpoint=null"), "checkpoint: Input should be a valid string, found None"),
    (nothing, ("evaluate", "checkpoint=run", "candidates=0"), "candidates: " + BELOW_1 + "0"),
    (nothing, ("evaluate", "checkpoint=run", "temperature=-1"), "temperature: " + BELOW_0 + "-1"),
    (nothing, ("evaluate", "checkpoint=run", "episodes=0"), "episodes: " + BELOW_1 + "0"),
    (nothing, ("evaluate", "checkpoint=run", "episodes=many"), "episodes: Input should be a valid integer"),
    (nothing, ("evaluate", "checkpoint=run", "episode_limit=0"), "episode_limit: " + BELOW_1 + "0"),
    (nothing, ("evaluate", "checkpoint=run", "threads=-1"), "threads: " + BELOW_0 + "-1"),
    (nothing, ("evaluate", "checkpoint=run", "seed=-1"), "seed: " + BELOW_0 + "-1"),
    (
        nothing,
        ("evaluate", "checkpoint=run", "device=tpu"),
        "device: Input should be 'auto', 'cpu' or 'cuda'",
    ),
    (
        nothing,
        ("evaluate", "checkpoint=run", "deterministic=5"),
        "deterministic: Input should be a valid bool",
    ),
    (nothing, ("evaluate", "checkpoint=run", "temperature=2"), "expected candidates above 1, found 1"),
    (
        nothing,
        ("evaluate", "checkpoint=run", "candidates=2", "temperature=2", "deterministic=true"),
        "expected none with deterministic=true",
    ),
    (
        nothing,
        ("evaluate", "checkpoint=run", "env_id=Walker2d-v4"),
        "environment Walker2d-v4: observations and actions are 17 and 6 wide: expected 11 and 3",
    ),
    (nothing, ("evaluate", "checkpoint=run", "env_id=CartPole-v1"), "actions are Discrete(2)"),
    (nothing, ("evaluate", "checkpoint=run", "env_id=Nope-v0"), "no environment 'Nope-v0' in Gymnasium"),
    (
        nothing,
        ("evaluate", "checkpoint=run", "out=nowhere/x.json"),
        "out=nowhere/x.json: can't be written: No",
    ),
    (nothing, ("evaluate", "checkpoint=run", "out=."), "out=.: expected a file, found a folder"),
    (a_file("file"), ("evaluate", "checkpoint=run", "out=file/x.json"), "out=file/x.json: can't be written"),
    (nothing, ("evaluate", "checkpoint=run", f"out={LONG}"), "can't be written: File name too long"),
    (nothing, ("evaluate", f"checkpoint={LONG}"), ": does not exist; give a run"),
    (a_file("run/policy/config.json", "{"), ("evaluate", "checkpoint=run"), "no readable policy"),
    # export
    (nothing, ("export", "checkpoint=run", "candidates=0"), "candidates: " + BELOW_1 + "0"),
    (
        nothing,
        ("export", "checkpoint=run", "format=onx"),
        "format: Input should be 'onnx', 'torch' or 'numpy'",
    ),
    (a_file("policy.npz"), ("export", "checkpoint=run", "out=policy.npz"), "policy.npz already exists"),
    # data
    (nothing, ("data", "show", "nowhere.hdf5"), "nowhere.hdf5"),
    (nothing, ("data", "show", f"{LONG}.hdf5"), "File name too long"),
    (a_folder("x.npz"), ("data", "verify", "x.npz"), "x.npz"),
    (a_file("x.hdf5", "text"), ("data", "verify", "x.hdf5"), "x.hdf5"),
    (nothing, ("data", "convert", "nowhere.hdf5", "there.npz"), "nowhere.hdf5"),
    (nothing, ("data", "list", "no such task"), "no task's name has 'no such task' in it"),
    (nothing, ("data", "download", "hopper"), "hopper has no dataset"),
]


@pytest.mark.slow  # half a minute in all
@pytest.mark.parametrize(
    ("prepare", "words", "message"),
    HOSTILE,
    ids=[f"{k}-{words[0]}" for k, (_, words, _) in enumerate(HOSTILE)],
)
def test_what_cannot_go_well_ends_in_one_line_and_leaves_nothing(
    prepare: Prepare,
    words: tuple[str, ...],
    message: str,
    command: Command,
    checkpoint: str,
    tmp_path: Path,
) -> None:
    prepare(tmp_path)
    before = everything(tmp_path)
    done = command(words[0], *words[1:])
    assert done.is_one_line(message), done
    assert everything(tmp_path) == before


# Evaluations


def evaluated(done: Done) -> tuple[str, dict[str, Any]]:
    """The file that an evaluation says it wrote, and what is in it."""
    assert done.code == 0, done
    path = Path(done.out.strip().splitlines()[-1])
    return path.name, json.loads(path.read_text())


@pytest.mark.slow
def test_evaluations_that_differ_have_files_of_their_own(command: Command, checkpoint: str) -> None:
    words = ("evaluate", f"checkpoint={checkpoint}", "episodes=2", "seed=7")
    expected = {
        (): "evaluation_2_7.json",
        ("env_id=Hopper-v4", "candidates=1"): "evaluation_2_7.json",
        ("env_id=Hopper-v5",): "evaluation_2_7_Hopper-v5.json",
        ("deterministic=true",): "evaluation_2_7_deterministic.json",
        ("candidates=5", "temperature=0.5"): "evaluation_2_7_5candidates_temperature0.5.json",
        ("episode_limit=3",): "evaluation_2_7_limit3.json",
        ("env_id=Hopper-v5", "candidates=50", "deterministic=true"): (
            "evaluation_2_7_Hopper-v5_50candidates_deterministic.json"
        ),
    }
    for more, name in expected.items():
        found, content = evaluated(command(*words, *more))
        assert found == name and content["episodes"] == 2
        assert content["length_mean"] == (3 if "episode_limit=3" in more else 5)
    files = {path.name for path in Path(checkpoint).resolve().glob("evaluation_*.json")}
    assert files == set(expected.values())


def test_evaluations_of_policies_in_one_folder_are_told_apart(
    command: Command, checkpoint: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved / "policy", tmp_path / "mine")
    name, _ = evaluated(command("evaluate", "checkpoint=mine", "episodes=1"))
    assert name == "evaluation_1_1000_mine.json" and (tmp_path / name).exists()
    monkeypatch.setattr("cpql.deploy.hub.download", lambda _: saved / "policy")
    for id, mark in (("me/hopper", "me--hopper"), ("me/hopper@v2", "me--hopper@v2")):
        name, _ = evaluated(command("evaluate", f"checkpoint='hf://{id}'", "episodes=1"))
        assert name == f"evaluation_1_1000_{mark}.json" and (tmp_path / name).exists()
    assert everything(saved) == {"policy", "policy/config.json", "policy/model.safetensors"}


def test_nothing_is_acted_where_the_file_cannot_be_written(
    command: Command, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("an episode was run")

    monkeypatch.setattr("cpql.training.evaluation.evaluate", refuse)
    for out in ("nowhere/x.json", "run", "x" * 300):
        done = command("evaluate", f"checkpoint={checkpoint}", f"out={out}")
        assert done.is_one_line(f"out={out}: "), done


def test_a_device_that_is_not_there_is_named_before_anything_else(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = command("evaluate", "checkpoint=nowhere", "device=cuda")
    assert done.is_one_line("device=cuda: PyTorch finds no such CUDA device here"), done


# References


def test_references_go_with_their_own_environment() -> None:
    own = load_task("hopper-medium")
    assert with_own_references(own, own) == own
    for change, what in (
        ({"id": "Hopper-v5"}, "id=Hopper-v5"),
        ({"env_options": {"max_episode_steps": 9}}, "env_options={'max_episode_steps': 9}"),
        ({"reset_options": {"x": 1}}, "reset_options={'x': 1}"),
    ):
        task = with_own_references(dataclasses.replace(own, **change), own)
        assert task.score(3234.3) is None
        assert task.note == f"{what} isn't hopper-medium's own: a return, and no score by D4RL's references"
    kept = dataclasses.replace(own, id="Hopper-v5", random_return=0.0, expert_return=4000.0)
    assert with_own_references(kept, own) == kept
    without = dataclasses.replace(own, id=None)  # where nothing is scored but the data
    assert with_own_references(without, own) == without


@pytest.mark.parametrize(
    ("words", "scored"),
    [
        ([], True),
        (["env.id=Hopper-v4"], True),
        (["env.id=Pendulum-v1"], False),
        (["+env.env_options.max_episode_steps=500"], False),
        (["+env.reset_options.a=1"], False),
    ],
)
def test_training_elsewhere_has_no_score(words: list[str], scored: bool) -> None:
    configuration.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        content = compose("train", ["env=hopper-medium", "configuration=cpql", *words])
    (config,) = configuration.members(content, [])
    assert (config.env.score(0.0) is not None) == scored
    assert bool(config.env.note) != scored


def test_evaluating_elsewhere_has_no_score(command: Command, checkpoint: str) -> None:
    words = ("evaluate", f"checkpoint={checkpoint}", "episodes=2")
    done = command(*words)
    assert "D4RL's references" in done.out and evaluated(done)[1]["score"] is not None
    done = command(*words, "env_id=Hopper-v5")
    _, content = evaluated(done)
    assert "95% interval" not in done.out and "without reference scores" in done.out
    assert content["score"] is None and content["environment"] == "Hopper-v5"
    assert content["references"]["expert"] is None
    assert content["note"] in done.out and "id=Hopper-v5 isn't hopper-medium's own" in content["note"]


# A run that another one starts from


@pytest.fixture
def before(saved: Path, tmp_path: Path) -> Path:
    """The folder of a run with one checkpoint, without its configuration."""
    step = tmp_path / "before" / "checkpoints" / "step_00000005"
    shutil.copytree(saved, step)
    (step / "training").mkdir()
    (step / "training" / "state.json").write_text('{"step": 5}')
    (step.parent / "last").symlink_to(step.name)
    return tmp_path / "before"


def test_the_name_of_an_agent_comes_from_the_run_that_it_comes_from(
    before: Path, contents: dict[str, DictConfig]
) -> None:
    content = contents["online"].copy()
    parts = OmegaConf.to_container(contents["offline"], resolve=True)
    assert isinstance(parts, dict)
    parts = {key: parts[key] for key in ("env", "agent", "dataset")}
    content.checkpoint = str(before)
    for more, name in (({"configuration": "recommended"}, "recommended"), ({}, "")):
        (before / "config.yaml").write_text(yaml.safe_dump(parts | more))
        (config,) = configuration.members(content, [])
        assert config.configuration == name
        assert config.env.name == "hopper-medium"


@pytest.mark.parametrize("text", [None, "[", "a: 1"], ids=repr)
def test_a_configuration_that_cannot_be_read_is_one_line(
    text: str | None, before: Path, command: Command
) -> None:
    if text is not None:
        (before / "config.yaml").write_bytes(text.encode())
    done = command("train", "mode=finetune", f"checkpoint={before}")
    assert done.is_one_line("before/config.yaml: no readable configuration of a run"), done


# Text

STRANGE = "[red]a [rows, width] \x1b[2J"
PRINTED = r"[red]a [rows, width] \x1b[2J"


@pytest.mark.parametrize(
    "words",
    [
        ("train", f"dataset.path='{STRANGE}.hdf5'"),
        ("train", "mode=finetune", f"checkpoint='[/]{STRANGE}'"),
        ("evaluate", f"checkpoint='[/]{STRANGE}'"),
        ("export", f"checkpoint='[/]{STRANGE}'"),
        ("data", "show", f"{STRANGE}.hdf5"),
        ("data", "verify", f"{STRANGE}.hdf5"),
        ("data", "list", f"[/]{STRANGE}"),
    ],
    ids=" ".join,
)
def test_an_error_is_text(words: tuple[str, ...], command: Command) -> None:
    done = command(*words)
    assert done.is_one_line(PRINTED) and "\x1b" not in done.err, done
    assert ("[/]" in done.err) == ("[/]" in "".join(words))


def test_what_a_policy_says_of_itself_is_text(command: Command, checkpoint: str, tmp_path: Path) -> None:
    file = tmp_path / checkpoint / "policy" / "config.json"
    content = json.loads(file.read_text())
    content["origin"] |= {"agent": f"agent {STRANGE}", "data": {"source": "file", "id": f"id {STRANGE}"}}
    content["task"] |= {"note": f"note {STRANGE}", "name": "task [red]"}
    file.write_text(json.dumps(content))
    os.rename(tmp_path / checkpoint, tmp_path / STRANGE)
    done = command("evaluate", f"checkpoint='{STRANGE}'", "episodes=1")
    assert done.code == 0 and "\x1b" not in done.out, done
    printed = " ".join(done.out.split())  # a table breaks lines
    assert all(f"{what} {PRINTED}" in printed for what in ("agent", "id", "note")) and "task [red]" in printed
    assert done.out.rstrip().endswith(f"{PRINTED}/evaluation_1_1000.json")


@pytest.mark.parametrize("data", ["text", [1], {"return_mean": "high", "source": 3}])
def test_an_origin_of_another_form_is_no_reason_to_fail(
    data: Any, command: Command, checkpoint: str, tmp_path: Path
) -> None:
    file = tmp_path / checkpoint / "policy" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"origin": {"data": data}}))
    done = command("evaluate", f"checkpoint={checkpoint}", "episodes=1")
    assert done.code == 0 and "unknown" in done.out, done


def test_what_a_file_says_of_itself_is_text(command: Command, tmp_path: Path) -> None:
    data_and_a_file(tmp_path)
    os.rename(tmp_path / "data.hdf5", tmp_path / f"{STRANGE}.hdf5")
    for words in (("show",), ("verify",)):
        done = command("data", *words, f"{STRANGE}.hdf5")
        assert done.code == 0 and "\x1b" not in done.out, done
        assert f"{PRINTED}.hdf5" in done.out


MODULE = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
gymnasium.register("CommandLine-v0", lambda **options: PendulumEnv(**options), max_episode_steps=20)
"""


@pytest.mark.slow
def test_a_module_is_imported_for_the_command_line_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_environments.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    little = ("agent.actor.hidden=[16]", "agent.critic_hidden=[16]", "agent.batch_size=8", "compile=false",
              "budget.updates=5", "budget.final_episodes=1", "online.start_steps=9")  # fmt: skip
    id = "my_environments:CommandLine-v0"
    done = command("train", "mode=online", f"env.id={id}", *little)
    assert done.code == 0 and "runs/CommandLine-v0/cpql_online/online/seed0" in done.out, done
    run = tmp_path / "runs" / "CommandLine-v0" / "cpql_online" / "online" / "seed0"
    kept = (run / "config.yaml").read_text() + (run / "result.json").read_text()
    assert "CommandLine-v0" in kept and "my_environments" not in kept
    assert json.loads((run / "result.json").read_text())["agent"] == "cpql_online"
    monkeypatch.delitem(gymnasium.registry, "CommandLine-v0")
    monkeypatch.delitem(sys.modules, "my_environments")
    done = command("evaluate", f"checkpoint={run}", "episodes=1")
    assert done.is_one_line("no environment 'CommandLine-v0'", "env_id=MODULE:CommandLine-v0"), done
    assert "my_environments" not in sys.modules
    done = command("evaluate", f"checkpoint={run}", "episodes=1", f"env_id={id}")
    assert done.code == 0 and "CommandLine-v0" in done.out, done


# The user's stop, and the world's


@pytest.mark.slow
def test_a_stop_ends_in_one_line_wherever_it_comes(
    command: Command, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    for where, words in (
        ("cpql.configuration.register", ("train",)),
        ("cpql.data.load", ("train",)),
        ("cpql.training.evaluation.evaluate", ("evaluate", f"checkpoint={checkpoint}")),
        ("cpql.deploy.export.export", ("export", f"checkpoint={checkpoint}")),
        ("cpql.data.files.read", ("data", "verify", "x.hdf5")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(where, stop)
            done = command(*words)
            assert (done.code, done.err) == (130, "interrupted\n"), (where, done)
            if words[0] != "data":
                with pytest.raises(KeyboardInterrupt):
                    command(*words, "traceback=true")


def test_what_the_system_refuses_is_one_line(
    command: Command, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/[/]")

    for where, words in (
        ("cpql.data.load", ("train",)),
        ("cpql.io.write_text", ("evaluate", f"checkpoint={checkpoint}", "episodes=1")),
        ("cpql.data.files.read", ("data", "verify", "x.hdf5")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(where, full)
            assert command(*words).is_one_line("/somewhere/[/]: No space left on device")
            if words[0] == "data":
                with pytest.raises(OSError, match="No space left"):
                    command(*words, "--traceback")
            else:
                assert "Traceback" in command(*words, "traceback=true").err


def test_without_any_home_it_is_said_what_to_set(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert command("train").is_one_line("HOME isn't set, and this user has no name: set HOME to a folder")
