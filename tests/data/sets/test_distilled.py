"""Distillation sets: no kill, torn line, rank or order of completions changes their bytes, and no set is taken for another."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.processes import ended, files_of, fork, rows_in, wait_until
from tests.support.targets import make_tokenizer
from trainkit.data.manifest import DISTILLED, SetKind, distilled_files
from trainkit.data.sets.distilled import Complete, DistilledLayout, PlannedRow, write_distilled
from trainkit.data.sets.writer import SetJob, SetStats
from trainkit.data.text.chat_template import Encoder, vocabulary_hash
from trainkit.data.text.prepare import prepare
from trainkit.data.text.prompts import Completion, Prompt, read_prompt_rows
from trainkit.data.text.sources import read_rows
from trainkit.errors import UserError

LAYOUT = DistilledLayout(prompts=7, temperatures=(0.0, 0.7), samples=2, part_rows=3)
SETTINGS: dict[str, Any] = {"seed": 4, "max_new_tokens": 9, "prompts": {"sha256": "ab"}, "target": {"config": "cd"}}


def make_prompts(count: int = 7) -> list[Prompt]:
    """Chats, raw texts and token rows in turn."""
    kinds = (
        lambda n: Prompt([3, n], [{"role": "user", "content": f"frage {n} \u2028 ü"}]),
        lambda n: Prompt([4, n, n], None, f"text {n}"),
        lambda n: Prompt([n + 1]),
    )
    return [kinds[n % 3](n) for n in range(count)]


def completion_of(row: PlannedRow) -> Completion:
    draw = random.Random(repr(row))
    tokens = [draw.randrange(300) for _ in range(draw.randint(1, 9))]
    return Completion(row.id, tokens, " ".join(map(str, tokens)) + " \n", draw.choice(("end", "length")))


def completing(seconds: float = 0.0, limit: float = float("inf"), log: list[int] | None = None) -> Complete:
    """Completes rows in random order, `seconds` for each; fails after `limit` rows."""
    count = [0]

    def complete(rows: Sequence[PlannedRow], temperature: float) -> Iterator[Completion]:
        for row in random.sample(list(rows), len(rows)):
            assert row.temperature == temperature
            if count[0] >= limit:
                raise ConnectionError("enough")
            count[0] += 1
            time.sleep(seconds)
            if log is not None:
                log.append(row.id)
            yield completion_of(row)

    return complete


def write(
    out: Path,
    complete: Complete | None = None,
    layout: DistilledLayout = LAYOUT,
    rank: int = 0,
    world_size: int = 1,
    **more: Any,
) -> SetStats:
    job = SetJob(out, SETTINGS | more, rank, world_size, progress=False)
    return write_distilled(job, layout, make_prompts(layout.prompts), complete or completing())


def begin(out: Path, limit: int, layout: DistilledLayout = LAYOUT, **more: Any) -> None:
    with pytest.raises(ConnectionError):
        write(out, completing(limit=limit), layout, **more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a set that was written without interruption."""
    out = tmp_path_factory.mktemp("straight")
    stats = write(out)
    assert (stats.written, stats.existing) == (LAYOUT.rows, 0) and stats.tokens > 0
    return files_of(out)


@given(st.integers(1, 9), st.lists(st.floats(0, 2), min_size=1, max_size=4, unique=True), st.integers(1, 3), st.integers(1, 20))
def test_parts_hold_every_row_exactly_once(prompts, temperatures, samples, part_rows):
    """The parts hold every combination of prompt, temperature and sample exactly once."""
    layout = DistilledLayout(prompts, tuple(temperatures), samples, part_rows)
    numbers = [number for ids in layout.parts().values() for number in ids]
    assert numbers == list(range(layout.rows)) and all(0 < len(ids) <= part_rows for ids in layout.parts().values())
    rows = [layout.row(number) for number in numbers]
    assert [row.id for row in rows] == numbers
    assert len({row[1:] for row in rows}) == prompts * len(temperatures) * samples
    for temperature in temperatures:
        assert sum(row.temperature == temperature for row in rows) == prompts * samples
    draws = {(row.prompt, row.sample) for row in rows}
    assert len(draws) == layout.rows, "no two rows share their draws"


