"""The scripted drafter: real rounds accept what the script states, and the text is the target's own."""

import pytest
import torch

from trainkit.errors import UserError
from trainkit.eval.bench.synthetic import SHAPES, ScriptedDrafter, accepted_lengths, random_prompts, random_target
from trainkit.models.shape import TargetShape
from trainkit.runner import Runner


@pytest.mark.parametrize(("tau", "depth", "mean"), [(1.0, 4, 0.0), (3.0, 4, 2.0), (2.35, 4, 1.35), (5.0, 2, 2.0)])
def test_script_has_the_requested_tau_up_to_its_depth(tau, depth, mean):
    """The script's accepted lengths have the requested tau, as far as the depth allows."""
    lengths = accepted_lengths(tau, depth)
    assert sum(lengths) / len(lengths) == pytest.approx(mean) and 0 <= min(lengths) <= max(lengths) <= depth


def test_tau_below_1_and_unknown_shapes_are_refused():
    """A tau below 1 and an unknown model shape are refused."""
    with pytest.raises(UserError, match="at least 1"):
        accepted_lengths(0.5, 3)
    with pytest.raises(UserError, match="llama3-8b"):
        random_target("llama9", torch.device("cpu"), torch.float32)


def scripted_runner(new_tokens: int, max_batch: int = 1, kind: str = "lm"):
    device, cpu = torch.device("cpu"), torch.float32
    decoder = random_target("tiny", device, cpu)
    shape = TargetShape(decoder.shape)
    prompts = random_prompts(decoder.shape.vocab_size, 3, 20)
    plain = Runner(decoder, None, shape, max_batch=1, max_len=20 + new_tokens)
    text = plain.generate(prompts[:1], max_new_tokens=new_tokens)[0].tokens
    drafter = ScriptedDrafter.build(kind, shape, device, cpu, head_rows=100)
    drafter.set_text(prompts[0] + text)
    return Runner(decoder, drafter, shape, max_batch=max_batch, max_len=20 + new_tokens), drafter, prompts, text


@pytest.mark.parametrize(("max_batch", "kind"), [(1, "lm"), (3, "lm"), (1, "medusa"), (3, "hydra"), (3, "eagle")])
def test_rounds_accept_as_scripted_without_loss(max_batch, kind):
    """Each round accepts as many tokens as scripted, and the text is the target's."""
    lengths = [0, 3, 1, 4, 2] * 4
    runner, drafter, prompts, text = scripted_runner(1 + sum(lengths) + len(lengths), max_batch, kind)
    drafter.set_accepted(lengths)
    for output in runner.generate(prompts, max_new_tokens=len(text), depth=4):
        assert output.tokens == text
        assert output.stats.accepted == [4, 4, 4, 4, 4] and output.stats.cut_rounds == 0
        assert output.stats.tau == 3.0


def test_scripted_draft_costs_as_much_as_its_kind():
    """The bytes that a level reads and the calls are those of the wrapped network."""
    runner, drafter, prompts, _ = scripted_runner(8, kind="eagle")
    assert drafter.taps == drafter.inner.taps and drafter.inner.config()["draft_vocab"] == list(range(100))
    assert drafter.step_bytes(0) == drafter.inner.step_bytes(0) > 0
    calls = []
    drafter.inner.lm_head.register_forward_hook(lambda *_: calls.append(1))
    drafter.set_accepted([0] * 20)
    stats = runner.generate(prompts[:1], max_new_tokens=8, depth=3)[0].stats
    assert len(calls) == 3 * (stats.rounds + stats.cut_rounds)


def test_wrong_script_changes_only_tau():
    """A script of a wrong text changes tau and nothing else."""
    runner, drafter, prompts, text = scripted_runner(30)
    drafter.set_text([token + 1 for token in prompts[0] + text])
    drafter.set_accepted(accepted_lengths(5.0, 4))
    (output,) = runner.generate(prompts[:1], max_new_tokens=30, depth=4)
    assert output.tokens == text and output.stats.tau == 1.0


def test_named_shapes_have_published_parameter_counts():
    """Llama 3.2 1B: 1.24e9, Llama 3.1 8B: 8.03e9, according to their model cards."""
    from trainkit.layers.blocks import Decoder

    for name, published in (("llama3-1b", 1.2358e9), ("llama3-8b", 8.0303e9)):
        with torch.device("meta"):
            decoder = Decoder(SHAPES[name])
        assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(published, rel=1e-4)
