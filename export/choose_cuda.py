"""`auto` on a GPU: TensorRT and Inductor are timed for every segment and bucket, and the faster engine is kept.

Both run the same plan, so any mixture of them is a model. Times are the device's: launches in one CUDA graph, in turn with two
sets of weights, so that a layer does not find its weights in the L2 cache.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph.program import Program
from .buckets import Bucketed, varying_size
from .choose import Lowering, plan_for
from .engine_cache import MeasurementCache
from .execution import open_engines, open_together
from .lower import lower_plan
from .manifest import BuildConfig, EngineFile
from .segment import Plan, Segment, SegmentStep
from .targets.base import Lowered, LoweringError, get_target
from .timer import Progress, Timer

logger = logging.getLogger(__name__)

LAUNCHES, REPLAYS = 8, 7
"""Launches in a captured graph, and how often it is replayed; fewer where a launch is long."""
LONG = 1024
"""Tokens from which a launch is long."""


def lower_fastest(program: Program, config: BuildConfig, directory: Path, timer: Timer, use_cache: bool) -> Lowering:
    """Lowers a program for CUDA with the fastest engine for each segment and bucket. Raises LoweringError."""
    device = torch.device(config.device)
    reasons = {name: get_target(name).unavailable(device) for name in ("tensorrt", "inductor")}
    if config.dtype == "float32" and reasons["inductor"] is None:
        reasons["tensorrt"] = "its float32 products are rounded to TF32; ask for target tensorrt to have them"
    usable = [name for name, reason in reasons.items() if reason is None]
    report = [f"auto: {name} is out: {reason}" for name, reason in reasons.items() if reason is not None]
    timer.begin("partitioning")
    plan = plan_for(program, usable[0] if usable else "eager")
    if "tensorrt" in usable and plan.report and "inductor" in usable:
        report.append(f"auto: tensorrt is out: {'; '.join(plan.report)}")
        usable, plan = ["inductor"], plan_for(program, "inductor")
    timer.begin("lowering")
    files: list[EngineFile] = []
    for name in list(usable):
        try:
            files += lower_plan(plan, name, config, directory, timer.progress, use_cache=use_cache)
        except LoweringError as error:
            report.append(f"auto: {name} is out: {error}")
            usable.remove(name)
    if len(usable) < 2:
        target = usable[0] if usable else "eager"
        return Lowering(plan=plan, target=target, files=tuple(files), report=(*report, f"auto: {target}"))
    timer.begin("measuring")
    try:
        choices = measure(plan, files, config, directory, timer.progress, use_cache=use_cache)
    except (LoweringError, RuntimeError) as error:  # it builds without a GPU, and may not run on this one
        report.append(f"auto: tensorrt is out: it was built, but does not run here: {str(error).splitlines()[0]}")
        for file in files:
            if file.target == "tensorrt":
                (directory / file.file).unlink()
        rest = tuple(file for file in files if file.target == "inductor")
        return Lowering(plan=plan, target="inductor", files=rest, report=(*report, "auto: inductor"))
    kept = _kept(files, choices, directory)
    return Lowering(plan=plan, target="auto", files=kept, report=(*report, _summary(choices)), choices=choices)


def measure(
    plan: Plan,
    files: Sequence[EngineFile],
    config: BuildConfig,
    directory: Path,
    progress: Progress | None = None,
    *,
    use_cache: bool = True,
) -> tuple[dict[str, Any], ...]:
    """Times the engines of every segment and bucket: {"segment", "size", "symbol", "runs", "ms": {target: time}, "target"}."""
    device = torch.device(config.device)
    targets = list(dict.fromkeys(file.target for file in files))
    versions: dict[str, str] = {}
    for name in targets:
        versions |= get_target(name).versions()
    cache = MeasurementCache(versions, torch.cuda.get_device_name(device))
    uses = Counter(step.segment for step in plan.steps if isinstance(step, SegmentStep))
    segments = [segment for segment in plan.segments.values() if not segment.eager]
    sizes: dict[str, Sequence[int | None]] = {s.id: config.buckets if varying_size(s) else (None,) for s in segments}
    times = {s.id: found for s in segments if use_cache and (found := cache.find(s, sizes[s.id])) is not None}
    missing = [segment for segment in segments if segment.id not in times]
    only = Plan({segment.id: segment for segment in missing}, [], [], [])
    opened = {
        name: open_engines(only, [file for file in files if file.target == name], name, directory, device)
        for name in targets
    }
    stream = torch.cuda.Stream(device)
    open_together([engine for engines in opened.values() for engine in engines.values()], config.buckets)
    for number, segment in enumerate(missing):
        if progress is not None:
            progress("measuring segments", number, len(missing))
        weights = [_random_weights(segment, device, seed) for seed in range(2 if uses[segment.id] > 1 else 1)]
        times[segment.id] = {
            size: {
                name: 1e3 * _seconds(segment, opened[name][segment.id], weights, _taken(name, size), device, stream)
                for name in targets
                if _takes(opened[name][segment.id], size)
            }
            for size in sizes[segment.id]
        }
        cache.store(segment, times[segment.id])
    rows: list[dict[str, Any]] = [
        {
            "segment": segment.id,
            "symbol": varying_size(segment),
            "size": size,
            "runs": uses[segment.id],
            "ms": {name: round(value, 5) for name, value in row.items()},
            "target": min(row, key=lambda name: row[name]),
        }
        for segment in segments
        for size, row in times[segment.id].items()
    ]
    _settle_single(rows)
    return tuple(rows)


def _takes(engine: Lowered, size: int | None) -> bool:
    return size is None or not isinstance(engine, Bucketed) or engine.takes_any or engine.is_fixed(size)


def _taken(target_name: str, size: int | None) -> int:
    """The size at which a target's engine runs a bucket."""
    return max(size or 1, get_target(target_name).fewest_tokens(torch.device("cuda")))


