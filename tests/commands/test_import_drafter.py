"""`trainkit import`: checkpoints of other programs become bundles that decode, or are refused in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.targets import make_target
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.import_drafter import import_outside
from trainkit.drafters.base import Frontier
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner

# H heads  L blocks in a head  D hidden  V vocabulary
D, V = 64, 320


def original(folder, heads=3, layers=2, prefix="", dtype=torch.float32, width=D, ids=V) -> dict[str, Tensor]:
    """A checkpoint with the original code's tensor names; its config.json has a wrong number of heads, as often there."""
    tensors: dict[str, Tensor] = {}
    for k in range(heads):
        for layer in range(layers):
            tensors[f"{prefix}{k}.{layer}.linear.weight"] = torch.randn(width, width, dtype=dtype) / 8
            tensors[f"{prefix}{k}.{layer}.linear.bias"] = torch.randn(width, dtype=dtype)
        tensors[f"{prefix}{k}.{layers}.weight"] = torch.randn(ids, width, dtype=dtype)
    folder.mkdir()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config = {"base_model_name_or_path": "x/y", "medusa_num_heads": 5, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def logits_of(tensors: dict[str, Tensor], prefix: str, head: int, layers: int, hidden_ND: Tensor) -> Tensor:
    """The method's definition on the file's tensors: x <- x + silu(W x + b) for each block, then the projection."""
    for layer in range(layers):
        weight, bias = (tensors[f"{prefix}{head}.{layer}.linear.{part}"].float() for part in ("weight", "bias"))
        inner = torch.einsum("oi,ni->no", weight, hidden_ND) + bias
        hidden_ND = hidden_ND + inner * torch.sigmoid(inner)
    return torch.einsum("vi,ni->nv", tensors[f"{prefix}{head}.{layers}.weight"].float(), hidden_ND)


@pytest.mark.parametrize(("prefix", "layers"), [("", 1), ("medusa_heads.", 2)])
def test_imported_medusa_heads_match_and_decode(prefix, layers, tiny_target, tmp_path, seed):
    """Imported Medusa heads give the logits of their definition, and decoding with them equals plain decoding."""
    tensors = original(tmp_path / "theirs", layers=layers, prefix=prefix)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--target", str(tiny_target)]) == 0
    card = bundle.read(tmp_path / "ours")
    assert (card.kind, card.config["num_heads"], card.config["num_layers"]) == ("medusa", 3, layers)
    assert card.target["fingerprint"] == bundle.fingerprint(tiny_target) and card.extra["layout"] == "vllm"
    runner = Runner.load(tiny_target, tmp_path / "ours", max_len=128)
    draft = runner.drafter
    assert draft is not None and draft.max_depth == 3
    hidden, zero = torch.randn(2, 1, D), torch.zeros(2, 1, dtype=torch.long)
    state = draft.init_state(2, 8, torch.device("cpu"), torch.float32)
    state["hidden"].copy_(hidden)
    for head in range(3):
        node = Frontier.chain(zero, zero, head)
        ours = draft.step(state, node, runner.rounds.handle, 8).logits_BFK[:, 0]
        # float32 sums in another order; logits reach several tens
        torch.testing.assert_close(ours, logits_of(tensors, prefix, head, layers, hidden[:, 0]), atol=1e-4, rtol=1e-4)
    prompts = ["Natalia sold clips", "How many"]
    plain = Runner.load(tiny_target, max_len=128).generate(prompts, max_new_tokens=24, ignore_end=True)
    for folder in ("ours", "theirs"):  # the runner also loads the original folder directly
        runner = Runner.load(tiny_target, tmp_path / folder, max_len=128)
        drafted = runner.generate(prompts, max_new_tokens=24, ignore_end=True, depth=3)
        assert [o.tokens for o in drafted] == [o.tokens for o in plain]


@pytest.mark.parametrize(("dtype", "requested"), [(torch.float16, None), (torch.float16, "float32"), (torch.bfloat16, None)])
def test_import_keeps_dtype_unless_requested(dtype, requested, tiny_target, tmp_path):
    """Imported weights keep their dtype unless another is requested."""
    tensors = original(tmp_path / "theirs", heads=1, dtype=dtype)
    import_outside(str(tmp_path / "theirs"), str(tmp_path / "ours"), target=str(tiny_target), dtype=requested)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    wanted = dtype if requested is None else getattr(torch, requested)
    assert {value.dtype for value in written.values()} == {wanted}
    assert torch.equal(written["lm_heads.0.weight"], tensors["0.2.weight"].to(wanted))


@pytest.mark.parametrize("kind", ["lm", "medusa"])
def test_export_can_be_imported_back(kind, tiny_target, tmp_path):
    """Other programs leave trainkit.json out when they pass a folder on; trimmed heads keep their token map."""
    from trainkit.drafters.base import load_kind

    options = {"draft_vocab": list(range(0, V, 3)), "num_layers": 2, "num_heads": 2} if kind == "medusa" else {}
    drafter = load_kind(kind)(target_shape(tiny_target), **options)
    drafter.initialise(FrozenTarget(tiny_target))
    before = export_drafter(drafter, tmp_path / "out", tokenizer=tiny_target, format="vllm")
    (tmp_path / "out" / "trainkit.json").unlink()
    import_outside(str(tmp_path / "out"), str(tmp_path / "again"), target=str(tiny_target))
    after = bundle.read(tmp_path / "again")
    assert after.kind == kind and after.files["model.safetensors"] == before.files["model.safetensors"]
    if kind == "medusa":
        assert after.config == before.config


def payload(folder: Path, name: str) -> None:
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps({"0.0.linear.weight": 1}))


