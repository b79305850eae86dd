"""Profiles of steps: classes of kernels, gaps, self times of operators, and a profile of the fake engine."""

from __future__ import annotations

import json

import pytest
from camshaft.runtime.bench.cases import Case
from camshaft.runtime.bench.profile import CLASS_NAMES, StepProfiler, kernel_class, summarize_trace
from camshaft.runtime.bench.session import Session
from camshaft.runtime.bench.workload import Workload

from .fake_engine import FakeEngine


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64", "gemm"),
        ("void cutlass::device_kernel<enable_3x_kernel_for_sm9x<...", "gemm"),
        ("triton_tem_fused__to_copy_mm_3", "gemm"),
        ("_rows_kernel", "gemm"),
        ("_one_row_kernel", "gemm"),
        ("_tile_kernel", "gemm"),
        ("_tiled_kernel", "gemm"),
        ("aten::addmm", "gemm"),
        ("aten::mm", "gemm"),
        ("camshaft::scaled_linear", "gemm"),
        ("decode_kernel", "attention"),
        ("join_kernel", "attention"),
        ("prefill_kernel", "attention"),
        ("write_kernel", "attention"),
        ("tiles_kernel", "attention"),
        ("camshaft::paged_attention", "attention"),
        ("flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits...", "attention"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norm and pointwise"),
        ("triton_poi_fused_mul_silu_split_4", "norm and pointwise"),
        ("_norm_kernel", "norm and pointwise"),
        ("_glu_kernel", "norm and pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<...", "norm and pointwise"),
        ("triton_red_fused_argmax_1", "sampling"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps...", "sampling"),
        ("aten::argmax", "sampling"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...", "copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...", "copies"),
        ("something_unheard_of", "other"),
    ],
)  # fmt: skip
def test_kernels_are_classed_by_name(name, expected):
    assert kernel_class(name) == expected and expected in CLASS_NAMES


def test_memory_copies_are_copies():
    assert kernel_class("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy") == "copies"
    assert kernel_class("Memset (Device)", "gpu_memset") == "copies"


def _event(name, cat, ts, dur, tid=1):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid}


def test_device_time_gaps_and_shares():
    # two steps of 100 us: 0-40 gemm, 42-62 attention (on two streams, 50-62 twice), pause of 38 us, the same again
    events = [{"ph": "M", "name": "process_name"}, _event("cudaGraphLaunch", "cuda_runtime", 0, 500)]
    for start in (0, 100):
        events += [
            _event("nvjet_a", "kernel", start, 40),
            _event("decode_kernel", "kernel", start + 42, 20),
            _event("Memcpy DtoH", "gpu_memcpy", start + 50, 12, tid=2),
        ]
    profile = summarize_trace({"traceEvents": events}, 2)
    assert profile["device"] == "cuda" and profile["num_steps"] == 2 and profile["launches"] == 3
    assert profile["span_ms"] == pytest.approx(0.081) and profile["busy_ms"] == pytest.approx(0.060)
    assert profile["host_gap_ms"] == pytest.approx(0.019) and profile["host_gaps"] == 0.5
    assert profile["kernel_gap_ms"] == pytest.approx(0.002) and profile["longest_gap_ms"] == pytest.approx(0.038)
    assert profile["busy_share"] == pytest.approx(120 / 162)
    assert [entry["class"] for entry in profile["classes"]] == ["gemm", "attention", "copies"]
    assert profile["classes"][0] == {
        "class": "gemm",
        "ms": pytest.approx(0.040),
        "calls": 1,
        "share": pytest.approx(80 / 162),
    }
    assert profile["top"][1] == {
        "name": "decode_kernel", "class": "attention", "ms": pytest.approx(0.020), "calls": 1, "share": pytest.approx(40 / 162),
    }  # fmt: skip


def test_operators_count_without_what_runs_inside_them():
    events = [
        _event("aten::linear", "cpu_op", 0, 100),
        _event("aten::addmm", "cpu_op", 10, 60),
        _event("aten::copy_", "cpu_op", 20, 15),
        _event("aten::mul", "cpu_op", 100, 10),
        _event("aten::mul", "cpu_op", 0, 50, tid=2),
    ]
    profile = summarize_trace({"traceEvents": events}, 1)
    own = {entry["name"]: 1e3 * entry["ms"] for entry in profile["top"]}
    assert own == pytest.approx({"aten::linear": 40, "aten::addmm": 45, "aten::copy_": 15, "aten::mul": 60})
    assert profile["device"] == "cpu" and profile["busy_share"] == 1.0


def test_an_empty_trace_is_refused():
    with pytest.raises(ValueError, match="neither device activity nor operators"):
        summarize_trace({"traceEvents": []}, 1)


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_steps_of_a_run_are_profiled(mode, tmp_path):
    workload = Workload(num_requests=3, input_len=(4, 6), output_len=(20, 20))
    case = Case(mode=mode, workload=workload, kv_cache_bytes=16 * 4 * 200, repeats=1, warmup=0, profile_steps=5)
    with Session(FakeEngine(), trace=tmp_path / "trace.json") as session:
        entries = session.measure(case)
        session.profile(case, entries)
    [entry] = entries
    profile = entry["profile"]
    assert profile["num_steps"] == 5 and profile["device"] == "cpu" and profile["timed_step_ms"] > 0
    assert {e["class"] for e in profile["classes"]} <= set(CLASS_NAMES) and 0 < profile["busy_share"] <= 1
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


def test_a_run_that_is_too_short_is_told():
    profiler = StepProfiler(3, 10, device="cpu")
    with pytest.raises(ValueError, match="ended before step 13"):
        profiler.result()
