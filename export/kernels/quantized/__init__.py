"""Kernels on CUDA behind camshaft::quantized_linear. Modules except `operator` need Triton to be imported."""
