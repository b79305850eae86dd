"""Registers the CUDA implementation of `camshaft::quantized_linear`. Imports neither Triton nor CUDA."""

from __future__ import annotations

from torch import Tensor

from ....graph import quantized_linear as _definition  # noqa: F401  defines the operator
from ....graph.registry import implement


def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    format: str,
) -> Tensor:
    from .linear import quantized_linear

    return quantized_linear(x, weight, scale, zero_point, global_scale, bias, x_scale, format)


implement("quantized_linear", _quantized_linear, "CUDA")
