"""All readers of a model folder agree with transformers on which files and tensors are its weights."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.equality import exact_logits
from tests.support.models import ragged_prompts
from tests.support.targets import make_target
from trainkit import errors
from trainkit.commands.import_drafter import import_outside
from trainkit.data.manifest import weights_digest
from trainkit.drafters.base import load_kind
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.load import load_decoder, read_config
from trainkit.models.target import FrozenTarget, load_model, target_shape
from trainkit.models.weights import EMBEDDING, HEAD, weight_files
from trainkit.runner import Runner


def edit_config(folder: Path, **fields) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.fixture
def wrongly_tied(tmp_path, seed) -> Path:
    """A target with a head and an embedding that differ, whose config.json says that they are one."""
    return edit_config(make_target(tmp_path / "target", tie_word_embeddings=False, seed=seed), tie_word_embeddings=True)


def theirs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits of transformers in float64."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()(torch.tensor([tokens])).logits[0]


def test_differing_head_is_used_by_every_reader(wrongly_tied):
    """Runner, frozen target, trained model and shape have the stored head, as transformers does."""
    tokens = torch.randint(0, 320, (40,)).tolist()
    logits = theirs(wrongly_tied, tokens)
    tolerance = 1e-4 * logits.abs().max()  # transformers' norms and rotary angles stay float32
    assert (exact_logits(load_decoder(wrongly_tied), tokens) - logits).abs().max() < tolerance
    target = FrozenTarget(wrongly_tied)
    positions = torch.arange(40)[None]
    hidden, _ = target.forward(torch.tensor([tokens]), positions, torch.zeros_like(positions))
    assert (target.handle().head(hidden)[0] - logits).abs().max() < tolerance
    head = load_file(wrongly_tied / "model.safetensors")[HEAD]
    ends = (FrozenTarget(wrongly_tied, layers=False)._head.weight, load_decoder(wrongly_tied, layers=False).head_weight)
    assert all(torch.equal(weight, head) for weight in ends)
    assert not target_shape(wrongly_tied).decoder.tied
    assert not load_model(wrongly_tied, torch.float32).config.tie_word_embeddings


@pytest.mark.parametrize("stored", ["both", "head", "embedding"])
def test_tied_model_may_store_head_embedding_or_both(stored, tmp_path, seed):
    """Equal tensors, or one alone, make a tied model, as in transformers."""
    folder = make_target(tmp_path, seed=seed)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    dropped = {"both": None, "head": EMBEDDING, "embedding": HEAD}[stored]
    save_file(
        {name: value for name, value in tensors.items() if name != dropped}, folder / "model.safetensors", {"format": "pt"}
    )
    tokens = torch.randint(0, 320, (40,)).tolist()
    logits = theirs(folder, tokens)
    decoder = load_decoder(folder)
    assert decoder.shape.tied and (exact_logits(decoder, tokens) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert torch.equal(load_decoder(folder, layers=False).head_weight, tensors[EMBEDDING])
    assert load_model(folder, torch.float32).config.tie_word_embeddings


def test_drafts_of_differing_head_serve_as_trained(wrongly_tied, tmp_path):
    """Kinds that copy the head of the target take the stored one, and their exports load in the runner."""
    head, embedding = (load_file(wrongly_tied / "model.safetensors")[name] for name in (HEAD, EMBEDDING))
    prompts = ragged_prompts(2, 320)
    for kind, copied in (("lm", "decoder.lm_head.weight"), ("eagle", "lm_head.weight"), ("medusa", "lm_heads.0.weight")):
        draft = load_kind(kind)(target_shape(wrongly_tied))
        draft.initialise(FrozenTarget(wrongly_tied))
        assert torch.equal(draft.state_dict()[copied], head)
        out = export_drafter(draft, tmp_path / kind, tokenizer=wrongly_tied)
        stored = load_file(out.path / "model.safetensors")
        assert kind != "eagle" or torch.equal(stored["embed_tokens.weight"], embedding)
        assert Runner.load(wrongly_tied, out.path, max_len=64).generate(prompts, max_new_tokens=4)
    assert not read_config(tmp_path / "lm").tie_word_embeddings
    draft = LMDraft(target_shape(wrongly_tied), init=str(wrongly_tied))
    draft.initialise(FrozenTarget(wrongly_tied))
    assert torch.equal(draft.decoder.head_weight, head)


def test_eagle_of_a_target_with_only_a_head_exports_it(tmp_path, seed):
    """A tied target may store its embedding under the head's name."""
    folder = make_target(tmp_path / "target", seed=seed)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    draft = load_kind("eagle")(target_shape(folder))
    draft.initialise(FrozenTarget(folder))
    out = export_drafter(draft, tmp_path / "out", tokenizer=folder)
    assert torch.equal(load_file(out.path / "model.safetensors")["embed_tokens.weight"], tensors[HEAD])


