"""The table of operators for TensorRT, fourth part: reductions, softmax, sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..emitter import UnsupportedError, each_name, reduce_dims
from .builder import Builder, Emit, Spec, Value
from .ops_math import compute_dtype, in_fp32


def _reduce(kind: str) -> Emit:
    def write(b: Builder, out: Spec, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
        if not x.shape:
            return b.cast(x, out.dtype)
        wide = b.cast(x, compute_dtype(out.dtype))
        return b.cast(b.reduce(kind, wide, reduce_dims(x.shape, dim), keepdim), out.dtype)

    return write


def _reduce_all(kind: str) -> Emit:
    return lambda b, out, x, dtype=None: _reduce(kind)(b, out, x)


def _any(kind: str) -> Emit:
    def write(b: Builder, out: Spec, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        numbers = b.cast(b.cast(x, torch.bool), torch.int32)
        return b.cast(b.reduce(kind, numbers, reduce_dims(x.shape, dim), keepdim), torch.bool)

    return write


def _vector_norm(
    b: Builder, out: Spec, x: Value, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    if ord not in (1, 2):
        raise UnsupportedError(f"a vector norm of order {ord}")
    wide = b.cast(x, compute_dtype(out.dtype))
    terms = b.unary("ABS", wide) if ord == 1 else b.elementwise("PROD", wide, wide, wide.dtype)
    total = b.reduce("SUM", terms, reduce_dims(x.shape, dim), keepdim)
    return b.cast(total if ord == 1 else b.unary("SQRT", total), out.dtype)


@in_fp32
def _softmax(b: Builder, out: Spec, x: Value, dim: int, dtype: Any = None) -> Value:
    return b.softmax(x, dim)


@in_fp32
def _log_softmax(b: Builder, out: Spec, x: Value, dim: int, dtype: Any = None) -> Value:
    shifted = b.elementwise("SUB", x, b.reduce("MAX", x, [dim], True), out.dtype)
    total = b.reduce("SUM", b.unary("EXP", shifted), [dim], True)
    return b.elementwise("SUB", shifted, b.unary("LOG", total), out.dtype)


@in_fp32
def _cumsum(b: Builder, out: Spec, x: Value, dim: int, dtype: Any = None) -> Value:
    axis = b.constant(dim % len(x.shape), torch.int32, ())
    kind = b.trt.CumulativeOperation.SUM
    return b.value(b.layer("cumulative", x.tensor, axis.tensor, kind, False, False), x.dtype)


# ------------------------------------------------------------------------------------------------------------ sorting
MAX_TOPK = 3840
"""The most elements that TensorRT's TopK yields."""


def topk(b: Builder, x: Value, k: int, dim: int, largest: bool) -> tuple[Value, Value]:
    """The k largest or smallest elements in order, and their int64 positions. Raises UnsupportedError for too many."""
    if k > MAX_TOPK:
        raise UnsupportedError(f"the {k} largest elements, or sorting them (allowed: up to {MAX_TOPK})")
    kind = b.trt.TopKOperation.MAX if largest else b.trt.TopKOperation.MIN
    rank = max(len(x.shape), 2)  # the layer takes no vectors
    axis = dim % len(x.shape) + rank - len(x.shape)
    wide = hasattr(b.trt.ITopKLayer, "indices_type")  # older releases count in int32 only
    extra = (b.type(torch.int64),) if wide else ()
    layer = b.layer("topk", b.raise_rank(x, rank).tensor, kind, k, 1 << axis, *extra)
    positions = b.cast(b.value(layer, torch.int64 if wide else torch.int32, 1), torch.int64)
    shape = (*x.shape[: dim % len(x.shape)], k, *x.shape[dim % len(x.shape) + 1 :])
    return b.reshape(b.value(layer, x.dtype), shape), b.reshape(positions, shape)


def _topk(
    b: Builder, out: Any, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Value, Value]:
    return topk(b, x, k, dim, largest)


def _sort(b: Builder, out: Any, x: Value, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    return topk(b, x, x.shape[dim], dim, descending)


def _argsort(b: Builder, out: Spec, x: Value, dim: int = -1, descending: bool = False) -> Value:
    return topk(b, x, x.shape[dim], dim, descending)[1]


def _extreme(largest: bool) -> Emit:
    def write(b: Builder, out: tuple[Spec, Spec], x: Value, dim: int, keepdim: bool = False) -> list[Value]:
        found = topk(b, x, 1, dim, largest)
        return [b.reshape(item, spec.shape) for item, spec in zip(found, out)]

    return write


def _argmax(largest: bool) -> Emit:
    def write(b: Builder, out: Spec, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if dim is None:
            x, dim = b.reshape(x, (int(np.prod(x.shape)),)), 0
        return b.reshape(topk(b, x, 1, dim, largest)[1], out.shape)

    return write


REDUCE_OPERATORS: dict[str, Emit] = {
    **each_name(_reduce("AVG"), "mean.dim"),
    **each_name(_reduce("SUM"), "sum.dim_IntList"),
    **each_name(_reduce("MAX"), "amax.default"),
    **each_name(_reduce("MIN"), "amin.default"),
    **each_name(_reduce_all("AVG"), "mean.default"),
    **each_name(_reduce_all("SUM"), "sum.default"),
    **each_name(_reduce_all("MAX"), "max.default"),
    **each_name(_reduce_all("MIN"), "min.default"),
    **each_name(_any("MAX"), "any.default", "any.dim"),
    **each_name(_any("MIN"), "all.default", "all.dim"),
    **each_name(_vector_norm, "linalg_vector_norm.default"),
    **each_name(_cumsum, "cumsum.default"),
    **each_name(_softmax, "softmax.int", "_softmax.default"),
    **each_name(_log_softmax, "log_softmax.int", "_log_softmax.default"),
    **each_name(_topk, "topk.default"),
    **each_name(_sort, "sort.default"),
    **each_name(_argsort, "argsort.default"),
    **each_name(_extreme(True), "max.dim"),
    **each_name(_extreme(False), "min.dim"),
    **each_name(_argmax(True), "argmax.default"),
    **each_name(_argmax(False), "argmin.default"),
}
"""Operator names to the functions that emit them."""
