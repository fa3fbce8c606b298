"""`trainkit distill` with a real target: kills, ranks, drafters and batch sizes do not change the rows."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import fake_server, training
from tests.support.processes import ended, files_of, fork, rows_in, wait_until
from tests.support.targets import make_target, make_tokenizer
from trainkit.cli import main, parse
from trainkit.commands.distill import distill
from trainkit.data.openai_client import request_seed
from trainkit.data.text.prepare import prepare
from trainkit.drafters.lm import LMDraft
from trainkit.export.drafter import export_drafter
from trainkit.models.load import read_tokenizer
from trainkit.models.target import FrozenTarget, target_shape

TOKENIZER = Path(__file__).parents[2] / "data" / "tiny" / "tokenizer"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"How many clips are {n} and {n}?"} if n % 3 else {"text": "In May " * (n + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Command:
    """`trainkit distill` on fixed files; `options` are written as flags.

    The seed for sampling is fixed: rows decoded in another batch are rounded differently, and a choice near a tie could change.
    """

    def __init__(self, target: Path, prompts: Path) -> None:
        self.fixed = {
            "target": target,
            "prompts": prompts,
            "temperatures": "[0,0.9]",
            "max_new_tokens": 20,
            "part_rows": 3,
            "batch": 2,
            "seed": 1,
            "device": "cpu",
        }

    def __call__(self, out: Path, **options: Any) -> int:
        return main(["distill", *(f"--{name}={value}" for name, value in (self.fixed | options | {"out": out}).items())])


@pytest.fixture(scope="module")
def command(tiny_target: Path, prompts: Path) -> Command:
    return Command(tiny_target, prompts)


@pytest.fixture(scope="module")
def straight(command: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a set written without interruption: 16 rows in 6 parts."""
    out = tmp_path_factory.mktemp("straight")
    assert command(out) == 0
    return files_of(out)


def rows_of(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for name, text in sorted(files.items()) if name != "distill.json" for line in text.splitlines()]


