"""Export formats: the files of a kind match those that other programs expect, tensor by tensor, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.drafters import VARIANTS
from tests.support.targets import make_target
from trainkit import bundle
from trainkit.drafters.base import Drafter, load_bundle, load_kind
from trainkit.drafters.lm import LMDraft
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter, first_logits
from trainkit.export.model import FORMATS, export_model
from trainkit.models.load import hf_shapes, read_config, read_tokenizer
from trainkit.models.target import FrozenTarget, load_model, target_shape

Tensors = dict[str, Tensor]
OFFERED = [(name, format) for name, (kind, _) in VARIANTS.items() for format in load_kind(kind).formats]


def build(kind: str, target: Path, **options) -> Drafter:
    drafter = load_kind(kind)(target_shape(target), **options)
    drafter.initialise(FrozenTarget(target))
    return drafter


@pytest.mark.parametrize(("variant", "format"), OFFERED, ids=str)
def test_every_format_has_its_shapes_and_loads(variant, format, tiny_target, tmp_path, seed):
    """Every format of every kind has the promised tensor shapes and loads with equal logits."""
    kind, options = VARIANTS[variant]
    drafter = build(kind, tiny_target, **options)
    out = export_drafter(drafter, tmp_path / "out", tokenizer=tiny_target, format=format)
    again = load_bundle(bundle.read(out.path), target_shape(tiny_target))
    assert torch.equal(first_logits(again), first_logits(drafter))
    shapes = drafter.layout_shapes(drafter.formats[format])
    assert (out.extra["format"], out.extra["layout"]) == (format, "native" if shapes is None else drafter.formats[format])
    if shapes is not None:
        written = load_file(out.path / "model.safetensors")
        assert {name: tuple(value.shape) for name, value in written.items()} == dict(shapes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_draft_model_shapes_equal_transformers(model_type, tied, tmp_path):
    """A draft model is written as the class with its biases and norms; the table has that class's parameters."""
    target = make_target(tmp_path / "target", model_type, num_hidden_layers=2, tie_word_embeddings=tied)
    drafter = LMDraft(target_shape(target), num_layers=2)
    export_drafter(drafter, tmp_path / "out", tokenizer=target, format="vllm")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    assert hf_shapes(drafter.decoder.shape) == {name: tuple(value.shape) for name, value in theirs.named_parameters()}


@pytest.mark.parametrize("ids", [None, [0, 2, 5]])
def test_medusa_shapes_equal_vllm(ids, tiny_target):
    """As vLLM 0.32 names them; the sizes are those of the target (64 wide, 320 ids), or of the draft vocabulary."""
    table = {
        "blocks.0.layers.0.weight": (64, 64),
        "blocks.0.layers.1.weight": (64, 64),
        "blocks.0.layers.0.bias": (64,),
        "blocks.0.layers.1.bias": (64,),
        "lm_heads.0.weight": (320, 64),
    }
    drafter = Medusa(target_shape(tiny_target), num_heads=1, num_layers=2, draft_vocab=ids)
    trimmed = {"lm_heads.0.weight": (3, 64), "token_map": (3,)}
    assert drafter.layout_shapes("vllm") == (table if ids is None else table | trimmed)


def misshapen(tensors: Tensors) -> Tensors:
    name = next(name for name, value in tensors.items() if value.dim() == 2)
    return tensors | {name: tensors[name][:-1].clone()}


def first(tensors: Tensors) -> str:
    return sorted(tensors)[0]


FAULTS = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != first(t)}, "is missing"),
    "renamed": (lambda t: {("x." + n if n == first(t) else n): v for n, v in t.items()}, "is missing"),
    "misshapen": (misshapen, "the format requires"),
    "transposed": (lambda t: {n: v.T.contiguous() if v.dim() == 2 else v for n, v in t.items()}, "the format requires"),
    "extra": (lambda t: t | {"rotary.inv_freq": torch.ones(3)}, "'rotary.inv_freq' is not part of the format"),
    "dtype": (lambda t: t | {first(t): t[first(t)].half()}, "is F16, not F32"),
    "an index for weights": (lambda t: t | {"lm_heads.0.weight": t["lm_heads.0.weight"].long()}, "is I64, not F32"),
}


