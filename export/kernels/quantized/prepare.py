"""Compiles what quantized layers need before a CUDA graph is captured, which cannot be done while a kernel is compiled."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ....graph.linear_format import LinearFormat, part_shapes
from .linear import quantized_linear

ROW_CLASSES = (1, 2, 32, 64, 65, 128, 256, 513, 2049)
"""Numbers of rows between which no other kernel is compiled."""
_WORKERS = 4


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's weight [n, k] in a format, and whether there is a bias and a scale for its input."""

    n: int
    k: int
    format: str
    bias: bool = False
    x_scale: bool = False


def prepare(layers: Iterable[QuantizedLayer], dtype: torch.dtype, device: torch.device) -> int:
    """Runs each layer once for each class of rows, on zeros. dtype: of x. Returns how many products were run."""

    def build(layer: QuantizedLayer) -> None:
        shapes = part_shapes(LinearFormat.parse(layer.format), (layer.n, layer.k))
        parts = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
        bias = torch.zeros(layer.n, dtype=dtype, device=device) if layer.bias else None
        x_scale = torch.ones((), device=device) if layer.x_scale else None
        for rows in ROW_CLASSES:
            x = torch.zeros((rows, layer.k), dtype=dtype, device=device)
            quantized_linear(
                x, parts["values"], parts["scale"], parts.get("zero_point"), parts.get("global_scale"), bias, x_scale,
                layer.format,
            )  # fmt: skip

    distinct = list(dict.fromkeys(layers))
    with ThreadPoolExecutor(
        _WORKERS if device.type == "cuda" else 1
    ) as pool:  # the interpreter runs one kernel at a time
        for begun in [pool.submit(build, layer) for layer in distinct]:
            begun.result()
    return len(distinct) * len(ROW_CLASSES)
