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
import sys
from pathlib import Path
from typing import Any

from cpql.errors import ConfigError, DataError, errors_in_one_line


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error ends it with `SystemExit`."""
    options = parser().parse_args(arguments)
    with errors_in_one_line(options.traceback):
        try:
            options.run(options)
        except KeyboardInterrupt:
            if sys.stderr.isatty():  # the cursor is behind the progress
                print(file=sys.stderr)
            raise


def parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="collect.py", description=__doc__, formatter_class=form)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    sub = command("dataset", dataset, "collect a dataset with the behaviours that cpql ships, or at random")
    sub.add_argument("task", help="a task's name: hopper-medium")
    sub.add_argument("--size", type=whole, default=1_000_000, help="transitions (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="same seed, same rows (default: %(default)s)")
    sub.add_argument(
        "--policy", choices=("random",), help="act at random, not by the task's recipe; needs --out"
    )
    sub.add_argument("--out", type=Path, help="HDF5 file in D4RL's layout (default: cpql's cache)")

    sub = command("regenerate", regenerate, "collect an OGBench dataset again, with OGBench's own oracles")
    sub.add_argument("task", help="a task's name: cube-single-play")
    sub.add_argument(
        "--size", type=whole, default=1_000_000, help="transitions, in whole episodes (default: %(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, help="same seed, same rows (default: %(default)s)")
    sub.add_argument(
        "--workers", type=whole, help="processes (default: one per core); rows don't depend on it"
    )

    sub = command("train", train, "train SAC with sbx, keeping snapshots; hours on a CPU")
    sub.add_argument("environment", help="a Gymnasium id: Hopper-v4")
    sub.add_argument("--out", type=Path, required=True, help="folder for the snapshots")
    sub.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    sub.add_argument(
        "--steps", type=whole, default=1_000_000, help="environment steps (default: %(default)s)"
    )
    sub.add_argument(
        "--period", type=whole, default=5_000, help="steps between snapshots (default: %(default)s)"
    )

    sub = command("card", card, "choose expert, medium and replay snapshots and write a behaviour folder")
    sub.add_argument("snapshots", type=Path, help="folder that 'train' wrote")
    sub.add_argument("--out", type=Path, required=True, help="behaviour folder: cpql/data/behaviours/hopper")
    sub.add_argument("--environment", help="Gymnasium id, where training.json doesn't say")
    sub.add_argument("--seed", type=int, help="of the training, where training.json doesn't say")
    sub.add_argument("--period", type=whole, default=1, help="only steps divisible by this (default: all)")
    sub.add_argument(
        "--first-episodes", type=whole, default=10, help="for every snapshot (default: %(default)s)"
    )
    sub.add_argument(
        "--episodes", type=whole, default=100, help="for those near a choice (default: %(default)s)"
    )
    sub.add_argument(
        "--replay", type=whole, default=8, help="replay snapshots, at most (default: %(default)s)"
    )
    sub.add_argument("--expert-step", type=whole, help="take this snapshot, rather than the best")
    sub.add_argument("--medium-step", type=whole, help="take this snapshot, rather than choose")
    sub.add_argument("--medium-return", type=float, help="what medium should return (default: expert's / 3)")
    sub.add_argument("--version", action="append", default=[], metavar="PACKAGE=VERSION", type=pair,
                     help="used in training, where training.json doesn't say; may be repeated")  # fmt: skip
    return top


def whole(text: str) -> int:
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


def show(label: str, done: int, total: int) -> None:
    """Show progress: one line that rewrites itself on a terminal, none elsewhere."""
    if sys.stderr.isatty():
        print(
            f"\r{label}: {done:,} of {total:,}",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )


def say(line: str) -> None:
    """Tell the user something beside the results."""
    print(line, file=sys.stderr)


def dataset(options: argparse.Namespace) -> None:
    """Collect a dataset."""
    from cpql.data import embedded
    from cpql.data.request import Request
    from cpql.tasks import load_task

    task, file = load_task(options.task), options.out
    if file is not None:
        data = embedded.collect(
            task, options.size, options.seed, file, policy=options.policy, progress=show, say=say
        )
    elif options.policy is not None:
        raise ConfigError(f"--policy={options.policy}: expected --out as well, a file for what it collects")
    else:
        source = embedded.Embedded()
        request = Request(task, size=options.size, seed=options.seed, progress=show, say=say)
        path = source.locate(request)
        data = source.fetch(request) if path is None else source.read(path, request)
        if data.provenance.file is None:
            raise DataError(f"{task.name} was collected and isn't kept: expected --out to name a file")
        file = embedded.cache_folder() / data.provenance.file
    print(data.provenance.line())
    print(f"in {file}")


def regenerate(options: argparse.Namespace) -> None:
    """Collect an OGBench dataset again."""
    from cpql.data import regenerated
    from cpql.data.request import Request
    from cpql.tasks import load_task

    task = load_task(options.task)
    request = Request(task, size=options.size, seed=options.seed, progress=show, say=say)
    plan = regenerated.prepare(request)
    file = regenerated.regenerate(plan, workers=options.workers, progress=show, say=say)
    print(regenerated.Regenerated().read(file, request).provenance.line())
    print(f"in {file}")


def train(options: argparse.Namespace) -> None:
    """Train a behaviour."""
    from behaviours import train_behaviour

    train_behaviour(
        options.environment,
        options.out,
        seed=options.seed,
        total=options.steps,
        period=options.period,
        progress=lambda _, done, total: print(f"{done:,} of {total:,} steps", flush=True),
    )


def card(options: argparse.Namespace) -> None:
    """Choose snapshots."""
    from behaviours import make_card

    names = ["seed", "period", "first_episodes", "episodes", "replay"]
    names += ["expert_step", "medium_step", "medium_return"]
    chosen = {name: getattr(options, name) for name in names}
    written = make_card(
        options.snapshots,
        options.out,
        options.environment,
        **chosen,
        packages=dict(options.version),
        progress=show,
    )
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
