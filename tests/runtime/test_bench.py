"""Benchmarks: workloads, statistics, timed runs over the fake engine, documents and their comparison."""

import json
import math
import subprocess
import sys
import time

import pytest
from camshaft.runtime import LLM
from camshaft.runtime.bench.document import compare_documents, make_document, read_document, result_entry, unlike
from camshaft.runtime.bench.measure import _delivery_intervals_ms, repeat_runs, run_latency, run_throughput
from camshaft.runtime.bench.recording import RecordingEngine
from camshaft.runtime.bench.statistics import distribution, percentile, summarize
from camshaft.runtime.bench.workload import BenchRequest, Workload, make_requests, parse_range
from camshaft.runtime.packing import HostCopy

from .fake_engine import FakeEngine

SMALL = Workload(num_requests=6, input_len=(4, 12), output_len=(3, 8))


def test_parse_range_takes_a_number_or_a_range():
    assert parse_range("128", "--input-len") == (128, 128)
    assert parse_range("16:256", "--input-len") == (16, 256)
    for text in ("0", "5:2", "a", "1:2:3", ""):
        with pytest.raises(ValueError, match="--input-len"):
            parse_range(text, "--input-len")


def test_requests_repeat_their_lengths_but_not_their_tokens():
    first, again, other = (make_requests(SMALL, repeat, vocab_size=50) for repeat in (0, 0, 1))
    assert first == again
    assert [(len(r.prompt), r.output_len) for r in first] == [(len(r.prompt), r.output_len) for r in other]
    assert [r.prompt for r in first] != [r.prompt for r in other]
    assert all(4 <= len(r.prompt) <= 12 and 3 <= r.output_len <= 8 and max(r.prompt) < 50 for r in first)


def test_requests_share_a_prefix_and_come_from_a_text():
    shared = make_requests(Workload(num_requests=4, input_len=(6, 9), shared_prefix=5), 0, vocab_size=1000)
    assert len({tuple(r.prompt[:5]) for r in shared}) == 1 and len({tuple(r.prompt[5:]) for r in shared}) == 4
    text = list(range(100, 140))
    for request in make_requests(SMALL, 0, vocab_size=50, text_tokens=text):
        start = request.prompt[0] - 100
        assert request.prompt == text[start : start + len(request.prompt)]
    with pytest.raises(ValueError, match="the text has 5 tokens"):
        make_requests(SMALL, 0, vocab_size=50, text_tokens=text[:5])


def test_bad_workloads_say_what_is_allowed():
    with pytest.raises(ValueError, match="num_requests is 0"):
        Workload(num_requests=0)
    with pytest.raises(ValueError, match="shared_prefix is 32; allowed: 0 to 31"):
        Workload(shared_prefix=32)
    with pytest.raises(ValueError, match="12 \\+ 8 = 20 tokens, but sequences end at 19"):
        SMALL.check_fits(19)
    SMALL.check_fits(20)


def test_percentiles_are_values_that_occurred():
    assert percentile([4, 1, 3, 2], 0.5) == 2 and percentile([4, 1, 3, 2], 0.99) == 4 and percentile([7], 0.0) == 7
    assert percentile([1, 100], 0.5, [1, 9]) == 100 and percentile([1, 100], 0.5, [9, 1]) == 1
    assert math.isnan(percentile([], 0.5))
    assert distribution("x", [1, 3], [1, 3])["x_mean"] == 2.5 and distribution("x", []) == {}
    assert summarize([{"a": 3.0}, {"a": 1.0}, {"a": 2.0, "b": 5.0}]) == {
        "a": {"median": 2.0, "min": 1.0, "max": 3.0},
        "b": {"median": 5.0, "min": 5.0, "max": 5.0},
    }


