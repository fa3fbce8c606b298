"""Training losses: divergences between draft and target. Knows tensors only."""
