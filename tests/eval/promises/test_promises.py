"""`trainkit verify`: sound drafters of every kind keep all promises, and each planted fault breaks the right one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.compressed import export_tiny
from tests.support.drafters import VARIANTS
from tests.support.targets import make_target
from trainkit import bundle
from trainkit.bundle import CERTIFICATE
from trainkit.card import describe
from trainkit.cli import main
from trainkit.drafters.base import DraftBatch, load_kind
from trainkit.drafters.eagle import Eagle
from trainkit.drafters.medusa import Medusa
from trainkit.errors import note
from trainkit.eval.promises.distribution import p_value
from trainkit.eval.promises.run import CHECKS, load_subject, run_checks
from trainkit.eval.promises.types import Check, VerifyArguments
from trainkit.export.drafter import export_drafter
from trainkit.layers.linear import HAS_KERNELS
from trainkit.layers.visible import Visible
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner
from trainkit.runner import round as rounds
from trainkit.runner import verify as rules
from trainkit.runner.round import Rounds

QUICK: dict[str, Any] = {"limit": 3, "max_new_tokens": 20, "samples": 100}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied target with two end ids, of which generation_config.json alone names one."""
    folder = make_target(
        tmp_path_factory.mktemp("verify") / "target", num_hidden_layers=3, hidden_size=32, head_dim=8, tie_word_embeddings=False
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 11]}))
    return folder


def make_bundle(target: Path, folder: Path, variant: str = "lm", noise: float = 0.02) -> Path:
    """A drafter that agrees with the target now and then, with random parts where its kind starts from zero."""
    kind, arguments = VARIANTS[variant]
    drafter = load_kind(kind)(target_shape(target), **arguments)
    drafter.initialise(FrozenTarget(target))
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(noise * torch.randn_like(weight))
    export_drafter(drafter, folder, tokenizer=target)
    return folder


def verified(target: Path, folder: Path, **changes: Any) -> dict[str, Check]:
    subject = load_subject(folder, VerifyArguments(str(target), **(QUICK | changes)))
    return {check.name: check for check in run_checks(subject, lambda check: None)}


