"""Rounding that gradients pass straight through (Bengio, Léonard and Courville 2013): weights, inputs of layers, keys and values.

What comes out is, to the last bit, what a build stores and what its operators round to (`graph.quant_formats`,
`graph.quantized_linear`, `graph.quant_ops`); going backward each of them is the identity.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
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

    candidates: scales that are tried, as in `quantize_weight`. Between searches the scales of the last one stay, which saves most
    of the time and changes little. They stay in the same memory always: a captured step reads those of the last search.
    """

    def __init__(self, format: LinearFormat, candidates: int) -> None:
        self.format = format
        self.candidates = candidates
        self._found: QuantizedWeight | None = None

    @torch.no_grad()
    def search(self, weight_NK: Tensor) -> None:
        """Finds the scales that a build finds for this weight."""
        found = quantize_weight(weight_NK, self.format, candidates=self.candidates)
        if self._found is None:
            self._found = replace(found, values=found.values.new_empty(0))
            return
        for kept, new in zip(_scales(self._found), _scales(found), strict=True):
            kept.copy_(new)

    def __call__(self, weight_NK: Tensor) -> Tensor:
        """float32 [N, K], with the gradient of weight_NK; the first call searches."""
        if self._found is None:
            self.search(weight_NK)
        assert self._found is not None
        with torch.no_grad():
            rounded = round_with_scales(weight_NK, self.format, self._found)
        return straight_through(weight_NK.float(), rounded)


def _scales(weight: QuantizedWeight) -> list[Tensor]:
    return [part for part in (weight.scale, weight.zero_point, weight.global_scale) if part is not None]


def round_input(x: Tensor, format: LinearFormat) -> Tensor:
    """float32 of x's shape: the input of a layer as its format rounds it, with the gradient of x."""
    wide = x.float()
    if format.activations == "none":
        return wide
    with torch.no_grad():
        rounded = _rounded_by_kernel(x, format)
        if rounded is None:
            values, scale = quantize_activations(x, format)
            rounded = values if scale is None else values * scale
    return straight_through(wide, rounded)


def _rounded_by_kernel(x: Tensor, format: LinearFormat) -> Tensor | None:
    """The same to the last bit, by the engine's kernel for GPUs instead of some thirty of torch; None where there is none."""
    if not x.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    from ..kernels.quantized.activations import MAX_WIDTH, round_rows

    if x.shape[-1] > MAX_WIDTH:
        return None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return round_rows(rows, format.activations, None, torch.float32).scaled(torch.float32).view(x.shape)


def round_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of `dtype` (float8_e4m3fn) gives them back."""
    with torch.no_grad():
        rounded = saturate(x, dtype).to(x.dtype)
    return straight_through(x, rounded)
