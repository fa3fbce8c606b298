"""Smaller variants of a model: pruned, N:M-sparse and quantised weights, removed heads, neurons and layers."""
