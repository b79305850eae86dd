"""What a legal Program is; checked after capture and after every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .dump import target_text
from .program import Program

# Operators that look along the token dimension: none may be left once attention reads a paged cache, because a row
# then holds pieces of several sequences.
_MIXING = (
    "aten::cumsum",
    "aten::softmax.int",
    "aten::_softmax",
    "aten::bmm",
    "aten::baddbmm",
    "aten::flip",
    "aten::roll",
    "aten::tril",
    "aten::triu",
    "aten::scaled_dot_product_attention",
    "aten::conv1d",
    "aten::convolution",
    "aten::sort",
    "camshaft::mask",
    "camshaft::attention",
)


class VerificationError(AssertionError):
    """A Program that a pass left in an illegal state: the message names the pass and the node."""


def verify(program: Program, *, after: str) -> None:
    """Checks that the graph, and those of its parts, are well formed. Raises VerificationError, naming the pass `after` which it
    was called."""
    for name, part in program.parts.items():
        verify(part, after=f"{after} ({name})")
    program.graph.lint()
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    specs = [spec.name for spec in program.inputs]
    if sorted(names) != sorted(specs):
        odd = sorted(set(names) ^ set(specs))
        raise VerificationError(f"after {after}: inputs and placeholders differ: {odd[:5]}")
    for node, spec in program.placeholders("weight"):
        if spec.key not in program.weights:
            raise VerificationError(
                f"after {after}: {node.name} names weight {spec.key!r}, which the map does not hold"
            )
        shape = tuple(node.meta["val"].shape)
        if program.weights[spec.key].shape != shape:
            raise VerificationError(
                f"after {after}: weight {spec.key!r} is {list(program.weights[spec.key].shape)}, its placeholder {list(shape)}"
            )
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise VerificationError(f"after {after}: {node.format_node()} is a {node.op}; only calls are legal")
        if node.op == "call_function" and "val" not in node.meta:
            raise VerificationError(f"after {after}: {node.name} carries no example value")


def verify_packed(program: Program) -> None:
    """Checks that no operator mixes tokens, apart from paged attention. Raises ValueError naming the operator."""
    for node in program.graph.nodes:
        if node.op == "call_function" and _mixes_tokens(node):
            raise ValueError(
                f"{program.name} cannot be served: {node.name} ({target_text(node)}) mixes the tokens of a row outside "
                "attention that Camshaft knows; see docs/models.md for how to add an adapter"
            )


def _mixes_tokens(node: fx.Node) -> bool:
    value = node.meta.get("val")
    name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
    if name.startswith("camshaft::paged"):
        return False
    if isinstance(value, torch.Tensor) and sum(1 for size in value.shape if not isinstance(size, int)) > 1:
        return True
    if name in _MIXING and isinstance(value, torch.Tensor):
        if name in ("camshaft::mask", "camshaft::attention"):
            return True
        axis = _axis(node)
        return any(not isinstance(size, int) for size in value.shape) and (
            axis is None or not isinstance(value.shape[axis], int)
        )
    return name in ("aten::arange", "aten::arange.start") and any(not isinstance(size, int) for size in value.shape)


def _axis(node: fx.Node) -> int | None:
    axis: Any = node.args[1] if len(node.args) > 1 else None
    return axis if isinstance(axis, int) else None
