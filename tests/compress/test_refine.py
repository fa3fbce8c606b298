from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.layers import GRAM_KK, INPUT_TK, WEIGHT_RK, error, picture, random_layer, statistics_of
from trainkit.compress import refine
from trainkit.compress.masks import Pattern, mask_from_scores, parse_pattern
from trainkit.compress.refine import dsnot, swaps
from trainkit.compress.scores import wanda
from trainkit.compress.statistics import Statistics


def start(weight_RK: Tensor, x_BTK: Tensor, sparsity: str) -> tuple[Tensor, Statistics, Pattern]:
    """Wanda's mask, the statistics and the pattern."""
    statistics, pattern = statistics_of(x_BTK), parse_pattern(sparsity)
    return mask_from_scores(wanda(weight_RK, statistics), pattern), statistics, pattern


@pytest.mark.parametrize(
    ("sparsity", "mask", "lost"),
    [("0.5", "..xx..xx x.xx..x. ..xxxx.. xxx.x...", 71.378662), ("2:4", "..xx..xx x..xx..x ..xxxx.. .xx.x.x.", 71.877686)],
)
def test_swaps_are_those_computed_by_hand(sparsity: str, mask: str, lost: float) -> None:
    """From Wanda's mask; the mask given is left as it was."""
    mask_RK, _, pattern = start(WEIGHT_RK, INPUT_TK.view(2, 6, 8), sparsity)
    before = mask_RK.clone()
    better_RK = swaps(WEIGHT_RK, mask_RK, GRAM_KK, pattern)
    assert picture(better_RK) == mask and error(WEIGHT_RK * better_RK) == pytest.approx(lost, abs=1e-6)
    assert torch.equal(mask_RK, before)


def plain_swaps(weight_K: Tensor, mask_K: Tensor, x_TK: Tensor, group: int, steps: int) -> Tensor:
    """The mask of one output after the best swaps, each found by computing the output's error for every pair."""
    mask_K = mask_K.clone()
    lost = lambda mask: float((x_TK @ (weight_K * ~mask)).square().sum())
    for _ in range(steps):
        pairs = []
        for a in (~mask_K).nonzero()[:, 0].tolist():
            for b in mask_K.nonzero()[:, 0].tolist():
                if a // group == b // group:
                    other = mask_K.clone()
                    other[a], other[b] = True, False
                    pairs.append((lost(other), a, b))
        best, a, b = min(pairs)
        if best > lost(mask_K) * (1 - 1e-12):
            break
        mask_K[a], mask_K[b] = True, False
    return mask_K


