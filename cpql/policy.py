"""What a user runs: numpy observations in, numpy actions in the environment's own bounds out."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cpql.actor import ActorConfig, ConsistencyActor, choose
from cpql.config import build
from cpql.critic import TwinCritic
from cpql.errors import CheckpointError, ConfigError
from cpql.export import fold, fold_critic
from cpql.folded import FoldedActor, FoldedCritic
from cpql.hub import PREFIX, card, download, find_result, looks_like_an_id, read_result, upload
from cpql.tasks import Task

__all__ = ["Policy", "PolicyConfig", "find_policy"]

FORMAT = 1


@dataclass(frozen=True)
class PolicyConfig:
    """Everything but weights that acting needs, and where the policy came from.

    Attributes:
        state_dim: width of observations.
        action_dim: width of actions.
        action_low: the environment's lower bounds.
        action_high: its upper bounds.
        observation_mean: subtracted from observations, empty where they are taken as they are.
        observation_std: what they are divided by then.
        actor: of the actor.
        critic_hidden: widths of the critic's layers.
        critic_layer_norm: whether the critic has LayerNorm.
        candidates: how many actions compete by their value when acting; 1 is the actor alone.
        temperature: of that choice.
        task: what it was trained for.
        origin: agent, step, seed, versions and dataset: the policy's provenance.
    """

    state_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    actor: ActorConfig
    critic_hidden: tuple[int, ...]
    critic_layer_norm: bool
    candidates: int
    temperature: float
    task: Task
    origin: dict[str, Any] = field(default_factory=dict)
    observation_mean: tuple[float, ...] = ()
    observation_std: tuple[float, ...] = ()


class Policy:
    """A trained policy: `Policy.load("runs/...").predict(observation)`.

    Attributes:
        actor: the consistency actor, an ordinary module; `predict` uses its weights as they were when it was
            first called.
        critic: the twin critic that ranks candidates; likewise.
        config: see `PolicyConfig`.
        candidates: may be changed at any time, as may `temperature`.
        folder: where it was loaded from; None where it wasn't.
    """

    def __init__(self, actor: ConsistencyActor, critic: TwinCritic, config: PolicyConfig) -> None:
        self.actor = actor.eval().requires_grad_(False)
        self.critic = critic.eval().requires_grad_(False)
        self.config = config
        self.candidates, self.temperature = config.candidates, config.temperature
        self.folder: Path | None = None
        self.device = next(actor.parameters()).device
        self.generator = torch.Generator(self.device)

    def seed(self, seed: int) -> None:
        """Start the policy's noise anew."""
        self.generator.manual_seed(seed)

    @cached_property
    def folded(self) -> FoldedActor:
        """The actor as a few products of numpy arrays, from its weights as they are when first asked for."""
        return fold(self)

    @cached_property
    def _program(self) -> FoldedActor:
        return self.folded.to(self.device)

    @cached_property
    def _ranking(self) -> FoldedCritic:
        return fold_critic(self).to(self.device)

    def predict(
        self,
        observation: ArrayLike,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[np.float32], None]:
        """Act, with Stable-Baselines3's contract.

        Args:
            observation: [S] or [B, S].
            state: unused; the policy has no memory.
            episode_start: unused.
            deterministic: the same action for the same observation: the actor alone starts from zero noise,
                the candidates come from one fixed noise and the best wins.

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
        if array.ndim == 1 and self.candidates == 1 and self.device.type == "cpu":
            # One observation is small work, for which torch takes longer than numpy.
            action: NDArray[np.float32] = self.folded(array, self._noise((), deterministic).numpy())
            return action, None
        with torch.inference_mode():
            actions = self._act(torch.from_numpy(np.atleast_2d(array)).to(self.device), deterministic)
        scaled = self.folded.scale(actions.cpu().numpy())
        return (scaled if array.ndim == 2 else scaled[0]), None

    def _noise(self, shape: tuple[int, ...], deterministic: bool) -> Tensor:
        shape = (self.actor.steps, *shape, self.config.action_dim)
        if deterministic:
            return torch.zeros(shape, device=self.device)
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _act(self, observations: Tensor, deterministic: bool) -> Tensor:
        """Actions [B, A] in [-1, 1] for observations [B, S] as the environment gives them."""
        if self.candidates == 1:
            noise = self._noise((len(observations),), deterministic)
            alone: Tensor = self._program.sample(observations, noise, torch)
            return alone
        generator, shape = self.generator, (len(observations), self.candidates)
        if deterministic:
            generator, shape = torch.Generator(self.device).manual_seed(0), (1, self.candidates)

        def sample(_: Tensor) -> Tensor:
            size = (self.actor.steps, *shape, self.config.action_dim)
            noise = torch.randn(size, generator=generator, device=self.device)
            # What all candidates of a state share is computed once.
            actions: Tensor = self._program.sample(observations.unsqueeze(-2), noise, torch)
            return actions

        return choose(
            sample,
            lambda observation, action: self._ranking(observation, action, torch),
            observations,
            candidates=self.candidates,
            temperature=0.0 if deterministic else self.temperature,
            generator=generator,
        )

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, which must not exist yet."""
        folder = Path(folder)
        folder.mkdir(parents=True)
        text = json.dumps({"format": FORMAT, **asdict(self.config)}, indent=2, allow_nan=False)
        (folder / "config.json").write_text(text + "\n")
        weights = nn.ModuleDict({"actor": self.actor, "critic": self.critic}).state_dict()
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")

    def save_pretrained(
        self, folder: str | Path, *, result: str | Path | None = None, name: str | None = None
    ) -> None:
        """Write what the Hub gets: what `save` writes, and a model card, `README.md`.

        Args:
            folder: where to; it must not exist yet, or be empty.
            result: an evaluation of this policy for the card, a JSON file of a run or of
                `scripts/evaluate.py`, which goes along as `result.json`. Where None, that of the run that
                the policy was loaded from, if it is of this very checkpoint.
            name: what the card says to load it by; the folder's own where None.

        Raises:
            CheckpointError: there is something in the folder, or the result is another policy's.
        """
        folder, origin = Path(folder), self.config.origin
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: expected a new folder or an empty one, found something in it")
        found = None
        if result is not None:
            found = read_result(Path(result), origin)
        elif self.folder is not None:
            found = find_result(self.folder, origin)
        text = card(self.config, found, name or folder.name)
        if folder.exists():
            folder.rmdir()
        self.save(folder)
        (folder / "README.md").write_text(text)
        if found is not None:
            (folder / "result.json").write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")

    def push_to_hub(
        self,
        id: str,
        *,
        result: str | Path | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a cpql policy",
    ) -> str:
        """Put what `save_pretrained` writes into a model repository on the Hugging Face Hub, as one commit.

        Args:
            id: the repository, `owner/name`; made where it doesn't exist.
            result: see `save_pretrained`.
            private: whether a new repository is private; None leaves it to the owner's setting.
            token: of the Hub; None takes the one that `hf auth login` keeps.
            message: of the commit.

        Returns:
            The repository's URL.

        Raises:
            ConfigError: huggingface_hub isn't installed.
            CheckpointError: the Hub can't be reached or refuses, or the result is another policy's.
        """
        with tempfile.TemporaryDirectory() as holder:
            folder = Path(holder) / "policy"
            self.save_pretrained(folder, result=result, name=id)
            return upload(folder, id, private=private, token=token, message=message)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> Policy:
        """`load`, of a folder where there is one of this name, else of the Hub's repository `owner/name`.

        Args:
            name: of either.
            revision: a branch, a tag or a commit of the repository; the newest of `main` where None.
            device: see `load`.

        Raises:
            ConfigError: huggingface_hub isn't installed, or a folder was asked for a revision.
            CheckpointError: there is no such policy, or it can't be read. Nothing is unpickled.
        """
        if Path(name).exists() or not looks_like_an_id(str(name)):
            if revision is not None:
                raise ConfigError(f"revision={revision}: {name} is a folder, which has none")
            return cls.load(name, device)
        return cls.load(f"{PREFIX}{name}" + (f"@{revision}" if revision else ""), device)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Policy:
        """Read a policy from a run's folder (its last checkpoint), a checkpoint's, or a policy's.

        `hf://owner/name` is the Hub's repository, `hf://owner/name@revision` a branch, a tag or a commit of
        it; any other path is a file system's.

        Raises:
            ConfigError: huggingface_hub isn't installed.
            CheckpointError: there is none, or it can't be read. Nothing is unpickled.
        """
        folder = find_policy(path)
        try:
            content = json.loads((folder / "config.json").read_text())
            if content.pop("format", None) != FORMAT:
                raise CheckpointError(f"{folder / 'config.json'}: not a policy of format {FORMAT}")
            config = build(PolicyConfig, content, str(folder / "config.json"))
            weights = load_file(folder / "model.safetensors", device=str(device))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder}: no readable policy: {error}") from error
        actor = ConsistencyActor(config.state_dim, config.action_dim, config.actor)
        critic = TwinCritic(
            config.state_dim, config.action_dim, config.critic_hidden, layer_norm=config.critic_layer_norm
        )
        both = nn.ModuleDict({"actor": actor, "critic": critic}).to(device)
        try:
            both.load_state_dict(weights)
        except RuntimeError as error:
            message = " ".join(str(error).split())
            raise CheckpointError(f"{folder / 'model.safetensors'}: {message}") from error
        policy = cls(actor, critic, config)
        policy.folder = folder
        return policy


def find_policy(name: str | Path) -> Path:
    """The policy's folder below a run, a checkpoint or itself; `hf://owner/name` is brought here first.

    Raises:
        ConfigError: huggingface_hub isn't installed.
        CheckpointError: there is none.
    """
    path = download(name) if isinstance(name, str) and name.startswith(PREFIX) else Path(name)
    for folder in (path, path / "policy", path / "last" / "policy", path / "checkpoints" / "last" / "policy"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    kind = "holds no policy (policy/config.json and model.safetensors)" if path.is_dir() else "does not exist"
    hint = "; give a run's folder or one of its checkpoints"
    if looks_like_an_id(str(name)):
        hint += f", or {PREFIX}{name} for the Hub's"
    raise CheckpointError(f"{name}: {kind}{hint}")
