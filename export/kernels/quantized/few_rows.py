"""One or two rows of x by a stored weight on the plain units, bound by reading it: y [T, N] = x [T, K] @ weight [N, K]^T.

    program    BLOCK_N rows of the weight; K in steps of BLOCK_K
    thread     16 bytes side by side of each of its rows: unpacked in registers, multiplied in float32 and summed; a part of them
               that shares a scale (CHUNK values) makes one number, scaled and added to one accumulator for each row

Unpacking must cost less than two instructions a value, or it takes longer than the read. The bits of an unsigned integer u, masked
where they stand in the word and taken for a float32, are u * 2^(s - 149), where s is the place of its lowest bit: subnormal numbers
and those of the smallest exponent have one spacing, so this holds while no bit is above the 23rd. Values above are shifted down
first. The factor 2^-s is taken into x, exactly: it depends on k alone. So is 2^64, which keeps products where float32 is precise:

    sum over k of (u_k 2^(s_k - 149)) (x_k 2^(64 - s_k))  =  2^-85 sum over k of u_k x_k

Two's complement with its sign bit flipped is unsigned, with a zero point of 8 or 128; zero points act on sums of x, one for each
chunk. Numbers with exponents, e2m1 and e4m3, are moved to float32's places, which costs more, times 2^-126 and 2^-120.

x is not rounded. Magnitudes below 2^62 are multiplied without overflow; what is below 2^-40 loses bits to underflow.

Import this module only where Triton is installed. TRITON_INTERPRET=1 runs it on CPU tensors, slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gemm_skinny import on_device
from .stored import Stored
from .unpack import decode_scale
from .weight_tile import X_GROUP, group_numbers, over_words

MAX_ROWS = 2
"""Most rows of x: each adds a multiplication for every value, and all of them share the unpacking."""
VECTOR_BYTES = 16
"""What a thread loads at once; rows of the weight are a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class FewRowsConfig:
    """How the work is cut: weight rows of a program, values of a row per step, warps."""

    block_n: int
    block_k: int
    warps: int = 4