def test_distill_after_three_kills_is_identical(command, straight, tmp_path, seed, capsys):
    """A set that was killed three times and finished has the bytes of an uninterrupted one."""
    draw = random.Random(seed)
    for _ in range(3):
        pid = fork(lambda: command(tmp_path))
        wanted = rows_in(tmp_path) + draw.randint(1, 4)
        wait_until(lambda wanted=wanted: rows_in(tmp_path) >= wanted, pid)
        time.sleep(draw.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    there = rows_in(tmp_path)
    capsys.readouterr()
    assert command(tmp_path) == 0
    assert f"{16 - there} of 16 rows written, {there} already existed" in capsys.readouterr().out
    assert files_of(tmp_path) == straight


def test_ctrl_c_exits_130_and_keeps_all_rows(command, straight, tmp_path):
    """Ctrl-C ends with code 130 and no row is lost."""
    stderr = tmp_path / "stderr"
    pid = fork(lambda: command(tmp_path / "set"), stderr)
    wait_until(lambda: rows_in(tmp_path / "set") >= 3, pid)
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130 and "Traceback" not in stderr.read_text()
    assert rows_in(tmp_path / "set") >= 3
    assert command(tmp_path / "set") == 0
    assert files_of(tmp_path / "set") == straight


def test_two_ranks_make_the_same_set_as_one(command, straight, tmp_path):
    """Two ranks write the set that one would, and one process can finish what one of two ranks began."""

    def rank(number: int, out: Path) -> int:
        os.environ.update(RANK=str(number), WORLD_SIZE="2")
        return command(out)

    both = [fork(lambda number=number: rank(number, tmp_path / "both")) for number in (0, 1)]
    assert [ended(pid) for pid in both] == [0, 0]
    assert files_of(tmp_path / "both") == straight
    assert ended(fork(lambda: rank(1, tmp_path / "one"))) == 0
    assert rows_in(tmp_path / "one") == 7 and command(tmp_path / "one") == 0
    assert files_of(tmp_path / "one") == straight


@pytest.mark.parametrize("draft", [False, True])
def test_drafter_and_batch_size_change_no_token(draft, command, straight, tiny_target, tmp_path, capsys):
    """A drafter and another batch size leave every token as it is."""
    options: dict[str, Any] = {"batch": 7}
    if draft:
        network = LMDraft(target_shape(tiny_target), num_layers=3)
        network.initialise(FrozenTarget(tiny_target))
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
        export_drafter(network, tmp_path / "draft", tokenizer=tiny_target)
        options |= {"drafter": tmp_path / "draft", "depth": 3}
    assert command(tmp_path / "set", **options) == 0
    assert files_of(tmp_path / "set") == straight


def test_greedy_rows_equal_transformers(command, straight, tiny_target, prompts):
    """Greedy rows equal those of transformers."""
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(tiny_target).eval(), rows_of(straight)
    assert len(rows) == 16 and {len(row["messages"]) if "messages" in row else row["prompt"][:2] for row in rows} == {2, "In"}
    for row in rows[::4]:
        assert row["temperature"] == 0
        given = row["loss_mask"].index(1)
        ids = torch.tensor([row["input_ids"][:given]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert output[0].tolist() == row["input_ids"]
        assert row["finish"] == ("end" if row["input_ids"][-1] == model.config.eos_token_id else "length")


def test_samples_of_one_prompt_differ(command, tmp_path):
    """All samples of one prompt differ from each other."""
    assert command(tmp_path, n=2, limit=2, temperatures="[0.8,1.0]") == 0
    rows = rows_of(files_of(tmp_path))
    assert [row["temperature"] for row in rows] == [0.8, 0.8, 1.0, 1.0] * 2
    assert len({tuple(row["input_ids"]) for row in rows}) == 8


@pytest.mark.parametrize("key", ["seed", "temperatures", "target", "weights", "prompts", "top_k", "max_new_tokens"])
def test_resume_with_other_setting_gives_one_line(key, command, straight, tiny_target, prompts, tmp_path, capsys):
    """Resuming with another setting gives a one-line error that names it, and changes no file."""
    for name, text in straight.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(text)
    value: Any = {"seed": 2, "temperatures": "[0.9,0]", "top_k": 5, "max_new_tokens": 21}.get(key)
    option = key
    if key in ("target", "weights"):
        option, value = "target", shutil.copytree(tiny_target, tmp_path / "other")
        if key == "target":
            config = json.loads((value / "config.json").read_text())
            (value / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
        else:
            target = json.loads(straight["distill.json"])["target"] | {"path": "other"}
            values = json.loads(straight["distill.json"]) | {"target": target}
            (tmp_path / "set" / "distill.json").write_text(json.dumps(values))
            raw = bytearray((value / "model.safetensors").read_bytes())
            raw[-3] ^= 1
            (value / "model.safetensors").write_bytes(raw)
    elif key == "prompts":
        value = tmp_path / "prompts.jsonl"
        value.write_text(prompts.read_text() + json.dumps({"text": "one more"}) + "\n")
    before = files_of(tmp_path / "set")
    assert command(tmp_path / "set", **{option: value}) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "trainkit: error" in line]) == 1 and f"started with {key} " in lines[-1], lines
    assert files_of(tmp_path / "set") == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("n", 0),
        ("limit", -1),
        ("part_rows", 0),
        ("temperatures", "[-1]"),
        ("temperatures", "[0,0]"),
        ("temperatures", "[0,1e-39]"),
        ("temperatures", "[]"),
        ("batch", 0),
        ("concurrency", 0),
        ("depth", 2),
    ],
)
def test_bad_setting_gives_one_line_and_no_set(option, value, command, tmp_path, capsys):
    """A folder started with it could never be continued."""
    more = {"base_url": "http://127.0.0.1:1/v1"} if option == "depth" else {}
    assert command(tmp_path / "set", **{option: value}, **more) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and option.rstrip("s") in message.replace("max_batch", "batch")
    assert not (tmp_path / "set").exists()