@pytest.mark.parametrize(
    ("kind", "fault"), [(k, f) for k in ("lm", "medusa") for f in FAULTS if k == "medusa" or f != "an index for weights"]
)
def test_faulty_export_is_refused(fault, kind, tiny_target, tmp_path, monkeypatch):
    """A kind that writes faulty tensors cannot export, and nothing is changed on disk."""
    drafter, out = build(kind, tiny_target), tmp_path / "out"
    spoil, message = FAULTS[fault]
    export = type(drafter).export

    def spoiled(self, folder, dtype, layout):
        export(self, folder, dtype, layout)
        save_file(spoil(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    before = export_drafter(drafter, tmp_path / "old", tokenizer=tiny_target)
    monkeypatch.setattr(type(drafter), "export", spoiled)
    with pytest.raises(UserError, match=message) as caught:
        export_drafter(drafter, out, tokenizer=tiny_target)
    assert "\n" not in str(caught.value) and "nothing was written" in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "old"], "nothing exists at out or beside it"
    with pytest.raises(UserError, match=message):
        export_drafter(drafter, tmp_path / "old", tokenizer=tiny_target)
    assert bundle.read(tmp_path / "old").files == before.files, "the old bundle is unchanged"


def test_second_weight_file_is_refused(tiny_target, tmp_path, monkeypatch):
    """Other programs read every safetensors file of a folder."""
    drafter, export = build("medusa", tiny_target), Medusa.export

    def doubled(self, folder, dtype, layout):
        export(self, folder, dtype, layout)
        save_file({"more": torch.ones(1)}, folder / "more.safetensors")

    monkeypatch.setattr(Medusa, "export", doubled)
    with pytest.raises(UserError, match=r"'more.safetensors' is not part of the format"):
        export_drafter(drafter, tmp_path / "out", tokenizer=tiny_target)
    assert not (tmp_path / "out").exists()


def test_incomplete_model_export_is_refused(tiny_target, tmp_path, monkeypatch):
    """transformers loads a folder with a missing or an additional tensor and only logs it."""
    model = load_model(tiny_target, torch.float32)
    save = type(model).save_pretrained
    for spoil in (lambda t: {n: v for n, v in t.items() if n != first(t)}, lambda t: t | {"x": torch.ones(1)}):

        def spoiled(self, folder, spoil=spoil):
            save(self, folder)
            save_file(spoil(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

        monkeypatch.setattr(type(model), "save_pretrained", spoiled)
        with pytest.raises(UserError, match="nothing was written"):
            export_model(model, tmp_path / "out", tokenizer=tiny_target)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "has"), [("lm", "native, hf, vllm, sglang"), ("medusa", "native, vllm"), ("hydra", "native")])
def test_unknown_format_lists_those_of_the_kind(kind, has, tiny_target, tmp_path):
    """A format that a kind does not have gives a one-line error that lists its formats."""
    with pytest.raises(UserError) as caught:
        export_drafter(build(kind, tiny_target), tmp_path / "out", tokenizer=tiny_target, format="speculators")
    assert str(caught.value) == f"--format speculators: a drafter of kind {kind!r} has no such format; it has {has}"
    assert not (tmp_path / "out").exists()


def test_shared_heads_cannot_be_exported_for_vllm(tiny_target, tmp_path):
    """vLLM would look for the shared head in this file and leave it uninitialised."""
    drafter = build("medusa", tiny_target, head="target")
    with pytest.raises(UserError, match="--format vllm: needs a head"):
        export_drafter(drafter, tmp_path / "out", tokenizer=tiny_target, format="vllm")
    out = export_drafter(drafter, tmp_path / "out", tokenizer=tiny_target)
    assert out.extra["layout"] == "native" and not (out.path / "config.json").exists()


def test_language_model_is_equal_in_every_format(tiny_target, tmp_path):
    """A language model has the same files in every format."""
    model = load_model(tiny_target, torch.float32)
    stored = {name: export_model(model, tmp_path / name, tokenizer=tiny_target, format=name).files for name in FORMATS}
    assert list(stored) == ["native", "hf", "vllm", "sglang"]
    assert all(files == stored["native"] for files in stored.values())
    assert read_config(tmp_path / "vllm").architectures == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "sglang" / "trainkit.json").read_text())["extra"] == {"format": "sglang", "layout": "hf"}
    with pytest.raises(UserError, match="speculators: a language model has no such format; it has native, hf, vllm, sglang"):
        export_model(model, tmp_path / "out", tokenizer=tiny_target, format="speculators")


@pytest.mark.parametrize("start", [None, 7])
def test_draft_has_the_targets_start_id(start, tmp_path):
    """OpenVINO refuses a draft with another start id; transformers' default for Llama is 1."""
    target = make_target(tmp_path / "target", num_hidden_layers=2, bos_token_id=start)
    for kind in ("lm", "eagle"):
        export_drafter(build(kind, target), tmp_path / kind, tokenizer=target)
        assert json.loads((tmp_path / kind / "config.json").read_text())["bos_token_id"] == start


def test_tokenizer_class_is_known_to_transformers_4(tiny_target, tmp_path):
    """transformers 5 saves a tokenizer class that 4 does not know; the exported name loads in both."""
    export_drafter(build("lm", tiny_target), tmp_path / "out", tokenizer=tiny_target)
    names = [
        json.loads((at / "tokenizer_config.json").read_text())["tokenizer_class"] for at in (tiny_target, tmp_path / "out")
    ]
    assert names == ["TokenizersBackend", "PreTrainedTokenizerFast"]
    first, second = (read_tokenizer(at)("She sold half as many.").input_ids for at in (tiny_target, tmp_path / "out"))
    assert first == second


def test_speculators_names_the_verifier_given(tiny_target, tmp_path, monkeypatch):
    """A folder, made absolute, or a hub name is recorded as the target's place; by default the folder of the target."""
    monkeypatch.chdir(tiny_target.parent)
    for given, name in ((None, str(tiny_target)), (tiny_target.name, str(tiny_target)), ("org/model-8B", "org/model-8B")):
        out = export_drafter(build("eagle", tiny_target), "out", tokenizer=tiny_target, format="speculators", verifier=given)
        assert json.loads((out.path / "config.json").read_text())["speculators_config"]["verifier"]["name_or_path"] == name


@pytest.mark.parametrize(
    ("kind", "format", "verifier", "said"),
    [
        ("eagle", "vllm", "org/model", "--verifier: files of --format vllm do not name the target"),
        ("lm", "hf", "org/model", "--verifier: files of --format hf do not name the target"),
        ("eagle", "speculators", "model", "--verifier model: neither a model folder nor a hub name"),
        ("eagle", "speculators", "/no/such/folder", "--verifier /no/such/folder: neither a model folder nor a hub name"),
    ],
)
def test_wrong_verifier_is_refused(kind, format, verifier, said, tiny_target, tmp_path):
    """A format that names no target, and a name that no reader could resolve, give one line; nothing is written."""
    with pytest.raises(UserError, match=said):
        export_drafter(build(kind, tiny_target), tmp_path / "out", tokenizer=tiny_target, format=format, verifier=verifier)
    assert not (tmp_path / "out").exists()
