"""Structured pruning: the smaller model computes what the whole one computes without the removed parts."""

# S sequences  T positions  D hidden

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.processes import ended, fork
from tests.support.targets import make_target
from trainkit.compress.structured import depth
from trainkit.compress.structured import prune as structured
from trainkit.compress.structured.prune import METHODS, prune
from trainkit.errors import UserError
from trainkit.layers.visible import Visible
from trainkit.models.load import load_decoder

TINY = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48}


def text(sequences: int = 4, length: int = 20) -> Any:
    """Random calibration text; the last sequence ends with padding."""
    counted_ST = torch.ones(sequences, length, dtype=torch.bool)
    counted_ST[-1, length - 6 :] = False
    return SimpleNamespace(tokens_ST=torch.randint(320, (sequences, length)), counted_ST=counted_ST)


def load(folder: Path) -> Any:
    """transformers' model, with float64 weights."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval().requires_grad_(False)


def pruned(source: Path, out: Path, calibration: Any, method: str, ratio: float, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The smaller model written to `out` and loaded by transformers, and the report."""
    tensors, config, report = prune(source, calibration, method, ratio, out / "work", **options)
    save_file({name: value.contiguous() for name, value in tensors}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    return load(out), report


def kept_rows(whole: Tensor, smaller: Tensor) -> list[int]:
    """Which rows of a weight the smaller one has."""
    return [int((whole - row).abs().sum(1).argmin()) for row in smaller]


def without(model: Any, smaller: Any, calibration: Any, biased: bool) -> Any:
    """The whole model with weights of 0 for what the smaller one lacks, and FLAP's bias by its definition."""
    inputs: dict[Any, Tensor] = {}
    parts = [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    hooks = [part.register_forward_pre_hook(lambda part, args: inputs.__setitem__(part, args[0])) for part in parts]
    model(calibration.tokens_ST)
    for layer, small in zip(model.model.layers, smaller.model.layers, strict=True):
        firsts = (layer.self_attn.q_proj, small.self_attn.q_proj), (layer.mlp.gate_proj, small.mlp.gate_proj)
        for last, (first, few) in zip((layer.self_attn.o_proj, layer.mlp.down_proj), firsts, strict=True):
            gone = torch.ones(last.in_features, dtype=torch.bool)
            gone[kept_rows(first.weight, few.weight)] = False
            assert int(gone.sum()) == first.out_features - few.out_features
            mean_K = inputs[last][calibration.counted_ST].mean(0)
            if biased:
                bias = last.weight[:, gone] @ mean_K[gone] + (0 if last.bias is None else last.bias)
                last.bias = torch.nn.Parameter(bias, requires_grad=False)
            last.weight[:, gone] = 0
    for hook in hooks:
        hook.remove()
    return model


BOTH = ("neurons", "heads")
CASES = {
    "flap": ("llama", "flap", 0.5, {"dimensions": BOTH}),
    "flap without a bias": ("llama", "flap-plain", 0.5, {"bias": False, "dimensions": BOTH}),
    "flap, biased model": ("llama", "flap", 0.5, {"attention_bias": True, "mlp_bias": True, "dimensions": BOTH}),
    "magnitude with a bias": ("llama", "structured-magnitude", 0.5, {"bias": True, "dimensions": BOTH}),
    "random": ("mistral", "structured-random", 0.4, {"dimensions": BOTH}),
    "flap, Qwen2": ("qwen2", "flap", 0.3, {"tie_word_embeddings": False}),
    "width": ("qwen3", "width", 0.5, {"dimensions": ("neurons", "heads")}),
}


@pytest.mark.parametrize("case", CASES)
def test_smaller_model_is_the_whole_without_parts(case, tmp_path, seed):
    """Heads and neurons: logits of the smaller model, in transformers and here, are the whole model's with weights of 0."""
    kind, method, ratio, fields = CASES[case]
    options = {name: fields[name] for name in ("bias", "dimensions") if name in fields}
    source = make_target(tmp_path / "in", kind, seed=seed, **TINY, **{k: v for k, v in fields.items() if k not in options})
    calibration, out = text(), tmp_path / "out"
    out.mkdir()
    read = None if method == "structured-random" else calibration
    smaller, report = pruned(source, out, read, method, ratio, multiple=4, **options)
    biased = options.get("bias", method.startswith("flap") and kind == "llama")
    assert report["bias"] == biased
    whole = load(source)
    share = 1 - sum(map(torch.numel, smaller.parameters())) / sum(map(torch.numel, whole.parameters()))
    assert share > 0.1 and f"; {share:.1%} of all parameters" in report["removed"]
    expected = without(whole, smaller, calibration, biased)
    tokens = torch.randint(320, (2, 12))
    logits = expected(tokens).logits
    # the bias is stored in float32, and statistics are of float32 activations
    assert (smaller(tokens).logits - logits).abs().max() < 1e-4 * logits.abs().max()
    decoder = load_decoder(out)
    decoder.reserve_positions(12)
    positions = torch.arange(12).expand(2, -1)
    ours = decoder.head(decoder(tokens, positions, Visible.causal(positions))[0])
    assert (ours - logits).abs().max() < 1e-3 * logits.abs().max()


def test_flap_chooses_by_its_formula(tmp_path, seed):
    """Against variances by `torch.var` of the whole model's inputs: the kept neurons and groups of every block."""
    source, calibration = make_target(tmp_path / "in", seed=seed, **TINY), text()
    (tmp_path / "out").mkdir()
    smaller, _ = pruned(source, tmp_path / "out", calibration, "flap", 0.5, multiple=4, dimensions=BOTH)
    model, inputs = load(source), {}
    for name, part in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            part.register_forward_pre_hook(lambda part, args: inputs.__setitem__(part, args[0]))
    model(calibration.tokens_ST)
    for layer, small in zip(model.model.layers, smaller.model.layers, strict=True):
        score = {}
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            score[part] = inputs[part][calibration.counted_ST].var(0) * part.weight.square().sum(0)
        heads = score[layer.self_attn.o_proj].square().view(4, 16).mean(1)
        groups = sorted(heads.argsort()[2:].tolist())
        assert [row // 8 for row in kept_rows(layer.self_attn.k_proj.weight, small.self_attn.k_proj.weight)[::8]] == groups
        neurons = sorted(score[layer.mlp.down_proj].argsort()[-smaller.config.intermediate_size :].tolist())
        assert kept_rows(layer.mlp.up_proj.weight, small.mlp.up_proj.weight) == neurons


def test_fewer_channels_are_the_whole_without_them(tmp_path, seed):
    """Channels of the residual stream: zeros in every weight that writes or reads them, and norms over fewer of them."""
    source = make_target(tmp_path / "in", seed=seed, rms_norm_eps=1e-12, **TINY)
    (tmp_path / "out").mkdir()
    smaller, _ = pruned(source, tmp_path / "out", text(), "width", 0.25, dimensions=("channels",), multiple=8)
    model, D = load(source), 48
    embedding = model.model.embed_tokens.weight
    kept = kept_rows(embedding.T, smaller.model.embed_tokens.weight.T)
    assert smaller.config.hidden_size == D == len(set(kept)) and smaller.config.head_dim == 8
    gone = torch.ones(64, dtype=torch.bool)
    gone[kept] = False
    embedding[:, gone] = 0
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.mul_((D / 64) ** 0.5)[gone] = 0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[gone] = 0
    tokens = torch.randint(320, (2, 12))
    logits = model(tokens).logits
    assert (smaller(tokens).logits - logits).abs().max() < 1e-4 * logits.abs().max()  # norms compute in float32


def test_channels_are_ranked_over_all_norms(tmp_path, seed):
    """The kept channels have the largest sums of importance over the outputs of all blocks' norms."""
    source, calibration = make_target(tmp_path / "in", seed=seed, **TINY), text()
    (tmp_path / "out").mkdir()
    smaller, _ = pruned(source, tmp_path / "out", calibration, "width", 0.25, dimensions=("channels",), multiple=8)
    model, score_D = load(source), torch.zeros(64).double()

    def add(_: Any, __: Any, output: Tensor) -> None:
        sizes = [x_TD[counted_T].abs().mean(0) for x_TD, counted_T in zip(output, calibration.counted_ST, strict=True)]
        score_D.add_(torch.stack(sizes).square().sum(0).sqrt())

    for name, part in model.named_modules():
        if name.endswith("layernorm"):
            part.register_forward_hook(add)
    model(calibration.tokens_ST)
    kept = kept_rows(model.model.embed_tokens.weight.T, smaller.model.embed_tokens.weight.T)
    assert kept == sorted(score_D.argsort()[16:].tolist())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_depth_removes_the_cheapest_block_each_round(kind, tmp_path, seed):
    """Scores and order equal those of transformers' model with a block taken out, also where windows differ between blocks."""
    fields: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "qwen2":
        types = ["full_attention", "sliding_attention"] * 2
        fields |= {"use_sliding_window": True, "sliding_window": 4, "layer_types": types, "max_window_layers": 0}
    source, calibration = make_target(tmp_path / "in", kind, seed=seed, std=0.1, **fields), text()
    (tmp_path / "out").mkdir()
    smaller, report = pruned(source, tmp_path / "out", calibration, "depth", 0.5)
    dense, blocks = load(source)(calibration.tokens_ST).logits.log_softmax(-1), [0, 1, 2, 3]
    for entry in report["removed_blocks"]:
        for index in blocks:
            model = load(source)
            left = [other for other in blocks if other != index]
            model.model.layers = torch.nn.ModuleList(model.model.layers[other] for other in left)
            model.config.num_hidden_layers = len(left)
            if kind == "qwen2":
                model.config.layer_types = [fields["layer_types"][other] for other in left]
            logits = model(calibration.tokens_ST, use_cache=False).logits.log_softmax(-1)
            kl = (dense.exp() * (dense - logits)).sum(-1)[calibration.counted_ST].mean()
            assert abs(entry["scores"][str(index)] - kl) < 1e-4 * kl + 1e-6  # computed in float32
        assert entry["kl"] == min(entry["scores"].values()) == entry["scores"][str(entry["block"])]
        blocks.remove(entry["block"])
    whole = load(source).model.layers
    for index, layer in zip(blocks, smaller.model.layers, strict=True):
        assert torch.equal(whole[index].mlp.up_proj.weight, layer.mlp.up_proj.weight)
    if kind == "qwen2":
        assert smaller.config.layer_types == [fields["layer_types"][index] for index in blocks]


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(("method", "ratio"), [("flap", 0.3), ("depth", 0.7)])
def test_continues_after_a_kill(method, ratio, tmp_path, monkeypatch, seed):
    """Stopped after any number of steps and called again, the result is that of a single call."""
    source, calibration = make_target(tmp_path / "in", seed=seed, **TINY), text(5, 20)
    monkeypatch.setattr(depth, "BATCH_TOKENS", 40)

    def result(work: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, _, report = prune(source, calibration, method, ratio, work, multiple=4)
        return dict(tensors), report

    tensors, report = result(tmp_path / "single")
    owner, name = (structured, "highest") if method == "flap" else (depth._Blocks, "divergences")
    original, calls = getattr(owner, name), 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise Stop
        return original(*args)

    monkeypatch.setattr(owner, name, stopping)
    stops, again = 0, None
    while again is None:
        try:
            again, report_again = result(tmp_path / "stopped")
        except Stop:
            stops += 1
    assert stops >= 2 and report_again == report and again.keys() == tensors.keys()
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())


def test_two_processes_remove_the_same_blocks(tmp_path, monkeypatch, seed):
    """Each computes other batches, the first one more than the second; scores are equal to rounding."""
    source, calibration = make_target(tmp_path / "in", seed=seed, **TINY), text(5, 20)
    monkeypatch.setattr(depth, "BATCH_TOKENS", 20)
    once = prune(source, calibration, "depth", 0.7, tmp_path / "once")[2]["removed_blocks"]

    def join(rank: int) -> None:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        report = prune(source, calibration, "depth", 0.7, tmp_path / "two")[2]
        (tmp_path / f"report-{rank}.json").write_text(json.dumps(report["removed_blocks"]))

    assert [ended(pid) for pid in [fork(lambda rank=rank: join(rank)) for rank in range(2)]] == [0, 0]
    for rank in range(2):
        both = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert [entry["block"] for entry in both] == [entry["block"] for entry in once]
        for ours, theirs in zip(both, once, strict=True):
            assert ours["scores"].keys() == theirs["scores"].keys()
            assert all(abs(ours["scores"][name] / value - 1) < 1e-5 for name, value in theirs["scores"].items())


MISTAKES = {
    "ratio 0": ("llama", "flap", 0.0, {}, "--ratio 0: give the share"),
    "ratio 1": ("llama", "depth", 1.0, {}, "--ratio 1: give the share"),
    "no head": ("llama", "width", 0.9, {"dimensions": ("heads",)}, "leaves none of 2 query heads"),
    "no neuron": ("llama", "flap", 0.99, {"multiple": 16}, "leaves none of 48 neurons"),
    "dimension": (
        "llama",
        "width",
        0.5,
        {"dimensions": ("heads", "layers")},
        "--dimensions heads layers: give some of neurons",
    ),
    "channels of flap": ("llama", "flap", 0.5, {"dimensions": ("channels",)}, "--dimensions channels: --method flap"),
    "no dimension": ("llama", "width", 0.5, {"dimensions": ()}, "give some of neurons, heads, channels"),
    "no block": ("llama", "depth", 0.9, {}, "leaves none of 3 blocks"),
    "nothing": ("llama", "depth", 0.1, {}, "removes none of 3 blocks; raise it"),
    "multiple": ("llama", "flap", 0.2, {}, "leaves none of 48 neurons in multiples of 64; lower it, or lower --multiple"),
    "multiple 0": ("llama", "flap", 0.2, {"multiple": 0}, "--multiple 0"),
    "method": ("llama", "slice", 0.2, {}, f"choose from {', '.join(METHODS)}"),
    "bias of Qwen": ("qwen2", "flap", 0.2, {"bias": True}, "model_type 'qwen2' has no biases on o_proj and down_proj"),
    "bias of depth": ("llama", "depth", 0.4, {"bias": True}, "depth has no bias compensation"),
    "odd heads": ("llama", "width", 0.25, {"multiple": 4, "num_attention_heads": 16}, "heads that divide the hidden size"),
    "architecture": ("gemma", "flap", 0.2, {}, "model_type 'gemma'"),
    "no text": ("llama", "flap", 0.2, {"calibration": None}, "needs calibration text"),
    "useless text": ("llama", "structured-random", 0.2, {}, "--calibration: --method structured-random"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path, seed):
    """Impossible ratios, biases and architectures are refused by name, before anything is written."""
    kind, method, ratio, options, message = MISTAKES[mistake]
    options, fields = dict(options), dict(TINY)
    if mistake == "odd heads":
        fields |= {"num_attention_heads": options.pop("num_attention_heads"), "num_key_value_heads": 4}
        options["dimensions"] = ("heads",)
    source = make_target(tmp_path / "in", kind, **fields)
    calibration = options.pop("calibration", text())
    with pytest.raises(UserError) as caught:
        prune(source, calibration, method, ratio, tmp_path / "work", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()
