"""The kernel that moves cache slots, compared with layers/attention.py."""

# B batch  L layers  G key-value heads  S cache slots  E head width  P positions to move

import pytest
import torch

pytest.importorskip("triton")

from trainkit.layers.attention import move_slots as move_slots_eager
from trainkit.layers.kernels.move import move_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B, L, G, E, P", [(1, 1, 1, 16, 1), (3, 2, 2, 24, 5), (2, 1, 1, 128, 33)])
def test_moving_equals_attentions_even_with_overlap(B, L, G, E, P, dtype, seed):
    """The whole cache, a view of larger rows, equals that of torch bit for bit; most paths overlap their destination."""
    nodes = P + 9
    ours = torch.randn(B, L, 2 * G, nodes + 20, E + 8, device=DEVICE).to(dtype)
    theirs, root = ours.clone(), torch.randint(0, 20, (B,), device=DEVICE)
    path = torch.stack([torch.randperm(nodes - 1, device=DEVICE)[: P - 1].sort().values + 1 for _ in range(B)])
    path = torch.cat([torch.zeros(B, 1, device=DEVICE, dtype=torch.long), path], dim=1)
    path[0, (P + 1) // 2 :] = 0  # past the end of a shorter path
    move_slots(ours[..., :E], root[:, None] + path, root)
    move_slots_eager(theirs[..., :E], root[:, None] + path, root)
    assert torch.equal(ours, theirs)
