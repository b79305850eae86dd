"""gpt-oss: experts in MXFP4 (OCP Microscaling Formats 1.0), all of a layer in one tensor.

    gate_up_proj_blocks  uint8 [E, N, K / 32, 16]    two e2m1 values in a byte, the first in the low half
    gate_up_proj_scales  uint8 [E, N, K / 32]        e8m0
    gate_up_proj         what they mean, [E, K, N]; down_proj likewise

camshaft::moe takes dense experts, so they are dequantized when they are loaded: to bfloat16, which holds every value of MXFP4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...graph.linear_format import LinearFormat
from ...graph.quant_formats import QuantizedWeight, dequantize_weight
from ...graph.weights import Weight, make_weight
from .settings import Settings
from .tensors import Tensors

_FORMAT = LinearFormat(weights="mxfp4")


def read(settings: Settings, tensors: Tensors, notes: list[str]) -> dict[str, Weight]:
    """Dense experts by name. Raises ValueError for missing scales, or shapes that are no blocks of 32."""
    names = [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]
    if names:
        notes.append(
            f"mxfp4: {len(names)} tensors of experts are dequantized when they are loaded: camshaft.moe has no quantized form"
        )
    return {name: _experts(tensors, name) for name in names}


def _experts(tensors: Tensors, name: str) -> Weight:
    blocks = tensors.take(f"{name}_blocks", dtypes=(torch.uint8,), meaning="packed values")
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16:
        raise ValueError(
            f"{tensors.where(name)}: '{name}_blocks' has shape {list(blocks.shape)}, allowed: [experts, N, K / 32, 16]"
        )
    experts, rows, groups, _ = blocks.shape
    scales = tensors.take(
        f"{name}_scales", shape=(experts, rows, groups), dtypes=(torch.uint8,), meaning="e8m0 scales of blocks"
    )

    def make(parts: Iterator[Tensor]) -> Tensor:
        values, scale = next(parts), next(parts)
        out = torch.empty((experts, groups * 32, rows), dtype=torch.bfloat16, device=values.device)
        for expert in range(experts):
            stored = QuantizedWeight(values[expert].flatten(1), scale[expert])
            out[expert] = dequantize_weight(stored, _FORMAT).t()
        return out

    return make_weight([blocks, scales], make, (experts, groups * 32, rows), torch.bfloat16)
