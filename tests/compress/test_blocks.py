"""The walk over blocks: its states and statistics are those of the whole transformers model, and it continues after a kill."""

# S sequences  T positions  D hidden  K inputs

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.processes import ended, fork
from tests.support.targets import make_target
from trainkit.compress import blocks
from trainkit.compress.blocks import Part, Walked, walk
from trainkit.compress.layout import INPUTS
from trainkit.errors import UserError
from trainkit.models.weights import read_tensors


@dataclass
class Text:
    """Calibration text of random tokens; the last sequences end with padding."""

    tokens_ST: Tensor
    counted_ST: Tensor


def random_text(sequences: int = 5, length: int = 24, vocab: int = 320) -> Text:
    counted_ST = torch.ones(sequences, length, dtype=torch.bool)
    counted_ST[-2:, length - 5 :] = False
    return Text(torch.randint(vocab, (sequences, length)), counted_ST)


def whole_model(folder: Path, text: Text) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of all linear layers by name, and the states after the last block, of the transformers model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs, last = dict[str, Tensor](), list[Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        model(text.tokens_ST)
    return inputs, last[0]


def states_after(work: Path, blocks: int, text: Text, hidden: int) -> Tensor:
    """The states that a walk over so many blocks left in its work folder."""
    data = bytearray((work / f"states-0-{blocks % 2}.bin").read_bytes())
    return torch.frombuffer(data, dtype=torch.float32).view(*text.tokens_ST.shape, hidden)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_walk_computes_the_states_of_the_whole_model(layout: str, tmp_path: Path, seed: int) -> None:
    """Of every layout: biases, sliding windows by layer, scaled rotary positions; statistics leave padding out."""
    torch.manual_seed(seed)
    folder = make_target(tmp_path / "target", layout.partition("-")[0], seed=seed, **LAYOUTS[layout])
    text = random_text()
    inputs, last_STD = whole_model(folder, text)
    seen: list[str] = []

    def visit(part: Part) -> dict[str, Any]:
        for name in part.linears:
            statistics, x_NK = part.statistics(name), inputs[name][text.counted_ST].double()
            assert (statistics.tokens, statistics.sequences) == (len(x_NK), 5)
            # float32 states of batches of another size: their rounding is the only difference
            torch.testing.assert_close(statistics.gram_KK, x_NK.T @ x_NK, rtol=1e-4, atol=1e-3 * x_NK.square().max().item())
            torch.testing.assert_close(statistics.square_K, x_NK.square().sum(0), rtol=1e-4, atol=1e-4)
            seen.append(name)
        return {"block": part.index}

    walked = walk(folder, text, visit, work=tmp_path / "work", gram=True)
    assert walked.reports == [{"block": index} for index in range(4)]
    assert sorted(seen) == sorted(name for name in inputs if name != "lm_head")
    torch.testing.assert_close(states_after(tmp_path / "work", 4, text, 64), last_STD, rtol=1e-4, atol=1e-4)


def shrink(part: Part) -> dict[str, Any]:
    """Shrinks the weights of large inputs: a smooth change that depends on the statistics."""
    for name, linear in part.linears.items():
        square_K = part.statistics(name).square_K
        part.replace(name, linear.weight * (1 / (1 + square_K / square_K.mean())))
    return {name: float(part.statistics(name).square_K.sum()) for name in part.linears}


def test_walk_measures_behind_the_changed_weights(tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """As in the model whose earlier blocks were changed; with `sequential`, also whose block's earlier layers were."""
    torch.manual_seed(seed)
    text, calls = random_text(), list[tuple[str, ...]]()

    def visit(part: Part) -> dict[str, Any]:
        calls.append(tuple(part.by_input))
        return shrink(part)

    whole = walk(tiny_target, text, visit, work=tmp_path / "whole", gram=False)
    parts = walk(tiny_target, text, visit, work=tmp_path / "parts", gram=False, sequential=True)
    assert calls[4:8] == [(source,) for source in INPUTS]
    for walked in (whole, parts):
        inputs, last_STD = changed_model(tiny_target, walked, text, tmp_path / f"{walked.work.name}-model")
        torch.testing.assert_close(states_after(walked.work, 4, text, 64), last_STD, rtol=1e-4, atol=1e-4)
        # attention inputs are behind the earlier blocks in both; inputs of down behind the block's own changes in one only
        for kind, equal in (("self_attn.q_proj", True), ("mlp.down_proj", walked is parts)):
            name = f"model.layers.3.{kind}"
            measured = inputs[name][text.counted_ST].double().square().sum().item()
            assert (walked.reports[3][name] == pytest.approx(measured, rel=1e-4)) == equal


def changed_model(folder: Path, walked: Any, text: Text, out: Path) -> tuple[dict[str, Tensor], Tensor]:
    """As `whole_model`, of the result of a walk."""
    shutil.copytree(folder, out)
    tensors = dict(walked.tensors())
    assert tensors.keys() == dict(read_tensors(folder)).keys()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return whole_model(out, text)


def test_dense_walk_measures_behind_the_dense_weights(tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """Also if weights are changed."""
    torch.manual_seed(seed)
    text = random_text()
    walked = walk(tiny_target, text, shrink, work=tmp_path / "work", gram=False, dense=True)
    inputs, last_STD = whole_model(tiny_target, text)
    torch.testing.assert_close(states_after(tmp_path / "work", 4, text, 64), last_STD, rtol=1e-4, atol=1e-4)
    name = "model.layers.3.mlp.down_proj"
    measured = inputs[name][text.counted_ST].double().square().sum().item()
    assert walked.reports[3][name] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("block", range(4))
def test_killed_walk_continues_with_identical_files(block: int, tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """Killed while it visits a block, or between its visit and the block's end."""
    torch.manual_seed(seed)
    text, visited = random_text(), list[int]()
    late = block % 2

    def kill(part: Part) -> dict[str, Any]:
        if part.index == block - late:
            os.kill(os.getpid(), signal.SIGKILL)
        return shrink(part)

    def kill_at_the_end() -> None:
        writer = blocks.write_block
        blocks.write_block = lambda work, index, *rest: os.kill(0, 9) if index == block else writer(work, index, *rest)

    def start() -> None:
        if late:
            os.setpgid(0, 0)
            kill_at_the_end()
        walk(tiny_target, text, shrink if late else kill, work=tmp_path / "killed", gram=False)

    def visit(part: Part) -> dict[str, Any]:
        visited.append(part.index)
        return shrink(part)

    assert ended(fork(start)) == -signal.SIGKILL
    torch.set_num_threads(1)  # as in the fork
    again = walk(tiny_target, text, visit, work=tmp_path / "killed", gram=False)
    assert visited == list(range(block, 4))
    once = walk(tiny_target, text, shrink, work=tmp_path / "once", gram=False)
    assert again.reports == once.reports
    for index in range(4):
        name = f"block-{index:05d}.safetensors"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_two_processes_get_the_result_of_one(tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """Each has other sequences, one of them more than the other; weights are equal to rounding."""
    torch.manual_seed(seed)
    text = random_text()
    once = walk(tiny_target, text, shrink, work=tmp_path / "once", gram=True)

    def join(rank: int) -> None:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        walk(tiny_target, text, shrink, work=tmp_path / "two", gram=True)

    processes = [fork(lambda rank=rank: join(rank)) for rank in range(2)]
    assert [ended(pid) for pid in processes] == [0, 0]
    ours, theirs = dict(once.tensors()), dict(Walked(once.layout, tmp_path / "two", []).tensors())
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-5)


def test_bad_walks_end_with_one_line(tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """Work of another command, or in use; states that are not finite; an architecture or file that cannot be used."""
    torch.manual_seed(seed)
    text, other = random_text(), random_text()
    walk(tiny_target, text, shrink, work=tmp_path / "work", gram=False, key={"method": "wanda"})
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "notes.txt").touch()
    folders = {name: tmp_path / name for name in ("gpt2", "quantised", "overflow", "short", "nan")}
    for name, folder in folders.items():
        shutil.copytree(tiny_target, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"gpt2": {"model_type": "gpt2"}, "quantised": {"quantization_config": {"quant_method": "fp8"}}}.get(name, {})
        (folder / "config.json").write_text(json.dumps(config))
        tensors = dict(read_tensors(tiny_target))
        if name == "overflow":
            tensors["model.layers.2.mlp.down_proj.weight"] *= 1e30
            tensors["model.layers.2.mlp.up_proj.weight"] *= 1e30
        if name == "nan":
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
        if name == "short":
            del tensors["model.layers.3.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    cases: list[tuple[Any, Any, str, dict[str, Any], str]] = [
        (tiny_target, text, "work", {"key": {"method": "sparsegpt"}}, r"another command \(method differ\); .* or remove"),
        (tiny_target, other, "work", {"key": {"method": "wanda"}}, r"another command \(calibration differ\)"),
        (tiny_target, text, "stray", {}, r"stray: holds other files"),
        (folders["gpt2"], text, "a", {}, r"config.json: model_type 'gpt2' cannot be compressed; give one of llama,"),
        (folders["quantised"], text, "b", {}, r"already quantised; give the folder of the dense model"),
        (folders["overflow"], text, "c", {}, r"model.layers.2 computes values that are not finite in float32"),
        (folders["nan"], text, "d", {}, r"'model.layers.1.mlp.up_proj.weight' holds values that are not finite"),
        (folders["short"], text, "e", {}, r"tensor 'model.layers.3.mlp.up_proj.weight' is missing"),
    ]
    for folder, calibration, work, options, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            walk(folder, calibration, shrink, work=tmp_path / work, **{"gram": False} | options)
        assert "\n" not in str(raised.value)
