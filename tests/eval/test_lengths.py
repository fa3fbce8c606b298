"""Prompts that do not fit are refused, or left out with a note."""

import pytest

from trainkit.errors import UserError
from trainkit.eval.lengths import prompts_that_fit

PROMPTS = [[1] * length for length in (30, 500, 60)]


def test_prompts_beyond_max_len_are_left_out_and_counted(tiny_target):
    """Prompts whose text would pass `max_len` are left out, and the note counts them."""
    kept, longest, note = prompts_that_fit(PROMPTS, 10, 70, tiny_target, "rows")
    assert (kept, longest) == ([PROMPTS[0], PROMPTS[2]], 70) and "1 of 3 prompts left out" in note
    assert prompts_that_fit(PROMPTS, 12, None, tiny_target, "rows") == (PROMPTS, 512, "")


@pytest.mark.parametrize(
    ("new", "max_len", "said"),
    [(13, None, "rows: the longest prompt and 13 new tokens need 513"), (10, 39, "no prompt"), (10, 513, "covers 512")],
)
def test_prompts_that_cannot_fit_are_refused(tiny_target, new, max_len, said):
    """A length that the target or no prompt can have is refused in one line."""
    with pytest.raises(UserError, match=said):
        prompts_that_fit(PROMPTS, new, max_len, tiny_target, "rows")
