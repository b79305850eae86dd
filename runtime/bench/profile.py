"""A profile of steps: what the device does in N steps of a run, by class of kernel, and how long it waits.

    step k ............................ step k + N
    | kernel kernel   kernel | gap | kernel ...  |     span = busy + idle; idle = gaps inside a step + gaps of the host

On a GPU only device activity is recorded: recording the host's operators as well would slow the host, and show waiting that is not
there otherwise. On a CPU the operators are recorded, and count with the time that they spend outside of one another.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST_GAP_US = 10.0
"""Shortest pause of the device that is put down to the host, in microseconds; shorter ones lie between kernels of one graph."""
NUM_TOP = 15
_DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
CLASS_NAMES = ("gemm", "attention", "norm and pointwise", "sampling", "copies", "other")
"""The classes of kernels."""
_ATEN_POINTWISE = (
    "mul|add|sub|div|pow|mean|sum|cos|sin|neg|sigmoid|where|embedding|max|min|clamp|exp|tanh|gelu|relu|rsqrt"
)
_ATEN_COPIES = (
    "to|_to_copy|copy_?|clone|contiguous|empty\\w*|zeros|fill_?|slice|select|view|pad|cat|index\\w*|gather|scatter\\w*"
)
_PATTERNS = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        # Inductor's names list the operators that it fused, so they come first
        ("gemm", r"^triton_tem"),
        ("sampling", r"^triton_\w*(argmax|topk|sort|gumbel|softmax|rand)"),
        ("norm and pointwise", r"^triton_(poi|per|red|for)_"),
        ("attention", r"paged|attention|attend|attn|flash|fmha|rope_\w*(write|store|kv)"),
        ("attention", r"^_?(decode|prefill|mixed|join|reduce|write|rope_write|tiles)_kernel"),
        ("sampling", r"argmax|multinomial|top_?k|sort|gumbel|sampl|softmax|scan|cumsum|exponential|distribution"),
        (
            "gemm",
            r"gemm|gemv|cutlass|cublas|nvjet|matmul|wgmma|xmma|split_?k|skinny|scaled_(mm|linear)|::(add|b|baddb)?mm\b",
        ),
        ("gemm", r"::linear|weight_only|^_?(one_row|rows|tile|tiled)_kernel"),
        ("copies", rf"memcpy|memset|catarray|_copy_|direct_copy|fillfunctor|::({_ATEN_COPIES})\b"),
        ("norm and pointwise", r"norm|elementwise|vectorized|pointwise|reduce|silu|glu|rope|rotary|quantize"),
        ("norm and pointwise", rf"::({_ATEN_POINTWISE})_?\b"),
        ("copies", r"gather|scatter|index"),
    )
)


def kernel_class(name: str, kind: str = "kernel") -> str:
    """The class of CLASS_NAMES that a kernel or operator belongs to, by its name."""
    if kind in ("gpu_memcpy", "gpu_memset"):
        return "copies"
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), "other")


@dataclass(frozen=True, slots=True)
class Slice:
    """One kernel, copy or operator: name, class, begin and duration in microseconds, and how much of it is its own."""

    name: str
    kind: str
    begin_us: float
    duration_us: float
    own_us: float


def read_slices(trace: Mapping[str, Any]) -> tuple[str, list[Slice]]:
    """("cuda" or "cpu", its slices by begin) of a Chrome trace: what ran on the device, or the operators where none did."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    on_device = [event for event in events if event.get("cat") in _DEVICE_KINDS]
    if on_device:
        slices = [
            Slice(e["name"], kernel_class(e["name"], e["cat"]), float(e["ts"]), float(e["dur"]), float(e["dur"]))
            for e in on_device
        ]
        return "cuda", sorted(slices, key=lambda piece: piece.begin_us)
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["tid"]].append(event)
    slices = [piece for thread in threads.values() for piece in _own_times(thread)]
    return "cpu", sorted(slices, key=lambda piece: piece.begin_us)


def _own_times(events: Iterable[Mapping[str, Any]]) -> list[Slice]:
    """The operators of one thread; `own_us` leaves out the operators that run inside of them."""
    ordered = sorted(events, key=lambda e: (e["ts"], -e["dur"]))
    own = [float(e["dur"]) for e in ordered]
    open_: list[int] = []
    for index, event in enumerate(ordered):
        while open_ and ordered[open_[-1]]["ts"] + ordered[open_[-1]]["dur"] <= event["ts"]:
            open_.pop()
        if open_:
            own[open_[-1]] -= float(event["dur"])
        open_.append(index)
    return [
        Slice(e["name"], kernel_class(e["name"]), float(e["ts"]), float(e["dur"]), max(time, 0.0))
        for e, time in zip(ordered, own)
    ]


