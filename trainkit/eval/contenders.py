"""Who takes part in a bench: contenders made from folders, or from a synthetic target with a scripted drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainkit.data.prompts import read_prompts
from trainkit.errors import UserError
from trainkit.eval.baselines import Settings, assisted_contender, can_assist, load_model, model_of, plain_contender
from trainkit.eval.result import Field, Request
from trainkit.eval.scripted import ScriptedDrafter, accepted_lengths, random_prompts, random_target
from trainkit.eval.speed import ours
from trainkit.models.load import covered_positions, device_of
from trainkit.models.shape import TargetShape
from trainkit.runner import Runner
from trainkit.runner.tree import RankPath, chain


def checkpoint_field(request: Request) -> Field:
    """Contenders of a target folder and a drafter folder.

    Raises:
        UserError: a folder or the prompts cannot be read, or do not fit together.
    """
    assert request.target is not None and request.prompts is not None
    target, drafter = request.target, request.drafter
    covered = covered_positions(target)
    prompts = read_prompts(request.prompts, target, request.limit)
    longest = max(map(len, prompts)) + request.max_new_tokens
    if longest > covered:
        raise UserError(
            f"{request.prompts}: the longest prompt and {request.max_new_tokens} new tokens need {longest} positions, "
            f"{target} covers {covered}; lower max_new_tokens"
        )
    runner = Runner.load(target, drafter, request.device, request.dtype, max_batch=request.batch, max_len=longest)
    field = Field(runner, prompts, _name(target), drafter and _name(drafter))
    if request.baselines:
        load = partial(load_model, device=runner.device, dtype=getattr(torch, request.dtype))
        _add_baselines(field, request, load(target), _assistant(field, request, load))
    _add_ours(field, request, request.depths if drafter is not None else ())
    return field


def synthetic_field(request: Request) -> Field:
    """Contenders of a random target and a drafter that is right as often as `synthetic_tau` asks.

    Raises:
        UserError: no shape has that name, or tau is below 1.
    """
    assert request.synthetic is not None
    device, dtype, tau = device_of(request.device), getattr(torch, request.dtype), request.synthetic_tau
    decoder = random_target(request.synthetic, device, dtype)
    shape = TargetShape(decoder.shape)
    prompts = random_prompts(decoder.shape.vocab_size, request.limit, request.prompt_length, request.seed)
    longest = request.prompt_length + request.max_new_tokens
    plain = Runner.of(decoder, None, shape, max_batch=1, max_len=longest)
    text = prompts[0] + plain.generate(prompts[:1], request.max_new_tokens)[0].tokens
    drafter = ScriptedDrafter.on_device(shape, device, dtype)
    drafter.read(text)
    runner = Runner.of(decoder, drafter, shape, max_batch=request.batch, max_len=longest)
    field = Field(runner, prompts, f"synthetic {request.synthetic}", f"scripted for tau {tau:g}")
    if request.baselines:
        field.notes.append("transformers assisted: not run, a scripted drafter is no model of its own")
        _add_baselines(field, request, model_of(decoder), None)
    _add_ours(field, request, request.depths, lambda depth: partial(drafter.accept, accepted_lengths(tau, depth)))
    return field


def _add_baselines(field: Field, request: Request, model: Any, assistant: Any | None) -> None:
    """The `generate` of transformers, and with an assistant its assisted generation at every depth."""
    settings = Settings(field.runner.shape, request.temperature, request.seed, request.batch)
    field.contenders.append(plain_contender(model, settings))
    if assistant is not None:
        field.contenders += [assisted_contender(model, assistant, depth, settings) for depth in request.depths]


def _assistant(field: Field, request: Request, load: Callable[[str], Any]) -> Any | None:
    """The drafter as a transformers model; None, with a note, where it is none."""
    if request.drafter is None:
        return None
    why_not = can_assist(request.drafter, field.runner.shape.decoder.vocab_size)
    if request.batch > 1:
        why_not = f"it takes one prompt at a time, not {request.batch}"
    if why_not:
        field.notes.append(f"transformers assisted: not run, {why_not}")
        return None
    return load(request.drafter)


def _add_ours(
    field: Field, request: Request, depths: Sequence[int], prepare: Callable[[int], Callable[[], None]] | None = None
) -> None:
    """Plain decoding, a chain of each depth, and the drafter's own tree where it has one."""
    drafter = field.runner.drafter
    most = drafter.max_depth if drafter is not None else None
    if beyond := [depth for depth in depths if most is not None and depth > most]:
        field.notes.append(f"depths {', '.join(map(str, beyond))}: not run, the drafter has heads for {most} tokens")
    trees: list[tuple[RankPath, ...]] = [chain(depth) for depth in depths if depth not in beyond]
    if trees and drafter is not None and drafter.default_tree is not None and drafter.default_tree not in trees:
        trees.append(drafter.default_tree)
    field.contenders.append(ours(field.runner, "trainkit plain", (), **request.options))
    for paths in trees:
        depth = max(map(len, paths))
        shape = f"depth {depth}" if len(paths) == depth else f"tree of {len(paths)}, depth {depth}"
        field.contenders.append(ours(field.runner, f"trainkit {shape}", paths, prepare and prepare(depth), **request.options))


def _name(folder: str) -> str:
    return Path(folder).resolve().name
