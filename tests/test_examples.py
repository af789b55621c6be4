"""The examples run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_td3_actor() -> None:
    spec = importlib.util.spec_from_file_location("td3_actor", EXAMPLES / "td3_actor.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    returns = module.train(steps=600, warm_up=300, batch_size=16)
    assert len(returns) == 3
    assert np.isfinite(returns).all()
