"""Training on text from several sources: written by the current draft, resumable, the same on all ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.support.runs import weights
from tests.support.training import Losses, StopAt, draft_module, fit
from trainkit.data.mixture import MixedLoader
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.models.target import FrozenTarget
from trainkit.modules.mixture_data import MixtureData
from trainkit.runner import Runner


def mixture_data(rows: Path, cache: Path, weights: dict[str, float], **more) -> MixtureData:
    options = {"prompts": str(rows), "refresh": 2, "max_new_tokens": 24, "length": 96, "batch_size": 2, "depth": 3}
    stored = {name: str(rows) for name in ("corpus", "target") if weights.get(name)}
    return MixtureData(weights, validation=str(rows), cache=str(cache), **(options | stored | more))  # type: ignore[arg-type]


class Seen(Callback):
    """Records tokens and masks of every training batch."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.batches.append({name: batch[name] for name in ("tokens_BT", "mask_BT", "document_BT", "positions_BT")})


def documents(batch) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each document of a batch."""
    found = []
    for tokens, mask, document in zip(batch["tokens_BT"], batch["mask_BT"], batch["document_BT"], strict=True):
        for number in range(int(document.max()) + 1):
            there = document == number
            found.append((tokens[there & ~mask].tolist(), tokens[there & mask].tolist()))
    return found


def test_draft_texts_are_written_by_the_current_draft(tiny_target, chats, tmp_path):
    """At temperature 0: the texts of the second chapter are written with the weights after two steps."""
    seen = Seen()
    module = draft_module(tiny_target, optimizer=lambda p: torch.optim.AdamW(p, lr=0.1))
    data = mixture_data(chats, tmp_path, {"draft": 1.0}, temperature=0.0)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            kept[trainer.global_step] = {name: value.clone() for name, value in module.drafter.state_dict().items()}

    fit(module, data, tmp_path, seen, Keep(), steps=4)
    shape = module.shape
    for chapter, batches in ((0, seen.batches[:2]), (2, seen.batches[2:])):
        draft = LMDraft(shape, num_layers=1)
        draft.initialise(FrozenTarget(tiny_target))
        if chapter:
            draft.load_state_dict(kept[chapter])
        runner = Runner(draft.decoder, None, shape, max_batch=4, max_len=128)
        pairs = [pair for batch in batches for pair in documents(batch)]
        assert pairs
        written = [out.tokens for out in runner.generate([prompt for prompt, _ in pairs], 24)]
        assert written == [answer for _, answer in pairs]


@pytest.mark.parametrize("weights_of", [{"draft": 1.0}, {"mixed": 1.0, "target": 1.0}, {"corpus": 1.0, "target": 9.0}], ids=str)
def test_resumed_mixture_run_equals_uninterrupted(weights_of, tiny_target, chats, tmp_path):
    """Also within a chapter, whose texts were written with weights that no longer exist."""
    straight, first, second = Losses(), Losses(), Losses()
    make = lambda: (draft_module(tiny_target), mixture_data(chats, tmp_path, weights_of))
    fit(*make(), tmp_path / "a", straight, steps=5)
    fit(*make(), tmp_path / "b", first, StopAt(3), steps=5)
    fit(*make(), tmp_path / "b", second, steps=5, ckpt_path=tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert len(first.values) == 3 and first.values + second.values == straight.values
    assert all(torch.equal(value, weights(tmp_path / "b")[name]) for name, value in weights(tmp_path / "a").items())


def test_ranks_write_the_texts_of_one_process(tiny_target, chats, tmp_path):
    """Two ranks together write the texts that one process would."""
    module, data = draft_module(tiny_target), mixture_data(chats, tmp_path, {"mixed": 1.0})
    fit(module, data, tmp_path, steps=1)
    requests = [(number, number % 5) for number in range(9)]
    alone = sorted(data._answers(data._runner("mixed"), "mixed", requests))
    parts = [data._answers(data._runner("mixed"), "mixed", requests[rank::2]) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == alone


def test_target_writes_in_its_training_dtype(tiny_target, chats, tmp_path):
    """The target that writes mixed texts is not held a second time in float32."""
    module, data = draft_module(tiny_target, target_dtype="bfloat16"), mixture_data(chats, tmp_path, {"mixed": 1.0})
    fit(module, data, tmp_path, steps=1)
    runner = data._runner("mixed")
    networks = (runner.rounds.target, runner.rounds.drafter)
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.bfloat16}
    assert next(module.drafter.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_two_processes_train_as_one_on_drafted_texts(tiny_target, chats, tmp_path):
    """Under torchrun, with half of the rows each: the same weights as one process on the same prompts."""
    script = tmp_path / "go.py"
    script.write_text("import sys\nfrom trainkit.commands.fit import run\nrun('fit', sys.argv[1:])\n")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    found = []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, batch, launch in (("one", 4, []), ("two", 2, torchrun)):
        flags = {
            "model": "DraftModule",
            "model.target": tiny_target,
            "model.drafter": "LMDraft",
            "data": "MixtureData",
            "model.optimizer": "torch.optim.SGD",
            "model.optimizer.lr": 0.5,
            "data.weights": '{"draft": 1, "target": 1}',
            "data.target": chats,
            "data.prompts": chats,
            "data.validation": chats,
            "data.cache": tmp_path / "cache",
            "data.length": 96,
            "data.max_new_tokens": 24,
            "data.refresh": 2,
            "data.batch_size": batch,
            "trainer.max_steps": 4,
            "trainer.default_root_dir": tmp_path / name,
            "trainer.enable_progress_bar": "false",
            "trainer.accelerator": "cpu",
            "checkpoint.monitor": "val/alpha",
        }
        arguments = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
        command = [sys.executable, *launch, str(script), *arguments]
        done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(weights(tmp_path / name))
    one, two = found
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    ("weights_of", "more", "message"),
    [
        ({"target": 0.0}, {}, "data.weights"),
        ({"target": -1.0, "draft": 1.0}, {}, "data.weights"),
        ({"target": 1.0}, {"target": None}, "data.target names no files"),
        ({"draft": 1.0}, {"prompts": None}, "data.prompts names no file"),
        ({"draft": 1.0}, {"validation": None}, "data.validation"),
        ({"draft": 1.0}, {"refresh": 0}, "refresh"),
        ({"mixed": 1.0}, {"share": 1.2}, "share"),
    ],
)
def test_invalid_options_give_one_line(weights_of, more, message, tmp_path):
    """An invalid option gives a one-line error that names it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "response": "b"}))
    options = {"prompts": str(rows), "target": str(rows), "validation": str(rows)} | more
    with pytest.raises(UserError, match=message) as caught:
        MixtureData(weights_of, **options)
    assert "\n" not in str(caught.value)


