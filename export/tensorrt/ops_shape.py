"""The table of operators for TensorRT, third part: layouts, slices, gathers, and tensors made of sizes.

Sizes are numbers here, so that a view is a reshape to the shape that the node is known to yield.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..emitter import UnsupportedError, each_name
from .builder import HALF, Builder, Emit, Operand, Spec, Value


# ------------------------------------------------------------------------------------------------------------ layouts
def _reshape(b: Builder, out: Spec, x: Value, *_: Any) -> Value:
    return b.reshape(x, out.shape)


def _transpose(b: Builder, out: Spec, x: Value, first: int, second: int) -> Value:
    return b.transpose(x, first, second)


def _swap_last(b: Builder, out: Spec, x: Value) -> Value:
    return x if len(x.shape) < 2 else b.transpose(x, -2, -1)


def _permute(b: Builder, out: Spec, x: Value, dims: Sequence[int]) -> Value:
    return b.permute(x, dims)


def _expand(b: Builder, out: Spec, x: Value, *_: Any, **__: Any) -> Value:
    return b.expand(x, out.shape)


def _repeat(b: Builder, out: Spec, x: Value, repeats: Sequence[int]) -> Value:
    """[a, b] repeated (r, s) times: [1, a, 1, b] -> [r, a, s, b] -> [r a, s b]."""
    rank = max(len(repeats), len(x.shape))
    counts = [1] * (rank - len(repeats)) + list(repeats)
    x = b.raise_rank(x, rank)
    spread, wanted = [], []
    for count, size in zip(counts, x.shape):
        spread += [1, size] if count > 1 else [size]
        wanted += [count, size] if count > 1 else [size]
    return b.reshape(b.expand(b.reshape(x, spread), wanted), out.shape)


def _repeat_interleave(
    b: Builder, out: Spec, x: Value, repeats: int, dim: int | None = None, output_size: Any = None
) -> Value:
    if dim is None:
        x, dim = b.reshape(x, (int(np.prod(x.shape)),)), 0
    dim %= len(x.shape)
    head, tail = x.shape[: dim + 1], x.shape[dim + 1 :]
    return b.reshape(b.expand(b.reshape(x, (*head, 1, *tail)), (*head, repeats, *tail)), out.shape)


def _concat(b: Builder, out: Spec, tensors: Sequence[Value], dim: int = 0) -> Value:
    dtype = torch.int32 if out.dtype == torch.bool else out.dtype
    parts = [b.cast(tensor, dtype) for tensor in tensors if tensor.shape != (0,)]
    return b.cast(b.concat(parts, dim), out.dtype)


def _stack(b: Builder, out: Spec, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(out.shape)
    raised = [b.reshape(t, (*t.shape[:dim], 1, *t.shape[dim:])) for t in tensors]
    return _concat(b, out, raised, dim)


def _split(b: Builder, out: tuple[Spec, ...], x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    dim, begin, parts = dim % len(x.shape), 0, []
    for part in out:
        parts.append(b.slice(x, dim, begin, part.shape[dim]))
        begin += part.shape[dim]
    return parts


def _unbind(b: Builder, out: tuple[Spec, ...], x: Value, dim: int = 0) -> list[Value]:
    return [_select(b, part, x, dim, index) for index, part in enumerate(out)]


def _pad(b: Builder, out: Spec, x: Value, pad: Sequence[int], value: float = 0) -> Value:
    made = x
    for index in range(len(pad) // 2):
        axis = len(x.shape) - 1 - index
        before, after = pad[2 * index], pad[2 * index + 1]
        first, last = max(-before, 0), made.shape[axis] - max(-after, 0)
        made = b.slice(made, axis, first, last - first)
        parts = [made]
        for position, count in ((0, before), (len(parts) + 1, after)):
            if count > 0:
                shape = (*made.shape[:axis], count, *made.shape[axis + 1 :])
                parts.insert(position, b.filled(value, x.dtype, shape))
        made = b.concat(parts, axis)
    return made


# ------------------------------------------------------------------------------------------------- slices and gathers
def _slice(
    b: Builder, out: Spec, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim %= len(x.shape)
    begin, _, _ = slice(start, end).indices(x.shape[dim])
    return b.slice(x, dim, begin, out.shape[dim], step)


def _slice_scatter(
    b: Builder,
    out: Spec,
    x: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    if step != 1:
        raise UnsupportedError("slice_scatter with a step")
    dim %= len(x.shape)
    size = x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    parts = [b.slice(x, dim, 0, first)] if first else []
    parts.append(b.cast(source, out.dtype))
    parts += [b.slice(x, dim, last, size - last)] if last < size else []
    return b.concat(parts, dim)


def _copy(b: Builder, out: Spec, x: Value, source: Value, non_blocking: bool = False) -> Value:
    return b.expand(b.cast(source, out.dtype), out.shape)


def _flip(b: Builder, out: Spec, x: Value, dims: Sequence[int]) -> Value:
    for dim in (dim % len(x.shape) for dim in dims):
        size = x.shape[dim]
        if size > 1:
            x = b.slice(x, dim, size - 1, size, -1)
    return x


def _select(b: Builder, out: Spec, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.shape)
    return b.reshape(b.slice(x, dim, index % x.shape[dim], 1), out.shape)


def _index(b: Builder, out: Spec, x: Value, indices: Sequence[Value | None]) -> Value:
    """One tensor of indices gathers rows; several beside each other gather one row of the joined dimensions."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    axes = [axis for axis, _ in given]
    if any(index.dtype not in (torch.int64, torch.int32) for _, index in given):
        raise UnsupportedError("indexing by a tensor that is not of integers")
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise UnsupportedError("indexing by several tensors that do not stand beside each other")
    sizes = [x.shape[axis] for axis in axes]
    flat = _wrapped(b, given[0][1], sizes[0])
    for (_, index), size in zip(given[1:], sizes[1:]):
        scaled = b.elementwise("PROD", b.cast(flat, torch.int64), size, torch.int64)
        flat = b.elementwise("SUM", scaled, b.cast(_wrapped(b, index, size), torch.int64), torch.int64)
    joined = (*x.shape[: axes[0]], int(np.prod(sizes)), *x.shape[axes[-1] + 1 :])
    return b.gather(b.reshape(x, joined), flat, axes[0])