def gaps_us(slices: Sequence[Slice]) -> list[float]:
    """Pauses in which nothing runs, in microseconds; slices sorted by begin."""
    gaps, end = [], slices[0].begin_us
    for piece in slices:
        if piece.begin_us > end:
            gaps.append(piece.begin_us - end)
        end = max(end, piece.begin_us + piece.duration_us)
    return gaps


def summarize_trace(trace: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """The profile's part of a document, per step: span_ms, busy_ms, idle_ms, of it host_gap_ms (pauses of HOST_GAP_US and more)
    and kernel_gap_ms; busy_share; launches; classes and the NUM_TOP longest kernels with ms, calls and share of the span.

    Raises ValueError for a trace in which nothing ran.
    """
    device, slices = read_slices(trace)
    if not slices:
        raise ValueError("the profiler recorded neither device activity nor operators; is another profiler running?")
    span = max(piece.begin_us + piece.duration_us for piece in slices) - slices[0].begin_us
    gaps = gaps_us(slices)
    host = [gap for gap in gaps if gap >= HOST_GAP_US]
    per_step = 1e-3 / num_steps
    return {
        "device": device,
        "num_steps": num_steps,
        "span_ms": span * per_step,
        "busy_ms": (span - sum(gaps)) * per_step,
        "idle_ms": sum(gaps) * per_step,
        "host_gap_ms": sum(host) * per_step,
        "host_gaps": len(host) / num_steps,
        "longest_gap_ms": 1e-3 * max(gaps, default=0.0),
        "kernel_gap_ms": (sum(gaps) - sum(host)) * per_step,
        "busy_share": 1 - sum(gaps) / span if span else 1.0,
        "launches": len(slices) / num_steps,
        "classes": [{"class": entry.pop("name"), **entry} for entry in _grouped(slices, "kind", span, num_steps)],
        "top": _grouped(slices, "name", span, num_steps)[:NUM_TOP],
    }


def _grouped(slices: Sequence[Slice], by: str, span_us: float, num_steps: int) -> list[dict[str, Any]]:
    """Slices with the same name or kind, the longest first: ms and calls per step, and share of the span."""
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    kinds: dict[str, str] = {}
    for piece in slices:
        key = getattr(piece, by)
        times[key] += piece.own_us
        calls[key] += 1
        kinds[key] = piece.kind
    entries = []
    for key in sorted(times, key=lambda name: -times[name]):
        entry = {"name": key, "ms": 1e-3 * times[key] / num_steps, "calls": calls[key] / num_steps}
        entries.append({**entry, "share": times[key] / span_us if span_us else 0.0})
        if by == "name":
            entries[-1]["class"] = kinds[key]
    return entries


class StepProfiler:
    """Profiles steps `begin` to `begin + num_steps` of a run: give it to `RecordingEngine.on_step`, then ask for the `result`.

    device: "cuda" or "cpu". trace: where to keep the Chrome trace, or None.
    """

    def __init__(self, begin: int, num_steps: int, *, device: str, trace: Path | None = None) -> None:
        self._begin, self._num_steps = begin, num_steps
        self._on_gpu = device == "cuda"
        self._trace = trace
        self._profiler: Any = None
        self._done = False
        _prime_profiler(self._on_gpu)

    def __call__(self, index: int) -> None:
        """Called before step `index`, on the thread that runs it."""
        if index == self._begin and not self._done:
            self._start()
        elif index == self._begin + self._num_steps and self._profiler is not None and not self._done:
            self._stop()

    def _start(self) -> None:
        import torch

        self._profiler = _make_profiler(self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profiler.start()

    def _stop(self) -> None:
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()
        self._profiler.stop()
        self._done = True

    def result(self) -> dict[str, Any]:
        """The summary of the steps. Raises ValueError if the run had too few."""
        if not self._done:
            raise ValueError(
                f"the run ended before step {self._begin + self._num_steps}, so {self._num_steps} steps could not be "
                "profiled; give a smaller --profile, or longer outputs"
            )
        with tempfile.TemporaryDirectory(prefix="camshaft-profile-") as directory:
            path = Path(directory) / "trace.json" if self._trace is None else self._trace
            path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(path))
            return summarize_trace(json.loads(path.read_text(encoding="utf-8", errors="replace")), self._num_steps)


def _make_profiler(on_gpu: bool) -> Any:
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])


def _prime_profiler(on_gpu: bool) -> None:
    """Has the profiler set itself up: it wants to do that on the thread that imported torch, and it takes seconds."""
    with _make_profiler(on_gpu):
        pass
