"""`trainkit verify`: the promises that trainkit makes of a drafter, checked on the user's own bundle. Light to import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from trainkit.errors import UserError


def verify(bundle: Path, *, json: str | None = None, save: bool = True, **options: Any) -> int:
    """Checks on this machine what trainkit promises of a drafter, and writes a certificate into its bundle.

    Each line of the report is one promise: kept, BROKEN, or measured where nothing is promised.
      files         every file has its checksum, and the drafter was made for a target of this vocabulary and tokenizer
      target        the runner computes what transformers computes: logits, and greedy texts
      ends          a text ends at every end token that the model's files name, also inside a draft
      texts         texts decoded with the drafter equal those of plain decoding, token for token: greedy, seeded and nucleus
                    sampling, batch 1 and 8, chains, trees and a policy; ties of rounding are listed
      distribution  residual verification samples from the target's distribution: a chi-square test on a reduced vocabulary
      acceptance    the acceptance that training measures is the one that decoding shows, node by node
      formats       every export format reloads to the same logits
    In half precision, rounding depends on the number of rows. The share of differing texts is then reported and not evaluated.

    The certificate (certificate.json) names the files, the target, precision, machine, versions, all counts and all ties;
    `trainkit inspect` shows its result. The checks take over ten minutes on a CPU for a target of 135M. The exit code is 1 if
    a promise is broken; the certificate then records that.

    Examples:
        trainkit verify models/draft --target models/target
        trainkit verify models/heads --target models/target --prompts test.jsonl --limit 16 --json verify.json
        trainkit verify models/heads --target models/target --device cuda --dtype bfloat16 --save false

    Args:
        bundle: Drafter bundle, or a plain folder of a small model with the same tokenizer.
        json: File for the certificate, in addition to the bundle.
        save: Whether to write the certificate into the bundle.
        **options: As in `VerifyArguments`.

    Returns:
        0, or 1 if a promise is broken.
    """
    # Check the arguments.
    from trainkit.eval.promises.types import VerifyArguments

    arguments = VerifyArguments(**options)
    if json is not None and not Path(json).resolve().parent.is_dir():
        raise UserError(f"--json {json}: its folder does not exist; make it first")
    # Load target and drafter, which imports the heavy modules.
    from trainkit import bundle as bundles
    from trainkit.data.sets.writer import quiet_libraries
    from trainkit.eval.promises.certificate import certificate
    from trainkit.eval.promises.run import CHECKS, load_subject, run_checks
    from trainkit.files import write_json

    if save and bundles.is_bundle(bundle) and not os.access(bundle, os.W_OK):
        raise UserError(f"{bundle}: the certificate cannot be written there; give --save false and --json FILE")
    quiet_libraries()
    subject = load_subject(bundle, arguments)
    device = subject.runner.device.type
    print(f"{bundle} for {arguments.target}: {len(subject.prompts)} prompts, {arguments.dtype} on {device}")
    print(f"{len(CHECKS)} checks, each printed when it is done; `texts` and `distribution` take longest\n", flush=True)

    def starting(name: str) -> None:
        if sys.stdout.isatty():  # the line of the result overwrites it
            print(f"{'...':<9} {name}", end="\r", flush=True)

    # Run the checks; each result is printed as soon as it is known.
    def report(check: Any) -> None:
        print(f"{check.status:<9} {check.name:<13} {check.figure}  ({check.seconds:.1f} s)", flush=True)
        for line in check.details:
            print(f"{'':<23} {line}", flush=True)

    checks = run_checks(subject, report, starting)
    values = certificate(subject, checks)
    # Summarise, and write the certificate.
    broken = [check for check in checks if check.status == "BROKEN"]
    print()
    for check in broken:
        print(f"BROKEN PROMISE: {check.promise} ({check.name})")
    if not broken:
        print(f"All promises are kept in {arguments.dtype}.")
    if json is not None:
        write_json(json, values)
    if save and bundles.is_bundle(bundle):
        write_json(bundle / bundles.CERTIFICATE, values)
        print(f"certificate: {bundle}/certificate.json; `trainkit inspect {bundle}` shows it")
    return int(bool(broken))
