"""bind_stored_weights: linear layers whose weight the checkpoint stores quantized read what is stored.

    before                                          after
    y = linear(x, w, bias)                          y = camshaft.quantized_linear(x, values, scale, zero_point, global_scale,
    x [.., K], w [N, K] dense                               bias, input_scale, format)

    columns of w stored in another order (GPTQ's desc_act)
    y = linear(x, w, bias)                          g = index_select(x, -1, order)        one for layers with the same x and order
                                                    y = camshaft.quantized_linear(g, ...)

    fp8 with scales of rows and of tokens
    y = linear(x, w, bias)                          xq, xs = camshaft.quantize_rows(x)    one for layers with the same x
                                                    y = camshaft.scaled_linear(xq, xs, values, scale, bias, dtype)

Relies on `Weight.stored`, which joined projections have where fuse_projections joined what is stored. The layer that makes the
logits waits for select_rows, which looks for a plain one: the pass runs again behind it (head=True). Another use of such a weight,
as an embedding, reads it dense. A format for which the target has no kernel, where one is required, keeps its weights and leaves
activations as they are, or else the layer reads its weight dense: the notes say which. Numerics: quantized.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graph.linear_format import LinearFormat
from ..graph.program import Program
from ..graph.quantized_linear import QUANTIZED_LINEAR
from ..graph.stored_weight import StoredPart, StoredWeight
from ..graph.weights import Weight
from .base import GraphPass, Stage
from .match import aten, call, is_call, value
from .quantization.support import KernelSupport
from .quantize_fp8 import QUANTIZE_ROWS, SCALED_LINEAR, call_parts
from .select_rows import head_of

_FP8_ROWS = LinearFormat(weights="fp8", activations="fp8")
_MULTIPLE = 16
"""What N and K must be multiples of for products of fp8 rows."""


@dataclass
class BindStoredWeights(GraphPass):
    """Gives linear layers the tensors that their weight is stored as.

    kernels: of the target; None: the operator's definition runs every format. head: also the layer that makes the logits; then the
    pass belongs behind select_rows.
    """

    kernels: KernelSupport | None = None
    head: bool = False

    name = "bind_stored_weights"
    stage = Stage.FUSE
    numerics = "quantized"

    def options(self) -> dict[str, Any]:
        return {"head": self.head, "kernels": None if self.kernels is None else self.kernels.where}

    def run(self, program: Program) -> int:
        waits = None if self.head else _logits_layer(program)
        work = _Work(program)
        told: Counter[str] = Counter()
        for node in list(program.graph.nodes):
            weight = stored_weight(program, node.args[1]) if is_call(node, aten.linear.default) else None
            if weight is None or weight.stored is None or node is waits:
                continue
            format, reason = self._format(weight.stored)
            if reason is not None:
                told[reason] += 1
            if format is not None:
                work.replace(node, weight, format)
        notes = [f"stored weights: {count} layers {reason}" for reason, count in told.items()]
        if notes:
            program.info = {**program.info, "notes": (*program.info.get("notes", ()), *notes)}
        return work.count

    def _format(self, stored: StoredWeight) -> tuple[LinearFormat | None, str | None]:
        """The format in which a layer is computed, None: dense; and what has to be said about it, or None."""
        if self.kernels is None or not self.kernels.required:
            return stored.format, None
        why = self.kernels.missing(stored.format, stored.shape)
        if why is None:
            return stored.format, None
        lacks = f"in {stored.format}, for which {self.kernels.where} has no kernel ({why})"
        alone = replace(stored.format, activations="none")
        if alone != stored.format and self.kernels.missing(alone, stored.shape) is None:
            return alone, f"{lacks}: activations stay as they are"
        return None, f"{lacks}: they are dequantized, and activations stay as they are"


def stored_weight(program: Program, node: object) -> Weight | None:
    """The weight that a placeholder names, if the checkpoint stores it quantized."""
    spec = program.input_of(node) if isinstance(node, fx.Node) else None
    if spec is None or spec.kind != "weight":
        return None
    weight = program.weights[spec.key]
    return weight if weight.stored is not None else None


def _logits_layer(program: Program) -> fx.Node | None:
    output = next(node for node in program.graph.nodes if node.op == "output")
    return head_of(output.args[0][0]) if program.kind == "decoder" else None


class _Work:
    """Inputs and activations that were made, each once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.count = 0
        self._inputs: dict[tuple[str, StoredPart], fx.Node] = {}
        self._rows: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._ordered: dict[tuple[fx.Node, str], fx.Node] = {}

    def replace(self, node: fx.Node, weight: Weight, format: LinearFormat) -> None:
        """Puts the quantized form in the place of one linear layer. format: the stored one, or its weights alone."""
        assert weight.stored is not None
        stored = replace(weight.stored, format=format)
        rounds = format.activations != "none"
        names = [name for name in stored.parts if rounds or name != "input_scale"]
        parts = {name: self._input(node.args[1], weight, name) for name in names}
        bias = node.args[2] if len(node.args) > 2 else None
        with self.program.graph.inserting_before(node):
            x = self._in_order(node.args[0], stored, parts)
            new = self._layer(x, stored, parts, bias, value(node).dtype)
        node.replace_all_uses_with(new)
        self.program.graph.erase_node(node)
        self.count += 1

    def _layer(
        self, x: fx.Node, stored: StoredWeight, parts: dict[StoredPart, fx.Node], bias: object, dtype: torch.dtype
    ) -> fx.Node:
        if stored.format == _FP8_ROWS and not any(size % _MULTIPLE for size in stored.shape):
            if x not in self._rows:
                self._rows[x] = call_parts(self.program, QUANTIZE_ROWS, x)
            rows = self._rows[x]
            return call(self.program, SCALED_LINEAR, *rows, parts["values"], parts["scale"], bias, dtype)
        return call(
            self.program,
            QUANTIZED_LINEAR,
            x,
            parts["values"],
            parts["scale"],
            parts.get("zero_point"),
            parts.get("global_scale"),
            bias,
            parts.get("input_scale"),
            str(stored.format),
        )

    def _in_order(self, x: fx.Node, stored: StoredWeight, parts: dict[StoredPart, fx.Node]) -> fx.Node:
        """x with its columns in the order of the weight's."""
        if "order" not in parts:
            return x
        key = x, stored.equal["order"]
        if key not in self._ordered:
            dim = value(x).dim() - 1
            self._ordered[key] = call(self.program, aten.index_select.default, x, dim, parts["order"])
        return self._ordered[key]

    def _input(self, node: fx.Node, weight: Weight, name: StoredPart) -> fx.Node:
        """The placeholder of one stored tensor."""
        spec = self.program.input_of(node)
        assert spec is not None
        if (spec.key, name) not in self._inputs:
            assert weight.stored is not None
            part = weight.stored_part(name)
            with value(node).fake_mode:  # type: ignore[attr-defined]
                example = torch.empty(part.shape, dtype=part.dtype)
            suffix = "" if name == "values" else f".{name}"
            key = self.program.weights.add(f"{spec.key}.{weight.stored.format.weights}{suffix}", part)
            made = self.program.add_input(f"{node.name}_{name}", kind="weight", key=key, example=example)
            self._inputs[spec.key, name] = made
        return self._inputs[spec.key, name]
