"""Decoding: plain and speculative rounds over a static cache, lossless by construction and by test."""

from trainkit.runner.engine import Output, Runner
from trainkit.runner.options import GenerateOptions
from trainkit.runner.session import Session
from trainkit.runner.stats import Stats
from trainkit.runner.trees.dynamic import DynamicTree

__all__ = ["DynamicTree", "GenerateOptions", "Output", "Runner", "Session", "Stats"]
