"""match_rms_norm: RMSNorm as families write it becomes camshaft::rms_norm.

    before (Llama)                                  after
    f = _to_copy(x, float32)                        n = camshaft.rms_norm(x, weight, eps, 0.0, True)
    r = rsqrt(mean(pow(f, 2), -1, True) + eps)
    n = weight * _to_copy(f * r, bf16)

    before (Gemma: offset 1; OLMo 2, gpt-oss: 0)    after
    n = _to_copy((f * r) * (weight.float() + 1))    n = camshaft.rms_norm(x, weight, eps, 1.0, False)

x [..., C], weight [C] or none. A variance that is used elsewhere, or over other dimensions, does not match. Numerics: exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage, only_user
from .match import ADDS, CASTS, MULS, aten, call, is_call, other_operand, through_casts, value

RMS_NORM = torch.ops.camshaft.rms_norm.default


class MatchRmsNorm(GraphPass):
    """Recognises RMSNorm in its three written forms and aten.rms_norm."""

    name = "match_rms_norm"
    stage = Stage.CANONICALIZE
    numerics = "reordered"

    def run(self, program: Program) -> int:
        matches = 0
        for node in list(program.graph.nodes):
            if is_call(node, aten.rsqrt.default):
                matches += _match(program, node)
            elif is_call(node, aten.rms_norm.default):
                matches += _match_aten(program, node)
        return matches


def _match_aten(program: Program, node: fx.Node) -> int:
    x, shape = node.args[0], node.args[1]
    weight = node.args[2] if len(node.args) > 2 else None
    eps = node.args[3] if len(node.args) > 3 else None
    if len(shape) != 1 or eps is None:
        return 0
    with program.graph.inserting_before(node):
        new = call(program, RMS_NORM, x, weight, float(eps), 0.0, False)
    node.replace_all_uses_with(new)
    return 1


def _match(program: Program, rsqrt: fx.Node) -> int:
    found = _variance(rsqrt.args[0])
    normed = only_user(rsqrt)
    if found is None or normed is None or not is_call(normed, *MULS):
        return 0
    wide, eps = found
    if other_operand(normed, rsqrt) is not wide:
        return 0
    x = through_casts(wide) if is_call(wide, *CASTS) and value(wide).dtype == torch.float32 else wide
    if value(wide).dtype != torch.float32:
        return 0
    end, weight, offset, cast_first = _scale(normed, value(x).dtype)
    with program.graph.inserting_before(end):
        new = call(program, RMS_NORM, x, weight, eps, offset, cast_first)
    if value(new).dtype != value(end).dtype:
        return 0
    new.meta["val"] = value(end)
    end.replace_all_uses_with(new)
    return 1


def _variance(node: Any) -> tuple[fx.Node, float] | None:
    """(x, eps) of mean(x**2, -1, keepdim) + eps."""
    if not is_call(node, *ADDS) or isinstance(node.args[1], fx.Node):
        return None
    mean, eps = node.args[0], float(node.args[1])
    if not is_call(mean, aten.mean.dim) or list(mean.args[1]) not in ([-1], [value(mean).dim() - 1]):
        return None
    square = mean.args[0]
    if len(mean.args) < 3 or mean.args[2] is not True:
        return None
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return square.args[0], eps
    if is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return square.args[0], eps
    return None


def _scale(normed: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node | None, float, bool]:
    """(last node, weight, offset, cast_first): the scaling after the normalisation, as far as it is one."""
    end, cast = normed, False
    user = only_user(end)
    if user is not None and is_call(user, *CASTS) and value(user).dtype == dtype != torch.float32:
        end, cast = user, True
        user = only_user(end)
    if user is None or not is_call(user, aten.mul.Tensor):
        return end, None, 0.0, False
    weight, offset = _weight(other_operand(user, end))
    if weight is None or value(weight).dim() != 1 or value(weight).shape[0] != value(normed).shape[-1]:
        return end, None, 0.0, False
    if cast or dtype == torch.float32:
        if cast and offset:
            return end, None, 0.0, False
        if value(user).dtype == dtype and (cast or not offset):
            return user, weight, 0.0, not offset
    end = user
    user = only_user(end)
    if user is not None and is_call(user, *CASTS) and value(user).dtype == dtype and value(end).dtype != dtype:
        end = user
    return end, weight, offset, False


def _weight(node: Any) -> tuple[fx.Node | None, float]:
    """(weight, offset) of weight, weight.float() or weight.float() + offset."""
    offset = 0.0
    if not isinstance(node, fx.Node):
        return None, 0.0
    if is_call(node, *ADDS):
        a, b = node.args[0], node.args[1]
        a, b = (b, a) if not isinstance(a, fx.Node) else (a, b)
        if isinstance(b, fx.Node) or not isinstance(a, fx.Node):
            return None, 0.0
        node, offset = a, float(b)
    node = through_casts(node)
    return (node, offset) if node.op == "placeholder" else (None, 0.0)
