"""How an Engine shows itself in a notebook: facts, limits, caches, segments, passes, and its plan as a drawing."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..graph.display import PLUMBING, Row, details_html, pass_table_html, svg_html, table_html
from ..graph.drawing import Box, draw
from ..passes.capture_hidden import HEAD_INPUT
from .segment import AttentionStep, Plan, Segment, SegmentStep

if TYPE_CHECKING:
    from .engine import Engine
    from .manifest import BuildConfig


def engine_html(engine: Engine) -> str:
    """An Engine for a notebook; nothing is loaded or run for it."""
    manifest = engine.manifest
    parts = [
        f"<b>Engine {html.escape(manifest.model.name)}</b>",
        table_html(None, _facts(engine), text_columns=(0, 1)),
        details_html("KV cache", _cache_table(engine), opened=True),
        details_html(f"{len(engine.plan.segments)} segments", _segment_table(engine), opened=True),
    ]
    if manifest.report:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in manifest.report)
        parts.append(details_html("report", f"<ul>{lines}</ul>", opened=True))
    if manifest.passes:
        parts.append(details_html(f"{len(manifest.passes)} passes", pass_table_html(manifest.passes)))
    parts.append(details_html("plan", svg_html(plan_svg(engine.plan))))
    return "<div>" + "".join(parts) + "</div>"


def _facts(engine: Engine) -> list[Row]:
    manifest, build = engine.manifest, engine.config
    hardware = ", ".join(f"{key} {value}" for key, value in manifest.hardware.items())
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    seconds = {name: value for name, value in manifest.timings.items() if name != "cached"}
    phases = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    reused = " (from the build cache)" if "cached" in manifest.timings else ""
    return [
        ("model", f"{manifest.model.architecture}, {manifest.model.num_parameters / 1e6:.1f} M parameters"),
        ("target", f"{build.target} on {build.device}, {build.dtype}"),
        ("weights", f"{engine.weights_bytes / 1e6:.1f} MB"),
        ("small steps", engine.native_step),
        *([("hidden states", hidden_text(build.hidden_layers))] if build.hidden_layers else []),
        *([("early exit", exit_text(build))] if build.early_exit is not None else []),
        ("limits", f"{build.max_seq_len} tokens a sequence, {build.max_sequences} sequences and "
                   f"{build.max_batch_tokens} tokens a step"),
        ("hardware", hardware),
        ("versions", f"camshaft {manifest.camshaft_version}, {versions}"),
        ("built in", f"{sum(seconds.values()):.2f} s{reused}: {phases}"),
    ]  # fmt: skip


def hidden_text(layers: Sequence[int]) -> str:
    """The hidden states of a build: "after layers 2, 4, 6; behind the final norm"."""
    inner = [str(layer) for layer in layers if layer != HEAD_INPUT]
    parts = [f"after layers {', '.join(inner)}"] if inner else []
    return "; ".join([*parts, *(["behind the final norm"] if HEAD_INPUT in layers else [])])


def exit_text(build: BuildConfig) -> str:
    """The early exit of a build: "behind 4 layers, with its own norm"."""
    own = ", with its own norm and adapter" if build.exit_head else ""
    return f"behind {build.early_exit} layer{'s' if build.early_exit != 1 else ''}{own}"


def _cache_table(engine: Engine) -> str:
    rows = [
        (
            number,
            "full" if not group.window else f"window {group.window}",
            group.num_layers,
            group.bytes_per_block,
            f"{group.bytes_per_block / engine.block_size:.0f}",
        )
        for number, group in enumerate(engine.cache_groups)
    ]
    head = ("group", "attention", "layers", f"bytes per block of {engine.block_size}", "bytes per token")
    return table_html(head, rows, text_columns=(1,))


def _segment_table(engine: Engine) -> str:
    uses = Counter(step.segment for step in engine.plan.steps if isinstance(step, SegmentStep))
    rows = []
    for segment in engine.plan.segments.values():
        files = engine.manifest.engines_of(segment.id)
        paths = [engine.engine_dir / file.file for file in files]
        total = sum(path.stat().st_size for path in paths if path.is_file())
        size = f"{total / 1024:.1f} KiB" if total else ""
        kind = "PyTorch" if segment.eager else ", ".join(dict.fromkeys(f.target for f in files)) or engine.config.target
        name = files[0].file if len(files) == 1 else f"{len(files)} files" if files else ""
        rows.append((segment.id, uses[segment.id], kind, segment.num_weights, _operators(segment, 6), name, size))
    head = ("segment", "used", "runs in", "weights", "operators", "engine files", "size")
    return table_html(head, rows, text_columns=(0, 2, 4, 5))


def _operators(segment: Segment, most: int) -> str:
    """The operators of a segment that compute, most frequent first: "linear × 2, rope × 2, rms_norm"."""
    hidden = ("operator.getitem", *(f"{name}." for name in PLUMBING))
    names = Counter(name.split(".")[1] for name in segment.operators if not name.startswith(hidden))
    shown = [name if count == 1 else f"{name} × {count}" for name, count in names.most_common(most)]
    return ", ".join(shown) + (", …" if len(names) > most else "")


def plan_svg(plan: Plan) -> str:
    """A plan as an SVG: segments and attention in order, repeated layers in one frame "x N"."""
    return draw(plan_boxes(plan), label="plan")


def plan_boxes(plan: Plan) -> list[Box]:
    """The boxes of a plan's drawing: its inputs, one box per step, and its output."""
    boxes: list[Box] = []
    home: dict[str, int] = {}

    def reads(names: tuple[str, ...]) -> tuple[int, ...]:
        for name in names:
            if name not in home:  # an input stands right above its first reader
                home[name] = len(boxes)
                boxes.append(Box(name, "", "input"))
        return tuple(dict.fromkeys(home[name] for name in names))

    for step in plan.steps:
        if isinstance(step, AttentionStep):
            window = f"window {step.window}" if step.window else "full"
            detail = f"{'rope, ' if step.cos else ''}{window}, cache group {step.group}"
            inputs = reads(step.inputs)
            box = Box("attention", detail, "attention", inputs, f"layer {step.layer}")
        else:
            segment = plan.segments[step.segment]
            kind = "other" if segment.eager else "segment"
            tooltip = "\n".join([step.segment, *step.weights])
            inputs = reads(step.inputs)
            box = Box(f"segment {step.segment[:6]}", _operators(segment, 3), kind, inputs, tooltip)
        names = (step.output,) if isinstance(step, AttentionStep) else step.outputs
        home.update(dict.fromkeys(names, len(boxes)))
        boxes.append(box)
    outputs = reads(tuple(plan.outputs))
    boxes.append(Box("output", "", "output", outputs))
    return boxes
