"""What the schemes share: groups along K, the order of columns, scales, and the stored weight that comes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...graph.linear_format import Activations, LinearFormat, scale_shape
from ...graph.stored_weight import StoredPart, StoredWeight
from ...graph.weights import Weight, make_weight
from .packing import stored_integers
from .tensors import Tensors, as_float, fingerprint, inverse

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (*FLOATS, torch.float8_e8m0fnu)
"""What scales are stored in."""
FP8 = (torch.float8_e4m3fn,)


def stored_layer(
    format: LinearFormat, shape: tuple[int, int], parts: Mapping[StoredPart, Weight], order: str | None = None
) -> StoredWeight:
    """A stored weight; scales of the whole matrix are read to tell whether it can be joined with others.

    order: the fingerprint of `parts["order"]`, where there is one.
    """
    alone: tuple[StoredPart, ...] = ("global_scale", "input_scale")
    equal: dict[str, str] = {name: fingerprint(parts[name]) for name in alone if name in parts}
    return StoredWeight(format, shape, parts, equal if order is None else {**equal, "order": order})


def group_length(tensors: Tensors, name: str, shape: tuple[int, int], group: int) -> int:
    """`group_size` as LinearFormat has it: 0 where a row has one scale. Raises ValueError where groups do not divide K.

    name: a tensor of the layer; shape: [N, K].
    """
    dim = shape[1]
    if group in (-1, 0, dim):
        return 0
    if group < 0 or dim % group:
        raise ValueError(
            f"{tensors.where(name)}: {name!r} is of a layer {shape[0]} x {dim}, and group_size {group} does not divide its {dim} "
            "columns; group_size of quantization_config and the checkpoint do not belong together"
        )
    return group


def groups_first(weight: Weight, shape: tuple[int, int], by_row: bool) -> Weight:
    """Scales stored as [K / g, N] as float32 [N, K / g], or [N] where a row has one."""
    size = shape[:1] if by_row else shape
    return make_weight([weight], lambda parts: next(parts).float().t().reshape(size).contiguous(), size, torch.float32)


def column_order(tensors: Tensors, name: str, dim: int, groups: int) -> tuple[Weight | None, str | None]:
    """(order int64 [K], its fingerprint) by which columns of one group come next to each other, from the group of each column.

    (None, None) where they do already, or `name` is not stored. It is read. Raises ValueError where groups differ in size.
    """
    if name not in tensors:
        return None, None
    stored = tensors.take(name, shape=(dim,), meaning="the group of each column")
    index = stored.load().long()
    expected = torch.arange(dim) // (dim // groups)
    if torch.equal(index, expected):
        return None, None
    if not torch.equal(index.sort().values, expected):
        raise ValueError(
            f"{tensors.where(name)}: {name!r} puts {dim} columns in groups of other sizes than {dim // groups}; quantize the "
            "model again with groups of one size"
        )
    order = make_weight(
        [stored], lambda parts: next(parts).argsort(stable=True), (dim,), torch.int64
    )  # equal keys keep their order, so the same on every device
    return order, fingerprint(stored)


def integer_values(
    words: Weight, unpack: Any, format: LinearFormat, shape: tuple[int, int], order: Weight | None
) -> Weight:
    """The stored form of integers that `unpack` makes uint8 [N, K] of, with its columns in `order`."""
    bits = 4 if format.weights == "int4" else 8
    signed = not format.zero_point

    def make(parts: Iterator[Tensor]) -> Tensor:
        values = unpack(next(parts))
        columns = next(parts, None)
        return stored_integers(values if columns is None else values[:, columns], bits, signed)

    size, dtype = ((shape[0], shape[1] // 2), torch.uint8) if bits == 4 else (shape, torch.int8)
    return make_weight([words] if order is None else [words, order], make, size, dtype)


def fp8_layer(
    tensors: Tensors, module: str, *, scale: str, group: int, activations: Activations, block: bool = False
) -> StoredWeight:
    """An fp8 matrix `module.weight` with scales `module.scale`; group, block: as LinearFormat has them.

    A scale of the whole matrix is spread over its rows where activations have one for each token. Raises ValueError.
    """
    name = f"{module}.weight"
    values = tensors.take(name, dtypes=FP8, meaning="fp8 values")
    shape = matrix_shape(tensors, name)
    if group == -1 and activations != "fp8_static":
        group = 0
    format = LinearFormat(weights="fp8", group=group, block=block, activations=activations)
    stored = tensors.take(f"{module}.{scale}", dtypes=SCALES, meaning="the scale of its fp8 values")
    parts: dict[StoredPart, Weight] = {
        "values": values,
        "scale": fitting(tensors, f"{module}.{scale}", stored, format, shape),
    }
    if activations == "fp8_static":
        parts["input_scale"] = input_scale(tensors, f"{module}.input_scale")
    else:
        tensors.skip(f"{module}.input_scale")
    return stored_layer(format, shape, parts)


def input_scale(tensors: Tensors, name: str, *, inverted: bool = False) -> Weight:
    """The static scale of a layer's input, float32 []; inverted: 1 / it is stored."""
    return _single(tensors, name, "the static scale of the layer's input", inverted)


