"""Drafter kinds that only tests know."""
