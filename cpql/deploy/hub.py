"""Policies on the Hugging Face Hub: a policy's card, and its way up and down.

The only place that knows huggingface_hub, which is the extra `cpql[hub]`; the card needs nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from cpql.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from cpql.deploy.policy import PolicyConfig

__all__ = [
    "PREFIX",
    "card",
    "download",
    "find_result",
    "looks_like_an_id",
    "one_line",
    "read_object",
    "read_result",
    "upload",
]

PREFIX = "hf://"
MOST_JSON_BYTES = 4 << 20
MOST_NESTING = 32
FILES = ("config.json", "model.safetensors", "result.json")

T = TypeVar("T")


def looks_like_an_id(name: str) -> bool:
    """Whether a name could be a repository's, `owner/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def one_line(error: Exception) -> str:
    """What an error says, where a stranger may have had a say in it: in one line of a bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}..."


def find_result(folder: Path, origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a policy's folder or in that of its run; None where there is none of this very policy."""
    folder = folder.resolve()
    for place in (folder, *folder.parents[2:3]):  # run/checkpoints/step_00005000/policy
        path = place / "result.json"
        if path.is_file():
            result = read_object(path, "result")
            if _whose(result) == _identity(origin):
                return result
    return None


def read_result(path: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Read a result as a run (`result.json`) or `scripts/evaluate.py` writes it.

    Raises:
        CheckpointError: there is none, or it is another policy's.
    """
    result = read_object(path, "result")
    found, expected = _whose(result), _identity(origin)
    for key, value in expected.items():
        if found[key] != value:
            raise CheckpointError(f"{path}: is another policy's: expected {key} {value}, found {found[key]}")
    return result


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read an object from JSON, as `json.dumps(allow_nan=False)` writes it.

    Args:
        path: a file of at most 4 MiB, its values nested at most 32 deep.
        what: it is, for an error.

    Raises:
        CheckpointError: it can't be read, or is something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_JSON_BYTES + 1)
        if len(text) > MOST_JSON_BYTES:
            raise ValueError(f"expected at most {MOST_JSON_BYTES:,} bytes, found more")
        found = json.loads(text, parse_float=_finite, parse_constant=_finite)
        depth, level = 0, [found]
        while level:
            depth += 1
            inner = (value.values() if isinstance(value, dict) else value
                     for value in level if isinstance(value, dict | list))  # fmt: skip
            level = [each for values in inner for each in values]
        if depth > MOST_NESTING:
            raise ValueError(f"expected values nested at most {MOST_NESTING} deep, found {depth}")
        json.dumps(found, ensure_ascii=False).encode()  # half a character, "\\ud800", can't be printed
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no readable {what}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: no readable {what}: expected an object, found {type(found).__name__}")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers, found {text[:40]}")
    return number


def _identity(origin: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one trained policy from another."""
    found = {key: origin.get(key) for key in ("agent", "step", "seed")}
    data = origin.get("data")
    return found | {"dataset's sha256": data.get("sha256") if isinstance(data, Mapping) else None}


def _whose(result: dict[str, Any]) -> dict[str, Any]:
    """The same of the policy that a result belongs to."""
    policy = result.get("policy")
    return _identity(
        policy if isinstance(policy, Mapping) else result | {"seed": result.get("training_seed")}
    )


def card(config: PolicyConfig, result: Mapping[str, Any] | None, name: str) -> str:
    """A model card: what the policy is, what it was measured to do, and where it came from.

    It says only what the policy's provenance and the result say.

    Args:
        config: the policy's.
        result: a result of this policy; None where there is none.
        name: what to load it by, `owner/name` or a folder.

    Raises:
        CheckpointError: the result lacks something, or the policy's provenance is damaged.
    """
    task, origin = config.task, config.origin
    agent = str(origin.get("agent", "unknown"))
    measured = result is not None and result.get("return_mean") is not None
    data = origin.get("data")
    offline = not isinstance(data, Mapping) or data.get("source") != "online"
    tags = [
        "reinforcement-learning",
        *(["offline-reinforcement-learning"] if offline else []),
        "consistency-policy",
        agent,
        task.name,
    ]
    head: dict[str, Any] = {
        "library_name": "cpql",
        "pipeline_tag": "reinforcement-learning",
        "tags": [*tags, *([task.id] if task.id else [])],
    }
    lines = [
        f"# {agent} on {task.name}",
        "",
        "A consistency policy for continuous control, trained with the Python library cpql.",
        "",
        "```python",
        "from cpql import Policy",
        "",
        f"policy = Policy.from_pretrained({name!r})",
        "action, _ = policy.predict(observation)  # in the environment's bounds",
        "```",
        "",
        "## Evaluation",
        "",
    ]
    if measured:
        assert result is not None
        try:
            rows, metrics = _evaluation(result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # an old cpql's, or nobody's
            raise CheckpointError(
                f"the result has no {one_line(error)}: give one of scripts/evaluate.py by result=..."
            ) from error
        environment = str(result["environment"])
        head["model-index"] = [
            {
                "name": f"{agent}-{task.name}",
                "results": [
                    {
                        "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
                        "dataset": {"name": environment, "type": environment},
                        "metrics": metrics,
                    }
                ],
            }
        ]
        lines += _table(rows)
    else:
        lines.append("Not evaluated: no result was at hand for this very checkpoint.")
    try:
        provenance = _provenance(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the policy's origin is damaged: {one_line(error)}") from error
    lines += ["", "## Where it comes from", "", *_table(provenance)]
    lines += [
        "",
        "## Files",
        "",
        "`config.json` and `model.safetensors` are all that acting needs; loading them unpickles nothing.",
    ]
    if measured:
        lines.append("`result.json` has the return of every episode.")
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(lines) + "\n"


def _evaluation(result: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """A result as rows of a table, and as the metrics of a card's front matter."""
    low, high = result["return_interval"]
    rows = [
        (
            "return",
            f"{result['return_mean']:,.1f} ± {result['return_std']:,.1f} over {result['episodes']} episodes, "
            f"95% interval of the mean {low:,.1f} to {high:,.1f}",
        )
    ]
    metrics = [
        {
            "type": "mean_reward",
            "name": "mean_reward",
            "value": f"{result['return_mean']:.2f} +/- {result['return_std']:.2f}",
            "verified": False,
        }
    ]
    if result.get("score") is not None:
        references = result["references"]
        of = references["of"]
        low, high = result["score_interval"]
        rows.append(
            (
                f"score ({of}-normalised)",
                f"{result['score']:.1f}, 95% interval {low:.1f} to {high:.1f} "
                f"(0 is {references['random']:,.1f}, 100 is {references['expert']:,.1f})",
            )
        )
        name = f"{of}-normalised score"
        metrics.append(
            {"type": "normalized_score", "name": name, "value": round(result["score"], 2), "verified": False}
        )
    rows += [
        ("environment", str(result["environment"])),
        ("acting", str(result["rule"])),
        ("seed of the evaluation", str(result["seed"])),
        ("evaluated with", _versions(result["versions"])),
    ]
    if result.get("note"):
        rows.append(("note", str(result["note"])))
    return rows, metrics


def _provenance(config: PolicyConfig) -> list[tuple[str, str]]:
    origin, rule = config.origin, "the actor alone"
    if config.candidates > 1:
        rule = f"{config.candidates} candidates ranked by Q, temperature {config.temperature:g}"
    steps = 1 + len(config.actor.refinements)
    rows = [
        ("agent", str(origin.get("agent", "unknown"))),
        ("objective", config.actor.objective),
        ("acts by", f"{rule}, {steps} step{'s' if steps > 1 else ''}"),
        ("gradient steps", f"{origin['step']:,}" if "step" in origin else "unknown"),
        ("training seed", str(origin.get("seed", "unknown"))),
        ("trained with", _versions(origin["versions"]) if "versions" in origin else "unknown"),
    ]
    data = origin.get("data")
    if not data:
        return [*rows, ("data", "unknown")]
    source = f"{data['source']} {data['id']}, {data['transitions']:,} transitions"
    rows.append(("data", source))
    if data["source"].startswith("embedded"):
        rows.append(
            ("note", "collected by cpql itself, not D4RL's: its scores belong in no table with D4RL's")
        )
    if data.get("return_mean") is not None:
        rows.append(("the data's return", f"{data['return_mean']:,.1f} ± {data['return_std']:,.1f}"))
    rows.append(("the data's SHA-256", str(data["sha256"])))
    return rows


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(rows: list[tuple[str, str]]) -> list[str]:
    escaped = ((name, " ".join(value.replace("|", "\\|").split())) for name, value in rows)
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in escaped)]


def download(name: str) -> Path:
    """Bring a policy's files here, or find them in the Hub's cache on this machine.

    Args:
        name: `hf://owner/name`, or `hf://owner/name@revision` for a branch, a tag or a commit.

    Returns:
        The folder of one commit's files.

    Raises:
        ConfigError: huggingface_hub isn't installed.
        CheckpointError: it can't be had.
    """
    id, _, revision = name.removeprefix(PREFIX).partition("@")
    if not looks_like_an_id(id) or (revision and not re.fullmatch(r"(?!.*\.\.)\w[\w./-]*", revision)):
        raise CheckpointError(f"{name}: expected {PREFIX}owner/name or {PREFIX}owner/name@revision")
    hub = _client()
    return _asked(
        name,
        lambda: Path(hub.snapshot_download(id, revision=revision or None, allow_patterns=list(FILES))),
    )


def upload(folder: Path, id: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Put a folder's files into a model repository, which is made where it doesn't exist, as one commit.

    Returns:
        The repository's URL.

    Raises:
        ConfigError: huggingface_hub isn't installed.
        CheckpointError: the Hub can't be reached or refuses.
    """
    hub = _client()

    def act() -> str:
        api = hub.HfApi(token=token)
        url = api.create_repo(id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
        return str(url)

    return _asked(PREFIX + id, act)


def _client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError("the Hugging Face Hub needs a package: pip install 'cpql[hub]'") from None
    return huggingface_hub


def _asked(name: str, act: Callable[[], T]) -> T:
    """Ask the Hub, whose client has many kinds of errors."""
    try:
        return act()
    except Exception as error:
        raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from error
