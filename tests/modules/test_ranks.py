"""Two processes under torchrun: they train like one process, end on a signal, and resume exactly after a kill."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support.processes import code_of, start, torchrun
from tests.support.runs import STEPS, arguments, check_equal, lines, log, resumed, weights
from trainkit.commands.fit import run
from trainkit.errors import UserError
from trainkit.modules.draft import DraftModule


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_lines(root: Path, more_than: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while lines(root) <= more_than and process.poll() is None:
        assert time.monotonic() < until, "no further line in 120 seconds"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def straight(tiny_target, chats, tmp_path_factory) -> Path:
    """An uninterrupted run of two processes."""
    root = tmp_path_factory.mktemp("straight") / "run"
    process = torchrun(arguments("draft", tiny_target, chats, root), root.parent / "output")
    assert process.wait(120) == 0, (root.parent / "output").read_text()[-2000:]
    return root


def test_signal_ends_all_ranks_and_resume_is_exact(straight, tiny_target, chats, tmp_path, seed):
    """SIGTERM and Ctrl-C to torchrun and SIGTERM to one worker, in a random order, each while the last one's run is resumed."""
    root, output = tmp_path / "run", tmp_path / "output"
    args = arguments("draft", tiny_target, chats, root)
    cases = [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
    for number, one in random.sample(cases, len(cases)):
        process = torchrun(resumed(args, root), output)
        wait_for_lines(root, max(1, lines(root)) + random.randint(0, 1), process)
        os.kill(random.choice(workers(process)) if one else process.pid, number)
        assert process.wait(120) == 128 + number
        assert "the state is saved" in output.read_text() and "Traceback" not in output.read_text()
        assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < STEPS
    assert torchrun(resumed(args, root), output).wait(120) == 0
    check_equal(straight, root)


def test_kills_of_ranks_leave_no_trace(straight, tiny_target, chats, tmp_path, seed):
    """A kill of one process, after which torchrun ends the other, and one of all processes, as when a machine is lost."""
    root, output = tmp_path / "run", tmp_path / "output"
    args = arguments("draft", tiny_target, chats, root)
    for everything in random.sample([False, True], 2):
        process = torchrun(resumed(args, root), output)
        wait_for_lines(root, lines(root) + random.randint(0, 2), process)
        time.sleep(random.uniform(0, 0.1))
        killed = workers(process)
        for pid in [process.pid, *killed] if everything else [random.choice(killed)]:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(120) != 0
    assert torchrun(resumed(args, root), output).wait(120) == 0
    check_equal(straight, root)


class SeenModule(DraftModule):
    """Writes the documents that each process trains on to a file."""

    def training_step(self, batch, batch_idx):
        root = Path(self.trainer.default_root_dir)
        with (root.parent / f"seen-{root.name}-{self.global_rank}").open("a") as file:
            for tokens_T, document_T in zip(batch["tokens_BT"], batch["document_BT"], strict=True):
                for document in document_T[document_T >= 0].unique():
                    json.dump([self.trainer.current_epoch, tokens_T[document_T == document].tolist()], file)
                    file.write("\n")
        return super().training_step(batch, batch_idx)


TVDPP = [f"model.divergence.{name}" for name in ("estimator", "samples", "normalise")]
SMOOTH = {"model.divergence": "ForwardKL", **dict.fromkeys(TVDPP)}
SPANNING = {"model.divergence.estimator": "exact"}  # tvd++, statistics over the whole step


@pytest.mark.parametrize(
    ("loss", "steps", "names", "weight"),
    [
        (SMOOTH, 50, ("train/loss", "optim/grad_norm", "val/loss"), 1e-5),
        # its reward is 1 where p > q: where p and q differ by rounding only, a gradient may differ by one token
        (SPANNING, 20, ("train/loss", "val/loss"), 1e-4),
    ],
    ids=["forward_kl", "tvd++"],
)
def test_two_processes_train_as_one(loss, steps, names, weight, tiny_target, tmp_path, seed):
    """Clipped steps on rows whose counted tokens vary tenfold: equal losses and weights, each document once per epoch.

    With a validation set too small for the second process to have a row of it.
    """
    rows, chats = range(64), tmp_path / "chats.jsonl"
    answers = {n: "clips " * random.choice([1, 2, 20]) for n in rows}
    chats.write_text("".join(json.dumps({"prompt": f"How many of {n}?", "response": answers[n] + str(n)}) + "\n" for n in rows))
    more = {
        "model": f"{__name__}.SeenModule",
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.05,
        "data.validation": "null",
        "data.validation_share": 0.1,
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": 1,
        "trainer.gradient_clip_val": 0.2,
        "trainer.accumulate_grad_batches": 2,
    } | loss
    args = arguments("draft", tiny_target, chats, tmp_path / "one", **more, **{"data.batch_size": 4})
    assert code_of(start(run, "fit", args)) == 0
    args = arguments("draft", tiny_target, chats, tmp_path / "two", **more, **{"data.batch_size": 2})
    process = torchrun(args, tmp_path / "output")
    assert process.wait(120) == 0, (tmp_path / "output").read_text()[-2000:]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) and sum(bool(row["train/loss"]) for row in one) == steps
    for row, other in zip(one, two, strict=True):
        for name in names:
            assert bool(row[name]) == bool(other[name])
            assert not row[name] or abs(float(row[name]) - float(other[name])) < 1e-5 * max(1, abs(float(row[name])))
    assert max(float(row["optim/grad_norm"]) for row in one if row["optim/grad_norm"]) > 0.2, "nothing was clipped"
    other = weights(tmp_path / "two")
    assert all(torch.allclose(value, other[name], rtol=0, atol=weight) for name, value in weights(tmp_path / "one").items())
    seen = [
        Counter(line for rank in ranks for line in (tmp_path / f"seen-{name}-{rank}").read_text().splitlines())
        for name, ranks in (("one", (0,)), ("two", (0, 1)))
    ]
    assert set(seen[1].values()) == {1} and seen[0] == seen[1]
    assert len({json.loads(line)[0] for line in seen[1]}) > 1, "less than an epoch"


