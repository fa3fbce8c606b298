"""Drafters, one folder per kind; no kind imports another."""
