"""Perplexity, KL and agreement against plain transformers, and that logits of whole windows never exist."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.targets import make_target
from trainkit.errors import UserError
from trainkit.eval import quality
from trainkit.eval.perplexity import Text
from trainkit.eval.quality import LanguageModel, measure, summarise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with noise on its weights."""
    model, folder = AutoModelForCausalLM.from_pretrained(tiny_target), tmp_path_factory.mktemp("other")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> LanguageModel:
    return LanguageModel(folder, torch.float32, CPU)


def random_texts() -> list[Text]:
    """Windows, and texts of other lengths whose first tokens are not predicted."""
    windows = [Text(torch.randint(5, 320, (24,))) for _ in range(5)]
    return windows + [Text(torch.randint(5, 320, (length,)), start) for length, start in ((9, 4), (30, 29), (17, 1))]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_perplexity_equals_transformers_loss(architecture, tmp_path, seed):
    """exp of the mean of transformers' own loss over windows; also of a model whose logits are soft-capped (Gemma 2)."""
    capped = {"final_logit_softcapping": 3.0} if architecture == "gemma2" else {}
    folder = make_target(tmp_path / "model", architecture, seed=seed, num_hidden_layers=2, **capped)
    windows = [Text(torch.randint(5, 320, (32,))) for _ in range(5)]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        losses = [model(text.tokens_T[None], labels=text.tokens_T[None]).loss.item() for text in windows]
    found = summarise(measure(load(folder), windows, batch=2))
    assert list(found) == ["perplexity"]
    assert found["perplexity"].value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high


def naive(texts: list[Text], model: Path, dense: Path) -> dict[str, list[float]]:
    """The same sums one text at a time, from whole logits in float64."""
    q, p = (AutoModelForCausalLM.from_pretrained(folder).double().eval() for folder in (model, dense))
    sums: dict[str, list[float]] = {name: [] for name in ("tokens", "nll", "nll_dense", "kl", "agreement")}
    for text in texts:
        with torch.no_grad():
            log_q, log_p = (one(text.tokens_T[None]).logits[0].log_softmax(-1)[text.start - 1 : -1] for one in (q, p))
        labels = text.tokens_T[text.start :, None]
        sums["tokens"].append(len(labels))
        sums["nll"].append(-log_q.gather(1, labels).sum().item())
        sums["nll_dense"].append(-log_p.gather(1, labels).sum().item())
        sums["kl"].append((log_p.exp() * (log_p - log_q)).sum().item())
        sums["agreement"].append((log_p.argmax(-1) == log_q.argmax(-1)).sum().item())
    return sums


def test_sums_of_each_text_equal_naive_ones(tiny_target, other, seed):
    """Sums of each text equal those of a naive loop in float64, whatever the batch."""
    texts = random_texts()
    expected = naive(texts, other, tiny_target)
    for batch in (1, 3, 8):
        found = measure(load(other), texts, load(tiny_target), batch)
        assert found.keys() == expected.keys() and found["tokens"].tolist() == expected["tokens"]
        for name in ("nll", "nll_dense", "kl"):
            assert np.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4), name  # float32 against float64
        assert np.abs(found["agreement"] - expected["agreement"]).sum() <= 1  # a tie, at most
    assert sum(expected["kl"]) / sum(expected["tokens"]) > 0.01 and sum(expected["agreement"]) < sum(expected["tokens"])


def test_model_is_at_distance_zero_from_itself(tiny_target, seed):
    """KL 0, agreement 1, ratio 1, with intervals of no width."""
    found = summarise(measure(load(tiny_target), random_texts(), load(tiny_target)))
    for name, exact in (("kl", 0.0), ("agreement", 1.0), ("ratio", 1.0)):
        assert (found[name].value, found[name].low, found[name].high) == (exact, exact, exact)
    assert found["perplexity"] == found["perplexity_dense"]


def test_logits_exist_for_few_positions_at_a_time(tiny_target, other, monkeypatch, seed):
    """The head is applied to as many positions as `LOGITS` allows; the sums stay the same."""
    texts, rows, log_probs = random_texts(), [], LanguageModel.log_probs
    expected = measure(load(other), texts, load(tiny_target))
    monkeypatch.setattr(LanguageModel, "log_probs", lambda self, states: rows.append(len(states)) or log_probs(self, states))
    monkeypatch.setattr(quality, "LOGITS", 320 * 20)
    found = measure(load(other), texts, load(tiny_target))
    assert max(rows) == 20 and sum(rows) == 2 * expected["tokens"].sum()
    for name, values in expected.items():
        assert np.allclose(found[name], values, rtol=1e-4, atol=1e-4), name  # rounding depends on the number of rows


def test_vocabularies_and_nan_are_refused(tiny_target, tmp_path, monkeypatch, seed):
    """A dense model of another vocabulary, and log-probabilities that are not finite, give one line."""
    texts = random_texts()
    larger = load(make_target(tmp_path / "larger", vocab_size=400, num_hidden_layers=1))
    with pytest.raises(UserError, match="larger: has a vocabulary of 400, .* one of 320; give"):
        measure(load(tiny_target), texts, larger)
    log_probs = LanguageModel.log_probs
    monkeypatch.setattr(LanguageModel, "log_probs", lambda self, states: log_probs(self, states) / (len(states) > 3))
    with pytest.raises(UserError, match="tiny-llama: log-probabilities of text 2 are not finite; give --dtype float32"):
        measure(load(tiny_target), [Text(torch.arange(5, 20)), Text(torch.arange(5, 8))], batch=1)


def test_interrupted_measurement_continues(tiny_target, other, tmp_path, monkeypatch, seed):
    """After a stop in the third batch, the same call reads only the rest and has the same sums; another key reads all."""
    texts, state, read = random_texts(), tmp_path / "out.json.text.part", []
    model, dense = load(tiny_target), load(other)
    whole = measure(model, texts, dense, batch=2)
    states = LanguageModel.states

    def stopping(self: LanguageModel, tokens_BT: torch.Tensor) -> torch.Tensor:
        read.append(len(tokens_BT))
        if len(read) == 5:  # two models read each batch
            raise KeyboardInterrupt
        return states(self, tokens_BT)

    monkeypatch.setattr(LanguageModel, "states", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(model, texts, dense, 2, state, "a")
    again = measure(model, texts, dense, 2, state, "a")
    assert len(read) == 5 + 2 * 2 and all(np.array_equal(again[name], value) for name, value in whole.items())
    other_key = measure(model, texts, dense, 2, state, "b")
    assert len(read) == 9 + 2 * 4 and all(np.array_equal(other_key[name], value) for name, value in whole.items())