def test_distilled_set_after_kills_is_identical(tmp_path, straight, seed):
    """SIGKILL at random moments; rows on disk are found again and not generated a second time."""
    draw = random.Random(seed)
    for _ in range(3):
        pid = fork(lambda: write(tmp_path, completing(0.003)))
        wanted = min(LAYOUT.rows - 1, rows_in(tmp_path) + draw.randint(1, 9))
        wait_until(lambda wanted=wanted: rows_in(tmp_path) >= wanted, pid)
        time.sleep(draw.uniform(0, 0.004))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    there, log = rows_in(tmp_path), []
    stats = write(tmp_path, completing(log=log))
    assert stats.existing == there and stats.written == len(log) == len(set(log)) == LAYOUT.rows - there
    assert files_of(tmp_path) == straight


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_during_part_rename_is_recovered(call, when, tmp_path, straight, seed):
    """Killed before or after sync, rename and removal of the partial file, at a random part."""
    at = random.Random(seed).randint(1, len(LAYOUT.parts()))
    module, name = (Path, "unlink") if call == "unlink" else (os, call)

    def die() -> None:
        real, calls = getattr(module, name), [0]

        def deadly(*args: Any, **options: Any) -> Any:
            calls[0] += call != "replace" or str(args[1]).endswith(".jsonl")
            if calls[0] < at:
                return real(*args, **options)
            if when == "after":
                real(*args, **options)
            os._exit(9)

        setattr(module, name, deadly)
        write(tmp_path)

    assert ended(fork(die)) == 9
    assert not all((tmp_path / name).exists() for name in LAYOUT.parts()) or at == len(LAYOUT.parts())
    write(tmp_path)
    assert files_of(tmp_path) == straight


@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(1, 11),
    share=st.floats(0, 1, exclude_max=True),
    torn=st.sampled_from([b"", b'{"id": 1', b"\x00\xff", b"["]),
)
def test_torn_last_line_is_written_again(limit, share, torn):
    """Cut anywhere, with or without half a row after the cut: only the torn rows are generated again."""
    layout = DistilledLayout(prompts=3, temperatures=(0.0, 1.0), samples=2, part_rows=12)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        write(Path(one), layout=layout)
        begin(Path(other), limit, layout)
        partial = Path(other) / "part-00000.partial"
        rows = partial.read_bytes()
        assert rows.count(b"\n") == limit
        kept = rows[: int(share * len(rows))]
        kept = kept if not torn or kept.endswith(b"\n") or not kept else kept + b" "  # torn bytes of its own or of another row
        partial.write_bytes(kept + torn)
        stats = write(Path(other), layout=layout)
        assert stats.existing == kept.count(b"\n") and stats.written == layout.rows - stats.existing
        assert files_of(Path(other)) == files_of(Path(one))


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_any_number_of_ranks_makes_the_same_set(world_size, tmp_path, straight):
    """At the same time, each in its own process; more ranks than parts are allowed."""
    ranks = [fork(lambda rank=rank: write(tmp_path, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [ended(pid) for pid in ranks] == [0] * world_size
    assert files_of(tmp_path) == straight


def test_another_number_of_ranks_can_resume(tmp_path, straight):
    """Another number of ranks can finish a set that was begun."""
    begin(tmp_path, 8, rank=0, world_size=2)
    assert not is_complete(tmp_path)
    begin(tmp_path, 2, rank=2, world_size=3)
    before = rows_in(tmp_path)
    stats = [write(tmp_path, rank=rank, world_size=2) for rank in (1, 0)]
    assert sum(one.existing for one in stats) == before and sum(one.written for one in stats) == LAYOUT.rows - before
    assert files_of(tmp_path) == straight
    assert write(tmp_path).existing == LAYOUT.rows


def is_complete(folder: Path) -> bool:
    try:
        return bool(distilled_files(folder))
    except UserError as error:
        assert "run the same trainkit distill again" in str(error) and "\n" not in str(error)
        return False


def test_rank_that_starts_at_the_same_time_is_accepted(tmp_path, straight, monkeypatch):
    """The other rank writes distill.json and a partial file just after this rank has found no distill.json."""
    real, once = SetKind.read, [True]

    def read(self: SetKind, folder: Path) -> Any:
        found = real(self, folder)
        if once and once.pop():
            begin(folder, 1, rank=1, world_size=2)
        return found

    monkeypatch.setattr(SetKind, "read", read)
    write(tmp_path, rank=0, world_size=2)
    write(tmp_path, rank=1, world_size=2)
    assert files_of(tmp_path) == straight


@pytest.mark.parametrize(
    ("key", "layout", "more"),
    [
        ("seed", LAYOUT, {"seed": 5}),
        ("target", LAYOUT, {"target": {"config": "dc"}}),
        ("prompts", LAYOUT, {"prompts": {"sha256": "ba" * 60}}),
        ("max_new_tokens", LAYOUT, {"max_new_tokens": 8}),
        ("temperatures", DistilledLayout(7, (0.0, 0.7, 1.0), 2, 3), {}),
        ("samples", DistilledLayout(7, (0.0, 0.7), 3, 3), {}),
        ("part_rows", DistilledLayout(7, (0.0, 0.7), 2, 4), {}),
        ("rows", DistilledLayout(6, (0.0, 0.7), 2, 3), {}),
        ("weights", LAYOUT, {"weights": "of another"}),
    ],
)
def test_resume_with_other_setting_is_refused(key, layout, more, tmp_path):
    """Resuming with another setting gives a one-line error that names it, and changes no file."""
    begin(tmp_path, 5)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=rf"started with {key} \S") as caught:
        write(tmp_path, layout=layout, **more)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))
    assert files_of(tmp_path) == before


