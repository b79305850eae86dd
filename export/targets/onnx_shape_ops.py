"""The table of operators for ONNX, third part: layouts, slices, gathers, sorting, and tensors made of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..emitter import UnsupportedError, each_name
from .onnx_graph import Builder, Emit, Operand, Size, Value

_MAX = 2**63 - 1


# ------------------------------------------------------------------------------------------------------------ layouts
def _reshape(b: Builder, out: Value, x: Value, shape: Sequence[int | Size]) -> str:
    return x.name if x.shape == out.shape and x.shape.count(None) <= 1 else b.reshape(x, out.shape, shape)


def _flatten(b: Builder, out: Value, x: Value, *_: Any) -> str:
    return x.name if x.shape == out.shape else b.reshape(x, out.shape)


def _transpose(b: Builder, out: Value, x: Value, first: int, second: int) -> str:
    axes = list(range(len(x.shape)))
    axes[first], axes[second] = axes[second], axes[first]
    return b.op("Transpose", x, perm=axes)


def _swap_last(b: Builder, out: Value, x: Value) -> str:
    return x.name if len(x.shape) < 2 else _transpose(b, out, x, -2, -1)


def _permute(b: Builder, out: Value, x: Value, dims: Sequence[int]) -> str:
    return b.op("Transpose", x, perm=[dim % len(x.shape) for dim in dims])


def _unsqueeze(b: Builder, out: Value, x: Value, dim: int) -> str:
    return b.op("Unsqueeze", x, b.ints(dim))


def _squeeze(b: Builder, out: Value, x: Value, dim: Any = None) -> str:
    dims = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = [axis % len(x.shape) for axis in dims if x.shape[axis] == 1]
    return b.op("Squeeze", x, b.ints(*axes)) if axes else x.name


def _expand(b: Builder, out: Value, x: Value, sizes: Sequence[int | Size], implicit: bool = False) -> str:
    if x.shape == out.shape:
        return x.name
    missing = len(out.shape) - len(x.shape)
    wanted: list[int | Size] = []
    for axis, size in enumerate(sizes):
        old = x.shape[axis - missing] if axis >= missing else 1
        # ONNX broadcasts both ways: 1 keeps what is there
        wanted.append(size if old == 1 and size != -1 else 1)
    return b.op("Expand", x, b.sizes(wanted))


def _repeat(b: Builder, out: Value, x: Value, repeats: Sequence[int | Size]) -> str:
    missing = len(repeats) - len(x.shape)
    value = b.op("Unsqueeze", x, b.ints(*range(missing))) if missing else x.name
    return value if all(count == 1 for count in repeats) else b.op("Tile", value, b.sizes(repeats))


def _repeat_interleave(
    b: Builder, out: Value, x: Value, repeats: int, dim: int | None = None, output_size: Any = None
) -> str:
    if not isinstance(repeats, int):
        raise UnsupportedError("repeat_interleave with a number of repeats that varies")
    if dim is None:
        x, dim = Value(b.op("Reshape", x, b.ints(-1)), x.dtype, (None,)), 0
    dim %= len(x.shape)
    counts = [1] * (len(x.shape) + 1)
    counts[dim + 1] = repeats
    spread = b.op("Expand", b.op("Unsqueeze", x, b.ints(dim + 1)), b.ints(*counts))
    return b.reshape(spread, out.shape)


def _concat(b: Builder, out: Value, tensors: Sequence[Value], dim: int = 0) -> str:
    return b.op("Concat", *(b.cast(tensor, out.dtype) for tensor in tensors), axis=dim)


def _stack(b: Builder, out: Value, tensors: Sequence[Value], dim: int = 0) -> str:
    raised = [b.op("Unsqueeze", b.cast(tensor, out.dtype), b.ints(dim)) for tensor in tensors]
    return b.op("Concat", *raised, axis=dim)


def _split(b: Builder, out: tuple[Value, ...], x: Value, sizes: Any, dim: int = 0) -> list[str]:
    return _split_parts(b, out, x, dim)


def _split_parts(b: Builder, out: tuple[Value, ...], x: Value, dim: int) -> list[str]:
    parts = [part.shape[dim] for part in out]
    static = [part for part in parts if part is not None]
    if len(static) < len(parts):
        raise UnsupportedError("a split of a size that varies")
    return b.multi("Split", len(out), x, b.ints(*static), axis=dim)


def _unbind(b: Builder, out: tuple[Value, ...], x: Value, dim: int = 0) -> list[str]:
    return [b.op("Gather", x, b.constant(index, torch.int64), axis=dim) for index in range(len(out))]


def _pad(b: Builder, out: Value, x: Value, pad: Sequence[int], value: float = 0) -> str:
    if not all(isinstance(size, int) for size in pad):
        raise UnsupportedError("padding by a size that varies")
    num_axes = len(x.shape)
    begin, end = [0] * num_axes, [0] * num_axes
    for index in range(len(pad) // 2):
        begin[num_axes - 1 - index], end[num_axes - 1 - index] = pad[2 * index], pad[2 * index + 1]
    return b.op("Pad", x, b.ints(*begin, *end), b.constant(value, x.dtype))


# ------------------------------------------------------------------------------------------------- slices and gathers
def _slice(
    b: Builder,
    out: Value,
    x: Value,
    dim: int = 0,
    start: int | Size | None = None,
    end: int | Size | None = None,
    step: int = 1,
) -> str:
    begin, stop = 0 if start is None else start, _MAX if end is None else end
    if begin == 0 and stop == _MAX and step == 1:
        return x.name
    return _slice_from(b, x, dim, begin, stop, step)


def _slice_from(b: Builder, x: Value, dim: int, begin: int | Size, end: int | Size, step: int = 1) -> str:
    return b.op("Slice", x, b.sizes([begin]), b.sizes([end]), b.ints(dim), b.ints(step))


def _slice_scatter(
    b: Builder,
    out: Value,
    x: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    size = x.shape[dim]
    if size is None or step != 1 or isinstance(start, Size) or isinstance(end, Size):
        raise UnsupportedError("slice_scatter with a step or along a size that varies")
    first, last, _ = slice(start, end).indices(size)
    parts = [_slice_from(b, x, dim, 0, first)] if first else []
    parts.append(b.cast(source, out.dtype))
    parts += [_slice_from(b, x, dim, last, _MAX)] if last < size else []
    return b.op("Concat", *parts, axis=dim) if len(parts) > 1 else parts[0]


def _copy(b: Builder, out: Value, x: Value, source: Value, non_blocking: bool = False) -> str:
    if source.shape != out.shape:
        raise UnsupportedError("copy of another shape")
    return b.cast(source, out.dtype)


def _flip(b: Builder, out: Value, x: Value, dims: Sequence[int]) -> str:
    count = len(dims)
    return b.op("Slice", x, b.ints(*[-1] * count), b.ints(*[-_MAX] * count), b.ints(*dims), b.ints(*[-1] * count))


def _select(b: Builder, out: Value, x: Value, dim: int, index: int) -> str:
    if not isinstance(index, int):
        raise UnsupportedError("select at an index that varies")
    return b.op("Gather", x, b.constant(index, torch.int64), axis=dim)


def _index(b: Builder, out: Value, x: Value, indices: Sequence[Value | None]) -> str:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype not in (torch.int64, torch.int32):
        raise UnsupportedError("indexing other than by one tensor of integers")
    return b.op("Gather", x, given[0][1], axis=given[0][0])


def _index_select(b: Builder, out: Value, x: Value, dim: int, index: Value) -> str:
    return b.op("Gather", x, index, axis=dim)


def _embedding(b: Builder, out: Value, weight: Value, ids: Value, *_: Any) -> str:
    return b.op("Gather", weight, ids, axis=0)


def _gather(b: Builder, out: Value, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> str:
    return b.op("GatherElements", x, index, axis=dim)


def _scatter(reduction: str) -> Emit:
    def write(b: Builder, out: Value, x: Value, dim: int, index: Value, source: Operand) -> str:
        if isinstance(source, Value):
            if source.shape != index.shape:
                raise UnsupportedError("scatter of a source that is larger than its index")
            updates = b.cast(source, out.dtype)
        else:
            updates = b.op("Expand", b.constant(source, out.dtype), b.op("Shape", index))  # type: ignore[arg-type]
        return b.op("ScatterElements", x, index, updates, axis=dim, reduction=reduction)

    return write


def _one_hot(b: Builder, out: Value, x: Value, num_classes: int = -1) -> str:
    if not isinstance(num_classes, int) or num_classes < 0:
        raise UnsupportedError("one_hot without a fixed number of classes")
    return b.op("OneHot", x, b.constant(num_classes, torch.int64), b.ints(0, 1), axis=-1)


def _triangle(upper: int) -> Emit:
    return lambda b, out, x, diagonal=0: b.op("Trilu", x, b.constant(diagonal, torch.int64), upper=upper)


# ------------------------------------------------------------------------------------------------------------ sorting
def _topk(
    b: Builder,
    out: tuple[Value, Value],
    x: Value,
    k: int | Size,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> list[str]:
    return b.multi("TopK", 2, x, b.sizes([k]), axis=dim, largest=int(largest), sorted=1)


def _sort_pair(b: Builder, x: Value, dim: int, descending: bool) -> list[str]:
    axis = dim % len(x.shape)
    size = x.shape[axis]
    count = b.op("Shape", x, start=axis, end=axis + 1) if size is None else b.ints(size)
    return b.multi("TopK", 2, x, count, axis=dim, largest=int(descending), sorted=1)


def _sort(b: Builder, out: Any, x: Value, dim: int = -1, descending: bool = False) -> list[str]:
    return _sort_pair(b, x, dim, descending)


def _sort_stable(
    b: Builder, out: Any, x: Value, *, stable: Any = None, dim: int = -1, descending: bool = False
) -> list[str]:
    return _sort_pair(b, x, dim, descending)


def _argsort(b: Builder, out: Value, x: Value, dim: int = -1, descending: bool = False) -> str:
    return _sort_pair(b, x, dim, descending)[1]


def _argsort_stable(b: Builder, out: Value, x: Value, *, stable: bool, dim: int = -1, descending: bool = False) -> str:
    return _sort_pair(b, x, dim, descending)[1]


# -------------------------------------------------------------------------------------------------- tensors from sizes
def _filled(b: Builder, shape: str, value: float, dtype: torch.dtype) -> str:
    from onnx import helper

    kept = float(value) if dtype.is_floating_point else int(value)
    return b.op("ConstantOfShape", shape, value=helper.make_tensor("value", b.element_type(dtype), [1], [kept]))


def _full(b: Builder, out: Value, size: Sequence[int | Size], value: Operand, **_: Any) -> str:
    if isinstance(value, Value | Size):
        return b.op("Expand", b.cast(value, out.dtype), b.sizes(size))
    return _filled(b, b.sizes(size), value, out.dtype)


def _new_full(b: Builder, out: Value, x: Value, size: Sequence[int | Size], value: Operand, **_: Any) -> str:
    return _full(b, out, size, value)


def _make(value: float) -> Emit:
    return lambda b, out, size, **_: _filled(b, b.sizes(size), value, out.dtype)


def _make_new(value: float) -> Emit:
    return lambda b, out, x, size, **_: _filled(b, b.sizes(size), value, out.dtype)


def _make_like(value: float) -> Emit:
    return lambda b, out, x, **_: _full_like(b, out, x, value)


def _full_like(b: Builder, out: Value, x: Value, value: Operand, **_: Any) -> str:
    if isinstance(value, Value | Size):
        raise UnsupportedError("full_like of a computed value")
    static = [size for size in x.shape if size is not None]
    shape = b.ints(*static) if len(static) == len(x.shape) else b.op("Shape", x)
    return _filled(b, shape, value, out.dtype)


def _scalar_tensor(b: Builder, out: Value, value: Operand, **_: Any) -> str:
    return b.cast(value, out.dtype)


def _arange(b: Builder, out: Value, *bounds: Operand, **_: Any) -> str:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    return b.op("Range", *(b.cast(item, out.dtype) for item in (start, end, step)))


SHAPE_OPERATORS: dict[str, Emit] = {
    **each_name(_reshape, "reshape.default", "view.default", "_unsafe_view.default", "view_copy.default"),
    **each_name(_flatten, "flatten.using_ints", "unflatten.int"),
    **each_name(_transpose, "transpose.int"),
    **each_name(_swap_last, "t.default", "mT.default"),
    **each_name(_permute, "permute.default"),
    **each_name(_unsqueeze, "unsqueeze.default"),
    **each_name(_squeeze, "squeeze.default", "squeeze.dim", "squeeze.dims"),
    **each_name(_expand, "expand.default"),
    **each_name(lambda b, out, x, y: _flatten(b, out, x), "view_as.default", "reshape_as.default"),
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
    **each_name(_scatter("none"), "scatter.value", "scatter.src"),
    **each_name(_scatter("add"), "scatter_add.default"),
    **each_name(_one_hot, "one_hot.default"),
    **each_name(_triangle(0), "tril.default"),
    **each_name(_triangle(1), "triu.default"),
    **each_name(_topk, "topk.default"),
    **each_name(_sort, "sort.default"),
    **each_name(_sort_stable, "sort.stable"),
    **each_name(_argsort, "argsort.default"),
    **each_name(_argsort_stable, "argsort.stable"),
    **each_name(_full, "full.default"),
    **each_name(_new_full, "new_full.default"),
    **each_name(_full_like, "full_like.default"),
    **each_name(_make(0), "zeros.default", "empty.memory_format"),
    **each_name(_make(1), "ones.default"),
    **each_name(_make_new(0), "new_zeros.default", "new_empty.default"),
    **each_name(_make_new(1), "new_ones.default"),
    **each_name(_make_like(0), "zeros_like.default", "empty_like.default"),
    **each_name(_make_like(1), "ones_like.default"),
    **each_name(_scalar_tensor, "scalar_tensor.default"),
    **each_name(_arange, "arange.default", "arange.start", "arange.start_step"),
}
"""Operator names to the functions that write them."""
