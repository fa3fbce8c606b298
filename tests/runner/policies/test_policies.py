"""A policy chooses how much is drafted, and never what is emitted; `cost` drafts where it pays and rests where it does not."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.support import laws
from tests.support.equality import assert_few, compare
from tests.support.models import SHAPE, pair, predicting, ragged_prompts, random_decoder, table_runner
from tests.support.pauses import check_pauses
from tests.support.replaying import replayed
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError
from trainkit.models.predictor import SIGNALS, FoldedPredictor, signals
from trainkit.models.shape import TargetShape
from trainkit.runner import DynamicTree, Runner, Stats
from trainkit.runner.policies import cost_model as costs
from trainkit.runner.policies.chain import PolicyChain
from trainkit.runner.policies.cost import Cost
from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.policies.logistic import OnlineLogistic, log_odds
from trainkit.runner.policies.simple import TIERS, Recent, Threshold
from trainkit.runner.policies.spec import PolicySpec
from trainkit.runner.policy import Policy, RoundOutcome
from trainkit.runner.round import Plan, Rounds
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees import static
from trainkit.runner.verify import Residual

POLICIES = [
    "fixed",
    "confidence:0.3",
    "predictor:0.4",
    "logistic",
    "logistic:0.2",
    "cost",
    "cost:logistic",
    "cost-blind",
    "ema",
]


@pytest.fixture(scope="module")
def costs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("costs")  # measured once for all tests here, which takes seconds


@pytest.fixture(autouse=True)
def own_costs(costs_folder, monkeypatch):
    monkeypatch.setenv("TRAINKIT_COSTS", str(costs_folder))


def flat(verify: float = 0.0, level: float = 0.1) -> ChainCosts:
    """A plain step of 1, `verify` more for each further row, `level` for each draft level."""
    nodes = tuple(range(1, 20))
    line = tuple(1.0 + verify * (n - 1) for n in nodes)
    return ChainCosts((1, 8), nodes, (line, line), (level, level), (level, level), (0.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_policy_decodes_as_plain_decoding(batch, temperature, seed):
    """Under every policy the text is that of plain decoding."""
    runner = pair(max_batch=batch)
    runner.predictor = predicting(runner)
    if batch != 3:
        runner.policies.costs = lambda *_: flat(0.05, 0.1)
    prompts, options = ragged_prompts(8), {"max_new_tokens": 24, "temperature": temperature, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    ties = []
    for policy in POLICIES:
        for _ in range(2):  # the second call goes on with what the first has learnt
            outs = runner.generate(prompts, policy=policy, depth=5, **options)
            sampling = Sampling(temperature)
            ties += compare(runner.rounds.target, prompts, [out.tokens for out in outs], plain, sampling, seed)
    assert_few(ties, 2 * len(POLICIES) * sum(map(len, plain)))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_paused_draft_catches_up_exactly(temperature, seed):
    """A draft that paused and caught up gives the logits of one that never paused."""
    runner = pair(max_batch=3)
    check_pauses(runner, ragged_prompts(5), 4, max_new_tokens=40, temperature=temperature, seed=seed, ignore_end=True)


@pytest.mark.parametrize("policy", ["cost", "cost:logistic", "cost-blind", "logistic", "ema", "fixed"])
@pytest.mark.parametrize(("temperature", "lag"), [(0.0, 1), (0.7, 1), (0.7, 0)])
def test_captured_rounds_use_few_depths(policy, temperature, lag, seed):
    """With the host a round behind, as on a GPU, or none: the text stays plain decoding's, and the depths are the tiers'."""
    runner = pair(max_batch=4)
    runner.predictor = predicting(runner)
    prompts, options = ragged_prompts(9), {"max_new_tokens": 30, "temperature": temperature, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    if policy == "cost":
        runner.policies.costs(10, runner.predictor)  # as a GPU would have measured them
    replayed(runner, lag)
    if policy.startswith("cost"):
        runner.policies.costs = lambda *_: flat(0.05, 0.1)
    outs = runner.generate(prompts, policy=policy, **options)
    assert_few(compare(runner.rounds.target, prompts, [out.tokens for out in outs], plain, Sampling(temperature), seed), 300)
    keys = {key[0] for key in runner.scheduler.graphs.closures}
    shared = {key for key in keys if key and isinstance(key[-1], FoldedPredictor | OnlineLogistic | None)}
    depths = {len(key[0] if key in shared else key) for key in keys}
    assert depths and depths <= {0, *TIERS}
    assert bool(shared) == (policy in ("cost", "cost:logistic", "logistic")) and all(
        0 < each <= len(paths) for paths, each, _ in shared
    )


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["cost-blind", "ema"])
def test_policies_decode_the_same_in_captured_rounds(policy, seed):
    """In captured rounds the text under a policy is that of plain decoding."""
    runner = pair(max_batch=4)
    runner = Runner(runner.rounds.target.cuda(), runner.drafter.cuda(), runner.shape, None, 4, 96, capture=True)
    prompts = ragged_prompts(9)
    plain = [out.tokens for out in runner.generate(prompts, max_new_tokens=30, depth=0, seed=seed)]
    for _ in range(2):
        assert [out.tokens for out in runner.generate(prompts, max_new_tokens=30, policy=policy, seed=seed)] == plain


class Choosy(Policy):
    """Leaves token 0 unverified."""

    signal = "confidence"
    is_zero = False

    def continues(self, signal_B):
        self.is_zero = signal_B[0] == 1
        return True

    def verified(self, levels, rows):
        return [levels - self.is_zero] * rows


class Telling(PolicyChain):
    """Says which token was drafted."""

    def _signal(self, steps, made, depth):
        picked_B1 = made.noisy_BFK.argmax(-1)
        return (picked_B1 == 0)[:, 0].float(), picked_B1, None


LIKELY_ZERO = np.array([0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3])  # the draft's law everywhere; the target's is uniform
BLOCKS = 2500


def choosy_counts(drops: bool, seed: int) -> np.ndarray:
    runner = table_runner(torch.zeros(1, 4, 4), torch.tensor(LIKELY_ZERO).log().expand(1, 4, 4), 1, 4 * BLOCKS + 1)
    shape = Telling(Choosy(1), torch.device("cpu"), may_drop=drops)
    outs = runner.generate([[0]], max_new_tokens=4 * BLOCKS, seed=seed, tree=shape, verify="residual", temperature=1.0)
    tokens = np.array(outs[0].tokens).reshape(-1, 4)
    return np.bincount(tokens @ [64, 16, 4, 1], minlength=256).reshape(4, 4, 4, 4).astype(float)


def test_residual_verifies_every_drafted_token():
    """Through the engine: no policy may leave a token unverified there, by what it is."""
    runner = pair()
    runner.predictor, runner.policies.costs = predicting(runner), lambda *_: flat(0.05, 0.1)
    for policy in POLICIES:
        runner.generate([[1, 2]], max_new_tokens=6, temperature=1.0, verify="residual", policy=policy)
        runner.generate([[1, 2]], max_new_tokens=6, temperature=1.0, verify="coupled", policy=policy)
        runner.generate([[1, 2]], max_new_tokens=6, temperature=0.0, verify="residual", policy=policy)
    for (_, _, warm, verify, *_), chain in runner.policies.chains.items():
        assert chain.may_drop == (verify == "coupled" or not warm)


@pytest.mark.parametrize("verify", ["coupled", "residual"])
def test_logistic_reads_noise_where_the_target_shares_it(verify, seed):
    """Its feature is that of the draft's distribution, with the noise under coupled and without it under residual."""
    runner, same = pair(max_batch=3), []

    def look(trace):
        quiet_BD = torch.stack([log_odds(logits[:, 0]) for logits in trace.draft.logits], 1)
        same.append(torch.allclose(trace.draft.features_BD, quiet_BD, atol=1e-4))

    runner.observe = look
    runner.generate(
        ragged_prompts(3), max_new_tokens=12, temperature=1.0, verify=verify, policy="logistic:0", depth=3, ignore_end=True
    )
    assert len(same) > 2 and all(same) == (verify == "residual") == any(same)


