"""Packed weights stand for (code - zero) * scale, in the stated bytes, for groups and widths of any size."""

import pytest
import torch

from trainkit.compress.quantise import Grid, quantise
from trainkit.layers.linear import Linear
from trainkit.layers.packed import Packed, plane


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("K", "group"), [(256, 32), (256, None), (576, 64), (36, 12), (35, None), (30, 6)])
def test_packed_codes_stand_for_their_weight(K, group, symmetric, bits, seed):
    """The unpacked weight is that of the codes, with whole words or padded ones."""
    found = quantise(torch.randn(10, K), Grid(bits, group, symmetric, scale_dtype=torch.bfloat16))
    packed = Packed.from_codes(found.codes_RK, found.scale_RG, found.zero_RG, bits)
    assert packed.shape == (10, K) and packed.group == (group or K)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.dense(dtype), found.dense(dtype))
    words = -(-K * bits // 32) if plane(K, packed.kind, packed.group) == 0 else K * bits // 32
    assert packed.nbytes == 10 * (4 * words + K // packed.group * (2 if symmetric else 3))


def test_packed_float8_stands_for_its_weight(seed):
    """Values of float8 keep their bits."""
    found = quantise(torch.randn(10, 70), Grid(8, None, kind="float"))
    packed = Packed.from_codes(found.codes_RK, found.scale_RG, None, 8, "float")
    assert torch.equal(packed.dense(torch.float32), found.dense(torch.float32))


def test_wrong_codes_and_shapes_are_refused():
    """Bits that no kind has, groups that do not fit, and a weight of another shape."""
    codes, scale = torch.zeros(4, 12, dtype=torch.int8), torch.ones(4, 3)
    for arguments, part in (
        ((scale, None, 3), "3 bits"),
        ((torch.ones(4, 5), None, 4), r"\[4, 5\]"),
        ((scale, scale[1:], 4), "fit"),
    ):
        with pytest.raises(ValueError, match=part):
            Packed.from_codes(codes, *arguments)
    with pytest.raises(ValueError, match="4 outputs"):
        Linear(8, 4).set_packed(Packed.from_codes(codes, scale, None, 4))
