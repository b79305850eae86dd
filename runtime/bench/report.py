"""One page of HTML from benchmark documents: what was reached, throughput, latency against load, memory, where a step's time goes.

Everything is in the one file, drawings included; it needs no library and no network. Imports no torch.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .charts import Series, compact, line_chart, stacked_bars
from .document import label_of
from .page import html_table, page
from .profile import CLASS_NAMES
from .roofline import latency_ceiling, peaks_of, shape_of, throughput_ceiling

Document = Mapping[str, Any]
Named = Sequence[tuple[str, Document]]

_LATENCIES = (("ttft_ms", "time to first token"), ("tpot_ms", "time per output token"), ("e2e_ms", "end to end"))


def report_html(documents: Named) -> str:
    """The page of (name, document) pairs. Raises ValueError for none."""
    if not documents:
        raise ValueError("a report needs at least one document; give files that `camshaft bench --output FILE` wrote")
    sections = [
        ("Results", _results(documents)),
        ("Throughput against sequences in a batch", _throughput(documents)),
        ("Latency against load", _loads(documents)),
        ("Memory", _memory(documents)),
        ("Where the time of a step goes", _profiles(documents)),
        ("Start-up", _start_up(documents)),
        ("Conditions", _conditions(documents)),
    ]
    return page("Camshaft: measurements", "Measurements", sections)


def _entries(documents: Named) -> Iterator[tuple[str, Document, Mapping[str, Any]]]:
    """(name, document, result) of every result; the name tells results of one document apart."""
    for name, document in documents:
        for result in document["results"]:
            several = len(document["results"]) > 1
            yield (f"{name}: {label_of(result)}" if several else name), document, result


def _median(result: Mapping[str, Any], metric: str) -> float | None:
    summary = result["summary"].get(metric)
    return None if summary is None else float(summary["median"])


def _span(summary: Mapping[str, float] | None) -> str:
    if summary is None:
        return "-"
    if summary["min"] == summary["max"]:
        return compact(summary["median"])
    return f"{compact(summary['median'])} ({compact(summary['min'])} - {compact(summary['max'])})"


def ceiling_of(document: Document, result: Mapping[str, Any]) -> float | None:
    """Most output tokens per second that the document's GPU allows for a result; None where the peaks or the shape are not known,
    for other systems, and under load, where the rate decides.
    """
    peaks = peaks_of(document)
    if peaks is None or document["model"].get("shape") is None or result["system"] != "camshaft":
        return None
    shape = shape_of(document)
    if not {shape.precision, shape.head_precision} <= set(peaks.flops):
        return None
    workload = document["workload"]
    lengths = {name: sum(workload[name]) / 2 for name in ("input_len", "output_len")}
    if result["mode"] == "latency":
        return latency_ceiling(shape, peaks, **lengths)
    if result["mode"] == "throughput":
        return throughput_ceiling(
            shape,
            peaks,
            num_requests=workload["num_requests"],
            max_sequences=result["limits"]["max_sequences"],
            **lengths,
        )
    return None


def _results(documents: Named) -> str:
    rows = []
    for name, document, result in _entries(documents):
        workload = document["workload"]
        lengths = " + ".join(
            "-".join(str(n) for n in dict.fromkeys(workload[key])) for key in ("input_len", "output_len")
        )
        ceiling = ceiling_of(document, result)
        metric = "decode_tok_s" if "decode_tok_s" in result["summary"] else "output_tok_s"
        reached = _median(result, metric)
        share = f"{reached / ceiling:.0%}" if ceiling and reached else "-"
        rows.append(
            [
                name, result["mode"], f"{workload['num_requests']} x {lengths}", _span(result["summary"].get(metric)),
                _span(result["summary"].get("ttft_ms_p50")),
                _span(result["summary"].get("tpot_ms_p50", result["summary"].get("decode_ms_p50"))),
                compact(round(ceiling)) if ceiling else "-", share,
            ]
        )  # fmt: skip
    columns = ["", "mode", "requests", "output tokens/s", "TTFT p50, ms", "TPOT p50, ms", "ceiling", "reached"]
    note = "Median (min - max) of the repeats; batch 1 without the prompt. The ceiling is that of docs/performance.md."
    return html_table(columns, rows) + f'<p class="note">{note}</p>'


def _throughput(documents: Named) -> str:
    lines: dict[str, list[tuple[float, Mapping[str, float]]]] = defaultdict(list)
    for _, document, result in _entries(documents):
        if result["mode"] == "throughput" and "mean_batch_size" in result["summary"]:
            workload, model = document["workload"], document["model"]
            precision = model.get("quantize") or model["dtype"]
            lengths = "/".join(f"{sum(workload[key]) / 2:g}" for key in ("input_len", "output_len"))
            name = f"{result['system']}, {model['name']}, {precision}, {lengths}"
            size = result["summary"]["mean_batch_size"]["median"]
            lines[name].append((size, result["summary"]["output_tok_s"]))
    series = []
    for name, found in lines.items():
        found.sort(key=lambda entry: entry[0])
        points = tuple((size, summary["median"]) for size, summary in found)
        series.append(Series(name, points, tuple((summary["min"], summary["max"]) for _, summary in found)))
    if not series:
        return ""
    return line_chart("Output tokens/s", series, x_label="sequences per step, mean", y_label="tokens/s")


def _loads(documents: Named) -> str:
    found: dict[str, list[tuple[float, Mapping[str, Any]]]] = defaultdict(list)
    for name, document in documents:
        for result in document["results"]:
            if result["mode"] == "load":
                rate = math.inf if result["request_rate"] == "inf" else float(result["request_rate"])
                found[name].append((rate, result))
    drawn = []
    for name, entries in found.items():
        entries = sorted((entry for entry in entries if math.isfinite(entry[0])), key=lambda entry: entry[0])
        if not entries:
            continue
        charts = []
        for metric, title in _LATENCIES:
            series = [_load_line(entries, f"{metric}_{share}", share) for share in ("mean", "p50", "p90", "p99")]
            charts.append(line_chart(f"{title.capitalize()}, ms", series, x_label="requests/s", y_label="ms"))
        rates = [_load_line(entries, "requests_s", "finished")]
        if "goodput_requests_s" in entries[0][1]["summary"]:
            slos = ", ".join(f"{key} <= {value:g} ms" for key, value in entries[0][1]["slos"].items())
            rates.append(_load_line(entries, "goodput_requests_s", f"goodput ({slos})"))
        charts.append(line_chart("Requests/s", rates, x_label="requests/s that arrive", y_label="requests/s"))
        cells = "".join(f"<div>{chart}</div>" for chart in charts)
        drawn.append(f'<h3>{html.escape(name)}</h3><div class="pair">{cells}</div>')
    return "".join(drawn)


def _load_line(entries: Sequence[tuple[float, Mapping[str, Any]]], metric: str, name: str) -> Series:
    summaries = [(rate, result["summary"][metric]) for rate, result in entries if metric in result["summary"]]
    points = tuple((rate, summary["median"]) for rate, summary in summaries)
    return Series(name, points, tuple((summary["min"], summary["max"]) for _, summary in summaries))


def _memory(documents: Named) -> str:
    bars: dict[str, tuple[str, dict[str, float]]] = {}
    for name, _, result in _entries(documents):
        ledger = result.get("memory_bytes")
        if ledger:
            parts = {part: size / 2**30 for part, size in ledger.items() if part != "total"}
            bars.setdefault(str(ledger), (name, parts))
    if not bars:
        return ""
    names = list(dict.fromkeys(part for _, parts in bars.values() for part in parts))
    return stacked_bars("Memory of the device", list(bars.values()), unit="GiB", parts=names)


def _profiles(documents: Named) -> str:
    bars, tables = [], []
    idle = ("idle, between kernels", "idle, host")
    for name, _, result in _entries(documents):
        profile = result.get("profile")
        if profile is None:
            continue
        parts = {entry["class"]: entry["ms"] for entry in profile["classes"]}
        bars.append((name, {**parts, idle[0]: profile["kernel_gap_ms"], idle[1]: profile["host_gap_ms"]}))
        rows = [
            [entry["name"][:80], entry["class"], f"{entry['ms']:.3f}", f"{entry['share']:.1%}", f"{entry['calls']:.0f}"]
            for entry in profile["top"]
        ]
        title = (
            f"{html.escape(name)}: {profile['num_steps']} steps, busy {profile['busy_share']:.1%}, "
            f"{profile['timed_step_ms']:.3f} ms a step without the profiler"
        )
        table = html_table(["kernel", "class", "ms per step", "of the span", "calls"], rows)
        tables.append(f"<details><summary>{title}</summary>{table}</details>")
    if not bars:
        return ""
    return stacked_bars("Milliseconds per step", bars, unit="ms", parts=[*CLASS_NAMES, *idle]) + "".join(tables)


def _start_up(documents: Named) -> str:
    names = {
        "build_s": "build", "load_s": "open", "prepare_s": "weights", "capture_s": "capture", "ready_s": "ready after",
        "first_token_s": "first token",
    }  # fmt: skip
    rows = []
    for name, document in documents:
        seconds = {**document.get("opened", {}), **document["results"][0].get("start_up", {})}
        if seconds:
            rows.append([name, *(f"{seconds[key]:.2f}" if key in seconds else "-" for key in names)])
    return html_table(["seconds", *names.values()], rows) if rows else ""


def _conditions(documents: Named) -> str:
    rows = []
    for name, document in documents:
        machine, versions, model = document["machine"], document["versions"], document["model"]
        git = document.get("git") or {}
        precision = f"{model['dtype']}, quantize {model.get('quantize')}, KV {model.get('kv_cache_dtype', 'auto')}"
        rows.append(
            [
                name, f"{model['name']}; {precision}", ", ".join(machine["gpus"]) or f"{machine['cores']} x {machine['cpu']}",
                f"camshaft {versions.get('camshaft')}, torch {versions.get('torch')}, triton {versions.get('triton')}",
                str(git.get("commit") or "-")[:12] + (" and changes" if git.get("dirty") else ""), document["date"],
            ]
        )  # fmt: skip
    commands = "".join(f"<li><code>{html.escape(document['command'])}</code></li>" for _, document in documents)
    return html_table(["", "model", "machine", "versions", "commit", "date"], rows) + f"<ul>{commands}</ul>"
