"""Decoding: plain and speculative rounds over a static cache, lossless by construction and by test."""

from trainkit.runner.engine import Output, Runner
from trainkit.runner.stats import Stats
from trainkit.runner.trees.dynamic import DynamicTree

__all__ = ["DynamicTree", "Output", "Runner", "Stats"]
