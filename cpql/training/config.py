"""The configuration of a training run; Hydra composes it from `configs/`, `cpql.settings.build` checks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from cpql.agents import AGENTS, Agent, AgentConfig
from cpql.data.sources import check_source
from cpql.data.transforms import RewardRule
from cpql.errors import ConfigError, did_you_mean
from cpql.settings import Candidates, Count, Fraction, Natural, Positive, Seed, Threads, build
from cpql.tasks import Task, load_task, task_names, with_own_references
from cpql.training.logging import LOGGERS

__all__ = [
    "BudgetConfig",
    "DatasetConfig",
    "OnlineConfig",
    "TrainConfig",
    "WandbConfig",
    "agent_config",
    "group_agent_config",
    "train_config",
]

# What members of one program may differ in, besides the agent's settings in its `by_member`.
OWN = ("seed", "run_dir", "agent", "checkpoint")


@dataclass(frozen=True)
class DatasetConfig:
    """Which data to learn from, and what to make of them.

    Attributes:
        source: a name of `cpql.data.sources.SOURCES`, strictly; `auto` tries D4RL's cache folder, a download,
            then embedded.
        path: local data instead, strictly: HDF5 or NPZ in D4RL's layout, or a Minari folder.
        id: a D4RL or Minari id instead of the task's own.
        size: transitions to collect where the embedded source is used.
        seed: of that collection.
        reward: what training makes of a reward, a rule of `cpql.data.transforms.REWARD_RULES`; scores always
            count the environment's own.
        normalise_observations: give each observation mean 0 and standard deviation 1 over the dataset; the
            policy does the same when it acts.
        n_step: steps of rewards in a critic's target before it bootstraps.
        time_limits: `drop` leaves out the step at a time limit, as D4RL's `qlearning_dataset` does; `keep`
            learns from it like from any other.
    """

    source: str = "auto"
    path: str | None = None
    id: str | None = None
    size: Count = 1_000_000
    seed: Seed = 0
    reward: RewardRule = "none"
    normalise_observations: bool = False
    n_step: Annotated[int, Field(ge=1, le=1_000)] = 1
    time_limits: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        check_source(self.source)


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train, and how often to log, save and evaluate.

    Attributes:
        name: of the budget, part of the run's folder.
        updates: gradient steps.
        log_every: gradient steps between rows of metrics.csv, which are means over the interval.
        evaluate_every: gradient steps between evaluations; 0 evaluates at the end only.
        save_every: gradient steps between checkpoints.
        episodes: of an evaluation during training.
        final_episodes: of the evaluation at the end.
        keep: how many of the newest checkpoints to keep; 0 keeps all.
        dataset_size: transitions to collect if the data have to be collected.
        episode_limit: steps after which an evaluation cuts an episode that its environment doesn't end.
    """

    name: str = "full"
    updates: Count = 1_000_000
    log_every: Count = 1_000
    evaluate_every: Natural = 50_000
    save_every: Count = 50_000
    episodes: Count = 10
    final_episodes: Count = 100
    keep: Natural = 2
    dataset_size: Count = 1_000_000
    episode_limit: Count = 10_000


@dataclass(frozen=True)
class OnlineConfig:
    """How an agent acts while it learns, for `mode=online` and `mode=finetune`.

    Attributes:
        environments: how many run at once, for each member.
        updates_per_step: gradient steps for each environment step; budget.updates counts gradient steps.
        start_steps: environment steps before the first update.
        start: what acts during these: `random` actions, or the `policy`.
        candidates: actions drawn when exploring, of which one is chosen by its value, see `AgentConfig`.
        epsilon: initial probability of a uniformly random action after these;
        epsilon_end: final probability;
        epsilon_steps: environment steps in between.
        noise: standard deviation of Gaussian noise on the other actions, in [-1, 1] (TD3's exploration).
        time_limits: with `bootstrap` the value of the state at a time limit counts, as the task would have
            gone on; with `terminal` it doesn't, as in both published codes.
        buffer_size: transitions in the replay buffer; the oldest are dropped.
        save_buffer: whether checkpoints hold the buffer. Without it a resumed run fills a new one first.
        offline_fraction: fraction of each batch that comes from the dataset (`mode=finetune`).
    """

    environments: Annotated[int, Field(ge=1, le=1_000)] = 1
    updates_per_step: Positive = 1.0
    start_steps: Natural = 5_000
    start: Literal["random", "policy"] = "random"
    candidates: Candidates = 1
    epsilon: Fraction = 0.0
    epsilon_end: Fraction = 0.0
    epsilon_steps: Natural = 0
    noise: Fraction = 0.0
    time_limits: Literal["bootstrap", "terminal"] = "bootstrap"
    buffer_size: Count = 1_000_000
    save_buffer: bool = True
    offline_fraction: Fraction = 0.0


