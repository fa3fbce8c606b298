"""Runs Python code that a model wrote, and its tests, in processes that restrict themselves first."""
