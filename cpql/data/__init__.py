"""Data: one form, `Transitions`, and the sources that it comes from.

Imports wait until they are needed: the worker processes that collect data import `cpql.data.workers`
and must not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpql.data.sources import load
    from cpql.data.transitions import Batch, Provenance, Transitions

__all__ = ["Batch", "Provenance", "Transitions", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cpql.data' has no attribute '{name}'")
    return getattr(
        importlib.import_module(f"cpql.data.{'sources' if name == 'load' else 'transitions'}"), name
    )
