"""What a user runs: numpy observations in, numpy actions in the environment's own bounds out."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load as unpacked
from safetensors.torch import save as packed
from torch import Tensor, nn

from cpql.actors import ACTORS, Actor
from cpql.critics import TwinCritic
from cpql.deploy import hub
from cpql.deploy.config import PolicyConfig
from cpql.deploy.fold import fold
from cpql.deploy.folded import LARGEST, FoldedPolicy
from cpql.device import choose_device
from cpql.errors import CheckpointError, ConfigError, brief
from cpql.io import aside
from cpql.migration import upgrade
from cpql.settings import build

__all__ = ["Policy", "PolicyConfig", "find_policy"]

FORMAT = 1
MOST_HEADER_BYTES = 1 << 20  # of the weights' file


class Policy:
    """A trained policy: `Policy.load("runs/...").predict(observation)`.

    Args:
        actor: any kind of actor, an ordinary module.
        critic: the twin critic that ranks candidates; None where the policy has none.
        config: see `PolicyConfig`.

    Attributes:
        actor: in evaluation mode. Make a new `Policy` after changing weights: `predict` keeps what it has
            derived from them.
        critic: likewise.
        config: as given.
        temperature: of the choice among candidates; may be changed at any time.
        folder: the folder it was loaded from, or None.
        device: the device of the actor's weights.
        generator: of the noise.
    """

    def __init__(self, actor: Actor, critic: TwinCritic | None, config: PolicyConfig) -> None:
        self.actor = actor.eval().requires_grad_(False)
        self.critic = None if critic is None else critic.eval().requires_grad_(False)
        self.config = config
        self.candidates, self.temperature = config.candidates, config.temperature
        self.folder: Path | None = None
        self.device = next(actor.parameters()).device
        self.generator = torch.Generator(self.device)
        self.generator.seed()

    @property
    def candidates(self) -> int:
        """How many actions compete by value; may be changed at any time. 1 is the actor alone.

        Raises:
            ConfigError: set above 1 where the policy has no critic.
        """
        return self._candidates

    @candidates.setter
    def candidates(self, count: int) -> None:
        if count > 1 and self.critic is None:
            raise ConfigError(f"candidates={count}: expected 1 for a policy without a critic")
        self._candidates = count

    def seed(self, seed: int) -> None:
        """Seed the policy's noise; a new policy's is seeded at random."""
        self.generator.manual_seed(seed)

    def normalise(self, observation: Tensor) -> Tensor:
        """The states [..., S] that actor and critic take, of observations [..., S] of the environment."""
        mean, std = (
            torch.tensor(values, dtype=observation.dtype, device=observation.device)
            for values in (self.config.observation_mean or 0.0, self.config.observation_std or 1.0)
        )
        return (observation - mean) / std

    @cached_property
    def folded(self) -> FoldedPolicy:
        """The policy as numpy arrays; `folded.with_rule` sets how it acts."""
        return fold(self.actor, self.critic, self.config)

    @cached_property
    def _tensors(self) -> FoldedPolicy:
        return self.folded.to(self.device)

    def predict(
        self,
        observation: ArrayLike,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[np.float32], None]:
        """Act, with Stable-Baselines3's contract.

        The actor's module acts, except where the folded form is faster: on one observation on a CPU, where
        numpy takes a quarter of the time, and in ranking candidates.

        Args:
            observation: [S] or [B, S].
            state: unused; the policy has no memory.
            episode_start: unused.
            deterministic: the same action for the same observation: from zero noise where the actor acts
                alone, else the best of candidates from one fixed noise.

        Returns:
            Actions in the environment's bounds, [A] or [B, A], and None.

        Raises:
            ValueError: the observation's width isn't the policy's.
        """
        array = np.asarray(observation, np.float32)
        if array.ndim not in (1, 2) or array.shape[-1] != self.config.state_dim:
            raise ValueError(
                f"observation: expected shape [{self.config.state_dim}] or [B, {self.config.state_dim}], "
                f"found {list(array.shape)}"
            )
        alone = self.candidates == 1 or not self.actor.draws
        action: NDArray[np.float32]
        if alone and array.ndim == 1 and self.device.type == "cpu":
            action = self.folded.sample(array, self._noise(deterministic).numpy())
            return self.folded.scale(action), None
        with torch.inference_mode():
            observations = torch.from_numpy(np.atleast_2d(array)).to(self.device)
            if alone:
                noise = self._noise(deterministic, len(observations))
                actions = self.actor.sample(self.normalise(observations), noise=noise)
                action = self.folded.scale(actions.cpu().numpy())
            else:
                action = self._best(observations, deterministic).cpu().numpy()
        return (action if array.ndim == 2 else action[0]), None

    def _noise(self, deterministic: bool, *batch: int) -> Tensor:
        shape = self.actor.noise_shape(*batch)
        if deterministic:
            return torch.zeros(shape, device=self.device)
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _best(self, observations: Tensor, deterministic: bool) -> Tensor:
        """Actions [B, A] by the candidates rule, in the environment's bounds."""
        batch, generator = len(observations), self.generator
        if deterministic:
            batch, generator = 1, torch.Generator(self.device).manual_seed(0)
        policy = self._tensors.with_rule(self.candidates, 0.0 if deterministic else self.temperature)
        drawn = {}
        for name, shape in policy.shapes(batch).items():
            draw = torch.rand if name == "uniform" else torch.randn
            drawn[name] = draw(shape, generator=generator, device=self.device)
        actions: Tensor = policy(observations, **drawn, xp=torch)
        return actions

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a new or empty folder, both or neither.

        `config.json` holds the SHA-256 of `model.safetensors`, by which `load` notices damage.

        Raises:
            CheckpointError: the folder isn't empty.
        """
        self._write(Path(folder))

    def _write(self, folder: Path, **others: str) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: expected a new folder or an empty one, found something in it")
        modules = (
            {"actor": self.actor} if self.critic is None else {"actor": self.actor, "critic": self.critic}
        )
        weights = nn.ModuleDict(modules).state_dict()
        model = packed({name: tensor.contiguous() for name, tensor in weights.items()})
        head = {"format": FORMAT, "sha256": hashlib.sha256(model).hexdigest()}
        others["config.json"] = json.dumps({**head, **asdict(self.config)}, indent=2, allow_nan=False) + "\n"
        with aside(folder) as temporary:
            temporary.mkdir()
            (temporary / "model.safetensors").write_bytes(model)
            for name, content in others.items():
                (temporary / name).write_text(content, encoding="utf-8")

    def save_pretrained(
        self, folder: str | Path, *, result: str | Path | None = None, name: str | None = None
    ) -> None:
        """Write what the Hub gets: the files of `save`, and a model card, `README.md`.

        Args:
            folder: a new or an empty one.
            result: an evaluation of this policy for the card, the JSON file of a run or of
                `scripts/evaluate.py`, which is copied to `result.json`. By default the result of the run
                that the policy was loaded from, if it belongs to this checkpoint.
            name: by which the card's example loads the policy; the folder's own by default.

        Raises:
            CheckpointError: the folder isn't empty, or the result belongs to another policy.
        """
        folder, origin, found = Path(folder), self.config.origin, None
        if result is not None:
            found = hub.read_result(Path(result), origin)
        elif self.folder is not None:
            found = hub.find_result(self.folder, origin)
        others = {"README.md": hub.card(self.config, self.actor.steps, found, name or folder.name)}
        if found is not None:
            others["result.json"] = json.dumps(found, indent=2, allow_nan=False)
        self._write(folder, **others)

    def push_to_hub(
        self,
        id: str,
        *,
        result: str | Path | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a cpql policy",
    ) -> str:
        """Upload what `save_pretrained` writes to a model repository on the Hugging Face Hub, as one commit.

        Args:
            id: the repository, `owner/name`; created if it doesn't exist.
            result: see `save_pretrained`.
            private: whether a new repository is private; by default as the owner has set.
            token: the Hub's; by default the one that `hf auth login` keeps.
            message: the commit's.

        Returns:
            The repository's URL.

        Raises:
            ConfigError: huggingface_hub isn't installed.
            CheckpointError: the Hub can't be reached or refuses, or the result belongs to another policy.
        """
        with tempfile.TemporaryDirectory() as holder:
            folder = Path(holder) / "policy"
            self.save_pretrained(folder, result=result, name=id)
            return hub.upload(folder, id, private=private, token=token, message=message)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> Policy:
        """Load a folder if there is one of this name, else the Hub's repository `owner/name`.

        Args:
            name: of the folder or the repository.
            revision: a branch, a tag or a commit of the repository; by default the newest of `main`.
            device: see `load`, as for errors.
        """
        if os.path.exists(name) or not hub.is_id(str(name)):
            if revision is not None:
                raise ConfigError(f"revision={revision}: {name} is a folder, which has none")
            return cls.load(name, device)
        return cls.load(f"{hub.PREFIX}{name}" + (f"@{revision}" if revision else ""), device)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Policy:
        """Read a policy from the folder of a run (its last checkpoint), of a checkpoint, or of a policy.

        The policy may come from a stranger. Nothing in it is unpickled or imported, and it can't make other
        files be opened. Memory is bounded by the length of its files, whatever sizes they state. Weights that
        are damaged or not finite are refused, as are weights whose actions aren't finite.

        Args:
            path: a folder, or `hf://owner/name[@revision]`, a repository on the Hub (branch, tag or commit).
            device: where the policy acts: cpu, cuda, or auto, which is a GPU if there is one.

        Raises:
            ConfigError: huggingface_hub isn't installed, or there is no such device.
            CheckpointError: there is no policy, or it can't be read.
        """
        device = choose_device(device)
        folder = find_policy(path)
        about, model = folder / "config.json", folder / "model.safetensors"
        content = hub.read_object(about, "policy")
        if content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{about}: not a policy of format {FORMAT}")
        sha256 = content.pop("sha256", None)  # older policies have none
        try:
            config = build(PolicyConfig, upgrade(content), str(about))
            with torch.device("meta"):  # shapes alone
                modules = _modules(config)
        except Exception as error:
            raise CheckpointError(f"{folder}: no readable policy: {brief(error)}") from error
        try:
            size, most = model.stat().st_size, sum(4 * each.numel() for each in modules.parameters())
            if size > most + MOST_HEADER_BYTES:
                raise ValueError(f"size mismatch: expected {most:,} bytes, by config.json, found {size:,}")
            weights = model.read_bytes()
            actual = hashlib.sha256(weights).hexdigest()
            if sha256 not in (None, actual):
                raise ValueError(
                    f"damaged, or another policy's: expected SHA-256 {str(sha256)[:64]}, by config.json, "
                    f"found {actual}"
                )
            modules.load_state_dict(unpacked(weights), assign=True)
            for name, tensor in modules.state_dict().items():
                if tensor.dtype != torch.float32 or not (tensor.abs() <= LARGEST).all():
                    raise ValueError(f"{name}: expected finite float32 of at most {LARGEST:g}, found others")
            actor, critic = (cast(Any, each) for each in (*modules.to(device).values(), None)[:2])
            fold(actor, None, config).check()
        except Exception as error:
            raise CheckpointError(f"{model}: no readable policy: {brief(error)}") from error
        policy = cls(actor, critic, config)
        policy.folder = folder
        return policy


def _modules(config: PolicyConfig) -> nn.ModuleDict:
    """Both networks, or one, under the names that they have in the weights' file."""
    dims = config.state_dim, config.action_dim
    modules = nn.ModuleDict({"actor": ACTORS[config.actor.kind](*dims, config.actor)})
    if config.critic_hidden:
        norm, activation = config.critic_layer_norm, config.critic_activation
        modules["critic"] = TwinCritic(*dims, config.critic_hidden, layer_norm=norm, activation=activation)
    return modules


def find_policy(name: str | Path) -> Path:
    """The policy's folder, given itself or a checkpoint's or run's folder; `hf://owner/name` is downloaded.

    Raises:
        ConfigError: huggingface_hub isn't installed.
        CheckpointError: there is no policy.
    """
    path = hub.download(name) if isinstance(name, str) and name.startswith(hub.PREFIX) else Path(name)
    for folder in (path, path / "policy", path / "last" / "policy", path / "checkpoints" / "last" / "policy"):
        # pathlib would raise for a name that is too long, or a folder that can't be opened.
        if os.path.isfile(folder / "config.json") and os.path.isfile(folder / "model.safetensors"):
            return folder
    found = "does not exist"
    if os.path.isdir(path):
        found = "holds no policy (policy/config.json and model.safetensors)"
    hint = f", or {hub.PREFIX}{name} for the Hub's" if hub.is_id(str(name)) else ""
    raise CheckpointError(f"{name}: {found}; give a run's folder or one of its checkpoints{hint}")
