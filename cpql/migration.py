"""Upgrades of configurations that older versions of cpql wrote.

`upgrade` turns the content of a run's `config.yaml` or a policy's `config.json` into what this version would
write, where a key has been renamed or moved since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["upgrade"]

RENAMED = {
    ("actor", "objective_options", "share"): "fraction",
    ("agent", "actor", "objective_options", "share"): "fraction",
    ("online", "offline_share"): "offline_fraction",
}
"""New names of renamed keys, by their old path."""

FIRST_AGENTS = ("cpql", "consistency_ac")
"""Agents that existed before actors had a kind."""


def upgrade(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested plain values of a policy's or a run's configuration in today's form.

    `content` may come from any version of cpql, or from a stranger: it isn't changed, and values that aren't
    recognised are kept for the caller to check.
    """
    new = dict(content)
    for path, name in RENAMED.items():
        new = _renamed(new, path, name)
    for key in ("task", "env"):
        if isinstance(new.get(key), Mapping):
            new[key] = _task(new[key])
    # Actors had no kind while all were consistency models. A policy has its own, a run that of its agent.
    if isinstance(new.get("actor"), Mapping):
        new["actor"] = {"kind": "consistency", **new["actor"]}
    agent = new.get("agent")
    if isinstance(agent, Mapping) and agent.get("name") in FIRST_AGENTS:
        if isinstance(agent.get("actor"), Mapping):
            new["agent"] = {**agent, "actor": {"kind": "consistency", **agent["actor"]}}
    return new


def _renamed(content: dict[str, Any], path: tuple[str, ...], name: str) -> dict[str, Any]:
    key, *rest = path
    if key not in content:
        return content
    if not rest:
        return {name if k == key else k: v for k, v in content.items()}
    if not isinstance(content[key], Mapping):
        return content
    return {**content, key: _renamed(dict(content[key]), tuple(rest), name)}


def _task(old: Mapping[str, Any]) -> dict[str, Any]:
    """A task whose datasets were `dataset`, D4RL's id, with `url` and `transitions`, and `minari`, an id."""
    if not {"dataset", "url", "minari", "transitions"} & old.keys() or "datasets" in old:
        return dict(old)
    new = dict(old)
    id, path, minari, rows = (new.pop(key, None) for key in ("dataset", "url", "minari", "transitions"))
    new["datasets"] = {}
    if id and id != minari:
        entry = {"id": id, "path": path or None, "rows": rows}
        new["datasets"]["d4rl"] = {key: value for key, value in entry.items() if value is not None}
    if minari:
        new["datasets"]["minari"] = {"id": minari}
    return new
