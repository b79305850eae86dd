"""Puts quantized layers in the place of aten.linear: inputs for the stored tensors, and the operators that read them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from ...graph.linear_format import PARTS, LinearFormat, Part
from ...graph.program import Program
from ...graph.quant_formats import dequantize_weight
from ...graph.quantized_linear import QUANTIZED_LINEAR
from ...graph.weights import QuantizedParts, Weight
from ..match import aten, call, value
from ..quantize_fp8 import QUANTIZE_ROWS, SCALED_LINEAR, call_parts
from .algorithm import LayerPlan, QuantizedLayer
from .plan import FP8_ROWS, ROUNDED

_SUFFIXES: dict[Part, str] = {
    "values": "",
    "scale": ".scale",
    "zero_point": ".zero_point",
    "global_scale": ".global_scale",
}
"""What follows the format's kind in the keys of stored tensors: "q.weight.int4", "q.weight.int4.scale"."""


class LayerRewriter:
    """Rewrites the layers of one program; stored tensors, and quantized or scaled activations are made once each."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.count = 0
        self.bytes_before = 0
        self.bytes_after = 0
        self._stored: dict[tuple[str, LinearFormat], dict[Part, fx.Node]] = {}
        self._rounded: dict[tuple[str, LinearFormat], fx.Node] = {}
        self._rows: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._constants: dict[tuple[int, str], fx.Node] = {}
        self._inputs: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def replace(self, node: fx.Node, plan: LayerPlan, found: QuantizedLayer | None, *, dense: bool = False) -> None:
        """Puts the quantized form of one linear layer in its place. found: what an algorithm made; None: rounded to nearest.

        dense: the weight is rounded and stored in the compute dtype, and the layer stays aten.linear.
        """
        self.count += 1
        self.bytes_before += self.program.weights[plan.weight].num_bytes
        if dense:
            self._replace_weight(node, plan, found)
            return
        if found is None:
            stored, x_scale = self._round(node, plan), None
        else:
            stored, x_scale = self._found(node, plan, found), self._constant(node, "x_scale", found.x_scale)
        bias = node.args[2] if len(node.args) > 2 else None
        with self.program.graph.inserting_before(node):
            x = self._input(node, found)
            new = self._call(
                x, stored, x_scale, bias, plan.format if found is None else found.format, value(node).dtype
            )
        node.replace_all_uses_with(new)
        self.program.graph.erase_node(node)

    def _call(
        self,
        x: fx.Node,
        stored: dict[Part, fx.Node],
        x_scale: fx.Node | None,
        bias: object,
        format: LinearFormat,
        dtype: torch.dtype,
    ) -> fx.Node:
        if format == FP8_ROWS:
            if x not in self._rows:
                self._rows[x] = call_parts(self.program, QUANTIZE_ROWS, x)
            return call(self.program, SCALED_LINEAR, *self._rows[x], stored["values"], stored["scale"], bias, dtype)
        parts = [stored.get(part) for part in PARTS]
        return call(self.program, QUANTIZED_LINEAR, x, *parts, bias, x_scale, str(format))

    def _input(self, node: fx.Node, found: QuantizedLayer | None) -> fx.Node:
        """The layer's input with its channels scaled and ordered as an algorithm wants them."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if found is None:
            return x
        factor = None if found.channel_factor is None else found.channel_factor.to(value(x).dtype)
        for name, tensor, target in (
            ("channel_factor", factor, aten.mul.Tensor),
            ("order", found.order, aten.index_select.default),
        ):
            constant = self._constant(node, name, tensor, found)
            if constant is None:
                continue
            if (x, constant) not in self._inputs:
                args = (constant,) if target is aten.mul.Tensor else (value(x).dim() - 1, constant)
                self._inputs[x, constant] = call(self.program, target, x, *args)
            x = self._inputs[x, constant]
        return x

    # -------------------------------------------------------------------------------------------------- stored tensors
    def _round(self, node: fx.Node, plan: LayerPlan) -> dict[Part, fx.Node]:
        key = plan.weight, plan.format
        if key not in self._stored:
            parts = QuantizedParts(self.program.weights[plan.weight], plan.format, plan.recipe.candidates)
            self._stored[key] = {name: self._add_part(node, plan, name, parts.part(name)) for name in parts.shapes}
        return self._stored[key]

    def _found(self, node: fx.Node, plan: LayerPlan, found: QuantizedLayer) -> dict[Part, fx.Node]:
        tensors = {part: getattr(found.weight, part) for part in PARTS}
        plan = replace(plan, format=found.format)
        return {
            name: self._add_part(node, plan, name, Weight.from_tensor(tensor))
            for name, tensor in tensors.items()
            if tensor is not None
        }

    def _add_part(self, node: fx.Node, plan: LayerPlan, part: Part, weight: Weight) -> fx.Node:
        self.bytes_after += weight.num_bytes
        return self._add(node, f"{plan.weight}.{plan.format.weights}{_SUFFIXES[part]}", part, weight)

    def _add(self, node: fx.Node, key: str, name: str, weight: Weight) -> fx.Node:
        placeholder = node.args[1]
        assert isinstance(placeholder, fx.Node)
        with value(placeholder).fake_mode:  # type: ignore[attr-defined]
            example = torch.empty(weight.shape, dtype=weight.dtype)
        key = self.program.weights.add(key, weight)
        return self.program.add_input(f"{placeholder.name}_{name}", kind="weight", key=key, example=example)

    def _constant(
        self, node: fx.Node, name: str, tensor: Tensor | None, found: QuantizedLayer | None = None
    ) -> fx.Node | None:
        """A tensor that calibration found, as an input; layers that share the tensor share the input."""
        if tensor is None:
            return None
        owner = getattr(found, name) if found is not None else tensor
        if (id(owner), name) not in self._constants:
            plan_key = self.program.input_of(node.args[1])
            assert plan_key is not None
            made = self._add(node, f"{plan_key.key}.{name}", name, Weight.from_tensor(tensor))
            self._constants[id(owner), name] = made
        return self._constants[id(owner), name]

    # ------------------------------------------------------------------------------------------------------------ dense
    def _replace_weight(self, node: fx.Node, plan: LayerPlan, found: QuantizedLayer | None) -> None:
        key = plan.weight, plan.format
        if found is not None or key not in self._rounded:
            source = self.program.weights[plan.weight]
            if found is None:
                weight = QuantizedParts(source, plan.format, plan.recipe.candidates).dense()
            else:
                weight = Weight.from_tensor(dense_weight(found, source.dtype))
            self.bytes_after += weight.num_bytes
            self._rounded[key] = self._add(node, f"{plan.weight}.{plan.format.weights}", "rounded", weight)
        node.args = (node.args[0], self._rounded[key], *node.args[2:])
        node.meta[ROUNDED] = str(plan.format)


def dense_weight(found: QuantizedLayer, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that acts on the plain input as the quantized layer does on the scaled and ordered one."""
    matrix = dequantize_weight(found.weight, found.format)
    if found.order is not None:
        matrix = torch.empty_like(matrix).index_copy_(1, found.order, matrix)
    if found.channel_factor is not None:
        matrix = matrix * found.channel_factor
    return matrix.to(dtype)