def _settle_single(rows: list[dict[str, Any]]) -> None:
    """At one token all segments of a size run in TensorRT, or none: Inductor's engines take two tokens at least."""
    for symbol in {row["symbol"] for row in rows} - {None}:
        single = [row for row in rows if row["symbol"] == symbol and row["size"] == 1]
        pairs = [row for row in rows if row["symbol"] == symbol and row["size"] == 2]
        alone = sum(row["runs"] * row["ms"]["tensorrt"] for row in single)
        padded = sum(row["runs"] * min(row["ms"].values()) for row in pairs or single)
        for row in single:
            row["target"] = "tensorrt" if alone <= padded else "inductor"


def _random_weights(segment: Segment, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    made = []
    for entry in segment.placeholders[segment.num_inputs :]:
        shape, dtype = [int(size) for size in entry["shape"]], getattr(torch, entry["dtype"])
        if dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype))
        else:
            made.append(torch.zeros(shape, dtype=dtype, device=device))
    return made


@torch.inference_mode()
def _seconds(
    segment: Segment,
    engine: Lowered,
    weights: Sequence[Sequence[Tensor]],
    size: int,
    device: torch.device,
    stream: torch.cuda.Stream,
) -> float:
    """Median time of a launch on the device."""
    inputs = []
    for entry in segment.placeholders[: segment.num_inputs]:
        shape = [size if isinstance(s, str) else s for s in entry["shape"]]
        dtype = getattr(torch, entry["dtype"])
        made = torch.randn(shape, device=device).to(dtype) if dtype.is_floating_point else torch.zeros(
            shape, dtype=dtype, device=device
        )  # fmt: skip
        inputs.append(made)
    launches, replays = (LAUNCHES, REPLAYS) if size < LONG else (2, 3)
    calls = [engine.bind(part) for part in weights]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call(*inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(launches):
            calls[index % len(calls)](*inputs)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / launches / 1e3


def _kept(files: Sequence[EngineFile], choices: Sequence[dict[str, Any]], directory: Path) -> tuple[EngineFile, ...]:
    """The files that are needed; those of fixed size that lost are removed."""
    lost = {(row["segment"], row["size"]) for row in choices if row["target"] != "tensorrt"}
    kept = []
    for file in files:
        if file.target == "tensorrt" and (file.segment, file.tokens) in lost:
            (directory / file.file).unlink()
        else:
            kept.append(file)
    return tuple(kept)


def _summary(choices: Sequence[dict[str, Any]]) -> str:
    won = Counter(row["target"] for row in choices)
    counts = ", ".join(f"{name} {count}" for name, count in won.most_common())
    return f"auto: fastest of {len(choices)} segments and buckets: {counts} (see choices)"
