"""Drafters are trained and exported for targets that the runner does not decode; only the runner refuses them."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.architectures import ARCHITECTURES
from tests.support.targets import make_target
from tests.support.training import Losses, fit, text_data
from trainkit.card import describe
from trainkit.drafters.eagle import Eagle
from trainkit.drafters.hydra import Hydra
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget
from trainkit.modules.draft import DraftModule
from trainkit.runner import Runner

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
KINDS = {
    "eagle": lambda shape: Eagle(shape, rope=ROPE, steps=3, draft_vocab=list(range(0, 320, 2))),
    "medusa": lambda shape: Medusa(shape, num_heads=2),
    "hydra": lambda shape: Hydra(shape, num_heads=2),
}
PAIRS = [(name, "eagle") for name in ("qwen3_moe", "mixtral", "gemma3_text", "phi3", "olmo2", "gpt_oss", "gpt2")]
PAIRS += [("qwen3_moe", "medusa"), ("gemma3_text", "hydra")]
FORMATS = {"eagle": "speculators", "medusa": "vllm", "hydra": "native"}


@pytest.fixture(scope="session")
def undecodable(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a tiny target of an architecture."""

    @cache
    def make(name: str) -> Path:
        return make_target(tmp_path_factory.mktemp(name), name, std=0.1, **ARCHITECTURES[name])

    return make


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_training_and_export_work(name, kind, undecodable, chats, tmp_path, seed):
    """The loss falls, the export holds the target's stored embedding, card says and runner refuses by name."""
    target, losses = undecodable(name), Losses()
    module = DraftModule(str(target), KINDS[kind], optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), warmup_steps=0)
    fit(module, text_data(chats, tmp_path / "cache"), tmp_path, losses, steps=12)
    assert sum(losses.values[-3:]) < sum(losses.values[:3])
    out = tmp_path / "out"
    bundle = export_drafter(module.drafter, out, tokenizer=target, target=target, format=FORMATS[kind])
    assert f"not by trainkit's runner: model_type '{name}' is not supported" in describe(bundle)
    with pytest.raises(UserError, match=f"model_type '{name}' is not supported by the runner"):
        Runner.load(target=target, drafter=out)
    if kind == "eagle":
        model = AutoModelForCausalLM.from_pretrained(target)
        embedding = load_file(out / "model.safetensors")["embed_tokens.weight"]
        assert torch.equal(embedding, model.get_input_embeddings().weight)
        assert torch.equal(module.teacher.handle().embed(torch.arange(9)), embedding[:9])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "phi", "gemma", "olmo"])
def test_norm_weight_is_what_the_final_norm_multiplies(name, undecodable, seed):
    """The factors rebuild the final norm of any state: weights, 1 + w, with a bias, or without weights."""
    target = FrozenTarget(undecodable(name))
    last = [module for key, module in target.backbone.named_modules() if key in ("norm", "ln_f", "final_layernorm")][-1]
    x_ND = torch.randn(5, target.hidden_size) * 10
    x_ND -= x_ND.mean(-1, keepdim=True)  # so that a LayerNorm and an RMSNorm scale alike
    bias = getattr(last, "bias", None)
    expected = last(x_ND) - (0 if bias is None else bias)
    ours = x_ND / x_ND.pow(2).mean(-1, keepdim=True).sqrt() * target.norm_weight()
    assert (ours - expected).abs().max() < 1e-4  # epsilon is left out


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2"])
def test_heads_start_as_the_targets_logits(name, undecodable, seed):
    """A new Medusa head gives the target's own logits, and EAGLE's norm and head those of the target's last layer."""
    target = FrozenTarget(undecodable(name))
    tokens_BT, positions_BT = torch.randint(320, (1, 6)), torch.arange(6)[None]
    hidden_BTD, taps_BTAD = target.forward(tokens_BT, positions_BT, torch.zeros_like(tokens_BT), (target.num_layers,))
    logits_BTV = target.handle().head(hidden_BTD)
    heads = Medusa(target.shape(), num_heads=1)
    heads.initialise(target)
    assert torch.allclose(heads.lm_heads[0](heads.blocks[0](hidden_BTD)), logits_BTV, atol=1e-4)
    eagle = Eagle(target.shape(), rope=ROPE)
    eagle.initialise(target)
    states: list[torch.Tensor] = []
    hook = target._layers[-1].register_forward_hook(lambda module, args, output: states.append(output))
    target.forward(tokens_BT, positions_BT, torch.zeros_like(tokens_BT))
    hook.remove()
    before = states[0] if torch.is_tensor(states[0]) else states[0][0]
    assert torch.allclose(eagle.lm_head(eagle.norm(before)), logits_BTV, atol=1e-3, rtol=1e-3)
