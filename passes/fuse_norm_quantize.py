"""fuse_norm_quantize: an RMSNorm and the quantization of its rows become one operator.

    before                                          after
    n = camshaft.rms_norm(x, w, ...)                xq, xs = camshaft.rms_norm_quantize(x, w, ...)
    xq, xs = camshaft.quantize_rows(n)

    n, s = camshaft.add_rms_norm(x, residual, ...)  xq, xs, s = camshaft.add_rms_norm_quantize(x, residual, ...)
    xq, xs = camshaft.quantize_rows(n)

x [.., C]; xq [.., C] float8_e4m3fn, xs [.., 1] float32, s = x + residual. A norm whose result is read elsewhere too (by a router)
stays as it is. Runs behind quantize_linear. Numerics: exact.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .fuse_add_norm import ADD_RMS_NORM
from .match import is_call
from .match_rms_norm import RMS_NORM
from .quantize_fp8 import QUANTIZE_ROWS, call_parts

RMS_NORM_QUANTIZE = torch.ops.camshaft.rms_norm_quantize.default
ADD_RMS_NORM_QUANTIZE = torch.ops.camshaft.add_rms_norm_quantize.default


class FuseNormQuantize(GraphPass):
    """Joins rms_norm or add_rms_norm and quantize_rows."""

    name = "fuse_norm_quantize"
    stage = Stage.FUSE

    def run(self, program: Program) -> int:
        return sum(_match(program, node) for node in list(program.graph.nodes) if is_call(node, QUANTIZE_ROWS))


def _match(program: Program, quantize: fx.Node) -> int:
    normed: Any = quantize.args[0]
    norm: Any
    if list(normed.users) != [quantize]:
        return 0
    if is_call(normed, RMS_NORM):
        norm, target = normed, RMS_NORM_QUANTIZE
    elif is_call(normed, operator.getitem) and normed.args[1] == 0 and is_call(normed.args[0], ADD_RMS_NORM):
        norm, target = normed.args[0], ADD_RMS_NORM_QUANTIZE
    else:
        return 0
    with program.graph.inserting_before(norm):
        parts = call_parts(program, target, *norm.args)
    for user in list(quantize.users):
        user.replace_all_uses_with(parts[user.args[1]])
    if target is ADD_RMS_NORM_QUANTIZE:
        for user in list(norm.users):
            if user.args[1] == 1:
                user.replace_all_uses_with(parts[2])
    return 1
