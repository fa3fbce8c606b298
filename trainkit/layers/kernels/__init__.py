"""Triton kernels of the runner, one file each, with an eager twin of the same signature beside every kernel.

Only a decoder on a CUDA device imports these files, and only they import triton: without a GPU the package is not needed.
"""
