"""Load: arrivals, times per request, goodput, cases and suites."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from camshaft.runtime import LLM
from camshaft.runtime.bench.cases import Case, read_suite
from camshaft.runtime.bench.load import Timeline, arrival_times, load_metrics, parse_rates, parse_slos, run_load
from camshaft.runtime.bench.session import Session
from camshaft.runtime.bench.workload import Workload, make_requests

from .fake_engine import FakeEngine

SMALL = Workload(num_requests=6, input_len=(4, 12), output_len=(3, 8))


def test_arrivals_are_a_seeded_poisson_process():
    times = arrival_times(50.0, 4000, 7)
    assert times == arrival_times(50.0, 4000, 7) != arrival_times(50.0, 4000, 8)
    assert times[0] == 0.0 and times == sorted(times)
    gaps = [b - a for a, b in zip(times, times[1:])]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.06) and deviation == pytest.approx(mean, rel=0.1)  # exponential: equal
    assert arrival_times(math.inf, 3, 0) == [0.0, 0.0, 0.0]


def test_rates_and_slos_are_parsed():
    assert parse_rates("1,2.5,inf") == (1.0, 2.5, math.inf)
    assert parse_slos(["ttft=200", "tpot=20.5"]) == {"ttft": 200.0, "tpot": 20.5}
    for text in ("", "0", "-1", "a", "1,,2", "nan"):
        with pytest.raises(ValueError, match="--load is"):
            parse_rates(text)
    for text in ("ttft", "ttft=x", "itl=3", "tpot=0"):
        with pytest.raises(ValueError, match="--slo is .*ttft, tpot, e2e"):
            parse_slos([text])


def test_times_count_from_the_moment_a_request_was_due():
    first = Timeline(10.0, 10.2, [10.5, 10.6, 10.8], 3)
    second = Timeline(11.0, 11.0, [11.1], 1)
    assert first.latencies_ms() == pytest.approx({"ttft": 500, "tpot": 150, "e2e": 800})
    metrics = load_metrics([first, second], 7, {"ttft": 200.0, "e2e": 900.0})
    assert metrics["duration_s"] == pytest.approx(1.1)
    assert metrics["output_tok_s"] == pytest.approx(4 / 1.1) and metrics["total_tok_s"] == pytest.approx(11 / 1.1)
    assert metrics["submit_lag_ms_p99"] == pytest.approx(200)
    assert metrics["itl_ms_mean"] == pytest.approx(150) and metrics["itl_ms_p99"] == pytest.approx(200)
    assert metrics["tpot_ms_p50"] == pytest.approx(150)  # the request of one token has none
    assert metrics["slo_share"] == 0.5 and metrics["goodput_requests_s"] == pytest.approx(1 / 1.1)
    assert metrics["max_in_flight"] == 1
    assert "slo_share" not in load_metrics([first, second], 7, {})


def test_load_runs_every_request_at_its_time():
    requests = make_requests(SMALL, 0, vocab_size=101)
    arrivals = [0.0, 0.03, 0.06, 0.09, 0.12, 0.15]
    with LLM(FakeEngine(), kv_cache_bytes=16 * 4 * 200) as llm:
        metrics = run_load(llm, requests, arrivals, slos={"ttft": 1e6})
        burst = run_load(llm, requests, [0.0] * 6)
    assert metrics["output_tokens"] == sum(r.output_len for r in requests)
    assert metrics["duration_s"] >= 0.15 > burst["duration_s"]
    assert burst["max_in_flight"] == 6 and metrics["slo_share"] == 1.0
    assert metrics["goodput_requests_s"] == pytest.approx(metrics["requests_s"])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert (
            0 < metrics[f"{name}_p50"] <= metrics[f"{name}_p90"] <= metrics[f"{name}_p99"] and metrics[f"{name}_mean"]
        )
    assert metrics["e2e_ms_p50"] > metrics["ttft_ms_p50"] and metrics["steps"] > 0


def test_a_session_measures_cases_and_keeps_the_llm_while_they_are_alike():
    small: dict[str, Any] = {"kv_cache_bytes": 16 * 4 * 200, "repeats": 2, "warmup_requests": 2, "warmup_output_len": 2}
    told = []
    with Session(FakeEngine(), tell=lambda label, index, metrics: told.append((label, index))) as session:
        plain = session.measure(Case(name="a", workload=SMALL, **small))
        llm = session._llm
        loads = session.measure(
            Case(name="b", mode="load", rates=(200.0, math.inf), slos={"ttft": 1e6}, workload=SMALL, **small)
        )
        assert session._llm is llm
        narrow = session.measure(Case(name="c", mode="latency", workload=SMALL, max_sequences=1, **small))
        assert session._llm is not llm
    assert told == [("a", 0), ("a", 1)] + [(f"b, {rate} requests/s", i) for rate in ("200", "inf") for i in (0, 1)] + [
        ("c", 0),
        ("c", 1),
    ]
    assert plain[0]["limits"] == {"max_sequences": 8, "max_batch_tokens": 64} and len(plain[0]["repeats"]) == 2
    assert plain[0]["start_up"]["ready_s"] > 0 and plain[0]["start_up"]["first_token_s"] > 0
    assert plain[0]["memory_bytes"]["KV cache"] > 0
    assert [entry["request_rate"] for entry in loads] == [200.0, "inf"] and loads[0]["slos"] == {"ttft": 1e6}
    assert narrow[0]["limits"]["max_sequences"] == 1 and narrow[0]["summary"]["decode_tok_s"]["median"] > 0
    for entry in (*plain, *loads, *narrow):  # they share a prefix cache, and no prompt
        assert entry["summary"].get("prefix_hit_tokens", {"max": 0})["max"] == 0
    json.dumps([plain, loads, narrow], allow_nan=False)


def test_warm_up_runs_may_be_smaller():
    case = Case(workload=SMALL, warmup_requests=2, warmup_output_len=4)
    assert case.warmup_workload == Workload(num_requests=2, input_len=(4, 12), output_len=(3, 4))
    assert Case(workload=SMALL, warmup_requests=99).warmup_workload == SMALL


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mode": "other"}, "mode is 'other'; allowed: throughput, latency, load"),
        ({"mode": "load"}, "mode load takes rates"),
        ({"rates": (1.0,)}, "mode load takes rates, the others none"),
        ({"slos": {"ttft": 1.0}}, "objectives are for mode load"),
        ({"repeats": 0}, "repeat is 0"),
        ({"warmup_requests": 0}, "warmup_requests is 0"),
    ],
)
def test_cases_refuse_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Case(**fields)


def test_suites_are_read_and_checked(tmp_path):
    path = tmp_path / "suite.json"

    def read(*cases):
        path.write_text(json.dumps({"cases": list(cases)}))
        return read_suite(path)

    first, second = read(
        {"name": "a", "num_requests": 3, "input_len": 8, "output_len": [4, 6], "max_sequences": 2, "profile_steps": 4},
        {"name": "b", "mode": "load", "rates": [1, "inf"], "slos": {"tpot": 20}, "input_len": "8:9", "repeats": 1},
    )
    assert first.workload == Workload(num_requests=3, input_len=(8, 8), output_len=(4, 6)) and first.max_sequences == 2
    assert second.rates == (1.0, math.inf) and second.slos == {"tpot": 20.0} and second.workload.input_len == (8, 9)
    with pytest.raises(ValueError, match="case a: unknown fields lenght; allowed: "):
        read({"name": "a", "lenght": 3})
    with pytest.raises(ValueError, match="case 0: input_len is '0'"):
        read({"input_len": 0})
    with pytest.raises(ValueError, match="each must have its own"):
        read({"name": "a"}, {"name": "a"})
    with pytest.raises(ValueError, match="is no suite"):
        read()
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_suite(path)
