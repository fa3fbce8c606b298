"""Compression during training: masks and quantisers of linear layers, chosen in a recipe by `model.compression.class_path`."""
