"""Loads trained networks from checkpoints, without the target and without unpickling anything."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainkit.drafters.base import Drafter, load_kind
from trainkit.errors import UserError
from trainkit.models.adapter import AdapterShape
from trainkit.models.predictor import AcceptancePredictor
from trainkit.models.shape import TargetShape
from trainkit.modules.base import CHECKPOINT_KEY

Info = dict[str, Any]
"""About the run that wrote a checkpoint: `recipe`, `seed`, `metrics` (validation, by name), `data` (fingerprint), `tokenizer`
(folder) and `step`."""


def load_drafter(checkpoint: str | Path) -> tuple[Drafter, TargetShape, Info]:
    """The trained drafter of a DraftModule checkpoint in float32 on the CPU, the sizes of its target, and the run's info.

    Raises:
        UserError: it is not a checkpoint of a DraftModule.
    """
    values, saved = _read(checkpoint, "kind", "a drafter")
    shape = TargetShape.from_dict(saved["target"])
    drafter = load_kind(saved["kind"])(shape, **saved["config"])
    _load(drafter, values, "drafter.", checkpoint)
    return drafter.eval(), shape, saved["info"]


def load_language_model(checkpoint: str | Path) -> tuple[Any, Path, Info]:
    """The trained transformers model of a LanguageModule checkpoint, the folder of its tokenizer, and the run's info.

    Raises:
        UserError: it is not a checkpoint of a LanguageModule.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values, saved = _read(checkpoint, "model_config", "a language model")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**saved["model_config"]), dtype=torch.float32)
    _load(model, values, "lm.", checkpoint)
    return model.eval(), Path(saved["info"]["tokenizer"]), saved["info"]


@dataclass(frozen=True)
class Adapter:
    """The trained adapter of a JointModule checkpoint.

    Attributes:
        shape: Rank, scale and projections of the adapter.
        tensors: Weights of the adapter by name.
        target: Folder of the target during training.
        target_weights: Digest of the target's weights.
    """

    shape: AdapterShape
    tensors: dict[str, Any]
    target: Path
    target_weights: str


def load_adapter(checkpoint: str | Path) -> Adapter | None:
    """The target's adapter in a checkpoint; None if the target was frozen.

    Raises:
        UserError: it is not a checkpoint of trainkit.
    """
    values, saved = _read(checkpoint, "info", "a network")
    if "adapter" not in saved:
        return None
    shape = AdapterShape(**{**saved["adapter"], "modules": tuple(saved["adapter"]["modules"])})
    return Adapter(shape, _weights(values, "adapter."), Path(saved["info"]["target"]), saved["target_weights"])


def load_predictor(checkpoint: str | Path) -> tuple[AcceptancePredictor, dict[str, Any], Info]:
    """The trained predictor of a PredictorModule checkpoint in float32 on the CPU, its drafter's fingerprint, the run's info.

    Raises:
        UserError: it is not a checkpoint of a PredictorModule.
    """
    values, saved = _read(checkpoint, "predictor", "an acceptance predictor")
    predictor = AcceptancePredictor(**saved["predictor"])
    _load(predictor, values, "predictor.", checkpoint)
    return predictor.eval(), saved["drafter"], saved["info"]


def holds_predictor(checkpoint: str | Path) -> bool:
    """Whether this is a checkpoint for `load_predictor`.

    Raises:
        UserError: it is not a checkpoint of trainkit.
    """
    return "predictor" in _read(checkpoint, "info", "a network")[1]


def holds_language_model(checkpoint: str | Path) -> bool:
    """Whether this is a checkpoint for `load_language_model`.

    Raises:
        UserError: it is not a checkpoint of trainkit.
    """
    return "model_config" in _read(checkpoint, "info", "a network")[1]


def check_resumable(checkpoint: str | Path) -> None:
    """Checks that `fit` can resume from a checkpoint; the file is memory-mapped, so little of it is read.

    Folders of shards are not checked; the strategy that wrote them reads them.

    Raises:
        UserError: it is not a checkpoint of trainkit, or holds more than plain values and tensors.
    """
    if not Path(checkpoint).is_dir():
        _read(checkpoint, "info", "a network")


def _read(checkpoint: str | Path, key: str, content: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole checkpoint, and its description by trainkit, which must have `key`; `content` names the network in errors."""
    remedy = "give a last.ckpt or best.ckpt of a run"
    path = Path(checkpoint)
    if path.is_dir():
        raise UserError(
            f"{path}: a folder of shards; convert it to one file first (lightning.pytorch.utilities.consolidate_checkpoint)"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; {remedy}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint that loads with weights_only ({type(error).__name__}); {remedy}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"{path}: not a checkpoint, or truncated ({error.strerror}); {remedy}") from error
    saved = values.get(CHECKPOINT_KEY) if isinstance(values, dict) else None
    if not isinstance(saved, dict) or key not in saved:
        raise UserError(f"{path}: not a checkpoint of {content} trained by trainkit; {remedy}")
    if saved.get("format") != 1:
        raise UserError(
            f"{path}: checkpoint format {saved.get('format')}, this version reads format 1; use the trainkit that wrote it"
        )
    return values, saved


def _weights(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    tensors = values["state_dict"].items()
    return {name.removeprefix(prefix): value for name, value in tensors if name.startswith(prefix)}


def _load(network: torch.nn.Module, values: dict[str, Any], prefix: str, checkpoint: str | Path) -> None:
    try:
        network.load_state_dict(_weights(values, prefix))
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint}: its weights do not fit its own description ({' '.join(str(error).split())[:200]}); "
            "give another checkpoint of the run"
        ) from error
