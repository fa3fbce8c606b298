"""Triton kernels of the runner on a GPU, one file each, with an eager function that computes the same."""
