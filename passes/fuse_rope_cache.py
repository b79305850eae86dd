"""fuse_rope_cache: paged attention turns queries and keys itself, as it writes the keys.

    before                                              after
    q' = camshaft.rope(q, cos, sin, i)                  o = camshaft.paged_rope_attention(q, k, v, ..., cos, sin, i)
    k' = camshaft.rope(k, cos, sin, i)
    o = camshaft.paged_attention(q', k', v, ...)

    before (partial rotary)                             after
    q' = cat(camshaft.rope(q[..., :R], cos, sin, i),    as above
             q[..., R:])

q [1, T, H, D], k [1, T, G, D], cos and sin [1, T, R] with a contiguous last dimension; transposes of T and heads may stand
anywhere between. Turned queries and keys must have no other reader, and both the same angles. Numerics: exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage, only_user
from .match import aten, call, is_call, value
from .match_rope import ROPE, is_slice
from .page_attention import PAGED_ATTENTION

PAGED_ROPE_ATTENTION = torch.ops.camshaft.paged_rope_attention.default


@dataclass(frozen=True)
class _Turned:
    """What a rope turns: x [1, T, heads, D], or its transpose [1, heads, T, D]; angles: cos, sin, interleaved."""

    x: fx.Node
    is_transposed: bool
    angles: tuple[Any, ...]

    def source(self, program: Program) -> fx.Node:
        """x [1, T, heads, D], at the graph's insertion point."""
        return call(program, aten.transpose.int, self.x, 1, 2) if self.is_transposed else self.x


class FuseRopeCache(GraphPass):
    """Joins rope and paged attention."""

    name = "fuse_rope_cache"
    stage = Stage.CACHE

    def run(self, program: Program) -> int:
        return sum(_match(program, node) for node in list(program.graph.nodes) if is_call(node, PAGED_ATTENTION))


def _match(program: Program, attention: fx.Node) -> int:
    q, k = (_turned(operand) for operand in attention.args[:2])
    if q is None or k is None or q.angles != k.angles or not _fits(q.angles, attention.args[0]):
        return 0
    with program.graph.inserting_before(attention):
        fused = call(
            program,
            PAGED_ROPE_ATTENTION,
            q.source(program),
            k.source(program),
            *attention.args[2:],
            *q.angles,
        )
    attention.replace_all_uses_with(fused)
    return 1


def _fits(angles: tuple[Any, ...], q: fx.Node) -> bool:
    """Whether cos and sin are [1, T, R] for the T of q [1, T, H, D], R even and contiguous."""
    cos, sin = (value(node) for node in angles[:2])
    alike = cos.shape == sin.shape and cos.dtype == sin.dtype
    row = cos.dim() == 3 and cos.shape[0] == 1 and cos.shape[1] == value(q).shape[1] and cos.shape[2] % 2 == 0
    return alike and row and cos.stride(2) == sin.stride(2) == 1


def _turned(operand: Any) -> _Turned | None:
    """What an operand [1, T, heads, D] of attention, read by nothing else, was before a rope; None if there is none."""
    node, is_transposed = _untransposed(operand, only=True)
    if is_call(node, ROPE):
        return None if is_transposed else _Turned(node.args[0], False, node.args[1:])
    if (
        not is_call(node, aten.cat.default)
        or len(node.args) < 2
        or node.args[1] not in (-1, 3)
        or len(node.args[0]) != 2
    ):
        return None
    part, rest = node.args[0]
    rope, rope_is_transposed = _untransposed(part, only=True)
    if not is_call(rope, ROPE) or rope_is_transposed != is_transposed:
        return None
    if value(rest).shape[-1] == 0:
        return _Turned(rope.args[0], False, rope.args[1:])
    rotated, size = value(rope).shape[-1], value(node).shape[-1]
    first, first_is_transposed = _untransposed(rope.args[0])
    if not (_is_part(first, 0, rotated, size) and _is_part(rest, rotated, size, size)):
        return None
    x, x_is_transposed = _untransposed(first.args[0])
    other, other_is_transposed = _untransposed(rest.args[0])
    direction = first_is_transposed != x_is_transposed
    if x is not other or direction != (is_transposed != other_is_transposed):
        return None
    return _Turned(x, direction, rope.args[1:])


def _is_part(node: Any, begin: int, end: int, size: int) -> bool:
    """Whether `node` is x[..., begin:end] of some x [.., size]."""
    return (
        is_call(node, aten.slice.Tensor)
        and value(node.args[0]).shape[-1] == size
        and is_slice(node, node.args[0], begin, end)
    )


def _untransposed(node: Any, *, only: bool = False) -> tuple[Any, bool]:
    """(the node behind transposes of axes 1 and 2, whether their number is odd).

    only: every node on the way, and that one, must have a single reader; the node is None where one has not.
    """
    is_odd = False
    while True:
        if only and only_user(node) is None:
            return None, is_odd
        if not is_call(node, aten.transpose.int) or {axis % 4 for axis in node.args[1:]} != {1, 2}:
            return node, is_odd
        node, is_odd = node.args[0], not is_odd
