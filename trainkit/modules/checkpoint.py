"""Reads training checkpoints, without the target and without unpickling anything."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainkit.drafters.base import Drafter, load_kind
from trainkit.errors import UserError
from trainkit.models.adapter import AdapterShape
from trainkit.models.predictor import AcceptancePredictor
from trainkit.models.shape import TargetShape
from trainkit.modules.base import CHECKPOINT_KEY

COMPRESSION_KEY, POLICY_KEY = f"{CHECKPOINT_KEY}_compression", f"{CHECKPOINT_KEY}_policy"
REMEDY = "give a last.ckpt or best.ckpt of a run"
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a training run. Its networks are built in float32 on the CPU.

    Attributes:
        path: File of the checkpoint.
        description: Values that rebuild the network, from `TrainingModule.describe`.
        info: About the run: `module` (class name), `recipe`, `seed`, `step`, `metrics` (validation, by name), `data`
            (fingerprint), `tokenizer` (folder) and, for a drafter, `target` (folder), for a language model `generation_config`,
            for an RL run `target` and `policy` (algorithm, rewards).
        weights: Trained weights by name, all networks together.
        compression: State of the compression, with its masks; empty if the run had none.
        refresh: State of the refreshed drafter of an RL run; empty if there is none.
    """

    path: Path
    description: dict[str, Any]
    info: dict[str, Any]
    weights: dict[str, Tensor]
    compression: dict[str, Any] = field(default_factory=dict)
    refresh: dict[str, Any] = field(default_factory=dict)

    def drafter(self) -> Drafter:
        """The trained drafter. Raises UserError if the run trained none."""
        build = lambda saved: load_kind(saved["kind"])(TargetShape.from_dict(saved["target"]), **saved["config"])
        return self._network("drafter", "kind", "drafter.", build)

    def language_model(self) -> Any:
        """The trained transformers model. Raises UserError if the run trained none."""
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        config = lambda saved: AutoConfig.for_model(**saved["model_config"])
        build = lambda saved: AutoModelForCausalLM.from_config(config(saved), dtype=torch.float32)
        model = self._network("language model", "model_config", "lm.", build)
        if generation := self.info.get("generation_config"):
            model.generation_config = GenerationConfig.from_dict(generation)
        return model

    def predictor(self) -> AcceptancePredictor:
        """The trained acceptance predictor. Raises UserError if the run trained none."""
        build = lambda saved: AcceptancePredictor(**saved["predictor"])
        return self._network("acceptance predictor", "predictor", "predictor.", build)

    def adapter(self) -> tuple[AdapterShape, dict[str, Tensor]] | None:
        """Sizes and weights of the target's adapter; None if the target was frozen."""
        saved = self.description.get("adapter")
        return saved and (AdapterShape(**{**saved, "modules": tuple(saved["modules"])}), self._weights("adapter."))

    def policy(self) -> dict[str, Any] | None:
        """How RL trained the model, by name; None if the run was none of PolicyModule."""
        return self.info.get("policy")

    def _weights(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}

    def _network(self, content: str, key: str, prefix: str, build: Callable[[dict[str, Any]], Network]) -> Network:
        """The network whose weights have names with `prefix`; `key` is in the description of a run that trained one."""
        if key not in self.description:
            raise UserError(f"{self.path}: holds no trained {content}; {REMEDY} that trained one")
        network, weights = build(self.description), self._weights(prefix)
        try:
            network.load_state_dict(weights)
            for name, value in network.state_dict().items():
                if not torch.allclose(value, weights[name].to(value), rtol=0, atol=0, equal_nan=True):
                    raise RuntimeError(f"{name} shares its storage with a tensor of another value")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.path}: its weights do not fit its own description ({reason}); give another checkpoint of the run"
            ) from error
        return network.eval()


def describe_config(config: Any) -> dict[str, Any]:
    """The fields of a transformers config that rebuild a model, for `TrainingModule.describe`."""
    left_out = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")  # depend on the library or the machine
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def read_checkpoint(checkpoint: str | Path) -> Checkpoint:
    """The content of a checkpoint; tensors are memory-mapped, so that little of the file is read.

    Raises:
        UserError: not a checkpoint of trainkit in one file, or one with more than plain values and tensors.
    """
    path = Path(checkpoint)
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; {REMEDY}, or convert a folder of shards to one file first "
            "(lightning.pytorch.utilities.consolidate_checkpoint)"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; {REMEDY}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint that loads with weights_only ({type(error).__name__}); {REMEDY}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"{path}: not a checkpoint, or truncated ({error.strerror}); {REMEDY}") from error
    saved = values.get(CHECKPOINT_KEY) if isinstance(values, dict) else None
    if not isinstance(saved, dict) or "info" not in saved:
        raise UserError(f"{path}: not a checkpoint of trainkit; {REMEDY}")
    if saved.get("format") != 1:
        raise UserError(
            f"{path}: checkpoint format {saved.get('format')}, this version reads format 1; use the trainkit that wrote it"
        )
    description = {name: value for name, value in saved.items() if name not in ("format", "info")}
    more = values.get(COMPRESSION_KEY, {}), values.get(POLICY_KEY, {}).get("refresh", {})
    return Checkpoint(path, description, saved["info"], values["state_dict"], *more)
