"""Checkpoints whose linear layers are stored quantized: one module for each scheme, `load.read_quantized` for all of them."""
