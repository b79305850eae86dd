"""The table of docs/performance.md, from the documents of bench/gpu_speed.sh.

    python bench/performance_table.py bench/results/h200-speed/*.json                              prints it
    python bench/performance_table.py bench/results/h200-speed/*.json --write docs/performance.md  replaces it in the page

Ceilings follow from the shape and the measured peaks (runtime/bench/roofline.py); peers are vLLM 0.24.0, measured once on the same
machine (bf16 KV cache), and what TensorRT-LLM publishes for one H200 (FP8: 1.0, with an FP8 KV cache; batch 1: 0.15, 2048/128).
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camshaft.runtime.bench.document import read_document
from camshaft.runtime.bench.report import ceiling_of

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


@dataclass(frozen=True)
class Peer:
    """What a row is measured against; output tokens per second, for start-ups seconds. None: not known."""

    label: str
    vllm: float | None
    tensorrt_llm: float | None
    target: float


PEERS = {
    "fp8-128-128": Peer("FP8, 128 in / 128 out", 25_053, 27_911, 28_000),
    "fp8-1000-1000": Peer("FP8, 1000 in / 1000 out", 10_563, 17_744, 18_000),
    "fp8-128-2048": Peer("FP8, 128 in / 2048 out", 15_449, 26_221, 26_500),
    "fp8-2048-128": Peer("FP8, 2048 in / 128 out", 2_938, 3_538, 3_600),
    "bf16-128-128": Peer("BF16, 128 in / 128 out", 17_261, None, 18_500),
    "bf16-b1": Peer("BF16, batch 1, 128 in / 256 out, decode", 206, 173.8, 230),
    "fp8-b1": Peer("FP8, batch 1, 128 in / 256 out, decode", 285, 245, 380),
    "fp8-start": Peer("FP8, process start to first token, s", 64, None, 15),
    "bf16-start": Peer("BF16, process start to first token, s", 40, None, 15),
}
"""By the row's name, in the order of the table."""
_METRICS = {"throughput": "output_tok_s", "latency": "decode_tok_s"}


def speed_row(name: str, document: Mapping[str, Any]) -> list[str]:
    """One row of output tokens per second."""
    peer, result = PEERS[name], document["results"][0]
    summary = result["summary"][_METRICS[result["mode"]]]
    median = summary["median"]
    ceiling = ceiling_of(document, result)
    requests = document["workload"]["num_requests"]
    return [
        f"{peer.label} ({requests:,} requests, {len(result['repeats'])} runs)",
        f"{_number(median)} ({_number(summary['min'])} - {_number(summary['max'])})",
        _number(peer.vllm), _number(peer.tensorrt_llm), _number(peer.target), f"{median / peer.target:.2f}",
        _number(ceiling), f"{median / ceiling:.0%}" if ceiling else "-",
    ]  # fmt: skip


def start_row(name: str, documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """The row of a start-up: seconds from the start of a process to its first token, over several processes."""
    peer = PEERS[name]
    seconds = [document["results"][0]["start_up"]["process_s"] for document in documents]
    median = statistics.median(seconds)
    return [
        f"{peer.label} ({len(seconds)} processes)", f"{median:.1f} ({min(seconds):.1f} - {max(seconds):.1f})",
        _number(peer.vllm), "-", _number(peer.target), f"{peer.target / median:.2f}", "-", "-",
    ]  # fmt: skip


def loss_rows(documents: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """For each row with a profile: a step without the profiler, the host's work in it, and the shares of classes and of idling."""
    rows = []
    for name in PEERS:
        profile = documents[name]["results"][0].get("profile") if name in documents else None
        if profile is None:
            continue
        shares = {entry["class"]: entry["share"] for entry in profile["classes"]}
        span = profile["span_ms"]
        rows.append(
            [
                PEERS[name].label, f"{profile['timed_step_ms']:.2f}", _host_ms(documents[name]), f"{span:.2f}",
                *(f"{shares.get(kind, 0.0):.1%}" for kind in ("gemm", "attention", "norm and pointwise", "sampling")),
                f"{shares.get('copies', 0.0) + shares.get('other', 0.0):.1%}",
                f"{profile['kernel_gap_ms'] / span:.1%}", f"{profile['host_gap_ms'] / span:.1%}",
            ]
        )  # fmt: skip
    return rows


def _host_ms(document: Mapping[str, Any]) -> str:
    """Milliseconds of a step that the serving thread works, waiting aside; most of them while the GPU computes."""
    summary = document["results"][0]["summary"]
    names = [f"host_{part}_ms" for part in ("schedule", "launch", "deliver")]
    return f"{sum(summary[name]['median'] for name in names):.2f}" if names[0] in summary else "-"


def make_tables(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Both tables as Markdown, and a line on where and with what they were measured. Raises ValueError for no known row."""
    rows = []
    for name in PEERS:
        if name in documents:
            rows.append(speed_row(name, documents[name]))
        starts = [document for key, document in documents.items() if re.fullmatch(rf"{name}-\d+", key)]
        if starts and name.endswith("-start"):
            rows.append(start_row(name, starts))
    if not rows:
        raise ValueError(f"none of {', '.join(documents)} is a row of this table; rows are {', '.join(PEERS)}")
    columns = ["Llama-3.1-8B shape, random weights, output tokens/s", "Camshaft, median (min - max)", "vLLM 0.24 there",
               "TensorRT-LLM, published", "target", "of target", "ceiling", "of ceiling"]  # fmt: skip
    parts = [_conditions(documents), markdown(columns, rows)]
    losses = loss_rows(documents)
    if losses:
        columns = ["A step, from the profile", "ms", "host's work, ms", "ms, profiled", "gemm", "attention",
                   "norm, pointwise", "sampling", "copies, other", "idle between kernels", "idle, host"]  # fmt: skip
        parts.append(markdown(columns, losses))
    return "\n\n".join(parts)


def _conditions(documents: Mapping[str, Mapping[str, Any]]) -> str:
    found = {
        f"{', '.join(d['machine']['gpus']) or d['machine']['cpu']}, torch {d['versions']['torch']}, "
        f"triton {d['versions']['triton']}, camshaft {d['versions']['camshaft']} at {str((d['git'] or {}).get('commit'))[:12]}"
        for d in documents.values()
    }
    return "; ".join(sorted(found)) + "."


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.1f}"


def replace_in(page: str, tables: str) -> str:
    """The page with the tables between its markers. Raises ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the markers of this page")
    arguments = parser.parse_args()
    documents = {
        document["case"]: document for document in map(read_document, arguments.documents) if "case" in document
    }
    tables = make_tables(documents)
    if arguments.write:
        arguments.write.write_text(replace_in(arguments.write.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print(tables)


if __name__ == "__main__":
    main()