def broken(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "BROKEN"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_drafters_keep_every_promise(variant, target, tmp_path, seed):
    """A drafter of each kind keeps all promises; training and decoding agree at every node to rounding."""
    checks = verified(target, make_bundle(target, tmp_path / "bundle", variant), seed=seed)
    assert not broken(checks), [(check.name, check.figure, check.details) for check in checks.values()]
    assert checks.keys() == CHECKS.keys()
    assert checks["acceptance"].counts["nodes"] > 20 and checks["acceptance"].counts["mean_difference"] < 1e-5
    assert checks["texts"].counts["total"] >= 3 * 3 * 5


def test_one_drafted_token_keeps_every_promise(target, tmp_path, seed):
    """At depth 1 the compared trees have as many nodes as such a depth proposes."""
    checks = verified(target, make_bundle(target, tmp_path / "bundle", "hydra"), depth=1, seed=seed)
    assert not broken(checks), [(check.name, check.figure, check.details) for check in checks.values()]


def test_draft_vocabulary_of_one_id_can_be_verified(target, tmp_path, seed):
    """A drafter that can propose a single token id keeps all promises."""
    drafter = load_kind("lm")(target_shape(target), draft_vocab=[5])
    drafter.initialise(FrozenTarget(target))
    export_drafter(drafter, tmp_path / "bundle", tokenizer=target)
    checks = verified(target, tmp_path / "bundle", seed=seed)
    assert not broken(checks), [(check.name, check.figure, check.details) for check in checks.values()]


def other_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner uses the embedding as output head."""
    load = Rounds.__init__

    def loaded(self: Rounds, target: Any, drafter: Any) -> None:
        target.lm_head.weight.data.copy_(target.embed.weight)
        load(self, target, drafter)

    monkeypatch.setattr(Rounds, "__init__", loaded)


def other_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner reads another rotary base than transformers."""
    from trainkit.models import load

    plain = load.decoder_shape
    changed = lambda config: replace(plain(config), rope={**plain(config).rope, "rope_theta": 500.0})
    monkeypatch.setattr(load, "decoder_shape", changed)


def dropped_end_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of end ids loses the one that only generation_config.json names."""
    from trainkit.models import target

    plain = target.end_ids
    monkeypatch.setattr(target, "end_ids", lambda *arguments: plain(*arguments)[:-1])


def ends_after_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text ends only after the round that contains its end token."""
    from trainkit.runner.request import Request

    def take(self: Request, output: Any, slot: int, end_ids: Any, prefill: bool = False) -> None:
        tokens = output.emitted_BP[slot].tolist()[: int(output.counts_B[slot])]
        self.tokens += tokens
        ended = not tokens or tokens[-1] in end_ids
        limited = len(self.prompt) + len(self.tokens) >= self.limit
        self.finish = "end" if ended else "length" if limited else ""
        del self.tokens[max(0, self.limit - len(self.prompt)) :]
        if not prefill:
            self.stats.add_round(len(tokens) - 1, output.verified(slot), output.drafted, output.paused)

    monkeypatch.setattr(Request, "take", take)


def shifted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """In verification a node of a tree sees its siblings' slots shifted by one."""

    class Shifted(Visible):
        def __init__(self, first_B: Any, bits_BTW: Any = None) -> None:
            super().__init__(first_B, None if bits_BTW is None else bits_BTW << 1)

    monkeypatch.setattr(rounds, "Visible", Shifted)


def stale_target_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a round the accepted path stays in its scratch slots."""
    monkeypatch.setattr(rounds, "move_slots", lambda *arguments: None)


def one_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification accepts one drafted token more than the target chose."""
    plain = rules.Coupled.verify

    def verify(self: Any, draft: Any, *more: Any) -> Any:
        verdict = plain(self, draft, *more)
        if verdict.path_BP is not None or draft.shape.depth < 2:
            return verdict
        counts_B = (verdict.counts_B + 1).clamp(max=draft.shape.depth)
        return rules._verdict(draft, None, counts_B, verdict.emitted_BP.gather(1, (counts_B - 1)[:, None]))

    monkeypatch.setattr(rules.Coupled, "verify", verify)


def rejected_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejection the target distribution stays whole, so the draft's mass counts twice."""
    monkeypatch.setattr(rules, "after_rejection", lambda p, q, token: (p, q))


def labels_one_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training compares predictions with the token after the right one."""
    plain = DraftBatch.training_targets

    def targets(self: DraftBatch, offset: int) -> Any:
        counted_BT, _, labels_N = plain(self, offset)
        return counted_BT, self.hidden_BTD.roll(-offset, 1)[counted_BT], labels_N

    monkeypatch.setattr(DraftBatch, "training_targets", targets)


def stale_draft_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE's cache keeps the entries of its own drafts in place of those from the target's hidden states."""
    monkeypatch.setattr(Eagle, "commit", lambda *arguments: None)


def other_draft_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """In decoding Medusa's levels use the head of another level."""
    plain = Medusa.step
    step = lambda self, state, frontier, *more: plain(self, state, replace(frontier, depth=(frontier.depth + 1) % 3), *more)
    monkeypatch.setattr(Medusa, "step", step)


def other_draft_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter writes another rotary base into the draft's config.json."""
    from trainkit.models import load

    plain = load.hf_config

    def written(*arguments: Any, **more: Any) -> dict[str, Any]:
        values = plain(*arguments, **more)
        return values | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}

    monkeypatch.setattr(load, "hf_config", written)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "another head": (other_head, "lm", "target"),
    "another rope": (other_rope, "lm", "target"),
    "dropped end id": (dropped_end_id, "lm", "ends"),
    "end token inside a draft": (ends_after_the_round, "lm", "ends"),
    "shifted mask": (shifted_mask, "lm", "texts"),
    "stale cache of the target": (stale_target_cache, "lm", "texts"),
    "one token too many": (one_token_too_many, "lm", "texts"),
    "rejected token stays": (rejected_stays, "lm", "distribution"),
    "labels one further": (labels_one_further, "lm", "acceptance"),
    "stale cache of the draft": (stale_draft_cache, "eagle", "acceptance"),
    "another head of the draft": (other_draft_head, "medusa", "acceptance"),
    "another rope of the draft": (other_draft_rope, "lm", "formats"),
}
"""Name -> (how it is planted, variant of the drafter, promise that it breaks)."""


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_break_the_right_promise(fault, target, tmp_path, monkeypatch, seed):
    """Each planted fault is found, by the promise that it breaks."""
    plant, variant, promise = FAULTS[fault]
    folder = make_bundle(target, tmp_path / "bundle", variant, noise=0.3 if promise == "distribution" else 0.005)
    plant(monkeypatch)
    # at 500 samples one draft of many had a p of 1.8e-5, above the level of 1e-5
    samples = 2000 if promise == "distribution" else 500
    arguments = VerifyArguments(str(target), **(QUICK | {"samples": samples, "limit": 6, "seed": seed}))
    check = CHECKS[promise](load_subject(folder, arguments))
    assert check.status == "BROKEN", (check.figure, check.details)


