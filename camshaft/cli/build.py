"""`camshaft build`: a model becomes an engine on disk."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    BatchInvariantOption,
    BatchTokensOption,
    BlockSizeOption,
    BucketsOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    EarlyExitOption,
    GroupOption,
    HiddenLayersOption,
    JsonOption,
    KvDtypeOption,
    ModelArgument,
    NoCacheOption,
    Output,
    QuantizeOption,
    SeqLenOption,
    SequencesOption,
    TargetOption,
    format_bytes,
    output,
    parse_exit,
    parse_layers,
    parse_numbers,
    pass_table,
    precision_text,
    quantize_options,
    resolve_model,
    table,
)
from .engines import choice_table, engine_table

if TYPE_CHECKING:
    from rich.table import Table

    from ..export.bisect import EngineCheck
    from ..export.engine import Engine
    from ..export.manifest import EngineFile, Manifest
    from ..export.segment import Plan

EXAMPLES = "Example: [bold]camshaft build demo -o demo.engine --verify[/]"


def build(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="ENGINE", help="Directory to write the engine to.", show_default=False),
    ],
    target: TargetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_seq_len: SeqLenOption = None,
    max_batch_tokens: BatchTokensOption = None,
    max_sequences: SequencesOption = None,
    block_size: BlockSizeOption = None,
    quantize: QuantizeOption = None,
    group: GroupOption = None,
    calibration: CalibrationOption = None,
    kv_cache_dtype: KvDtypeOption = None,
    batch_invariant: BatchInvariantOption = None,
    hidden_layers: HiddenLayersOption = None,
    early_exit: EarlyExitOption = None,
    buckets: BucketsOption = None,
    capabilities: Annotated[
        str | None,
        typer.Option(
            "--capabilities",
            metavar="8.9,12.0",
            help="Compute capabilities to build TensorRT engines for. Default: engines that run on any.",
        ),
    ] = None,
    no_cache: NoCacheOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the engine that is there.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare the program after each pass, and the engine's greedy tokens, with the model run by plain "
            "PyTorch; exit 1 if they disagree.",
        ),
    ] = False,
    dump: Annotated[
        Path | None, typer.Option("--dump", metavar="DIR", help="Write the graph before and after each pass there.")
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Also print the operators of each segment, every engine, what auto measured, and every file.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a model into an engine directory, which runs without the checkpoint and without Transformers."""
    import camshaft

    with output(as_json) as to:
        _check_free(out, overwrite)
        quantized = quantize_options(quantize, group, calibration)
        engine = camshaft.compile(
            model,
            target=target or "auto",
            device=device,
            dtype=dtype,
            max_seq_len=max_seq_len,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            block_size=16 if block_size is None else block_size,
            buckets=parse_numbers(buckets, "--buckets"),
            capabilities=capabilities.split(",") if capabilities else None,
            **quantized,
            kv_cache_dtype=kv_cache_dtype or "auto",
            batch_invariant=bool(batch_invariant),
            hidden_layers=parse_layers(hidden_layers),
            early_exit=parse_exit(early_exit),
            cache=not no_cache,
            verify=verify,
            dump_dir=dump,
        )
        engine.save(out, overwrite=overwrite)
        check = verify_engine(engine, model, quantized["calibration"]) if verify else None
        saved = _saved(engine, out)
        to.document = _document(saved, out, check)
        _print(to, saved, out, report)
        if check is not None:
            print_check(to, check)
            if not check.ok:
                raise typer.Exit(1)


def _check_free(path: Path, overwrite: bool) -> None:
    """Refuses a taken path before the work, not after it."""
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists; give --overwrite to replace an engine, or another path")


def _saved(engine: Engine, path: Path) -> Engine:
    """The engine with the manifest that was written; nothing is opened, which the machine may not be able to."""
    from ..export.engine import Engine
    from ..export.manifest import Manifest

    manifest = Manifest.from_json((path / "manifest.json").read_text(), path / "manifest.json")
    return Engine(manifest, engine.plan, engine.weights, path / "engines", None)


def verify_engine(engine: Engine, model: str, calibration: str | Path | None = None) -> EngineCheck:
    """The engine beside the model's captured program, quantized as the engine is, run by eager on the CPU."""
    import torch

    from ..api import calibration_reader
    from ..export.bisect import check_engine
    from ..export.build import passes_of
    from ..export.quantization import quantizer_of, read_calibration, recipe_of
    from ..models.huggingface import open_model, trace_decoder
    from ..passes.manager import PassManager

    config = engine.config
    source = open_model(resolve_model(model), getattr(torch, config.dtype))
    program = trace_decoder(source)
    if config.quantize is not None or config.kv_cache_dtype != "auto":
        recipe = recipe_of(config.quantize)
        read = calibration_reader(model, recipe, calibration, config.kv_cache_dtype)
        data = read_calibration(recipe, read, source, config.kv_cache_dtype)
        quantizer = quantizer_of(data, torch.device(config.device))
        program = PassManager(passes_of(config, quantizer)).run(program)
    return check_engine(engine, program)


