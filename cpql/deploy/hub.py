"""Policies on the Hugging Face Hub: the model card, upload and download.

Nothing else in cpql imports huggingface_hub, the extra `cpql[hub]`; the card needs no package.
"""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from cpql.deploy.config import PolicyConfig
from cpql.deploy.summary import summary
from cpql.errors import CheckpointError, ConfigError, brief

__all__ = [
    "PREFIX",
    "card",
    "download",
    "find_result",
    "is_id",
    "read_object",
    "read_result",
    "upload",
]

PREFIX = "hf://"
MOST_JSON_BYTES = 4 << 20


def is_id(name: str) -> bool:
    """Whether a name has the form of a repository's, `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file of at most 4 MiB; CheckpointError, naming `what` it is, for others."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_JSON_BYTES + 1)
        if len(text) > MOST_JSON_BYTES:
            raise ValueError(f"expected at most {MOST_JSON_BYTES:,} bytes, found more")
        found = from_json(text, allow_inf_nan=False)
        json.dumps(found, allow_nan=False)  # fails on numbers beyond float64, 1e999
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, found {type(found).__name__}")
        return found
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable {what}: {brief(error)}") from error


def find_result(folder: Path, origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a policy's folder or in its run's folder; None if there is none of this very policy."""
    folder = folder.resolve()
    for place in (folder, *folder.parents[2:3]):  # run/checkpoints/step_00005000/policy
        with contextlib.suppress(CheckpointError):
            return read_result(place / "result.json", origin)
    return None


def read_result(path: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Read a result as a run or `scripts/evaluate.py` writes it; CheckpointError for another policy's."""
    result = read_object(path, "result")
    own = result.get("policy")  # in the results of scripts/evaluate.py
    if not isinstance(own, dict):
        own = result | {"seed": result.get("training_seed")}
    found = _identity(own)
    for key, expected in _identity(origin).items():
        if found[key] != expected:
            raise CheckpointError(
                f"{path}: is another policy's: expected {key} {expected}, found {found[key]}"
            )
    return result


def _identity(origin: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one policy's provenance from another's."""
    data = origin.get("data")
    sha256 = data.get("sha256") if isinstance(data, Mapping) else None
    return {**{key: origin.get(key) for key in ("agent", "step", "seed")}, "dataset's sha256": sha256}


CARD = """\
---
{front}---

# {agent} on {task}

A {kind} policy for continuous control, trained with the Python library cpql.

```python
from cpql import Policy

policy = Policy.from_pretrained({name!r})
action, _ = policy.predict(observation)  # in the environment's bounds
```

## Evaluation

{evaluation}

## Where it comes from

{origin}

## Files

`config.json` and `model.safetensors` are all that acting needs; loading them unpickles nothing.
"""


def card(config: PolicyConfig, steps: int, result: Mapping[str, Any] | None, name: str) -> str:
    """A model card: what the policy is, its evaluation, and its provenance.

    Args:
        config: the policy's.
        steps: network evaluations for an action.
        result: an evaluation of this policy, or None.
        name: by which the example loads the policy, `owner/name` or a folder.

    Raises:
        CheckpointError: the result lacks something.
    """
    task, origin, kind = config.task, config.origin, config.actor.kind
    agent, data = str(origin.get("agent", "unknown")), origin.get("data")
    source = str(data.get("source")) if isinstance(data, Mapping) else "unknown"
    offline = [] if source == "online" else ["offline-reinforcement-learning"]
    tags = ["reinforcement-learning", *offline, f"{kind}-policy", agent, task.name]
    tags += [task.id] if task.id else []
    head: dict[str, Any] = {"library_name": "cpql", "pipeline_tag": "reinforcement-learning", "tags": tags}
    acting = {"candidates": config.candidates, "temperature": config.temperature, "sampling steps": steps}
    about = {"objective": getattr(config.actor, "objective", "none"), **acting, **origin}
    if source.startswith("embedded"):
        about["note"] = "self-collected data, not D4RL; scores on it belong in no table with D4RL scores"
    evaluation = "Not evaluated: there is no result of this very checkpoint."
    files = ""
    if result is not None and result.get("return_mean") is not None:
        try:
            evaluation = _block(summary(result)) + _block(
                _yaml({key: result[key] for key in ("seed", "versions")})
            )
            head["model-index"] = [{"name": f"{agent}-{task.name}", "results": [_entry(result)]}]
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # JSON of another form
            raise CheckpointError(
                f"the policy's result is damaged, or of another version of cpql: {brief(error)}"
            ) from error
        files = "`result.json` has the return of every episode.\n"
    texts = {"front": _yaml(head), "evaluation": evaluation, "origin": _block(_yaml(about))}
    return CARD.format(agent=agent, task=task.name, kind=kind, name=name, **texts) + files


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1_000)


def _block(text: str) -> str:
    """A block of code, which no text ends."""
    return textwrap.indent(text.rstrip() + "\n", "    ", lambda _: True)


def _entry(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as the Hub's index has it."""
    metrics = [("mean_reward", "mean_reward", f"{result['return_mean']:.2f} +/- {result['return_std']:.2f}")]
    if result.get("score") is not None:
        of, value = result["references"]["of"], round(result["score"], 2)
        if result.get("measure") == "success":
            metrics.append(("success_rate", f"{of} successes in percent", value))
        else:
            metrics.append(("normalized_score", f"{of}-normalised score", value))
    keys, environment = ("type", "name", "value", "verified"), str(result["environment"])
    return {
        "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
        "dataset": {"name": environment, "type": environment},
        "metrics": [dict(zip(keys, (*metric, False), strict=True)) for metric in metrics],
    }


def download(name: str) -> Path:
    """The folder of a commit's files, downloaded or in the Hub's cache; see `Policy.load`."""
    id, _, revision = name.removeprefix(PREFIX).partition("@")
    if not is_id(id) or (revision and not re.fullmatch(r"(?!.*\.\.)\w[\w./-]*", revision)):
        raise CheckpointError(f"{name}: expected {PREFIX}owner/name or {PREFIX}owner/name@revision")
    files = ["config.json", "model.safetensors", "result.json"]
    with _client(name) as hub:
        return Path(hub.snapshot_download(id, revision=revision or None, allow_patterns=files))


def upload(folder: Path, id: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Upload a folder's files, see `Policy.push_to_hub`."""
    with _client(PREFIX + id) as hub:
        api = hub.HfApi(token=token)
        url = api.create_repo(id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
        return str(url)


@contextlib.contextmanager
def _client(name: str) -> Iterator[Any]:
    """The Hub's client, which raises many kinds of errors."""
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError("the Hugging Face Hub needs a package: pip install 'cpql[hub]'") from None
    try:
        yield huggingface_hub
    except Exception as error:
        raise CheckpointError(f"{name}: {brief(error)}") from error