@dataclass(frozen=True)
class WandbConfig:
    """Where Weights & Biases lists a run, with `logger=wandb`.

    Attributes:
        project: of the run.
        entity: user or team; null takes the account's own.
        group: under which the project gathers runs.
    """

    project: str = "cpql"
    entity: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        env: the task.
        agent: the algorithm's name and its settings, checked against its own dataclass.
        dataset: what to learn from; unused with `mode=online`.
        budget: how long.
        online: how to act while learning; null learns offline.
        checkpoint: a run whose last checkpoint gives the initial networks and optimisers.
        logger: where metrics go besides CSV: a name of `cpql.training.logging.LOGGERS` or several; `csv` for
            nowhere.
        wandb: where Weights & Biases lists the run.
        seed: of weights, data order and noise.
        device: `auto` takes a GPU if there is one.
        precision: of the update's matrix products: `fp32`; `bf16`, faster on processors that have units for
            it, with weights, optimiser and losses in fp32; `tf32`, on GPUs only.
        threads: CPU threads of PyTorch; 0 leaves the choice to PyTorch.
        compile: compile the update into one program: a minute to build, then about twice as fast on a CPU.
            With `auto` training goes on uncompiled, and says so, where compiling fails; true makes that an
            error.
        configuration: name of the agent's configuration, a file of `configs/agent/`, under which results and
            loggers list the agent.
        run_dir: the run's folder; never overwritten.
        resume: true continues the run in `run_dir`, and there must be one; false begins one, and there must
            be none; `auto` continues the run where there is one and else begins it.
        traceback: show Python's traceback with an error.

    Raises:
        ConfigError: there is no such logger.
    """

    env: Task
    agent: dict[str, Any]
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    online: OnlineConfig | None = None
    checkpoint: str | None = None
    logger: str | tuple[str, ...] = "csv"
    wandb: WandbConfig = field(default_factory=WandbConfig)
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "tf32"] = "fp32"
    threads: Threads = 1
    compile: bool | Literal["auto"] = "auto"
    configuration: str = ""
    run_dir: str = "runs/run"
    resume: bool | Literal["auto"] = False
    traceback: bool = False

    def __post_init__(self) -> None:
        for name in self.loggers:
            if name not in LOGGERS:
                raise ConfigError(f"logger={name} does not exist: {did_you_mean(name, ('csv', *LOGGERS))}")

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names of the loggers besides CSV."""
        names = (self.logger,) if isinstance(self.logger, str) else self.logger
        return tuple(name for name in names if name != "csv")


def train_config(values: Mapping[str, Any], where: str) -> TrainConfig:
    """A run's settings from nested plain values, see `cpql.settings.build`.

    A task whose environment isn't its own any more has no references, see `cpql.tasks.with_own_references`.
    """
    config = build(TrainConfig, values, where)
    if config.env.name not in task_names():
        return config
    return replace(config, env=with_own_references(config.env, load_task(config.env.name)))


def agent_config(config: TrainConfig) -> tuple[type[Agent], AgentConfig]:
    """The agent's class and its settings; ConfigError for an unknown agent, key or value."""
    settings = dict(config.agent)
    name = settings.pop("name", None)
    if name not in AGENTS:
        raise ConfigError(f"agent.name={name} is no agent: {did_you_mean(str(name), AGENTS)}")
    kind = AGENTS[name]
    return kind, replace(build(kind.config_class, settings, "agent"), updates=config.budget.updates)


def group_agent_config(configs: Sequence[TrainConfig]) -> tuple[type[Agent], AgentConfig]:
    """The same for all members of a program, with a tuple for each setting in which they differ.

    Raises:
        ConfigError: they differ in a setting that has to be the same.
    """
    chosen = [agent_config(config) for config in configs]
    kind, first = chosen[0]
    rates = {name: getattr(first, name) for name in kind.by_member}
    own = {name: getattr(configs[0], name) for name in OWN}
    for config, (other, settings) in zip(configs, chosen, strict=True):
        if other is not kind or replace(settings, **rates) != first or replace(config, **own) != configs[0]:
            raise ConfigError(
                f"members may differ in seed, run_dir and the agent's {', '.join(kind.by_member)}, "
                "not in other settings"
            )
    every = {name: tuple(getattr(settings, name) for _, settings in chosen) for name in rates}
    differing: dict[str, Any] = {name: values for name, values in every.items() if len({*values}) > 1}
    return kind, replace(first, **differing)
