"""Kind medusa: which head learns which label, how it starts, and the layout that vLLM loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from trainkit.drafters.base import DraftBatch, Frontier, LossOutput, TargetHandle
from trainkit.drafters.hydra import Hydra
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.losses.divergence import CrossEntropy
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.modules.meter import Meter, means

# H heads  D hidden  K ids  V vocabulary


def test_head_i_at_t_learns_the_token_at_t_plus_2_plus_i(tiny_target):
    """Two documents, tokens 0 to 4 and 5 to 8; counted labels are 2, 3, 4 and 7, 8. Hidden state t is [t, ...].

    Head 0: label 2 from 0, 3 from 1, 4 from 2; 7 from 5, 8 from 6. Head 1: 3 from 0, 4 from 1; 8 from 5.
    """
    asked = []

    def record(draft_ND, draft_head, target_ND, target_head, ids_K=None, labels_N=None, rows=None):
        parts = (x.split(rows.sizes) for x in (draft_ND[:, 0], target_ND[rows.index_N, 0], labels_N))
        asked.extend((a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(*parts, strict=True))
        return LossOutput(draft_ND.sum() * 0, torch.tensor(1.0), {}, {"counted": torch.ones(len(draft_ND))})

    draft, D = Medusa(target_shape(tiny_target), num_heads=2), target_shape(tiny_target).decoder.hidden_size
    tokens = torch.arange(9)[None]
    hidden = tokens[..., None].float().expand(-1, -1, D)
    document = torch.tensor([[0] * 5 + [1] * 4])
    counted = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1]]).bool()
    handle = TargetHandle(lambda ids: ids, lambda h: h, 320)
    draft(DraftBatch(tokens, tokens, document, counted, hidden[:, :, None], hidden, handle), record)
    assert asked == [
        ([0.0, 1.0, 2.0, 5.0, 6.0], [1.0, 2.0, 3.0, 6.0, 7.0], [2, 3, 4, 7, 8]),
        ([0.0, 1.0, 5.0], [2.0, 3.0, 7.0], [3, 4, 8]),
    ]


@pytest.mark.parametrize("head", ["own", "target"])
def test_new_head_equals_the_target_head(head, tiny_target, seed):
    """An untrained head gives the target's own logits."""
    teacher = FrozenTarget(tiny_target)
    draft = Medusa(teacher.shape(), num_heads=3, num_layers=2, head=head)
    draft.initialise(FrozenTarget(tiny_target))
    state = draft.init_state(1, 8, torch.device("cpu"), torch.float32)
    state["hidden"].copy_(torch.randn(1, 1, teacher.hidden_size))
    zero = torch.zeros(1, 2, dtype=torch.long)
    for depth in range(3):
        nodes = Frontier(zero, zero, zero[0], zero, torch.ones(1, 2, 1, dtype=torch.long), depth)
        logits_BFV = draft.step(state, nodes, teacher.handle(), 8).logits_BFK
        torch.testing.assert_close(logits_BFV, teacher.handle().head(state["hidden"]).expand(-1, 2, -1))


def test_head_metrics_count_only_their_own_labels(tiny_target, seed):
    """The metrics of each head are averaged over the labels of that head."""
    teacher = FrozenTarget(tiny_target)
    draft = Medusa(teacher.shape(), num_heads=2, decay=0.5)
    draft.initialise(FrozenTarget(tiny_target))
    tokens, positions = torch.randint(320, (2, 9)), torch.arange(9).expand(2, -1)
    hidden, _ = teacher.forward(tokens, positions, torch.zeros_like(tokens))
    batch = DraftBatch(tokens, positions, torch.zeros_like(tokens), positions > 0, hidden[:, :, None], hidden, teacher.handle())
    output, meter = draft(batch, CrossEntropy().measuring()), Meter()
    meter.add_output(output)
    values = means({name: float(value) for name, value in meter.sums.items()})
    alone = []
    for ahead in (2, 3):  # every position of a row with a label that far ahead; both heads still equal the target's
        log_q = teacher.handle().head(hidden[:, : 9 - ahead]).log_softmax(-1)
        agree = log_q.argmax(-1) == teacher.handle().head(hidden[:, ahead - 1 : 8]).argmax(-1)
        alone.append((-log_q.gather(-1, tokens[:, ahead:, None]).sum(), agree.double()))
    assert output.sum.item() == pytest.approx(float(alone[0][0] + 0.5 * alone[1][0]), rel=1e-5)
    assert float(output.count) == 14 + 12
    for head in (1, 2):
        assert values[f"agreement_head{head}"] == pytest.approx(float(alone[head - 1][1].mean()))
    assert values["agreement"] == pytest.approx(float((alone[0][1].sum() + alone[1][1].sum()) / 26))