def test_too_long_prompt_is_named(command, tmp_path, capsys):
    """A prompt longer than the target's positions is named in the error."""
    (tmp_path / "long.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "x" * 600}) + "\n")
    assert command(tmp_path / "set", prompts=tmp_path / "long.jsonl") == 2
    assert "prompt 1 has 600 tokens, but the target covers 512" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_texts_cut_by_max_len_are_counted(command, tmp_path, capsys):
    """`--max_len` ends texts before `max_new_tokens`; their rows say so, and the summary counts them."""
    assert command(tmp_path / "set", max_len=30, temperatures="[0]") == 0
    rows = rows_of(files_of(tmp_path / "set"))
    cut = sum(row["finish"] == "max_len" for row in rows)
    assert 0 < cut < len(rows) and f"{cut} cut by max_len" in capsys.readouterr().out
    assert all(len(row["input_ids"]) == 30 for row in rows if row["finish"] == "max_len")
    assert command(tmp_path / "set", max_len=31, temperatures="[0]") == 2
    assert "started with max_len 30" in capsys.readouterr().err
    assert command(tmp_path / "other", max_len=17) == 2
    assert "--max_len is 17" in capsys.readouterr().err


def test_dashes_and_underscores_are_accepted():
    """Options can be written with dashes or with underscores."""
    needed = ["--target", "t", "--prompts", "p", "--out", "o"]
    for dash in "-_":
        given = [f"--max{dash}new{dash}tokens", "7", f"--base{dash}url=http://a-b/v1", f"--part{dash}rows=5"]
        values = parse("distill", distill, needed + given)
        assert (values["max_new_tokens"], values["base_url"], values["part_rows"]) == (7, "http://a-b/v1", 5)


@pytest.fixture
def served_target(tiny_target: Path, tmp_path: Path) -> Path:
    """A folder with the config and the fake server's tokenizer, and no weights."""
    folder = shutil.copytree(TOKENIZER, tmp_path / "served")
    config = json.loads((tiny_target / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1024}))
    return folder


def check_served(out: Path, limit: int) -> None:
    rows = rows_of(files_of(out))
    assert [row["id"] for row in rows] == list(range(2 * limit))
    for row in rows:
        given = row["loss_mask"].index(1)
        prompt, answer = row["input_ids"][:given], row["input_ids"][given:]
        _, ids, finish = fake_server.reply(
            prompt, seed=request_seed(1, row["id"]), temperature=row["temperature"], max_tokens=20
        )
        assert answer == ids and row["finish"] == {"stop": "end", "length": "length"}[finish] and all(row["loss_mask"][given:])


def test_faulty_server_gives_every_row_after_a_kill(command, served_target, tmp_path, seed):
    """With a faulty server and a kill in between, every row is written."""
    faults = {
        "drop": 0.15,
        "cut": 0.1,
        "garbage": 0.1,
        "statuses": {"503": 0.1, "429": 0.1},
        "max_faults": 2,
        "delay": 0.03,
        "seed": seed,
    }
    with fake_server.serve(**faults, headers={"Retry-After": "0"}) as server:
        options = {"target": served_target, "base_url": server.base_url, "concurrency": 3}
        pid = fork(lambda: command(tmp_path / "set", **options))
        wait_until(lambda: rows_in(tmp_path / "set") >= 4, pid)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        there = rows_in(tmp_path / "set")
        assert 4 <= there < 16
        assert command(tmp_path / "set", **options) == 0
        stats = server.stats
    assert stats.faults.total() > 0 and stats.peak <= 6  # of two processes together
    check_served(tmp_path / "set", 8)
    provenance = json.loads((tmp_path / "set" / "distill.json").read_text())
    assert provenance["server"] == {"model": "tiny", "base_url": server.base_url} and "weights" not in provenance


def test_failed_server_gives_one_line_and_keeps_rows(command, served_target, tmp_path, capsys):
    """The server answers 5 rows, and then always 400."""
    with fake_server.serve(always="400", after=5) as server:
        options = {"target": served_target, "base_url": server.base_url, "concurrency": 1}
        assert command(tmp_path / "set", **options) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "status 400" in line and rows_in(tmp_path / "set") >= 4


