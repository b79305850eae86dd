"""fuse_glu_quantize: a gated linear unit and the quantization of its rows become one operator.

    before                                          after
    h = camshaft.glu(y, "silu")                     hq, hs = camshaft.glu_quantize(y, "silu")
    hq, hs = camshaft.quantize_rows(h)

y [.., 2 I]; hq [.., I] float8_e4m3fn, hs [.., 1] float32. A gate whose result is read elsewhere too stays as it is. Runs behind
quantize_linear. Numerics: exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .fuse_glu import GLU
from .match import is_call
from .quantize_fp8 import QUANTIZE_ROWS, call_parts

GLU_QUANTIZE = torch.ops.camshaft.glu_quantize.default


class FuseGluQuantize(GraphPass):
    """Joins glu and quantize_rows."""

    name = "fuse_glu_quantize"
    stage = Stage.FUSE

    def run(self, program: Program) -> int:
        return sum(_match(program, node) for node in list(program.graph.nodes) if is_call(node, QUANTIZE_ROWS))


def _match(program: Program, quantize: fx.Node) -> int:
    glu: Any = quantize.args[0]
    if not is_call(glu, GLU) or list(glu.users) != [quantize]:
        return 0
    with program.graph.inserting_before(quantize):
        parts = call_parts(program, GLU_QUANTIZE, *glu.args)
    for user in list(quantize.users):
        user.replace_all_uses_with(parts[user.args[1]])
    return 1
