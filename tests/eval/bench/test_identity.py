"""Which differences rounding explains, and which it does not."""

import torch

from tests.support.models import pair, ragged_prompts
from trainkit.eval.bench.identity import TIE, Judge, logits, tolerance_of
from trainkit.runner.sampling import Sampling


def test_equal_texts_are_equal_and_a_wrong_token_is_a_mismatch(seed):
    runner = pair(ends=())
    prompts = ragged_prompts(4)
    texts = [out.tokens for out in runner.generate(prompts, max_new_tokens=12, depth=0)]
    judge = Judge(runner.rounds.target, Sampling(), 0)
    assert judge.compare(prompts, texts, texts).equal == 4

    planted = [list(text) for text in texts]
    worst = int(logits(runner.rounds.target, prompts[2] + texts[2][:5])[-1].argmin())
    planted[2][5] = worst
    found = judge.compare(prompts, texts, planted)
    assert (found.equal, found.ties, found.mismatches) == (3, 0, 1)
    (one,) = found.differences
    assert (one.prompt, one.place, one.tokens) == (2, 5, (texts[2][5], worst)) and one.gap > TIE


def test_two_tokens_of_the_same_score_are_a_tie(seed):
    """With equal embedding rows and a tied head, two tokens score the same wherever they stand."""
    runner = pair(ends=())
    target = runner.rounds.target
    prompt = [1, 2, 3]
    best = int(logits(target, prompt)[-1].argmax())
    twin = next(token for token in range(48) if token not in (best, *prompt))
    with torch.no_grad():
        target.embed.weight[twin] = target.embed.weight[best]
    judge = Judge(target, Sampling(), 0)
    found = judge.compare([prompt], [[best]], [[twin]])
    assert found.ties == 1 and found.mismatches == 0 and found.differences[0].gap < TIE


def test_a_text_that_goes_on_where_the_other_ended_is_a_mismatch():
    runner = pair()
    found = Judge(runner.rounds.target, Sampling(), 0).compare([[1]], [[5, 7]], [[5, 7, 9]])
    assert found.mismatches == 1 and found.differences[0].tokens == (-1, 9)


def test_sampled_texts_are_judged_with_their_noise(seed):
    """The seeded choice is by far not the likeliest token often; judged by the same noise it has gap 0 to itself."""
    runner = pair(ends=())
    prompts = ragged_prompts(3)
    texts = [out.tokens for out in runner.generate(prompts, max_new_tokens=8, temperature=1.0, seed=5, depth=0)]
    judge = Judge(runner.rounds.target, Sampling(1.0), 5)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for place, token in enumerate(text):
            assert judge.gap(i, len(prompt), prompt + text[:place], [token]) < TIE


def test_tolerance_is_fixed_in_float32_and_measured_in_bfloat16(seed):
    target = pair().rounds.target
    assert tolerance_of(target, [1, 2, 3]) == TIE
    half = target.bfloat16()
    half.rope = torch.empty(0, *half.rope.shape[1:], dtype=torch.bfloat16)
    assert TIE <= tolerance_of(half, list(range(20))) < 1.0