def test_residual_needs_every_drafted_token_verified(seed):
    """The planted fault leaves the place of a drafted 0 to the target, and the others to tokens that are all accepted.

    So token 0 comes with chance 0.6 * 1/4 instead of 1/4, and the joint of four tokens has a noncentrality far above 150.
    """
    truth, wrong = np.full(4, 0.25), np.array([0.15, 0.85 / 3, 0.85 / 3, 0.85 / 3])
    joint, fault = (np.einsum("a,b,c,d->abcd", law, law, law, law) for law in (truth, wrong))
    assert BLOCKS * ((fault - joint) ** 2 / joint).sum() > 150
    assert laws.p_value(choosy_counts(False, seed), joint) > 1e-4
    assert laws.p_value(choosy_counts(True, seed), joint) < 1e-6


def test_signals_by_hand():
    """Probabilities 0.5, 0.3, 0.2: the best and its runner-up, and from the second on the best as the other."""
    logits = torch.tensor([[[0.2, 0.5, 0.3]]]).log() + 3.0
    found = signals(logits, 2, 0.7)[0, 0]
    assert found.shape == (2, SIGNALS)
    torch.testing.assert_close(found[:, 1], torch.tensor([0.5, 0.3]))
    torch.testing.assert_close(found[:, 3], torch.tensor([0.3, 0.5]))
    torch.testing.assert_close(found[:, 0], found[:, 1].log())
    assert (found[:, 4] == 0.7).all()
    alone = signals(torch.tensor([[[0.0, float("-inf")]]]), 1, 0.0)[0, 0, 0]
    assert alone.isfinite().all() and alone[1] == 1 and alone[3] < 1e-8


