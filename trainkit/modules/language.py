"""Pretrains or fine-tunes a causal language model by cross entropy: small targets and draft models."""

# B batch  T positions  N counted tokens  D hidden

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from trainkit.errors import UserError, first_lines
from trainkit.losses.divergence import CrossEntropy
from trainkit.losses.output import LossOutput
from trainkit.models.documents import crosses_documents, run_documents_separately
from trainkit.models.load import read_config, read_tokenizer
from trainkit.models.target import check_head, load_model
from trainkit.modules.base import CHECKPOINT_KEY, Batch, TrainingModule
from trainkit.modules.checkpoint import describe_config
from trainkit.modules.meter import means
from trainkit.modules.text_data import TextData


class LanguageModule(TrainingModule):
    """Trains a Hugging Face causal LM by next-token cross entropy on the counted tokens.

    Args:
        config: Fields of a transformers config, including `model_type`, for a model with random weights. The vocabulary size
            and the special token ids default to those of the tokenizer.
        folder: Folder of a model to continue training, instead of `config`.
        **optim: As in `TrainingModule`.
    """

    data_class = TextData
    data: TextData

    def __init__(self, config: dict[str, Any] | None = None, folder: str | None = None, **optim: Any) -> None:
        super().__init__(**optim)
        if (config is None) == (folder is None):
            raise UserError("model: give either config (a new model) or folder (a model to continue training)")
        if config is not None and "model_type" not in config:
            raise UserError("model.config: model_type is missing; add it (llama, qwen3, ...)")
        self.config, self.folder, self.tokenizer_folder = config, folder, folder
        self.divergence = CrossEntropy()
        self.lm: Any = None

    def trained(self) -> list[tuple[nn.Module, float]]:
        return [(self.lm, 1.0)]

    def configure_model(self) -> None:
        if self.lm is None:
            self.lm = self._build()
            self.data.check_fits(self.lm.config.vocab_size, getattr(self.lm.config, "max_position_embeddings", 1 << 60))
            check_head(self.lm.eval(), self.folder or "model.config")
            self._one_document_per_row = crosses_documents(self.lm.base_model, self.folder or "model.config")
            self.lm.train()

    def describe(self) -> dict[str, Any]:
        return {"model_config": describe_config(self.lm.config)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["info"]["generation_config"] = self.lm.generation_config.to_diff_dict()

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        tokens_BT, document_BT = batch["tokens_BT"], batch["document_BT"]
        if self._one_document_per_row:
            hidden_BTD = run_documents_separately(self._hidden, tokens_BT, document_BT)
        else:
            hidden_BTD = self._hidden(tokens_BT, batch["positions_BT"])
        counted_BT = batch["mask_BT"][:, 1:] & (document_BT[:, 1:] == document_BT[:, :-1]) & (document_BT[:, 1:] >= 0)
        hidden_ND = hidden_BTD[:, :-1][counted_BT]
        head = self.lm.get_output_embeddings()
        return self.divergence(hidden_ND, head, hidden_ND, None, labels_N=tokens_BT[:, 1:][counted_BT])

    def _hidden(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        # transformers separates packed documents by their position ids only without a cache and without an attention mask.
        return self.lm.base_model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).last_hidden_state

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        values = means(sums)
        return values | {"perplexity": torch.tensor(values["loss"]).exp().item()}

    def _build(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer = read_tokenizer(self.data_tokenizer())
        if self.folder is not None:
            read_config(self.folder)  # raises the UserErrors of a broken folder
            model = load_model(self.folder, torch.float32)
        else:
            assert self.config is not None
            ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
            fields = {"vocab_size": len(tokenizer)} | ids | self.config
            try:
                config = AutoConfig.for_model(str(fields.pop("model_type")), **fields)
            except (ValueError, TypeError, StrictDataclassError) as error:
                raise UserError(f"model.config: {first_lines(error)}; fix it") from error
            # A config object accepts any field, so compare with the fields of a default one.
            default = type(config)()
            unknown = [name for name in self.config if not hasattr(default, name)]
            if unknown:
                raise UserError(
                    f"model.config: model_type {self.config['model_type']!r} has no field {unknown[0]!r}; remove or correct it"
                )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if model.config.vocab_size < len(tokenizer):
            raise UserError(
                f"model.config: vocab_size {model.config.vocab_size} is smaller than that of the tokenizer, {len(tokenizer)}; "
                "raise it or leave it out"
            )
        return model