def test_prompts_too_long_for_a_row_are_refused(tiny_target, chats, tmp_path):
    """Prompts that leave no room in a row are refused."""
    module = draft_module(tiny_target)
    with pytest.raises(UserError, match="data.prompts: none of"):
        fit(module, mixture_data(chats, tmp_path, {"draft": 1.0}, max_new_tokens=95), tmp_path, steps=1)


def test_loader_length_is_one_chapter(tiny_target, chats, tmp_path):
    """The length of the loader is the number of batches of one chapter."""
    trainer = fit(draft_module(tiny_target), mixture_data(chats, tmp_path, {"target": 1.0}), tmp_path, steps=2)
    loader = trainer.train_dataloader
    assert isinstance(loader, MixedLoader) and len(loader) == 2


def test_held_out_prompts_are_in_no_source(tiny_target, tmp_path):
    """Prompts held out of the first source are in no other source, and none of the prompts to answer."""
    questions = [f"How many clips, {n}?" for n in range(20)]
    write = lambda name, rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("target.jsonl", [{"prompt": q, "response": f"{k} clips."} for q in questions for k in range(3)])
    write("corpus.jsonl", [{"question": q, "answer": "Many."} for q in questions])
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("target", "corpus")}
    data = mixture_data(
        tmp_path / "corpus.jsonl", tmp_path, {"corpus": 1.0, "target": 1.0, "draft": 1.0}, **files, validation_share=0.2
    )
    data.validation = None
    data.connect(draft_module(tiny_target))
    data.prepare_data()
    data.setup("fit")

    def prompts_of(packed) -> set[tuple[int, ...]]:
        found = documents(packed.batch(range(len(packed)), len(packed)))
        return {tuple(prompt) for prompt, _ in found}

    held_out = prompts_of(data.rows[1])
    assert len(held_out) == 4 and [len(prompts_of(packed)) for packed in data.training_sets] == [16, 16]
    others = [*map(prompts_of, data.training_sets), set(map(tuple, data._prompts))]
    assert len(others[2]) == 16 and not any(held_out & other for other in others)
