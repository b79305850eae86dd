"""Factors of what a linear layer gives become part of its stored weight: the rows of the weight, or of its scales, and of its bias.

Rows of a quantized weight are scaled through their scales, which must be float32 and not shared between rows. Weights that other
nodes read too stay as they are; the layer reads new ones.
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
from ..graph.weights import make_weight
from .base import only_user
from .match import VIEWS, aten, is_call, value
from .quantize_fp8 import SCALED_LINEAR

_SCALES = {QUANTIZED_LINEAR: 2, SCALED_LINEAR: 3}
"""Argument of a quantized layer that holds its rows' scales."""
_BIASES = {QUANTIZED_LINEAR: 5, SCALED_LINEAR: 4, aten.linear.default: 2}


def scale_source(program: Program, x: fx.Node, factor: Tensor) -> bool:
    """Multiplies x, whose flat channels are [N], by `factor` [N] in the rows of the linear layer that x comes from.

    Between them may be views, transpositions of axes that are no channels, and a split, each read once; all that reads x gets it
    scaled. False: x is made otherwise, and nothing was done.
    """
    source: Any = x
    while is_call(source, *VIEWS, aten.transpose.int):
        source = source.args[0]
        if not is_sole(source):
            return False
    if not is_call(source, operator.getitem):
        return scale_rows(program, source, factor, 0, factor.shape[0])
    split, index = source.args
    if not (is_call(split, aten.split_with_sizes.default) and is_sole(split.args[0])):
        return False
    begin = sum(split.args[1][:index])
    return split.args[1][index] == factor.shape[0] and scale_rows(
        program, split.args[0], factor, begin, begin + factor.shape[0]
    )


def scale_rows(program: Program, layer: Any, factor: Tensor, begin: int, end: int, *, bias: bool = True) -> bool:
    """Multiplies rows begin to end of a linear layer's weight, or of its scales, by `factor` [end - begin].

    bias: the layer's bias as well. False: rows cannot be scaled alone, and nothing was done.
    """
    changes = list(_row_tensors(program, layer))
    if not changes:
        return False
    arguments = list(layer.args)
    for at in changes if bias else changes[:1]:
        arguments[at] = _scaled(program, arguments[at], factor, begin, end)
    layer.args = tuple(arguments)
    return True


def is_sole(node: Any) -> bool:
    """Whether a node has one reader."""
    return isinstance(node, fx.Node) and only_user(node) is not None


def _row_tensors(program: Program, layer: Any) -> Iterator[int]:
    """The arguments of a layer that have a row for each output: weight or scales, and bias; none where rows cannot be scaled."""
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


def _scaled(program: Program, like: fx.Node, factor: Tensor, begin: int, end: int) -> fx.Node:
    """An input like another one, rows begin to end times `factor`; made when it is read."""
    spec = program.input_of(like)
    assert spec is not None
    source = program.weights[spec.key]

    def make(parts: Iterator[Tensor]) -> Tensor:
        new = next(parts).clone()
        rows = factor.float().to(new.device).view(-1, *[1] * (new.dim() - 1))
        new[begin:end] = (new[begin:end].float() * rows).to(new.dtype)
        return new

    key = program.weights.add(f"{spec.key}.folded", make_weight([source], make, source.shape, source.dtype))
    return program.add_input(f"{like.name}_folded", kind="weight", key=key, example=value(like))
