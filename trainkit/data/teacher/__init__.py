"""Where teacher hidden states come from: the running target, or features stored on disk."""
