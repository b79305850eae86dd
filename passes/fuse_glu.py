"""fuse_glu: the gate of a gated MLP becomes camshaft::glu on the joined projection.

    before                                          after
    g, u = split(y, I, -1);  h = silu(g) * u        h = camshaft.glu(y, "silu")         y [1, T, 2 I] -> h [1, T, I]

The gate is the first half. silu, gelu, gelu (tanh) and relu. Numerics: exact.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .match import aten, call, commuted, is_call, value

GLU = torch.ops.camshaft.glu.default


class FuseGlu(GraphPass):
    """Recognises activation(gate) * up on the two halves of one tensor."""

    name = "fuse_glu"
    stage = Stage.FUSE

    def run(self, program: Program) -> int:
        matches = 0
        for node in list(program.graph.nodes):
            if is_call(node, aten.mul.Tensor):
                matches += _match(program, node)
        return matches


def _match(program: Program, node: fx.Node) -> int:
    for active, up in commuted(node):
        activation = _activation(active)
        if activation is None:
            continue
        gate = active.args[0]
        whole = _whole(gate, up)
        if whole is not None:
            with program.graph.inserting_before(node):
                new = call(program, GLU, whole, activation)
            node.replace_all_uses_with(new)
            return 1
    return 0


def _activation(node: Any) -> str | None:
    if is_call(node, aten.silu.default):
        return "silu"
    if is_call(node, aten.relu.default):
        return "relu"
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return None


def _whole(gate: Any, up: Any) -> fx.Node | None:
    """The tensor whose first half is `gate` and second half `up`."""
    if not (is_call(gate, operator.getitem) and is_call(up, operator.getitem)):
        return None
    split = gate.args[0]
    if split is not up.args[0] or (gate.args[1], up.args[1]) != (0, 1):
        return None
    if not is_call(split, aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
        return None
    whole = split.args[0]
    axis = split.args[2] if len(split.args) > 2 else 0
    rank = value(whole).dim()
    if (
        axis % rank != rank - 1
        or value(whole).shape[-1] != 2 * value(gate).shape[-1]
        or value(gate).shape != value(up).shape
    ):
        return None
    return whole
