"""Helpers that tests share: tiny targets, planted faults, stand-in servers, processes."""
