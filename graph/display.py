"""How a Program and its pass table show themselves: HTML for notebooks, text for terminals, SVG for graphs."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import fx

from .drawing import Box, draw
from .dump import target_text, type_text
from .program import PassRecord, Program

KINDS = {
    "attention": (
        "camshaft.attention",
        "camshaft.paged_attention",
        "camshaft.paged_rope_attention",
        "aten.scaled_dot_product_attention",
    ),
    "linear": ("aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm", "aten.conv1d"),
    "experts": ("camshaft.moe",),
    "norm": (
        "camshaft.rms_norm",
        "camshaft.add_rms_norm",
        "aten.layer_norm",
        "aten.native_layer_norm",
        "aten.rms_norm",
    ),
    "position": ("camshaft.rope", "aten.cos", "aten.sin"),
    "gate": ("camshaft.glu", "aten.silu", "aten.gelu", "aten.relu", "aten.sigmoid", "aten.tanh"),
    "lookup": ("aten.embedding", "aten.index_select"),
}
"""Kind of a box -> the operators that it stands for; anything else is "other"."""

_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

PLUMBING = (
    "getitem",
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.transpose",
    "aten.permute",
    "aten.t",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.expand",
    "aten.slice",
    "aten.clone",
    "aten.contiguous",
    "aten.split_with_sizes",
    "aten.split",
    "aten.chunk",
    "aten._to_copy",
    "aten.sym_size",
)
"""Operators that move or cast values; they are left out of drawings, and edges go through them."""

Row = Sequence[object]


class PassTable(Sequence[PassRecord]):
    """Pass records that print as a table, in a terminal and in a notebook."""

    def __init__(self, records: Iterable[PassRecord]) -> None:
        self._records = tuple(records)

    @overload
    def __getitem__(self, index: int) -> PassRecord: ...

    @overload
    def __getitem__(self, index: slice) -> PassTable: ...

    def __getitem__(self, index: int | slice) -> PassRecord | PassTable:
        return PassTable(self._records[index]) if isinstance(index, slice) else self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __str__(self) -> str:
        return pass_table_text(self._records)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return pass_table_html(self._records)


# ----------------------------------------------------------------------------------------------------------- pass table
def _pass_rows(history: Sequence[PassRecord]) -> tuple[list[str], list[list[str]]]:
    head = ["#", "pass", "stage", "matches", "nodes", "ms"]
    compared = any(record.max_error is not None for record in history)
    if compared:
        head.append("max error")
    rows = []
    for number, record in enumerate(history, start=1):
        nodes = f"{record.nodes_before} → {record.nodes_after}"
        row = [str(number), record.name, record.stage, str(record.num_matches), nodes, f"{1e3 * record.seconds:.1f}"]
        if compared:
            row.append("" if record.max_error is None else f"{record.max_error:.2e}")
        rows.append(row)
    return head, rows


def pass_table_text(history: Sequence[PassRecord]) -> str:
    """The pass table as aligned text: one line per pass, and the errors where they were measured."""
    head, rows = _pass_rows(history)
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    left = (1, 2)  # name and stage

    def line(row: list[str]) -> str:
        cells = (c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths)))
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in [head, *rows])


def pass_table_html(history: Sequence[PassRecord]) -> str:
    """The pass table as an HTML table."""
    head, rows = _pass_rows(history)
    return table_html(head, rows, text_columns=(1, 2))


def table_html(head: Row | None, rows: Iterable[Row], *, text_columns: Iterable[int] = ()) -> str:
    """An HTML table of escaped cells; numbers stand right, the columns named in `text_columns` left."""
    left = set(text_columns)

    def line(row: Row, tag: str) -> str:
        cells = "".join(
            f'<{tag} style="text-align:{"left" if k in left else "right"};padding:1px 8px">{html.escape(str(cell))}</{tag}>'
            for k, cell in enumerate(row)
        )
        return f"<tr>{cells}</tr>"

    top = line(head, "th") if head is not None else ""
    return '<table style="border-collapse:collapse">' + top + "".join(line(row, "td") for row in rows) + "</table>"


def details_html(summary: str, body: str, *, opened: bool = False) -> str:
    """A block that folds; `body` is HTML, `summary` text."""
    return f"<details{' open' if opened else ''}><summary>{html.escape(summary)}</summary>{body}</details>"


def svg_html(svg: str, max_height: int = 900) -> str:
    """An SVG in a frame that scrolls."""
    return f'<div style="overflow:auto;max-height:{max_height}px">{svg}</div>'


# -------------------------------------------------------------------------------------------------------------- program
def program_html(program: Program) -> str:
    """A Program for a notebook: summary, pass table, drawing and, folded, the node table."""
    facts: list[Row] = [
        ("kind", program.kind),
        ("nodes", f"{len(program.graph.nodes)}: {_operator_counts(program)}"),
        ("inputs", ", ".join(_input_text(program))),
        ("weights", f"{len(program.weights)}, {program.weights.num_bytes / 1e6:.1f} MB"),
    ]
    if program.cache is not None:
        windows = ", ".join("full" if not window else f"window {window}" for window in program.cache.windows)
        facts.append(
            ("KV cache", f"{len(program.cache.layers)} layers ({windows}), blocks of {program.cache.block_size}")
        )
    parts = [f"<b>Program {html.escape(program.name)}</b>", table_html(None, facts, text_columns=(0, 1))]
    if program.history:
        parts.append(details_html(f"{len(program.history)} passes", pass_table_html(program.history), opened=True))
    parts.append(svg_html(program_svg(program)))
    parts.append(details_html(f"{len(program.graph.nodes)} nodes", node_table_html(program)))
    return "<div>" + "".join(parts) + "</div>"


def node_table_html(program: Program) -> str:
    """Every node with its type, operator and arguments, one row each."""
    rows = []
    for node in program.graph.nodes:
        spec = program.input_of(node)
        if spec is not None:
            operator, arguments = f"{spec.kind} input", spec.key
        elif node.op == "output":
            operator, arguments = "output", str(node.args[0])
        else:
            operator = target_text(node)
            arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        rows.append((node.name, type_text(node.meta.get("val")), operator, arguments))
    return table_html(("node", "type", "operator", "arguments"), rows, text_columns=range(4))


def _operator_counts(program: Program) -> str:
    names = Counter(target_text(node) for node in program.graph.nodes if node.op == "call_function")
    common = [f"{name} × {count}" for name, count in names.most_common(6)]
    return ", ".join(common) + (", ..." if len(names) > 6 else "")


def _input_text(program: Program) -> list[str]:
    return [
        f"{spec.name} {type_text(node.meta['val'])}"
        for node, spec in program.placeholders()
        if spec.kind in ("token", "user", "metadata")
    ]


# -------------------------------------------------------------------------------------------------------------- drawing
def program_svg(program: Program) -> str:
    """The graph as an SVG: inputs at the top, a box per operator that computes, repeated layers in one frame "x N".

    Weights, caches and paging metadata are named in the boxes and their tooltips; what only moves or casts values is left out.
    """
    return draw(program_boxes(program), label=program.name)


def program_boxes(program: Program) -> list[Box]:
    """The boxes of a Program's drawing, in topological order."""
    specs = {spec.name: spec for spec in program.inputs}
    boxes: list[Box] = []
    sources: dict[fx.Node, tuple[int, ...]] = {}  # the boxes that a node's value comes from

    def add(node: fx.Node, box: Box) -> None:
        sources[node] = (len(boxes),)
        boxes.append(box)

    def reads(node: fx.Node) -> tuple[int, ...]:
        for operand in node.all_input_nodes:
            if operand not in sources:  # an input stands right above its first reader
                spec = specs[operand.name]
                hidden = spec.kind in ("weight", "cache") or (spec.kind == "metadata" and spec.key != "sample_rows")
                if hidden:
                    sources[operand] = ()
                else:
                    tooltip = f"{spec.kind} input {spec.name}"
                    add(operand, Box(spec.name, type_text(operand.meta["val"]), "input", (), tooltip))
        return tuple(dict.fromkeys(box for operand in node.all_input_nodes for box in sources[operand]))

    for node in program.graph.nodes:
        if node.op == "output":
            add(node, Box("output", "", "output", reads(node)))
        elif node.op == "call_function":
            name = target_text(node)
            if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
                sources[node] = ()  # a size: no edge of its own
                continue
            if name in PLUMBING:
                sources[node] = reads(node)
                continue
            add(node, _node_box(program, node, name, reads(node)))
    return boxes


