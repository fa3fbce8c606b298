"""Frozen targets and Hugging Face weights."""
