"""`trainkit bench`: methods, timing, metrics and tables."""