@pytest.mark.parametrize("ids", [None, [1, 4, 7, 319]], ids=["whole", "trimmed"])
def test_export_has_the_vllm_layout(ids, tiny_target, tmp_path):
    """Keys, shapes and config as vLLM 0.32 reads them; no other config key may hold both num and heads."""
    D = target_shape(tiny_target).decoder.hidden_size
    draft = Medusa(target_shape(tiny_target), num_heads=2, num_layers=2, draft_vocab=ids)
    draft.initialise(FrozenTarget(tiny_target))
    draft.export(tmp_path, torch.float32)
    found = {name: tuple(value.shape) for name, value in load_file(tmp_path / "model.safetensors").items()}
    rows = 320 if ids is None else 4
    expected = {f"lm_heads.{k}.weight": (rows, D) for k in range(2)}
    expected |= {f"blocks.{k}.layers.{i}.weight": (D, D) for k in range(2) for i in range(2)}
    expected |= {f"blocks.{k}.layers.{i}.bias": (D,) for k in range(2) for i in range(2)}
    assert found == (expected if ids is None else expected | {"token_map": (4,)})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": D,
        "vocab_size": 320,
        "num_heads": 2,
        "num_hidden_layers": 2,
        "medusa_fc_bias": True,
        "original_lm_head": False,
        "truncated_vocab_size": rows,
    }
    assert [name for name in config if "num" in name and "heads" in name] == ["num_heads"]
    if ids is not None:
        assert load_file(tmp_path / "model.safetensors")["token_map"].tolist() == ids


@pytest.mark.parametrize("kind", [Medusa, Hydra])
def test_trimmed_heads_equal_rows_of_the_full_heads(kind, tiny_target, tmp_path, seed):
    """Trimmed heads give the full heads' logits of the retained ids."""
    shape = target_shape(tiny_target)
    whole = kind(shape, num_heads=2)
    whole.initialise(FrozenTarget(tiny_target))
    whole.export(tmp_path, torch.float32)
    middle, fewer = list(range(0, 320, 2)), list(range(0, 320, 8))
    trimmed = kind.load(tmp_path, shape, {**whole.config(), "draft_vocab": middle})
    (tmp_path / "again").mkdir()
    trimmed.export(tmp_path / "again", torch.float32)
    twice = kind.load(tmp_path / "again", shape, {**whole.config(), "draft_vocab": fewer})
    hidden = torch.randn(3, shape.decoder.hidden_size)
    for draft, ids in ((trimmed, middle), (twice, fewer)):
        torch.testing.assert_close(draft.lm_heads[1](hidden), whole.lm_heads[1](hidden)[:, ids])
    with pytest.raises(UserError, match="never had"):
        kind.load(tmp_path / "again", shape, {**whole.config(), "draft_vocab": [1, 2]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"head": "target", "draft_vocab": [1]}, "head: own"),
        ({"draft_vocab": [3, 2]}, "ascending"),
    ],
)
def test_invalid_arguments_are_refused(given, said, tiny_target):
    """An invalid argument is named in the error."""
    with pytest.raises(UserError, match=said):
        Medusa(target_shape(tiny_target), **given)
