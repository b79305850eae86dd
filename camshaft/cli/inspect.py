"""`camshaft inspect`: what is in an engine."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .build import segment_table, timings_text
from .common import JsonOption, Output, format_bytes, output, pass_table, precision_text, table
from .engines import choice_table, engine_document, engine_table

if TYPE_CHECKING:
    from ..export.manifest import Manifest
    from ..export.segment import Plan, Segment

EXAMPLES = "Example: [bold]camshaft inspect demo.engine --passes[/]"


def inspect(
    engine: Annotated[
        Path, typer.Argument(metavar="ENGINE", help="Directory that `camshaft build` wrote.", show_default=False)
    ],
    graph: Annotated[
        str | None,
        typer.Option(
            "--graph",
            metavar="SEGMENT",
            help="Print the graph of a segment (its id, or the beginning of it).",
            show_default=False,
        ),
    ] = None,
    passes: Annotated[bool, typer.Option("--passes", help="Only the passes that ran.")] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Only the weights: name, format of a quantized layer, file.")
    ] = False,
    engines: Annotated[
        bool,
        typer.Option("--engines", help="Only the engine files: inputs, layers, size, build time; what auto measured."),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="FILE",
            help="The layers of a TensorRT engine file as TensorRT's inspector sees them, as JSON; needs the GPU.",
            show_default=False,
        ),
    ] = None,
    files: Annotated[bool, typer.Option("--files", help="Only the files: size, sha256.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is in an engine: model, limits, passes, segments, KV cache, sizes. Reads no weights and runs nothing."""
    with output(as_json) as to:
        manifest, plan = read_engine(engine)
        if graph is not None:
            segment = _find_segment(plan, graph)
            to.document = {"segment": segment.id, "nodes": segment.nodes}
            to.print(segment_text(segment))
        elif passes:
            to.document = {"passes": [dataclasses.asdict(record) for record in manifest.passes]}
            to.console.print(pass_table(manifest.passes))
        elif weights:
            rows = _weights(engine, manifest, plan)
            to.document = {"weights": rows}
            cells = [
                [
                    r["name"],
                    r["format"] or "",
                    r["dtype"],
                    "x".join(map(str, r["shape"])),
                    format_bytes(r["bytes"]),
                    r["file"],
                ]
                for r in rows
            ]
            columns = ["weight", "format", "dtype", "shape", "size", "file"]
            to.console.print(table("Weights", columns, cells, left=(0, 1, 2, 5)))
        elif layers is not None:
            to.document = _layers(engine, manifest, layers)
            to.print(json.dumps(to.document, indent=1))
        elif engines:
            document = _document(manifest, plan)
            to.document = {key: document[key] for key in ("segments", "choices")}
            to.console.print(engine_table(plan, manifest, _sizes(manifest)))
            if manifest.choices:
                to.console.print(choice_table(manifest))
        elif files:
            to.document = {"files": manifest.files}
            cells = [
                [name, format_bytes(facts["bytes"]), facts["sha256"][:16]] for name, facts in manifest.files.items()
            ]
            to.console.print(table("Files", ["file", "size", "sha256"], cells, left=(0, 2)))
        else:
            to.document = _document(manifest, plan)
            _summary(to, engine, manifest, plan)


def _layers(path: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """What TensorRT's inspector says of an engine file. Raises ValueError for a file that it cannot open here."""
    from ..export.targets.base import LoweringError
    from ..export.targets.tensorrt import inspect_engine

    names = [file.file for file in manifest.engines if file.target == "tensorrt"]
    if name not in names:
        raise ValueError(f"{name} is no TensorRT engine of {path}; it has: {', '.join(names) or 'none'}")
    try:
        return inspect_engine(path / "engines" / name)
    except LoweringError as error:
        raise ValueError(str(error)) from error


def read_engine(path: Path) -> tuple[Manifest, Plan]:
    """Manifest and plan of an engine directory. Raises ValueError if it is none."""
    from ..export.artifact import is_artifact
    from ..export.manifest import Manifest
    from ..export.segment import Plan

    if not is_artifact(path):
        raise ValueError(
            f"{path} is not an engine (no manifest.json and plan.json); make one with `camshaft build MODEL -o {path}`"
        )
    manifest = Manifest.from_json((path / "manifest.json").read_text(), path / "manifest.json")
    try:
        return manifest, Plan.from_json(json.loads((path / "plan.json").read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}/plan.json is damaged ({type(error).__name__}: {error}); build or copy the engine again"
        ) from error


def _find_segment(plan: Plan, prefix: str) -> Segment:
    found = [segment for key, segment in plan.segments.items() if key.startswith(prefix)]
    if len(found) != 1:
        problem = "no segment begins" if not found else f"{len(found)} segments begin"
        raise ValueError(f"{problem} with {prefix!r}; this engine has: {', '.join(plan.segments)}")
    return found[0]


def segment_text(segment: Segment) -> str:
    """A segment's graph as text, one node a line."""
    lines = []
    for node in segment.nodes:
        if node["op"] == "placeholder":
            sizes = ", ".join(map(str, node["shape"]))
            kind = "activation" if node["name"].startswith("x") else "weight"
            lines.append(f"{node['name']} = {kind} {node['dtype']}[{sizes}]")
        elif node["op"] == "output":
            lines.append(f"return {_value(node['args'][0])}")
        else:
            arguments = [_value(arg) for arg in node["args"]]
            arguments += [f"{key}={_value(value)}" for key, value in (node.get("kwargs") or {}).items()]
            lines.append(f"{node['name']} = {node['target']}({', '.join(arguments)})")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict) and len(value) == 1:
        return str(next(iter(value.values())))
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return str(value)


