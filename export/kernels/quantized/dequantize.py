"""A stored weight to a plain matrix, for products of so many rows that the library's kernel is worth the detour.

Bound by writing: 2 bytes a value, in float32 arithmetic with one rounding, as `graph.quant_formats.dequantize_weight`.

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm_skinny import on_device
from .stored import Stored
from .unpack import decode_scale, plain

_ROWS, _COLUMNS = 8, 1024
"""Of a program's tile."""


@triton.jit
def _in_order(words, zero, factor, KIND: tl.constexpr, V: tl.constexpr, dtype: tl.constexpr):
    # words [R, I] -> values [R, V I], columns as they are stored
    v0 = plain(words, 0, zero, factor, KIND, dtype)
    v1 = plain(words, 1, zero, factor, KIND, dtype)
    v2 = plain(words, 2, zero, factor, KIND, dtype)
    v3 = plain(words, 3, zero, factor, KIND, dtype)
    if V == 4:
        joined = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    else:
        v4 = plain(words, 4, zero, factor, KIND, dtype)
        v5 = plain(words, 5, zero, factor, KIND, dtype)
        v6 = plain(words, 6, zero, factor, KIND, dtype)
        v7 = plain(words, 7, zero, factor, KIND, dtype)
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        joined = tl.join(even, tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    return tl.reshape(joined, [words.shape[0], words.shape[1] * V])


@triton.jit
def _dequantize_kernel(
    words, scale, zero_point, global_scale, out, N, K,
    KIND: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * (COLUMNS // V) + tl.arange(0, COLUMNS // V)
    keep = (n < N)[:, None] & (word < K // V)[None, :]
    w = tl.load(words + n[:, None] * (K // V) + word[None, :], mask=keep, other=0)
    if GROUP > 0:
        at = (n // BLOCK_ROWS)[:, None] * tl.cdiv(K, GROUP) + (word * V // GROUP)[None, :]
    elif GROUP == 0:
        at = n[:, None] + word[None, :] * 0
    else:
        at = n[:, None] * 0 + word[None, :] * 0
    factor = decode_scale(tl.load(scale + at, mask=keep, other=0.0))
    if global_scale is not None:
        factor = factor * tl.load(global_scale)
    zero = None
    if zero_point is not None:
        zero = tl.load(zero_point + at, mask=keep, other=0.0).to(tl.float32)
    values = _in_order(w, zero, factor, KIND, V, out.dtype.element_ty)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + n[:, None] * K + k[None, :], values, mask=(n < N)[:, None] & (k < K)[None, :])


def dequantize(weight: Stored, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in `dtype`. A group must hold whole words."""
    n, k = weight.rows, weight.columns
    out = torch.empty((n, k), dtype=dtype, device=weight.words.device)
    columns = min(_COLUMNS, triton.next_power_of_2(k))
    with on_device(out):
        _dequantize_kernel[(triton.cdiv(n, _ROWS), triton.cdiv(k, columns))](
            weight.words, weight.scale, weight.zero_point, weight.global_scale, out, n, k, KIND=weight.kind,
            V=weight.values_per_word, GROUP=weight.group, BLOCK_ROWS=weight.block_rows, ROWS=_ROWS, COLUMNS=columns,
            num_warps=4,
        )  # fmt: skip
    return out