class FaultyModule(DraftModule):
    """Its loss is infinite on rank 1 at step 7; after step 5 rank 0 can write no file of more than 20 kB."""

    def __init__(self, *args, disk_full: bool = False, **more) -> None:
        super().__init__(*args, **more)
        self.disk_full = disk_full

    def loss(self, batch, micro):
        output, step = super().loss(batch, micro), self.trainer.global_step + 1
        if self.disk_full and step > 5 and self.global_rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        if not self.disk_full and micro == 1 and step == 7 and self.global_rank == 1:
            return replace(output, sum=output.sum + math.inf)  # the gradient remains finite
        return output


@pytest.mark.parametrize(
    ("more", "code", "message", "step"),
    [
        ({"model.on_nonfinite": "error"}, 2, "trainkit: error: train/loss is NaN or infinite at step 7;", 4),
        ({"model.on_nonfinite": "skip"}, 0, "train/loss is NaN or infinite at step 7; the step is skipped", 9),
        ({"model.disk_full": "true"}, 2, "last.ckpt: cannot be written (File too large); free space, then continue", 4),
    ],
    ids=["error", "skip", "disk full"],
)
def test_fault_of_one_rank_stops_or_skips_on_all(more, code, message, step, tiny_target, chats, tmp_path):
    """An infinite loss or a full disk on one of two ranks stops both with one line; a step is skipped on both."""
    root = tmp_path / "run"
    more = {"model": f"{__name__}.FaultyModule", "trainer.max_steps": 9, "trainer.log_every_n_steps": 1} | more
    process = torchrun(arguments("draft", tiny_target, chats, root, **more), tmp_path / "output")
    assert process.wait(120) == code
    printed = [line for line in (tmp_path / "output").read_text().splitlines() if "NaN" in line or "error" in line]
    assert len(printed) == 1 and message in printed[0] and "Traceback" not in (tmp_path / "output").read_text()
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    if not code:
        counts = {row["step"]: float(row["optim/skipped_steps"]) for row in log(root) if row["optim/skipped_steps"]}
        assert counts == {str(n): float(n == 7) for n in range(1, 10)}
        assert all(value.isfinite().all() for value in weights(root).values())


class SpreadModule(DraftModule):
    """Writes the share of the target's layers that this process holds after the last step to a file."""

    def on_train_end(self):
        parameters = [parameter for layer in self.teacher._layers for parameter in layer.parameters()]
        local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
        share = local / sum(parameter.numel() for parameter in parameters)
        (Path(self.trainer.default_root_dir) / f"share-{self.global_rank}").write_text(str(share))


def test_sharded_target_trains_the_same(straight, tiny_target, chats, tmp_path):
    """A target sharded over two processes trains to the same bits, and each process holds half of it."""
    root, more = tmp_path / "run", {"model": f"{__name__}.SpreadModule", "model.target_shard": "fsdp"}
    process = torchrun(arguments("draft", tiny_target, chats, root, **more), tmp_path / "output")
    assert process.wait(120) == 0, (tmp_path / "output").read_text()[-2000:]
    check_equal(straight, root)
    assert [float((root / f"share-{rank}").read_text()) for rank in (0, 1)] == pytest.approx([0.5, 0.5], abs=0.02)


def test_sharded_target_excludes_a_teacher_cache(tmp_path):
    """A sharded target and a teacher cache cannot be combined."""
    with pytest.raises(UserError, match=r"model\.target_shard.*give one of the two"):
        DraftModule(str(tmp_path), lambda shape: None, target_shard="fsdp", teacher_cache=str(tmp_path))
