"""Making Gymnasium environments, with errors that say what to type instead."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium

from cpql.errors import ConfigError, did_you_mean

__all__ = ["make_environment"]


def make_environment(id: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """Make the environment `id`, without Gymnasium's advice to upgrade from v4.

    D4RL's data came from the v2 physics, and v4 is its closest living relative: here the old version is
    the point. Every other warning passes.

    Args:
        id: Gymnasium's environment id, `Hopper-v4`.
        **options: passed on to `gymnasium.make`.

    Raises:
        ConfigError: nothing is registered under `id`, or what it needs isn't installed.
    """
    if not id:
        raise ConfigError("no environment id given: expected one such as 'Hopper-v4'")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*The environment .* is out of date", DeprecationWarning)
            return gymnasium.make(id, **options)
    except gymnasium.error.UnregisteredEnv as error:
        hint = did_you_mean(id, gymnasium.registry)
        raise ConfigError(f"no environment '{id}' in Gymnasium: {hint}") from error
    except (ImportError, gymnasium.error.Error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"environment '{id}' can't be made: {reason}") from error
