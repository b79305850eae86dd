"""What `camshaft bench` prints: results, profiles, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .common import table

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = {
    "output_tok_s": "output tokens/s",
    "total_tok_s": "total tokens/s",
    "requests_s": "requests/s",
    "goodput_requests_s": "requests/s within the SLOs",
    "slo_share": "share within the SLOs",
    "decode_tok_s": "decode, tokens/s",
    "decode_ms_p50": "decode p50, ms per token",
    "decode_ms_p99": "decode p99, ms per token",
    "ttft_ms_mean": "TTFT mean, ms",
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p90": "TTFT p90, ms",
    "ttft_ms_p99": "TTFT p99, ms",
    "tpot_ms_mean": "TPOT mean, ms",
    "tpot_ms_p50": "TPOT p50, ms",
    "tpot_ms_p90": "TPOT p90, ms",
    "tpot_ms_p99": "TPOT p99, ms",
    "itl_ms_mean": "ITL mean, ms",
    "itl_ms_p50": "ITL p50, ms",
    "itl_ms_p90": "ITL p90, ms",
    "itl_ms_p99": "ITL p99, ms",
    "e2e_ms_mean": "E2E mean, ms",
    "e2e_ms_p50": "E2E p50, ms",
    "e2e_ms_p90": "E2E p90, ms",
    "e2e_ms_p99": "E2E p99, ms",
    "submit_lag_ms_p99": "client late, p99, ms",
    "max_in_flight": "most requests in flight",
    "request_s": "request, s",
    "duration_s": "duration, s",
    "steps": "steps",
    "mean_batch_size": "sequences per step",
    "ahead_share": "share of steps launched ahead",
    "host_schedule_ms": "host: schedule, ms per step",
    "host_launch_ms": "host: launch, ms per step",
    "host_deliver_ms": "host: deliver, ms per step",
    "host_wait_ms": "host: waits, ms per step",
    "prefix_hit_tokens": "prefix-cache hits, tokens",
    "preemptions": "preemptions",
}
"""Metric -> label, in the order in which they are printed."""
_ONLY_UNDER_LOAD = ("_mean", "_p90", "requests_s")
"""Ends of metrics that the tables of the other modes leave out."""


def number(value: float) -> str:
    """ "1,234" or "1.23" """
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def cell(summary: Mapping[str, float] | None) -> str:
    """Median, and the range where the repeats differ."""
    if summary is None:
        return "-"
    low, high = summary["min"], summary["max"]
    spread = "" if low == high else f" ({number(low)} - {number(high)})"
    return number(summary["median"]) + spread


def result_table(document: Mapping[str, Any]) -> Table:
    """All results of a document side by side: median (min - max) of every metric."""
    from ..export.quantization import recipe_text
    from ..runtime.bench.document import label_of

    model, workload, results = document["model"], document["workload"], document["results"]
    load = any(result["mode"] == "load" for result in results)
    rows = []
    for metric, label in SHOWN.items():
        if any(metric in result["summary"] for result in results) and (load or not metric.endswith(_ONLY_UNDER_LOAD)):
            rows.append([label, *(cell(result["summary"].get(metric)) for result in results)])
    precision = ", ".join(
        [model["dtype"], *([recipe_text(model["quantize"])] if model.get("quantize") else [])]
        + ([f"{model['kv_cache_dtype']} KV cache"] if model.get("kv_cache_dtype", "auto") != "auto" else [])
    )
    title = (
        f"{model['name']}, {model['target']} on {model['device']}, {precision}: {workload['num_requests']} requests of "
        f"{_span(workload['input_len'])} + {_span(workload['output_len'])} tokens, median (min - max) of "
        f"{len(results[0]['repeats'])}"
    )
    return table(title, ["", *(label_of(result) for result in results)], rows)


def _span(span: Sequence[int]) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def start_up_line(document: Mapping[str, Any]) -> str:
    """ "start-up: build 20.1 s, prepare 1.2 s, ..." """
    seconds = {**document.get("opened", {}), **document["results"][0].get("start_up", {})}
    names = {
        "build_s": "build", "load_s": "open", "prepare_s": "weights", "capture_s": "capture", "ready_s": "ready after",
        "first_token_s": "first token", "process_s": "since the process began",
    }  # fmt: skip
    parts = [f"{label} {seconds[name]:.2f} s" for name, label in names.items() if name in seconds]
    return "start-up: " + ", ".join(parts)


def profile_tables(profile: Mapping[str, Any], label: str) -> list[Table]:
    """Where the time of a step goes: by class of kernel, and the longest kernels."""
    span = profile["span_ms"]
    rows = [
        [entry["class"], f"{entry['ms']:.3f}", f"{entry['share']:.1%}", f"{entry['calls']:.0f}"]
        for entry in profile["classes"]
    ]
    for name, value in (("idle, host", "host_gap_ms"), ("idle, between kernels", "kernel_gap_ms")):
        calls = f"{profile['host_gaps']:.1f}" if value == "host_gap_ms" else ""
        rows.append([name, f"{profile[value]:.3f}", f"{profile[value] / span:.1%}" if span else "-", calls])
    device = "GPU" if profile["device"] == "cuda" else "CPU operators"
    title = (
        f"{label}: {profile['num_steps']} steps, {span:.3f} ms each under the profiler "
        f"({profile['timed_step_ms']:.3f} without), {device} busy {profile['busy_share']:.1%}"
    )
    classes = table(title, ["class", "ms per step", "of the span", "per step"], rows)
    top = [
        [entry["name"][:90], entry["class"], f"{entry['ms']:.3f}", f"{entry['share']:.1%}", f"{entry['calls']:.0f}"]
        for entry in profile["top"]
    ]
    return [
        classes,
        table("Longest kernels", ["kernel", "class", "ms per step", "of the span", "calls"], top, left=(0, 1)),
    ]


def comparison_table(first: str, second: str, differences: Sequence[Any]) -> Table:
    """The metrics of two documents: medians, ratio, and whether the spreads overlap."""
    rows = [
        [d.system, SHOWN[d.metric], cell(d.first), cell(d.second), f"{d.ratio:.2f}x", d.verdict]
        for d in differences
        if d.metric in SHOWN
    ]
    columns = ["system", "metric", first, second, "ratio", "second is"]
    return table(f"{first} and {second}", columns, rows, left=(0, 1, 5))