def test_thresholds_stop_by_hand():
    """The confidence and predictor thresholds stop drafting where computed by hand."""
    confident = Threshold("confidence", 0.6, 9)
    confident.begin(2)
    assert confident.continues([0.9, 0.5]) and not confident.continues([0.9, 0.2])
    chances = Threshold("predictor", 0.5, 9)
    chances.begin(1)
    assert chances.continues([0.8]) and chances.continues([0.7]) and not chances.continues([0.8])  # 0.8, 0.56, 0.448


def test_thresholds_choose_captured_depths_by_hand():
    """By the means of earlier rounds: survivals 0.9, 0.6, 0.3 pass 0.5 twice, confidences 0.9, 2/3, 1/2 pass 0.6 twice."""
    for policy in (Threshold("predictor", 0.5, 9), Threshold("logistic", 0.5, 9), Threshold("confidence", 0.6, 9)):
        assert policy.captured_size(2) == (8, 8), "nothing is known: the largest tier"
        for _ in range(60):
            policy.learn(RoundOutcome(2, 3, [3, 3], [1, 1], [[1.0, 0.8], [0.7, 0.5], [float("nan"), 0.6]]))
        assert policy.captured_size(2) == (3, 3)


def drafted(policy: Cost, said: list[float], rows: int = 1) -> tuple[int, int]:
    """Levels run, and kept, when each row has these chances."""
    most, level = policy.begin(rows), 0
    while level < most:
        level += 1
        if not policy.continues([said[level - 1]] * rows):
            break
    return level, policy.verified(level, rows)[0]


def test_cost_stops_where_a_token_costs_more_than_it_gains():
    """One row, R = 1 token in a plain step: at a price of 0.3 for a level and its row, chance 0.7 * S must be above 0.3."""
    policy = Cost(flat(verify=0.2, level=0.1), 6, signal="predictor")
    assert policy.rate(1) == 1
    levels, kept = drafted(policy, [0.6, 0.6, 0.6, 0.6])
    assert levels == 2  # 0.6 * 0.7 = 0.42 pays, 0.36 * 0.7 = 0.25 does not
    assert kept == 2  # what is drafted is kept where its chance, 0.6 and 0.36, is above the price of a row, 0.2
    assert drafted(policy, [0.1, 0.9]) == (1, 0)  # so poor a first token is not worth a row of 0.2


def test_cost_drafts_fully_if_free_and_never_if_expensive():
    """`cost` drafts to full depth where drafting is free, and verifies nothing where it is expensive."""
    assert drafted(Cost(flat(0.0, 0.001), 6, "predictor"), [0.95] * 6) == (6, 6)
    assert drafted(Cost(flat(2.0, 1.0), 6, "predictor"), [0.95] * 6) == (1, 0)


def run(policy: Policy, chance: float, rounds: int, rows: int, generator: np.random.Generator) -> tuple[float, float]:
    """Seconds by the costs, of the policy and of plain decoding, for rounds whose proposals are accepted with this chance."""
    assert isinstance(policy, Cost)
    seconds = tokens = 0.0
    for _ in range(rounds):
        levels, kept = (0, 0) if not policy.begin(rows) else drafted_again(policy, chance, rows)
        luck = generator.random((rows, kept)) < chance
        accepted = [int(row.cumprod().sum()) for row in luck]
        policy.learn(RoundOutcome(rows, levels, [kept] * rows, accepted))
        seconds += policy.costs.round(rows, levels, kept)
        tokens += sum(accepted) + rows
    return seconds, tokens * policy.costs.verify(rows, 1) / rows