def test_certificate_is_written_shown_and_outdated(target, tmp_path, capsys, monkeypatch, seed):
    """The command writes the certificate, inspect shows it; a fault is recorded with exit code 1; other weights outdate it."""
    folder = make_bundle(target, tmp_path / "bundle")
    flags = [
        "verify",
        str(folder),
        "--target",
        str(target),
        "--limit=2",
        "--max_new_tokens=8",
        "--samples=100",
        f"--seed={seed}",
    ]
    assert main([*flags, "--json", str(tmp_path / "verify.json")]) == 0
    text = capsys.readouterr().out
    assert "7 checks, each printed when it is done" in text and "All promises are kept in float32." in text
    assert f"{folder}/certificate.json" in text
    values = json.loads((folder / CERTIFICATE).read_text())
    assert values == json.loads((tmp_path / "verify.json").read_text())
    assert values["passed"] and values["dtype"] == "float32" and [check["name"] for check in values["checks"]] == [*CHECKS]
    assert values["target"]["weights"] and values["files"].keys() == bundle.read(folder).files.keys()
    assert main(["inspect", str(folder)]) == 0
    assert "all 7 promises kept (float32 on cpu" in capsys.readouterr().out
    # a fault
    with monkeypatch.context() as patch:
        dropped_end_id(patch)
        assert main(flags) == 1
    assert "BROKEN PROMISE: A text ends at every end token" in capsys.readouterr().out
    assert "BROKEN: ends" in describe(bundle.read(folder))
    # a certificate that is edited or removed, another tree
    (folder / CERTIFICATE).write_text("{}")
    assert "unreadable" in describe(bundle.read(folder))
    (folder / CERTIFICATE).unlink()
    assert "certificate" not in describe(bundle.read(folder))
    (folder / CERTIFICATE).write_text(json.dumps(values))
    assert "all 7 promises kept" in describe(bundle.read(folder))
    assert "outdated" in describe(bundle.amend(folder, runner={"tree": [[0], [1]]}))
    bundle.amend(folder, runner={})
    # other weights
    manifest = json.loads((folder / "trainkit.json").read_text())
    manifest["files"]["model.safetensors"] = "0" * 64
    (folder / "trainkit.json").write_text(json.dumps(manifest))
    assert "outdated" in describe(bundle.read(folder, checksums=False))


def test_half_precision_reports_a_rate(target, tmp_path, seed):
    """In bfloat16 the share of differing texts is measured, and no equality is claimed."""
    folder = make_bundle(target, tmp_path / "bundle")
    subject = load_subject(folder, VerifyArguments(str(target), dtype="bfloat16", seed=seed, **QUICK))
    texts, acceptance = CHECKS["texts"](subject), CHECKS["acceptance"](subject)
    assert texts.status == "measured" and "%" in texts.figure and "as many rows" in texts.details[0]
    assert acceptance.status == "kept", (texts, acceptance)


def test_quantised_targets_keep_every_promise(target, tmp_path, seed):
    """Products that round to bfloat16 are compared with transformers' dense ones to that precision; texts stay equal."""
    quantised = tmp_path / "int8"
    export_tiny(target, quantised, bits=8, group=None)
    arguments = VerifyArguments(str(quantised), **(QUICK | {"seed": seed}))
    subject = load_subject(make_bundle(quantised, tmp_path / "bundle"), arguments)
    found = [CHECKS[name](subject) for name in ("files", "target", "texts")]
    assert [check.status for check in found] == ["kept"] * 3, found
    assert not HAS_KERNELS or "0.1" in found[1].details[0]


