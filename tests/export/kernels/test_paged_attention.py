"""The torch reference and the C kernel against a dense attention in float64, and what they refuse."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.kernels import cpu, dispatch, native, reference
from camshaft.export.kernels.state import AttentionState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_attention_cases import Case, dense_attention, make_case

MIXED = [(1, 37), (5, 5), (0, 0), (130, 200), (1, 1), (17, 90), (1, 64), (64, 128)]
DECODE = [(1, n) for n in (1, 2, 15, 16, 17, 63, 64, 65, 150)]
# float32 against float64: the rounding of a sum of a few hundred products of order one
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}

needs_c_kernel = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler here: the C kernel cannot be built"
)
KERNELS = [
    pytest.param(reference.paged_attention, id="reference"),
    pytest.param(cpu.paged_attention, id="c", marks=needs_c_kernel),
]


def assert_matches_dense(kernel: Any, case: Case, score_scale: float = 1.0, **more: Any) -> None:
    """Output and caches after the call are what the dense tokens say; larger scores have larger rounding errors."""
    before_k, before_v = case.tensors["k_cache"].clone(), case.tensors["v_cache"].clone()
    out = case.call(kernel, **more)
    tolerance = {name: value * score_scale for name, value in TOLERANCE.items()}
    torch.testing.assert_close(out.double(), dense_attention(case), **tolerance)
    written = case.tensors["slot_mapping"] >= 0
    slots = case.tensors["slot_mapping"][written]
    block_size = before_k.shape[1]
    for name, before in (("k", before_k), ("v", before_v)):
        before[slots // block_size, slots % block_size] = case.tensors[name][written]
        torch.testing.assert_close(case.tensors[f"{name}_cache"], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [8, 16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
def test_head_sizes(kernel: Any, dim: int, lengths: list[tuple[int, int]]) -> None:
    assert_matches_dense(kernel, make_case(lengths, dim=dim))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (4, 4), (6, 2), (5, 1), (16, 2), (30, 2), (71, 1)])
@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
def test_grouped_queries(kernel: Any, heads: int, kv_heads: int, lengths: list[tuple[int, int]]) -> None:
    assert_matches_dense(kernel, make_case(lengths, heads=heads, kv_heads=kv_heads, dim=24))


OPTIONS: list[dict[str, Any]] = [
    {"value_dim": 8},
    {"dim": 192, "value_dim": 128},
    {"dim": 10, "value_dim": 13},
    {"dim": 3, "value_dim": 33},
    {"window": 1},
    {"window": 16},
    {"window": 50},
    {"window": 1000},
    {"softcap": 2.0},
    {"softcap": 30.0, "score_scale": 8.0},
    {"sinks": True},
    {"alibi": True},
    {"sinks": True, "window": 20, "alibi": True, "softcap": 3.0},
    {"padding": 7},
    {"fused_qkv": True},
    {"fused_qkv": True, "padding": 3, "value_dim": 24},
    {"block_size": 1},
    {"block_size": 7},
    {"block_size": 64},
    {"score_scale": 50.0},
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
def test_options(kernel: Any, options: dict[str, Any], lengths: list[tuple[int, int]]) -> None:
    assert_matches_dense(kernel, make_case(lengths, **options), options.get("score_scale", 1.0))


TREES = [(1, 37), (5, 5), (9, 90), (64, 200), (1, 1), (130, 200), (17, 90), (33, 64), (2, 128), (48, 70)]
TREE_OPTIONS: list[dict[str, Any]] = [
    {"heads": 6, "kv_heads": 2, "dim": 24},
    {"window": 1},
    {"window": 5, "block_size": 4},
    {"window": 50},
    {"softcap": 2.0, "sinks": True},
    {"alibi": True},
    {"alibi": True, "window": 9, "softcap": 3.0, "sinks": True, "block_size": 1},
    {"padding": 5, "fused_qkv": True, "value_dim": 24, "heads": 1, "kv_heads": 1},
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", TREE_OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_token_trees(kernel: Any, options: dict[str, Any]) -> None:
    """A row of a tree sees what a text of the context and its ancestors would be, at the positions of that text."""
    assert_matches_dense(kernel, make_case(TREES, trees=True, **options))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_as_a_tree_is_a_text(kernel: Any) -> None:
    case = make_case([(9, 30), (5, 5)], alibi=True, window=7)
    plain = case.clone().call(kernel)
    mask = torch.tensor([(2 << i) - 1 for count in (9, 5) for i in range(count)])
    torch.testing.assert_close(case.call(kernel, tree_mask=mask), plain, **TOLERANCE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_rows_are_zero(kernel: Any) -> None:
    case = make_case([(3, 3), (0, 0)], padding=4)
    out = case.call(kernel)
    assert out.shape == (7, 4, 16)
    assert torch.equal(out[3:], torch.zeros(4, 4, 16))
    empty = make_case([(0, 0)], padding=2)
    assert torch.equal(empty.call(kernel), torch.zeros(2, 4, 16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_shared_by_sequences(kernel: Any) -> None:
    case = make_case([(1, 40), (5, 37), (8, 60)], shared_blocks=2)
    assert torch.equal(case.tensors["block_tables"][0, :2], case.tensors["block_tables"][2, :2])
    assert_matches_dense(kernel, case)


@pytest.mark.parametrize("kernel", KERNELS)
def test_minus_one_slots_write_nothing(kernel: Any) -> None:
    """Rows whose keys are in the cache already (a shared layer) are computed and not written."""
    case = make_case([(4, 20), (1, 9)])
    first = case.clone()
    first.call(kernel)
    again = Case(first.tensors | {"slot_mapping": torch.full((5,), -1)}, case.options, case.dense)
    cache = again.tensors["k_cache"].clone()
    torch.testing.assert_close(again.call(kernel).double(), dense_attention(case), **TOLERANCE)
    torch.testing.assert_close(again.tensors["k_cache"], cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_caches(kernel: Any) -> None:
    """Keys and values of all layers in one buffer: the cache's blocks lie apart, head before offset."""
    case = make_case(MIXED)
    for name in ("k_cache", "v_cache"):
        t = case.tensors[name]
        buffer = torch.full((t.shape[0], 2, t.shape[2], t.shape[1], t.shape[3]), float("nan"))
        view = buffer[:, 1].transpose(1, 2)
        case.tensors[name] = view.copy_(t)
    assert_matches_dense(kernel, case)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_stays_in_its_head_and_infinity_is_not_lost(kernel: Any) -> None:
    case = make_case([(2, 30), (1, 30)])
    case.tensors["q"][0, 1, 0] = float("nan")
    case.tensors["q"][2, 0] = float("inf")
    out = case.call(kernel)
    assert out[0, 1].isnan().all() and out[2, 0].isnan().all()
    fine = torch.ones(3, 4, dtype=torch.bool)
    fine[0, 1] = fine[2, 0] = False
    assert out[fine].isfinite().all()


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    lengths = []
    for _ in range(draw(st.integers(1, 5))):
        n = draw(st.sampled_from([0, 1, 1, 2, 9, 40]))
        lengths.append((n, n + draw(st.sampled_from([0, 0, 1, 15, 16, 70]))))
    kv_heads = draw(st.integers(1, 3))
    return {
        "lengths": lengths, "kv_heads": kv_heads, "heads": kv_heads * draw(st.integers(1, 5)),
        "dim": draw(st.integers(1, 40)), "value_dim": draw(st.integers(1, 40)), "block_size": draw(st.integers(1, 33)),
        "window": draw(st.sampled_from([0, 0, 1, 5, 30])), "softcap": draw(st.sampled_from([0.0, 1.5])),
        "sinks": draw(st.booleans()), "alibi": draw(st.booleans()), "padding": draw(st.integers(0, 3)),
        "fused_qkv": draw(st.booleans()), "seed": draw(st.integers(0, 9)),
    }  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@given(batch=batches(), threads=st.sampled_from([1, 2, 3]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_batches(kernel: Any, batch: dict[str, Any], threads: int) -> None:
    more = {"num_threads": threads} if kernel is cpu.paged_attention else {}
    assert_matches_dense(kernel, make_case(**batch), **more)


@pytest.mark.parametrize("dtype,rtol", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_reference_in_half_precision(dtype: torch.dtype, rtol: float) -> None:
    """Softmax in float32; only the output is rounded (and the cache, which holds the same rounded tokens)."""
    case = make_case(MIXED, dtype=dtype)
    out = case.call(dispatch.paged_attention)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense_attention(case), rtol=rtol, atol=rtol / 4)


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"slot_mapping": torch.tensor([0, 1, 2, 999, 4])}, r"slot_mapping\[3\] is 999; allowed are -1"),
    ({"slot_mapping": torch.tensor([0, -2, 2, 3, 4])}, r"slot_mapping\[1\] is -2"),
    ({"query_start": torch.tensor([0, 4, 3], dtype=torch.int32)}, r"query_start\[2\] is 3"),
    ({"query_start": torch.tensor([1, 4, 5], dtype=torch.int32)}, r"query_start\[0\] is 1"),
    ({"query_start": torch.tensor([0, 4, 6], dtype=torch.int32)}, r"query_start\[2\] is 6"),
    ({"seq_lens": torch.tensor([3, 9], dtype=torch.int32)}, r"seq_lens\[0\] is 3 with 4 query rows"),
    ({"seq_lens": torch.tensor([20, 900], dtype=torch.int32)}, r"seq_lens\[1\] is 900"),
    ({"block_tables": torch.tensor([[1, 77, 0], [2, 0, 0]], dtype=torch.int32)}, r"block_tables\[0\] is \[1, 77, 0\]"),
    ({"block_tables": torch.tensor([[1, 2, 0], [-1, 0, 0]], dtype=torch.int32)}, r"block_tables\[1\]"),
]


