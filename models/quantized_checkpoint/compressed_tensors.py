"""compressed-tensors, as llm-compressor writes it: groups of layers, each with its own scheme of weights and activations.

    format                 tensors of a layer
    float-quantized        weight float8_e4m3fn [N, K], weight_scale [1], [N, 1] or [N / 128, K / 128], input_scale [1]
    int-quantized          weight int8 [N, K], weight_scale [N, 1] or [N, K / g], weight_zero_point int8, input_scale [1]
    naive-quantized        either of the two
    pack-quantized         weight_packed int32 [N, K bits / 32], value + 2^(bits - 1), the first in the lowest bits;
                           weight_shape [2]; weight_scale [N, K / g]; weight_zero_point int32 [N bits / 32, K / g], packed along N;
                           weight_g_idx int32 [K]
    nvfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16], weight_global_scale [1] and
                           input_global_scale [1], which both divide
    mxfp4-pack-quantized   weight_packed uint8 [N, K / 2], weight_scale uint8 (e8m0) [N, K / 32]
    mxfp8-quantized        weight float8_e4m3fn [N, K], weight_scale uint8 (e8m0) [N, K / 32]

A layer belongs to the group that names it, then to one with a matching "re:" pattern, then to one of all "Linear" layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...graph.linear_format import Activations, LinearFormat
from ...graph.stored_weight import StoredPart, StoredWeight
from ...graph.weights import Weight, make_weight
from .layers import (
    FLOATS,
    byte_modules,
    column_order,
    fitting,
    float4_layer,
    fp8_layer,
    group_length,
    input_scale,
    integer_values,
    matrix_shape,
    mxfp8_layer,
    stored_layer,
)
from .packing import unpack_words
from .settings import Settings
from .tensors import Tensors

FORMATS = (
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
_ACTIVATIONS: dict[tuple[str, int, str, Any], Activations] = {
    ("float", 8, "token", True): "fp8",
    ("float", 8, "tensor", True): "fp8",
    ("float", 8, "tensor", False): "fp8_static",
    ("int", 8, "token", True): "int8",
    ("int", 8, "tensor", True): "int8",
    ("int", 8, "tensor", False): "int8_static",
}
"""(type, num_bits, strategy, dynamic) of activations without groups."""
_GROUPED: dict[tuple[str, int, int], Activations] = {
    ("float", 8, 128): "fp8_block",
    ("float", 8, 32): "mxfp8",
    ("float", 4, 16): "nvfp4",
    ("float", 4, 32): "mxfp4",
}
"""(type, num_bits, group_size) of activations with groups; their scales are made in each step."""


@dataclass(frozen=True)
class _Group:
    """One of config_groups."""

    name: str
    settings: Settings
    targets: tuple[str, ...]
    format: str
    weights: dict[str, Any]
    activations: Activations

    def rank(self, module: str) -> int | None:
        """How closely the group names a layer: 0 by name, 1 by pattern, 2 by class; None: not at all."""
        ranks = [
            0 if target == module else 1 if target.startswith("re:") else 2
            for target in self.targets
            if target in (module, "Linear") or target.startswith("re:") and re.match(target[3:], module)
        ]
        return min(ranks, default=None)

    def error(self, what: str) -> ValueError:
        return self.settings.error(f"config_groups.{self.name}: {what}")


def read(settings: Settings, tensors: Tensors, notes: list[str]) -> dict[str, Weight]:
    """The layers of a compressed-tensors checkpoint by the names of their weights. Raises ValueError for what is not above."""
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise settings.error(f"sparsity_config.format is {sparsity!r}, allowed: 'dense'")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise settings.error(
            "transform_config asks for transforms of activations, which are not applied; allowed: none"
        )
    groups = [_group(settings, name, dict(facts)) for name, facts in settings.get("config_groups", {}).items()]
    if settings.get("kv_cache_scheme"):
        notes.append(
            "compressed-tensors: kv_cache_scheme is ignored; kv_cache_dtype decides how keys and values are stored"
        )
    modules = dict.fromkeys(
        [*tensors.modules("weight_packed"), *tensors.modules("weight_scale"), *byte_modules(tensors)]
    )
    return {
        f"{module}.weight": _layer(tensors, module, _group_of(settings, groups, module)).dense() for module in modules
    }


def _group(settings: Settings, name: str, facts: dict[str, Any]) -> _Group:
    format = str(facts.get("format") or settings.get("format"))
    group = _Group(name, settings, tuple(facts.get("targets") or ()), format, facts.get("weights") or {}, "none")
    if format not in FORMATS:
        raise group.error(f"format is {format!r}, allowed: {', '.join(FORMATS)}")
    if facts.get("output_activations"):
        raise group.error("output_activations are quantized, allowed: null")
    given = facts.get("input_activations")
    if not given:
        return group
    if not given.get("symmetric", True):
        raise group.error("input_activations are asymmetric, allowed: symmetric")
    kind, bits, dynamic = given.get("type", "int"), given.get("num_bits", 8), given.get("dynamic", False)
    strategy = given.get("strategy") or ("token" if dynamic else "tensor")
    if strategy in ("group", "tensor_group"):
        activations = _GROUPED.get((kind, bits, given.get("group_size") or 0)) if dynamic else None
    else:
        activations = _ACTIVATIONS.get((kind, bits, strategy, dynamic))
    if activations is None:
        raise group.error(
            f"input_activations are {kind}{bits} by {strategy}, group_size {given.get('group_size')}, dynamic {dynamic}; "
            "allowed: fp8 and int8 by token (dynamic) or tensor, fp8 in dynamic groups of 128, nvfp4, mxfp4, mxfp8"
        )
    return _Group(name, settings, group.targets, format, group.weights, activations)


def _group_of(settings: Settings, groups: list[_Group], module: str) -> _Group:
    ranked = [(rank, group) for group in groups if (rank := group.rank(module)) is not None]
    if not ranked:
        targets = sorted({target for group in groups for target in group.targets})
        raise settings.error(
            f"layer {module!r} is stored quantized and no group targets it; targets: {', '.join(targets) or 'none'}"
        )
    return min(ranked, key=lambda pair: pair[0])[1]


def _layer(tensors: Tensors, module: str, group: _Group) -> StoredWeight:
    kind, bits = group.weights.get("type", "int"), group.weights.get("num_bits", 8)
    strategy, size = group.weights.get("strategy"), group.weights.get("group_size") or 0
    tensors.skip(f"{module}.input_zero_point")
    if kind == "int" and group.format == "pack-quantized" and bits in (4, 8):
        return _packed(tensors, module, group, bits)
    if kind == "int" and group.format in ("int-quantized", "naive-quantized"):
        return _int8(tensors, module, group)
    if kind == "float" and bits == 4 and size in (16, 32):
        mx = size == 32
        format = LinearFormat(weights="mxfp4" if mx else "nvfp4", activations=group.activations)
        names = {} if mx else {"global_name": "weight_global_scale", "input_name": "input_global_scale"}
        return float4_layer(tensors, module, format, values="weight_packed", inverted=True, **names)
    if kind == "float" and bits == 8 and size == 32:
        return mxfp8_layer(tensors, module, group.activations)
    lengths = {"tensor": -1, "channel": 0, "block": 128, "group": size}
    if kind == "float" and bits == 8 and strategy in lengths:
        blocks = group.weights.get("block_structure")
        if strategy == "block" and list(blocks or ()) != [128, 128]:
            raise group.error(f"block_structure is {blocks}, allowed: [128, 128]")
        tensors.skip(f"{module}.weight_zero_point")
        return fp8_layer(
            tensors,
            module,
            scale="weight_scale",
            group=lengths[strategy],
            block=strategy == "block",
            activations=group.activations,
        )
    raise group.error(
        f"weights are {kind}{bits} by {strategy}, group_size {size or None}, format {group.format}; "
        "allowed: fp8 by tensor, channel or block, int8, int4 and int8 packed, nvfp4, mxfp4, mxfp8"
    )


def _packed(tensors: Tensors, module: str, group: _Group, bits: int) -> StoredWeight:
    """Integers in 32-bit words along K."""
    name = f"{module}.weight_packed"
    words = tensors.take(name, dtypes=(torch.int32,), meaning="packed values")
    stored = tensors.take(f"{module}.weight_shape", shape=(2,), meaning="N and K")
    rows, dim = (int(size) for size in stored.load())
    if words.shape != (rows, -(-dim * bits // 32)):
        raise ValueError(
            f"{tensors.where(name)}: {name!r} has shape {list(words.shape)}, allowed for weight_shape "
            f"[{rows}, {dim}] in {bits} bits: [{rows}, {-(-dim * bits // 32)}]"
        )
    shape = rows, dim
    by_group = group.weights.get("strategy") == "group"
    length = group_length(tensors, name, shape, group.weights.get("group_size") or 0) if by_group else 0
    groups = dim // length if length else 1
    zero_point = not group.weights.get("symmetric", True)
    format = LinearFormat(
        weights="int4" if bits == 4 else "int8", group=length, zero_point=zero_point, activations=group.activations
    )
    order, print = column_order(tensors, f"{module}.weight_g_idx", dim, groups)
    scale = tensors.take(f"{module}.weight_scale", dtypes=FLOATS, meaning="scales of its values")
    unpack = partial(_unpack, bits=bits, size=dim)
    parts: dict[StoredPart, Weight] = {
        "values": integer_values(words, unpack, format, shape, order),
        "scale": fitting(tensors, f"{module}.weight_scale", scale, format, shape),
    }
    if zero_point:
        size = shape[:1] if not length else (rows, groups)
        zeros = tensors.take(
            f"{module}.weight_zero_point",
            shape=(-(-rows * bits // 32), groups),
            dtypes=(torch.int32,),
            meaning="packed zero points",
        )
        parts["zero_point"] = make_weight(
            [zeros],
            lambda made: _unpack(next(made).t(), bits, rows).t().reshape(size).contiguous(),
            size,
            torch.uint8,
        )
    if order is not None:
        parts["order"] = order
    return stored_layer(format, shape, _with_input(tensors, module, format, parts), print)


def _unpack(words: Tensor, bits: int, size: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, size]: the last word may be filled up."""
    return unpack_words(words, bits)[:, :size]


