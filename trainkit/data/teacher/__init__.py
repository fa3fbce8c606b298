"""Where training gets the teacher's hidden states: from a running target, or from a feature set on disk."""
