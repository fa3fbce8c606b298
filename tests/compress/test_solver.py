from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from tests.support.layers import GRAM_KK, WEIGHT_RK, error, picture, random_layer
from trainkit.compress.masks import Pattern, parse_pattern
from trainkit.compress.quantise import Grid
from trainkit.compress.solver import Solved, inverse_factor, solve
from trainkit.errors import UserError

GRID = Grid(4, 4, scale_dtype=torch.float64)


def plain(
    weight_RK: Tensor,
    gram_KK: Tensor,
    pattern: Pattern | None = None,
    grid: Grid | None = None,
    block: int = 128,
    scope: str = "matrix",
    fixed_RK: Tensor | None = None,
    scale_after: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weights and mask by eliminating inputs one by one, each with the explicit inverse of what is left of the damped matrix.

    `scale_after`: whether a group's scale is that of weights that stay, rather than of all.
    """
    (R, K), W = weight_RK.shape, weight_RK.clone()
    H = gram_KK + 0.01 * gram_KK.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    inverse = [torch.linalg.inv(H[j:, j:]) for j in range(K)]
    mask = torch.ones(R, K, dtype=torch.bool) if fixed_RK is None else fixed_RK.clone()
    scores = lambda a, b: torch.stack([W[:, j] ** 2 / inverse[j][0, 0] for j in range(a, b)], 1)

    def drop(cells: list[tuple[float, int, int]], count: int) -> None:
        for _, r, j in sorted(cells)[:count]:
            mask[r, j] = False

    for j in range(K):
        if pattern and pattern.group and j % pattern.group == 0:
            S = scores(j, j + pattern.group)
            for r in range(R):
                drop([(float(S[r, i]), r, j + i) for i in range(pattern.group)], pattern.group - pattern.kept)
        if pattern and not pattern.group and j % block == 0:
            width = min(block, K - j)
            cells = [[(float(S), r, j + i) for i, S in enumerate(row)] for r, row in enumerate(scores(j, j + width))]
            for compared in [sum(cells, [])] if scope == "matrix" else cells:
                drop(compared, math.floor(pattern.share * len(compared)))
        if grid and j % (grid.group or K) == 0:
            end = j + (grid.group or K)
            whole = Grid(grid.bits, None, grid.symmetric, rule=grid.rule, scale_dtype=torch.float64)
            scale, zero = whole.scales((W * mask if scale_after else W)[:, j:end])
        new = W[:, j] * mask[:, j]
        if grid:
            offset = 0 if zero is None else zero[:, 0]
            new = ((new / scale[:, 0]).add(offset).round().clamp(grid.low, grid.high) - offset) * scale[:, 0]
        W[:, j:] -= torch.outer((W[:, j] - new) / inverse[j][0, 0], inverse[j][0])
        W[:, j] = new
    return W, mask


@pytest.mark.parametrize(
    ("sparsity", "block", "mask", "loss", "lost"),
    [
        ("0.5", 8, "..xx..x. x.xx..x. xxxxxx.. .xx.x...", 26.227153, 50.824623),
        ("0.5", 4, "..x...x. ...xx.xx xxxxxx.. .xx.x.x.", 28.341437, None),
        ("2:4", 8, "..xxx.x. x..x..xx ..xxxx.. .xx.x.x.", 41.636096, 81.550122),
        ("2:4", 4, "..xxx.x. x..x..xx ..xxxx.. .xx.x.x.", 41.636096, 81.550122),
    ],
)
def test_sparsegpt_prunes_as_computed_by_hand(sparsity: str, block: int, mask: str, loss: float, lost: float | None) -> None:
    """Masks, loss and error of a layer of 4 outputs; N:M does not depend on the block."""
    solved = solve(WEIGHT_RK, GRAM_KK, pattern=parse_pattern(sparsity), block=block)
    assert picture(solved.mask_RK) == mask
    assert solved.loss == pytest.approx(loss, abs=1e-6)
    assert lost is None or error(solved.weight_RK) == pytest.approx(lost, abs=1e-6)


def test_sparsegpt_weights_are_those_computed_by_hand() -> None:
    """Factor and weights, to the digits written down; pruned weights are plain zeros."""
    upper_KK, damping = inverse_factor(GRAM_KK, 0.01)
    row_K = [0.387193, -0.101234, 0.111093, -0.448628, 0.053733, 0.014990, 0.182292, 0.154228]
    diagonal_K = [0.387193, 0.395666, 0.973229, 0.557247, 0.424683, 0.143243, 0.337388, 0.261839]
    assert damping == 0.01
    assert upper_KK[0].tolist() == pytest.approx(row_K, abs=1e-6) and upper_KK.diagonal().tolist() == pytest.approx(
        diagonal_K, abs=1e-6
    )
    # fmt: off
    half_RK = [
        -1.812500, 1.875000, 0, 0, -1.822101, -1.626722, 0, 0.937244, 0, 1.492250, 0, 0, -1.682300, 0.984792, 0, -1.445099,
        0, 0, 0, 0, 0, 0, 1.614983, 0.885182, 0.937500, 0, 0, -1.452876, 0, 1.384305, -1.166090, -1.593443,
    ]
    two_of_four_RK = [
        -1.812500, 1.875000, 0, 0, 0, -1.652240, 0, 1.440017, 0, 1.492250, -2.197257, 0, -1.669779, 0.973682, 0, 0,
        -0.562500, 0.625000, 0, 0, 0, 0, 1.628918, 0.925846, 0.937500, 0, 0, -1.452876, 0, 1.384305, 0, -1.933217,
    ]
    # fmt: on
    for sparsity, expected_RK in (("0.5", half_RK), ("2:4", two_of_four_RK)):
        weight_RK = solve(WEIGHT_RK, GRAM_KK, pattern=parse_pattern(sparsity)).weight_RK
        assert weight_RK.flatten().tolist() == pytest.approx(expected_RK, abs=1e-6)
        assert not torch.signbit(weight_RK[weight_RK == 0]).any()


CODES_RK = [
    [-7, 7, 1, -5, -8, -6, -3, 7],
    [3, 5, -7, -1, -8, 5, -3, -4],
    [-4, 4, 7, -2, -1, -1, 7, 5],
    [5, 2, 3, -8, 2, 7, -6, -8],
]


@pytest.mark.parametrize("block", [8, 4])
def test_gptq_codes_are_those_computed_by_hand(block: int) -> None:
    """Codes, scales, error and packed words; a group's scale is up to date even inside a block."""
    solved = solve(WEIGHT_RK, GRAM_KK, grid=GRID, block=block)
    assert solved.quantised and solved.quantised.codes_RK.tolist() == CODES_RK
    scales = [0.25, 0.258626, 0.266667, 0.198644, 0.158333, 0.219672, 0.191667, 0.204512]
    assert solved.quantised.scale_RG.flatten().tolist() == pytest.approx(scales, abs=1e-6)
    assert error(solved.weight_RK) == pytest.approx(1.416923, abs=1e-6) and solved.loss == pytest.approx(0.728030, abs=1e-6)
    assert torch.equal(solved.weight_RK, solved.quantised.dense(torch.float64)) and solved.mask_RK.all()
    words = [word & 0xFFFFFFFF for word in pack_to_int32(solved.quantised.codes_RK, 4).flatten().tolist()]
    assert words == [0xF52039F1, 0x45D071DB, 0xDF776FC4, 0x02FA0BAD]


def test_gptq_with_static_scales_and_by_activation() -> None:
    """Static scales change one code; the order by activation, 5 7 0 6 3 4 1 2, keeps groups as stored."""
    static = solve(WEIGHT_RK, GRAM_KK, grid=GRID, static_scales=True)
    assert static.quantised and static.quantised.codes_RK.tolist() == [
        CODES_RK[0],
        [3, 5, -7, -1, -7, 5, -3, -4],
        *CODES_RK[2:],
    ]
    assert error(static.weight_RK) == pytest.approx(1.626251, abs=1e-6)
    ordered = solve(WEIGHT_RK, GRAM_KK, grid=GRID, order="activation")
    assert ordered.quantised and torch.equal(ordered.quantised.scale_RG, static.quantised.scale_RG)
    assert error(ordered.weight_RK) == pytest.approx(1.457115, abs=1e-6)


def test_joint_scales_are_of_weights_that_stay() -> None:
    """2:4 and 4 bits in one pass: with each group pruned before its scale is taken the error is 81.3970; before, 81.4561."""
    solved = solve(WEIGHT_RK, GRAM_KK, pattern=parse_pattern("2:4"), grid=GRID)
    assert solved.quantised and picture(solved.mask_RK) == "..xxx.x. x..x..xx ..xxxx.. .xx.x.x."
    # fmt: off
    codes_RK = [[-7, 7, 0, 0, 0, -8, 0, 7], [0, 6, -8, 0, -8, 4, 0, 0], [-7, 7, 0, 0, 0, 0, 7, 4], [5, 0, 0, -8, 0, 7, 0, -8]]
    # fmt: on
    assert solved.quantised.codes_RK.tolist() == codes_RK
    assert error(solved.weight_RK) == pytest.approx(81.396954, abs=1e-6)
    before_RK, _ = plain(WEIGHT_RK, GRAM_KK, parse_pattern("2:4"), GRID, scale_after=False)
    assert error(before_RK) == pytest.approx(81.456140, abs=1e-6)


CASES = {
    "half": ("0.5", None),
    "share": ("0.29", None),
    "two of four": ("2:4", None),
    "one of three": ("1:3", None),
    "int4": (None, Grid(4, 6, rule="full", scale_dtype=torch.float64)),
    "asymmetric": (None, Grid(4, 6, symmetric=False, scale_dtype=torch.float64)),
    "int8 by output": (None, Grid(8, rule="full", scale_dtype=torch.float64)),
    "both": ("1:3", Grid(4, 3, rule="full", scale_dtype=torch.float64)),
    "both, a share": ("0.5", Grid(8, 6, rule="full", scale_dtype=torch.float64)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("block", "scope"), [(128, "matrix"), (12, "matrix"), (18, "row")])
def test_solve_equals_elimination_by_inverses(case: str, block: int, scope: str, seed: int) -> None:
    """Equal masks, and weights to rounding in float64, for blocks that divide the inputs and the groups or do not."""
    sparsity, grid = CASES[case]
    pattern = parse_pattern(sparsity) if sparsity else None
    weight_RK, x_TK = random_layer(5, 36 if pattern and pattern.group == 4 else 42)
    solved = solve(weight_RK, x_TK.T @ x_TK, pattern=pattern, grid=grid, block=block, scope=scope)  # type: ignore[arg-type]
    expected_RK, mask_RK = plain(weight_RK, x_TK.T @ x_TK, pattern, grid, block, scope)
    assert torch.equal(solved.mask_RK, mask_RK)
    torch.testing.assert_close(solved.weight_RK, expected_RK, rtol=1e-8, atol=1e-8)
    if pattern and not pattern.group:
        bounds = [(a, min(a + block, 42)) for a in range(0, 42, block)]
        counts = [
            pattern.pruned((b - a) * (5 if scope == "matrix" else 1)) * (1 if scope == "matrix" else 5) for a, b in bounds
        ]
        assert [int((~solved.mask_RK[:, a:b]).sum()) for a, b in bounds] == counts


def identity(weight_RK: Tensor, gram_KK: Tensor, solved: Solved) -> float:
    """Half of trace(D H D^T), D the change of the weights and H the damped Gram matrix."""
    K = len(gram_KK)
    damped_KK = gram_KK + solved.damping * gram_KK.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    change_RK = solved.weight_RK - weight_RK
    return 0.5 * float(((change_RK @ damped_KK) * change_RK).sum())


@pytest.mark.parametrize("order", ["stored", "activation"])
@pytest.mark.parametrize("case", ["half", "int4", "asymmetric", "int8 by output", "both, a share"])
def test_the_loss_is_that_of_the_weights(case: str, order: str, seed: int) -> None:
    """Errors summed during the pass equal the error of the weights that come out: no update is lost or misplaced."""
    sparsity, grid = CASES[case]
    weight_RK, x_TK = random_layer(6, 90, tokens=200)
    solved = solve(
        weight_RK, x_TK.T @ x_TK, pattern=parse_pattern(sparsity) if sparsity else None, grid=grid, block=64, order=order
    )  # type: ignore[arg-type]
    assert solved.loss == pytest.approx(identity(weight_RK, x_TK.T @ x_TK, solved), rel=1e-9)
    assert (solved.weight_RK[~solved.mask_RK] == 0).all()


def test_a_fixed_mask_is_kept_and_compensated(seed: int) -> None:
    """With its own mask SparseGPT gives its own weights; with any other, smaller errors than no update."""
    weight_RK, x_TK = random_layer(6, 48, tokens=100)
    gram_KK, pattern = x_TK.T @ x_TK, parse_pattern("0.5")
    pruned = solve(weight_RK, gram_KK, pattern=pattern, block=16)
    again = solve(weight_RK, gram_KK, mask_RK=pruned.mask_RK)
    torch.testing.assert_close(again.weight_RK, pruned.weight_RK, rtol=1e-10, atol=1e-10)
    mask_RK = torch.rand(6, 48) < 0.5
    for order in ("stored", "activation"):
        solved = solve(weight_RK, gram_KK, mask_RK=mask_RK, order=order)  # type: ignore[arg-type]
        assert torch.equal(solved.mask_RK, mask_RK) and (solved.weight_RK[~mask_RK] == 0).all()
        assert error(solved.weight_RK, weight_RK, x_TK) < error(weight_RK * mask_RK, weight_RK, x_TK)
    grid = Grid(8, 8, rule="full", scale_dtype=torch.float64)
    both = solve(weight_RK, gram_KK, mask_RK=mask_RK, grid=grid, block=16)
    torch.testing.assert_close(both.weight_RK, plain(weight_RK, gram_KK, grid=grid, fixed_RK=mask_RK)[0], rtol=1e-8, atol=1e-8)


def test_dead_inputs_change_nothing_but_their_weights(seed: int) -> None:
    """Inputs that were always zero get zeros; the others come out as if the dead ones were not there."""
    weight_RK, x_TK = random_layer(4, 20)
    dead_K = torch.zeros(20, dtype=torch.bool)
    dead_K[[0, 7, 19]] = True
    x_TK[:, dead_K] = 0
    gram_KK, grid = x_TK.T @ x_TK, Grid(8, rule="full", scale_dtype=torch.float64)
    solved = solve(weight_RK, gram_KK, grid=grid)
    alone = solve(weight_RK[:, ~dead_K], gram_KK[~dead_K][:, ~dead_K], grid=grid)
    assert (solved.weight_RK[:, dead_K] == 0).all()
    torch.testing.assert_close(solved.weight_RK[:, ~dead_K], alone.weight_RK, rtol=1e-10, atol=1e-10)
    assert (solve(weight_RK, torch.zeros_like(gram_KK), pattern=parse_pattern("2:4")).weight_RK == 0).all()


@pytest.mark.parametrize(
    ("coupling", "start", "damping"),
    [(0.5, 0.01, 0.01), (1.05, 0.01, 0.1), (1.5, 0.01, 1.0), (1.05, 0.02, 0.2), (1.0, 0.0, 0.001)],
)
def test_damping_rises_tenfold_until_it_suffices(coupling: float, start: float, damping: float) -> None:
    """[[1, c], [c, 1]] has the smallest eigenvalue 1 - c, so that damping must be above c - 1; the damping used is reported."""
    gram_KK = torch.tensor([[1, coupling], [coupling, 1]], dtype=torch.float64)
    solved = solve(torch.ones(1, 2), gram_KK, mask_RK=torch.tensor([[True, False]]), damping=start)
    assert solved.damping == pytest.approx(damping)
    assert float(solved.weight_RK[0, 0]) == 1.0  # nothing after the second input could make up for it


def test_a_gram_matrix_without_factor_is_refused() -> None:
    """One line, rather than an identity in its place."""
    with pytest.raises(UserError, match="--calibration: the sums over a layer's inputs have no inverse"):
        solve(torch.ones(1, 2), torch.tensor([[1.0, 3.0], [3.0, 1.0]]), grid=GRID)
    with pytest.raises(UserError, match="--calibration: the sums over a layer's inputs are not finite"):
        solve(torch.ones(1, 2), torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), grid=GRID)


def test_what_solve_cannot_combine_is_refused() -> None:
    """Nothing to do, two masks, N:M out of order, and groups that cut N:M groups."""
    pattern, mask_RK = parse_pattern("2:4"), torch.ones(4, 8, dtype=torch.bool)
    for given in ({}, {"pattern": pattern, "mask_RK": mask_RK}, {"pattern": pattern, "order": "activation"}):
        with pytest.raises(ValueError):
            solve(WEIGHT_RK, GRAM_KK, **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--group 2: not a multiple of 4, the groups of --sparsity 2:4"):
        solve(WEIGHT_RK, GRAM_KK, pattern=pattern, grid=Grid(4, 2))


def test_float32_is_close_to_float64(seed: int) -> None:
    """The pass runs in the dtype of the Gram matrix; 1e-3 covers 96 inputs of condition up to about 1e4."""
    weight_RK, x_TK = random_layer(8, 96, tokens=300)
    mask_RK = torch.rand(8, 96) < 0.5
    exact = solve(weight_RK.float(), x_TK.T @ x_TK, mask_RK=mask_RK)
    rounded = solve(weight_RK.float(), (x_TK.T @ x_TK).float(), mask_RK=mask_RK)
    assert rounded.weight_RK.dtype == torch.float32 and exact.weight_RK.dtype == torch.float64
    assert float((exact.weight_RK - rounded.weight_RK).norm() / exact.weight_RK.norm()) < 1e-3
