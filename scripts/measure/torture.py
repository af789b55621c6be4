"""The long form of `tests/torture.py`: trainings that are killed and continued, and what was lost."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["torture"]

HARNESS = Path(__file__).resolve().parents[2] / "tests" / "torture.py"


def torture(options: argparse.Namespace) -> dict[str, Any]:
    """Run the harness in a process of its own, with one thread, and return what it counted."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        counts = {
            "--trials": options.trials,
            "--twice": options.twice,
            "--commands": options.commands,
            "--commands-twice": options.commands_twice,
            "--seed": options.seed,
        }
        words = [str(word) for pair in counts.items() for word in pair]
        subprocess.run(
            [sys.executable, str(HARNESS), *words, "--out", str(out)],
            env={
                **os.environ,
                "PYTHONPATH": str(HARNESS.parents[1]),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        return {"seed": options.seed, "kinds": json.loads(out.read_text())}
