"""The text of tokens as they come, and where a stop string begins in it; the whole text is never decoded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> text of every token that `skip_special_tokens` leaves out."""
    ids = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    skipped = (id for id in sorted(ids) if not tokenizer.decode([id], skip_special_tokens=True))
    return {id: text for id in skipped if (text := tokenizer.decode([id]))}


class GrowingText:
    """The text of the new tokens of one request; a character of several tokens is added once it is complete.

    A stop string is found in the text with special tokens, as the model wrote it, and in the text without them, as it is shown.
    The prompt is no part of either.

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
        self._hidden: list[tuple[int, int]] = []  # start in `_written` and length of each special token
        self._tokens: list[int] = []  # the last ordinary tokens: some before and all after a character's end
        self._before = self._known = 0  # number of the tokens before it, and of characters of all that are in `shown`

    @property
    def certain(self) -> int:
        """Number of characters of `shown` that no stop string can still begin in."""
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
        """What an ordinary token adds; decoded with those before it, because at the start of a text spaces are dropped."""
        self._tokens.append(token)
        whole = self.decode(self._tokens)
        text = whole.rstrip("\ufffd")  # perhaps a part of a character
        piece, self._known = text[self._known :], max(self._known, len(text))
        if piece and text == whole:
            del self._tokens[: self._before]
            self._before, self._known = len(self._tokens), len(self.decode(self._tokens))
        return piece

    def _shown_before(self, position: int) -> int:
        """Number of shown characters before a position in `_written`."""
        return position - sum(min(length, position - start) for start, length in self._hidden if start < position)
