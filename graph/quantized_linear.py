"""camshaft::quantized_linear: a linear layer on a stored weight of any format. Its definition is the oracle of every kernel.

    quantized_linear(x [.., K], weight, scale, zero_point?, global_scale?, bias [N]?, x_scale []?, format) -> [.., N], dtype of x

x is rounded as `format` says of activations, the weight means what `linear_format` says, products are summed in float32 (int8 by
int8 without groups: exact integer sums), scaled, the bias is added, and the sum is rounded once. What activations are rounded to:

    none          nothing
    fp8, int8     float8_e4m3fn, or int8 in -127 to 127; a scale for each token, max-abs / 448 or 127
    fp8_static    the same values with the scale x_scale [], float32
    int8_static
    fp8_block     float8_e4m3fn; a scale for each 128 elements of a token
    nvfp4         e2m1 in blocks of 16: a float8_e4m3fn scale for each block and a global one, which is x_scale [] or, without
                  that, one for each token, max-abs / (6 * 448)
    nvfp4_search  the same with the best of SEARCH_FACTORS for each block, which its scale is multiplied by (with two, 1 and 1.5:
                  Cook et al. 2025, "Four Over Six"); a token's scale is max-abs / (6 * 280), so that they have room
    mxfp4, mxfp8  e2m1 or float8_e4m3fn in blocks of 32 with e8m0 scales
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_format import LinearFormat
from .quant_formats import QuantizedWeight, dequantize_weight
from .quant_ops import FP8_MAX, QUANT_DEFINITIONS, quantize_rows
from .registry import define
from .small_floats import E2M1_MAX, E4M3_MAX, ceil_e8m0, decode_e8m0, floor_e8m0, quotient, round_to_e2m1

_TINY = torch.finfo(torch.float32).tiny

SEARCH_FACTORS = (1.0, 1.5, 0.95, 1.05, 0.9, 1.4, 1.6)
"""Of scales that map a block's largest number to 6. Each next one is what lowers the squared error of normal, Laplace and gated
numbers most; 1.5 maps the largest to 4, where steps are finer."""
SEARCH_MAX = E4M3_MAX / max(SEARCH_FACTORS)
"""The largest block's scale before its factor."""
_ERROR_STEPS = 1024.0
"""Steps from 0 to a block's largest number in which errors are counted: sums of integers are the same in any order."""


def quantize_activations(
    x: Tensor, format: LinearFormat, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(values, scale) in float32 of x [.., K] rounded as the format says: x is about values * scale; scale None means 1.

    Values and scales are exactly those that hardware computes with. Raises ValueError where a static scale is missing.
    """
    kind = format.activations
    wide = x.float()
    if kind == "none":
        return wide, None
    if kind == "fp8":
        values, scale = quantize_rows(x)
        return values.float(), scale
    if kind == "int8":
        scale = quotient(wide.abs().amax(-1, keepdim=True), 127.0).clamp(min=_TINY)
        return (wide / scale).round().clamp(-127, 127), scale
    if kind in ("fp8_static", "int8_static"):
        if x_scale is None:
            raise ValueError(f"{format} needs x_scale, the static scale of its activations, which calibration finds")
        scaled = wide / x_scale
        if kind == "int8_static":
            return scaled.round().clamp(-127, 127), x_scale
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float(), x_scale
    return _quantize_blocks(wide, format, x_scale)


def _quantize_blocks(wide: Tensor, format: LinearFormat, x_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Activations with a scale for each block along K: (values that include the blocks' scales, the token's or tensor's scale)."""
    kind, dim = format.activations, wide.shape[-1]
    overall: Tensor | None = None
    if kind in ("nvfp4", "nvfp4_search"):
        overall = x_scale
        if overall is None:
            most = E2M1_MAX * (E4M3_MAX if kind == "nvfp4" else SEARCH_MAX)
            overall = quotient(wide.abs().amax(-1, keepdim=True), most).clamp(min=_TINY)
        wide = wide / overall
    size = format.activation_block
    if dim % size and kind != "fp8_block":
        raise ValueError(f"x has {dim} columns, which blocks of {size} ({format}) do not divide")
    padded = torch.nn.functional.pad(wide, (0, -dim % size)) if dim % size else wide
    blocks = padded.unflatten(-1, (-1, size))
    amax = blocks.abs().amax(-1, keepdim=True)
    if kind == "nvfp4_search":
        return _search_blocks(blocks, amax).flatten(-2)[..., :dim], overall
    if kind == "nvfp4":
        scale = _e4m3_scale(amax)
    elif kind == "fp8_block":
        scale = quotient(amax, E4M3_MAX)
    else:
        scale = decode_e8m0(floor_e8m0(amax, 2) if kind == "mxfp4" else ceil_e8m0(amax, E4M3_MAX))
    scaled = blocks / scale.clamp(min=_TINY)
    if kind in ("nvfp4", "mxfp4"):
        values = round_to_e2m1(scaled)
    else:
        values = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (values * scale).flatten(-2)[..., :dim], overall


def _e4m3_scale(amax: Tensor) -> Tensor:
    """The e4m3 number that maps amax to 6, in float32."""
    return quotient(amax, E2M1_MAX).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()


def _search_blocks(blocks: Tensor, amax: Tensor) -> Tensor:
    """Blocks [.., 16] (amax [.., 1]) as e2m1 times the one of the scales with the least squared error; the first of equals."""
    per_step = torch.full_like(amax, _ERROR_STEPS) / amax.clamp(min=1e-6)
    best = least = None
    for factor in SEARCH_FACTORS:
        scale = _e4m3_scale(amax * factor)
        values = round_to_e2m1(blocks / scale.clamp(min=_TINY)) * scale
        error = ((values - blocks).abs() * per_step).to(torch.int32).square().sum(-1, keepdim=True, dtype=torch.int32)
        if best is None or least is None:
            best, least = values, error
            continue
        best = torch.where(error < least, values, best)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    format: str,
) -> Tensor:
    """The definition of camshaft::quantized_linear; see the module."""
    parsed = LinearFormat.parse(format)
    values, outer = quantize_activations(x, parsed, x_scale)
    by_row = parsed.weights in ("int8", "fp8") and parsed.group <= 0 and not parsed.block and zero_point is None
    if by_row:
        # int8 x int8: float64 holds every sum of products exactly, float32 only those of 1,040 products
        exact = (
            torch.float64
            if parsed.activations in ("int8", "int8_static") and parsed.weights == "int8"
            else torch.float32
        )
        product = torch.matmul(values.to(exact), weight.to(exact).t()).float()
        product = (product if outer is None else product * outer) * scale
    else:
        dense = dequantize_weight(QuantizedWeight(weight, scale, zero_point, global_scale), parsed)
        product = torch.matmul(values, dense.t())
        product = product if outer is None else product * outer
    return (product if bias is None else product + bias.float()).to(x.dtype)


define(
    "quantized_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? global_scale, Tensor? bias, "
    "Tensor? x_scale, str format) -> Tensor",
    quantized_linear,
    lambda x, weight, scale, zero_point, global_scale, bias, x_scale, format: torch.empty(
        (*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device
    ),
)

QUANTIZED_LINEAR = torch.ops.camshaft.quantized_linear.default
QUANT_DEFINITIONS[QUANTIZED_LINEAR] = quantized_linear
