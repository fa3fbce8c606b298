"""Train what makes language models decode faster, and prove it."""

__version__ = "0.2.0"
