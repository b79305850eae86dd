"""bench/gpu_speed_rows.py and bench/performance_table.py: rows, options, and the tables that they make."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from camshaft.runtime.bench.cases import read_suite
from camshaft.runtime.bench.document import make_document, result_entry

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {
    "linear_parameters": 6_979_321_856, "head_parameters": 525_336_576, "step_weight_bytes": 8_100_000_000,
    "kv_token_bytes": 65_536.0, "attention_width": 131_072, "precision": "fp8", "head_precision": "bfloat16",
}  # fmt: skip


def _script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows(monkeypatch):
    for name in ("ROWS", "REPEAT", "PROFILE", "REQUESTS", "SEQUENCES", "TOKENS", "RATES", "MAX_SEQ_LEN"):
        monkeypatch.delenv(name, raising=False)
    return _script("gpu_speed_rows", monkeypatch)


@pytest.fixture
def table(monkeypatch):
    return _script("performance_table", monkeypatch)


def test_rows_are_cases_that_fit_the_engine(rows, table, tmp_path):
    for row in rows.ROWS:
        assert row.input_len + row.output_len <= rows.MAX_SEQ_LEN
        assert row.name in table.PEERS or row.optional
    assert set(rows.STARTS) <= set(table.PEERS)
    (tmp_path / "suite.json").write_text(json.dumps({"cases": [rows.case_of(row) for row in rows.ROWS]}))
    assert len(read_suite(tmp_path / "suite.json")) == len(rows.ROWS)
    assert rows.options_of("fp8") == (
        "--max-seq-len 2304 --max-sequences 1024 --max-batch-tokens 8192 --dtype bfloat16 --quantize fp8 --kv-cache-dtype fp8"
    )
    assert rows.options_of("bf16") == "--max-seq-len 2304 --max-sequences 2048 --max-batch-tokens 8192 --dtype bfloat16"


def test_the_environment_changes_rows(rows, monkeypatch):
    monkeypatch.setenv("ROWS", "fp8-2048-128 bf16-b1")
    monkeypatch.setenv("REPEAT", "1")
    monkeypatch.setenv("REQUESTS_fp8_2048_128", "64")
    assert rows.chosen_names() == ["fp8-2048-128", "bf16-b1"]
    row = next(row for row in rows.ROWS if row.name == "fp8-2048-128")
    assert rows.case_of(row)["num_requests"] == 64 and rows.case_of(row)["repeats"] == 1
    assert "--max-sequences 1024 --max-batch-tokens 8192" in rows.options_of("fp8")  # one engine, whatever is chosen
    monkeypatch.setenv("ROWS", "fp8")
    with pytest.raises(SystemExit, match="ROWS names fp8; allowed: fp8-128-128"):
        rows.chosen_names()


def _document(case, mode, metric, values, **facts):
    from camshaft.runtime.bench.workload import Workload

    workload = Workload(num_requests=4096, input_len=(128, 128), output_len=(128, 128))
    limits = {"max_sequences": 1024, "max_batch_tokens": 2048}
    result = result_entry("camshaft", mode, [{metric: value} for value in values], limits=limits, **facts)
    document = make_document(model={"shape": SHAPE}, workload=workload, results=[result], case=case, command=["x"])
    document["machine"]["gpus"] = ["NVIDIA H200"]
    return document


def test_tables_name_peers_ceilings_and_losses(table):
    profile = {
        "timed_step_ms": 36.0, "span_ms": 40.0, "kernel_gap_ms": 1.0, "host_gap_ms": 3.0,
        "classes": [{"class": "gemm", "share": 0.7}, {"class": "attention", "share": 0.2}],
    }  # fmt: skip
    documents = {
        "fp8-128-128": _document(
            "fp8-128-128", "throughput", "output_tok_s", [28_100, 28_300, 28_000], profile=profile
        ),
        "fp8-b1": _document("fp8-b1", "latency", "decode_tok_s", [400, 401, 402]),
        **{
            f"fp8-start-{i}": _document(
                f"fp8-start-{i}", "latency", "decode_tok_s", [1], start_up={"process_s": 7.0 + i}
            )
            for i in range(3)
        },
    }
    text = table.make_tables(documents)
    full = next(line for line in text.splitlines() if line.startswith("| FP8, 128 in / 128 out (4,096"))
    assert "28,100 (28,000 - 28,300) | 25,053 | 27,911 | 28,000 | 1.00 |" in full and full.rstrip(" |").endswith("%")
    assert "| 8.0 (7.0 - 9.0) | 64 | - | 15 | 1.88 |" in text
    assert "| 36.00 | - | 40.00 | 70.0% | 20.0% | 0.0% | 0.0% | 0.0% | 2.5% | 7.5% |" in text
    assert text.startswith("NVIDIA H200, torch ")
    with pytest.raises(ValueError, match="none of x is a row"):
        table.make_tables({"x": documents["fp8-b1"]})


def test_the_page_has_a_place_for_the_tables(table):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    made = table.replace_in(page, "| new |")
    assert "<!-- results:begin -->\n| new |\n<!-- results:end -->" in made and made.startswith("# Performance")
    with pytest.raises(ValueError, match="the page has no"):
        table.replace_in("nothing", "| new |")
