"""Growing text equals the text of all tokens decoded at once, and stop strings are found wherever they lie."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.support.models import pair
from tests.support.targets import make_tokenizer
from trainkit.runner import Runner
from trainkit.runner.request import Request
from trainkit.runner.text import IncrementalText, special_tokens

END = "<|end|>"


def spaced_tokenizer():
    """Words that carry the space before them, which a text drops at its start, and bytes that spell other characters."""
    words = ["\u2581a", "\u2581bc", "d", "\u2581", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", clean_up_tokenization_spaces=False)


def growing(tokenizer, stop=()):
    return IncrementalText(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), special_tokens(tokenizer), stop)


def grown(tokenizer, tokens, stop=()):
    """The text before the first stop string, or all of it, and the number of tokens read."""
    text = growing(tokenizer, stop)
    for count, token in enumerate(tokens, start=1):
        if (at := text.add(token)) is not None:
            return text.shown[:at], count
    return text.shown, len(tokens)


@pytest.mark.parametrize("make", [make_tokenizer, spaced_tokenizer])
def test_growing_text_equals_text_decoded_at_once(make, seed):
    """After each token the text is that of all tokens, except for characters that are not complete."""
    tokenizer = make()
    for _ in range(30):
        written = [tokenizer.encode(text, add_special_tokens=False) for text in ("a bc", "é漢", "🙂", " d", "x y", "")]
        special = [[id] for id in special_tokens(tokenizer)]
        tokens = [id for ids in random.choices(written + special, k=12) for id in ids]
        text = growing(tokenizer)
        for count, token in enumerate(tokens, start=1):
            text.add(token)
            whole = tokenizer.decode(tokens[:count], skip_special_tokens=True)
            assert whole == text.shown or whole.endswith("\ufffd")
        assert text.shown == tokenizer.decode(tokens, skip_special_tokens=True)


def test_any_bytes_grow_to_the_text_decoded_at_once(seed):
    """Random tokens, most of which are no valid UTF-8, give the same text in pieces and at once."""
    tokenizer = make_tokenizer()
    for _ in range(20):
        tokens = random.choices(range(len(tokenizer)), k=40)
        assert grown(tokenizer, tokens)[0] == tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize(
    ("written", "stop", "shown"),
    [
        (f"one{END}two", END, "one"),
        (f"one{END}two", f"e{END}t", "on"),
        (f"one{END}{END}two", f"{END}{END}", "one"),
        (f"one{END}two", "onetwo", ""),  # as the text is shown
        (f"one{END}two", "|>tw", "one"),
        ("one two three", "e two t", "on"),
        ("é🙂漢", "🙂", "é"),
        (f"one{END}two", "never", "onetwo"),
        ("aaab", "aab", "a"),
    ],
)
def test_stop_string_is_found_in_text_and_special_tokens(written, stop, shown):
    """Stop strings match special tokens, parts of them, mixtures with text, and text over several tokens."""
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode(written, add_special_tokens=False)
    for stops in ((stop,), ("unseen before", stop, "x" * 40)):
        assert grown(tokenizer, tokens, stops)[0] == shown


def test_earliest_of_several_stop_strings_cuts(seed):
    """The stop string that ends first decides when, and the one that begins first decides where."""
    tokenizer = make_tokenizer()
    tokens = tokenizer.encode("abcdef", add_special_tokens=False)
    assert grown(tokenizer, tokens, ("cd", "abcd", "ef"))[0] == ""
    assert grown(tokenizer, tokens, ("def", "bc"))[0] == "a"


@pytest.fixture(scope="module")
def scripted(tiny_target):
    """A runner with the target's tokenizer, whose emitted tokens the tests replace."""
    runner = pair(Runner.load(tiny_target, max_len=32).shape.decoder, noise=None, ends=(), max_len=96)
    runner.folder = tiny_target
    return runner


def say(monkeypatch, runner, written):
    tokens = runner.tokenizer.encode(written, add_special_tokens=False)
    take = Request.take

    def forced(self, output, slot, end_ids, prefill=False):
        output.emitted_BP[slot, 0] = tokens[len(self.tokens) % len(tokens)]
        take(self, output, slot, end_ids, prefill)

    monkeypatch.setattr(Request, "take", forced)
    return len(tokens)


@pytest.mark.parametrize(
    ("written", "stop", "shown", "finish"),
    [
        (f"one{END}two", END, "one", "stop"),
        (f"one{END}two", f"e{END}tw", "on", "stop"),
        ("one two", "e t", "on", "stop"),
        ("one two", "wo?", "one two", "length"),
        (f"one é{END}", f"é{END}?", "one é", "length"),
    ],
)
def test_stream_and_generate_end_at_the_stop_string(scripted, monkeypatch, written, stop, shown, finish):
    """No part of a stop string is shown, in a stream as in a whole text."""
    count = say(monkeypatch, scripted, written)
    (out,) = scripted.generate([[1]], max_new_tokens=count, stop=stop)
    assert (out.text, out.finish) == (shown, finish)
    pieces = list(scripted.stream([1], max_new_tokens=count, stop=stop))
    assert "".join(pieces) == shown


def test_stop_string_at_an_end_token(scripted, monkeypatch, tiny_target):
    """An end token that is a stop string is the end; where the stop string begins before it, the text is cut there."""
    say(monkeypatch, scripted, f"one{END}")
    (end,) = scripted.tokenizer.encode(END, add_special_tokens=False)
    monkeypatch.setattr(scripted, "shape", type(scripted.shape)(scripted.shape.decoder, (end,)))
    for stop, shown, finish in ((END, "one", "end"), (f"e{END}", "on", "stop")):
        (out,) = scripted.generate([[1]], max_new_tokens=30, stop=stop)
        assert (out.text, out.finish, out.tokens[-1]) == (shown, finish, end)


def test_stop_string_that_begins_in_the_prompt_is_ignored(scripted, monkeypatch):
    """The prompt is no part of the text in which stop strings are sought."""
    count = say(monkeypatch, scripted, "def")
    (out,) = scripted.generate(["abc"], max_new_tokens=count, stop=("cd", "abcdef"))
    assert (out.text, out.finish) == ("def", "length")


def test_tokens_are_decoded_once(scripted, monkeypatch):
    """Seeking stop strings decodes a few tokens at a time, however long the text is."""
    say(monkeypatch, scripted, "one two ")
    lengths = []
    decode = Runner._decode
    monkeypatch.setattr(Runner, "_decode", lambda self, tokens: lengths.append(len(tokens)) or decode(self, tokens))
    list(scripted.stream([1], max_new_tokens=80, stop="never"))
    assert sorted(lengths)[-2] <= 4 and lengths[-1] == 80
