"""`camshaft::quantized_linear` on CUDA: which kernel takes which format and number of rows T.

    weights                      activations          few rows                           many rows
    any                          none                 by 16 bits                         dequantized, then the library
    fp8 of rows or matrix        fp8, fp8_static      `gemm.scaled_linear`               the same
    int8 of rows                 int8, int8_static    by 16 bits                         int8 tensor cores (`gemm_tiled`)
    fp8 in blocks                fp8_block            by 16 bits                         fp8 tensor cores (`block_fp8`)
    int4, groups from 64         fp8, fp8_static      by 16 bits                         up to 512 fp8 tensor cores (`packed_fp8`)
    any other pair                                    by 16 bits                         dequantized, then the library

By 16 bits: `few_rows` for one or two rows of x, `weight_tile` for more. Rounded rows are then their values of 8 bits or fewer,
exact in 16 bits, and their scales multiply the sums. Where weights are dequantized, and where 128 values have
a scale that no sum ends with, values times scales are rounded to 16 bits.

Import this module only where Triton is installed.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ....graph.linear_format import LinearFormat
from ....graph.quantized_linear import quantized_linear as definition
from .. import gemm
from ..gemm_tiled import multiply_tiled
from ..row_quantize import MAX_WIDTH
from . import tables
from .activations import BLOCKS, quantize_planes, round_rows
from .block_fp8 import multiply_block_fp8
from .dequantize import dequantize
from .few_rows import FewRowsConfig, multiply_few_rows
from .packed_fp8 import multiply_packed_fp8, step_of
from .stored import Stored, obstacle, stored
from .weight_tile import multiply_weight_tile

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
_FP8_ROWS = ("fp8", "fp8_static")
_INT8_ROWS = ("int8", "int8_static")
_LIBRARY_MULTIPLE = 16
"""Of N and K of fp8 products in the library."""


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
    """x [.., K] -> [.., N]; the other arguments as in `graph.quantized_linear`.

    Weights that the kernels cannot read as they are stored (`stored.obstacle`), and rows wider than 32,768, run by the operator's
    definition in float32, which is said once.
    """
    parsed = LinearFormat.parse(format)
    reason = obstacle(weight, parsed)
    if reason is None and x.shape[-1] > MAX_WIDTH and parsed.activations != "none":
        reason = f"rows of {x.shape[-1]} values are wider than {MAX_WIDTH}"
    if reason is not None:
        _say_once(format, reason)
        return definition(x, weight, scale, zero_point, global_scale, bias, x_scale, format)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not rows.shape[0]:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    kept = stored(weight, scale, zero_point, global_scale, parsed)
    out = multiply(rows, kept, bias, x_scale, parsed.activations)
    return out.view(*x.shape[:-1], weight.shape[0])


def multiply(x: Tensor, weight: Stored, bias: Tensor | None, x_scale: Tensor | None, activations: str) -> Tensor:
    """x [T, K] (contiguous, T > 0), rounded to activations of that kind, by the weight [N, K] -> [T, N] in the dtype of x."""
    if x.dtype in HALF:
        if activations in _FP8_ROWS and _is_plain_fp8(weight):
            return _fp8_by_fp8(x, weight, bias, x_scale, activations)
        if activations != "none" and x.shape[0] > tables.FEW_ROWS:
            out = _many_small_rows(x, weight, bias, x_scale, activations)
            if out is not None:
                return out
    rounded = round_rows(x, activations, x_scale, x.dtype)
    config = tables.choose(weight, x.shape[0]) if x.dtype in HALF else None
    if config is None:
        return F.linear(rounded.scaled(x.dtype), dequantize(weight, x.dtype), bias)
    if isinstance(config, FewRowsConfig):
        return multiply_few_rows(
            rounded.values, weight, bias, x.dtype, config, x_scale=rounded.scale, x_group_scale=rounded.group_scale
        )
    if rounded.group_scale is not None:
        if weight.group < BLOCKS["fp8_block"]:  # no sum of the weight's ends with a block of x
            return multiply_weight_tile(rounded.scaled(x.dtype), weight, bias, x.dtype, config)
        config = tables.fitted(config, weight, on_sums=True)
    return multiply_weight_tile(
        rounded.values, weight, bias, x.dtype, config, x_scale=rounded.scale, x_group_scale=rounded.group_scale
    )


def _many_small_rows(
    x: Tensor, weight: Stored, bias: Tensor | None, x_scale: Tensor | None, activations: str
) -> Tensor | None:
    """The product on tensor cores of 8 bits; None where there is none for the formats."""
    if activations in _INT8_ROWS and weight.kind == "int8" and weight.group == 0 and weight.zero_point is None:
        if weight.columns % _LIBRARY_MULTIPLE:
            return None
        rounded = round_rows(x, activations, x_scale, torch.int8)
        config = tables.int8_tile(x.shape[0])
        return multiply_tiled(
            rounded.values, weight.words.view(torch.int8), rounded.scale, weight.scale, bias, x.dtype, config
        )
    if activations == "fp8_block" and weight.block_rows > 1 and weight.columns % _LIBRARY_MULTIPLE == 0:
        rounded = round_rows(x, activations, None, FP8)
        assert rounded.group_scale is not None
        return multiply_block_fp8(
            rounded.values, weight.words.view(FP8), rounded.group_scale, weight.scale, bias, x.dtype, tables.BLOCK_FP8
        )
    packed = activations in _FP8_ROWS and x.shape[0] <= tables.PACKED_FP8_MOST
    step = step_of(weight) if packed else None
    if step is None:
        return None
    planes, scale, sums = quantize_planes(x, x_scale if activations == "fp8_static" else None, step)
    return multiply_packed_fp8(planes, weight, sums, scale, bias, x.dtype, tables.PACKED_FP8)


def _is_plain_fp8(weight: Stored) -> bool:
    whole = weight.rows % _LIBRARY_MULTIPLE == 0 and weight.columns % _LIBRARY_MULTIPLE == 0
    return weight.kind == "fp8" and weight.group <= 0 and whole


def _fp8_by_fp8(x: Tensor, weight: Stored, bias: Tensor | None, x_scale: Tensor | None, activations: str) -> Tensor:
    rounded = round_rows(x, activations, x_scale, FP8)
    assert rounded.scale is not None
    by_row = weight.scale if weight.group == 0 else weight.scale.expand(weight.rows).contiguous()
    return gemm.scaled_linear(rounded.values, rounded.scale[:, None], weight.words.view(FP8), by_row, bias, x.dtype)


@functools.cache
def _say_once(format: str, reason: str) -> None:
    logger.warning("quantized_linear in %s runs by its definition, slowly: %s", format, reason)
