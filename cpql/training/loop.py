"""The training loop, and what starts it: one run, or several as the members of one program."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cpql.agents import AGENTS
from cpql.data.embedded import cache_folder
from cpql.deploy.summary import summary
from cpql.device import choose_device
from cpql.errors import ActingError, CheckpointError, ConfigError, Interrupted
from cpql.training.config import TrainConfig, group_agent_config
from cpql.training.logging import Bar, Callback, say
from cpql.training.members import Members
from cpql.training.program import Update, program
from cpql.training.runs import Run, claimed
from cpql.training.signals import stop_signals
from cpql.training.sources import load_source

__all__ = ["group_summary", "train_group"]


def loop(members: Members, update: Update, stopped: Callable[[], bool]) -> None:
    """Take the remaining updates of `update`, logging, saving and evaluating on the way.

    Raises:
        Interrupted: `stopped` returned True; everything is saved.
    """
    budget = members.config.budget
    began, first, text = time.monotonic(), members.step, members.last_scores()
    with closing(Bar(members.console, "training", budget.updates, first)) as bar:
        with bar.paused():
            # What a killed process hasn't evaluated, or the policy that this run starts from.
            if first or members.config.checkpoint:
                members.evaluate(stopped)
        while members.step < budget.updates and not stopped():
            agent, generators = members.agent, members.generators
            batch = members.source.batch(agent, generators)
            noise = agent.draw(generators if agent.members else generators[0])
            members.means.add(update(batch, noise, members.phase))
            members.step += 1
            if members.due(budget.log_every):
                text = members.log(time.monotonic() - began - bar.away, members.step - first)
            if members.due(budget.save_every) or members.due(budget.evaluate_every) or stopped():
                with bar.paused():
                    members.save()
                    members.evaluate(stopped)
            bar.update(members.step, text)
    if stopped():
        done = f"stopped after {members.step:,} of {budget.updates:,} updates"
        raise Interrupted(f"{done}; {members.where()}")


def train_group(
    configs: Sequence[TrainConfig], console: Console, callback: Callback | None = None
) -> list[dict[str, Any]]:
    """Train one run, or several as the members of one program.

    Member k is, up to rounding, the run of its configuration alone, and its folder is an ordinary run's:
    `resume` continues it alone or in a group. A member that diverges is left as it was last saved, and the
    others continue.

    Args:
        configs: of each run. They may differ in seed, folder and the agent's settings in its `by_member`.
        console: for progress and warnings.
        callback: called with the step and the metrics of each member, whenever these are written.

    Returns:
        What each `result.json` holds.

    Raises:
        Interrupted: the user stopped it; everything is saved.
        CpqlError: anything else the user can fix; also, after the others are finished, that one diverged.
    """
    config = configs[0]
    if config.threads:
        torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        for own in configs:
            stack.enter_context(claimed(Path(own.run_dir)))
        runs = [Run(own) for own in configs]
        if all(run.finished for run in runs):
            return [run.result() for run in runs]
        if config.resume is True and not any(run.begun for run in runs):
            raise CheckpointError(f"{runs[0].folder} holds no run to resume (no config.yaml)")
        return _run_to_end(_load(runs, console), callback)


def _load(runs: Sequence[Run], console: Console) -> Members:
    """Check and load everything that a training needs; nothing is written yet."""
    config = runs[0].config
    device = choose_device(config.device)
    if config.precision == "tf32" and device.type != "cuda":
        raise ConfigError("precision=tf32: only a CUDA device has it; use precision=fp32 or precision=bf16")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    kind, settings = group_agent_config([run.config for run in runs])
    if config.checkpoint and settings.lr_decay == "cosine":
        raise ConfigError(
            f"agent.lr_decay=cosine: checkpoint={config.checkpoint} is at its end, where the rates are 0: "
            "expected agent.lr_decay=none"
        )
    seeds = [run.config.seed for run in runs]
    source = load_source(config, seeds, device, console, settings)
    agent = kind(
        source.state_dim,
        source.action_dim,
        settings,
        seed=seeds if len(seeds) > 1 else seeds[0],
        device=device,
        matmul_dtype=torch.bfloat16 if config.precision == "bf16" else None,
    )
    if config.budget.log_every % agent.cycle:
        raise ConfigError(
            f"budget.log_every={config.budget.log_every}: expected a multiple of {agent.cycle}, as not every "
            f"update of {agent.name} has all metrics"
        )
    return Members(runs, agent, source, console)


def _run_to_end(members: Members, callback: Callback | None) -> list[dict[str, Any]]:
    """Compile the update, train what is left, and write the results."""
    config, console = members.config, members.console
    if config.compile:
        say(console, "compiling the update: a minute or two, seconds where it was compiled before")
    cache = cache_folder() / "programs"
    made = program(members.agent, config.compile, cache, lambda line: say(console, line, "yellow"))
    with ExitStack() as stack:
        for run in members.runs:
            run.start_loggers(members.step, config.env, members.agent.name, callback)
            stack.callback(run.close)
        if made.compiled:
            # Compiling again during a run would mean that a shape depends on data.
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
        try:
            for run in members.runs:
                run.begin(members.step, made.how, members.source)
            loop(members, made.update, stack.enter_context(stop_signals()))
            results = [run.finish(members.step) for _, run in members.active()]
        except ActingError as error:
            members.save()
            raise ActingError(f"{error}; {members.where()}") from error
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise CheckpointError(
                f"{what}{error.strerror or error}: training can't be saved any further; {members.where()}"
            ) from error
    if members.diverged:
        raise next(iter(members.diverged.values()))
    return results


def group_summary(results: Sequence[Mapping[str, Any]], configs: Sequence[TrainConfig]) -> str:
    """The results of several runs, with the mean over the seeds of each setting."""
    texts, values = [], dict[str, list[float]]()
    for result, config in zip(results, configs, strict=True):
        where = f"all in {config.run_dir}: learning_curve.png, metrics.csv, result.json, checkpoints/last"
        texts += [summary(result), where]
        given = (name for name in AGENTS[config.agent["name"]].by_member if name in config.agent)
        setting = ", ".join(f"agent.{name}={config.agent[name]}" for name in given)
        if result["evaluated"]:
            score = result["score"]
            values.setdefault(setting, []).append(result["return_mean"] if score is None else score)
    of = "return" if results[0].get("score") is None else "score"
    for setting, seeds in values.items():
        if len(seeds) > 1:
            under = f" with {setting}" if len(values) > 1 else ""
            mean, spread = statistics.fmean(seeds), statistics.stdev(seeds)
            texts.append(f"{of} of {len(seeds)} seeds{under}: {mean:,.1f} ± {spread:,.1f} (between seeds)")
    return "\n".join(texts)
