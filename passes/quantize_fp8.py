"""quantize_fp8: linear layers in float8_e4m3fn, with a scale per weight row and one per token.

    before                                          after
    y = linear(x, w, bias)                          xq, xs = camshaft.quantize_rows(x)
                                                    y = camshaft.scaled_linear(xq, xs, w8, ws, bias, dtype)
    x [.., K], w [N, K]                             xq [.., K] float8_e4m3fn, xs [.., 1] float32
    y [.., N] in `dtype`                            w8 [N, K] float8_e4m3fn, ws [N] float32, made in the WeightMap
                                                    y as before

No calibration: a weight's scales are chosen for the least squared error when it is read (`quantize_matrix`); a token's is its
max-abs / 448. Layers that read the same x share its quantization. Runs behind the fuse passes, so that joined projections are one
product. A layer stays as it is, and the program's notes say why, if it makes the logits, feeds a choice (a router), has a size
that is no multiple of 16, which fp8 matrix products need, or is so small that reading its weight takes less time than quantizing
its input. Experts (camshaft.moe) stay too. Numerics: quantized.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from ..graph.program import Program
from ..graph.weights import QuantizedRows
from .base import GraphPass, Stage
from .fuse_projections import is_router
from .match import aten, call, is_call, static, value
from .select_rows import head_of

QUANTIZE_ROWS = torch.ops.camshaft.quantize_rows.default
SCALED_LINEAR = torch.ops.camshaft.scaled_linear.default
MOE = torch.ops.camshaft.moe.default

_MULTIPLE = 16
"""What N and K must be multiples of: matrix products of fp8 read 16 bytes at a time."""
MIN_WEIGHTS = 1 << 17
"""Elements of a weight from which fp8 pays: a GPU reads fewer of them, in 16 bits, in a tenth of a microsecond."""


@dataclass
class QuantizeFp8(GraphPass):
    """Brings linear layers with a stored weight to fp8.

    head: also the layer that makes the logits; then the pass belongs behind select_rows, which looks for a plain one.
    """

    head: bool = False

    name = "quantize_fp8"
    stage = Stage.FUSE
    numerics = "quantized"

    def run(self, program: Program) -> int:
        logits_layer = _head(program)
        work = _Work(program)
        kept: dict[str, list[str]] = defaultdict(list)
        before = 0
        for node in list(program.graph.nodes):
            if is_call(node, MOE):
                kept["experts of camshaft.moe have no fp8 form"].append(_weight_name(program, node.args[3]))
            if not is_call(node, aten.linear.default):
                continue
            reason = "it makes the logits" if node is logits_layer and not self.head else _obstacle(program, node)
            if reason is None:
                before += _weight_bytes(program, node)
                work.replace(node)
            else:
                kept[reason].append(_weight_name(program, node.args[1]))
        _note(program, work.count, before, kept)
        return work.count


def _head(program: Program) -> fx.Node | None:
    """The layer of a language model that makes the logits; None for a module that is none."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    return head_of(output.args[0][0]) if program.kind == "decoder" else None


def _obstacle(program: Program, node: fx.Node) -> str | None:
    """Why a linear layer stays as it is, or None."""
    weight = node.args[1]
    spec = program.input_of(weight) if isinstance(weight, fx.Node) else None
    if spec is None or spec.kind != "weight" or value(weight).dim() != 2:
        return "its weight is computed"
    if not value(weight).dtype.is_floating_point or value(weight).dtype.itemsize < 2:
        return f"its weight is in {str(value(weight).dtype).removeprefix('torch.')}"
    sizes = [static(size) for size in value(weight).shape]
    if any(size is None or size == 0 or size % _MULTIPLE for size in sizes):
        return f"a size is no multiple of {_MULTIPLE}"
    if value(weight).numel() < MIN_WEIGHTS:
        return f"it has fewer than {MIN_WEIGHTS:,} weights"
    return "it feeds a choice (a router or gate)" if is_router(node) else None


class _Work:
    """Quantized weights and activations that were made, each once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.count = 0
        self._weights: dict[str, tuple[fx.Node, fx.Node]] = {}
        self._rows: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def replace(self, node: fx.Node) -> None:
        """Puts the fp8 form in the place of one linear layer."""
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else None
        stored = self._quantized_weight(weight)
        with self.program.graph.inserting_before(node):
            if x not in self._rows:
                self._rows[x] = call_parts(self.program, QUANTIZE_ROWS, x)
            new = call(self.program, SCALED_LINEAR, *self._rows[x], *stored, bias, value(node).dtype)
        node.replace_all_uses_with(new)
        self.program.graph.erase_node(node)
        self.count += 1

    def _quantized_weight(self, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
        spec = self.program.input_of(weight)
        assert spec is not None
        if spec.key not in self._weights:
            rows = QuantizedRows(self.program.weights[spec.key])
            values, scale = rows.part("values"), rows.part("scale")
            mode = value(weight).fake_mode  # type: ignore[attr-defined]
            nodes = []
            for made, suffix in ((values, "fp8"), (scale, "scale")):
                with mode:
                    example = torch.empty(made.shape, dtype=made.dtype)
                key = self.program.weights.add(f"{spec.key}.{suffix}", made)
                nodes.append(self.program.add_input(f"{weight.name}_{suffix}", kind="weight", key=key, example=example))
            self._weights[spec.key] = nodes[0], nodes[1]
        return self._weights[spec.key]


def call_parts(program: Program, target: object, *args: object) -> tuple[fx.Node, ...]:
    """Adds a call that returns several tensors, and the nodes that take them out."""
    both = call(program, target, *args)
    parts = []
    for index, example in enumerate(both.meta["val"]):
        part = program.graph.call_function(operator.getitem, (both, index))
        part.meta["val"] = example
        parts.append(part)
    return tuple(parts)


def _weight_name(program: Program, node: object) -> str:
    spec = program.input_of(node) if isinstance(node, fx.Node) else None
    return str(node) if spec is None else spec.key


def _weight_bytes(program: Program, node: fx.Node) -> int:
    spec = program.input_of(node.args[1])
    assert spec is not None
    return program.weights[spec.key].num_bytes


def _note(program: Program, count: int, before: int, kept: dict[str, list[str]]) -> None:
    """Adds what was done, and what was left and why, to the program's notes, which the build's report shows."""
    if not count and not kept:
        return
    lines = [f"fp8: {count} linear layers, {before / 1e6:.1f} MB of weights before"] if count else []
    for reason, names in kept.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"fp8: {names[0]}{more} not quantized: {reason}")
    program.info = {**program.info, "notes": (*program.info.get("notes", ()), *lines)}
