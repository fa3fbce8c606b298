"""Decoder parts used in training and in the runner alike."""
