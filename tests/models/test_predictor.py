"""The acceptance predictor: its file is refused if missing, misfitting or not finite; its output is always a probability."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from trainkit.errors import UserError
from trainkit.models.predictor import FILE, AcceptancePredictor, FoldedPredictor, load_predictor, signals


def saved(folder, predictor: AcceptancePredictor) -> dict[str, torch.Tensor]:
    (folder / FILE).parent.mkdir()
    weights = {name: value.clone() for name, value in predictor.state_dict().items()}
    save_file(weights, folder / FILE)
    return weights


def test_saved_predictor_loads_unchanged(tmp_path, seed):
    """A saved predictor loads with the same outputs."""
    predictor = AcceptancePredictor(8, width=4, max_depth=3)
    torch.nn.init.normal_(predictor.out.weight)
    saved(tmp_path, predictor)
    loaded = load_predictor(tmp_path, predictor.config())
    hidden, inputs = torch.randn(2, 3, 8), signals(torch.randn(2, 3, 5), 2, 0.7)
    assert torch.equal(loaded(hidden, inputs, 1), predictor(hidden, inputs, 1))


@pytest.mark.parametrize(
    ("weight", "value", "message"),
    [
        ("said.weight", None, "missing"),
        ("out.weight", torch.zeros(1, 5), "does not fit"),
        ("state.bias", torch.full((5,), float("nan")), "not finite"),
        ("scale", torch.tensor([1.0, float("inf")]), "not finite"),
    ],
)
def test_broken_predictor_file_is_refused(weight, value, message, tmp_path):
    """A missing, misshapen or non-finite weight file is refused in one line."""
    predictor = AcceptancePredictor(8, width=4, max_depth=3)
    weights = saved(tmp_path, predictor)
    if value is None:
        (tmp_path / FILE).unlink()
    else:
        save_file(weights | {weight: value}, tmp_path / FILE)
    with pytest.raises(UserError, match=message) as caught:
        load_predictor(tmp_path, predictor.config())
    assert str(tmp_path / FILE) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("width", [1, 2])
def test_zero_state_has_a_probability_too(width, temperature, seed):
    """The state is zero before the prefill; NaN would stay in a policy's running means for good."""
    predictor = AcceptancePredictor(8, width=4, max_depth=3)
    for weight in predictor.parameters():
        torch.nn.init.normal_(weight)
    hidden, noisy = torch.randn(2, 1, 8), torch.randn(2, 1, 5)
    hidden[0] = 0
    folded, _ = FoldedPredictor(predictor, temperature)(hidden, noisy, width, 0)
    torch.testing.assert_close(
        folded, predictor.probability(hidden, signals(noisy, width, temperature), 0), rtol=1e-4, atol=1e-6
    )
    assert ((folded >= 0) & (folded <= 1)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("width", "columns"), [(1, 30), (3, 30), (4, 4), (2, 2), (1, 1)])
def test_folded_equals_the_predictor(width, columns, temperature, seed):
    """Folding the temperature into the weights changes neither the probabilities nor which proposals they belong to."""
    predictor = AcceptancePredictor(16, width=8, max_depth=3)
    for weight in (*predictor.parameters(), predictor.scale, predictor.shift):
        torch.nn.init.normal_(weight, std=0.5)
    predictor.requires_grad_(False)
    hidden, noisy = 3 * torch.randn(2, 4, 16), 4 * torch.randn(2, 4, columns)
    for depth in (0, 2, 7):
        folded, picked = FoldedPredictor(predictor, temperature)(hidden, noisy, width, depth)
        expected = predictor.probability(hidden, signals(noisy, width, temperature), depth)
        torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(picked, noisy.topk(width, dim=-1).indices)
