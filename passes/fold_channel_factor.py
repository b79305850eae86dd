"""fold_channel_factor: factors of a layer's input channels become part of what makes the input.

    before                                          after
    y = rms_norm(x, w)                              y = rms_norm(x, w * factor)         also add_rms_norm
    x' = y * factor [K]

    g = glu(linear(x, w))       g [.., K]           g = glu(linear(x, w')), the last K rows of w' times factor
    x' = g * factor

    o = attention(q, k, v)      v = linear(x, w)    rows of w' that make v times the factors of the values' channels
    x' = view(o) * factor

AWQ and SmoothQuant divide the weights of a quantized layer by such factors, so products are the same, and the multiplication costs
nothing. Rows of a quantized weight are scaled through their scales, which must be float32 and not shared between rows. A factor
stays a multiplication where its input has other readers, where rows cannot be scaled, and where query heads that share a value head
have factors that differ. Runs behind `quantize_linear`. Numerics: reordered.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.program import Program
from ..graph.weights import Weight
from .base import GraphPass, Stage
from .fold_rows import is_sole, scale_rows, scale_source
from .match import aten, is_call, value
from .quantization.channels import untied, value_heads
from .resolve_masks import ATTENTION

RMS_NORM = torch.ops.camshaft.rms_norm.default
ADD_RMS_NORM = torch.ops.camshaft.add_rms_norm.default
GLU = torch.ops.camshaft.glu.default


class FoldChannelFactor(GraphPass):
    """Moves multiplications of channels by stored factors into norms and into the rows of earlier layers."""

    name = "fold_channel_factor"
    stage = Stage.FUSE
    numerics = "reordered"

    def run(self, program: Program) -> int:
        count = 0
        for node in list(program.graph.nodes):
            factor = _factor(program, node)
            if factor is not None and _fold(program, node.args[0], factor):
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
                count += 1
        return count


def _factor(program: Program, node: fx.Node) -> fx.Node | None:
    """The stored vector [K] that `node` multiplies the channels of its sole-read input by, or None."""
    if not is_call(node, aten.mul.Tensor) or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    x, factor = node.args
    assert isinstance(x, fx.Node) and isinstance(factor, fx.Node)
    spec = program.input_of(factor)
    if spec is None or spec.kind != "weight" or not spec.key.endswith(".channel_factor") or len(x.users) != 1:
        return None
    return factor


def _fold(program: Program, x: Any, factor: fx.Node) -> bool:
    """Whether what makes x could be changed to make x * factor."""
    norm = x.args[0] if is_call(x, operator.getitem) and x.args[1] == 0 else x
    if is_call(norm, RMS_NORM, ADD_RMS_NORM):
        return _fold_norm(program, norm, factor)
    vector = _tensor(program, factor)
    if is_call(x, GLU):
        inner = vector.shape[0]
        return is_sole(x.args[0]) and scale_rows(program, x.args[0], vector, inner, 2 * inner)
    heads = value_heads(x)
    if heads is None:
        return False
    rows = untied(vector, heads)
    attention = x
    while not is_call(attention, ATTENTION):
        attention = attention.args[0]
        if not is_sole(attention):
            return False
    v: Any = attention.args[2]
    return rows is not None and is_sole(v) and scale_source(program, v, rows)


def _fold_norm(program: Program, norm: fx.Node, factor: fx.Node) -> bool:
    at = 1 if norm.target is RMS_NORM else 2
    weight, offset = norm.args[at], norm.args[at + 2]
    if not isinstance(weight, fx.Node) or program.input_of(weight) is None:
        return False
    new = (_tensor(program, weight).float() + float(offset)) * _tensor(program, factor).float()
    norm.args = (
        *norm.args[:at],
        _stored(program, weight, new.to(value(weight).dtype)),
        norm.args[at + 1],
        0.0,
        *norm.args[at + 3 :],
    )
    return True


def _tensor(program: Program, placeholder: fx.Node) -> Tensor:
    spec = program.input_of(placeholder)
    assert spec is not None
    return program.weights[spec.key].load()


def _stored(program: Program, like: fx.Node, tensor: Tensor) -> fx.Node:
    """An input that holds `tensor`, in the place of one like it, whose other readers keep it."""
    spec = program.input_of(like)
    assert spec is not None
    key = program.weights.add(f"{spec.key}.folded", Weight.from_tensor(tensor))
    return program.add_input(f"{like.name}_folded", kind="weight", key=key, example=value(like))
