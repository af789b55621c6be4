"""Older runs and policies: what they wrote, in today's form.

A run's `config.yaml` and a policy's `config.json` are plain values. Where a name or a place in them has
changed since, `upgrade` gives them as this version would write them.
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
"""Keys that have another name today, by where they were."""

FIRST_AGENTS = ("cpql", "consistency_ac")
"""The agents of the versions whose actors had no kind."""


def upgrade(content: Mapping[str, Any]) -> dict[str, Any]:
    """Give the plain values of a policy's or a run's configuration in today's form.

    Args:
        content: nested plain values of any version of cpql, or of anybody: what isn't recognised stays as it
            is, for whoever checks the result. It isn't changed itself.

    Returns:
        The same values, today's where they are today's already.
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
    if (
        isinstance(agent, Mapping)
        and agent.get("name") in FIRST_AGENTS
        and isinstance(agent.get("actor"), Mapping)
    ):
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
    entries: dict[str, dict[str, Any]] = {}
    if id and id != minari:
        entries["d4rl"] = {"id": id}
        if path:
            entries["d4rl"]["path"] = path
        if rows is not None:
            entries["d4rl"]["rows"] = rows
    if minari:
        entries["minari"] = {"id": minari}
    return {**new, "datasets": entries}
