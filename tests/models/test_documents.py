"""Packed documents give the hidden states that they have alone, whatever the architecture."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.architectures import ARCHITECTURES, CROSSING, SIZES
from trainkit.models.documents import crosses_documents, run_documents_separately
from trainkit.models.target import FrozenTarget
from trainkit.modules.language import LanguageModule

LENGTHS = ((3, 1, 6), (2, 4), ())  # documents of each packed row
QUICK = {"opt", "mamba", "gpt_oss", "qwen3_next", "llama", "mixtral", "gemma3_text", "gpt2"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ARCHITECTURES)]


def random_architecture(folder: Path, name: str):
    """A tiny random model of this architecture with weights wide enough that a wrong mask shows, saved in `folder`."""
    config = AutoConfig.for_model(name, **(SIZES | ARCHITECTURES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in part:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def packed_rows(length: int = 10):
    """Tokens, positions and document numbers of rows of `LENGTHS`, padded at the end."""
    positions, documents = [], []
    for lengths in LENGTHS:
        padding = length - sum(lengths)
        positions.append(torch.cat([*(torch.arange(n) for n in lengths), torch.zeros(padding, dtype=torch.long)]))
        numbers = [i for i, n in enumerate(lengths) for _ in range(n)]
        documents.append(torch.tensor(numbers + [-1] * padding))
    return torch.randint(3, 96, (len(LENGTHS), length)), torch.stack(positions), torch.stack(documents)


@pytest.mark.parametrize("name", NAMES)
def test_packed_states_equal_each_document_alone(name, tmp_path, seed, capsys):
    """Last and tapped hidden states of packed documents equal transformers' for the document alone; crossing is announced."""
    model = random_architecture(tmp_path, name)
    target = FrozenTarget(tmp_path)
    assert target.one_document_per_row == (name in CROSSING) == ("one document per row" in capsys.readouterr().out)
    tokens_BT, positions_BT, document_BT = packed_rows()
    taps = (0, 1, -1)
    hidden_BTD, taps_BTAD = target.forward(tokens_BT, positions_BT, document_BT, taps)
    for row, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            here = document_BT[row] == number
            alone = tokens_BT[row : row + 1, here]
            with torch.no_grad():
                output = model(alone, use_cache=False, output_hidden_states=True)
                states = output.hidden_states
                if name in ("mamba", "mamba2", "falcon_mamba"):  # their tuple has no embeddings
                    states = (model.get_input_embeddings()(alone), states[0], states[-1])
            assert taps_BTAD is not None
            # 1e-4: float32 sums in another order; mixing documents changes states by tenths
            assert torch.allclose(target.handle().head(hidden_BTD[row, here]), output.logits[0], atol=1e-4, rtol=1e-4)
            for index, tap in enumerate(taps):
                error = (taps_BTAD[row, here, index] - states[tap][0]).norm() / states[tap].norm()
                assert error < 1e-4, (row, number, tap, error)


def test_documents_apart_pass_gradients(seed):
    """Each value, and its gradient, comes from its own document; padding gives zeros and gets none."""
    tokens_BT, positions_BT, document_BT = packed_rows()
    weight_VC = torch.randn(96, 2, requires_grad=True)

    def run(tokens_NL, positions_NL):  # a running mean within the row, as recurrent layers compute it
        return weight_VC[tokens_NL].cumsum(1) / (positions_NL[..., None] + 1)

    values_BTC = run_documents_separately(run, tokens_BT, document_BT)
    expected = torch.zeros_like(values_BTC)
    for row, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            here = document_BT[row] == number
            expected[row, here] = run(tokens_BT[row : row + 1, here], positions_BT[row : row + 1, here])[0]
    assert torch.allclose(values_BTC, expected, atol=1e-6)
    scale = torch.randn_like(values_BTC)
    (ours,) = torch.autograd.grad((values_BTC * scale).sum(), weight_VC)
    (theirs,) = torch.autograd.grad((expected * scale).sum(), weight_VC)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_calls_hold_no_more_than_the_packed_tokens(seed):
    """One long document beside many short ones is not padded to a batch of long rows."""
    document_BT = torch.tensor([[0] * 60 + list(range(1, 41))])
    sizes = []

    def run(tokens_NL, positions_NL):
        sizes.append(tokens_NL.numel())
        return tokens_NL[..., None].float()

    tokens_BT = torch.randint(96, document_BT.shape)
    assert torch.equal(run_documents_separately(run, tokens_BT, document_BT)[..., 0], tokens_BT.float())
    assert max(sizes) <= document_BT.numel() and sum(sizes) <= 2 * document_BT.numel()


@pytest.mark.parametrize("name", ["mamba", "opt", "llama"])
def test_language_module_trains_on_documents_alone(name, seed, capsys):
    """Its loss over packed rows is that of one document per row, with gradients, where the model cannot separate them too."""
    config = SIZES | ARCHITECTURES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config), dtype=torch.float32)
    for part, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in part:
            torch.nn.init.normal_(parameter, std=0.2)
    module = LanguageModule(config={"model_type": name})
    module.lm = model.eval()
    module._one_document_per_row = crosses_documents(model.base_model, name)
    tokens_BT, positions_BT, document_BT = packed_rows()
    batch = {"tokens_BT": tokens_BT, "positions_BT": positions_BT, "document_BT": document_BT, "mask_BT": document_BT >= 0}
    packed = module.loss(batch, 0)
    total, count = torch.zeros(()), 0
    for row, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            alone = tokens_BT[row : row + 1, document_BT[row] == number]
            logits = model(alone, use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, alone[0, 1:], reduction="sum")
            count += alone.shape[1] - 1
    assert int(packed.count) == count
    torch.testing.assert_close(packed.sum, total, rtol=1e-4, atol=1e-4)
    weight = model.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(value, weight)[0] for value in (packed.sum, total))
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
