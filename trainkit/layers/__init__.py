"""Decoder modules that training and runner share."""