def test_padded_vocabulary_works_in_every_command(tmp_path, capsys, seed):
    """Ids beyond the tokenizer's, which a model with a padded vocabulary samples, are read by every command."""
    target = make_target(tmp_path / "target", num_hidden_layers=2, vocab_size=384, seed=seed)
    make_tokenizer(300).save_pretrained(target)
    draft, rows, data = tmp_path / "draft", tmp_path / "rows.jsonl", str(tmp_path / "set")
    network = LMDraft(target_shape(target), num_layers=1)
    network.initialise(FrozenTarget(target))
    export_drafter(network, draft, tokenizer=str(target))
    rows.write_text("".join(json.dumps({"prompt": f"How many, {n}?"}) + "\n" for n in range(6)))
    common = ["--target", str(target)]
    flags = ["--prompts", str(rows), "--out", data, "--temperatures=[1]", "--n=2", "--max_new_tokens=20"]
    assert main(["distill", *common, *flags]) == 0
    ids = [token for row in rows_of(files_of(Path(data))) for token in row["input_ids"]]
    assert max(ids) >= 300
    assert main(["features", *common, "--data", data, "--out", str(tmp_path / "features"), "--length=64"]) == 0
    assert main(["alpha", *common, "--data", data, "--drafter", str(draft), "--length=64", "--prompts", data]) == 0
    acceptance = [str(draft), "--prompts", data, "--out", str(tmp_path / "acceptance"), "--max_new_tokens=4"]
    assert main(["acceptance", *common, *acceptance]) == 0
    assert main(["vocab", str(tmp_path / "ids.json"), *common, "--text", data, "--keep=0.5"]) == 0
    assert main(["trim", str(draft), str(tmp_path / "trimmed"), *common, "--text", data, "--keep=0.5"]) == 0
    training.fit(training.draft_module(target), training.text_data(Path(data), tmp_path, length=64), tmp_path, steps=1)
    # An id that the model does not have is a bad row in each of them.
    rows.write_text(json.dumps({"input_ids": [1, 384, 5], "loss_mask": [0, 0, 1]}) + "\n")
    capsys.readouterr()
    for arguments in (
        ["distill", *common, "--prompts", str(rows), "--out", str(tmp_path / "x")],
        ["features", *common, "--data", str(rows), "--out", str(tmp_path / "x")],
        ["alpha", *common, "--data", str(rows), "--drafter", str(draft)],
        ["acceptance", str(draft), *common, "--prompts", str(rows), "--out", str(tmp_path / "x")],
        ["vocab", str(tmp_path / "x"), *common, "--text", str(rows)],
        ["trim", str(draft), str(tmp_path / "x"), *common, "--text", str(rows)],
    ):
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{rows}:1: token id 384 is outside the vocabulary of 384" in line, arguments
    assert not (tmp_path / "x").exists()


def test_tools_of_a_prompt_are_in_its_distilled_row(tmp_path, seed):
    """Tools are rendered into the prompt, and the row has them for other programs; its columns are no unread ones."""
    target = make_target(tmp_path / "target", num_hidden_layers=1, seed=seed)
    template = target / "chat_template.jinja"
    template.write_text("{%- if tools %}{{ tools[0]['function']['name'] }}{%- endif %}" + template.read_text())
    rows, tools = tmp_path / "rows.jsonl", [{"type": "function", "function": {"name": "add"}}]
    rows.write_text("".join(json.dumps({"prompt": "2 + 2?"} | more) + "\n" for more in ({"tools": tools}, {})))
    out = tmp_path / "set"
    flags = [f"--target={target}", f"--prompts={rows}", f"--out={out}", "--temperatures=[0]", "--max_new_tokens=3"]
    assert main(["distill", *flags]) == 0
    first, second = rows_of(files_of(out))
    decode = read_tokenizer(target).decode
    assert decode(first["input_ids"]).startswith("add<|user|>2 + 2?") and first["tools"] == tools
    assert decode(second["input_ids"]).startswith("<|user|>2 + 2?") and "tools" not in second
    assert "columns not read" not in str(prepare([str(out)], None, str(target), 64, validation_share=0).report)
