"""The Triton attention kernels with rope: against the reference, which turns queries and keys and then attends.

Without a GPU: `TRITON_INTERPRET=1 pytest tests/gpu/test_triton_rope.py` runs them on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_attention_cases import Case, make_case
from triton_cases import (
    DEVICE,
    HALF,
    INTERPRET,
    TOLERANCE,
    check_against_reference,
    needs_cuda_graphs,
    needs_dispatch,
    require_triton,
)

require_triton()

from camshaft.export.kernels import dispatch, reference, triton  # noqa: E402
from camshaft.export.kernels.rope import Rope  # noqa: E402
from camshaft.export.kernels.state import AttentionState  # noqa: E402
from camshaft.export.kernels.triton.configs import DecodeConfig  # noqa: E402

pytestmark = pytest.mark.gpu
MIXED = [(1, 37), (5, 5), (0, 0), (30, 70), (1, 1), (17, 90)]
DECODE = [(1, n) for n in (1, 2, 16, 17, 65)]
SPLIT = [(1, 1500), (0, 0), (1, 700)]


def angles(case: Case, rotated: int, dtype: torch.dtype, *, interleaved: bool = False) -> Rope:
    """Random angles of every row, in the middle of a wider buffer."""
    rng = torch.Generator().manual_seed(5)
    half = torch.rand(case.tensors["q"].shape[0], rotated // 2, generator=rng) * 6.3
    whole = half.repeat_interleave(2, dim=1) if interleaved else torch.cat((half, half), dim=1)
    wide = torch.nn.functional.pad(torch.stack((whole.cos(), whole.sin())).to(dtype), (0, 8)).to(DEVICE)
    return Rope(wide[0, :, :rotated], wide[1, :, :rotated], interleaved)


@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dim,rotated", [(64, 64), (64, 16), (80, 20), (128, 128), (10, 4)])
def test_whole_and_partial(lengths: list[tuple[int, int]], interleaved: bool, dim: int, rotated: int) -> None:
    case = make_case(lengths, dim=dim, dtype=HALF, device=DEVICE, padding=2)
    check_against_reference(case, rope=angles(case, rotated, HALF, interleaved=interleaved))


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["half", "fp8"])
@pytest.mark.parametrize("dim,rotated", [(64, 64), (80, 20)])
def test_transposed_decode(dim: int, rotated: int, cache_dtype: torch.dtype | None) -> None:
    """Keys as the rows of the products: against the other kernel, which the rest of these tests check."""
    config = DecodeConfig(block_n=32, num_warps=1, num_stages=3, transposed=True)
    case = make_case(DECODE, dim=dim, dtype=HALF, cache_dtype=cache_dtype, device=DEVICE, padding=2)
    rope = angles(case, rotated, HALF)
    expected = case.clone().call(triton.paged_attention, rope=rope)
    out = case.call(triton.paged_attention, rope=rope, decode=config)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])


OPTIONS: list[dict[str, Any]] = [
    {"fused_qkv": True, "padding": 3, "value_dim": 24},
    {"window": 20, "sinks": True, "softcap": 3.0},
    {"heads": 14, "block_size": 32},
    {"head_major": True},
]


@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options(options: dict[str, Any], dtype: torch.dtype, angle_dtype: torch.dtype) -> None:
    for lengths in (MIXED, DECODE):
        case = make_case(lengths, dim=32, dtype=dtype, device=DEVICE, **options)
        check_against_reference(case, rope=angles(case, 32, angle_dtype))


@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
def test_fp8_cache(lengths: list[tuple[int, int]]) -> None:
    """Keys are turned, then saturated and rounded to fp8; attention reads them back."""
    case = make_case(lengths, dim=64, dtype=HALF, cache_dtype=torch.float8_e4m3fn, device=DEVICE, padding=2)
    rope = angles(case, 64, HALF)
    if INTERPRET:  # which does not round to the nearest fp8 number: quarter turns need no rounding
        rope = Rope(rope.cos.round(), torch.where(rope.cos.round() == 0, 1.0, 0.0).to(HALF), rope.interleaved)
    case.tensors["k"][0, 0] = 5000.0
    check_against_reference(case, rope=rope)
    slot = int(case.tensors["slot_mapping"][0])
    assert case.tensors["k_cache"][slot // 16, slot % 16, 0].float().abs().max() == 448


def test_split_keys() -> None:
    case = make_case(SPLIT, dim=32, dtype=torch.float32, device=DEVICE)
    check_against_reference(case, rope=angles(case, 32, torch.float32))


@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
def test_batch_invariant(lengths: list[tuple[int, int]]) -> None:
    case = make_case(lengths, dim=64, dtype=HALF, device=DEVICE, padding=1)
    check_against_reference(case, rope=angles(case, 64, HALF), batch_invariant=True)


def test_layers_of_a_step_share_the_state() -> None:
    state = AttentionState()
    for seed in range(2):
        case = make_case(MIXED, dim=32, device=DEVICE, seed=seed)
        check_against_reference(case, rope=angles(case, 32, torch.float32), state=state)


def test_queries_stay_as_they_are() -> None:
    for lengths in (MIXED, DECODE):
        case = make_case(lengths, dim=32, device=DEVICE)
        before = case.tensors["q"].clone()
        case.call(triton.paged_attention, rope=angles(case, 32, torch.float32))
        assert torch.equal(case.tensors["q"], before)


@needs_dispatch
def test_dispatch() -> None:
    case = make_case(MIXED, dim=64, dtype=HALF, device=DEVICE)
    rope = angles(case, 64, HALF)
    other = case.clone()
    assert torch.equal(case.call(dispatch.paged_attention, rope=rope), other.call(triton.paged_attention, rope=rope))


@needs_cuda_graphs
@pytest.mark.parametrize("lengths", [MIXED, SPLIT], ids=["mixed", "decode"])
def test_captured_in_a_cuda_graph(lengths: list[tuple[int, int]]) -> None:
    """Captured once, replayed with other queries, keys and angles of the same sizes."""
    case = make_case(lengths, dim=64, dtype=HALF, device=DEVICE, seed=1)
    rope = angles(case, 64, HALF)
    case.clone().call(triton.paged_attention, rope=rope)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.call(triton.paged_attention, rope=rope)
    for name in ("q", "k"):
        case.tensors[name].copy_(case.tensors[name].flip(-1))
    rope.cos.copy_(rope.cos.flip(0))
    rope.sin.copy_(rope.sin.flip(0))
    expected = case.clone().call(reference.paged_attention, rope=rope)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])
