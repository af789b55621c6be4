"""What a user runs: numpy observations in, numpy actions in the environment's own bounds out."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as packed
from torch import Tensor, nn

from cpql.actors import ActorConfig, ConsistencyActor, choose
from cpql.critics import TwinCritic
from cpql.deploy.export import fold, fold_critic
from cpql.deploy.folded import LARGEST, FoldedActor, FoldedCritic
from cpql.deploy.hub import (
    PREFIX,
    card,
    download,
    find_result,
    looks_like_an_id,
    one_line,
    read_object,
    read_result,
    upload,
)
from cpql.device import choose_device
from cpql.errors import CheckpointError, ConfigError
from cpql.io import sha256_of
from cpql.settings import Candidates, NonNegative, Width, Widths, build
from cpql.tasks import Task

__all__ = ["Policy", "PolicyConfig", "find_policy"]

FORMAT = 1
# A policy may be a stranger's, and it says itself how large it is.
MOST_HEADER_BYTES = 1 << 20
SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class PolicyConfig:
    """Everything but weights that acting needs, and where the policy came from.

    Attributes:
        state_dim: width of observations.
        action_dim: width of actions.
        action_low: the environment's lower bounds [A].
        action_high: its upper bounds [A], above the lower ones.
        observation_mean: subtracted from observations [S], empty where they are taken as they are.
        observation_std: what they are divided by then [S], above 0.
        actor: of the actor.
        critic_hidden: widths of the critic's layers.
        critic_layer_norm: whether the critic has LayerNorm.
        candidates: how many actions compete by their value when acting, 1 to 10,000; 1 is the actor alone.
        temperature: of that choice, 0 or more; 0 takes the best.
        task: what it was trained for.
        origin: agent, step, seed, versions and dataset: the policy's provenance.

    Raises:
        ConfigError: a number that isn't in its range, or lists that aren't as long as they have to be.
    """

    state_dim: Width
    action_dim: Width
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    actor: ActorConfig
    critic_hidden: Widths
    critic_layer_norm: bool
    candidates: Candidates
    temperature: NonNegative
    task: Task
    origin: dict[str, Any] = field(default_factory=dict)
    observation_mean: tuple[float, ...] = ()
    observation_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        normalised = self.state_dim if self.observation_mean or self.observation_std else 0
        for key, width, least in (
            ("action_low", self.action_dim, -LARGEST),
            ("action_high", self.action_dim, -LARGEST),
            ("observation_mean", normalised, -LARGEST),
            ("observation_std", normalised, SMALLEST),
        ):
            values = getattr(self, key)
            if len(values) != width:
                raise ConfigError(f"{key}: expected {width:,} values, found {len(values):,}")
            for value in values:
                if not least <= value <= LARGEST:
                    raise ConfigError(f"{key}: expected a number in [{least:g}, {LARGEST:g}], found {value}")
        for low, high in zip(self.action_low, self.action_high, strict=True):
            if not low < high:
                raise ConfigError(
                    f"action_low, action_high: expected the lower first, found {low} and {high}"
                )


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
        self.generator.seed()

    def seed(self, seed: int) -> None:
        """Start the policy's noise anew, the same for the same seed; a policy that has none draws its own."""
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
        """Write `config.json` and `model.safetensors` into a folder, which must not exist yet.

        `config.json` has the other's SHA-256, by which `load` notices damage.
        """
        folder = Path(folder)
        folder.mkdir(parents=True)
        weights = nn.ModuleDict({"actor": self.actor, "critic": self.critic}).state_dict()
        model = packed({k: v.contiguous() for k, v in weights.items()})
        head = {"format": FORMAT, "sha256": hashlib.sha256(model).hexdigest()}
        text = json.dumps({**head, **asdict(self.config)}, indent=2, allow_nan=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(model)

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
        (folder / "README.md").write_text(text, encoding="utf-8")
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
            ConfigError: huggingface_hub isn't installed, a folder was asked for a revision, or there is no
                such device.
            CheckpointError: there is no such policy, or it can't be read. Nothing is unpickled.
        """
        if os.path.exists(name) or not looks_like_an_id(str(name)):
            if revision is not None:
                raise ConfigError(f"revision={revision}: {name} is a folder, which has none")
            return cls.load(name, device)
        return cls.load(f"{PREFIX}{name}" + (f"@{revision}" if revision else ""), device)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Policy:
        """Read a policy from a run's folder (its last checkpoint), a checkpoint's, or a policy's.

        `hf://owner/name` is the Hub's repository, `hf://owner/name@revision` a branch, a tag or a commit of
        it; any other path is a file system's.

        The policy may be a stranger's. Nothing in it is unpickled or imported, and nothing else is opened on
        its word. The sizes that it states are compared with the file's before anything is allocated. Weights
        that are damaged or aren't finite are refused, as are those that give actions which aren't.

        Args:
            path: see above.
            device: where it acts: cpu, cuda, or auto, which is a GPU where there is one.

        Raises:
            ConfigError: huggingface_hub isn't installed, or there is no such device.
            CheckpointError: there is none, or it can't be read.
        """
        device = choose_device(device)
        folder = find_policy(path)
        about, model = folder / "config.json", folder / "model.safetensors"
        content = read_object(about, "policy")
        if content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{about}: not a policy of format {FORMAT}")
        sha256 = content.pop("sha256", None)  # older ones have none
        try:
            config = build(PolicyConfig, content, str(about))
            with torch.device("meta"):  # shapes alone
                actor = ConsistencyActor(config.state_dim, config.action_dim, config.actor)
                critic = TwinCritic(
                    config.state_dim,
                    config.action_dim,
                    config.critic_hidden,
                    layer_norm=config.critic_layer_norm,
                )
            both = nn.ModuleDict({"actor": actor, "critic": critic})
            shapes = {name: list(tensor.shape) for name, tensor in both.state_dict().items()}
            weights = _read_weights(model, shapes, sha256)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{folder}: no readable policy: {one_line(error)}") from error
        both.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
        policy = cls(actor, critic, config)
        policy.folder = folder
        _check_actions(policy)
        return policy


def _read_weights(path: Path, shapes: Mapping[str, list[int]], sha256: Any) -> dict[str, Tensor]:
    """Read a policy's weights, once it is clear that they are as many as they should be.

    Raises:
        CheckpointError: they are other ones, damaged, or not finite.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: no readable policy: a header of {length:,} bytes, "
            f"expected at most {MOST_HEADER_BYTES:,}"
        )
    with safe_open(path, "pt") as header:
        parts = {name: header.get_slice(name) for name in header.keys()}
        found = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in parts.items()}
    for name in sorted(shapes.keys() | found.keys()):
        wanted, there = (f"F32 {shapes[name]}" if name in shapes else None), found.get(name)
        if wanted != there:
            raise CheckpointError(
                f"{path}: size mismatch: expected {wanted or 'nothing'} as {name[:100]}, by config.json, "
                f"found {there or 'nothing'}"
            )
    if sha256 is not None:
        actual = sha256_of(path)
        if actual != sha256:
            raise CheckpointError(
                f"{path}: damaged, or another policy's: expected SHA-256 {str(sha256)[:64]}, by config.json, "
                f"found {actual}"
            )
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}  # no longer the file's
    for name, tensor in weights.items():
        if not tensor.abs().max() <= LARGEST:
            raise CheckpointError(
                f"{path}: {name}: expected finite numbers of at most {LARGEST:g}, found others"
            )
    return weights


