"""GPTQ, as AutoGPTQ and GPTQModel write it (Frantar et al. 2023, ICLR): 4 or 8 bits, with columns in another order at will.

    qweight  int32 [K bits / 32, N]      along K, the first value in the lowest bits
    qzeros   int32 [K / g, N bits / 32]  along N; format "gptq" stores zero - 1, "gptq_v2" the zero itself
    scales   float16 [K / g, N]          w = (value - zero) * scale
    g_idx    int32 [K]                   the group of each column (desc_act), or none

Columns of a group are brought next to each other, and the input's columns are gathered in that order. Symmetric weights
(sym) have the middle for a zero, which is checked, and are stored without zero points.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...graph.linear_format import LinearFormat
from ...graph.stored_weight import StoredPart
from ...graph.weights import Weight, make_weight
from .layers import FLOATS, column_order, group_length, integer_values, matrix_shape, stored_layer
from .packing import unpack_words
from .settings import Settings
from .tensors import Tensors

BITS = (4, 8)


def read(settings: Settings, tensors: Tensors, notes: list[str]) -> dict[str, Weight]:
    """The layers of a GPTQ checkpoint by the names of their weights. Raises ValueError for other bits or packings."""
    if settings.get("is_marlin_format", False):
        raise settings.error("the checkpoint is packed for Marlin, allowed: checkpoint_format 'gptq' or 'gptq_v2'")
    packing = "checkpoint_format" if settings.get("checkpoint_format") else "format"
    offset = 1 if settings.one_of(packing, ("gptq", "gptq_v2"), "gptq") == "gptq" else 0
    return {
        f"{module}.weight": _layer(tensors, module, _of_module(settings, module), offset)
        for module in tensors.modules("qweight")
    }


def _of_module(settings: Settings, module: str) -> Settings:
    """The settings of one layer: `dynamic` maps patterns of names to what differs ("-:" excludes, "+:" or nothing changes)."""
    changes: dict[str, Any] = {}
    for pattern, change in settings.get("dynamic", {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
            changes = change
            break
    return Settings(settings.file, {**settings.facts, **changes})


def _layer(tensors: Tensors, module: str, settings: Settings, offset: int) -> Weight:
    bits = settings.one_of("bits", BITS, 4)
    symmetric = settings.one_of("sym", (True, False), False)
    name = f"{module}.qweight"
    words = tensors.take(name, dtypes=(torch.int32,), meaning="packed values")
    packed, rows = matrix_shape(tensors, name)
    shape = rows, packed * 32 // bits
    group = group_length(tensors, name, shape, settings.integer("group_size", 128))
    groups = shape[1] // group if group else 1
    scales = tensors.take(f"{module}.scales", shape=(groups, rows), dtypes=FLOATS, meaning="scales of groups")
    zeros = tensors.take(
        f"{module}.qzeros", shape=(groups, rows * bits // 32), dtypes=(torch.int32,), meaning="packed zero points"
    )
    order, print = column_order(tensors, f"{module}.g_idx", shape[1], groups)
    format = LinearFormat(weights="int4" if bits == 4 else "int8", group=group, zero_point=not symmetric)
    size = shape[:1] if not group else (rows, groups)
    parts: dict[StoredPart, Weight] = {
        "values": integer_values(words, partial(_unpack_values, bits=bits), format, shape, order),
        "scale": make_weight(
            [scales, *([zeros] if symmetric else [])],
            partial(_scales, size=size, bits=bits, offset=offset, name=f"{tensors.where(name)}: {module}.qzeros"),
            size,
            torch.float32,
        ),
    }
    if not symmetric:
        parts["zero_point"] = make_weight(
            [zeros], lambda made: _zeros(next(made), bits, offset).reshape(size), size, torch.uint8
        )
    if order is not None:
        parts["order"] = order
    return stored_layer(format, shape, parts, print).dense()


def _unpack_values(words: Tensor, bits: int) -> Tensor:
    """int32 [K bits / 32, N] -> uint8 [N, K]."""
    return unpack_words(words.t(), bits)


def _zeros(words: Tensor, bits: int, offset: int) -> Tensor:
    """int32 [G, N bits / 32] -> uint8 [N, G], with what the format subtracts added again."""
    return ((unpack_words(words, bits) + offset) & (2**bits - 1)).t().contiguous()


def _scales(parts: Iterator[Tensor], size: tuple[int, ...], bits: int, offset: int, name: str) -> Tensor:
    """float32 [N, G] or [N]. Raises ValueError where zero points follow that are not the middle."""
    scale = next(parts).float().t().reshape(size).contiguous()
    words = next(parts, None)
    if words is not None:
        found = _zeros(words, bits, offset)
        if bool((found != 2 ** (bits - 1)).any()):
            raise ValueError(
                f"{name}: zero points from {int(found.min())} to {int(found.max())}, and quantization_config says sym, for which "
                f"they are all {2 ** (bits - 1)}; set sym to false there, or checkpoint_format to what wrote it"
            )
    return scale
