"""The registry of sources: every family of datasets by name."""

from __future__ import annotations

from cpql.data.d4rl import D4RL
from cpql.data.embedded import Embedded
from cpql.data.files import File
from cpql.data.minari import Minari
from cpql.data.request import Request, Source
from cpql.errors import ConfigError, did_you_mean

__all__ = ["AUTO", "SOURCES", "Request", "Source", "check_source"]

SOURCES: dict[str, Source] = {
    "d4rl": D4RL(),
    "minari": Minari(),
    "embedded": Embedded(),
    "file": File(),
}
"""Sources by name; `file` reads what `dataset.path` names, the others are chosen by `dataset=NAME`."""

AUTO = ("d4rl", "embedded")
"""The sources that `dataset=auto` tries, in this order; a later one is a stand-in, and called so."""


def check_source(name: str) -> None:
    """Check the name of a source, which may be `auto`.

    Raises:
        ConfigError: there is no such source.
    """
    if name not in ("auto", *SOURCES):
        raise ConfigError(f"no dataset source '{name}': {did_you_mean(name, ('auto', *SOURCES))}")
