"""Sessions: whatever comes and goes over the rows, each text is the one that its request alone gets."""

from __future__ import annotations

import random

import pytest
import torch

from tests.support.equality import assert_few, compare
from tests.support.models import SIBLINGS, pair
from tests.support.replaying import Replayed
from trainkit.runner import DynamicTree
from trainkit.runner.options import GenerateOptions
from trainkit.runner.session import Session

SHAPES = {"chain": {"depth": 3}, "tree": {"tree": SIBLINGS}, "dynamic": {"tree": DynamicTree(4, 3, 8)}}
SAMPLINGS = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.3, "top_k": 5}]


def copied(output):
    """What `start_fetch` does on a GPU: the next replay overwrites the output's tensors."""
    from dataclasses import replace

    clones = replace(output, **{name: tensor.clone() for name, tensor in output.tensors.items()})
    return lambda: clones


def open_session(runner, rows, shaped, lag=0, captured=False, **more):
    """A session of this runner; `lag` calls behind, with the stand-in for captured rounds if wanted."""
    plan = runner._plan(GenerateOptions(**shaped))
    graphs = Replayed() if captured else None
    return Session(runner.rounds, rows, runner.max_len, plan, graphs, lag=lag, fetch=copied, **more)


def run(session):
    """Steps until idle; each request's tokens as the events brought them."""
    texts = {}
    while not session.idle:
        for event in session.step():
            texts.setdefault(id(event.request), []).extend(event.tokens)
    return texts


def check_alone(runner, requests, seed):
    """Each text that ended by itself is plain decoding's alone, but for ties."""
    for request in requests:
        sampling = request.sampling
        options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        alone = dict(
            runner.generate_each(
                [request.prompt],
                [request.draws],
                max_new_tokens=request.limit - len(request.prompt),
                ignore_end=request.ignore_end,
                depth=0,
                seed=seed,
                **options,
            )
        )[0].tokens
        if request.finish == "cancelled":
            alone = alone[: len(request.tokens)]
        yield request, alone


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lag", "captured"), [(0, False), (1, True), (2, True)])
def test_texts_equal_those_of_requests_alone(shape, lag, captured, seed):
    """Random arrivals, cancellations, lengths, rows and sampling: each text is that of its request alone."""
    draw = random.Random(seed)
    runner = pair(max_len=260)
    base = torch.randint(0, 48, (150,)).tolist()
    for _ in range(2):
        rows = draw.randint(1, 4)
        session = open_session(runner, rows, SHAPES[shape], lag, captured, prefill=draw.choice([7, 64, 512]))
        waiting = []
        for index in range(draw.randint(3, 9)):
            prompt = base[: draw.choice([0, 70, 129, 150])] + torch.randint(0, 48, (draw.randint(1, 30),)).tolist()
            options = GenerateOptions(
                max_new_tokens=draw.randint(1, 25), seed=seed, ignore_end=draw.random() < 0.3, **draw.choice(SAMPLINGS)
            )
            request = runner.request(prompt, options, index, (index, 0))
            request.draws = (index, 0)
            waiting.append(request)
        requests, brought, ends = list(waiting), {id(request): [] for request in waiting}, {}
        while waiting or not session.idle:
            while waiting and draw.random() < 0.5:
                session.submit(waiting.pop(0))
            if draw.random() < 0.1:
                session.cancel(draw.choice(requests[: len(requests) - len(waiting)] or [requests[0]]))
            for event in session.step():
                brought[id(event.request)] += event.tokens
                ends[id(event.request)] = event.finish
        ties = []
        for request, alone in check_alone(runner, requests, seed):
            assert request.finish and brought[id(request)] == request.tokens and not request.error
            assert request.finish == "cancelled" or request.finish == ends[id(request)]
            ours = [[]] * request.draws[0] + [request.tokens]  # noise keys by the place in the list
            theirs = [[]] * request.draws[0] + [alone]
            prompts = [request.prompt] * len(ours)
            ties += compare(runner.rounds.target, prompts, ours, theirs, request.sampling, seed)
        assert_few(ties, 25 * len(requests))
