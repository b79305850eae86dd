"""Tables of an engine's lowered segments: every engine file, and what `auto` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .common import format_bytes, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..export.manifest import EngineFile, Manifest
    from ..export.segment import Plan, Segment


def engine_document(file: EngineFile, segment: Segment, num_bytes: int | None) -> dict[str, Any]:
    """One engine file as plain data."""
    inputs, outputs = interface(segment, file.tokens)
    return {
        "file": file.file,
        "target": file.target,
        "tokens": file.tokens,
        "bytes": num_bytes,
        "inputs": inputs,
        "num_outputs": outputs,
        **file.details,
    }


def interface(segment: Segment, tokens: int | None) -> tuple[dict[str, str], int]:
    """(input name -> dtype and shape, number of outputs) of a segment's engine; weights are w0, w1, ..."""
    inputs = {}
    for entry in segment.placeholders:
        sizes = [tokens if isinstance(s, str) and tokens is not None else s for s in entry["shape"]]
        inputs[entry["name"]] = f"{entry['dtype']}[{', '.join(map(str, sizes))}]"
    return inputs, segment.num_outputs


def engine_table(plan: Plan, manifest: Manifest, sizes: Mapping[str, int]) -> Table:
    """Every engine file: what it takes, its layers, size and build time."""
    rows = []
    for key, segment in plan.segments.items():
        for file in manifest.engines_of(key):
            inputs, _ = interface(segment, file.tokens)
            activations = ", ".join(text for name, text in inputs.items() if name.startswith("x"))
            layers = file.details.get("layers", {})
            most = sorted(layers.items(), key=lambda item: -item[1])[:4]
            seconds = file.details.get("seconds")
            rows.append(
                [
                    file.file,
                    file.target,
                    "any" if file.tokens is None else file.tokens,
                    f"{activations} + {segment.num_weights} weights",
                    f"{sum(layers.values())}: " + ", ".join(f"{name} {count}" for name, count in most)
                    if layers
                    else "-",
                    format_bytes(sizes[file.file]) if file.file in sizes else "-",
                    "-"
                    if seconds is None
                    else f"{seconds:.2f} s" + (" (cached)" if file.details.get("cached") else ""),
                ]
            )
    columns = ["engine", "target", "size", "inputs", "layers", "bytes", "built in"]
    return table(f"Engines: {len(rows)}", columns, rows, left=(0, 1, 3, 4))


def choice_table(manifest: Manifest) -> Table:
    """What `auto` measured: one line for each segment and bucket."""
    targets = list(dict.fromkeys(name for row in manifest.choices for name in row["ms"]))
    rows = []
    for row in manifest.choices:
        times = [f"{1e3 * row['ms'][name]:.1f}" if name in row["ms"] else "-" for name in targets]
        rows.append([row["segment"], row["runs"], row["size"] or "any", *times, row["target"]])
    columns = ["segment", "runs", "tokens", *(f"{name} µs" for name in targets), "chosen"]
    return table("auto: device time of each segment", columns, rows, left=(0, len(columns) - 1))
