"""Tiny random targets for tests: real Hugging Face folders, with weights wide enough that their distributions are not flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{%- else -%}<|{{ message['role'] }}|>{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
# Qwen2's tokenizer class adds <|endoftext|> where it is missing, one past the vocabulary.
SPECIALS = ["<|end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"]
_CORPUS = """Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.
How many clips did she sell altogether? In May she sold 48 / 2 = 24 clips. Altogether she sold 48 + 24 = 72 clips."""


def make_tokenizer(vocab_size: int = 320) -> Any:
    """A byte-level BPE tokenizer of exactly `vocab_size` (at least 261) tokens; any text comes back as it went in."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [_CORPUS],
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),  # type: ignore[call-arg]
    )
    core.add_special_tokens([f"<|reserved_{i}|>" for i in range(vocab_size - core.get_vocab_size())])
    assert core.get_vocab_size() == vocab_size
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_target(folder: Path | str, model_type: str = "llama", *, seed: int = 0, std: float = 0.25, **overrides: Any) -> Path:
    """Writes a tiny float32 target with its tokenizer into `folder`, and returns the folder.

    Args:
        folder: Where to write.
        model_type: llama, mistral, qwen2 or qwen3 (any that Hugging Face's AutoConfig knows with the usual field names).
        seed: Of the weights; the caller's random state is left alone.
        std: Of the weights. Norms and biases are drawn too, so that a forgotten one shows.
        **overrides: Config fields, such as `num_hidden_layers`, `vocab_size`, `tie_word_embeddings`, `rope_parameters`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(overrides.get("vocab_size", 320))
    values: dict[str, Any] = (
        {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | ({"sliding_window": None} if model_type == "mistral" else {})
        | overrides
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight"):
                    weight.normal_(1.0, 0.2)
                else:
                    weight.normal_(0.0, std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
