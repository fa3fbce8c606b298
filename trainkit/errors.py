"""The exception for a user's mistake, remedies for errors of the system, and notes on what works but deserves attention."""

import errno
import sys
from functools import cache

REMEDIES = {
    errno.ENOENT: "give a path that exists",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "give a path of folders",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "fix the links",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions or choose another folder"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space or choose another disk"),
}
"""Errors of the system that a user can fix, and how."""


@cache
def note(line: str) -> None:
    """Prints a line for the user on stderr, only once in a process."""
    print(f"note: {line}", file=sys.stderr)


class UserError(ValueError):
    """A mistake in input, configuration or files. Its message is one line: the file, key or value, and the remedy.

    The command line prints only that line and exits with code 2; in Python it is an ordinary ValueError.
    """


def first_lines(error: Exception, count: int = 2) -> str:
    """The first `count` lines of an error message joined to one, or the error's class name if it has no message."""
    return " ".join(" ".join(str(error).strip().splitlines()[:count]).split()) or type(error).__name__


def lone_surrogate(error: UnicodeEncodeError) -> str:
    """Why a text is not valid Unicode, for a message; such a text comes from JSON, or from a command line that is not UTF-8."""
    return f"has a lone surrogate, {error.object[error.start]!a}, which is not a character"


def check_unicode(name: str, text: str) -> str:
    """The text; raises UserError if it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: {lone_surrogate(error)}; give text in UTF-8") from None
    return text
