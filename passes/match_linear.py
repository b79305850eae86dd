"""match_linear: products with a stored matrix become aten.linear with the weight as [out, in].

    before                                          after
    y = matmul(x, permute(weight, [1, 0]))          y = linear(x, weight)
    y = addmm(bias, x, weight)    (GPT-2's Conv1D)  y = linear(x, weight.T, bias)     weight transposed in the WeightMap

    before (linear as AOTAutograd writes it)        after
    f = view(x, [B T, C])                           y = linear(x, weight, bias)
    y = view(addmm(bias, f, t(weight)), [B, T, O])

A matrix that has other users keeps its form. Numerics: reordered.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .match import ADDS, VIEWS, aten, call, is_call, other_operand, value


class MatchLinear(GraphPass):
    """Brings matmul and addmm with a weight to aten.linear."""

    name = "match_linear"
    stage = Stage.CANONICALIZE
    numerics = "reordered"

    def run(self, program: Program) -> int:
        matches = 0
        for node in list(program.graph.nodes):
            if is_call(node, aten.matmul.default, aten.mm.default):
                matches += _matmul(program, node)
            elif is_call(node, aten.addmm.default):
                matches += _addmm(program, node)
        for node in list(program.graph.nodes):
            if is_call(node, aten.linear.default):
                _keep_rows(program, node)
        return matches


def _matmul(program: Program, node: fx.Node) -> int:
    weight = _untransposed(node.args[1])
    if weight is None or program.input_of(weight) is None or value(weight).dim() != 2:
        return 0
    end, bias = node, None
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is not None and is_call(user, *ADDS):
        other = other_operand(user, node)
        spec = program.input_of(other) if isinstance(other, fx.Node) else None
        if spec is not None and spec.kind == "weight" and value(other).shape == value(weight).shape[:1]:
            end, bias = user, other
    with program.graph.inserting_before(end):
        new = call(program, aten.linear.default, node.args[0], weight, bias)
    end.replace_all_uses_with(new)
    return 1


def _untransposed(node: Any) -> fx.Node | None:
    if is_call(node, aten.permute.default) and list(node.args[1]) == [1, 0]:
        return node.args[0]
    if is_call(node, aten.t.default):
        return node.args[0]
    if is_call(node, aten.transpose.int) and {d % 2 for d in node.args[1:]} == {0, 1} and value(node).dim() == 2:
        return node.args[0]
    return None


def _addmm(program: Program, node: fx.Node) -> int:
    bias, x, weight = node.args[:3]
    if node.kwargs or not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node):
        return 0
    straight = _untransposed(weight)
    if straight is not None and program.input_of(straight) is not None and value(bias).dim() == 1:
        with program.graph.inserting_before(node):
            new = call(program, aten.linear.default, x, straight, bias)
        node.replace_all_uses_with(new)
        return 1
    spec = program.input_of(weight)
    if spec is None or spec.kind != "weight" or len(weight.users) != 1 or value(bias).dim() != 1:
        return 0
    stored = program.weights[spec.key]
    rows, columns = stored.shape
    key = program.weights.add(f"{spec.key}.T", stored.transpose())
    example = value(weight).new_empty((columns, rows))
    turned = program.add_input(f"{weight.name}_t", kind="weight", key=key, example=example)
    with program.graph.inserting_before(node):
        new = call(program, aten.linear.default, x, turned, bias)
    node.replace_all_uses_with(new)
    return 1


def _keep_rows(program: Program, node: fx.Node) -> None:
    """linear on flattened rows whose result is given the rows back becomes linear on the rows as they were."""
    flat = node.args[0]
    if not is_call(flat, *VIEWS) or value(node).dim() != 2:
        return
    rows = flat.args[0]
    before = value(rows).shape
    wanted = [str(size) for size in (*before[:-1], value(node).shape[-1])]
    ends = [user for user in node.users if is_call(user, *VIEWS) and [str(s) for s in value(user).shape] == wanted]
    if not ends or before[-1] != value(flat).shape[-1]:
        return
    with program.graph.inserting_before(node):
        new = call(program, aten.linear.default, rows, *node.args[1:])
    for end in ends:
        end.replace_all_uses_with(new)