def _int8(tensors: Tensors, module: str, group: _Group) -> StoredWeight:
    """Integers of up to 8 bits, one in a byte."""
    name = f"{module}.weight"
    values = tensors.take(name, dtypes=(torch.int8,), meaning="int8 values")
    shape = matrix_shape(tensors, name)
    by_group = group.weights.get("strategy") == "group"
    length = group_length(tensors, name, shape, group.weights.get("group_size") or 0) if by_group else 0
    zero_point = not group.weights.get("symmetric", True)
    format = LinearFormat(weights="int8", group=length, zero_point=zero_point, activations=group.activations)
    scale = tensors.take(f"{module}.weight_scale", dtypes=FLOATS, meaning="scales of its values")
    parts: dict[StoredPart, Weight] = {
        "values": values,
        "scale": fitting(tensors, f"{module}.weight_scale", scale, format, shape),
    }
    if zero_point:
        zeros = tensors.take(f"{module}.weight_zero_point", dtypes=(torch.int8,), meaning="zero points of its values")
        wide = fitting(tensors, f"{module}.weight_zero_point", zeros, format, shape)
        parts["zero_point"] = make_weight([wide], _unsigned, wide.shape, torch.uint8)
    else:
        tensors.skip(f"{module}.weight_zero_point")
    return stored_layer(format, shape, _with_input(tensors, module, format, parts))


def _unsigned(parts: Iterator[Tensor]) -> Tensor:
    """Signed zero points, as values are stored unsigned."""
    return (next(parts) + 128).to(torch.uint8)


def _with_input(
    tensors: Tensors, module: str, format: LinearFormat, parts: dict[StoredPart, Weight]
) -> dict[StoredPart, Weight]:
    if format.activations == "int8_static":
        return {**parts, "input_scale": input_scale(tensors, f"{module}.input_scale")}
    return parts
