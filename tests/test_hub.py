"""Policies to and from the Hub: on local folders, and against a server that speaks as much of its API."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cpql.actors.consistency import ActorConfig, ConsistencyActor
from cpql.critics import TwinCritic
from cpql.data.transitions import Provenance
from cpql.deploy import hub as hub_module
from cpql.deploy.policy import Policy, PolicyConfig
from cpql.errors import CheckpointError, ConfigError
from cpql.tasks import Task
from cpql.training.evaluation import Evaluation

TASK = Task("hopper-medium", "Hopper-v4", -20.272305, 3234.3)
DATA = Provenance(
    "embedded", "hopper-medium", "x.hdf5", "abc", 1_000, 3, 1294.35, 325.7, 296.4, 3196.4, 403.5
).to_dict()
ORIGIN = {"agent": "cpql", "step": 5_000, "seed": 3, "versions": {"torch": "2.13.0"}, "data": DATA}


def made(origin: dict[str, Any] = ORIGIN, task: Task = TASK) -> Policy:
    torch.manual_seed(0)
    actor = ConsistencyActor(5, 2, ActorConfig("ict", hidden=(8,), refinements=(0.8,)))
    config = PolicyConfig(
        5, 2, (-1.0, -2.0), (1.0, 2.0), actor.config, (8,), False, 1, 1.0, task, origin
    )  # fmt: skip
    return Policy(actor, TwinCritic(5, 2, (8,)), config)


def result(step: int = 5_000) -> dict[str, Any]:
    """A run's."""
    evaluation = Evaluation(TASK, (900.0, 1_100.0), (300, 320), 103, "actor alone, sampled, 2 steps")
    whose = {"task": TASK.name, "agent": "cpql", "training_seed": 3, "data": DATA}
    return {"checkpoint": "last", "evaluated": True, "step": step, **whose, **evaluation.to_dict()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder."""
    folder = tmp_path / "run"
    made().save(folder / "checkpoints" / "step_00005000" / "policy")
    (folder / "checkpoints" / "last").symlink_to("step_00005000")
    (folder / "result.json").write_text(json.dumps(result()))
    return folder


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def same(one: Policy, other: Policy) -> bool:
    observation = np.random.default_rng(0).normal(size=(20, 5))
    left, right = (p.predict(observation, deterministic=True)[0] for p in (one, other))
    return bool(np.array_equal(left, right)) and one.config == other.config


def test_a_runs_policy_and_its_card(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "card"
    Policy.load(run).save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "result.json",
    }
    assert same(Policy.from_pretrained(folder), made())
    head, text = read_card(folder)
    assert head["library_name"] == "cpql" and "Hopper-v4" in head["tags"] and "cpql" in head["tags"]
    (model,) = head["model-index"]
    (found,) = model["results"]
    assert found["dataset"] == {"name": "Hopper-v4", "type": "Hopper-v4"}
    assert {metric["type"]: metric["value"] for metric in found["metrics"]} == {
        "mean_reward": "1000.00 +/- 141.42",
        "normalized_score": 31.35,
    }
    assert "from_pretrained('card')" in text
    for part in (
        "    score 31.3 (95% interval",
        "return 1,000 ± 141 over 2 episodes of Hopper-v4",
        "actor alone, sampled, 2 steps",
        "    seed: 103\n",
        "    step: 5000\n",
        "    seed: 3\n",
        "      torch: 2.13.0\n",
        "      source: embedded\n",
        "      transitions: 1000\n",
        "self-collected data, not D4RL;",
        "      sha256: abc\n",
    ):
        assert part in text, part
    assert str(tmp_path) not in text


def test_a_card_claims_no_other_checkpoints_result(run: Path, tmp_path: Path) -> None:
    (run / "result.json").write_text(json.dumps(result(step=9_000)))
    policy = Policy.load(run)
    policy.save_pretrained(tmp_path / "a")
    made().save_pretrained(tmp_path / "b")  # it comes from no run
    for name in ("a", "b"):
        head, text = read_card(tmp_path / name)
        assert "model-index" not in head and "Not evaluated" in text
        assert not (tmp_path / name / "result.json").exists()
    with pytest.raises(CheckpointError, match="is another policy's: expected step 5000, found 9000"):
        policy.save_pretrained(tmp_path / "c", result=run / "result.json")
    with pytest.raises(CheckpointError, match="no readable result"):
        policy.save_pretrained(tmp_path / "c", result=tmp_path)
    (tmp_path / "old.json").write_text(json.dumps(result() | {"references": {}}))
    with pytest.raises(
        CheckpointError, match="the policy's result is damaged, or of another version of cpql: KeyError: 'of'"
    ):
        policy.save_pretrained(tmp_path / "c", result=tmp_path / "old.json")
    assert not (tmp_path / "c").exists()
    evaluated = {"task": TASK.name, "policy": ORIGIN, **result()}  # as evaluate.py writes it
    del evaluated["step"], evaluated["training_seed"], evaluated["agent"], evaluated["data"]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluated))
    policy.save_pretrained(tmp_path / "c", result=tmp_path / "evaluation.json")
    again = Policy.load(tmp_path / "c")
    again.save_pretrained(tmp_path / "d")
    for name in ("c", "d"):
        assert "model-index" in read_card(tmp_path / name)[0]


def test_a_card_of_little(tmp_path: Path) -> None:
    """No provenance, no environment, no references: nothing is made up."""
    made({}, Task("mine", None)).save_pretrained(tmp_path / "a")
    head, text = read_card(tmp_path / "a")
    assert head["tags"][-1] == "mine"
    assert "# unknown on mine" in text and "data:" not in text and "step:" not in text
    plain = replace(TASK, random_return=None, expert_return=None)
    evaluation = Evaluation(plain, (1.0, 2.0), (3, 3), 0, "actor alone")
    (tmp_path / "e.json").write_text(json.dumps({"policy": ORIGIN, **evaluation.to_dict()}))
    made(task=plain).save_pretrained(tmp_path / "b", result=tmp_path / "e.json")
    head, text = read_card(tmp_path / "b")
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["mean_reward"] and "score (" not in text


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    made().save_pretrained("mine")  # an empty one is as good as a new one
    with pytest.raises(CheckpointError, match="mine: expected a new folder or an empty one"):
        made().save_pretrained("mine")
    made().save_pretrained("owner/name")
    assert same(Policy.from_pretrained("owner/name"), made())  # a folder wins over the Hub
    with pytest.raises(ConfigError, match="revision=v1: owner/name is a folder, which has none"):
        Policy.from_pretrained("owner/name", revision="v1")
    with pytest.raises(
        CheckpointError, match=r"runs/hoper: does not exist; .* or hf://runs/hoper for the Hub's"
    ):
        Policy.load("runs/hoper")
    for load in (Policy.load, Policy.from_pretrained):
        with pytest.raises(CheckpointError, match="x: does not exist; give a run's folder"):
            load("x" * 5_000)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: made().push_to_hub("owner/name"), lambda: Policy.load("hf://owner/name")):
        with pytest.raises(ConfigError, match=r"pip install 'cpql\[hub\]'"):
            act()


@pytest.mark.parametrize(
    "name", ["../x", "owner", "owner/../x", "owner/name/x", "/etc/x", "owner/name@../x", "owner/name@a..b"]
)
def test_a_name_or_a_revision_is_no_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_client", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(CheckpointError, match="expected hf://owner/name or hf://owner/name@revision"):
        Policy.load(f"hf://{name}")


@dataclass
class Repository:
    """Commits by their ids, the last one the newest."""

    visibility: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's API as its client uses to make, fill and read a model repository."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": f"{code}: no such thing"}, 404, X_Error_Code=code)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        if self.headers["Authorization"] != "Bearer hf_made_up":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            id = f"{asked['organization']}/{asked['name']}"
            if id in self.server.repositories:
                return self.answer({"url": f"{self.server.url}/{id}"}, 409)
            self.server.repositories[id] = Repository(asked["visibility"])
            return self.answer({"url": f"{self.server.url}/{id}"})
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            return self.answer({"errors": [], "warnings": []} if yaml.safe_load(front) else {}, 200)
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        _, _, _, owner, name, what, _ = path.split("/")
        repository = self.server.repositories[f"{owner}/{name}"]
        if what == "preupload":
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        assert what == "commit"
        files = dict(list(repository.commits.values())[-1]) if repository.commits else {}
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                repository.messages.append(value["summary"])
            elif part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert part["key"] == "lfsFile"
                files[value["path"]] = self.server.large[value["oid"]]
        commit = hashlib.sha1(body).hexdigest()
        repository.commits[commit] = files
        self.answer({"commitUrl": f"{self.server.url}/{owner}/{name}/commit/{commit}", "commitOid": commit})

    def do_PUT(self) -> None:
        content, id = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == id
        self.server.large[id] = content
        self.answer({})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            return self.answer({"error": "Invalid credentials"}, 401)
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        owner, name, what, revision = parts[:4] if len(parts) > 2 else (*parts, "revision", "main")
        repository = self.server.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.missing("RepoNotFound")
        commit = list(repository.commits)[-1] if revision == "main" else revision
        if commit not in repository.commits:
            return self.missing("RevisionNotFound")
        files = repository.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.answer({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings})
        if what == "tree":
            return self.answer(
                [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in files.items()]
            )
        assert what == "resolve"
        if self.command == "GET":
            self.server.sent.append(parts[-1])
        content = files[parts[-1]]
        self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
import numpy as np
from cpql import Policy
from cpql.errors import CpqlError
from cpql.deploy.hub import download

policy = Policy.load("run")
try:
    policy.push_to_hub("owner/name", token="wrong")
except CpqlError as error:
    print("refused:", error)
print(policy.push_to_hub("owner/name", private=True, token="hf_made_up"))
first = download("hf://owner/name").name
observation = np.random.default_rng(0).normal(size=(20, 5))
assert np.array_equal(*(p.predict(observation, deterministic=True)[0] for p in (policy, Policy.load("hf://owner/name"))))
policy.actor.mlp.layers[0].bias.data += 1.0
policy.push_to_hub("owner/name", token="hf_made_up", message="Another bias")
for name, revision in (("owner/name", None), ("owner/name", first)):
    found = Policy.from_pretrained(name, revision=revision)
    print((found.actor.mlp.layers[0].bias - policy.actor.mlp.layers[0].bias).abs().max().item())
    assert found.config == policy.config
found.save_pretrained("again")
for name in ("hf://owner/nothing", "hf://owner/name@v9", "hf://no good/name"):
    try:
        Policy.load(name)
    except CpqlError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_there_and_back(run: Path, hub: Hub, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",  # the Hub's newer storage speaks a protocol of its own
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", SCRIPT]

    def act(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    done = act(command)
    assert done.returncode == 0, done.stderr
    refused, url, moved, before, *errors = done.stdout.splitlines()
    assert refused.startswith("refused: hf://owner/name: ") and "401" in refused
    assert url == f"{hub.url}/owner/name" and (float(moved), float(before)) == (0.0, 1.0)
    assert [line.split(": ")[1] for line in errors] == [
        "hf://owner/nothing", "hf://owner/name@v9", "hf://no good/name"
    ]  # fmt: skip
    repository = hub.repositories["owner/name"]
    assert repository.visibility == "private" and repository.messages == [
        "Upload a cpql policy",
        "Another bias",
    ]
    (files, _) = repository.commits.values()
    assert set(files) == {"config.json", "model.safetensors", "README.md", "result.json"}
    assert b"from_pretrained('owner/name')" in files["README.md"] and b"mean_reward" in files["README.md"]
    assert "README.md" not in hub.sent  # nothing is fetched that acting doesn't need
    assert "model-index" in read_card(tmp_path / "again")[0]  # the result came along
    script = str(Path(__file__).parent.parent / "scripts" / "export.py")
    environment["HF_HUB_OFFLINE"] = "1"  # what was fetched once is there without the Hub
    done = act([sys.executable, script, "checkpoint=hf://owner/name", "format=numpy"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "policy.npz" and (tmp_path / "policy.npz").is_file()
    done = act([sys.executable, script, "checkpoint=hf://owner/other"])
    assert done.returncode == 1 and "hf://owner/other: " in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