def test_plain_folders_are_verified_without_certificate(target, tmp_path, capsys, seed):
    """A draft model without trainkit.json is checked as well; nothing is written into its folder."""
    folder = make_bundle(target, tmp_path / "bundle")
    (folder / "trainkit.json").unlink()
    names = sorted(path.name for path in folder.iterdir())
    flags = ["--limit=1", "--max_new_tokens=8", "--samples=100", f"--seed={seed}"]
    assert main(["verify", str(folder), "--target", str(target), *flags]) == 0
    assert "not a trainkit bundle" in capsys.readouterr().out and sorted(path.name for path in folder.iterdir()) == names


def test_targets_without_chat_template_read_raw_prompts(target, tmp_path):
    """The built-in prompts are used as they are if the tokenizer has no chat template."""
    raw = shutil.copytree(target, tmp_path / "raw")
    (raw / "chat_template.jinja").unlink()
    folder = make_bundle(raw, tmp_path / "bundle")
    with_template, without = (load_subject(folder, VerifyArguments(str(path), limit=1)).prompts[0] for path in (target, raw))
    assert len(without) < len(with_template)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth=0"], "depth 0: must be at least 1"),
        (["--samples=1"], "samples 1: must be at least 100"),
        (["--max_new_tokens=600"], "lower max_new_tokens"),
        (["--json=/nowhere/x.json"], "make it first"),
    ],
)
def test_bad_arguments_get_one_line(flags, message, target, tmp_path, capsys):
    """A wrong argument is refused in one line before any check."""
    assert main(["verify", str(make_bundle(target, tmp_path / "bundle")), "--target", str(target), *flags]) == 2
    assert message in capsys.readouterr().err


def test_p_value_by_hand():
    """Two equal halves of 100: 60 against 40 has chi-square 4 with one degree of freedom, p = 0.0455."""
    assert p_value(np.array([60.0, 40.0]), np.array([0.5, 0.5])) == pytest.approx(0.0455, abs=1e-4)
    assert p_value(np.array([99.0, 1.0]), np.array([1.0, 0.0])) == 0.0
    # outcomes expected 4 and 6 times: nothing but the other is left to pool the first with, so two groups remain
    counts, law = np.array([90.0, 4.0, 6.0]), np.array([0.9, 0.04, 0.06])
    assert p_value(counts, law) == pytest.approx(1.0)


def test_drafter_given_as_target_is_noted(target, tmp_path, capsys):
    """A drafter's bundle given as the target, as when flags are swapped, gives a note with the target that it was made for."""
    folder = make_bundle(target, tmp_path / "bundle")
    capsys.readouterr()
    for load in (FrozenTarget, Runner.load):
        note.cache_clear()
        load(folder)
        assert f"note: {folder}: this target is a drafter, made for target; " in capsys.readouterr().err
        load(target)
        assert "note:" not in capsys.readouterr().err


def test_checks_are_announced_before_they_run(target, tmp_path):
    """`starting` gets the name of each check before its result is reported."""
    subject, log = load_subject(make_bundle(target, tmp_path / "bundle"), VerifyArguments(str(target), **QUICK)), []
    run_checks(subject, lambda check: log.append(f"{check.name} done"), log.append)
    assert log == [line for name in CHECKS for line in (name, f"{name} done")]


def test_p_value_compares_outcomes_that_are_all_rare():
    """Where every outcome is expected fewer than 5 times, several groups are still compared, and other counts are found."""
    law, counts = np.full(81, 1 / 81), np.zeros(81)
    counts[:50] = 2
    assert p_value(counts, law) < 1e-5
    assert p_value(law * 100, law) == pytest.approx(1.0)


def test_p_value_forgives_one_rare_text():
    """A single text that is expected once in a hundred runs does not count as a fault."""
    counts, law = np.array([60.0, 39.0, 1.0]), np.array([0.6, 0.3999, 0.0001])
    assert p_value(counts, law) > 0.1
