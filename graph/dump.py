"""Text dumps of a Program: one line per node with shape and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx

from .program import Program

_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b1",
    torch.float64: "f64",
    torch.uint8: "u8",
    torch.int8: "i8",
}


def type_text(value: Any) -> str:
    """A value's type, such as f32[1, T, 64]; the one varying token size reads T."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size) if isinstance(size, int) else "T" for size in value.shape)
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(type_text(item) for item in value) + ")"
    return type(value).__name__


def target_text(node: fx.Node) -> str:
    """An operator's short name, such as aten.linear or camshaft.rope."""
    name = getattr(node.target, "name", None)
    if callable(name):
        namespace, _, rest = name().partition("::")
        return f"{namespace}.{rest.split('.')[0]}"
    return getattr(node.target, "__name__", str(node.target))


def program_text(program: Program) -> str:
    """The whole program as text: inputs first, then one node a line; its parts behind it."""
    lines = [f"# {program.name}: {len(program.graph.nodes)} nodes, {len(program.weights)} weights"]
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = program.input_of(node)
            detail = f"{spec.kind} {spec.key}" if spec is not None else "?"
            lines.append(f"{node.name}: {type_text(node.meta.get('val'))} = {detail}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        else:
            args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
            lines.append(f"{node.name}: {type_text(node.meta.get('val'))} = {target_text(node)}({args})")
    return "\n\n".join(["\n".join(lines), *(program_text(part).rstrip() for part in program.parts.values())]) + "\n"


def dump_program(program: Program, path: Path) -> None:
    """Writes `program_text` to a file; the directory is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(program_text(program))
