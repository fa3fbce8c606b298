"""The weights of a policy: adapters merged, shards gathered, each tensor under its Hugging Face name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM

from tests.support.processes import ended, fork
from tests.support.targets import make_target
from trainkit.errors import UserError
from trainkit.models.adapter import AdapterShape, TunedTarget
from trainkit.models.load import load_decoder
from trainkit.models.target import target_shape
from trainkit.rl.rollout import Rollouts
from trainkit.rl.types import Task
from trainkit.rl.weights import policy_tensors
from trainkit.runner import Runner


def tuned(folder, seed, **shape):
    """A target with an adapter that changes it much."""
    target = TunedTarget(folder, AdapterShape(4, 8.0, **shape))
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in target.adapter.parameters():
            weight.normal_(0.0, 0.1)
    return target


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_adapter_is_merged_in_float32(model_type, tmp_path, seed):
    """W + alpha / rank B A for each projection, W where the adapter is off; the runner computes as the tuned model does."""
    folder = make_target(tmp_path / "target", model_type, std=0.1, tie_word_embeddings=False)
    target, before = (
        tuned(folder, seed),
        dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters()),
    )
    found = {name: value.clone() for name, value in policy_tensors(target.tuner)}
    assert found.keys() == before.keys() == dict(policy_tensors(target.model)).keys()
    for name, value in found.items():
        parts = target.adapter[name.removesuffix(".weight").replace(".", "/")] if "_proj.weight" in name else None
        added = 0 if parts is None else 2.0 * parts["B"].weight.double() @ parts["A"].weight.double()
        torch.testing.assert_close(value.double(), before[name].double() + added, atol=1e-6, rtol=1e-6)
    with target.off():
        assert all(torch.equal(value, before[name]) for name, value in policy_tensors(target.model))
    rollouts = Rollouts(Runner(load_decoder(folder), None, target_shape(folder), max_len=64), 2, 10, seed=seed)
    rollouts.update(policy_tensors(target.model))
    for response in rollouts.generate([Task(0, [5, 6, 7], "")], 0)[0].responses:
        with torch.no_grad():
            log_p = target.model(torch.tensor([[5, 6, 7, *response.tokens]])).logits[0, 2:-1].log_softmax(-1)
        ours = torch.tensor(response.logprobs)
        assert (ours - log_p.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]).abs().max() <= 1e-4


def test_adapter_in_bfloat16_is_rounded_once(tiny_target, seed):
    """The sum W + B A is made in float32 from bfloat16 weights; rounding B A first would differ by a bfloat16 step."""
    target = tuned(tiny_target, seed, modules=("q_proj",))
    name = "model.layers.0.self_attn.q_proj"
    base = target.model.get_submodule(name).base_layer
    base.to(torch.bfloat16)
    parts = target.adapter[name.replace(".", "/")]
    exact = base.weight.double() + 2.0 * parts["B"].weight.double() @ parts["A"].weight.double()
    merged = dict(policy_tensors(target.model))[f"{name}.weight"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("unusual", ["dora", "embedding"])
def test_other_adapters_are_refused(unusual, tiny_target):
    """What W + B A does not describe is refused in one line that names the layer."""
    from peft import LoraConfig, get_peft_model

    where = "embed_tokens" if unusual == "embedding" else "q_proj"
    config = LoraConfig(r=2, target_modules=[where], use_dora=unusual == "dora")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_target, tie_word_embeddings=False), config)
    with pytest.raises(UserError, match=rf"^model\.\S*{where}: only plain LoRA") as caught:
        list(policy_tensors(model))
    assert "\n" not in str(caught.value)


def shard(model: nn.Module, how: str) -> nn.Module:
    """The model with the parameters of each layer and of the rest spread over two processes."""
    layers = model.get_submodule("model.layers")
    if how == "fully_shard":
        for layer in layers:
            fully_shard(layer)
        return fully_shard(model)  # pyright: ignore[reportReturnType]
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for index, layer in enumerate(layers):
        layers[index] = FullyShardedDataParallel(layer, **options)
    return FullyShardedDataParallel(model, **options)


@pytest.mark.parametrize("how", ["fully_shard", "fsdp"])
@pytest.mark.parametrize("adapter", [False, True])
def test_shards_are_gathered(how, adapter, tiny_target, tmp_path, seed):
    """Two processes that each hold a half get whole tensors, equal to those of one process."""
    model = (
        tuned(tiny_target, seed).model if adapter else AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    )
    expected = {name: value.clone() for name, value in policy_tensors(model)}

    def work(rank):
        store = dist.FileStore(str(tmp_path / "store"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        sharded = shard(model, how)
        local = sum(getattr(value, "_local_tensor", value).numel() for value in sharded.parameters())
        assert local < 0.6 * sum(value.numel() for value in expected.values())
        found = {name: value.clone() for name, value in policy_tensors(sharded)}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        (tmp_path / f"done-{rank}").touch()

    pids = [fork(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0] and len(list(Path(tmp_path).glob("done-*"))) == 2