def global_scale(tensors: Tensors, name: str, *, inverted: bool = False) -> Weight:
    """The scale of block scales, float32 []; inverted: 1 / it is stored."""
    return _single(tensors, name, "the scale of the block scales", inverted)


def _single(tensors: Tensors, name: str, meaning: str, inverted: bool) -> Weight:
    stored = tensors.take(name, dtypes=FLOATS, meaning=meaning)
    if any(size != 1 for size in stored.shape):
        raise ValueError(
            f"{tensors.where(name)}: {name!r} ({meaning}) has shape {list(stored.shape)}, allowed: one value"
        )
    return inverse(stored) if inverted else as_float(stored, ())


def fitting(tensors: Tensors, name: str, stored: Weight, format: LinearFormat, shape: tuple[int, int]) -> Weight:
    """Scales in float32 of the shape that the format has; sizes of one more or less are taken. Raises ValueError."""
    wanted = scale_shape(format, shape)
    sizes = [size for size in stored.shape if size != 1]
    if sizes and sizes != [size for size in wanted if size != 1]:
        raise ValueError(
            f"{tensors.where(name)}: {name!r} has shape {list(stored.shape)}, allowed for a weight {list(shape)} in "
            f"{format.weights_text}: {list(wanted)}"
        )
    return as_float(stored, wanted)


def float4_layer(
    tensors: Tensors,
    module: str,
    format: LinearFormat,
    *,
    values: str,
    global_name: str | None = None,
    input_name: str | None = None,
    inverted: bool = False,
) -> StoredWeight:
    """A matrix of e2m1 values (nvfp4, mxfp4), packed as graph.linear_format has it, with scales `module.weight_scale` of blocks.

    values, global_name, input_name: the other tensors' names in the module; inverted: of the last two 1 / the scale is stored.
    Raises ValueError.
    """
    name = f"{module}.{values}"
    packed = tensors.take(name, dtypes=(torch.uint8,), meaning="packed e2m1 values")
    rows, halves = matrix_shape(tensors, name)
    shape = rows, halves * 2
    group_length(tensors, name, shape, format.group)
    scale_dtype = torch.float8_e4m3fn if format.weights == "nvfp4" else torch.uint8
    scale = tensors.take(
        f"{module}.weight_scale", shape=scale_shape(format, shape), dtypes=(scale_dtype,), meaning="scales of blocks"
    )
    parts: dict[StoredPart, Weight] = {"values": packed, "scale": scale}
    if global_name is not None:
        parts["global_scale"] = global_scale(tensors, f"{module}.{global_name}", inverted=inverted)
    if input_name is not None and format.activations == "nvfp4":
        parts["input_scale"] = input_scale(tensors, f"{module}.{input_name}", inverted=inverted)
    elif input_name is not None:
        tensors.skip(f"{module}.{input_name}")
    return stored_layer(format, shape, parts)


def mxfp8_layer(tensors: Tensors, module: str, activations: Activations) -> StoredWeight:
    """An fp8 matrix `module.weight` with e8m0 scales `module.weight_scale` of blocks of 32 along K. Raises ValueError."""
    name = f"{module}.weight"
    format = LinearFormat(weights="mxfp8", activations=activations)
    values = tensors.take(name, dtypes=FP8, meaning="fp8 values")
    shape = matrix_shape(tensors, name)
    group_length(tensors, name, shape, format.group)
    scale = tensors.take(
        f"{module}.weight_scale",
        shape=scale_shape(format, shape),
        dtypes=(torch.uint8,),
        meaning="e8m0 scales of blocks",
    )
    return stored_layer(format, shape, {"values": values, "scale": scale})


def byte_modules(tensors: Tensors) -> list[str]:
    """Modules whose weight is stored in one byte an element: where a scale is missing, that is said, and no layer is lost."""
    stored = (*FP8, torch.int8, torch.uint8)
    return [module for module in tensors.modules("weight") if tensors[f"{module}.weight"].dtype in stored]


def matrix_shape(tensors: Tensors, name: str) -> tuple[int, int]:
    """[N, K] of a tensor that must be a matrix. Raises ValueError."""
    shape = tensors[name].shape
    if len(shape) != 2:
        raise ValueError(
            f"{tensors.where(name)}: {name!r} has shape {list(shape)}; a linear layer's weight is a matrix [N, K]"
        )
    return shape[0], shape[1]
