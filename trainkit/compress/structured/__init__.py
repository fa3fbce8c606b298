"""Smaller models: heads, neurons, channels or whole blocks are removed."""
