"""Runs the checks of `trainkit verify` one after the other, and prints each result as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from trainkit import bundle as bundles
from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.data.text.prompts import read_prompts
from trainkit.errors import UserError
from trainkit.eval.lengths import prompts_that_fit
from trainkit.eval.promises.acceptance import check_acceptance
from trainkit.eval.promises.distribution import check_distribution
from trainkit.eval.promises.files import check_files, check_formats
from trainkit.eval.promises.reference import check_ends, check_target
from trainkit.eval.promises.texts import check_texts
from trainkit.eval.promises.types import Check, Subject, VerifyArguments
from trainkit.runner import Runner

CHECKS: dict[str, Callable[[Subject], Check]] = {
    "files": check_files,
    "target": check_target,
    "ends": check_ends,
    "texts": check_texts,
    "distribution": check_distribution,
    "acceptance": check_acceptance,
    "formats": check_formats,
}
"""Name -> check, in the order of the table."""
PROMPTS = (
    "Explain in two sentences why the sky looks blue at noon and red in the evening.",
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Think step by step.",
    "List three differences between a frog and a toad.",
    "Translate into French: The library opens at nine and closes at six.",
    "Summarise the plot of a story about a lighthouse keeper who finds a message in a bottle.",
    "What does the following command do: tar -xzf archive.tar.gz -C /opt",
    "Give me a short recipe for lentil soup with the quantities for four people.",
)
"""Default prompts."""


def load_subject(folder: Path, arguments: VerifyArguments) -> Subject:
    """Loads target, drafter and prompts.

    Raises:
        UserError: a folder or the prompts cannot be read, or target and drafter do not fit together.
    """
    bundle = bundles.read(folder) if bundles.is_bundle(folder) else None
    if bundle is not None and not bundle.target:
        raise UserError(f"{folder}: kind {bundle.kind!r} drafts for no target; give the bundle of a drafter")
    if arguments.prompts is not None:
        prompts = read_prompts(arguments.prompts, arguments.target, arguments.limit)
    else:
        encoder = Encoder(load_tokenizer(arguments.target))
        chat = lambda text: encoder.prompt_ids([{"role": "user", "content": text}])
        encode = chat if encoder.has_template else encoder.encode
        prompts = [list(encode(text)) for text in PROMPTS[: arguments.limit]]
    source = arguments.prompts or "built-in prompts"
    prompts, longest, _ = prompts_that_fit(prompts, arguments.max_new_tokens, None, arguments.target, source)
    runner = Runner.load(arguments.target, folder, arguments.device, arguments.dtype, 8, longest)
    return Subject(folder, bundle, runner, prompts, arguments)


def run_checks(
    subject: Subject, report: Callable[[Check], None], starting: Callable[[str], None] = lambda name: None
) -> list[Check]:
    """Runs every check and passes each result to `report`; a check that cannot be completed counts as BROKEN.

    `starting` is called with the name of a check before it runs.
    """
    checks = []
    for name, function in CHECKS.items():
        starting(name)
        began = perf_counter()
        try:
            check = function(subject)
        except UserError as error:
            check = Check(name, (function.__doc__ or "").splitlines()[0], "BROKEN", str(error))
        check.seconds = perf_counter() - began
        checks.append(check)
        report(check)
    return checks