def _wrapped(b: Builder, index: Value, size: int) -> Value:
    """Indices with negative ones counted from the end."""
    negative = b.elementwise("LESS", index, 0, index.dtype)
    return b.select(negative, b.elementwise("SUM", index, size, index.dtype), index)


def _index_select(b: Builder, out: Spec, x: Value, dim: int, index: Value) -> Value:
    return b.gather(x, index, dim)


def _embedding(b: Builder, out: Spec, weight: Value, ids: Value, *_: Any) -> Value:
    return b.gather(weight, ids, 0)


def _gather(b: Builder, out: Spec, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    dim %= len(x.shape)
    for axis, size in enumerate(index.shape):
        if axis != dim:
            x = b.slice(x, axis, 0, size)
    layer = b.layer("gather_v2", x.tensor, index.tensor, b.trt.GatherMode.ELEMENT)
    layer.axis = dim
    return b.value(layer, out.dtype)


def _scatter(b: Builder, out: Spec, x: Value, dim: int, index: Value, source: Operand) -> Value:
    if isinstance(source, Value):
        for axis, size in enumerate(index.shape):
            source = b.slice(source, axis, 0, size)
    else:
        source = b.filled(source, out.dtype, index.shape)
    layer = b.layer("scatter", x.tensor, index.tensor, source.tensor, b.trt.ScatterMode.ELEMENT)
    layer.axis = dim % len(x.shape)
    return b.value(layer, out.dtype)


def _one_hot(b: Builder, out: Spec, x: Value, num_classes: int = -1) -> Value:
    names = b.constant(range(out.shape[-1]), x.dtype)
    return b.cast(b.elementwise("EQUAL", b.reshape(x, (*x.shape, 1)), names, x.dtype), out.dtype)


def _triangle(keep: str) -> Emit:
    """Elements on one side of a diagonal, 0 elsewhere."""

    def write(b: Builder, out: Spec, x: Value, diagonal: int = 0) -> Value:
        rows, columns = x.shape[-2:]
        i = b.constant(np.arange(rows)[:, None] + diagonal, torch.int32)
        j = b.constant(np.arange(columns)[None, :], torch.int32)
        outside = b.elementwise(keep, j, i, torch.int32)
        return b.select(outside, b.constant(0, x.dtype, ()), x)

    return write


# -------------------------------------------------------------------------------------------------- tensors from sizes
def _full(b: Builder, out: Spec, size: Sequence[int], value: Operand, **_: Any) -> Value:
    return b.expand(b.cast(value, out.dtype), out.shape)


def _full_like(b: Builder, out: Spec, x: Value, value: Operand, **_: Any) -> Value:
    return b.expand(b.cast(value, out.dtype), out.shape)


def _new_full(b: Builder, out: Spec, x: Value, size: Sequence[int], value: Operand, **_: Any) -> Value:
    return b.expand(b.cast(value, out.dtype), out.shape)


def _make(value: float) -> Emit:
    return lambda b, out, *_, **__: b.filled(value, out.dtype, out.shape)


def _scalar_tensor(b: Builder, out: Spec, value: Operand, **_: Any) -> Value:
    return b.cast(value, out.dtype)


def _arange(b: Builder, out: Spec, *bounds: Operand, **_: Any) -> Value:
    if any(isinstance(item, Value) for item in bounds):
        raise UnsupportedError("arange to a computed bound")
    dtype = torch.float32 if out.dtype in HALF else out.dtype
    numbers = torch.arange(*bounds, dtype=dtype).numpy()  # type: ignore[arg-type]
    return b.constant(numbers, out.dtype)


SHAPE_OPERATORS: dict[str, Emit] = {
    **each_name(_reshape, "reshape.default", "view.default", "_unsafe_view.default", "view_copy.default"),
    **each_name(_reshape, "flatten.using_ints", "unflatten.int", "view_as.default", "reshape_as.default"),
    **each_name(_reshape, "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims"),
    **each_name(_transpose, "transpose.int"),
    **each_name(_swap_last, "t.default", "mT.default"),
    **each_name(_permute, "permute.default"),
    **each_name(_expand, "expand.default", "expand_as.default"),
    **each_name(_repeat, "repeat.default", "tile.default"),
    **each_name(_repeat_interleave, "repeat_interleave.self_int"),
    **each_name(_concat, "cat.default", "concat.default"),
    **each_name(_stack, "stack.default"),
    **each_name(_split, "split.Tensor", "split.sizes", "split_with_sizes.default", "chunk.default"),
    **each_name(_unbind, "unbind.int"),
    **each_name(_pad, "constant_pad_nd.default"),
    **each_name(_slice, "slice.Tensor"),
    **each_name(_slice_scatter, "slice_scatter.default"),
    **each_name(_copy, "copy.default"),
    **each_name(_flip, "flip.default"),
    **each_name(_select, "select.int"),
    **each_name(_index, "index.Tensor"),
    **each_name(_index_select, "index_select.default"),
    **each_name(_embedding, "embedding.default"),
    **each_name(_gather, "gather.default"),
    **each_name(_scatter, "scatter.value", "scatter.src"),
    **each_name(_one_hot, "one_hot.default"),
    **each_name(_triangle("GREATER"), "tril.default"),
    **each_name(_triangle("LESS"), "triu.default"),
    **each_name(_full, "full.default"),
    **each_name(_new_full, "new_full.default"),
    **each_name(_full_like, "full_like.default"),
    **each_name(_make(0), "zeros.default", "empty.memory_format", "new_zeros.default", "new_empty.default"),
    **each_name(_make(0), "zeros_like.default", "empty_like.default"),
    **each_name(_make(1), "ones.default", "new_ones.default", "ones_like.default"),
    **each_name(_scalar_tensor, "scalar_tensor.default"),
    **each_name(_arange, "arange.default", "arange.start", "arange.start_step"),
}
"""Operator names to the functions that emit them."""
