"""Sets up a bench: methods from model folders, or from a synthetic target with scripted drafters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainkit.data.text.prompts import read_prompts
from trainkit.drafters.base import discover
from trainkit.eval.bench.synthetic import ScriptedDrafter, accepted_lengths, random_prompts, random_target
from trainkit.eval.bench.timing import trainkit_method
from trainkit.eval.bench.transformers import build_model, load_model, transformers_method, why_not_assistant
from trainkit.eval.bench.types import BenchArguments, BenchSetup
from trainkit.eval.lengths import prompts_that_fit
from trainkit.models.load import find_device
from trainkit.models.shape import TargetShape
from trainkit.runner import Runner
from trainkit.runner.engine import load_bundle_predictor, load_drafter
from trainkit.runner.policy import MAX_DEPTH
from trainkit.runner.trees.shape import RankPath
from trainkit.runner.trees.static import build, chain

Prepare = Callable[[Any, int], Callable[[], None]]
"""(drafter, depth) -> function to call before each run at that depth."""


def checkpoint_setup(arguments: BenchArguments) -> BenchSetup:
    """The setup for a target folder and any number of drafter folders; the target is loaded once and shared.

    Raises:
        UserError: a folder or the prompts cannot be read, or do not fit together.
    """
    assert arguments.target is not None and arguments.prompts is not None
    # the target, with positions for every prompt and its answer
    target, batch = Path(arguments.target), arguments.batch
    prompts = read_prompts(arguments.prompts, arguments.target, arguments.limit)
    prompts, longest, note = prompts_that_fit(prompts, arguments.max_new_tokens, arguments.max_len, target, arguments.prompts)
    runner = Runner.load(target, None, arguments.device, arguments.dtype, batch, longest)
    decoder, shape, dtype = runner.rounds.target, runner.shape, getattr(torch, arguments.dtype)
    setup = BenchSetup(runner, prompts, target.resolve().name, notes=[note] if note else [])
    if dtype != torch.float32:
        setup.notes.append(
            f"in {arguments.dtype} rounding depends on the number of rows, so texts may differ by ties; float32 has few ties"
        )
    # the drafters
    folders = dict(zip(_short_names(arguments.drafters), map(Path, arguments.drafters), strict=True))
    for name, folder in folders.items():
        drafter = load_drafter(folder, target, shape).to(device=runner.device, dtype=dtype)
        predictor = load_bundle_predictor(folder, runner.device)
        setup.drafters[name] = Runner(decoder, drafter, shape, target, batch, longest, predictor=predictor)
    # the methods
    if arguments.baselines:
        load = partial(load_model, device=runner.device, dtype=dtype)
        model, assistants = load(target), {}
        for name, folder in folders.items():
            reason = why_not_assistant(folder, shape.decoder.vocab_size)
            if batch > 1:
                reason = f"it takes one prompt at a time, not {batch}"
            if reason:
                setup.notes.append(f"transformers assisted{_suffix(setup, name)}: not run, {reason}")
            else:
                assistants[name] = load(folder)
        _add_baselines(setup, arguments, model, assistants)
    _add_trainkit(setup, arguments)
    return setup


def synthetic_setup(arguments: BenchArguments) -> BenchSetup:
    """The setup for a random target and a scripted drafter of each kind, accepted as often as `synthetic_tau` requests.

    Raises:
        UserError: unknown shape or kind, or tau below 1.
    """
    assert arguments.synthetic is not None
    device, dtype, tau = find_device(arguments.device), getattr(torch, arguments.dtype), arguments.synthetic_tau
    decoder = random_target(arguments.synthetic, device, dtype)
    shape = TargetShape(decoder.shape)
    prompts = random_prompts(decoder.shape.vocab_size, arguments.limit, arguments.prompt_length, arguments.seed)
    longest = arguments.prompt_length + arguments.max_new_tokens
    build_runner = partial(Runner, shape=shape, folder=None, max_batch=arguments.batch, max_len=longest)
    # the text that scripted drafters propose is the target's own
    text = prompts[0] + build_runner(decoder, None).generate(prompts[:1], arguments.max_new_tokens)[0].tokens
    setup = BenchSetup(build_runner(decoder, None), prompts, f"synthetic {arguments.synthetic}")
    for kind in arguments.synthetic_kinds or sorted(discover()):
        drafter = ScriptedDrafter.build(kind, shape, device, dtype)
        drafter.set_text(text)
        setup.drafters[f"{kind}, scripted for tau {tau:g}"] = build_runner(decoder, drafter)
    if arguments.baselines:
        setup.notes.append("transformers assisted: not run, a scripted drafter is not a model that transformers can load")
        _add_baselines(setup, arguments, build_model(decoder), {})
    _add_trainkit(setup, arguments, lambda drafter, depth: partial(drafter.set_accepted, accepted_lengths(tau, depth)))
    return setup


def _add_baselines(setup: BenchSetup, arguments: BenchArguments, model: Any, assistants: Mapping[str, Any]) -> None:
    """Adds transformers' `generate`, and assisted generation at every depth with each drafter that has an assistant model."""
    shape = setup.runner.shape
    setup.methods.append(transformers_method("transformers generate", arguments, shape, model))
    for name, assistant in assistants.items():
        prefix = f"transformers assisted {name} " if len(setup.drafters) > 1 else "transformers assisted "
        setup.methods += [
            transformers_method(f"{prefix}{depth}", arguments, shape, model, assistant, depth, name)
            for depth in arguments.depths
        ]


