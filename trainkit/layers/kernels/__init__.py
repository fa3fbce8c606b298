"""Triton kernels for decoding on a GPU; nothing here is imported on other devices, so that trainkit runs without triton."""