def drafted_again(policy: Cost, chance: float, rows: int) -> tuple[int, int]:
    level = 0
    while level < policy.max_depth:
        level += 1
        if not policy.continues([chance] * rows):
            break
    return level, policy.verified(level, rows)[0]


@pytest.mark.parametrize("reads", ["predictor", "none"])
def test_cost_stops_a_useless_draft_at_little_loss(reads, seed):
    """With a draft that is never accepted `cost` is at most 1 % slower than plain decoding."""
    generator = np.random.default_rng(seed)
    policy = Cost(flat(verify=0.1, level=0.3), 8, reads)
    seconds, plain = run(policy, 0.0, 3000, 8, generator)
    assert seconds < 1.01 * plain


def test_cost_resumes_drafting_when_it_pays_again(seed):
    """`cost` drafts again once drafts are accepted again."""
    generator = np.random.default_rng(seed)
    policy = Cost(flat(verify=0.05, level=0.1), 8, signal="predictor")
    run(policy, 0.0, 300, 1, generator)
    run(policy, 0.9, 600, 1, generator)
    seconds, plain = run(policy, 0.9, 300, 1, generator)
    assert plain > 2 * seconds


def told_rounds(policy: Cost, said: list[float], rounds: int, rows: int, tier: bool, draw: np.random.Generator) -> float:
    """Tokens per second and row by the costs, where these are the chances by level, and the policy knows them."""
    seconds, tokens, truth = 0.0, 0, np.array(said)
    for _ in range(rounds):
        levels, kept = policy.captured_size(rows) if tier else drafted(policy, said, rows)
        luck = draw.random((rows, kept)) < truth[:kept]
        accepted = luck.cumprod(1).sum(1).tolist()
        chances = [[float(one)] * rows for one in truth.cumprod()[:levels]] if tier else ()
        policy.learn(RoundOutcome(rows, levels, [kept] * rows, accepted, chances))
        seconds += policy.costs.round(rows, levels, kept)
        tokens += sum(accepted) + rows
    return tokens / seconds / rows


@pytest.mark.parametrize(("reads", "tier"), [("none", False), ("predictor", False), ("confidence", True)])
@pytest.mark.parametrize("rows", [1, 3])
def test_cost_retries_a_level_that_failed(rows, reads, tier, seed):
    """After 300 rounds whose second token fails it comes to all eight levels of good ones, as one that never saw these."""
    draw, good = np.random.default_rng(seed), [0.95] * 8
    policy, fresh = (Cost(flat(0.05, 0.1), 8, reads) for _ in range(2))
    told_rounds(policy, [0.95] + [0.02] * 7, 300, rows, tier, draw)
    told_rounds(policy, good, 700, rows, tier, draw)
    assert told_rounds(policy, good, 500, rows, tier, draw) > 0.9 * told_rounds(fresh, good, 500, rows, tier, draw)


@pytest.mark.parametrize("reads", ["none", "predictor"])
def test_retries_of_cost_are_cheap(reads, seed):
    """Against the best fixed depth, 2, which is never wrong: the first token is sure, the second good, and no other."""
    draw, said = np.random.default_rng(seed), [0.95, 0.8] + [0.05] * 6
    rate = told_rounds(Cost(flat(0.1, 0.2), 8, reads), said, 3000, 1, False, draw)
    assert rate > 0.97 * (1 + 0.95 + 0.95 * 0.8) / (1 + 0.1 * 2 + 0.2 * 2)


@pytest.mark.parametrize("tier", [False, True])
def test_nan_probability_is_not_learnt(tier, seed):
    """A draft that overflows once: that round is lost, not all after it."""
    draw, good = np.random.default_rng(seed), [0.95] * 6
    policy, fresh = (Cost(flat(0.05, 0.1), 6, "predictor") for _ in range(2))
    told_rounds(policy, good, 50, 2, tier, draw)
    if tier:
        levels, kept = policy.captured_size(2)
        policy.learn(RoundOutcome(2, levels, [kept] * 2, [0, 0], [[float("nan")] * 2] * levels))
    else:
        assert drafted(policy, [0.9, float("nan"), 0.9], 2) == (2, 1)
        policy.learn(RoundOutcome(2, 2, [1, 1], [1, 1]))
    assert told_rounds(policy, good, 600, 2, tier, draw) > 0.9 * told_rounds(fresh, good, 600, 2, tier, draw)


