"""Collect embedded datasets, regenerate OGBench's, and make the behaviours of the embedded ones.

    python scripts/collect.py dataset hopper-medium --size 1000000 --seed 0
    python scripts/collect.py dataset pen-human --policy random --size 20000 --out pen-random.hdf5
    python scripts/collect.py regenerate cube-single-play --size 1000000 --seed 0
    python scripts/collect.py train Hopper-v4 --out runs/hopper_s0 --steps 1000000
    python scripts/collect.py card runs/hopper_s0 --out cpql/data/behaviours/hopper

`dataset` does what training does by itself where D4RL's data can't be had, into a file of your own if you
name one. With `--policy random` it takes uniform random actions in any task's environment, and the file is
marked as such: data to try a task with (`train.py env=pen-human dataset.path=pen-random.hdf5`), not D4RL's.
`regenerate` does what training does by itself with `dataset=regenerated`: it collects an OGBench dataset
again, with OGBench's own oracles (pip install 'cpql[ogbench]'), and goes on where an earlier call stopped.
`train` and `card` made the behaviours that cpql ships: SAC by sbx (pip install 'cpql[behaviours]') with a
snapshot every 5,000 steps; the expert is the best one, medium the one at a third of the expert's return.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from cpql.errors import ConfigError, DataError, errors_in_one_line
from cpql.training.logging import progress_bars, say

ERRORS = Console(stderr=True, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error ends it with `SystemExit`."""
    options = vars(parser().parse_args(arguments))
    run = options.pop("run")
    with errors_in_one_line(options.pop("traceback")):
        run(**options)


def parser() -> argparse.ArgumentParser:
    """Describe the commands; options are the keyword arguments of the functions."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="collect.py", description=__doc__, formatter_class=form)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=run)
        return sub.add_argument

    def whole(default: int) -> dict[str, Any]:
        return {"type": positive, "default": default}

    default = "(default: %(default)s)"
    add = command("dataset", dataset, "collect a dataset with the behaviours that cpql ships, or at random")
    add("task", help="a task's name: hopper-medium")
    add("--size", **whole(1_000_000), help=f"transitions {default}")
    add("--seed", type=int, default=0, help=f"same seed, same rows {default}")
    add("--policy", choices=("random",), help="act at random, not by the task's recipe; needs --out")
    add("--out", type=Path, help="HDF5 file in D4RL's layout (default: cpql's cache)")

    add = command("regenerate", regenerate, "collect an OGBench dataset again, with OGBench's own oracles")
    add("task", help="a task's name: cube-single-play")
    add("--size", **whole(1_000_000), help=f"transitions, in whole episodes {default}")
    add("--seed", type=int, default=0, help=f"same seed, same rows {default}")
    add("--workers", type=positive, help="processes (default: one per core); rows don't depend on it")

    add = command("train", train, "train SAC with sbx, keeping snapshots; hours on a CPU")
    add("environment", help="a Gymnasium id: Hopper-v4")
    add("--out", type=Path, required=True, help="folder for the snapshots")
    add("--seed", type=int, default=0, help=f"of the training {default}")
    add("--steps", **whole(1_000_000), help=f"environment steps {default}")
    add("--period", **whole(5_000), help=f"steps between snapshots {default}")

    add = command("card", card, "choose expert, medium and replay snapshots and write a behaviour folder")
    add("snapshots", type=Path, help="folder that 'train' wrote")
    add("--out", type=Path, required=True, help="behaviour folder: cpql/data/behaviours/hopper")
    add("--environment", help="Gymnasium id, where training.json doesn't say")
    add("--seed", type=int, help="of the training, where training.json doesn't say")
    add("--period", **whole(1), help="only steps divisible by this (default: all)")
    add("--first-episodes", **whole(10), help=f"for every snapshot {default}")
    add("--episodes", **whole(100), help=f"for those near a choice {default}")
    add("--replay", **whole(8), help=f"replay snapshots, at most {default}")
    add("--expert-step", type=positive, help="take this snapshot, rather than the best")
    add("--medium-step", type=positive, help="take this snapshot, rather than choose")
    add("--medium-return", type=float, help="what medium should return (default: expert's / 3)")
    add("--version", action="append", default=[], metavar="PACKAGE=VERSION", type=pair,
        help="used in training, where training.json doesn't say; may be repeated")  # fmt: skip
    return top


def positive(text: str) -> int:
    """Read a positive whole number; 1_000_000 is one too."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive whole number")
    return value


def pair(text: str) -> tuple[str, str]:
    """Read PACKAGE=VERSION."""
    package, sign, version = text.partition("=")
    if not (package and sign and version):
        raise argparse.ArgumentTypeError(f"{text}: expected PACKAGE=VERSION, such as sbx-rl=0.28.0")
    return package, version


def dataset(task: str, size: int, seed: int, policy: Any, out: Path | None) -> None:
    """Collect a dataset."""
    from cpql.data import embedded
    from cpql.data.request import Request
    from cpql.tasks import load_task

    about = load_task(task)
    if out is None and policy is not None:
        raise ConfigError(f"--policy={policy}: expected --out as well, a file for what it collects")
    with progress_bars(ERRORS) as progress:
        tell: dict[str, Any] = {"progress": progress, "say": lambda line: say(ERRORS, line)}
        if out is not None:
            data = embedded.collect(about, size, seed, out, policy=policy, **tell)
        else:
            source, request = embedded.Embedded(), Request(about, size=size, seed=seed, **tell)
            path = source.locate(request)
            data = source.fetch(request) if path is None else source.read(path, request)
            if data.provenance.file is None:
                raise DataError(f"{task} was collected and isn't kept: expected --out to name a file")
            out = embedded.cache_folder() / data.provenance.file
    print(data.provenance.line())
    print(f"in {out}")


def regenerate(task: str, size: int, seed: int, workers: int | None) -> None:
    """Collect an OGBench dataset again."""
    from cpql.data import regenerated
    from cpql.data.request import Request
    from cpql.tasks import load_task

    with progress_bars(ERRORS) as progress:
        tell: dict[str, Any] = {"progress": progress, "say": lambda line: say(ERRORS, line)}
        request = Request(load_task(task), size=size, seed=seed, **tell)
        file = regenerated.regenerate(regenerated.prepare(request), workers=workers, **tell)
    print(regenerated.Regenerated().read(file, request).provenance.line())
    print(f"in {file}")


def train(environment: str, out: Path, seed: int, steps: int, period: int) -> None:
    """Train a behaviour."""
    from behaviours import train_behaviour

    def report(_: str, done: int, total: int) -> None:
        print(f"{done:,} of {total:,} steps", flush=True)

    train_behaviour(environment, out, seed=seed, total=steps, period=period, progress=report)


def card(version: list[tuple[str, str]], **options: Any) -> None:
    """Choose snapshots."""
    from behaviours import make_card

    with progress_bars(ERRORS) as progress:
        written = make_card(**options, packages=dict(version), progress=progress)
    for entry in written["snapshots"]:
        for rule in ("sampled", "deterministic"):
            metrics = entry[rule]
            print(
                f"{entry['role']:<7} step {entry['step']:>8,} {rule:<13} "
                f"return {metrics['return_mean']:8.1f} ± {metrics['return_std']:6.1f}, "
                f"length {metrics['length_mean']:6.1f}, {metrics['episodes']} episodes"
            )
    print(written["falls_short"] or "as good as D4RL's returns, where those are known")


if __name__ == "__main__":
    main()