@needs_c_kernel
@pytest.mark.parametrize("change,message", BAD_ARGUMENTS, ids=[m for _, m in BAD_ARGUMENTS])
def test_bad_metadata_is_refused_before_anything_is_written(change: dict[str, Any], message: str) -> None:
    case = make_case([(4, 20), (1, 9)])
    cache = case.tensors["k_cache"].clone()
    with pytest.raises(ValueError, match=message):
        cpu.paged_attention(**(case.tensors | change), **case.options)
    torch.testing.assert_close(case.tensors["k_cache"], cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "change,message",
    [
        ({"q": torch.zeros(5, 3, 16)}, "3 query heads over 2"),
        ({"k": torch.zeros(5, 2, 8)}, r"k has shape \(5, 2, 8\), expected \(5, 2, 16\)"),
        ({"q": torch.zeros(5, 16, 4).transpose(1, 2)}, "last dimension must be contiguous"),
        ({"seq_lens": torch.tensor([20, 9])}, "seq_lens is torch.int64, expected torch.int32"),
        ({"block_tables": torch.zeros(3, 2, dtype=torch.int32)}, "block_tables has shape"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit(kernel: Any, change: dict[str, Any], message: str) -> None:
    case = make_case([(4, 20), (1, 9)])
    with pytest.raises(ValueError, match=message):
        kernel(**(case.tensors | change), **case.options)


def test_bad_options() -> None:
    case = make_case([(1, 4)])
    with pytest.raises(ValueError, match="window=-1"):
        reference.paged_attention(**case.tensors, **(case.options | {"window": -1}))
    with pytest.raises(ValueError, match="sinks is torch.float64"):
        reference.paged_attention(**case.tensors, **(case.options | {"sinks": torch.zeros(4, dtype=torch.float64)}))


@needs_c_kernel
def test_the_c_kernel_refuses_other_dtypes() -> None:
    with pytest.raises(NotImplementedError, match="takes float32 on the CPU, .*; q is torch.bfloat16"):
        make_case([(1, 4)], dtype=torch.bfloat16).call(cpu.paged_attention)


@needs_c_kernel
def test_concurrent_calls() -> None:
    """ctypes releases the GIL: calls of several threads run at once, each with its own scratch memory."""
    cases = [make_case(MIXED, dim=dim, heads=heads, seed=dim) for dim, heads in ((64, 4), (24, 6), (128, 2))]
    expected = [dense_attention(case) for case in cases]
    errors: list[str] = []

    def work(case: Case, answer: torch.Tensor) -> None:
        for _ in range(15):
            try:
                torch.testing.assert_close(case.call(cpu.paged_attention, num_threads=2).double(), answer, **TOLERANCE)
            except AssertionError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@needs_c_kernel
def test_no_second_openmp_runtime() -> None:
    cpu.is_available()
    facts = cpu.describe()
    if facts["openmp"] in (None, "compiler default"):
        pytest.skip(f"built without a shared OpenMP runtime: openmp={facts['openmp']}, {facts['note']}")
    assert [path for path in facts["openmp_runtimes_loaded"] if "/torch" in path] == [facts["openmp"]]
    assert facts["openmp_threads"] >= 1


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache directory and no library loaded; the usual one is loaded again afterwards."""
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_load", cpu.functools.cache(cpu._load.__wrapped__))
    monkeypatch.setattr(dispatch, "_warn_once", dispatch.functools.cache(dispatch._warn_once.__wrapped__))
    return tmp_path


def test_missing_compiler(fresh_build: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One warning that names the cause, and the reference's answer."""
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert not cpu.is_available()
    assert "CC='/nowhere/cc' was not found" in cpu.is_available().reason
    case = make_case([(1, 9)])
    with pytest.raises(RuntimeError, match="not available: the C compiler"):
        case.clone().call(cpu.paged_attention)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out = case.clone().call(dispatch.paged_attention)
            torch.testing.assert_close(out.double(), dense_attention(case), **TOLERANCE)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "slow torch reference" in caplog.text and "/nowhere/cc" in caplog.text
    assert cpu.describe() == {"available": False, "reason": cpu.is_available().reason}


def test_no_compiler_on_the_path(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh_build))
    assert "no C compiler found (looked for cc, gcc, clang" in cpu.is_available().reason


@needs_c_kernel
def test_failing_compilation(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh_build / "broken.c"
    broken.write_text("int f( { return 1; }\n")
    monkeypatch.setattr(cpu, "_SOURCE", broken)
    assert "failed with exit status" in cpu.is_available().reason and "broken.c" in cpu.is_available().reason
    assert not list((fresh_build / "kernels").glob("*"))  # no partial files


@needs_c_kernel
def test_unwritable_cache(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh_build / "file").write_text("")
    monkeypatch.setenv("CAMSHAFT_CACHE", str(fresh_build / "file"))
    assert "set CAMSHAFT_CACHE to a writable directory" in cpu.is_available().reason


@needs_c_kernel
def test_compiler_without_openmp_and_native(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that knows neither flag still builds the kernel; the note says what failed."""
    wrapper = fresh_build / "plain-cc"
    refuse = 'case "$*" in *native*|*-fopenmp*) echo "no such flag" >&2; exit 1;; esac'
    wrapper.write_text(f'#!/bin/sh\n{refuse}\nexec cc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    facts = cpu.describe()
    assert facts["available"] and facts["openmp"] is None and facts["openmp_threads"] == 0
    assert "no such flag" in facts["note"]
    assert_matches_dense(cpu.paged_attention, make_case(MIXED))


@needs_c_kernel
def test_the_library_is_compiled_once(fresh_build: Path) -> None:
    source = Path(cpu.__file__).with_name("cpu.c")
    first = native.build_library(source)
    changed = first.path.stat().st_mtime_ns
    assert native.build_library(source).path == first.path
    assert first.path.stat().st_mtime_ns == changed
    assert [p.name for p in (fresh_build / "kernels").iterdir()] == [first.path.name]


def test_describe_names_every_kernel() -> None:
    facts = dispatch.describe()
    assert set(facts) == {"cpu float32", "other", "cuda"}
    assert facts["cuda"]["available"] or facts["cuda"]["reason"]


def test_batch_invariance_is_refused_on_the_cpu() -> None:
    case = make_case([(1, 5)])
    with pytest.raises(ValueError, match="batch-invariant attention runs on CUDA; q is on cpu"):
        case.call(dispatch.paged_attention, batch_invariant=True)


def test_attention_state_keeps_its_counters_and_forgets_a_step() -> None:
    state = AttentionState()
    device = torch.device("cpu")
    counters = state.counters(10, device)
    assert counters is state.counters(100, device) and not counters.any()
    more = state.counters(counters.shape[0] + 1, device)
    assert more.shape[0] > counters.shape[0] and not more.any()
    state.tiles[2, 32] = torch.zeros(1)
    state.begin_step()
    assert not state.tiles
