"""select_rows: the language-model head runs only for the rows that are sampled.

    before                                          after
    y = linear(h, w_vocabulary)   [1, T, V]         s = index_select(h, 1, sample_rows)     [1, R, C]
    logits = tanh(y / cap) * cap                    y = linear(s, w_vocabulary)             [1, R, V]; the rest as before

    xq, xs = rms_norm_quantize(h, w, ...)           s = index_select(h, 1, sample_rows);    xq, xs = rms_norm_quantize(s, w, ...)
    y = scaled_linear(xq, xs, ...)                  y = scaled_linear(xq, xs, ...)          likewise behind the other quantizations

New input: sample_rows [R] int64, indices of rows. If no head is recognised, rows are taken from the logits themselves.
The output changes its meaning: R rows instead of T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ..graph.program import Program
from ..graph.quantized_linear import QUANTIZED_LINEAR
from .base import GraphPass, Stage, only_user
from .fuse_norm_quantize import ADD_RMS_NORM_QUANTIZE
from .match import ADDS, CASTS, COPIES, MULS, aten, call, infer, is_call, value
from .quantize_fp8 import SCALED_LINEAR, call_parts

_POINTWISE = (*CASTS, *COPIES, *MULS, *ADDS, aten.div.Tensor, aten.tanh.default, aten.clamp.default)


class SelectRows(GraphPass):
    """Moves the choice of sampled rows in front of the head."""

    name = "select_rows"
    stage = Stage.CACHE
    numerics = "changed"

    def run(self, program: Program) -> int:
        output = next(node for node in program.graph.nodes if node.op == "output")
        logits = output.args[0][0]
        head = head_of(logits)
        reader = head if head is not None else output
        rows = program.add_input("sample_rows", kind="metadata", key="sample_rows", example=_varying_rows(logits))
        with program.graph.inserting_before(reader):
            if is_call(head, SCALED_LINEAR):
                replaced = _quantize_selected(program, head, rows)
            else:
                target = head.args[0] if head is not None else logits
                replaced = {target: call(program, aten.index_select.default, target, 1, rows)}
        for old, new in replaced.items():
            reader.replace_input_with(old, new)
        for new in replaced.values():
            _infer_below(program, new)
        return 1


def _quantize_selected(program: Program, head: fx.Node, rows: fx.Node) -> dict[fx.Node, fx.Node]:
    """What the head reads -> the same of the sampled rows: rows in fp8 and their scales, made anew from the rows before."""
    quantizer = head.args[0].args[0]
    num_sources = 2 if is_call(quantizer, ADD_RMS_NORM_QUANTIZE) else 1
    sources = [call(program, aten.index_select.default, source, 1, rows) for source in quantizer.args[:num_sources]]
    parts = call_parts(program, quantizer.target, *sources, *quantizer.args[num_sources:])
    return dict(zip(head.args[:2], parts))


def head_of(logits: Any) -> fx.Node | None:
    """The linear layer that makes the logits, behind scaling and soft caps; None if there is no such layer."""
    node = logits
    while is_call(node, *_POINTWISE):
        tensors = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]
        if len(tensors) != 1:
            return None
        node = tensors[0]
        if only_user(node) is None:
            return None
    layer = is_call(node, aten.linear.default, QUANTIZED_LINEAR, SCALED_LINEAR)
    return node if layer and value(node.args[0]).dim() == 3 else None


def _varying_rows(node: fx.Node) -> torch.Tensor:
    """An example of sample_rows [R], R varying, in the graph's fake tensor mode."""
    mode = value(node).fake_mode  # type: ignore[attr-defined]
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(
        torch.zeros(5, dtype=torch.int64), symbolic_context=context, source=ConstantSource("sample_rows")
    )


def _infer_below(program: Program, start: fx.Node) -> None:
    """Renews the example values of everything that depends on `start`."""
    stale = {start}
    for node in program.graph.nodes:
        if node.op == "call_function" and node is not start and any(n in stale for n in node.all_input_nodes):
            node.meta["val"] = infer(node)
            stale.add(node)
