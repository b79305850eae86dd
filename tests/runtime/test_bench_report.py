"""Ceilings, charts and the page that a report is."""

from __future__ import annotations

import copy
import re
from xml.etree import ElementTree

import pytest
from camshaft.runtime.bench.charts import Series, line_chart, stacked_bars, ticks
from camshaft.runtime.bench.document import make_document, result_entry
from camshaft.runtime.bench.report import ceiling_of, report_html
from camshaft.runtime.bench.roofline import PEAKS, ModelShape, decode_floor_s, latency_ceiling, throughput_ceiling
from camshaft.runtime.bench.workload import Workload

H200 = PEAKS["NVIDIA H200"]
LLAMA_8B = {
    "linear_parameters": 6_979_321_856, "head_parameters": 525_336_576, "step_weight_bytes": 15_009_849_344,
    "kv_token_bytes": 131_072.0, "attention_width": 131_072, "precision": "bfloat16", "head_precision": "bfloat16",
}  # fmt: skip
PROFILE = {
    "device": "cuda", "num_steps": 10, "span_ms": 5.0, "busy_ms": 4.5, "idle_ms": 0.5, "host_gap_ms": 0.4, "host_gaps": 1.0,
    "longest_gap_ms": 0.5, "kernel_gap_ms": 0.1, "busy_share": 0.9, "launches": 300.0, "timed_step_ms": 4.9,
    "classes": [{"class": "gemm", "ms": 4.0, "calls": 129.0, "share": 0.8}],
    "top": [{"name": "kernel<int, 4>", "class": "gemm", "ms": 4.0, "calls": 129.0, "share": 0.8}],
}  # fmt: skip


def _document(results, workload=None, **model):
    facts = {"name": "llama", "dtype": "bfloat16", "target": "auto", "device": "cuda", "shape": LLAMA_8B, **model}
    document = make_document(
        model=facts,
        workload=workload or Workload(),
        results=results,
        opened={"build_s": 12.0},
        command=["camshaft", "<b>"],
    )
    return {**document, "machine": {**document["machine"], "gpus": ["NVIDIA H200"]}}


def _throughput(value=100.0, size=64.0, **facts):
    repeats = [{"output_tok_s": value + i, "mean_batch_size": size, "ttft_ms_p50": 3.0} for i in range(3)]
    facts = {"limits": {"max_sequences": 64, "max_batch_tokens": 512}, **facts}
    return result_entry("camshaft", "throughput", repeats, **facts)


def _load(rate, value):
    repeats = [
        {
            f"{metric}_{share}": value * (i + 1)
            for i, share in enumerate(("p50", "p90", "p99", "mean"))
            for metric in names
        }
        | {"requests_s": rate * 0.9, "goodput_requests_s": rate * 0.5, "output_tok_s": 10.0}
        for names in [("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")]
    ]
    return result_entry("camshaft", "load", repeats, request_rate=rate if rate < 1e9 else "inf", slos={"ttft": 200.0})


def test_batch_one_is_bound_by_reading_the_weights():
    shape = ModelShape(**LLAMA_8B)
    assert decode_floor_s(shape, H200, sequences=1, context=0) == pytest.approx(15.01e9 / 4.0e12, rel=1e-3)
    assert latency_ceiling(shape, H200, input_len=128, output_len=256) == pytest.approx(265, abs=2)
    # 150 sequences still read them in the same time, and their keys and values besides; 2,000 are bound by arithmetic
    keys = 150 * 1000 * 131_072 / 4.0e12
    assert decode_floor_s(shape, H200, sequences=150, context=1000) == pytest.approx(15.01e9 / 4.0e12 + keys, rel=1e-3)
    assert decode_floor_s(shape, H200, sequences=2000, context=0) == pytest.approx(
        2 * 7.505e9 * 2000 / 788e12, rel=1e-3
    )


def test_prompts_and_small_batches_lower_the_ceiling():
    shape = ModelShape(**LLAMA_8B)

    def ceiling(num_requests=4096, input_len=128, output_len=128, max_sequences=1024):
        return throughput_ceiling(
            shape,
            H200,
            num_requests=num_requests,
            input_len=input_len,
            output_len=output_len,
            max_sequences=max_sequences,
        )

    assert 22_000 < ceiling() < 27_000
    assert ceiling(input_len=2048) < ceiling(input_len=1024) < ceiling() and ceiling(max_sequences=64) < ceiling()
    assert ceiling(num_requests=1) == ceiling(num_requests=1, max_sequences=1)


def test_a_result_has_a_ceiling_where_the_device_is_known():
    document = _document([_throughput()])
    assert ceiling_of(document, document["results"][0]) > 1000
    elsewhere = copy.deepcopy(document)
    elsewhere["machine"]["gpus"] = ["Other"]
    assert ceiling_of(elsewhere, elsewhere["results"][0]) is None
    assert ceiling_of(_document([_load(4.0, 3.0)]), _load(4.0, 3.0)) is None
    assert ceiling_of(_document([_throughput()], shape=None), _throughput()) is None


def test_ticks_are_round_and_cover():
    assert ticks(0, 9.3) == [0, 2, 4, 6, 8, 10] and ticks(0, 0)[-1] >= 1
    assert ticks(0, 30_000)[-1] == 30_000


def test_charts_are_well_formed():
    chart = line_chart(
        "a < b", [Series("x", ((1.0, 2.0), (64.0, 5.0)), ((1.0, 3.0), (4.0, 6.0)))], x_label="x", y_label="y"
    )
    bars = stacked_bars("m", [("a & b", {"one": 3.0, "two": 0.0})], unit="GiB", parts=["one", "two"])
    for drawing in (chart, bars):
        svg = re.search("<svg.*</svg>", drawing).group()
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert chart.count("<circle") == 2 and bars.count("<rect") == 1


def test_a_report_shows_every_kind_of_result():
    ledger = {"weights": 16 << 30, "KV cache": 100 << 30, "free": 10 << 30, "total": 126 << 30}
    full = _throughput(memory_bytes=ledger, start_up={"ready_s": 4.0, "first_token_s": 0.02}, profile=PROFILE)
    documents = [
        ("wide", _document([full])),
        ("narrow", _document([_throughput(50.0, 8.0)])),
        ("loads", _document([_load(rate, rate * 2) for rate in (1.0, 4.0, 16.0, 1e9)])),
    ]
    page = report_html(documents)
    for heading in (
        "Results",
        "Throughput",
        "Latency against load",
        "Memory",
        "time of a step",
        "Start-up",
        "Conditions",
    ):
        assert heading in page
    assert page.count("<svg") == 1 + 4 + 1 + 1 and "kernel&lt;int, 4&gt;" in page and "&lt;b&gt;" in page
    assert "goodput (ttft &lt;= 200 ms)" in page and "12.00" in page
    assert "<h2>Memory" not in report_html(documents[1:2])
    with pytest.raises(ValueError, match="at least one document"):
        report_html([])
