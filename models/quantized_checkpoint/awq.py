"""AutoAWQ, GEMM packing: activation-aware weight quantization to 4 bits (Lin et al. 2024, MLSys; the channel scales are folded in).

qweight  int32 [K, N / 8]        columns 0, 2, 4, 6, 1, 3, 5, 7 of each eight from the lowest bits on; 0 to 15
qzeros   int32 [K / g, N / 8]    packed likewise
scales   float16 [K / g, N]      w = (value - zero) * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.linear_format import LinearFormat
from ...graph.weights import Weight, make_weight
from .layers import FLOATS, group_length, groups_first, integer_values, matrix_shape, stored_layer
from .packing import unpack_words
from .settings import Settings
from .tensors import Tensors

_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word each of eight columns lies."""


def read(settings: Settings, tensors: Tensors, notes: list[str]) -> dict[str, Weight]:
    """The layers of an AutoAWQ checkpoint by the names of their weights. Raises ValueError for another packing."""
    settings.one_of("bits", (4,), settings.get("w_bit", 4))
    settings.one_of("version", ("gemm",), settings.get("format", "gemm"))
    group = settings.integer("group_size", settings.get("q_group_size", 128))
    return {f"{module}.weight": _layer(tensors, module, group) for module in tensors.modules("qweight")}


def _layer(tensors: Tensors, module: str, group_size: int) -> Weight:
    name = f"{module}.qweight"
    words = tensors.take(name, dtypes=(torch.int32,), meaning="packed values")
    dim, rows = matrix_shape(tensors, name)
    shape = rows * 8, dim
    group = group_length(tensors, name, shape, group_size)
    groups = dim // group if group else 1
    format = LinearFormat(weights="int4", group=group, zero_point=True)
    zeros = tensors.take(f"{module}.qzeros", shape=(groups, rows), dtypes=(torch.int32,), meaning="packed zero points")
    scales = tensors.take(f"{module}.scales", shape=(groups, shape[0]), dtypes=FLOATS, meaning="scales of groups")
    size = shape[:1] if not group else (shape[0], groups)
    zero_point = make_weight([zeros], lambda parts: unpack(next(parts)).reshape(size), size, torch.uint8)
    values = integer_values(words, unpack, format, shape, None)
    scale = groups_first(scales, (shape[0], groups), not group)
    return stored_layer(format, shape, {"values": values, "scale": scale, "zero_point": zero_point}).dense()


def unpack(words: Tensor) -> Tensor:
    """int32 [R, N / 8] -> uint8 [N, R]."""
    columns = unpack_words(words, 4).unflatten(-1, (-1, 8))[..., _POSITIONS].flatten(-2)
    return columns.t().contiguous()