def test_throughput_counts_tokens_steps_and_batch_sizes():
    engine = RecordingEngine(FakeEngine())
    requests = [BenchRequest(list(range(5 * i, 5 * i + 5)), 7) for i in range(4)]
    with LLM(engine, kv_cache_bytes=16 * 4 * 200) as llm:
        metrics = run_throughput(llm, engine, requests)
    assert metrics["output_tokens"] == 28 and metrics["input_tokens"] == 20
    assert metrics["steps"] == 7 and metrics["mean_batch_size"] == 4
    assert metrics["mean_batch_tokens"] == (20 + 6 * 4) / 7
    assert metrics["prefix_hit_tokens"] == 0 and metrics["preemptions"] == 0
    assert metrics["total_tok_s"] == pytest.approx(metrics["output_tok_s"] * 48 / 28)
    assert (
        0 < metrics["itl_ms_p50"] <= metrics["itl_ms_p99"] and metrics["ttft_ms_p50"] > 0 and metrics["tpot_ms_p50"] > 0
    )


def test_throughput_sees_prefix_hits_and_preemptions():
    engine = RecordingEngine(FakeEngine(max_sequences=4))
    workload = Workload(num_requests=8, input_len=(20, 24), output_len=(20, 24), shared_prefix=16)
    with LLM(engine, kv_cache_bytes=16 * 4 * 24, policy="max_utilization") as llm:
        metrics = run_throughput(llm, engine, make_requests(workload, 0, vocab_size=101))
    assert metrics["prefix_hit_tokens"] > 0 and metrics["preemptions"] > 0


def test_latency_runs_one_request_at_a_time():
    engine = RecordingEngine(FakeEngine())
    with LLM(engine, kv_cache_bytes=16 * 4 * 200) as llm:
        metrics = run_latency(llm, engine, make_requests(SMALL, 0, vocab_size=101))
    assert metrics["output_tokens"] == sum(n for _, n in SMALL.lengths())
    assert 0 < metrics["decode_ms_p50"] <= metrics["decode_ms_p99"] and metrics["request_s"] > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_decode_times_leave_the_prompt_out(asynchronous, monkeypatch):
    """A device on which a prompt takes 200 ms and a decode step 4 ms, with the host ahead of it or not."""
    busy_until = 0.0

    class Device(FakeEngine):
        def step(self, batch):
            nonlocal busy_until
            cost = 0.2 if batch.max_query_len > 1 else 0.004
            busy_until = max(busy_until, time.perf_counter()) + cost
            return super().step(batch)

    class Copy(HostCopy):
        def __init__(self, *args):
            super().__init__(*args)
            self.ready = busy_until

        def wait(self):
            time.sleep(max(0.0, self.ready - time.perf_counter()))
            return super().wait()

    monkeypatch.setattr("camshaft.runtime.runner.HostCopy", Copy)
    engine = RecordingEngine(Device(max_seq_len=64))
    with LLM(engine, async_scheduling=asynchronous) as llm:
        metrics = run_latency(llm, engine, [BenchRequest(list(range(1 + i, 31 + i)), 11) for i in (0, 40)])
    assert metrics["ttft_ms_p50"] > 190 and metrics["request_s"] > 0.23
    assert 3 < metrics["decode_ms_p50"] < 40 and metrics["decode_ms_mean"] < 50
    assert 1e3 / 50 < metrics["decode_tok_s"] < 260


def test_delivery_intervals():
    assert _delivery_intervals_ms([]) == _delivery_intervals_ms([(1.0, 1)]) == []
    assert _delivery_intervals_ms([(1.0, 1), (1.5, 1), (1.7, 0), (2.5, 2)]) == [500, 500, 500]


def test_warm_up_runs_do_not_count():
    seen, told = [], []

    def run(index):
        seen.append(index)
        return {"x": float(index)}

    assert repeat_runs(run, repeats=2, warmup=1, on_run=lambda i, m: told.append(i)) == [{"x": 0.0}, {"x": 1.0}]
    assert seen == [-1, 0, 1] and told == [0, 1]
    with pytest.raises(ValueError, match="repeat is 0"):
        repeat_runs(run, repeats=0, warmup=1)


