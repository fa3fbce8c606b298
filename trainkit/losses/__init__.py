"""Training losses: divergences between draft and target. Uses tensors only."""
