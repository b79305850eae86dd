"""Partition: cuts a Program at paged attention and at operators that the target does not lower.

Every piece becomes a graph of its own with canonical names (x0.. activations, w0.. weights, n0.. nodes), so that equal layers
give equal graphs and are lowered once. Sizes that vary are read from a tensor of the piece itself.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph import ops as _ops  # noqa: F401  registers camshaft::*
from ..graph.dump import target_text
from ..graph.program import Program
from ..graph.serialize import graph_hash, graph_to_json
from .segment import AttentionStep, Plan, Segment, SegmentStep, Step

_PAGED = (torch.ops.camshaft.paged_attention.default, torch.ops.camshaft.paged_rope_attention.default)
_SYM_SIZE = torch.ops.aten.sym_size.int


@dataclass
class _Piece:
    """Consecutive nodes of one kind: "dense", "eager", "rows" (the choice of sampled rows, in PyTorch) or "attention"."""

    kind: str
    nodes: list[fx.Node] = field(default_factory=list)


def partition(program: Program, supports: Callable[[fx.Node], bool], *, split_rows: bool = False) -> Plan:
    """Cuts `program` into a Plan; `supports(node)` says whether the target lowers a node.

    split_rows: also cuts where the rows that are sampled are taken, so that one size at most varies in each segment.
    """
    pieces = _pieces(program, supports, split_rows)
    output = next(node for node in program.graph.nodes if node.op == "output")
    results = list(output.args[0])
    symbols = _symbol_names(program)
    segments: dict[str, Segment] = {}
    steps: list[Step] = []
    report: list[str] = []
    home = {node: index for index, piece in enumerate(pieces) for node in piece.nodes}
    for index, piece in enumerate(pieces):
        if piece.kind == "attention":
            steps.append(_attention_step(program, piece.nodes[0]))
            continue
        leaving = [n for n in piece.nodes if n in results or any(home.get(u, index) != index for u in _readers(n))]
        if not leaving:
            continue
        builder = _Builder(program, symbols)
        segment, step = builder.build(piece, leaving)
        segments.setdefault(segment.id, segment)
        steps.append(step)
        if piece.kind == "eager":
            names = sorted(
                {target_text(n) for n in piece.nodes if n.target is not operator.getitem and not supports(n)}
            )
            report.append(f"{', '.join(names)} runs in PyTorch (no lowering)")
    inputs = [
        node.name
        for node, spec in program.placeholders()
        if spec.kind in ("token", "user") or spec.key == "sample_rows"
    ]
    return Plan(segments, steps, inputs, [node.name for node in results], sorted(set(report)))


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users that need the value itself; size arithmetic is repeated in each piece."""
    readers = []
    for user in node.users:
        if user.op == "output":
            continue
        readers.extend(_readers(user) if _is_size(user) else [user])
    return readers


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and not isinstance(node.meta.get("val"), torch.Tensor | tuple | list)


def _pieces(program: Program, supports: Callable[[fx.Node], bool], split_rows: bool) -> list[_Piece]:
    pieces: list[_Piece] = []
    sample_rows = next((node for node, spec in program.placeholders() if spec.key == "sample_rows"), None)
    for node in program.graph.nodes:
        if node.op != "call_function" or _is_size(node):
            continue
        if node.target in _PAGED:
            pieces.append(_Piece("attention", [node]))
            continue
        if node.target is operator.getitem:
            owner = next(piece for piece in pieces if node.args[0] in piece.nodes)
            owner.nodes.append(node)
            continue
        if split_rows and sample_rows is not None and sample_rows in node.all_input_nodes:
            kind = "rows"
        else:
            kind = "dense" if supports(node) else "eager"
        if not pieces or pieces[-1].kind != kind:
            pieces.append(_Piece(kind))
        pieces[-1].nodes.append(node)
    return pieces


def _symbol_names(program: Program) -> dict[str, str]:
    """Symbols of the traced graph to the names that a saved graph uses: T for tokens, R for sampled rows."""
    names: dict[str, str] = {}
    for _, spec in program.placeholders():
        for size in re.findall(r"[a-z]+\d+", " ".join(s for s in spec.shape if isinstance(s, str))):
            if size not in names:
                names[size] = (
                    "R" if spec.key == "sample_rows" else "T" if "T" not in names.values() else f"D{len(names)}"
                )
    return names