# ---------------------------------------------------------------------------------------------------------- device code
@triton.jit
def _number(words, p: tl.constexpr, KIND: tl.constexpr):
    # value p of each word (uint32) as float32, times a power of two (_factors, _unit)
    if KIND == "int4":
        bits = (words if p < 6 else words >> 24) & (15 << (4 * (p % 6)))
    elif KIND == "int8":
        bits = (words if p < 3 else words >> 24) & (255 << (8 * (p % 3)))
    elif KIND == "fp4":
        code = words >> (4 * p)
        bits = ((code & 7) << 22) | ((code & 8) << 28)
    else:
        code = words >> (8 * p)
        bits = ((code & 127) << 20) | ((code & 128) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _numbers(words, KIND: tl.constexpr, V: tl.constexpr, ZEROS: tl.constexpr):
    # int32 words [N, I] -> [N, V I] in the order of k, integers unsigned; no value leaves its thread
    words = words.to(tl.uint32, bitcast=True)
    if KIND == "int8":
        words = words ^ 0x80808080
    elif KIND == "int4" and not ZEROS:
        words = words ^ 0x88888888
    v0 = _number(words, 0, KIND)
    v1 = _number(words, 1, KIND)
    v2 = _number(words, 2, KIND)
    v3 = _number(words, 3, KIND)
    if V == 4:
        joined = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    else:
        v4 = _number(words, 4, KIND)
        v5 = _number(words, 5, KIND)
        v6 = _number(words, 6, KIND)
        v7 = _number(words, 7, KIND)
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        joined = tl.join(even, tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    return tl.reshape(joined, [words.shape[0], words.shape[1] * V])


@triton.jit
def _factors(k, KIND: tl.constexpr, V: tl.constexpr):
    # what x is multiplied by: 2^64 over the place of value k in its word
    p = k % V
    if KIND == "int4":
        exponent = 191 - 4 * (p % 6)
    elif KIND == "int8":
        exponent = 191 - 8 * (p % 3)
    else:
        exponent = 191 + 0 * p
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _unit(KIND: tl.constexpr):
    # what sums of products are multiplied by
    if KIND == "fp4":
        return 4.611686018427388e18  # 2^62
    elif KIND == "fp8":
        return 7.205759403792794e16  # 2^56
    else:
        return 3.8685626227668134e25  # 2^85


@triton.jit
def _load_row(x, m, num_rows, K: tl.constexpr, k, EVEN: tl.constexpr):
    # row m, the last one again where there are fewer; float32
    at = x + tl.minimum(m, num_rows - 1).to(tl.int64) * K + k
    return (tl.load(at) if EVEN else tl.load(at, mask=k < K, other=0.0)).to(tl.float32)


@triton.jit
def _add_row(
    acc, numbers, row, factors, zero, scales, x_group_scale, m, num_rows, start, K: tl.constexpr,
    KIND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # acc [BLOCK_N, chunks] += one row by the step's values
    BLOCK_N: tl.constexpr = numbers.shape[0]
    CHUNKS: tl.constexpr = numbers.shape[1] // CHUNK
    row = row[None, :]
    products = numbers * (row * factors[None, :])
    part = tl.sum(tl.reshape(products, [BLOCK_N, CHUNKS, CHUNK]), 2) * _unit(KIND)
    if zero is not None:
        part -= zero * tl.sum(tl.reshape(row, [1, CHUNKS, CHUNK]), 2)
    if scales is not None:
        part *= scales
    if x_group_scale is not None:
        group = (start + tl.arange(0, CHUNKS) * CHUNK) // X_GROUP
        at = x_group_scale + tl.minimum(m, num_rows - 1) * tl.cdiv(K, X_GROUP) + group
        part *= tl.load(at, mask=group * X_GROUP < K, other=0.0)[None, :]
    return acc + part


@triton.jit
def _store_row(
    acc, scale, global_scale, x_scale, bias, out, m, num_rows, n, N, GROUP: tl.constexpr, BIAS: tl.constexpr
):
    keep = (n < N) & (m < num_rows)
    total = tl.sum(acc, 1)
    if GROUP == 0:
        total *= tl.load(scale + n, mask=keep, other=0.0)
    if GROUP == -1:
        total *= tl.load(scale)
    if global_scale is not None:
        total *= tl.load(global_scale)
    if x_scale is not None:
        total *= tl.load(x_scale + tl.minimum(m, num_rows - 1))
    if BIAS:
        total += tl.load(bias + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x, words, scale, zero_point, global_scale, x_scale, x_group_scale, bias, out, num_rows, N,
    K: tl.constexpr, KIND: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, EVEN_N: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    EVEN: tl.constexpr = K % BLOCK_K == 0
    ZEROS: tl.constexpr = zero_point is not None
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.minimum(n, N - 1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_N
    tile_n = tl.arange(0, BLOCK_N)  # of one program: constants, which loads take as immediate offsets
    if not EVEN_N:
        tile_n = tl.minimum(tile_n, (N - 1 - begin).to(tl.int32))
    tile = words + begin * (K // V)
    first = tl.program_id(1) * ROWS
    row_zero = None
    if ZEROS and GROUP == 0:
        row_zero = tl.load(zero_point + offs_n).to(tl.float32)[:, None]
    acc0 = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    acc1 = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        word = start // V + tl.arange(0, BLOCK_K // V)
        w_at = tile + tile_n[:, None] * (K // V) + word[None, :]
        if EVEN:
            w = tl.load(w_at, eviction_policy="evict_first")
        else:
            w = tl.load(w_at, mask=word[None, :] < K // V, other=0, eviction_policy="evict_first")
        scales = None
        zero = row_zero
        if KIND == "int4" and not ZEROS:
            zero = 8.0
        elif KIND == "int8" and not ZEROS:
            zero = 128.0
        if GROUP > 0:
            scales = decode_scale(group_numbers(scale, offs_n, start, K, GROUP, BLOCK_ROWS, BLOCK_K))
            scales = over_words(scales, CHUNKS)
            if ZEROS:
                zeros = group_numbers(zero_point, offs_n, start, K, GROUP, BLOCK_ROWS, BLOCK_K)
                zero = over_words(zeros.to(tl.float32), CHUNKS)
        numbers = _numbers(w, KIND, V, ZEROS)
        factors = _factors(k, KIND, V)
        row = _load_row(x, first, num_rows, K, k, EVEN)
        acc0 = _add_row(
            acc0, numbers, row, factors, zero, scales, x_group_scale, first, num_rows, start, K, KIND, CHUNK
        )
        if ROWS > 1:
            row = _load_row(x, first + 1, num_rows, K, k, EVEN)
            acc1 = _add_row(
                acc1, numbers, row, factors, zero, scales, x_group_scale, first + 1, num_rows, start, K, KIND, CHUNK
            )
    _store_row(acc0, scale, global_scale, x_scale, bias, out, first, num_rows, n, N, GROUP, BIAS)
    if ROWS > 1:
        _store_row(acc1, scale, global_scale, x_scale, bias, out, first + 1, num_rows, n, N, GROUP, BIAS)


# --------------------------------------------------------------------------------------------------------------- launch
def takes(weight: Stored) -> bool:
    """Whether the kernel takes a weight: rows of whole vectors of 16 bytes."""
    return weight.words.shape[1] * 4 % VECTOR_BYTES == 0


def multiply_few_rows(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: FewRowsConfig,
    *,
    x_scale: Tensor | None = None,
    x_group_scale: Tensor | None = None,
) -> Tensor:
    """x [T, K] (bf16, fp16 or fp32; contiguous) by the weight [N, K] -> [T, N] in `dtype`. More than 2 rows read it again.

    x_scale: float32 [T] that multiply the rows of x; x_group_scale: float32 [T, ceil(K / 128)] that multiply 128 values each.
    Raises ValueError for a weight that the kernel does not take.
    """
    num_rows, k = x.shape
    n = weight.rows
    if not takes(weight):
        raise ValueError(
            f"a weight {[n, k]} of {weight.kind}: rows of {weight.words.shape[1] * 4} bytes, allowed: a multiple of {VECTOR_BYTES}"
        )
    out = torch.empty((num_rows, n), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    vector = VECTOR_BYTES // 4 * weight.values_per_word
    chunk = min(vector, weight.group) if weight.group > 0 else vector
    rows = min(triton.next_power_of_2(num_rows), MAX_ROWS)
    with on_device(x):
        _few_rows_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(num_rows, rows))](
            x, weight.words, weight.scale, weight.zero_point, weight.global_scale, x_scale, x_group_scale, bias, out,
            num_rows, n, K=k, KIND=weight.kind, V=weight.values_per_word, GROUP=weight.group,
            BLOCK_ROWS=weight.block_rows, ROWS=rows, BLOCK_N=config.block_n,
            BLOCK_K=max(vector, min(config.block_k, triton.next_power_of_2(k))), CHUNK=chunk,
            EVEN_N=n % config.block_n == 0, BIAS=bias is not None, num_warps=config.warps,
        )  # fmt: skip
    return out
