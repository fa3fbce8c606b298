"""Programs that are not ours, each in an environment of its own, started as a process and asked through JSON.

tests/outside/README.md says how the environments are made.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from trainkit.drafters.base import DraftBatch
from trainkit.drafters.eagle import Eagle
from trainkit.drafters.lm import LMDraft
from trainkit.eval.bench.identity import IdentityChecker
from trainkit.export.drafter import export_drafter
from trainkit.losses.divergence import CrossEntropy
from trainkit.models.load import load_decoder
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner
from trainkit.runner.sampling import Sampling

READERS = Path(__file__).resolve().parents[1] / "outside" / "readers"
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1234.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5000.0, **_LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5000.0},
}


def ask(environment: str, reader: str, request: dict[str, Any], seconds: float = 600) -> Any:
    """What the script readers/`reader`.py answers to a request, run by the Python of an environment.

    The request goes in on standard input; the answer is the last line of standard output. Skips the test if the folder that
    TRAINKIT_OUTSIDE names has no such environment; fails with the end of the error output if the script fails.
    """
    folder = Path(os.environ.get("TRAINKIT_OUTSIDE") or "no-folder", environment)
    python = folder / "bin" / "python"
    if not python.is_file():
        pytest.skip(
            f"no environment {folder}; make it with tests/outside/environments.sh {environment} and set TRAINKIT_OUTSIDE"
        )
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TQDM_DISABLE": "1"}
    command = [str(python), "-W", "ignore", str(READERS / f"{reader}.py")]
    done = subprocess.run(command, input=json.dumps(request), env=variables, text=True, capture_output=True, timeout=seconds)
    assert done.returncode == 0, f"{reader} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Decoded:
    """What a greedy decoding gave.

    Attributes:
        tokens: New token ids of each prompt; no token ends a text.
        accepted: For each prompt, the number of drafted tokens that were accepted; 0 without a drafter.
        last: Those among them that the round accepted which ended the text.
    """

    tokens: list[list[int]]
    accepted: list[int]
    last: list[int] = field(default_factory=list)

    def tau(self) -> float:
        """Tokens per round; a prompt's first token is the prefill's."""
        emitted = sum(len(tokens) - 1 for tokens in self.tokens)
        return emitted / (emitted - sum(self.accepted))


@torch.inference_mode()
def decode(
    target: Path, drafter: Path | None, prompts: Sequence[Sequence[int]], new_tokens: int, depth: int | None = None
) -> Decoded:
    """Greedy decoding by our runner in float32, in chains of `depth`.

    The round that ends a text counts as in programs that draft no further than `new_tokens`, whose last token is never drafted;
    our runner drafts to `depth` and cuts what is too long.
    """
    runner, found = Runner.load(target, drafter, max_batch=1), Decoded([], [])
    for prompt in prompts:
        emitted: list[int] = []
        runner.observe = lambda trace, emitted=emitted: emitted.append(int(trace.verdict.counts_B[0]))
        output = runner.generate([list(prompt)], max_new_tokens=new_tokens, depth=depth, ignore_end=True)[0]
        left, rounds = new_tokens - 1, []
        for count in emitted:
            if left > 0:
                rounds.append(min(count, left) - 1)
                left -= count
        found.tokens.append(output.tokens)
        found.accepted.append(sum(rounds))
        found.last.append(rounds[-1])
    return found


def check_decoded(target: Path, prompts: Sequence[Sequence[int]], ours: Decoded, theirs: Decoded, exact: bool) -> str:
    """Compares two greedy decodings of the same prompts; returns a line of figures.

    Texts must be equal, or differ first at a tie (identity.py). With `exact`, each equal text must have the same number of
    accepted tokens. Otherwise the mean over texts of the difference must be within three standard errors of 0.
    """
    texts = IdentityChecker(load_decoder(target, dtype=torch.float32), Sampling(), 0).compare(
        prompts, ours.tokens, theirs.tokens
    )
    assert not texts.mismatches, texts
    ties = {difference.prompt for difference in texts.differences}
    more = [b - a for i, (a, b) in enumerate(zip(ours.accepted, theirs.accepted, strict=True)) if i not in ties]
    assert len(more) > len(prompts) / 2, texts
    mean, error = statistics.mean(more), statistics.stdev(more) / len(more) ** 0.5
    line = f"{len(more)} of {len(prompts)} texts identical, {len(ties)} differ at a tie; tau {theirs.tau():.3f}, ours"
    line += f" {ours.tau():.3f}; accepted per text {mean:+.2f} +- {error:.2f}"
    assert not any(more) if exact else abs(mean) <= 3 * error, f"{line}; {more}"
    return line


def near_draft(target: Path, out: Path, noise: float = 0.012, num_layers: int = 4, **options: Any) -> Path:
    """Exports a draft model that agrees with a tiny target of four layers often, but not always: its weights and some noise."""
    draft = LMDraft(target_shape(target), num_layers=num_layers)
    draft.initialise(FrozenTarget(target))
    with torch.no_grad():
        for weight in draft.parameters():
            weight += noise * torch.randn_like(weight)
    return export_drafter(draft, out, tokenizer=target, **options).path


def tiny_prompts(count: int = 8, vocab_size: int = 320) -> list[list[int]]:
    """Prompts of 4 to 20 tokens."""
    return [torch.randint(5, vocab_size, (4 + 16 * index // count,)).tolist() for index in range(count)]


def trained_eagle(
    target: Path, out: Path, prompts: Sequence[Sequence[int]], new_tokens: int, steps: int = 60, **options: Any
) -> Path:
    """Exports an EAGLE-3 draft trained for seconds on the target's own answers to these prompts: some tokens are accepted."""
    teacher = FrozenTarget(target)
    draft = Eagle(teacher.shape(), steps=3, **options.pop("drafter", {}))
    draft.initialise(FrozenTarget(target))
    texts = [
        [*prompt, *answer] for prompt, answer in zip(prompts, decode(target, None, prompts, new_tokens).tokens, strict=True)
    ]
    tokens = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    document = pad_sequence([torch.zeros(len(text), dtype=torch.long) for text in texts], batch_first=True, padding_value=-1)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden, taps = teacher.forward(tokens, positions, document, draft.taps)
    batch = DraftBatch(tokens, positions, document, document == 0, taps, hidden, teacher.handle())
    optimizer = torch.optim.AdamW(draft.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        draft(batch, CrossEntropy()).mean.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
    return export_drafter(draft, out, tokenizer=target, **options).path
