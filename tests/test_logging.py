"""What the progress bar prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cpql.training.logging import Bar


def test_a_pause_counts_for_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("cpql.training.logging.time.monotonic", lambda: now)
    out = io.StringIO()
    bar = Bar(Console(file=out, width=200), "training", 100, every=3.0)
    for done in range(1, 4):
        now += 1.0
        bar.update(10 * done)
    with bar.paused():
        now += 600.0
    now += 1.0
    bar.update(40)
    assert bar.away == 600.0
    assert out.getvalue().splitlines() == [
        "training 30/100  10/s  0:07 left",
        "training 40/100  10/s  0:06 left",
    ]
