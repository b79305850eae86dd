"""Lowering a program for the target that was asked for, or for the fastest: `auto` times the program's own segments.

CPU: one target for the whole program. CUDA: one for each segment and bucket, among engines that share a plan.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..graph.program import Program
from .lower import lower_plan
from .manifest import BuildConfig, EngineFile
from .partition import partition
from .quantization import recipe_of, recipe_text, runs_on_cpu
from .segment import Plan, SegmentStep
from .targets.base import LoweringError, get_target
from .timer import Timer
from .trace import example_inputs

logger = logging.getLogger(__name__)

TOKENS = (1, 64)
"""Batch sizes, in tokens, at which candidates are timed on the CPU."""
REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """A program cut and lowered. target: the one that runs it, "auto" where several do; choices: see `Manifest.choices`."""

    plan: Plan
    target: str
    files: tuple[EngineFile, ...]
    report: tuple[str, ...] = ()
    choices: tuple[dict[str, Any], ...] = ()


def lower_program(
    program: Program, config: BuildConfig, directory: Path, timer: Timer, *, use_cache: bool = True
) -> Lowering:
    """Cuts and lowers a program for `config.target`; engines go into `directory`.

    Raises LoweringError, and ValueError for a batch-invariant program that its target cannot run.
    """
    if config.batch_invariant:
        return _lower_invariant(program, config, directory, timer, use_cache)
    if config.target == "auto" and config.device == "cpu":
        return _lower_on_cpu(program, config, directory, timer, use_cache)
    if config.target == "auto":
        from .choose_cuda import lower_fastest

        lowering = lower_fastest(program, config, directory, timer, use_cache)
    else:
        lowering = _lower(program, config.target, config, directory, timer, use_cache)
    names = [file.file for file in lowering.files if file.target == "tensorrt"]
    if names and torch.cuda.is_available():
        from .targets.tensorrt import compile_kernels

        timer.begin("compiling kernels")
        compile_kernels(directory, names)
    return lowering


def _lower_invariant(program: Program, config: BuildConfig, directory: Path, timer: Timer, use_cache: bool) -> Lowering:
    """Lowers for Inductor, whose products and reductions treat every row alike."""
    if config.target not in ("auto", "inductor") or config.device != "cuda":
        raise ValueError(
            f"batch_invariant is on and the target is {config.target} on {config.device}; allowed: inductor (or auto) on cuda"
        )
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    if capability < (9, 0):
        raise ValueError(
            f"batch_invariant is on and the GPU has compute capability {capability[0]}.{capability[1]}; its products need 9.0 or "
            "later (tensor memory accelerator): build without batch_invariant"
        )
    lowering = _lower(program, "inductor", config, directory, timer, use_cache)
    if lowering.plan.report:
        raise ValueError(
            f"batch_invariant is on and parts of the model run outside the compiled code: {'; '.join(lowering.plan.report)}; "
            "build without batch_invariant"
        )
    return replace(lowering, report=("batch-invariant: target inductor",))


def _lower_on_cpu(program: Program, config: BuildConfig, directory: Path, timer: Timer, use_cache: bool) -> Lowering:
    timer.begin("choosing the target")
    name, report = _fastest_on_cpu(program, config)
    lowering = _lower(program, name, config, directory, timer, use_cache)
    return replace(lowering, report=tuple(report))


def plan_for(program: Program, target_name: str) -> Plan:
    """The program cut for a target, and its parts."""
    target = get_target(target_name)
    plan = partition(program, target.supports, split_rows=target.fixed_sizes)
    for name, part in program.parts.items():
        plan.add_part(name, partition(part, target.supports, split_rows=target.fixed_sizes))
    return plan


def _lower(
    program: Program, name: str, config: BuildConfig, directory: Path, timer: Timer, use_cache: bool
) -> Lowering:
    timer.begin("partitioning")
    plan = plan_for(program, name)
    timer.begin("lowering")
    files = lower_plan(plan, name, config, directory, timer.progress, use_cache=use_cache)
    return Lowering(plan=plan, target=name, files=files)


def _fastest_on_cpu(program: Program, config: BuildConfig) -> tuple[str, list[str]]:
    """(name of the fastest target, report lines): onnxruntime and eager are timed."""
    device = torch.device(config.device)
    recipe = recipe_of(config.quantize)
    if recipe is not None and not runs_on_cpu(recipe):
        return "eager", [f"auto: eager, since {recipe_text(config.quantize)} linear layers have no ONNX Runtime form"]
    candidates = ["eager"]
    if config.dtype == "float32" and get_target("onnxruntime").unavailable(device) is None:
        candidates.append("onnxruntime")
    if len(candidates) == 1:
        return candidates[0], [
            "auto: eager is the only candidate (onnxruntime is not installed, or the dtype is not float32)"
        ]
    times: dict[str, dict[int, float]] = {}
    report = []
    for name in candidates:
        try:
            times[name] = _time(program, name, config)
        except LoweringError as error:
            report.append(f"auto: {name} is out: {error}")
    best = min(times, key=lambda name: sum(times[name][t] / times["eager"][t] for t in TOKENS))
    table = "; ".join(
        f"{name} " + ", ".join(f"{1e3 * s:.2f} ms at {t}" for t, s in row.items()) for name, row in times.items()
    )
    return best, [*report, f"auto: {best} (one layer segment, tokens: {table})"]


def _time(program: Program, name: str, config: BuildConfig) -> dict[int, float]:
    """Median seconds of the plan's most frequent segment at each of TOKENS."""
    device = torch.device(config.device)
    plan = plan_for(program, name)
    step = _most_frequent(plan)
    segment = plan.segments[step.segment]
    only = Plan({segment.id: segment}, [step], [], [])
    weights = [program.weights[key].load() for key in step.weights]
    with tempfile.TemporaryDirectory(prefix="camshaft-choose-") as directory:
        files = lower_plan(only, name, config, Path(directory))
        engine = Path(directory) / files[0].file if files else None
        bound = get_target(name).load(segment, engine, device).bind(weights)
        result = {}
        for tokens in TOKENS:
            inputs = [
                torch.randn(t.shape) if t.is_floating_point() else t for t in example_inputs(segment, device, tokens)
            ][: segment.num_inputs]
            seconds = []
            with torch.inference_mode():
                for _ in range(REPEATS + 3):
                    start = time.perf_counter()
                    bound(*inputs)
                    seconds.append(time.perf_counter() - start)
            result[tokens] = statistics.median(seconds[3:])
    return result


def _most_frequent(plan: Plan) -> SegmentStep:
    steps = [step for step in plan.steps if isinstance(step, SegmentStep) and not plan.segments[step.segment].eager]
    counts: dict[str, int] = {}
    for step in steps:
        counts[step.segment] = counts.get(step.segment, 0) + 1
    return max(steps, key=lambda step: (counts[step.segment], len(step.weights)))
