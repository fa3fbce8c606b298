"""A language model that continues another: its head, end ids, settings and templates reach the exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.targets import make_target
from tests.support.training import fit, text_data
from trainkit.bundle import read
from trainkit.commands.export import export
from trainkit.errors import UserError
from trainkit.export.model import export_model
from trainkit.models.load import read_config
from trainkit.models.target import load_model, target_shape
from trainkit.modules.checkpoint import read_checkpoint
from trainkit.modules.language import LanguageModule

SAMPLING = {"temperature": 0.6, "top_p": 0.9, "do_sample": False}  # transformers refuses to save these, but reads them
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def continued(tmp_path_factory, chats) -> tuple[Path, LanguageModule, Path]:
    """A model folder, the module that continued it for two steps, and the export of its checkpoint.

    The folder has two end ids, neither of them the tokenizer's; a head that differs from the embedding although config.json
    calls the model tied; two chat templates in a folder of their own.
    """
    root = tmp_path_factory.mktemp("continued")
    folder = make_target(root / "model", tie_word_embeddings=False, rope_parameters=LLAMA3, eos_token_id=[5, 4], bos_token_id=7)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING | {"eos_token_id": [4, 6]}))
    (folder / "additional_chat_templates").mkdir()
    for name in ("tools", "thinking"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name}: {{{{ messages[0]['content'] }}}}")
    module = LanguageModule(folder=str(folder), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), warmup_steps=1)
    fit(module, text_data(chats, root, tokenizer=str(folder)), root, steps=2)
    export(str(root / "checkpoints" / "last.ckpt"), str(root / "out"))
    return folder, module, root / "out"


def test_export_computes_what_the_trained_model_computed(continued):
    """A head that differs from the embedding is trained, saved and exported as such."""
    _, module, out = continued
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        expected = module.lm.eval()(tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(tokens).logits, expected)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_export_has_all_end_ids_and_sampling_defaults(continued):
    """End ids of config, generation_config and tokenizer, other ids, and settings for sampling survive."""
    folder, _, out = continued
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [5, 4, 6, tokenizer.eos_token_id]
    generation = GenerationConfig.from_pretrained(out)
    assert read_config(out).eos_token_id == generation.eos_token_id == expected
    assert target_shape(out).end_ids == tuple(sorted(expected)) == target_shape(folder).end_ids
    assert (read_config(out).bos_token_id, read_config(out).pad_token_id) == (7, tokenizer.pad_token_id)
    assert {name: getattr(generation, name) for name in SAMPLING} == SAMPLING


def test_export_has_every_chat_template(continued):
    """The templates of additional_chat_templates render as in the continued folder, and the bundle lists them."""
    folder, _, out = continued
    chat = [{"role": "user", "content": "hello"}]
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, out))
    assert set(after.chat_template) == {"default", "tools", "thinking"}
    for name in after.chat_template:
        render = [part.apply_chat_template(chat, chat_template=name, tokenize=False) for part in (before, after)]
        assert render[0] == render[1] and "hello" in render[0]
    assert "additional_chat_templates/tools.jinja" in read(out).files


def test_new_model_ends_at_its_tokenizers_end_id(tiny_target, tmp_path):
    """One end id is written as a number, not as a list."""
    export_model(load_model(tiny_target, torch.float32), tmp_path / "out", tokenizer=tiny_target)
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_checkpoint_of_two_tensors_in_one_is_refused(continued, tmp_path):
    """A description that ties tensors which differ, as older versions wrote, gives no model that is neither of them."""
    folder = continued[0]
    saved = torch.load(folder.parent / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["trainkit"]["model_config"]["tie_word_embeddings"] is False
    saved["trainkit"]["model_config"]["tie_word_embeddings"] = True
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="embed_tokens.weight shares its storage"):
        read_checkpoint(tmp_path / "last.ckpt").language_model()


def test_export_whose_files_hold_other_weights_is_refused(tmp_path, monkeypatch):
    """Rows of the embedding that no compared logit reads are compared too."""
    target = make_target(tmp_path / "target", tie_word_embeddings=False)
    model = load_model(target, torch.float32)
    rows, save = model.get_input_embeddings().weight, type(model).save_pretrained
    original = rows.detach().clone()

    def spoiled(self, folder):
        read = torch.randint(320, (1, 16), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            rows[next(row for row in range(320) if row not in read)] += 1
            save(self, folder)
            rows.copy_(original)

    monkeypatch.setattr(type(model), "save_pretrained", spoiled)
    with pytest.raises(UserError, match="'model.embed_tokens.weight' of the reloaded files differs"):
        export_model(model, tmp_path / "out", tokenizer=target)
    assert not (tmp_path / "out").exists()
