from __future__ import annotations

import re

import pytest
import torch

from tests.support.layers import picture
from trainkit.compress.masks import Pattern, Scope, mask_from_scores, pack_mask, parse_pattern, unpack_mask
from trainkit.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", "--sparsity 4:2: N:M keeps N of every M weights"),
        ("4:4", "--sparsity 4:4: N:M keeps N of every M weights"),
        ("0:4", "--sparsity 0:4: N:M keeps N of every M weights"),
        ("1.5", "--sparsity 1.5: give the share to prune"),
        ("0", "--sparsity 0: give the share to prune"),
        ("nan", "--sparsity nan: give the share to prune"),
        ("half", "--sparsity half: give the share to prune"),
    ],
)
def test_a_pattern_that_is_none_is_refused(text: str, message: str) -> None:
    """One line names the flag, the value and the remedy."""
    with pytest.raises(UserError, match=re.escape(message)):
        parse_pattern(text)


def test_a_pattern_refuses_a_matrix_that_it_does_not_divide() -> None:
    """The line names the tensor; a share divides every matrix."""
    with pytest.raises(UserError, match=r"--sparsity 2:4: model\.x has 30 inputs, not a multiple of 4"):
        parse_pattern("2:4").check(30, "model.x")
    parse_pattern("0.5").check(31, "model.x")


def test_a_pattern_reads_back_as_written() -> None:
    """N:M is the number kept, and 1:4 prunes three quarters."""
    assert [str(parse_pattern(text)) for text in ("2:4", "1:4", "0.6")] == ["2:4", "1:4", "0.6"]
    assert parse_pattern("1:4") == Pattern(0.75, 1, 4)


@pytest.mark.parametrize(
    ("share", "weights", "pruned"), [(0.29, 100, 29), (0.7, 10, 7), (0.5, 7, 3), (0.57, 100, 57), (0.999, 8, 7)]
)
def test_a_share_is_counted_without_float_error(share: float, weights: int, pruned: int) -> None:
    """0.29 * 100 and 0.57 * 100 are below 29 and 57 in floats."""
    assert Pattern(share).pruned(weights) == pruned


@pytest.mark.parametrize(
    ("pattern", "scope", "mask"),
    [
        ("0.5", "row", "xxx... xxx..."),
        ("0.75", "matrix", "xxxxxx xxx..."),
        ("1:3", "row", "xx.xx. xx.xx."),
        ("2:3", "row", "x..x.. x..x.."),
    ],
)
def test_the_lower_index_goes_first_among_equals(pattern: str, scope: Scope, mask: str) -> None:
    """Exactly as many as asked for are pruned, from the left."""
    assert picture(mask_from_scores(torch.ones(2, 6), parse_pattern(pattern), scope)) == mask


def test_every_set_is_pruned_by_its_lowest(seed: int) -> None:
    """Every output, matrix or group loses as many as it should, none of which scores above one that stays."""
    score_RK = torch.randint(5, (6, 24)).float()  # many ties
    for pattern, scope in [("0.29", "row"), ("0.29", "matrix"), ("2:4", "row"), ("3:8", "row")]:
        parsed = parse_pattern(pattern)
        mask_RK = mask_from_scores(score_RK, parsed, scope)
        width = parsed.group or (24 if scope == "row" else 6 * 24)
        count = parsed.group - parsed.kept if parsed.group else int(0.29 * width)
        for scores, mask in zip(score_RK.reshape(-1, width), mask_RK.reshape(-1, width), strict=True):
            assert (~mask).sum() == count
            assert scores[~mask].max() <= scores[mask].min()


def test_packed_masks_unpack(seed: int) -> None:
    """The first weight is the lowest bit; the last byte need not be full."""
    assert pack_mask(torch.tensor([[True, False, False], [True, True, False], [False, False, True]])).tolist() == [
        0b00011001,
        0b1,
    ]
    mask = torch.rand(7, 13) < 0.4
    assert len(pack_mask(mask)) == 12
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)
