"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in input, configuration or files. Its message is one line naming the file, key or value, and the mend.

    The command line prints that line alone and exits with 2; from Python it is an ordinary ValueError.
    """
