"""The configuration of a training run; Hydra composes it from `configs/`, `cpql.settings.build` checks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from cpql.data.sources import check_source
from cpql.settings import Candidates, Count, Natural, Positive, Seed, Share, Threads
from cpql.tasks import Task

__all__ = ["BudgetConfig", "DatasetConfig", "OnlineConfig", "TrainConfig"]


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
    reward: Literal["none", "normalize", "antmaze", "cql_antmaze", "iql_antmaze", "iql_locomotion"] = "none"
    normalise_observations: bool = False
    n_step: Annotated[int, Field(ge=1, le=1_000)] = 1
    time_limits: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        check_source(self.source)


@dataclass(frozen=True)
class BudgetConfig:
    """How long to train and how often to look.

    Attributes:
        name: `quick` or `full`.
        updates: gradient steps.
        log_every: gradient steps between lines of metrics.csv, means over the interval.
        evaluate_every: gradient steps between evaluations; 0 evaluates at the end only.
        save_every: gradient steps between checkpoints.
        episodes: of an evaluation during training.
        final_episodes: of the evaluation at the end.
        keep: how many checkpoints to keep, the newest; 0 keeps all.
        dataset_size: transitions that are collected where data has to be.
        episode_limit: steps after which an evaluation ends an episode that its environment doesn't end.
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
    """How an agent acts while it learns, `mode=online` and `mode=finetune`.

    Attributes:
        environments: how many at once, for each member.
        updates_per_step: gradient steps for each step of an environment; budget.updates counts the former.
        start_steps: steps before the first update.
        start: what acts in them: `random` actions, or the `policy`.
        candidates: actions drawn when exploring, of which one is chosen by its value, see `AgentConfig`.
        epsilon: share of uniformly random actions after that, at first;
        epsilon_end: in the end;
        epsilon_steps: steps of an environment on the way.
        noise: standard deviation of a Gaussian on the other actions, in [-1, 1] (TD3's exploration).
        buffer_size: transitions that are kept, the newest.
        save_buffer: keep them in checkpoints. Else a resumed run fills its buffer anew before it goes on.
        offline_share: of each batch, from the dataset (`mode=finetune`).
    """

    environments: Annotated[int, Field(ge=1, le=1_000)] = 1
    updates_per_step: Positive = 1.0
    start_steps: Natural = 5_000
    start: Literal["random", "policy"] = "random"
    candidates: Candidates = 1
    epsilon: Share = 0.0
    epsilon_end: Share = 0.0
    epsilon_steps: Natural = 0
    noise: Share = 0.0
    buffer_size: Count = 1_000_000
    save_buffer: bool = True
    offline_share: Share = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        env: the task.
        agent: the algorithm's name and its settings, checked against its own dataclass.
        dataset: what to learn from; not with `mode=online`.
        budget: how long.
        online: how to act meanwhile; null is offline.
        checkpoint: a run whose last checkpoint this one starts from: every network and optimiser.
        logger: where metrics go besides CSV.
        seed: of weights, data order and noise.
        device: `auto` takes a GPU where there is one.
        precision: of the update's matrix products: `fp32`; `bf16`, faster where the processor has units for
            it, with weights, optimiser and losses in fp32; `tf32`, which only a GPU has.
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        compile: fuse the update into one program: a minute to build, then about twice as fast on a CPU.
            `auto` does so where that can be had and goes on uncompiled elsewhere, which it says; true ends
            in an error there.
        configuration: name of the chosen agent configuration, a file of `configs/agent/`: results and loggers
            call the agent by it.
        run_dir: the run's folder; never overwritten.
        resume: go on with the run in `run_dir`.
        traceback: show Python's traceback with an error.
    """

    env: Task
    agent: dict[str, Any]
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    online: OnlineConfig | None = None
    checkpoint: str | None = None
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "tf32"] = "fp32"
    threads: Threads = 1
    compile: bool | Literal["auto"] = "auto"
    configuration: str = ""
    run_dir: str = "runs/run"
    resume: bool = False
    traceback: bool = False
