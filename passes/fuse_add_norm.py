"""fuse_add_norm: a residual sum and the norm that reads it become one operator.

    before                                          after
    s = x + residual;  n = camshaft.rms_norm(s, w)  n, s = camshaft.add_rms_norm(x, residual, w, ...)

x, residual [1, T, C] of one shape and dtype; the sum may have other users. Numerics: exact.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .match import aten, call, is_call, value
from .match_rms_norm import RMS_NORM

ADD_RMS_NORM = torch.ops.camshaft.add_rms_norm.default


class FuseAddNorm(GraphPass):
    """Joins add and rms_norm."""

    name = "fuse_add_norm"
    stage = Stage.FUSE

    def run(self, program: Program) -> int:
        return sum(_match(program, node) for node in list(program.graph.nodes) if is_call(node, RMS_NORM))


def _match(program: Program, norm: fx.Node) -> int:
    total = norm.args[0]
    if not is_call(total, aten.add.Tensor) or total.kwargs:
        return 0
    x, residual = total.args[:2]
    if not (isinstance(x, fx.Node) and isinstance(residual, fx.Node)):
        return 0
    same = value(x).shape == value(residual).shape == value(total).shape
    if not same or value(x).dtype != value(residual).dtype:
        return 0
    with program.graph.inserting_before(total):
        both = call(program, ADD_RMS_NORM, x, residual, *norm.args[1:])
        outputs = []
        for index in range(2):
            part = program.graph.call_function(operator.getitem, (both, index))
            part.meta["val"] = both.meta["val"][index]
            outputs.append(part)
    norm.replace_all_uses_with(outputs[0])
    total.replace_all_uses_with(outputs[1])
    return 1