def test_update_of_a_tied_runner_refuses_another_head(tiny_target, seed):
    """A tied model takes either name; a head that differs from the embedding has no place in it."""
    runner = Runner.load(tiny_target, max_len=64)
    new = torch.randn(320, 64)
    runner.update([(HEAD, new)])
    assert torch.equal(runner.rounds.target.embed.weight, new)
    runner.update([(EMBEDDING, new), (HEAD, new)])
    with pytest.raises(UserError, match="lm_head.weight and model.embed_tokens.weight differ"):
        runner.update([(EMBEDDING, new), (HEAD, new + 1)])


@pytest.mark.parametrize("first", ["one file", "shards"])
def test_weight_files_are_those_that_transformers_reads(first, tmp_path, seed):
    """model.safetensors comes before the index of shards, whichever was written first."""
    folder = make_target(tmp_path / "target", seed=seed)
    other = AutoModelForCausalLM.from_pretrained(make_target(tmp_path / "other", seed=seed + 1))
    if first == "one file":
        other.save_pretrained(folder, max_shard_size="50KB")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        other.save_pretrained(folder, max_shard_size="50KB")
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file() and (folder / "model.safetensors.index.json").is_file()
    assert weight_files(folder) == [folder / "model.safetensors"]
    tokens = torch.randint(0, 320, (20,)).tolist()
    logits = theirs(folder, tokens)
    assert (exact_logits(load_decoder(folder), tokens) - logits).abs().max() < 1e-4 * logits.abs().max()
    before = weights_digest(folder)
    for shard in folder.glob("model-*.safetensors"):  # not read, so neither needed nor part of the digest
        shard.unlink()
    assert weights_digest(folder) == before


def test_weight_files_follow_index_config_and_pickles(tiny_target, tmp_path):
    """The files of an index, a file that config.json names, pickles only without safetensors, and nothing else."""
    AutoModelForCausalLM.from_pretrained(tiny_target).save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    for name in ("pytorch_model.bin", "training_args.bin", "other.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert len(shards) > 2 and weight_files(tmp_path) == shards
    edit_config(tmp_path, transformers_weights="other.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "other.safetensors"]
    for path in (*shards, tmp_path / "model.safetensors.index.json", tmp_path / "config.json"):
        path.unlink()
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").unlink()
    assert weight_files(tmp_path) == []


def test_weights_digest_sees_every_byte(tmp_path, seed):
    """One changed byte anywhere, or another name of a file, changes the digest."""
    content = bytearray(random.randbytes(1 << 20))
    (tmp_path / "model.safetensors").write_bytes(content)
    before = weights_digest(tmp_path)
    content[random.randrange(len(content))] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    changed = weights_digest(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert len({before, changed, weights_digest(tmp_path)}) == 3


def swap_tokens(folder: Path) -> Path:
    """Exchanges two tokens of a folder's tokenizer."""
    values = json.loads((folder / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def test_draft_with_another_tokenizer_gets_a_note(tiny_target, tmp_path, capsys):
    """The runner, an import and an initialisation from a folder say once how many ids have other tokens."""
    other = swap_tokens(make_target(tmp_path / "other", num_hidden_layers=1))
    same = make_target(tmp_path / "same", num_hidden_layers=1)
    values = json.loads((same / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}  # the ids stay
    (same / "tokenizer.json").write_text(json.dumps(values))
    uses = {
        "runner": lambda folder, number: Runner.load(tiny_target, folder, max_len=64),
        "import": lambda folder, number: import_outside(str(folder), str(tmp_path / number), target=str(tiny_target)),
        "init": lambda folder, number: LMDraft(target_shape(tiny_target), init=str(folder)).initialise(
            FrozenTarget(tiny_target)
        ),
    }
    for name, use in uses.items():
        errors.note.cache_clear()
        capsys.readouterr()
        for folder in (same, other, other):
            use(folder, f"{name}-{folder.name}")
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
        assert line.startswith(f"note: {other}: 2 of 320 token ids have other tokens"), name


def test_bundle_of_a_changed_target_gets_a_note(tiny_target, tmp_path, capsys):
    """The runner prints what `check_fit` notes."""
    export_drafter(LMDraft(target_shape(tiny_target), init="scratch"), tmp_path / "draft", tokenizer=tiny_target)
    target = edit_config(make_target(tmp_path / "target"), rms_norm_eps=1e-4)
    errors.note.cache_clear()
    Runner.load(target, tmp_path / "draft", max_len=64)
    assert "its config is not the one the bundle was made for" in capsys.readouterr().err
