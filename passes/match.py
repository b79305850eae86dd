"""Small helpers to recognise and build aten nodes, shared by the passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..graph.program import Program

aten = torch.ops.aten

CASTS = (aten._to_copy.default, aten.to.dtype)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
COPIES = (aten.clone.default, aten.contiguous.default)
MULS = (aten.mul.Tensor, aten.mul.Scalar)
ADDS = (aten.add.Tensor, aten.add.Scalar)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def through_casts(node: Any) -> Any:
    """The value before any chain of dtype casts."""
    while is_call(node, *CASTS):
        node = node.args[0]
    return node


def value(node: fx.Node) -> torch.Tensor:
    """The example value (a fake or meta tensor) of a node."""
    return node.meta["val"]


def static(size: Any) -> int | None:
    """The size as an int, or None where it varies."""
    return int(size) if isinstance(size, int) else None


def other_operand(node: fx.Node, operand: fx.Node) -> Any:
    """The other argument of a binary node."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def commuted(node: fx.Node) -> Iterable[tuple[Any, Any]]:
    """Both orders of a binary node's arguments."""
    yield node.args[0], node.args[1]
    yield node.args[1], node.args[0]


def call(program: Program, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call at the graph's insertion point and gives it its example value."""
    node = program.graph.call_function(target, args, kwargs)
    node.meta["val"] = infer(node)
    return node


def infer(node: fx.Node) -> Any:
    """The example value of a call, from the example values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = fake_mode((args, kwargs))
    if mode is None:
        return node.target(*args, **kwargs)
    with mode, enable_python_dispatcher():  # decompositions that know varying sizes, which torch 2.11's C++ ones do not
        return node.target(*args, **kwargs)


def fake_mode(tree: Any) -> FakeTensorMode | None:
    """The fake tensor mode that the tensors of a tree belong to."""
    found: list[FakeTensorMode] = []
    torch.utils._pytree.tree_map_only(FakeTensor, lambda t: found.append(t.fake_mode), tree)
    return found[0] if found else None
