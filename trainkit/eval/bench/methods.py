"""Who takes part in a bench: contenders made from folders, or from a synthetic target with a scripted drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainkit.data.text.prompts import read_prompts
from trainkit.drafters.base import discover
from trainkit.errors import UserError
from trainkit.eval.bench.synthetic import ScriptedDrafter, accepted_lengths, random_prompts, random_target
from trainkit.eval.bench.timing import ours
from trainkit.eval.bench.transformers import Settings, assisted_contender, can_assist, load_model, model_of, plain_contender
from trainkit.eval.bench.types import Draft, Field, Request
from trainkit.models.load import covered_positions, find_device
from trainkit.models.shape import TargetShape
from trainkit.runner import Runner
from trainkit.runner.engine import load_bundle_predictor, load_drafter
from trainkit.runner.policy import MAX_DEPTH
from trainkit.runner.trees.shape import RankPath
from trainkit.runner.trees.static import build, chain


def checkpoint_field(request: Request) -> Field:
    """Contenders of a target folder and any number of drafter folders; the target is in memory once.

    Raises:
        UserError: a folder or the prompts cannot be read, or do not fit together.
    """
    assert request.target is not None and request.prompts is not None
    target, batch = Path(request.target), request.batch
    covered = covered_positions(target)
    prompts = read_prompts(request.prompts, request.target, request.limit)
    longest = max(map(len, prompts)) + request.max_new_tokens
    if longest > covered:
        raise UserError(
            f"{request.prompts}: the longest prompt and {request.max_new_tokens} new tokens need {longest} positions, "
            f"{target} covers {covered}; lower max_new_tokens"
        )
    runner = Runner.load(target, None, request.device, request.dtype, batch, longest)
    decoder, shape, dtype = runner.rounds.target, runner.shape, getattr(torch, request.dtype)
    field = Field(runner, prompts, target.resolve().name)
    for name, folder in zip(_names(request.drafters), request.drafters, strict=True):
        drafter = load_drafter(Path(folder), target, shape).to(device=runner.device, dtype=dtype)
        made = Runner.from_modules(decoder, drafter, shape, target, batch, longest)
        made.predictor = load_bundle_predictor(Path(folder), runner.device)
        field.drafts.append(Draft(name, made))
    if request.baselines:
        load = partial(load_model, device=runner.device, dtype=dtype)
        model = load(target)
        assistants = [_assistant(field, request, *pair, load) for pair in zip(field.drafts, request.drafters, strict=True)]
        _add_baselines(field, request, model, assistants)
    _add_ours(field, request)
    return field


def synthetic_field(request: Request) -> Field:
    """Contenders of a random target and of drafters, at the cost of each kind, that are right as often as `synthetic_tau` asks.

    Raises:
        UserError: no shape or kind has that name, or tau is below 1.
    """
    assert request.synthetic is not None
    device, dtype, tau = find_device(request.device), getattr(torch, request.dtype), request.synthetic_tau
    decoder = random_target(request.synthetic, device, dtype)
    shape = TargetShape(decoder.shape)
    prompts = random_prompts(decoder.shape.vocab_size, request.limit, request.prompt_length, request.seed)
    longest = request.prompt_length + request.max_new_tokens
    plain = Runner.from_modules(decoder, None, shape, max_batch=1, max_len=longest)
    text = prompts[0] + plain.generate(prompts[:1], request.max_new_tokens)[0].tokens
    field = Field(
        Runner.from_modules(decoder, None, shape, None, request.batch, longest), prompts, f"synthetic {request.synthetic}"
    )
    for kind in request.synthetic_kinds or sorted(discover()):
        drafter = ScriptedDrafter.of_kind(kind, shape, device, dtype)
        drafter.read(text)
        drafting = Runner.from_modules(decoder, drafter, shape, None, request.batch, longest)
        field.drafts.append(Draft(f"{kind}, scripted for tau {tau:g}", drafting))
    if request.baselines:
        field.notes.append("transformers assisted: not run, a scripted drafter is no model of its own")
        _add_baselines(field, request, model_of(decoder), [None] * len(field.drafts))

    def script(drafter: ScriptedDrafter, depth: int) -> Callable[[], None]:
        return partial(drafter.accept, accepted_lengths(tau, depth))

    _add_ours(field, request, script)
    return field


def _add_baselines(field: Field, request: Request, model: Any, assistants: Sequence[Any | None]) -> None:
    """The `generate` of transformers, and with each assistant its assisted generation at every depth."""
    settings = Settings(field.runner.shape, request.temperature, request.seed, request.batch)
    field.contenders.append(plain_contender(model, settings))
    for draft, assistant in zip(field.drafts, assistants, strict=True):
        if assistant is not None:
            of = f" {draft.name}" if len(field.drafts) > 1 else ""
            field.contenders += [
                assisted_contender(f"transformers assisted{of} {depth}", model, assistant, depth, settings, draft.name)
                for depth in request.depths
            ]


def _assistant(field: Field, request: Request, draft: Draft, folder: str, load: Callable[[str], Any]) -> Any | None:
    """The drafter as a transformers model; None, with a note, where it is none."""
    why_not = can_assist(folder, field.runner.shape.decoder.vocab_size)
    if request.batch > 1:
        why_not = f"it takes one prompt at a time, not {request.batch}"
    if why_not:
        field.notes.append(f"transformers assisted{_of(field, draft)}: not run, {why_not}")
        return None
    return load(folder)


def _add_ours(field: Field, request: Request, prepare: Callable[[Any, int], Callable[[], None]] | None = None) -> None:
    """Plain decoding; and with each drafter a chain of each depth, its own tree where it has one, and the trees asked for."""
    field.contenders.append(ours(field.runner, "trainkit plain", (), **request.options))
    for draft in field.drafts:
        name = draft.name if len(field.drafts) > 1 else "trainkit"
        for paths in _trees(field, request, draft):
            depth = max(map(len, paths))
            shape = f"depth {depth}" if len(paths) == depth else f"tree {len(paths) + 1}, depth {depth}"
            taken = {one.name for one in field.contenders}
            while f"{name} {shape}" in taken:  # another tree with as many nodes
                shape += "'"
            scripted = prepare and prepare(draft.runner.drafter, depth)
            made = ours(draft.runner, f"{name} {shape}", paths, scripted, draft.name, **request.options)
            field.contenders.append(made)
        if request.policies:
            assert draft.runner.drafter is not None
            most = max(request.depths, default=MAX_DEPTH)
            most = min(most, draft.runner.drafter.max_depth or most)
            scripted = prepare and prepare(draft.runner.drafter, most)
            field.contenders += [
                ours(draft.runner, f"{name} {policy}", (), scripted, draft.name, policy, most, **request.options)
                for policy in request.policies
            ]
    # a rotary table that grows later would leave the graphs of other runners, which read the old one, without it
    most = max((max(len(one.paths), one.depth) + 3 * one.depth for one in field.contenders), default=0)
    field.runner.rounds.target.reserve_positions(field.runner.max_len + most + 128)


def _trees(field: Field, request: Request, draft: Draft) -> list[tuple[RankPath, ...]]:
    """What a drafter drafts: nothing twice, and nothing deeper than it can."""
    assert draft.runner.drafter is not None
    own, most = draft.runner.drafter.default_tree, draft.runner.drafter.max_depth
    # in one order, so that the same tree is not run twice; and a path that is none is found before the work
    asked = [build(paths, field.runner.device).paths for paths in request.trees]
    wanted = [chain(depth) for depth in request.depths]
    if own is not None and request.depths:
        wanted.append(build(own, field.runner.device).paths)
    wanted = list(dict.fromkeys([*wanted, *asked]))
    beyond = [paths for paths in wanted if most is not None and max(map(len, paths)) > most]
    if depths := [str(len(paths)) for paths in beyond if paths not in asked]:
        field.notes.append(f"depths {', '.join(depths)}{_of(field, draft)}: not run, the drafter has heads for {most} tokens")
    if trees := [paths for paths in beyond if paths in asked]:
        field.notes.append(f"{len(trees)} of the trees{_of(field, draft)}: not run, the drafter has heads for {most} tokens")
    return [paths for paths in wanted if paths not in beyond]


def _of(field: Field, draft: Draft) -> str:
    return f", {draft.name}" if len(field.drafts) > 1 else ""


def _names(folders: Sequence[str]) -> list[str]:
    """What tables call the folders: their own names, or as much of the path before as tells them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    names = ["/".join(part[-1:]) for part in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)]
    return names
