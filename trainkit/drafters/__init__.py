"""Drafters, one folder a kind; kinds are blind to one another."""
