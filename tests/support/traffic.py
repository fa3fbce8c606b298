"""Random traffic over a session: texts join, leave and are cancelled; each must be the text of its request alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.support.equality import Tie, compare
from tests.support.replaying import Replayed
from trainkit.runner import Runner
from trainkit.runner.options import GenerateOptions
from trainkit.runner.request import Request
from trainkit.runner.round import RoundOutput
from trainkit.runner.session import Session

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
]


def copied(output: RoundOutput):
    """Copies an output at once, as a GPU does before the next replay overwrites it."""
    clones = replace(output, **{name: tensor.clone() for name, tensor in output.tensors.items()})
    return lambda: clones


def open_session(
    runner: Runner, rows: int, shaped: dict[str, Any], lag: int = 0, captured: bool = False, **more: Any
) -> Session:
    """A session of this runner that reads `lag` calls behind, with the stand-in for captured rounds if `captured`."""
    graphs = Replayed() if captured else None
    plan = runner._plan(GenerateOptions(**shaped))
    return Session(runner.rounds, rows, runner.max_len, plan, graphs, lag=lag, fetch=copied, **more)


def finish(session: Session) -> dict[int, list[int]]:
    """Steps until idle; each request's tokens by its index, as the events brought them."""
    texts: dict[int, list[int]] = {}
    while not session.idle:
        for event in session.step():
            texts.setdefault(event.request.index, []).extend(event.tokens)
    return texts


@dataclass
class Visitor:
    """A request of the traffic, with the options that it was made of."""

    request: Request
    options: GenerateOptions
    brought: list[int]
    end: str = ""


def check_traffic(
    runner: Runner, session: Session, draw: random.Random, seed: int, count: int, longest: int
) -> tuple[int, list[Tie]]:
    """Sends `count` random requests of at most `longest` new tokens; returns the number of tokens, and the ties.

    Prompts begin with parts of one text, so that prefixes are shared; some continue what an earlier request wrote.
    """
    base = [draw.randrange(48) for _ in range(150)]
    visitors: list[Visitor] = []

    def visitor() -> Visitor:
        earlier = [v.request for v in visitors if v.request.finish]
        if earlier and draw.random() < 0.3:
            turn = draw.choice(earlier)
            begins = (turn.prompt + turn.tokens)[:200]
        else:
            begins = base[: draw.choice([0, 0, 65, 70, 129, 150])]
        prompt = begins + [draw.randrange(48) for _ in range(draw.randint(1, 20))]
        options = {"max_new_tokens": draw.randint(1, longest), "ignore_end": draw.random() < 0.5, **draw.choice(SAMPLINGS)}
        chosen = GenerateOptions(seed=seed, **options)
        return Visitor(runner.request(prompt, chosen, len(visitors), (len(visitors), 0)), chosen, [])

    # Requests arrive and are cancelled between steps.
    while len(visitors) < count or not session.idle:
        while len(visitors) < count and (session.idle or draw.random() < 0.4):
            visitors.append(visitor())
            session.submit(visitors[-1].request)
        if draw.random() < 0.05:
            session.cancel(draw.choice(visitors).request)
        for event in session.step():
            visitors[event.request.index].brought += event.tokens
            visitors[event.request.index].end = event.finish
    # Each text is that of plain decoding, alone; a cancelled one is its beginning.
    ties = []
    for index, (request, options, brought, end) in enumerate((v.request, v.options, v.brought, v.end) for v in visitors):
        assert request.finish and request.tokens == brought and not request.error
        assert end == request.finish or request.finish == "cancelled"
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "ignore_end")
        named = {name: getattr(options, name) for name in names}
        ((_, alone),) = runner.generate_each([request.prompt], [(index, 0)], depth=0, **named)
        wanted = alone.tokens[: len(brought)] if request.finish == "cancelled" else alone.tokens
        assert request.finish in ("cancelled", alone.finish) or request.tokens != wanted
        empty: list[list[int]] = [[]] * index  # `compare` takes the noise of a request by its place
        prompts = [request.prompt] * (index + 1)
        ties += compare(runner.rounds.target, prompts, [*empty, brought], [*empty, wanted], request.sampling, seed)
    return sum(len(v.brought) for v in visitors), ties


def draws_of_first_levels(trace: Any, into: dict[tuple[int, ...], torch.Tensor]) -> None:
    """Keeps the draft's logits at each root, by the request's keys and the root's position."""
    for row in range(trace.draft.tokens_BN.shape[0]):
        if trace.draft.logits and trace.verdict.counts_B[row]:
            position = (*trace.keys_B2[row].tolist(), int(trace.position_B[row]))
            into[position] = trace.draft.logits[0][row, 0].clone()
