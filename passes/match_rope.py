"""match_rope: rotary embedding as families write it becomes camshaft::rope, in token-major layout.

    before (halves)                                         after
    a = q * cos;  b = cat(-q[..., R/2:], q[..., :R/2]) * sin     t = transpose(q, 1, 2)
    o = a + b                                               o = transpose(camshaft.rope(t, cos, sin, False), 1, 2)

    before (gpt-oss: chunks, cos of R/2)                    before (Cohere, GLM: interleaved)
    cat(x1*c - x2*s, x2*c + x1*s)                           q*cos + flatten(stack(-q[1::2], q[0::2]))*sin

q [1, H, T, D] with cos, sin [1, 1, T, R] unsqueezed from [1, T, R]. What is written otherwise stays as plain operators,
which every target runs too. Numerics: exact (gpt-oss: reordered).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .match import VIEWS, aten, call, commuted, is_call, value

ROPE = torch.ops.camshaft.rope.default


class MatchRope(GraphPass):
    """Recognises rotary embedding in halves, interleaved, and with unrepeated angles."""

    name = "match_rope"
    stage = Stage.CANONICALIZE
    numerics = "reordered"

    def run(self, program: Program) -> int:
        matches = 0
        for node in list(program.graph.nodes):
            if is_call(node, aten.add.Tensor):
                matches += _match_turned(program, node)
            elif is_call(node, aten.cat.default):
                matches += _match_chunks(program, node)
        return matches


def _angles(node: Any) -> fx.Node | None:
    """cos or sin [1, T, R] of its unsqueezed form [1, 1, T, R]."""
    if is_call(node, aten.unsqueeze.default) and node.args[1] in (1, -3) and value(node).dim() == 4:
        return node.args[0]
    return None


def _emit(program: Program, end: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool) -> int:
    with program.graph.inserting_before(end):
        turned = call(program, ROPE, call(program, aten.transpose.int, x, 1, 2), cos, sin, interleaved)
        out = call(program, aten.transpose.int, turned, 1, 2)
    if value(out).dtype != value(end).dtype:
        return 0
    end.replace_all_uses_with(out)
    return 1


def _match_turned(program: Program, end: fx.Node) -> int:
    for left, right in commuted(end):
        if not (is_call(left, aten.mul.Tensor) and is_call(right, aten.mul.Tensor)):
            continue
        for x, cos_4d in commuted(left):
            for turned, sin_4d in commuted(right):
                cos, sin = _angles(cos_4d), _angles(sin_4d)
                kind = _turn_of(turned, x) if cos is not None and sin is not None else None
                if kind is not None and cos is not None and sin is not None and value(x).dim() == 4:
                    return _emit(program, end, x, cos, sin, kind == "interleaved")
    return 0


def _turn_of(node: Any, x: Any) -> str | None:
    """ "halves" or "interleaved" where `node` is x turned by a quarter, else None."""
    if not isinstance(x, fx.Node) or not isinstance(node, fx.Node):
        return None
    size = value(x).shape[-1]
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2:
        first, second = node.args[0]
        if (
            is_call(first, aten.neg.default)
            and is_slice(first.args[0], x, size // 2, size)
            and is_slice(second, x, 0, size // 2)
        ):
            return "halves"
        return None
    if not is_call(node, *VIEWS, aten.flatten.using_ints):
        return None
    stacked = node.args[0]
    if (
        not is_call(stacked, aten.stack.default)
        or len(stacked.args[0]) != 2
        or stacked.args[1] not in (-1, value(x).dim())
    ):
        return None
    first, second = stacked.args[0]
    if is_call(first, aten.neg.default) and _is_step(first.args[0], x, 1) and _is_step(second, x, 0):
        return "interleaved"
    return None


def _slice_args(node: fx.Node) -> tuple[Any, int, Any, Any, int]:
    args = [*node.args, *[None] * (5 - len(node.args))]
    rank = value(node).dim()
    return args[0], (args[1] or 0) % rank, args[2] or 0, args[3], args[4] or 1


def is_slice(node: Any, x: fx.Node, begin: int, end: int) -> bool:
    """Whether `node` is x[..., begin:end]."""
    if not is_call(node, aten.slice.Tensor):
        return False
    source, axis, start, stop, step = _slice_args(node)
    size = value(x).shape[-1]
    stop = size if stop is None else min(stop, size)
    return source is x and axis == value(x).dim() - 1 and step == 1 and (start, stop) == (begin, end)


def _is_step(node: Any, x: fx.Node, begin: int) -> bool:
    if not is_call(node, aten.slice.Tensor):
        return False
    source, axis, start, stop, step = _slice_args(node)
    return (
        source is x
        and axis == value(x).dim() - 1
        and step == 2
        and start == begin
        and (stop is None or stop >= value(x).shape[-1])
    )


def _match_chunks(program: Program, end: fx.Node) -> int:
    parts = end.args[0]
    if len(parts) != 2 or value(end).dim() != 4:
        return 0
    minus, plus = parts
    if not (is_call(minus, aten.sub.Tensor) and is_call(plus, aten.add.Tensor)):
        return 0
    if not all(is_call(arg, aten.mul.Tensor) for arg in (*minus.args[:2], *plus.args[:2])):
        return 0
    x1, cos_4d = minus.args[0].args[:2]
    x2, sin_4d = minus.args[1].args[:2]
    if plus.args[0].args[:2] != (x2, cos_4d) or plus.args[1].args[:2] != (x1, sin_4d):
        return 0
    x = _halves_of(x1, x2)
    cos, sin = _angles(cos_4d), _angles(sin_4d)
    if x is None or cos is None or sin is None or value(cos).shape[-1] * 2 != value(x).shape[-1]:
        return 0
    with program.graph.inserting_before(end):
        cos_full = call(program, aten.cat.default, [cos, cos], -1)
        sin_full = call(program, aten.cat.default, [sin, sin], -1)
    return _emit(program, end, x, cos_full, sin_full, False)


def _halves_of(x1: Any, x2: Any) -> fx.Node | None:
    """The tensor whose first and second half (over the last dimension) x1 and x2 are."""
    if is_call(x1, aten.slice.Tensor) and is_call(x2, aten.slice.Tensor):
        x = x1.args[0]
        size = value(x).shape[-1]
        return x if is_slice(x1, x, 0, size // 2) and is_slice(x2, x, size // 2, size) else None
    import operator

    if is_call(x1, operator.getitem) and is_call(x2, operator.getitem) and x1.args[0] is x2.args[0]:
        split = x1.args[0]
        rank = value(x1).dim()
        if is_call(split, aten.split.Tensor, aten.chunk.default) and (x1.args[1], x2.args[1]) == (0, 1):
            axis = split.args[2] if len(split.args) > 2 else 0
            whole = split.args[0]
            if axis % rank == rank - 1 and value(whole).shape[-1] == 2 * value(x1).shape[-1]:
                return whole
    return None