def print_check(to: Output, check: EngineCheck) -> None:
    """One line that says whether engine and program agree, and how far."""
    verdict = "agrees with" if check.ok else "DISAGREES with"
    ties = f" ({check.num_ties} ties)" if check.num_ties else ""
    to.print(
        f"verify: the engine {verdict} the program run by eager: {check.num_equal} of {len(check.tokens)} greedy tokens "
        f"equal{ties}, logits differ by {check.logits_error:.2g} of the largest (allowed {check.tolerance:g})",
        style="green" if check.ok else "bold red",
    )
    if not check.ok:
        to.print("find the cause with `camshaft bisect MODEL`")


def segment_table(plan: Plan, manifest: Manifest, sizes: dict[str, int], *, operators: bool) -> Table:
    """The distinct segments: how often each runs, weights, operators, what runs it, and the size of its engine files."""
    from ..export.bisect import operators_text
    from ..export.segment import SegmentStep

    uses = Counter(step.segment for step in plan.steps if isinstance(step, SegmentStep))
    rows = []
    for key, segment in plan.segments.items():
        files = manifest.engines_of(key)
        total = sum(sizes.get(file.file, 0) for file in files)
        row: list[object] = [
            key,
            uses[key],
            len(segment.operators),
            segment.num_weights,
            format_bytes(total) if total else "-",
            "PyTorch" if segment.eager else runs_in(files) or manifest.build.target,
        ]
        rows.append([*row, operators_text(segment, 99 if operators else 5)])
    attention = sum(not isinstance(step, SegmentStep) for step in plan.steps)
    title = f"Segments: {len(plan.segments)} distinct, {sum(uses.values())} runs and {attention} attentions per step"
    return table(title, ["segment", "runs", "operators", "weights", "size", "runs in", "mostly"], rows, left=(0, 5, 6))


def runs_in(files: Sequence[EngineFile]) -> str:
    """The targets of a segment's engine files, with their number where there are several: "tensorrt x 21"."""
    counts = Counter(file.target for file in files)
    return ", ".join(name if count == 1 else f"{name} x {count}" for name, count in counts.items())


def engine_sizes(engine: Engine) -> dict[str, int]:
    """Engine file -> bytes."""
    return {file: (engine.engine_dir / file).stat().st_size for file in engine.manifest.engine_files}


def _print(to: Output, engine: Engine, out: Path, report: bool) -> None:
    manifest = engine.manifest
    to.console.print(pass_table(manifest.passes))
    to.console.print(segment_table(engine.plan, manifest, engine_sizes(engine), operators=report))
    for line in manifest.report:
        to.print(f"note: {line}")
    to.print("time: " + timings_text(manifest.timings))
    if report:
        to.console.print(engine_table(engine.plan, manifest, engine_sizes(engine)))
        if manifest.choices:
            to.console.print(choice_table(manifest))
        rows = [[name, format_bytes(facts["bytes"])] for name, facts in manifest.files.items()]
        to.console.print(table("Files", ["file", "size"], rows))
    build = engine.config
    total = sum(facts["bytes"] for facts in manifest.files.values())
    to.print(
        f"{out}: {manifest.model.name}, {manifest.model.num_parameters / 1e6:.1f} M parameters, "
        f"target {build.target}, {build.device}, {precision_text(build)}; "
        f"{format_bytes(total)} ({format_bytes(engine.weights_bytes)} weights)",
        style="bold",
    )
    to.print(f'run it: camshaft generate {out} "Once upon a time"')


def timings_text(timings: dict[str, float]) -> str:
    """The phases of a build: "tracing 1.2 s, passes 0.3 s"."""
    parts = [f"{name} {seconds:.1f} s" for name, seconds in timings.items() if name != "cached"]
    return ", ".join(parts) + (" (the rest was reused from the build cache)" if "cached" in timings else "")


def _document(engine: Engine, out: Path, check: EngineCheck | None) -> dict[str, Any]:
    manifest = engine.manifest
    return {
        "engine": str(out),
        "camshaft_version": manifest.camshaft_version,
        "versions": manifest.versions,
        "hardware": manifest.hardware,
        "build": dataclasses.asdict(manifest.build),
        "model": dataclasses.asdict(manifest.model),
        "passes": [dataclasses.asdict(record) for record in manifest.passes],
        "num_segments": len(engine.plan.segments),
        "report": list(manifest.report),
        "choices": list(manifest.choices),
        "timings": manifest.timings,
        "weights_bytes": engine.weights_bytes,
        "files": manifest.files,
        "verify": None if check is None else {**dataclasses.asdict(check), "ok": check.ok},
    }