def _attention_step(program: Program, node: fx.Node) -> AttentionStep:
    q, k, v, k_cache, _, slots, _, _, _, sinks, slopes, scale, window, softcap, *rope = node.args
    cos, sin, interleaved = rope or (None, None, False)
    specs = {spec.name: spec for spec in program.inputs}

    def weight(operand: Any) -> str | None:
        if operand is None:
            return None
        if operand.name not in specs:
            raise ValueError(
                f"{program.name}: {operand.name} of {node.name} is computed; only stored sinks and slopes are supported"
            )
        return specs[operand.name].key

    return AttentionStep(
        layer=int(specs[k_cache.name].key.split(".")[1]),
        group=int(specs[slots.name].key.split(".")[1]),
        q=q.name,
        k=k.name,
        v=v.name,
        output=node.name,
        sinks=weight(sinks),
        alibi_slopes=weight(slopes),
        scale=float(scale),
        window=int(window),
        softcap=float(softcap),
        cos=cos.name if cos is not None else None,
        sin=sin.name if sin is not None else None,
        interleaved=bool(interleaved),
    )


class _Builder:
    """Copies the nodes of one piece into a graph of its own."""

    def __init__(self, program: Program, symbols: dict[str, str]) -> None:
        self.program, self.symbols = program, symbols
        self.specs = {spec.name: spec for spec in program.inputs}
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.count = 0
        self.sizes: dict[str, int] = {}

    def build(self, piece: _Piece, leaving: list[fx.Node]) -> tuple[Segment, SegmentStep]:
        inside = set(piece.nodes)
        activations, weights = self._outside(piece, inside)
        for index, node in enumerate(activations):
            self._placeholder(node, f"x{index}")
        for index, node in enumerate(weights):
            self._placeholder(node, f"w{index}")
        for node in piece.nodes:
            self._copy(node)
        self.graph.output(tuple(self.made[node] for node in leaving))
        nodes = graph_to_json(self.graph)
        eager = piece.kind in ("eager", "rows")
        segment = Segment(
            graph_hash(nodes) + ("e" if eager else ""),
            nodes,
            len(activations),
            len(weights),
            len(leaving),
            eager,
            self.sizes if self.program.kind == "module" else {},
        )
        step = SegmentStep(
            segment.id,
            tuple(self.specs[node.name].key for node in weights),
            tuple(node.name for node in activations),
            tuple(node.name for node in leaving),
        )
        return segment, step

    def _outside(self, piece: _Piece, inside: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        activations: dict[fx.Node, None] = {}
        weights: dict[fx.Node, None] = {}
        leaves: list[fx.Node] = []
        for node in piece.nodes:
            for operand in node.all_input_nodes:
                if operand in inside:
                    continue
                if _is_size(operand):
                    leaves.extend(_size_leaves(operand))
                    continue
                (weights if self._is_weight(operand) else activations)[operand] = None
        for leaf in leaves:
            if not self._find_size(str(leaf.meta["val"]), list(activations)):
                for source in leaf.all_input_nodes:
                    if source not in inside:
                        (weights if self._is_weight(source) else activations)[source] = None
        return list(activations), list(weights)

    def _is_weight(self, node: fx.Node) -> bool:
        spec = self.specs.get(node.name) if node.op == "placeholder" else None
        return spec is not None and spec.kind == "weight"

    def _find_size(self, text: str, nodes: list[fx.Node]) -> tuple[fx.Node, int] | None:
        for node in nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                for axis, size in enumerate(value.shape):
                    if not isinstance(size, int) and str(size) == text:
                        return node, axis
        return None

    def _placeholder(self, node: fx.Node, name: str) -> None:
        new = self.graph.placeholder(name)
        value = node.meta["val"]
        shape = [int(s) if isinstance(s, int) else self._size_text(s) for s in value.shape]
        new.meta["spec"] = (tuple(shape), str(value.dtype).removeprefix("torch."))
        new.meta["val"] = value
        self.made[node] = new

    def _size_text(self, size: torch.SymInt) -> str:
        text = re.sub(r"[a-z]+\d+", lambda found: self.symbols.get(found[0], found[0]), str(size))
        self.sizes[text] = size.node.hint if size.node.has_hint() else 8
        return text

    def _copy(self, node: fx.Node) -> None:
        args = fx.node.map_arg(node.args, self._value)
        kwargs = fx.node.map_arg(node.kwargs, self._value)
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=f"n{self.count}")
        self.count += 1
        new.meta["val"] = node.meta["val"]
        self.made[node] = new

    def _value(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            self.made[node] = self._size(node)
        return self.made[node]

    def _size(self, node: fx.Node) -> fx.Node:
        """Repeats the computation of a size out of a tensor that this piece has."""
        text = str(node.meta["val"])
        found = self._find_size(text, list(self.made.values()))
        if found is not None:
            new = self.graph.create_node("call_function", _SYM_SIZE, found, {}, name=f"n{self.count}")
        else:
            args = fx.node.map_arg(node.args, self._value)
            new = self.graph.create_node("call_function", node.target, args, {}, name=f"n{self.count}")
        self.count += 1
        new.meta["val"] = node.meta["val"]
        return new


def _size_leaves(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a tensor, out of those that a size is computed from."""
    if any(not _is_size(operand) for operand in node.all_input_nodes):
        return [node]
    return [leaf for operand in node.all_input_nodes for leaf in _size_leaves(operand)]
