"""An exported graph made functional: no operator changes a tensor, or may or may not return its own input.

`torch.export` leaves such operators in its graph. `ExportedProgram.run_decompositions({})` removes them by tracing everything a
second time, which is two thirds of a capture. Most decoders contain only a few kinds, and what they do follows from the values:

    to(x, ...)             x, where neither dtype nor device change; else _to_copy(x, dtype=...)
    reshape(x, shape)      view(x, shape), where x is contiguous
    contiguous(x)          x, where it is; else clone(x, memory_format=contiguous)
    dropout(x, p, False)   x
    chunk(x, n, dim)       split(x, size, dim)

A graph with any other is traced a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

_aten = torch.ops.aten
Rewrite = Callable[[fx.Node], "fx.Node | None"]
"""Node -> what takes its place, made in front of it where it is new; None where the values do not tell."""


def make_functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without operators that change their inputs or may return them. The given one is not to be used any more."""
    graph = exported.graph_module.graph
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if not _is_unclear(node):
            continue
        rewrite = _REWRITES.get(node.target)
        with graph.inserting_before(node):
            value = None if rewrite is None else rewrite(node)
        if value is None:
            return exported.run_decompositions({})
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported


def _is_unclear(node: fx.Node) -> bool:
    """Whether an operator changes its inputs, or is a composite one that may return them; operators on graphs count as well."""
    operator = node.target
    if node.op == "get_attr" or isinstance(operator, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    if operator._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in operator.tags:
        return True
    composite = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    aliases = any(argument.alias_info is not None for argument in operator._schema.arguments)
    return composite and (aliases or operator is _aten.native_batch_norm.default)


def _value(node: Any) -> Tensor:
    return cast(Tensor, node.meta["val"])


def _new(node: fx.Node, operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call with the metadata of the node whose place it takes."""
    made = node.graph.call_function(operator, args, kwargs)
    made.meta = dict(node.meta)
    return made


def _to(node: fx.Node) -> fx.Node | None:
    x = cast(fx.Node, node.args[0])
    before, after = _value(x), _value(node)
    if node.kwargs.get("copy") or before.device != after.device or before.layout != after.layout or len(node.args) > 3:
        return None
    if before.dtype == after.dtype:
        return x
    return _new(node, _aten._to_copy.default, x, dtype=after.dtype)


def _reshape(node: fx.Node) -> fx.Node | None:
    x, shape = node.args
    known = [int(size) if isinstance(size, int) else None for size in _value(node).shape]
    sizes = [found if size == -1 else size for size, found in zip(cast(Any, shape), known)]
    if not _value(x).is_contiguous() or None in sizes:
        return None
    return _new(node, _aten.view.default, x, sizes)


def _contiguous(node: fx.Node) -> fx.Node | None:
    x = cast(fx.Node, node.args[0])
    if node.kwargs or len(node.args) > 1:
        return None
    if _value(x).is_contiguous():
        return x
    return _new(node, _aten.clone.default, x, memory_format=torch.contiguous_format)


def _dropout(node: fx.Node) -> fx.Node | None:
    x, _, trains = node.args
    return None if trains else cast(fx.Node, x)


def _chunk(node: fx.Node) -> fx.Node | None:
    x, count, axis = (*node.args, 0)[:3]
    size = _value(x).shape[cast(int, axis)]
    if not isinstance(size, int) or not isinstance(count, int):
        return None
    return _new(node, _aten.split.Tensor, x, -(-size // count), axis)


_REWRITES: dict[Any, Rewrite] = {
    _aten.to.dtype: _to,
    _aten.to.device: _to,
    _aten.to.dtype_layout: _to,
    _aten.reshape.default: _reshape,
    _aten.contiguous.default: _contiguous,
    _aten.dropout.default: _dropout,
    _aten.chunk.default: _chunk,
}