def _document(values):
    repeats = [{"output_tok_s": v, "ttft_ms_p50": 1000 / v, "steps": 3.0} for v in values]
    results = [result_entry("camshaft", "throughput", repeats)]
    return make_document(model={"name": "m"}, workload=SMALL, results=results, command=["camshaft", "bench"])


def test_a_source_tree_without_git_tells_version_and_commit(monkeypatch, tmp_path):
    from camshaft.runtime.bench import environment

    import camshaft

    def missing(name):
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", missing)
    assert environment.package_versions() == {
        name: camshaft.__version__ if name == "camshaft" else None for name in environment.PACKAGES
    }
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "runtime" / "bench" / "environment.py"))
    monkeypatch.delenv("CAMSHAFT_COMMIT", raising=False)
    assert environment.git_commit() is None
    monkeypatch.setenv("CAMSHAFT_COMMIT", "abc123")
    assert environment.git_commit() == {"commit": "abc123", "dirty": None}


def test_a_recording_engine_has_limits_of_its_own():
    engine = RecordingEngine(FakeEngine(), max_sequences=2, max_batch_tokens=16)
    with LLM(engine, kv_cache_bytes=16 * 4 * 200) as llm:
        metrics = run_throughput(llm, engine, make_requests(SMALL, 0, vocab_size=101))
    assert max(step.num_sequences for step in engine.steps) == 2
    assert max(step.num_tokens for step in engine.steps) <= 16
    assert metrics["output_tokens"] == sum(n for _, n in SMALL.lengths())
    assert {"prepare", "bind_cache", "capture"} <= set(engine.seconds)
    with pytest.raises(ValueError, match="max_sequences is 9; allowed: 1 to 8"):
        RecordingEngine(FakeEngine(), max_sequences=9)


def test_documents_say_where_and_how():
    document = json.loads(json.dumps(_document([1.0, 3.0, 2.0])))
    assert document["command"] == "camshaft bench"
    assert document["versions"]["torch"] and document["versions"]["python"] == sys.version.split()[0]
    assert document["machine"]["cpu"] and document["machine"]["cores"] >= 1 and document["machine"]["gpus"] is not None
    assert document["workload"]["num_requests"] == 6
    assert len(document["results"][0]["repeats"]) == 3
    assert document["results"][0]["summary"]["output_tok_s"] == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_comparison_tells_differences_from_spread(tmp_path):
    for name, values in {"a": [10, 11, 12], "b": [20, 21, 22], "c": [12, 13, 14]}.items():
        (tmp_path / name).write_text(json.dumps(_document(values)))
    a, b, c = (read_document(tmp_path / name) for name in "abc")
    found = {d.metric: d for d in compare_documents(a, b)}
    assert set(found) == {"output_tok_s", "ttft_ms_p50"}
    assert found["output_tok_s"].verdict == "better" and found["output_tok_s"].ratio == pytest.approx(21 / 11)
    assert found["ttft_ms_p50"].verdict == "better"
    assert {d.verdict for d in compare_documents(b, a)} == {"worse"}
    assert {d.verdict for d in compare_documents(a, c)} == {"within spread"}
    assert unlike(a, b) == []
    b["machine"]["cpu"] = "another"
    assert unlike(a, b) == [f"machine.cpu: {a['machine']['cpu']} | another"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_document(tmp_path / "x")
    (tmp_path / "x").write_text('{"kind": "other"}')
    with pytest.raises(ValueError, match="no benchmark document"):
        read_document(tmp_path / "x")
    (tmp_path / "x").write_text('{"kind": "camshaft-bench", "format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        read_document(tmp_path / "x")


def test_workloads_and_documents_need_no_torch():
    code = (
        "import sys\n"
        "from camshaft.runtime.bench import cases, document, load, measure, profile, report, roofline, session, workload\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