def test_other_digest_is_named_in_words(tmp_path):
    """A target or file that changed is reported with short digests, and the message says that its content is another."""
    write(tmp_path, target={"config": "6f" * 32})
    with pytest.raises(UserError, match=r"target config 6f6f6f6f, but now it is 0a0a0a0a \(digests: its content is another\);"):
        write(tmp_path, target={"config": "0a" * 32})


def test_missing_setting_is_refused_versions_are_not(tmp_path, straight):
    """A missing setting is refused on resume; other versions are accepted."""
    begin(tmp_path, 5, versions={"trainkit": "0"})
    without = {key: value for key, value in SETTINGS.items() if key != "seed"}
    with pytest.raises(UserError, match="seed 4, but now it is null"):
        write_distilled(SetJob(tmp_path, without, progress=False), LAYOUT, make_prompts(), completing())
    write(tmp_path, versions={"trainkit": "1"})
    assert {k: v for k, v in files_of(tmp_path).items() if "part" in k} == {k: v for k, v in straight.items() if "part" in k}


def test_folder_with_other_files_is_refused(tmp_path):
    """A folder with unrelated files is refused and left as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="holds something else") as caught:
            write(out)
        assert str(out) in str(caught.value) and "\n" not in str(caught.value)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}
    for broken in ("{", "[]", '{"format": 2, "parts": 1}'):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "distill.json").write_text(broken)
        with pytest.raises(UserError, match="distill.json: not"):
            write(tmp_path / "set")


def test_second_writer_is_refused(tmp_path, straight):
    """A second process that writes the same set is refused."""
    count, checked = itertools.count(), tmp_path.with_name("checked")

    def waiting(rows: Sequence[PlannedRow], temperature: float) -> Iterator[Completion]:
        for answer in completing()(rows, temperature):
            if next(count) == 2:
                wait_until(checked.exists)
            yield answer

    pid = fork(lambda: write(tmp_path, waiting))
    wait_until(lambda: rows_in(tmp_path) > 1, pid)
    with pytest.raises(UserError, match="another process is writing") as caught:
        write(tmp_path)
    assert "part-00000.partial" in str(caught.value) and "\n" not in str(caught.value)
    checked.touch()
    assert ended(pid) == 0 and files_of(tmp_path) == straight


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", "damaged at byte"),
        (b'{"no": 1}\n', "damaged"),
        (b'{"id": null}\n', "damaged"),
        (b"7\n", "damaged"),
        (b'{"id": 3}\n', "row 3"),
        (b'{"id": -1}\n', "row -1"),
        (None, "there twice"),
    ],
)
def test_broken_partial_is_named_and_unlocked(line, message, tmp_path, straight):
    """A broken partial file is named in the error, left as it is, and unlocked."""
    begin(tmp_path, 2, DistilledLayout(7, (0.0, 0.7), 2, 3))
    partial = tmp_path / "part-00000.partial"
    rows = next(path for path in sorted(tmp_path.glob("*.partial")) if path.stat().st_size).read_bytes().splitlines(True)
    partial.write_bytes(rows[0] if line is None else b"")
    with partial.open("ab") as stream:
        stream.write(rows[0] if line is None else line)
    if line is None and json.loads(rows[0])["id"] > 2:
        message = "from another part"
    before = partial.read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path)
    assert str(partial) in str(caught.value) and "\n" not in str(caught.value) and partial.read_bytes() == before
    with partial.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    partial.unlink()
    write(tmp_path)
    assert files_of(tmp_path) == straight


def test_missing_answer_is_reported_and_retried(tmp_path, straight):
    """A prompt that got no answer is reported, and requested again in the next run."""

    def forgetful(rows: Sequence[PlannedRow], temperature: float) -> Iterator[Completion]:
        return (completion_of(row) for row in rows if row.id != 4)

    with pytest.raises(UserError, match=r"part-00001.partial: some prompts got no completion"):
        write(tmp_path, forgetful)
    assert not (tmp_path / DISTILLED.part_name(1)).exists()
    write(tmp_path)
    assert files_of(tmp_path) == straight


def test_rows_have_columns_of_their_prompt_kind(tmp_path):
    """The mask covers exactly the completion; readable columns exist only if the prompt was readable."""
    write(tmp_path)
    prompts, columns = make_prompts(), []
    for number, (_, row) in enumerate(read_rows(str(tmp_path))):
        assert isinstance(row, dict)
        planned = LAYOUT.row(number)
        completion, prompt = completion_of(planned), prompts[planned.prompt]
        assert row["id"] == number and row["temperature"] == planned.temperature and row["finish"] == completion.finish
        assert row["input_ids"] == prompt.tokens + completion.tokens
        assert row["loss_mask"] == [0] * len(prompt.tokens) + [1] * len(completion.tokens)
        if prompt.messages is not None:
            assert row["messages"] == [*prompt.messages, {"role": "assistant", "content": completion.text}]
        elif prompt.text:
            assert (row["prompt"], row["response"]) == (prompt.text, completion.text)
        columns.append(tuple(row))
    always = ("input_ids", "loss_mask")
    first = ("id", "temperature", "finish")
    assert set(columns) == {(*first, "messages", *always), (*first, "prompt", "response", *always), (*first, *always)}
    assert number + 1 == LAYOUT.rows  # pyright: ignore[reportPossiblyUnboundVariable]


def made_with(tokenizer: Any, rows_file: Callable[..., str], out: Path, limit: float = float("inf")) -> list[Prompt]:
    """Writes a set as the command does; its prompts are a chat, a raw text and a token row."""
    given = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}
    prompts = read_prompt_rows(rows_file({"prompt": "Wie viele?"}, {"text": "Once"}, given), Encoder(tokenizer))
    job = SetJob(out, {"vocabulary": vocabulary_hash(tokenizer)}, progress=False)
    write_distilled(job, DistilledLayout(3, (0.0, 1.0), 2, 5), prompts, completing(limit=limit))
    return prompts


def test_packed_tokens_equal_sampled_tokens(tokenizer, rows_file, tmp_path):
    """Ids and mask are exactly those sampled, although the chat template would give another mask for `messages`."""
    prompts = made_with(tokenizer, rows_file, tmp_path / "set")
    packed = prepare([str(tmp_path / "set")], None, tokenizer, 64, validation_share=0.0).train
    layout, expected = DistilledLayout(3, (0.0, 1.0), 2, 5), []
    for number in range(layout.rows):
        row = layout.row(number)
        tokens, before = completion_of(row).tokens, prompts[row.prompt].tokens
        expected.append(([*before, *tokens], [False] * len(before) + [True] * len(tokens)))
    bounds = packed.documents_D.tolist()
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    found = [(packed.tokens_N[span].tolist(), packed.mask_N[span].tolist()) for span in spans]
    assert sorted(found) == sorted(expected)
    assert [prompt.tokens for prompt in read_prompt_rows(str(tmp_path / "set"), Encoder(tokenizer))][::4] == [
        p.tokens for p in prompts
    ]


def test_unfinished_or_foreign_set_is_refused(tokenizer, rows_file, tmp_path):
    """An unfinished set, and a set of another tokenizer, are refused."""
    with pytest.raises(ConnectionError):
        made_with(tokenizer, rows_file, tmp_path / "set", limit=7)
    with pytest.raises(UserError, match="of 3 parts are missing") as caught:
        prepare([str(tmp_path / "set")], None, tokenizer, 64)
    assert "\n" not in str(caught.value)
    made_with(tokenizer, rows_file, tmp_path / "set")
    with pytest.raises(UserError, match="another tokenizer") as caught:
        prepare([str(tmp_path / "set")], None, make_tokenizer(300), 64)
    assert "\n" not in str(caught.value) and str(tmp_path / "set") in str(caught.value)
    manifest = DISTILLED.read(tmp_path / "set")
    assert manifest is not None and manifest["parts"] == 3 and DISTILLED.read(tmp_path) is None
    (tmp_path / "set" / DISTILLED.part_name(2)).unlink()
    with pytest.raises(UserError, match="1 of 3 parts"):
        list(read_rows(str(tmp_path / "set"), limit=1))
