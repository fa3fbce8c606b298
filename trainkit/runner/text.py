"""Incremental detokenisation: the text of tokens as they arrive, and where a stop string begins in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> text of every token that `skip_special_tokens` leaves out."""
    ids = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    skipped = (id for id in sorted(ids) if not tokenizer.decode([id], skip_special_tokens=True))
    return {id: text for id in skipped if (text := tokenizer.decode([id]))}


class IncrementalText:
    """The text of the new tokens of one request; each token is decoded a few times, never the whole text.

    A character of several tokens is added once it is complete. Stop strings are searched in the text with special tokens, as
    the model wrote it, and in the text without them, as it is shown. The prompt is not searched.

    Args:
        decode: Turns token ids into text, without special tokens.
        special: Id -> text of the special tokens.
        stop: Strings that end the text.

    Attributes:
        shown: The text so far, without special tokens.
    """

    def __init__(self, decode: Decode, special: dict[int, str], stop: Sequence[str] = ()) -> None:
        self.decode, self.special, self.stop, self.shown = decode, special, stop, ""
        self._written = ""  # with special tokens
        self._hidden: list[tuple[int, int]] = []  # (start, length) of each special token in `_written`
        self._tokens: list[int] = []  # the last ordinary tokens: `_before` tokens as context, then those of an open character
        self._before = 0
        self._known = 0  # number of characters of `_tokens` that are in `shown`

    @property
    def safe_length(self) -> int:
        """Number of characters of `shown` in which no stop string can begin any more, so that a stream may show them."""
        return max(0, len(self.shown) - max((len(text) - 1 for text in self.stop), default=0))

    def add(self, token: int) -> int | None:
        """Adds a token; returns the number of characters of `shown` before a stop string that ends with it, if one does."""
        if token in self.special:
            piece, shown = self.special[token], ""
            self._hidden.append((len(self._written), len(piece)))
        else:
            piece = shown = self._piece(token)
        self._written += piece
        self.shown += shown
        if not piece or not self.stop:
            return None
        # A stop string that ends in the new piece begins at most its own length before it.
        found = []
        for text in self.stop:
            start = self._written.find(text, max(0, len(self._written) - len(piece) - len(text) + 1))
            found += [self._shown_before(start)] if start >= 0 else []
            start = self.shown.find(text, max(0, len(self.shown) - len(shown) - len(text) + 1)) if shown else -1
            found += [start] if start >= 0 else []
        return min(found, default=None)

    def _piece(self, token: int) -> str:
        """The text that an ordinary token adds; decoded with the tokens before it, because decoders drop a leading space."""
        self._tokens.append(token)
        whole = self.decode(self._tokens)
        text = whole.rstrip("\ufffd")  # U+FFFD at the end may be a part of a character
        piece, self._known = text[self._known :], max(self._known, len(text))
        if piece and text == whole:
            del self._tokens[: self._before]
            self._before, self._known = len(self._tokens), len(self.decode(self._tokens))
        return piece

    def _shown_before(self, position: int) -> int:
        """Number of shown characters before a position in `_written`."""
        return position - sum(min(length, position - start) for start, length in self._hidden if start < position)
