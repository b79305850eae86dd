"""A stored weight as kernels take it: words of 32 bits, and how its scales lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....graph.linear_format import BLOCK, LinearFormat

_KINDS = {"int4": "int4", "nvfp4": "fp4", "mxfp4": "fp4", "int8": "int8", "fp8": "fp8", "mxfp8": "fp8"}
"""Kinds of formats to those of kernels, which differ in how values are unpacked, not in their scales."""
_VALUES_PER_WORD = {"int4": 8, "fp4": 8, "int8": 4, "fp8": 4}


@dataclass(frozen=True)
class Stored:
    """A weight [rows, columns]: words int32 [rows, columns / values_per_word], the rest as in `graph.linear_format`.

    kind: int4, fp4 (e2m1), int8 or fp8 (e4m3). group: 0 a scale for each row, -1 one scale, else values along K that share one.
    block_rows: rows that share a scale, 1 or 128.
    """

    kind: str
    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    group: int
    block_rows: int = 1

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def values_per_word(self) -> int:
        return _VALUES_PER_WORD[self.kind]

    @property
    def columns(self) -> int:
        return self.words.shape[1] * self.values_per_word


def obstacle(weight: Tensor, format: LinearFormat) -> str | None:
    """Why the kernels cannot take a weight as it is stored, or None."""
    values = _VALUES_PER_WORD[_KINDS[format.weights]]
    row_bytes = weight.shape[1] * weight.element_size()
    if row_bytes % 4:
        return f"rows of {row_bytes} bytes are not whole words of {values} values"
    group = format.group
    if group > 0 and (group & (group - 1) or group < 16):
        return f"groups of {group} are no power of two from 16"
    if not weight.is_contiguous():
        return f"the weight has strides {weight.stride()}"
    return None


def stored(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, format: LinearFormat
) -> Stored:
    """The tensors of `camshaft::quantized_linear` for the kernels; `obstacle` must be None."""
    return Stored(
        _KINDS[format.weights],
        weight.view(torch.int32),
        scale.contiguous(),
        None if zero_point is None else zero_point.contiguous(),
        global_scale,
        format.group,
        BLOCK if format.block else 1,
    )
