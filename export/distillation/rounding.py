"""Rounding that gradients pass straight through (Bengio, Léonard and Courville 2013): weights, inputs of layers, keys and values.

What comes out is, to the last bit, what a build stores and what its operators round to (`graph.quant_formats`,
`graph.quantized_linear`, `graph.quant_ops`); going backward each of them is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...graph.linear_format import LinearFormat
from ...graph.quant_formats import QuantizedWeight, effective_scale, quantize_weight, round_scaled
from ...graph.quant_ops import saturate
from ...graph.quantized_linear import quantize_activations

_TINY = torch.finfo(torch.float32).tiny


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` (of x's shape and dtype, without a gradient), with x's gradient."""
    result: Tensor = _StraightThrough.apply(x, rounded)
    return result


def cast_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to another float dtype and back."""
    return x if x.dtype == dtype else straight_through(x, x.detach().to(dtype).to(x.dtype))


def round_with_scales(weight_NK: Tensor, format: LinearFormat, given: QuantizedWeight) -> Tensor:
    """float32 [N, K]: what a weight means that is rounded to nearest with the scales and zero points of `given`."""
    wide = weight_NK.float()
    scale = effective_scale(given.scale, given.global_scale, wide, format)
    offset = None
    if given.zero_point is not None:
        offset = effective_scale(given.zero_point.float(), None, wide, format)
    values = round_scaled(wide / scale.clamp(min=_TINY), offset, format)
    return (values if offset is None else values - offset) * scale


class WeightRounding:
    """Rounds one layer's weight [N, K] in every step.

    candidates: scales that are tried, as in `quantize_weight`. Scales are searched for when `search` was called; between searches
    those of the last one stay, which saves most of the time and changes little.
    """

    def __init__(self, format: LinearFormat, candidates: int) -> None:
        self.format = format
        self.candidates = candidates
        self._scales: QuantizedWeight | None = None

    def search(self) -> None:
        """The next call searches for scales anew, and so rounds exactly as a build does."""
        self._scales = None

    def __call__(self, weight_NK: Tensor) -> Tensor:
        """float32 [N, K], with the gradient of weight_NK."""
        with torch.no_grad():
            if self._scales is None:
                self._scales = quantize_weight(weight_NK, self.format, candidates=self.candidates)
            rounded = round_with_scales(weight_NK, self.format, self._scales)
        return straight_through(weight_NK.float(), rounded)


def round_input(x: Tensor, format: LinearFormat) -> Tensor:
    """float32 of x's shape: the input of a layer as its format rounds it, with the gradient of x."""
    wide = x.float()
    if format.activations == "none":
        return wide
    with torch.no_grad():
        values, scale = quantize_activations(x, format)
        rounded = values if scale is None else values * scale
    return straight_through(wide, rounded)


def round_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of `dtype` (float8_e4m3fn) gives them back."""
    with torch.no_grad():
        rounded = saturate(x, dtype).to(x.dtype)
    return straight_through(x, rounded)
