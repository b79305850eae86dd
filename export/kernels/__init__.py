"""Attention over a paged key/value cache: a readable reference, a native CPU kernel in C and a Triton kernel.

Importing this package imports nothing else. `camshaft.export.kernels.dispatch` holds `paged_attention`, which picks
the kernel by device and dtype; `reference` is the oracle that the other kernels are tested against.
"""
