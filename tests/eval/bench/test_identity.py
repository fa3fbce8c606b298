"""Which differences between texts are ties, and which are mismatches."""

import pytest
import torch

from tests.support.models import pair, ragged_prompts
from trainkit.eval.bench.identity import TIE, IdentityChecker, _sampling_bounds, logits, tie_tolerance
from trainkit.runner.sampling import CHOICE, Sampling, gumbel, request_keys


def test_equal_texts_pass_and_a_wrong_token_fails(seed):
    """Equal texts are counted as equal, and one wrong token as a mismatch."""
    runner = pair(ends=())
    prompts = ragged_prompts(4)
    texts = [out.tokens for out in runner.generate(prompts, max_new_tokens=12, depth=0)]
    checker = IdentityChecker(runner.rounds.target, Sampling(), 0)
    assert checker.compare(prompts, texts, texts).to_dict()["equal"] == 4

    planted = [list(text) for text in texts]
    worst = int(logits(runner.rounds.target, prompts[2] + texts[2][:5])[-1].argmin())
    planted[2][5] = worst
    found = checker.compare(prompts, texts, planted)
    assert [found.to_dict()[name] for name in ("equal", "ties", "mismatches")] == [3, 0, 1]
    (first,) = found.differences
    assert (first.prompt, first.position, first.tokens) == (2, 5, (texts[2][5], worst)) and first.gap > TIE


def test_tokens_with_equal_scores_are_a_tie(seed):
    """With equal embedding rows and a tied head, two tokens have the same score after any text."""
    runner = pair(ends=())
    target = runner.rounds.target
    prompt = [1, 2, 3]
    best = int(logits(target, prompt)[-1].argmax())
    twin = next(token for token in range(48) if token not in (best, *prompt))
    with torch.no_grad():
        target.embed.weight[twin] = target.embed.weight[best]
    checker = IdentityChecker(target, Sampling(), 0)
    found = checker.compare([prompt], [[best]], [[twin]])
    assert found.to_dict()["ties"] == 1 and found.mismatches == 0 and found.differences[0].gap < TIE


def test_text_of_another_length_is_a_mismatch():
    """A text that continues where the other ended is a mismatch."""
    runner = pair()
    found = IdentityChecker(runner.rounds.target, Sampling(), 0).compare([[1]], [[5, 7]], [[5, 7, 9]])
    assert found.mismatches == 1 and found.differences[0].tokens == (-1, 9)


def test_sampled_texts_are_compared_with_their_noise(seed):
    """A sampled token is often not the most probable one; scored with the same noise, its gap is 0."""
    runner = pair(ends=())
    prompts = ragged_prompts(3)
    texts = [out.tokens for out in runner.generate(prompts, max_new_tokens=8, temperature=1.0, seed=5, depth=0)]
    checker = IdentityChecker(runner.rounds.target, Sampling(1.0), 5)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for position, token in enumerate(text):
            assert checker.gap(i, prompt + text[:position], [token]) < TIE


def test_tolerance_is_measured_in_bfloat16(seed):
    """The tie tolerance is a constant in float32 and measured in bfloat16."""
    target = pair().rounds.target
    assert tie_tolerance(target, [1, 2, 3]) == TIE
    half = target.bfloat16()
    half.rope.table = torch.empty(0, *half.rope.table.shape[1:], dtype=torch.bfloat16)
    assert TIE <= tie_tolerance(half, list(range(20))) < 1.0


@pytest.mark.parametrize(
    ("scores", "sampling", "kept", "at_edge"),
    [
        ([0.4, 0.3, 0.2, 0.1], Sampling(1.0, top_p=0.7), [0, 1], [2]),
        ([0.4, 0.3, 0.3, 0.0], Sampling(1.0, top_p=0.5), [0], [1, 2]),
        ([0.4, 0.3, 0.2, 0.1], Sampling(1.0, top_p=0.75), [0, 1, 2], []),
        ([0.4, 0.2, 0.2, 0.2], Sampling(1.0, top_k=2), [0], [1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], Sampling(1.0, top_k=2), [0, 1], []),
        ([0.4, 0.4, 0.1, 0.1], Sampling(1.0, top_k=3, top_p=0.8), [0, 1], []),
        ([0.9, 0.1, 0.0, 0.0], Sampling(1.0, top_p=0.00001), [0], []),
    ],
)
def test_edges_of_top_k_and_top_p_by_hand(scores, sampling, kept, at_edge):
    """Tokens that rounding may move over the boundary are possibly kept, but not certainly."""
    possible, certain = _sampling_bounds(torch.tensor(scores).log(), sampling, TIE)
    assert certain.nonzero()[:, 0].tolist() == kept
    assert possible.nonzero()[:, 0].tolist() == sorted(kept + at_edge)


def test_rounding_at_the_edge_of_the_nucleus_is_a_tie(seed):
    """Scores off by rounding put another token into the nucleus: the texts differ by a tie; a token far outside is wrong."""
    runner, ties = pair(ends=()), 0
    target = runner.rounds.target
    for request in range(300):
        prompt = torch.randint(0, 48, (5,)).tolist()
        exact = logits(target, prompt)[-1].softmax(-1).sort(descending=True)
        edge = float(exact.values[:3].sum())
        one, other = (choice(target, prompt, request, Sampling(1.0, top_p=edge + error)) for error in (1e-6, -1e-6))
        checker = IdentityChecker(target, Sampling(1.0, top_p=edge), 0)
        found = checker.compare([[]] * request + [prompt], [[]] * request + [[one]], [[]] * request + [[other]])
        assert not found.mismatches
        ties += one != other
        assert checker.gap(request, prompt, [int(exact.indices[20])]) == float("inf")
    assert ties > 3


def choice(target, prompt, request, sampling):
    keys = torch.tensor([request_keys(0, request)], dtype=torch.int32)
    noise = gumbel(keys, torch.tensor([[len(prompt)]]), torch.arange(48), CHOICE)[0, 0]
    return int((sampling.process(logits(target, prompt)[-1]) + noise).argmax())