def test_cost_beats_fixed_depths_if_acceptance_varies(seed):
    """Half the rounds are hopeless and half are sure: a policy that knows which beats any depth that is the same for both."""
    generator, price = np.random.default_rng(seed), flat(verify=0.1, level=0.2)
    chances = np.where(generator.random(4000) < 0.5, 0.1, 0.95)

    def rate(decide) -> float:
        tokens = seconds = 0.0
        for chance in chances:
            levels, kept, learn = decide(chance)
            accepted = int((generator.random(kept) < chance).cumprod().sum())
            learn(accepted)
            tokens, seconds = tokens + accepted + 1, seconds + price.round(1, levels, kept)
        return tokens / seconds

    def informed(chance):
        if not policy.begin(1):
            return 0, 0, lambda accepted: None
        levels, kept = drafted_again(policy, chance, 1)
        return levels, kept, lambda accepted: policy.learn(RoundOutcome(1, levels, [kept], [accepted]))

    policy = Cost(price, 10, signal="predictor")
    fixed = max(rate(lambda chance, depth=depth: (depth, depth, lambda accepted: None)) for depth in range(1, 11))
    assert rate(informed) > 1.1 * fixed


def test_ema_follows_accepted_lengths():
    """`ema` follows the accepted lengths."""
    policy = Recent(10)
    for _ in range(60):
        policy.learn(RoundOutcome(2, 4, [4, 4], [0, 0]))
    assert policy.begin(2) in (1, 2)
    for _ in range(60):
        policy.learn(RoundOutcome(2, 8, [8, 8], [8, 8]))
    assert policy.begin(2) == 10


def test_stats_count_offered_and_wasted_tokens():
    """Drafted tokens that were not verified are wasted too; a position that was not offered was not refused."""
    stats = Stats()
    stats.add_round(2, 3, 5)
    stats.add_round(1, 1, 1)
    stats.add_round(0, 0, 0)
    assert stats.alpha_k == [2 / 2, 1 / 1, 0 / 1] and stats.drafted == 6
    assert stats.wasted == (6 - 3) / 6 and stats.tau == 2


def test_costs_are_measured_once(tmp_path, monkeypatch):
    """Costs are measured once for each setting and then read from their file."""
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path))
    runner = pair(max_batch=2)
    first = runner.policies.costs(4, None)
    assert first.rows == (1, 2) and first.verify(1, 1) > 0 and first.round(1, 4, 4) > first.round(1, 0, 0)
    warm = runner.policies.costs(4, None, Sampling(0.7))  # noise takes its time
    monkeypatch.setattr(
        "trainkit.runner.policies.build.CostMeasurement.measure", lambda *_, **__: pytest.fail("measured again")
    )
    assert runner.policies.costs(4, None) == first != warm == runner.policies.costs(4, None, Sampling(1.0))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"first_R": ["x"]},
        {"first_R": [float("nan")]},
        {"verify_RN": [[1.0]]},
        {"verify_RN": []},
        {"first_R": 1.0},
        {"verify_RN": [[0.0, 0.0]], "plain_rest_R": [0.0]},
        {"nodes": [], "verify_RN": [[]]},
        {"level": [1.0]},
        None,
    ],
)
def test_invalid_cost_file_is_measured_again(change, tmp_path, monkeypatch):
    """An invalid file of costs is measured again and replaced."""
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path))
    made = replace(flat(0.1), rows=(1,), nodes=(1, 2), verify_RN=((1.0, 1.1),))
    made = replace(made, **dict.fromkeys(("first_R", "level_R", "pack_R", "pad_R", "rest_R", "plain_rest_R"), (0.1,)))
    calls: list[int] = []

    def measured() -> ChainCosts:
        calls.append(1)
        return made

    assert costs.cached_costs({"a": 1}, measured) == made == costs.cached_costs({"a": 1}, measured) and len(calls) == 1
    (path,) = tmp_path.iterdir()
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"costs": values["costs"] | change}) if change is not None else '{"setting":')
    assert costs.cached_costs({"a": 1}, measured) == made == costs.cached_costs({"a": 1}, measured) and len(calls) == 2
    path.unlink()
    path.mkdir()  # cannot be written over
    assert costs.cached_costs({"a": 1}, measured) == made and list(tmp_path.iterdir()) == [path]


def test_costs_are_measured_in_two_states_only(tmp_path, monkeypatch):
    """Of a large model each is gigabytes: one that parts are timed in, one for whole rounds."""
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path))
    made: list[int] = []
    new_state = Rounds.new_state
    monkeypatch.setattr(
        Rounds, "new_state", lambda self, batch, *rest, **more: made.append(batch) or new_state(self, batch, *rest, **more)
    )
    pair(max_batch=2).policies.costs(6, None)
    assert made == [1, 1, 2, 2]


