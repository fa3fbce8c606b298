"""Distillation sets: no kill, tear, rank or order of answers changes what is in them, and none is mistaken for another."""

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
from trainkit.data.answer import Answer
from trainkit.data.manifest import part_name, read_provenance, set_files
from trainkit.data.sets import distilled as distill
from trainkit.data.sets.distilled import Answerer, Item, Layout, Made, write_set
from trainkit.data.text.chat_template import vocabulary_hash
from trainkit.data.text.prepare import prepare
from trainkit.data.text.prompts import Asked, read_asked
from trainkit.data.text.sources import read_rows
from trainkit.errors import UserError

LAYOUT = Layout(prompts=7, temperatures=(0.0, 0.7), samples=2, part_rows=3)
SETTINGS: dict[str, Any] = {"seed": 4, "max_new_tokens": 9, "prompts": {"sha256": "ab"}, "target": {"config": "cd"}}


def asked(count: int = 7) -> list[Asked]:
    """Chats, raw texts and given tokens in turn."""
    kinds = (
        lambda n: Asked([3, n], [{"role": "user", "content": f"frage {n} \u2028 ü"}]),
        lambda n: Asked([4, n, n], None, f"text {n}"),
        lambda n: Asked([n + 1]),
    )
    return [kinds[n % 3](n) for n in range(count)]


def answer_of(item: Item, temperature: float) -> Answer:
    draw = random.Random(repr((item, temperature)))
    tokens = [draw.randrange(300) for _ in range(draw.randint(1, 9))]
    return Answer(item[0], tokens, " ".join(map(str, tokens)) + " \n", draw.choice(("end", "length")))


def answering(seconds: float = 0.0, most: float = float("inf"), log: list[int] | None = None) -> Answerer:
    """Answers in an order drawn afresh, `seconds` each; breaks off after `most`."""
    given = [0]

    def answer(items: Sequence[Item], temperature: float) -> Iterator[Answer]:
        for item in random.sample(list(items), len(items)):
            if given[0] >= most:
                raise ConnectionError("enough")
            given[0] += 1
            time.sleep(seconds)
            if log is not None:
                log.append(item[0])
            yield answer_of(item, temperature)

    return answer


def write(out: Path, answer: Answerer | None = None, layout: Layout = LAYOUT, **more: Any) -> Made:
    options = {"progress": False} | {key: more.pop(key) for key in ("rank", "world_size") if key in more}
    return write_set(out, layout, asked(layout.prompts), answer or answering(), SETTINGS | more, **options)