_QUANTIZED = {"camshaft.quantized_linear.default": 1, "camshaft.scaled_linear.default": 2}
"""Where the weight stands among an operator's arguments."""


def _formats(plan: Plan) -> dict[str, str]:
    """Weight -> the format of the quantized layer that reads it, "weights/activations"."""
    from ..export.segment import SegmentStep

    found = {}
    for step in plan.steps:
        if not isinstance(step, SegmentStep):
            continue
        segment = plan.segments[step.segment]
        weights = dict(zip((entry["name"] for entry in segment.placeholders[segment.num_inputs :]), step.weights))
        for node in segment.nodes:
            if node.get("target") in _QUANTIZED:
                weight = node["args"][_QUANTIZED[node["target"]]]["node"]
                own = node["target"].startswith("camshaft.quantized")
                found[weights[weight]] = node["args"][-1] if own else "fp8/fp8"
    return found


def _weights(path: Path, manifest: Manifest, plan: Plan) -> list[dict[str, Any]]:
    from ..models.checkpoint import read_header

    formats = _formats(plan)
    headers: dict[str, Any] = {file: read_header(path / file) for file in set(manifest.weights.values())}
    rows = []
    for name, file in manifest.weights.items():
        shape, dtype = headers[file][name]
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        rows.append(
            {
                "name": name,
                "format": formats.get(name),
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(shape),
                "bytes": size,
                "file": file,
            }
        )
    return rows


def _sizes(manifest: Manifest) -> dict[str, int]:
    """Engine file -> bytes."""
    return {name.removeprefix("engines/"): facts["bytes"] for name, facts in manifest.files.items()}


def _groups(manifest: Manifest) -> list[dict[str, int]]:
    cache = manifest.cache
    return [
        {"window": window, "num_layers": len(cache.layers_of(group)), "bytes_per_block": cache.bytes_per_block(group)}
        for group, window in enumerate(cache.windows)
    ]


def _document(manifest: Manifest, plan: Plan) -> dict[str, Any]:
    from ..export.native_step import outlook
    from ..export.segment import SegmentStep

    uses = Counter(step.segment for step in plan.steps if isinstance(step, SegmentStep))
    sizes = _sizes(manifest)
    segments = [
        {
            "id": key,
            "runs": uses[key],
            "eager": segment.eager,
            "engines": [engine_document(file, segment, sizes.get(file.file)) for file in manifest.engines_of(key)],
            "num_weights": segment.num_weights,
            "operators": dict(Counter(segment.operators).most_common()),
        }
        for key, segment in plan.segments.items()
    ]
    return {
        "format_version": manifest.format_version,
        "camshaft_version": manifest.camshaft_version,
        "versions": manifest.versions,
        "hardware": manifest.hardware,
        "build": dataclasses.asdict(manifest.build),
        "model": dataclasses.asdict(manifest.model),
        "passes": [dataclasses.asdict(record) for record in manifest.passes],
        "segments": segments,
        "num_steps": len(plan.steps),
        "cache": {"block_size": manifest.cache.block_size, "groups": _groups(manifest)},
        "native_step": outlook(plan, manifest.build),
        "report": list(manifest.report),
        "timings": manifest.timings,
        "choices": list(manifest.choices),
        "files": manifest.files,
    }


def _summary(to: Output, path: Path, manifest: Manifest, plan: Plan) -> None:
    from ..export.native_step import outlook

    model, build = manifest.model, manifest.build
    total = sum(facts["bytes"] for facts in manifest.files.values())
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines = [
        [
            "model",
            f"{model.name} ({model.architecture}), {model.num_parameters / 1e6:.1f} M parameters, vocabulary {model.vocab_size:,}",
        ],
        ["target", f"{build.target} on {build.device}, {precision_text(build)}"],
        ["small steps", outlook(plan, build)],
        [
            "limits",
            f"{build.max_seq_len:,} tokens a sequence, {build.max_batch_tokens:,} tokens and {build.max_sequences} "
            "sequences a step",
        ],
        ["size", f"{format_bytes(total)} in {len(manifest.files)} files"],
        ["built by", f"camshaft {manifest.camshaft_version}, {versions}"],
        ["built on", ", ".join(f"{name} {value}" for name, value in manifest.hardware.items())],
        ["time", timings_text(manifest.timings)],
    ]
    to.console.print(table(str(path), ["", ""], lines, left=(0, 1)))
    to.console.print(pass_table(manifest.passes))
    to.console.print(segment_table(plan, manifest, _sizes(manifest), operators=False))
    rows = []
    for group in _groups(manifest):
        window = f"{group['window']} tokens" if group["window"] else "full"
        per_token = group["bytes_per_block"] / manifest.cache.block_size
        rows.append([window, group["num_layers"], format_bytes(group["bytes_per_block"]), format_bytes(per_token)])
    title = f"KV cache: blocks of {manifest.cache.block_size} tokens"
    to.console.print(table(title, ["attention", "layers", "a block", "a token"], rows))
    for line in manifest.report:
        to.print(f"note: {line}")
