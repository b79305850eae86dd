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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.linear_format import LinearFormat
from ..graph.program import Program
from ..graph.quantized_linear import QUANTIZED_LINEAR
from ..graph.weights import Weight
from .base import GraphPass, Stage, only_user
from .match import VIEWS, aten, is_call, value
from .quantization.channels import untied, value_heads
from .quantize_fp8 import SCALED_LINEAR
from .resolve_masks import ATTENTION

RMS_NORM = torch.ops.camshaft.rms_norm.default
ADD_RMS_NORM = torch.ops.camshaft.add_rms_norm.default
GLU = torch.ops.camshaft.glu.default

_SCALES = {QUANTIZED_LINEAR: 2, SCALED_LINEAR: 3}
"""Argument of a quantized layer that holds its rows' scales."""
_BIASES = {QUANTIZED_LINEAR: 5, SCALED_LINEAR: 4, aten.linear.default: 2}


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
        return _sole(x.args[0]) and _fold_rows(program, x.args[0], vector, inner, 2 * inner)
    heads = value_heads(x)
    if heads is None:
        return False
    rows = untied(vector, heads)
    attention = x
    while not is_call(attention, ATTENTION):
        attention = attention.args[0]
        if not _sole(attention):
            return False
    return rows is not None and _fold_values(program, attention.args[2], rows)


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


def _fold_values(program: Program, v: Any, rows: Tensor) -> bool:
    """Scales the rows of the layer that makes attention's values v [1, G, T, V], through views, a transposition and a split."""
    while is_call(v, *VIEWS, aten.transpose.int) and _sole(v):
        v = v.args[0]
    if not is_call(v, operator.getitem):
        return _sole(v) and _fold_rows(program, v, rows, 0, rows.shape[0])
    split, index = v.args
    if not (is_call(split, aten.split_with_sizes.default) and _sole(v) and _sole(split.args[0])):
        return False
    begin = sum(split.args[1][:index])
    return split.args[1][index] == rows.shape[0] and _fold_rows(
        program, split.args[0], rows, begin, begin + rows.shape[0]
    )


def _fold_rows(program: Program, layer: Any, factor: Tensor, begin: int, end: int) -> bool:
    """Multiplies rows begin to end of a linear layer's weight, or of its scales, and of its bias."""
    changes = list(_row_tensors(program, layer))
    if not changes:
        return False
    arguments = list(layer.args)
    for at in changes:
        old = arguments[at]
        new = _tensor(program, old).clone()
        shape = (-1, *[1] * (new.dim() - 1))
        new[begin:end] = (new[begin:end].float() * factor.float().view(shape)).to(new.dtype)
        arguments[at] = _stored(program, old, new)
    layer.args = tuple(arguments)
    return True


def _row_tensors(program: Program, layer: Any) -> Iterator[int]:
    """The arguments of a layer whose rows are its outputs' scales; none where rows cannot be scaled alone."""
    if not is_call(layer, *_BIASES):
        return
    at = 1 if layer.target is aten.linear.default else _SCALES[layer.target]
    if layer.target is QUANTIZED_LINEAR:
        format = LinearFormat.parse(layer.args[7])
        if format.block or format.group < 0:
            return
    bias_at = _BIASES[layer.target]
    bias = layer.args[bias_at] if len(layer.args) > bias_at else None
    for operand in (layer.args[at], bias):
        if operand is not None and (program.input_of(operand) is None or not value(operand).dtype.is_floating_point):
            return
    if layer.target is not aten.linear.default and value(layer.args[at]).dtype != torch.float32:
        return
    yield at
    if bias is not None:
        yield bias_at


def _sole(node: Any) -> bool:
    return isinstance(node, fx.Node) and only_user(node) is not None


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
