"""fp8/fp8, a scale per weight row and one per token: the operators that it becomes, and where it does not pay.

    y = linear(x, w, bias)      ->      xq, xs = camshaft.quantize_rows(x)
                                        y = camshaft.scaled_linear(xq, xs, w8, ws, bias, dtype)

`quantize_linear` writes them; `fuse_norm_quantize` and `fuse_glu_quantize` join quantize_rows with what makes x.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ..graph.program import Program
from .match import call

QUANTIZE_ROWS = torch.ops.camshaft.quantize_rows.default
SCALED_LINEAR = torch.ops.camshaft.scaled_linear.default

_MULTIPLE = 16
"""What N and K must be multiples of: matrix products of fp8 read 16 bytes at a time."""
MIN_WEIGHTS = 1 << 17
"""Elements of a weight from which fp8 pays: a GPU reads fewer of them, in 16 bits, in a tenth of a microsecond."""


def obstacle(weight_NK: Tensor) -> str | None:
    """Why a weight of fixed sizes stays as it is, or None."""
    if any(size % _MULTIPLE for size in weight_NK.shape):
        return f"a size is no multiple of {_MULTIPLE}"
    if weight_NK.numel() < MIN_WEIGHTS:
        return f"it has fewer than {MIN_WEIGHTS:,} weights"
    return None


def call_parts(program: Program, target: object, *args: object) -> tuple[fx.Node, ...]:
    """Adds a call that returns several tensors, and the nodes that take them out."""
    both = call(program, target, *args)
    parts = []
    for index, example in enumerate(both.meta["val"]):
        part = program.graph.call_function(operator.getitem, (both, index))
        part.meta["val"] = example
        parts.append(part)
    return tuple(parts)
