"""normalize: removes what tracing leaves behind, so that later passes see one form of each computation.

    before                                              after
    a = aten.slice(x, d, 0, MAX); b = aten.expand(a, same shape)    x
    v = aten.view(x, [1, sym_size, -1, 16])             aten.reshape(x, [1, -1, 4, 16])
    c = aten.clone(x); d = aten._to_copy(x, x.dtype)    x
    y = aten.type_as(x, other)                          aten._to_copy(x, other.dtype)
    t = transpose(transpose(x, 1, 2), 1, 2)             x
    u1 = unsqueeze(cos, 1); u2 = unsqueeze(cos, 1)      one node

Copies are dropped because `reshape` copies where it must. Numerics: exact.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .match import CASTS, COPIES, VIEWS, aten, call, is_call, static, value

_MAX = sys.maxsize


class Normalize(GraphPass):
    """Removes no-ops, turns views into reshapes with static sizes, cancels transposes, merges equal nodes."""

    name = "normalize"
    stage = Stage.CANONICALIZE

    def run(self, program: Program) -> int:
        total = 0
        while True:
            count = sum(_simplify(program, node) for node in list(program.graph.nodes))
            program.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
            count += merge_equal_nodes(program.graph)
            if not count:
                return total
            total += count


def _simplify(program: Program, node: fx.Node) -> int:
    if node.op != "call_function" or not node.users:
        return 0
    source = _no_op(node)
    if source is not None:
        node.replace_all_uses_with(source)
        return 1
    if is_call(node, aten.transpose.int) and is_call(node.args[0], aten.transpose.int):
        inner = node.args[0]
        rank = value(node).dim()
        if {d % rank for d in node.args[1:]} == {d % rank for d in inner.args[1:]}:
            node.replace_all_uses_with(inner.args[0])
            return 1
    if is_call(node, aten.type_as.default):
        with program.graph.inserting_before(node):
            cast = call(program, aten._to_copy.default, node.args[0], dtype=value(node).dtype)
        node.replace_all_uses_with(cast)
        return 1
    if node.target in VIEWS:
        return _static_reshape(program, node)
    return 0


def _no_op(node: fx.Node) -> Any:
    """The argument that a node merely passes on, or None."""
    args = node.args
    if not args or not isinstance(args[0], fx.Node) or not isinstance(args[0].meta.get("val"), torch.Tensor):
        return None
    source, out = args[0], node.meta.get("val")
    if not isinstance(out, torch.Tensor):
        return None
    before = value(source)
    same_shape = len(before.shape) == len(out.shape) and all(_same(a, b) for a, b in zip(before.shape, out.shape))
    if node.target in COPIES:
        return source
    if node.target in CASTS and before.dtype == out.dtype and same_shape and "device" not in node.kwargs:
        return source
    if is_call(node, aten.expand.default, *VIEWS) and same_shape:
        return source
    if is_call(node, aten.slice.Tensor) and same_shape and (len(args) < 3 or args[2] in (0, None)):
        if (args[3] if len(args) > 3 else None) in (None, _MAX) and (args[4] if len(args) > 4 else 1) == 1:
            return source
        return source if all(static(size) is not None for size in out.shape) else None
    if (
        is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor)
        and args[1] in (1, 1.0)
        and not isinstance(args[1], fx.Node)
    ):
        return source if before.dtype == out.dtype else None
    if (
        is_call(node, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor)
        and not isinstance(args[1], fx.Node)
        and args[1] in (0, 0.0)
    ):
        return source if before.dtype == out.dtype else None
    if is_call(node, aten.dropout.default) and args[2] is False:
        return source
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def _static_reshape(program: Program, node: fx.Node) -> int:
    """view/reshape with at most one varying size becomes aten.reshape with that size as -1."""
    sizes = [static(size) for size in value(node).shape]
    if sizes.count(None) > 1:
        return 0
    target = [-1 if size is None else size for size in sizes]
    source = node.args[0]
    if is_call(source, aten.reshape.default):  # reshape of a reshape
        source = source.args[0]
    if node.target == aten.reshape.default and list(node.args[1]) == target and source is node.args[0]:
        return 0
    with program.graph.inserting_before(node):
        new = call(program, aten.reshape.default, source, target)
    new.meta["val"] = value(node)
    node.replace_all_uses_with(new)
    return 1


def merge_equal_nodes(graph: fx.Graph) -> int:
    """Common subexpression elimination over pure calls; returns the number of merged nodes."""
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or _impure(node):
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    return merged


def _impure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in node.target.tags
        or node.target.name().startswith("camshaft::paged")
    )


def _freeze(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return tuple(_freeze(item) for item in tree)
    if isinstance(tree, dict):
        return tuple(sorted((key, _freeze(item)) for key, item in tree.items()))
    if isinstance(tree, bool | int | float):
        return (type(tree).__name__, tree)
    return tree
