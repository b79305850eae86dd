"""target="auto": the candidates for a machine are lowered and timed on the program's own segments, and the fastest wins."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ..graph.program import Program
from .lower import lower_plan
from .manifest import BuildConfig
from .partition import partition
from .segment import Plan, SegmentStep
from .targets.base import LoweringError, get_target
from .trace import example_inputs

logger = logging.getLogger(__name__)

TOKENS = (1, 64)
"""Batch sizes, in tokens, at which candidates are timed."""
REPEATS = 9


def choose_target(program: Program, device: torch.device, config: BuildConfig) -> tuple[str, list[str]]:
    """(name of the fastest target, report lines). CUDA: inductor where it can run. CPU: onnxruntime and eager are timed."""
    if device.type == "cuda":
        reason = get_target("inductor").unavailable(device)
        return ("inductor", []) if reason is None else ("eager", [f"auto: inductor cannot run here ({reason}); eager"])
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
            times[name] = _time(program, name, device, config)
        except LoweringError as error:
            report.append(f"auto: {name} is out: {error}")
    best = min(times, key=lambda name: sum(times[name][t] / times["eager"][t] for t in TOKENS))
    table = "; ".join(
        f"{name} " + ", ".join(f"{1e3 * s:.2f} ms at {t}" for t, s in row.items()) for name, row in times.items()
    )
    return best, [*report, f"auto: {best} (one layer segment, tokens: {table})"]


def _time(program: Program, name: str, device: torch.device, config: BuildConfig) -> dict[int, float]:
    """Median seconds of the plan's most frequent segment at each of TOKENS."""
    target = get_target(name)
    plan = partition(program, target.supports)
    step = _most_frequent(plan)
    segment = plan.segments[step.segment]
    only = Plan({segment.id: segment}, [step], [], [])
    weights = [program.weights[key].load() for key in step.weights]
    with tempfile.TemporaryDirectory(prefix="camshaft-choose-") as directory:
        files = lower_plan(only, name, device, Path(directory), config.max_batch_tokens)
        engine = Path(directory) / files[segment.id] if segment.id in files else None
        bound = target.load(segment, engine, device).bind(weights)
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