def _check_actions(policy: Policy) -> None:
    """Refuse finite weights and settings whose products aren't.

    Raises:
        CheckpointError: some actions aren't finite.
    """
    try:
        with np.errstate(all="ignore"):
            finite = fold(policy).finite()
    except ArithmeticError:
        finite = False
    if not finite:
        raise CheckpointError(f"{policy.folder}: expected finite actions, found products that overflow")


def find_policy(name: str | Path) -> Path:
    """The policy's folder below a run, a checkpoint or itself; `hf://owner/name` is brought here first.

    Raises:
        ConfigError: huggingface_hub isn't installed.
        CheckpointError: there is none.
    """
    path = download(name) if isinstance(name, str) and name.startswith(PREFIX) else Path(name)
    for folder in (path, path / "policy", path / "last" / "policy", path / "checkpoints" / "last" / "policy"):
        # Where a name is too long or a folder closed, os.path says no, and pathlib raises.
        if os.path.isfile(folder / "config.json") and os.path.isfile(folder / "model.safetensors"):
            return folder
    kind = (
        "holds no policy (policy/config.json and model.safetensors)"
        if os.path.isdir(path)
        else "does not exist"
    )
    hint = "; give a run's folder or one of its checkpoints"
    if looks_like_an_id(str(name)):
        hint += f", or {PREFIX}{name} for the Hub's"
    raise CheckpointError(f"{name}: {kind}{hint}")
