"""The exception for a user's mistake."""


class UserError(ValueError):
    """A mistake in input, configuration or files. Its message is one line: the file, key or value, and the remedy.

    The command line prints only that line and exits with code 2; in Python it is an ordinary ValueError.
    """
