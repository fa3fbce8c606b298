"""Rewards of responses: built-in functions, those of a user, and how they are called."""