def edited(folder: Path, edit) -> None:
    tensors = original(folder)
    save_file(edit(tensors), folder / "medusa_lm_head.safetensors")


FAULTS = {
    "pickle": (lambda p: payload(p, "medusa_lm_head.pt"), ("medusa_lm_head.pt: a pickle", "safetensors")),
    "bin": (lambda p: payload(p, "pytorch_model.bin"), ("pytorch_model.bin: a pickle", "safetensors")),
    "width": (lambda p: original(p, width=48), ("hidden_size 48", "64", "trained for")),
    "vocabulary": (lambda p: original(p, ids=300), ("vocab_size 300", "320", "trained for")),
    "missing bias": (
        lambda p: edited(p, lambda t: {n: v for n, v in t.items() if n != "1.0.linear.bias"}),
        ("'blocks.1.layers.0.bias'", "is missing"),
    ),
    "missing head": (
        lambda p: edited(p, lambda t: {n: v for n, v in t.items() if not n.startswith("1.")}),
        ("blocks.1.layers.0.weight", "is missing"),
    ),
    "far head": (lambda p: edited(p, lambda t: t | {"900000000.0.linear.bias": torch.ones(D)}), ("900000001 heads", "copy")),
    "skipped block": (
        lambda p: edited(p, lambda t: {n.replace(".2.weight", ".3.weight"): v for n, v in t.items()}),
        ("not 3 heads of 2 blocks",),
    ),
    "foreign": (
        lambda p: edited(p, lambda t: t | {"model.norm.weight": torch.ones(D)}),
        ("'model.norm.weight' does not belong",),
    ),
    "twice": (lambda p: edited(p, lambda t: t | {"medusa_heads.0.0.linear.bias": torch.ones(D)}), ("duplicate tensor",)),
    "not finite": (lambda p: edited(p, lambda t: t | {"0.2.weight": torch.full((V, D), torch.nan)}), ("not finite",)),
    "cut short": (lambda p: (original(p), (p / "medusa_lm_head.safetensors").write_bytes(b"\x10")), ("cut short",)),
    "nothing": (lambda p: p.mkdir(), ("neither a trainkit bundle", "that a drafter kind reads")),
    "no folder": (lambda p: None, ("no such folder",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_import_gives_one_line_and_no_output(fault, tiny_target, tmp_path, capsys):
    """What cannot be imported gives a one-line error and no output folder."""
    make, printed = FAULTS[fault]
    make(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "out"), "--target", str(tiny_target)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in printed), line
    assert not (tmp_path / "out").exists()


def test_pickle_file_is_refused_by_import(tiny_target, tmp_path):
    """A pickle file that is given directly is refused."""
    payload(tmp_path / "theirs", "medusa_lm_head.pt")
    with pytest.raises(UserError, match="a pickle"):
        import_outside(str(tmp_path / "theirs" / "medusa_lm_head.pt"), str(tmp_path / "out"), target=str(tiny_target))


def test_other_vocabulary_and_bundles_are_refused(tiny_target, tmp_path):
    """A draft model with another vocabulary and a folder that is a bundle already are refused."""
    other = make_target(tmp_path / "other", vocab_size=300, num_hidden_layers=1)
    with pytest.raises(UserError, match="vocabulary of 300 ids, the target's has 320"):
        import_outside(str(other), str(tmp_path / "out"), target=str(tiny_target))
    drafter = LMDraft(target_shape(tiny_target), init="scratch")
    export_drafter(drafter, tmp_path / "bundle", tokenizer=tiny_target)
    with pytest.raises(UserError, match="already a trainkit bundle"):
        import_outside(str(tmp_path / "bundle"), str(tmp_path / "out"), target=str(tiny_target))