def _node_box(program: Program, node: fx.Node, name: str, inputs: tuple[int, ...]) -> Box:
    value = node.meta["val"]
    shown = value[0] if isinstance(value, tuple | list) and value else value
    keys = [spec.key for operand in node.all_input_nodes if (spec := program.input_of(operand)) is not None]
    title = name.removeprefix("camshaft.").removeprefix("aten.")
    kind = _KIND_OF.get(name, "other")
    weight = _short_weight(program, node) if kind in ("linear", "experts") else ""
    if weight:
        title = f"{title} {weight}"
    window = node.args[7] if name == "camshaft.attention" else node.args[12] if "paged" in name else 0
    if isinstance(window, int) and window:
        title = f"{title} window {window}"
    tooltip = "\n".join([f"{node.name} = {name}", type_text(value), *keys])
    return Box(title, type_text(shown), kind, inputs, tooltip)


def _short_weight(program: Program, node: fx.Node) -> str:
    """The weight matrix of a node, as short as it stays clear: q_proj+k_proj+v_proj."""
    for operand in node.all_input_nodes:
        spec: Any = program.input_of(operand)
        if spec is not None and spec.kind == "weight" and "weight" in spec.key:
            first, *rest = spec.key.split("+")
            stem = first.split(".weight")[0].rsplit(".", 1)[-1]
            text = "+".join([stem, *rest])
            return text if len(text) <= 40 else text[:39] + "…"
    return ""