@pytest.mark.parametrize(("sparsity", "K"), [("0.5", 16), ("2:4", 16), ("3:8", 24)])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_swaps_equal_errors_of_all_pairs(sparsity: str, K: int, steps: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With at most as many pruned weights as candidates every swap is the best one, by errors computed from the inputs."""
    monkeypatch.setattr(refine, "CANDIDATES", 8)
    weight_RK, x_TK = random_layer(4, K, 48)
    mask_RK, statistics, pattern = start(weight_RK, x_TK.view(3, 16, K), sparsity)
    assert statistics.gram_KK is not None
    expected = [plain_swaps(w, m, x_TK, pattern.group or K, steps) for w, m in zip(weight_RK, mask_RK, strict=True)]
    assert torch.equal(swaps(weight_RK, mask_RK, statistics.gram_KK, pattern, steps), torch.stack(expected))


@pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
def test_swaps_never_raise_an_error(sparsity: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, on a layer with many candidates: no output gets worse, most get better, and none changes its sparsity.

    Errors are compared to 1e-5 of them: the Gram matrix is rounded to float32. Rows in parts give the same masks.
    """
    weight_RK, x_TK = random_layer(12, 96, 200)
    mask_RK, statistics, pattern = start(weight_RK, x_TK.view(4, 50, 96), sparsity)
    assert statistics.gram_KK is not None
    better_RK = swaps(weight_RK.float(), mask_RK, statistics.gram_KK.float(), pattern)
    lost = lambda mask_RK: ((weight_RK * ~mask_RK) @ x_TK.T).square().sum(1)
    assert (lost(better_RK) <= lost(mask_RK) * (1 + 1e-5)).all() and lost(better_RK).sum() < 0.9 * lost(mask_RK).sum()
    width = pattern.group or 96
    assert torch.equal(better_RK.view(-1, width).sum(1), mask_RK.view(-1, width).sum(1))
    monkeypatch.setattr(refine, "ENTRIES", 96 * 4 * 5)
    parts_RK = swaps(weight_RK, mask_RK, statistics.gram_KK, pattern)
    assert torch.equal(
        parts_RK, torch.cat([swaps(weight_RK[r : r + 5], mask_RK[r : r + 5], statistics.gram_KK, pattern) for r in (0, 5, 10)])
    )


@pytest.mark.parametrize(
    ("sparsity", "guard", "cycles", "mask"),
    [
        ("0.5", False, 1, ".xx.x.x. xx.x..x. .xxxx... xx..x.x."),
        ("0.5", True, 1, ".xx.x.x. xx.x..x. .xxxx... xxx.x..."),  # the guard refuses the swap of the last output
        ("2:4", False, 1, "..xxx.x. x..x..xx ..xxxx.. .xx.x..x"),  # a change of sign refuses those of the first three
        ("2:4", True, 50, "..xxx.x. x..x..xx ..xxxx.. .xx.x.x."),
    ],
)
def test_dsnot_swaps_as_computed_by_hand(sparsity: str, guard: bool, cycles: int, mask: str) -> None:
    """From Wanda's mask."""
    mask_RK, statistics, pattern = start(WEIGHT_RK, INPUT_TK.view(2, 6, 8), sparsity)
    assert picture(dsnot(WEIGHT_RK, mask_RK, statistics, pattern, cycles, guard)) == mask


def test_dsnot_without_guard_goes_astray() -> None:
    """The first output's lost mean falls from -2.97 to 0.59 in one cycle, and is -16.4 in the end; the guard stops it."""
    mask_RK, statistics, pattern = start(WEIGHT_RK, INPUT_TK.view(2, 6, 8), "0.5")
    lost = lambda mask_RK: float((WEIGHT_RK * ~mask_RK)[0] @ statistics.sum_K / 2)
    assert lost(mask_RK) == -2.96875
    assert lost(dsnot(WEIGHT_RK, mask_RK, statistics, pattern, 1, guard=False)) == 0.59375
    assert lost(dsnot(WEIGHT_RK, mask_RK, statistics, pattern, guard=False)) == pytest.approx(-16.4, abs=0.05)
    assert abs(lost(dsnot(WEIGHT_RK, mask_RK, statistics, pattern))) <= 0.59375


def plain_dsnot(
    w: list[float], kept: list[bool], S: list[float], v: list[float], score: list[float], M: int, guard: bool
) -> list[bool]:
    """One output's mask, in the units of the paper: S sums a sequence's tokens, and the threshold is 0.1."""
    K, kept, used = len(w), list(kept), set()
    c = [w[j] * S[j] for j in range(K)]
    eps = first = sum(c[j] for j in range(K) if not kept[j])
    for _ in range(50):
        if abs(eps) <= 0.1:
            break
        sign = 1 if eps > 0 else -1
        grown = [j for j in range(K) if not kept[j] and j not in used and sign * c[j] > 0]
        if not grown:
            break
        a = max(grown, key=lambda j: sign * c[j] / v[j])
        gone = [
            j for j in range(K) if kept[j] and j not in used and (j // M == a // M if M else c[j] * (1 if eps < 0 else -1) > 0)
        ]
        if not gone:
            break
        b = min(gone, key=score.__getitem__)
        after = eps + c[b] - c[a]
        if (guard and abs(after) >= abs(eps)) or (M and after * first <= 0):
            break
        eps, kept[a], kept[b] = after, True, False
        used |= {a, b}
    return kept


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4", "3:8"])
def test_dsnot_equals_a_plain_loop(sparsity: str, guard: bool, seed: int) -> None:
    """Equal masks of every output, whose number of kept weights (of a group's, with N:M) does not change."""
    weight_RK, x_TK = random_layer(6, 40, 60)
    x_BTK = x_TK.view(3, 20, 40)
    mask_RK, statistics, pattern = start(weight_RK, x_BTK, sparsity)
    refined_RK = dsnot(weight_RK, mask_RK, statistics, pattern, guard=guard)
    sums, variances = x_BTK.sum(1).mean(0).tolist(), x_BTK.var(1, unbiased=False).mean(0).tolist()
    scores = wanda(weight_RK, statistics).tolist()
    for r in range(6):
        expected = plain_dsnot(weight_RK[r].tolist(), mask_RK[r].tolist(), sums, variances, scores[r], pattern.group, guard)
        assert refined_RK[r].tolist() == expected
    width = pattern.group or 40
    assert torch.equal(refined_RK.view(-1, width).sum(1), mask_RK.view(-1, width).sum(1))