def begin(out: Path, most: int, layout: Layout = LAYOUT, **more: Any) -> None:
    with pytest.raises(ConnectionError):
        write(out, answering(most=most), layout, **more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a set that was made at one go."""
    out = tmp_path_factory.mktemp("straight")
    made = write(out)
    assert (made.rows, made.found) == (LAYOUT.rows, 0) and made.tokens > 0
    return files_of(out)


@given(st.integers(1, 9), st.lists(st.floats(0, 2), min_size=1, max_size=4, unique=True), st.integers(1, 3), st.integers(1, 20))
def test_parts_hold_every_prompt_temperature_and_sample_once(prompts, temperatures, samples, part_rows):
    layout = Layout(prompts, tuple(temperatures), samples, part_rows)
    numbers = [number for part in range(layout.parts) for number in layout.numbers(part)]
    assert numbers == list(range(layout.rows)) and all(len(layout.numbers(part)) for part in range(layout.parts))
    seen = [(*layout.item(number)[0][1:], layout.item(number)[1]) for number in numbers]
    assert len(set(seen)) == prompts * len(temperatures) * samples
    for temperature in temperatures:
        assert sum(t == temperature for _, _, t in seen) == prompts * samples
    draws = {(prompt, which) for prompt, which, _ in seen}
    assert len(draws) == layout.rows, "no two rows share their draws"


def test_killed_three_times_it_gives_the_same_bytes(tmp_path, straight, seed):
    """SIGKILL at moments drawn afresh; what was on disk is found again, and asked for no second time."""
    draw = random.Random(seed)
    for _ in range(3):
        pid = fork(lambda: write(tmp_path, answering(0.003)))
        wanted = min(LAYOUT.rows - 1, rows_in(tmp_path) + draw.randint(1, 9))
        wait_until(lambda wanted=wanted: rows_in(tmp_path) >= wanted, pid)
        time.sleep(draw.uniform(0, 0.004))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    there, log = rows_in(tmp_path), []
    made = write(tmp_path, answering(log=log))
    assert made.found == there and made.rows == len(log) == len(set(log)) == LAYOUT.rows - there
    assert files_of(tmp_path) == straight


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_a_part_gets_its_name(call, when, tmp_path, straight, seed):
    """Death on either side of sync, rename and removal of the partial, at a part drawn afresh."""
    at = random.Random(seed).randint(1, LAYOUT.parts)
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
    assert not all((tmp_path / part_name(part)).exists() for part in range(LAYOUT.parts)) or at == LAYOUT.parts
    write(tmp_path)
    assert files_of(tmp_path) == straight


@settings(max_examples=40, deadline=None)
@given(
    most=st.integers(1, 11),
    share=st.floats(0, 1, exclude_max=True),
    torn=st.sampled_from([b"", b'{"id": 1', b"\x00\xff", b"["]),
)
def test_a_torn_last_line_is_made_again(most, share, torn):
    """Cut anywhere, with or without half a row behind: only what was torn is asked for again."""
    layout = Layout(prompts=3, temperatures=(0.0, 1.0), samples=2, part_rows=12)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        write(Path(one), layout=layout)
        begin(Path(other), most, layout)
        partial = Path(other) / "part-00000.partial"
        rows = partial.read_bytes()
        assert rows.count(b"\n") == most
        kept = rows[: int(share * len(rows))]
        kept = kept if not torn or kept.endswith(b"\n") or not kept else kept + b" "  # torn bytes of its own or of another row
        partial.write_bytes(kept + torn)
        made = write(Path(other), layout=layout)
        assert made.found == kept.count(b"\n") and made.rows == layout.rows - made.found
        assert files_of(Path(other)) == files_of(Path(one))


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_ranks_together_make_the_set_of_one(world_size, tmp_path, straight):
    """At once, each in its process; more ranks than parts does no harm."""
    ranks = [fork(lambda rank=rank: write(tmp_path, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [ended(pid) for pid in ranks] == [0] * world_size
    assert files_of(tmp_path) == straight


def test_any_number_of_ranks_goes_on(tmp_path, straight):
    begin(tmp_path, 8, rank=0, world_size=2)
    assert not set_files_there(tmp_path)
    begin(tmp_path, 2, rank=2, world_size=3)
    before = rows_in(tmp_path)
    made = [write(tmp_path, rank=rank, world_size=2) for rank in (1, 0)]
    assert sum(one.found for one in made) == before and sum(one.rows for one in made) == LAYOUT.rows - before
    assert files_of(tmp_path) == straight
    assert write(tmp_path).found == LAYOUT.rows


def set_files_there(folder: Path) -> bool:
    try:
        return bool(set_files(folder))
    except UserError as error:
        assert "run the same trainkit distill again" in str(error) and "\n" not in str(error)
        return False


def test_a_rank_that_begins_between_our_two_looks_is_no_stranger(tmp_path, straight, monkeypatch):
    """The other rank writes distill.json and a partial just when we have found no distill.json."""
    real, once = distill.read_provenance, [True]

    def read(folder: Path) -> Any:
        found = real(folder)
        if once and once.pop():
            begin(folder, 1, rank=1, world_size=2)
        return found

    monkeypatch.setattr(distill, "read_provenance", read)
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
        ("temperatures", Layout(7, (0.0, 0.7, 1.0), 2, 3), {}),
        ("samples", Layout(7, (0.0, 0.7), 3, 3), {}),
        ("part_rows", Layout(7, (0.0, 0.7), 2, 4), {}),
        ("rows", Layout(6, (0.0, 0.7), 2, 3), {}),
        ("weights", LAYOUT, {"weights": "of another"}),
    ],
)
def test_another_setting_is_named_and_nothing_changes(key, layout, more, tmp_path):
    begin(tmp_path, 5)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=rf"begun with {key} \S") as caught:
        write(tmp_path, layout=layout, **more)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))
    assert files_of(tmp_path) == before


def test_a_key_left_out_is_another_setting_but_versions_are_not(tmp_path, straight):
    begin(tmp_path, 5, versions={"trainkit": "0"})
    without = {key: value for key, value in SETTINGS.items() if key != "seed"}
    with pytest.raises(UserError, match="seed 4, now it is null"):
        write_set(tmp_path, LAYOUT, asked(), answering(), without, progress=False)
    write(tmp_path, versions={"trainkit": "1"})
    assert {k: v for k, v in files_of(tmp_path).items() if "part" in k} == {k: v for k, v in straight.items() if "part" in k}


def test_other_things_are_left_alone(tmp_path):
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


def test_two_processes_at_once_the_second_is_refused(tmp_path, straight):
    count, checked = itertools.count(), tmp_path.with_name("checked")

    def waiting(items: Sequence[Item], temperature: float) -> Iterator[Answer]:
        for answer in answering()(items, temperature):
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
    ("line", "said"),
    [
        (b"nonsense\n", "broken at byte"),
        (b'{"no": 1}\n', "broken"),
        (b'{"id": null}\n', "broken"),
        (b"7\n", "broken"),
        (b'{"id": 3}\n', "row 3"),
        (b'{"id": -1}\n', "row -1"),
        (None, "twice"),
    ],
)
def test_a_broken_partial_is_named_and_its_lock_given_back(line, said, tmp_path, straight):
    begin(tmp_path, 2, Layout(7, (0.0, 0.7), 2, 3))
    partial = tmp_path / "part-00000.partial"
    rows = next(path for path in sorted(tmp_path.glob("*.partial")) if path.stat().st_size).read_bytes().splitlines(True)
    partial.write_bytes(rows[0] if line is None else b"")
    with partial.open("ab") as stream:
        stream.write(rows[0] if line is None else line)
    if line is None and json.loads(rows[0])["id"] > 2:
        said = "of another part"
    before = partial.read_bytes()
    with pytest.raises(UserError, match=said) as caught:
        write(tmp_path)
    assert str(partial) in str(caught.value) and "\n" not in str(caught.value) and partial.read_bytes() == before
    with partial.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    partial.unlink()
    write(tmp_path)
    assert files_of(tmp_path) == straight


def test_a_prompt_without_an_answer_is_said_and_asked_again(tmp_path, straight):
    def forgetful(items: Sequence[Item], temperature: float) -> Iterator[Answer]:
        return (answer_of(item, temperature) for item in items if item[0] != 4)

    with pytest.raises(UserError, match=r"part-00001.partial: some prompts got no answer"):
        write(tmp_path, forgetful)
    assert not (tmp_path / part_name(1)).exists()
    write(tmp_path)
    assert files_of(tmp_path) == straight


def test_rows_by_kind_of_prompt(tmp_path):
    """The mask counts exactly the answer; readable columns only where the prompt was readable."""
    write(tmp_path)
    prompts, columns = asked(), []
    for number, (_, row) in enumerate(read_rows(str(tmp_path))):
        assert isinstance(row, dict)
        item, temperature = LAYOUT.item(number)
        given, prompt = answer_of(item, temperature), prompts[item[1]]
        assert row["id"] == number and row["temperature"] == temperature and row["finish"] == given.finish
        assert row["input_ids"] == prompt.tokens + given.tokens
        assert row["loss_mask"] == [0] * len(prompt.tokens) + [1] * len(given.tokens)
        if prompt.messages is not None:
            assert row["messages"] == [*prompt.messages, {"role": "assistant", "content": given.text}]
        elif prompt.text:
            assert (row["prompt"], row["response"]) == (prompt.text, given.text)
        columns.append(tuple(row))
    always = ("input_ids", "loss_mask")
    first = ("id", "temperature", "finish")
    assert set(columns) == {(*first, "messages", *always), (*first, "prompt", "response", *always), (*first, *always)}
    assert number + 1 == LAYOUT.rows  # pyright: ignore[reportPossiblyUnboundVariable]


def made_with(tokenizer: Any, rows_file: Callable[..., str], out: Path, most: float = float("inf")) -> list[Asked]:
    """A set whose prompts are a chat, a raw text and given tokens, as the command makes it."""
    given = {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}
    prompts = read_asked(rows_file({"prompt": "Wie viele?"}, {"text": "Once"}, given), tokenizer)
    provenance = {"vocabulary": vocabulary_hash(tokenizer)}
    write_set(out, Layout(3, (0.0, 1.0), 2, 5), prompts, answering(most=most), provenance, progress=False)
    return prompts


def test_what_training_packs_is_what_was_sampled(tokenizer, rows_file, tmp_path):
    """Ids and mask come back exactly, though the chat template would write another mask for `messages`."""
    prompts = made_with(tokenizer, rows_file, tmp_path / "set")
    packed = prepare([str(tmp_path / "set")], None, tokenizer, 64, validation_share=0.0).train
    layout, expected = Layout(3, (0.0, 1.0), 2, 5), []
    for number in range(layout.rows):
        item, temperature = layout.item(number)
        tokens = answer_of(item, temperature).tokens
        before = prompts[item[1]].tokens
        expected.append(([*before, *tokens], [False] * len(before) + [True] * len(tokens)))
    bounds = packed.documents_D.tolist()
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    found = [(packed.tokens_N[span].tolist(), packed.mask_N[span].tolist()) for span in spans]
    assert sorted(found) == sorted(expected)
    assert [asked.tokens for asked in read_asked(str(tmp_path / "set"), tokenizer)][::4] == [asked.tokens for asked in prompts]


def test_an_unfinished_set_or_another_tokenizers_is_refused(tokenizer, rows_file, tmp_path):
    with pytest.raises(ConnectionError):
        made_with(tokenizer, rows_file, tmp_path / "set", most=7)
    with pytest.raises(UserError, match="of 3 parts are not done") as caught:
        prepare([str(tmp_path / "set")], None, tokenizer, 64)
    assert "\n" not in str(caught.value)
    made_with(tokenizer, rows_file, tmp_path / "set")
    with pytest.raises(UserError, match="another tokenizer") as caught:
        prepare([str(tmp_path / "set")], None, make_tokenizer(300), 64)
    assert "\n" not in str(caught.value) and str(tmp_path / "set") in str(caught.value)
    said = read_provenance(tmp_path / "set")
    assert said is not None and said["parts"] == 3 and read_provenance(tmp_path) is None
    (tmp_path / "set" / part_name(2)).unlink()
    with pytest.raises(UserError, match="1 of 3 parts"):
        list(read_rows(str(tmp_path / "set"), limit=1))