def _add_trainkit(setup: BenchSetup, arguments: BenchArguments, prepare: Prepare | None = None) -> None:
    """Adds plain decoding and, for each drafter, the requested chains, trees and policies, and its own tree if it has one."""
    options = {"temperature": arguments.temperature, "verify": arguments.verify, "seed": arguments.seed}
    setup.methods.append(trainkit_method(setup.runner, "trainkit plain", **options))
    for name, runner in setup.drafters.items():
        prefix, drafter = name if len(setup.drafters) > 1 else "trainkit", runner.drafter
        assert drafter is not None
        # fixed shapes
        for paths in _trees(setup, arguments, name):
            depth = max(map(len, paths))
            shape = f"depth {depth}" if len(paths) == depth else f"tree {len(paths) + 1}, depth {depth}"
            while f"{prefix} {shape}" in {method.name for method in setup.methods}:  # another tree of the same size
                shape += "'"
            before = prepare and prepare(drafter, depth)
            setup.methods.append(trainkit_method(runner, f"{prefix} {shape}", paths, before, name, **options))
        # policies
        limit = max(arguments.depths, default=MAX_DEPTH)
        limit = min(limit, drafter.max_depth or limit)
        before = prepare and prepare(drafter, limit)
        setup.methods += [
            trainkit_method(runner, f"{prefix} {policy}", (), before, name, policy, limit, **options)
            for policy in arguments.policies
        ]
    # reserve all positions now: a rotary table that grows later invalidates the graphs of the other runners that share it
    slots = max((max(len(method.paths), method.depth) + 3 * method.depth for method in setup.methods), default=0)
    setup.runner.rounds.target.reserve_positions(setup.runner.max_len + slots + 256)


def _trees(setup: BenchSetup, arguments: BenchArguments, name: str) -> list[tuple[RankPath, ...]]:
    """The different fixed shapes that a drafter drafts; those deeper than it can draft are left out with a note."""
    drafter, device = setup.drafters[name].drafter, setup.runner.device
    assert drafter is not None
    # `build` sorts the paths, so that equal trees are equal tuples, and refuses what is not a tree before any work is done
    requested = [build(paths, device).paths for paths in arguments.trees]
    wanted = [chain(depth) for depth in arguments.depths]
    if drafter.default_tree is not None and arguments.depths:
        wanted.append(build(drafter.default_tree, device).paths)
    wanted = list(dict.fromkeys([*wanted, *requested]))
    limit = drafter.max_depth
    too_deep = [paths for paths in wanted if limit is not None and max(map(len, paths)) > limit]
    reason = f"{_suffix(setup, name)}: not run, the drafter has heads for {limit} tokens"
    if depths := [str(len(paths)) for paths in too_deep if paths not in requested]:
        setup.notes.append(f"depths {', '.join(depths)}{reason}")
    if count := sum(paths in requested for paths in too_deep):
        setup.notes.append(f"{count} of the trees{reason}")
    return [paths for paths in wanted if paths not in too_deep]


def _suffix(setup: BenchSetup, drafter: str) -> str:
    return f", {drafter}" if len(setup.drafters) > 1 else ""


def _short_names(folders: Sequence[str]) -> list[str]:
    """Names for tables: each folder's last path component, with as many parents as are needed to tell the folders apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    names = [part[-1] for part in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) if names.count(name) > 1 else name for name, part in zip(names, parts, strict=True)]
    return names