def test_costs_are_robust_to_slow_repeats(seed):
    """Repeats of which some were slow, whole or in a part: rounds cost in the ratio that they have; and their parts add up."""
    draw = np.random.default_rng(seed)
    truth = {0: (0.0, 10.0), 1: (2.0, 10.5), 2: (3.0, 12.0), 4: (5.0, 15.0)}

    def runs(draft: float, judged: float, slow: np.ndarray) -> list[list[float]]:
        whole = draft + judged + 0.5
        hiccups = np.where(draw.random((15, 3)) < 0.03, 3.0, 1.0)
        return (slow[:, None] * hiccups * np.array([draft, judged, whole])).tolist()

    for _ in range(20):
        slow = np.where(draw.random(15) < draw.random(), 1.7, 1.0)
        found = {depth: runs(*parts, slow) for depth, parts in truth.items()}
        verify, first, level, pack, pad, rest, plain_rest = costs._fit(found, (1, 2, 4), 1.0, 0)
        made = ChainCosts((1,), (1, 2, 3, 5), (verify,), (first,), (level,), (pack,), (pad,), (rest,), (plain_rest,))
        for depth in (1, 2, 4):
            assert made.round(1, depth, depth) / made.plain(1) == pytest.approx((sum(truth[depth]) + 0.5) / 10.5, rel=1e-6)


def crossing(verify: float, level: float) -> ChainCosts:
    """`flat(0.0, 0.1)` for texts of 100 tokens; each further token of a text adds these seconds to a step and to a level."""
    return replace(flat(0.0, 0.1), length=100.0, cached_N=(verify,) * 19, level_cached=level)


def test_costs_grow_with_cached_tokens():
    """By hand: 50 further tokens in each of 8 texts, 0.01 and 0.001 seconds each."""
    costs_at = crossing(0.01, 0.001).at(150.0)
    assert costs_at.verify(8, 3) == pytest.approx(1.0 + 8 * 50 * 0.01) and costs_at.level(8) == pytest.approx(0.1 + 0.4)
    assert costs_at.verify(1, 1) == pytest.approx(1.5) and costs_at.draft(1, 2) == pytest.approx(2 * (0.1 + 0.05))
    assert costs_at.at(100.0).verify(8, 3) == pytest.approx(1.0) and flat(0.1).at(500.0) == flat(0.1)
    assert crossing(0.1, 0.1).at(0.0).plain(1) > 0, "extrapolated below what was measured, still a cost"


def test_costs_of_cached_tokens_are_fitted(monkeypatch):
    """From scripted times, one of which is slow: 0.001 a token to verify one node, 0.002 for two, 0.0005 for a level."""

    def timed(rounds, parts, length, batch, repeats, sampling=None):
        runs = {depth: [[depth * (0.1 + 0.0005 * length), 1 + 0.001 * length * min(depth + 1, 2)]] * repeats for depth in parts}
        return {depth: [[5.0, 9.0], *run[1:]] for depth, run in runs.items()}

    monkeypatch.setattr(costs, "time_parts", timed)
    shape_at = lambda depth: static.build(static.chain(depth), torch.device("cpu"))
    measurement = costs.CostMeasurement(pair(max_len=64).rounds, shape_at, 3, 1, 256, 2048, Sampling())
    cached_N, level = measurement._of_cached_tokens()
    assert cached_N == pytest.approx((0.001, 0.002, 0.002, 0.002)) and level == pytest.approx(0.0005)
    assert replace(measurement, longer=600)._of_cached_tokens() == ((), 0.0), "two lengths that are close"


@pytest.mark.parametrize("is_tier", [False, True])
def test_depth_changes_at_the_computed_length(is_tier):
    """The second token, accepted with 0.36, pays while a level costs less than 0.36 of a plain step.

    A step of 1 that grows by 0.001 and a level of 0.1 that grows by 0.004 a token cross there 260 / 3.64 = 71.4 tokens later.
    """
    for length, levels in ((64.0, 2), (128.0, 2), (192.0, 1), (256.0, 1)):
        policy = Cost(crossing(0.001, 0.004), 2, signal="predictor")
        policy.cached = length
        if is_tier:
            policy._gains = {(1, 1): 0.6, (2, 2): 0.96}
            assert policy.captured_size(1) == (levels, levels)
        else:
            policy.known.means[:] = [0.6, 0.6]
            policy.known.fade = lambda: None
            assert drafted(policy, [0.6, 0.6])[0] == levels


