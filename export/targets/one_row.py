"""The variant of a segment for a step of one token: fp8 weights, and activations that are not quantized.

    before                                                after
    xq, xs = quantize_rows(x)                             y = weight_only_linear(x, w8, ws, bias, dtype)
    y = scaled_linear(xq, xs, w8, ws, bias, dtype)        likewise behind rms_norm, add_rms_norm and glu

A product of one row takes as long as its weight is read; quantizing the row only adds to that, in time and in error. The variant is
compiled for T = 1 from the same graph, with other functions in place of these operators: what they return in place of a scale is
None, which nothing may look at (`obstacle`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...graph import ops
from ..kernels.gemm_ops import Inline
from ..segment import Segment

TOKENS, ROWS = "T", "R"
"""The sizes that vary in a decoder's segments."""
_SCALED = torch.ops.camshaft.scaled_linear.default
_rms_norm = ops.DEFINITIONS[torch.ops.camshaft.rms_norm.default]
_add_rms_norm = ops.DEFINITIONS[torch.ops.camshaft.add_rms_norm.default]
_glu = ops.DEFINITIONS[torch.ops.camshaft.glu.default]


def _plain_add_rms_norm(*args: Any) -> tuple[Tensor, None, Tensor]:
    normed, total = _add_rms_norm(*args)
    return normed, None, total


def _weight_only(
    x: Tensor, x_scale: None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    assert x_scale is None
    return torch.ops.camshaft.weight_only_linear(x, weight, weight_scale, bias, dtype)


_QUANTIZERS: dict[Any, Callable[..., Any]] = {
    torch.ops.camshaft.quantize_rows.default: lambda x: (x, None),
    torch.ops.camshaft.rms_norm_quantize.default: lambda *args: (_rms_norm(*args), None),
    torch.ops.camshaft.add_rms_norm_quantize.default: _plain_add_rms_norm,
    torch.ops.camshaft.glu_quantize.default: lambda *args: (_glu(*args), None),
}
"""Operators whose first two results are rows in fp8 and their scales -> what is run instead: plain rows, and None."""


def inline_one_row(inline: Inline) -> Inline:
    """`inline` with fp8 layers of rows that are not quantized."""
    replaced = {**_QUANTIZERS, _SCALED: _weight_only}
    return lambda target: replaced.get(target) or inline(target)


def obstacle(segment: Segment) -> str | None:
    """Why a segment with fp8 layers has no such variant, or None if it has one."""
    sizes = {size for entry in segment.placeholders for size in entry["shape"] if isinstance(size, str)}
    if segment.sizes or TOKENS not in sizes or not sizes <= {TOKENS, ROWS}:
        return f"its varying sizes are {', '.join(sorted(sizes)) or 'none'}, not {TOKENS} (and {ROWS})"
    for node in segment.graph_module(torch.device("cpu")).graph.nodes:
        if node.target is _SCALED and not all(_is_part(node.args[part], part) for part in (0, 1)):
            return f"the rows of {node.name} are not quantized in it"
        if node.target in _QUANTIZERS and (reader := _other_reader(node)) is not None:
            return f"{node.name} is also read by {reader.name}"
    return None


def _is_part(value: Any, index: int) -> bool:
    """Whether a node is the rows (0) or the scales (1) of a quantization."""
    return (
        isinstance(value, fx.Node)
        and value.target is operator.getitem
        and value.args[1] == index
        and isinstance(value.args[0], fx.Node)
        and value.args[0].target in _QUANTIZERS
    )


def _other_reader(quantizer: fx.Node) -> fx.Node | None:
    """Something beside fp8 layers that reads rows or scales of a quantization."""
    for part in quantizer.users:
        if part.target is not operator.getitem:
            return part
        index = part.args[1]
        if index not in (0, 1):
            continue
        for reader in part.users:
            if reader.target is not _SCALED or [i for i, a in enumerate(reader.args) if a is part] != [index]:
                return reader
    return None


def token_axis(segment: Segment) -> tuple[int, int]:
    """An input of a segment, and the axis of it that has T elements."""
    return next(
        (index, entry["shape"].index(TOKENS))
        for index, entry in enumerate(segment.placeholders[: segment.num_inputs])
        if TOKENS in entry["shape"]
    )
