"""Writes a language model (target or draft) as a plain Hugging Face folder with a trainkit.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainkit import bundle
from trainkit.errors import UserError
from trainkit.export.checks import check_finite, check_reload, copy_tokenizer, layout_for
from trainkit.files import write_json
from trainkit.models.load import rope_of_transformers4

FORMATS = {"native": "hf", "hf": "hf", "vllm": "hf", "sglang": "hf"}
"""Requested format -> layout of the files; transformers, vLLM and SGLang load the same folder."""


@torch.no_grad()
def export_model(
    model: Any,
    out: str | Path,
    *,
    tokenizer: str | Path,
    dtype: torch.dtype = torch.float32,
    format: str = "native",
    own_ids: bool = False,
    **card: Any,
) -> bundle.Bundle:
    """Writes a transformers model with its tokenizer as a bundle and returns it.

    The written model is reloaded, and its logits are compared, before anything is written to `out`.

    Args:
        model: A transformers causal LM on the CPU.
        out: Folder to write; a bundle there is replaced.
        tokenizer: Folder whose tokenizer files are copied.
        dtype: Dtype of the written weights.
        format: One of `FORMATS`.
        own_ids: Whether to write the model's own end, start and padding ids; otherwise the tokenizer's are written.
        card: `metrics`, `runner`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: weights that are not finite, a format that models do not have, no tokenizer, or `out` is something other than
            a bundle.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Refuse what cannot be exported, and cast
    layout = layout_for(format, FORMATS, "language model")
    check_finite(model.named_parameters())
    for value in model.parameters():  # not the buffers: rotary frequencies are float32 after a reload
        value.data = value.data.to(dtype)
    model.eval()

    # Write to a temporary folder, check it, and only then put it at `out`
    def write_files(folder: Path) -> None:
        copy_tokenizer(Path(tokenizer), folder)
        loaded = AutoTokenizer.from_pretrained(folder)
        if not own_ids:
            for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
                for config in (model.config, model.generation_config):
                    setattr(config, name, getattr(loaded, name))
        model.save_pretrained(folder)
        config = bundle.read_json(folder / "config.json")
        if "rope_theta" in (rope := config.get("rope_parameters") or {}):  # not one per layer type
            write_json(folder / "config.json", config | rope_of_transformers4(rope))
        result: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        reloaded, report = result[0].eval(), result[1]
        if faults := sorted(map(str, {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]})):
            raise UserError(f"{out}: tensor {faults[0]} would not reload; nothing was written, report this as a bug")
        tokens = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
        check_reload(model(tokens).logits, reloaded(tokens).logits, out)

    extra = {"format": format, "layout": layout}
    return bundle.write(out, write_files, kind="model", config={}, target={}, extra=extra, **card)