def test_large_batches_are_decoded_plainly_where_that_pays():
    """With rows that cost as much as their step, one text is drafted and eight are not."""
    costs = replace(flat(), verify_RN=(flat(0.05).verify_RN[0], flat(1.0).verify_RN[0]))
    for rows, is_drafted in ((1, True), (8, False)):
        policy = Cost(costs, 4)
        for _ in range(50):
            levels, kept = policy.captured_size(rows)
            policy.learn(RoundOutcome(rows, levels, [kept] * rows, [kept // 2] * rows))
        assert policy.is_paused(rows) != is_drafted


def test_drifted_costs_are_measured_again_once(seed, monkeypatch):
    """After 200 rounds that take 1.5 times as long as predicted, and again a first capture; then never more."""
    policy = Cost(flat(0.05, 0.1), 4)

    def rounds(factor: float) -> int:
        for number in range(200):
            outcome = RoundOutcome(2, 2, [2, 2], [1, 1])
            seconds = 1000.0 if number == 0 else factor * policy.predicted_seconds(outcome)
            policy.learn(replace(outcome, seconds=seconds))
        return policy.drifted_rows()

    assert [rounds(factor) for factor in (1.1, 0.9, 1.5, 1.5)] == [0, 0, 2, 0] and policy.drifted_rows() == 0


def test_next_call_uses_the_costs_measured_again(tmp_path, monkeypatch):
    """Costs that drifted are measured again for the measured numbers of texts around, stored, and used by the policy."""
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path))
    monkeypatch.setattr(costs.CostMeasurement, "_of_rows", lambda self, rows, **_: ((1.0,) * 4, *[0.1 * rows] * 6))
    runner, options = pair(max_batch=4), {"max_new_tokens": 2, "policy": "cost-blind", "depth": 3}
    runner.generate([[1]], **options)
    (chain,) = runner.policies.chains.values()
    before = chain.policy.costs
    monkeypatch.setattr(costs.CostMeasurement, "_of_rows", lambda self, rows, **_: ((2.0,) * 4, *[0.2 * rows] * 6))
    for _ in range(200):
        chain.policy.learn(RoundOutcome(3, 0, [0] * 3, [0] * 3, seconds=9.0))
    runner.generate([[1]], **options)
    after = chain.policy.costs
    assert before.rows == (1, 2, 4) and [line[0] for line in after.verify_RN] == [1.0, 2.0, 2.0]
    assert after.level_R == pytest.approx((0.1, 0.4, 0.8)) and after.length == before.length > 0
    monkeypatch.setattr(costs.CostMeasurement, "measure", lambda self: pytest.fail("measured again"))
    assert runner.policies.costs(3, None) == after


def test_goodput_is_reported(seed):
    """A policy's statistics hold its measured tokens per second, and with costs the predicted ones."""
    runner = pair(max_batch=2)
    runner.policies.costs = lambda *_: flat(0.05, 0.1)
    runner.generate([[1], [2, 3]], max_new_tokens=12, policy="cost-blind", ignore_end=True)
    found, stats = runner.last.goodput, runner.last
    assert found["measured"] > 0 and 0.5 < found["predicted"] < 10
    assert found["measured"] == pytest.approx(stats.tau * stats.rounds / stats.seconds)
    runner.generate([[1]], max_new_tokens=12, policy="ema", ignore_end=True)
    assert set(runner.last.goodput) == {"measured"}
    runner.generate([[1]], max_new_tokens=12, depth=2, ignore_end=True)
    assert runner.last.goodput == {}


def test_only_used_chain_depths_are_built(seed):
    """A chain of 400 in each depth would take a minute before the first token."""
    runner = pair(max_len=512, noise=None)
    shape = PolicyChain(Recent(400), runner.device)
    assert [shape.tree(depth).size for depth in (0, 3)] == [1, 4] and set(shape._trees) == {0, 3}


def test_cost_interpolation_by_hand():
    """Costs between and beyond the measured sizes are interpolated, and never fall."""
    found = replace(flat(), nodes=(1, 3), verify_RN=((1.0, 2.0), (1.0, 4.0)))
    assert found.verify(1, 2) == 1.5 and found.verify(8, 3) == 4 and found.verify(1, 5) == 3 and found.verify(1, 0) == 1
    assert costs.isotonic([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]


@pytest.mark.parametrize(
    "policy, options, said",
    [
        ("often", {}, "unknown policy 'often'; choose from cost"),
        ("confidence:2", {}, "between 0 and 1"),
        ("confidence:.", {}, "between 0 and 1"),
        ("predictor", {}, "has no predictor"),
        ("cost", {"tree": [(0,)]}, "leave tree out"),
        ("cost", {"depth": 0}, "give depth"),
    ],
)
def test_invalid_policy_gives_one_line(policy, options, said):
    """An invalid policy gives a one-line error."""
    with pytest.raises(UserError, match=said):
        pair().generate([[1]], policy=policy, **options)
    plain = pair(noise=None)
    with pytest.raises(UserError, match="without a drafter"):
        plain.generate([[1]], policy="ema")


def test_policy_names_are_parsed():
    """Policy names are parsed with their default threshold."""
    assert (
        PolicySpec.parse("confidence") == PolicySpec("threshold", "confidence", 0.6)
        and PolicySpec.parse("logistic") == PolicySpec("threshold", "logistic", 0.5)
        and PolicySpec.parse("predictor:0.25").threshold == 0.25
    )
    assert [PolicySpec.parse(name).signal for name in ("cost", "cost:logistic", "cost-blind")] == [None, "logistic", "none"]


def test_predictor_does_not_depend_on_the_batch(seed):
    """The predictor's output does not depend on the batch, but on the depth; calibration is applied."""
    made = predicting(pair())
    hidden, said = torch.randn(3, 2, made.hidden_size), torch.randn(3, 2, 4, SIGNALS)
    whole = made(hidden, said, 1)
    assert whole.shape == (3, 2, 4)
    torch.testing.assert_close(made(hidden[1:2], said[1:2], torch.tensor([[1, 1]])), whole[1:2])
    assert not torch.allclose(made(hidden, said, 2), whole)
    changed = copy.deepcopy(made)
    changed.scale[1], changed.shift[1] = 2.0, -1.0
    warm = said.clone()
    warm[..., -1] = 0.5
    torch.testing.assert_close(changed.probability(hidden, warm, 0), (2 * made(hidden, warm, 0) - 1).sigmoid())


class Told(Policy):
    """Remembers what was said of the last level; of each row, since here every row stands for a call of its own."""

    signal = "confidence"

    def continues(self, signal_B):
        self.said_B = torch.tensor(signal_B)
        return True


def test_policy_with_memory_keeps_residual_lossless():
    """The first of two proposals is rejected; whether a draft is made at the second's place hangs on what was said of it."""
    p, q, rows = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.6, 0.2, 0.1, 0.1]), 100_000
    rounds = table_runner(*(torch.tensor(x).log().expand(1, 4, 4).clone() for x in (p, q)), rows, 16).rounds
    state, policy = rounds.new_state(rows, 16, can_pause=True), Told(2)
    shape = PolicyChain(policy, torch.device("cpu"), may_drop=False)
    state.limit_B.fill_(16)
    state.done_B.fill_(False)
    state.keys_B2.copy_(torch.arange(2 * rows, dtype=torch.int32).view(rows, 2) * 0x9E3779B)
    with torch.inference_mode():
        rejected_B = rounds(Plan(Sampling(1.0), shape, Residual(), can_pause=True), state, 16).counts_B == 1
        first_B2 = []
        for way in (shape.tree(0), shape):
            likely_B, copied = policy.said_B > 0.6, state.map(torch.Tensor.clone)
            first_B2.append(rounds(Plan(Sampling(1.0), way, Residual(), can_pause=True), copied, 16).emitted_BP[:, 0])
    tokens = torch.where(likely_B, first_B2[1], first_B2[0])[rejected_B].numpy()
    assert chisquare(np.bincount(tokens, minlength=4), len(tokens) * p).pvalue > 1e-4


@pytest.mark.parametrize("way", [{"depth": 6}, {"tree": DynamicTree(5, 2, 8)}])
def test_cost_refuses_more_levels_than_heads(way, seed):
    """`cost` refuses more draft levels than the drafter has heads."""
    shape = TargetShape(SHAPE, ())
    runner = Runner(random_decoder(), load_kind("medusa")(shape, num_heads=3), shape, max_batch=1, max_len=64)
    with pytest.raises(UserError, match="heads for 3 tokens"):
        runner.generate([[1]], max_new_tokens=4, policy="cost", **way)
