"""The acceptance predictor's file: what is missing, misfits or is no number is refused; and its word is always a chance."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from trainkit.errors import UserError
from trainkit.models.predictor import FILE, AcceptancePredictor, FoldedPredictor, load_predictor, signals


def kept(folder, made: AcceptancePredictor) -> dict[str, torch.Tensor]:
    (folder / FILE).parent.mkdir()
    weights = {name: value.clone() for name, value in made.state_dict().items()}
    save_file(weights, folder / FILE)
    return weights


def test_a_file_comes_back_as_it_was(tmp_path, seed):
    made = AcceptancePredictor(8, width=4, max_depth=3)
    torch.nn.init.normal_(made.out.weight)
    kept(tmp_path, made)
    found = load_predictor(tmp_path, made.config())
    hidden, said = torch.randn(2, 3, 8), signals(torch.randn(2, 3, 5), 2, 0.7)
    assert torch.equal(found(hidden, said, 1), made(hidden, said, 1))


@pytest.mark.parametrize(
    ("weight", "value", "said"),
    [
        ("said.weight", None, "missing"),
        ("out.weight", torch.zeros(1, 5), "does not fit"),
        ("state.bias", torch.full((5,), float("nan")), "no numbers"),
        ("scale", torch.tensor([1.0, float("inf")]), "no numbers"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(weight, value, said, tmp_path):
    made = AcceptancePredictor(8, width=4, max_depth=3)
    weights = kept(tmp_path, made)
    if value is None:
        (tmp_path / FILE).unlink()
    else:
        save_file(weights | {weight: value}, tmp_path / FILE)
    with pytest.raises(UserError, match=said) as caught:
        load_predictor(tmp_path, made.config())
    assert str(tmp_path / FILE) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("width", [1, 2])
def test_a_row_without_a_state_has_a_chance_too(width, temperature, seed):
    """Zeros, as before a prompt is read: else what a policy has learnt would be lost for good."""
    made = AcceptancePredictor(8, width=4, max_depth=3)
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    hidden, noisy = torch.randn(2, 1, 8), torch.randn(2, 1, 5)
    hidden[0] = 0
    told, _ = FoldedPredictor(made, temperature)(hidden, noisy, width, 0)
    torch.testing.assert_close(told, made.probability(hidden, signals(noisy, width, temperature), 0), rtol=1e-4, atol=1e-6)
    assert ((told >= 0) & (told <= 1)).all()
