"""fuse_projections: linear layers that read the same rows become one product.

    before                                          after
    q = linear(x, w_q)        [1, T, H D]           y = linear(x, w_q + w_k + w_v)      one weight, rows side by side
    k = linear(x, w_k)        [1, T, G D]           q, k, v = split(y, [H D, G D, G D], -1)
    v = linear(x, w_v)        [1, T, G D]

Also gate and up projections. Weights are joined in the WeightMap; those that a checkpoint stores quantized, where they are stored
alike: one format, the same static scale of x, the same order of columns. All members have a bias or none has; a weight with other
users, and a router (its result is chosen from with softmax, sigmoid or top-k), stay alone. Numerics: reordered.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict

import torch
from torch import fx

from ..graph.program import Program
from ..graph.weights import concatenate
from .base import GraphPass, Stage
from .match import CASTS, VIEWS, aten, call, is_call, value

_CHOOSERS = (aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.topk.default)


class FuseProjections(GraphPass):
    """Joins q, k, v and gate, up projections (any linear layers with the same input)."""

    name = "fuse_projections"
    stage = Stage.FUSE
    numerics = "reordered"

    def run(self, program: Program) -> int:
        groups: dict[tuple[fx.Node, bool, object], list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            if is_call(node, aten.linear.default) and _may_join(program, node):
                groups[node.args[0], _bias(node) is not None, _stored_as(program, node)].append(node)
        mergeable = [members for members in groups.values() if len(members) > 1]
        for members in mergeable:
            _join(program, members)
        _note_apart(program, list(groups))
        return len(mergeable)


def _bias(node: fx.Node) -> fx.Node | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return bias if isinstance(bias, fx.Node) else None


def _stored_as(program: Program, node: fx.Node) -> object:
    """What a checkpoint's quantized weights must have in common to stay quantized when they are joined; None for a dense one."""
    spec = program.input_of(node.args[1])
    stored = program.weights[spec.key].stored if spec is not None else None
    return None if stored is None else stored.joins_as or node


def _note_apart(program: Program, groups: list[tuple[fx.Node, bool, object]]) -> None:
    """Tells in the program's notes of layers with one input whose stored weights do not go together."""
    stored = Counter((x, biased) for x, biased, form in groups if form is not None)
    count = sum(1 for number in stored.values() if number > 1)
    if count:
        what = "formats, scales of the input or orders differ"
        line = f"stored weights: layers with one input stay apart in {count} place(s): {what}"
        program.info = {**program.info, "notes": (*program.info.get("notes", ()), line)}


def _may_join(program: Program, node: fx.Node) -> bool:
    for operand in (node.args[1], _bias(node)):
        if operand is not None:
            spec = program.input_of(operand) if isinstance(operand, fx.Node) else None
            if spec is None or spec.kind != "weight" or len(operand.users) != 1:
                return False
    return not is_router(node)


def is_router(node: fx.Node) -> bool:
    """Whether a linear layer's result is soon chosen from: it feeds softmax, sigmoid or top-k."""
    frontier = [node]
    for _ in range(3):
        frontier = [user for item in frontier for user in item.users]
        if any(is_call(user, *_CHOOSERS) for user in frontier):
            return True
        frontier = [user for user in frontier if is_call(user, *CASTS, *VIEWS)]
    return False


def _join(program: Program, members: list[fx.Node]) -> None:
    weight = _join_weights(program, [m.args[1] for m in members])
    biases = [_bias(m) for m in members]
    bias = _join_weights(program, [b for b in biases if b is not None]) if biases[0] is not None else None
    sizes = [int(value(m).shape[-1]) for m in members]
    with program.graph.inserting_before(members[0]):
        joined = call(program, aten.linear.default, members[0].args[0], weight, bias)
        parts = call(program, aten.split_with_sizes.default, joined, sizes, -1)
        for index, member in enumerate(members):
            part = program.graph.call_function(operator.getitem, (parts, index))
            part.meta["val"] = parts.meta["val"][index]
            member.replace_all_uses_with(part)


def _join_weights(program: Program, nodes: list[fx.Node]) -> fx.Node:
    keys = [spec.key for node in nodes if (spec := program.input_of(node)) is not None]
    first, *rest = keys
    common = first.rsplit(".", 2)[0] if first.count(".") >= 2 else ""
    label = "+".join([first, *(key.removeprefix(common + ".").rsplit(".", 1)[0] for key in rest)])
    key = program.weights.add(label, concatenate([program.weights[k] for k in keys]))
    example = torch.cat([value(node) for node in nodes], dim=0)
    return program.add_input(f"{nodes[0].name}_joined", kind="weight", key=key, example=example)
