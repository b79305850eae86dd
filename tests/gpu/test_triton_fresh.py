"""Prefill of sequences without cached tokens from the step's own keys and values: against a dense attention in float64.

Without a GPU: `TRITON_INTERPRET=1 pytest tests/gpu/test_triton_fresh.py` runs them on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_attention_cases import Case, dense_attention, make_case
from triton_cases import DEVICE, HALF, TOLERANCE, needs_cuda_graphs, require_triton

require_triton()

from camshaft.export.kernels import triton  # noqa: E402
from camshaft.export.kernels.rope import Rope  # noqa: E402
from camshaft.export.kernels.state import AttentionState  # noqa: E402
from camshaft.export.kernels.triton import attention  # noqa: E402
from camshaft.export.kernels.triton.prefill_config import FreshConfig, fresh_config, why_not_fresh  # noqa: E402
from camshaft.export.kernels.triton.write import ALL, CONTINUING, FRESH  # noqa: E402

pytestmark = pytest.mark.gpu
TILES = FreshConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)
MIXED = [(1, 37), (70, 70), (0, 0), (30, 70), (1, 1), (33, 33), (17, 17), (2, 2), (1, 90), (100, 100)]


def check(case: Case, tiles: FreshConfig = TILES, **more: Any) -> None:
    """Results equal the dense attention's, rows of padding are zero, and the kernel for fresh sequences ran."""
    state = AttentionState()
    out = case.call(triton.paged_attention, fresh=tiles, state=state, **more).cpu().double()
    dtype = case.tensors["q"].dtype
    torch.testing.assert_close(out, dense_attention(case), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert {kind for kind, _, _ in state.tiles} == {FRESH, CONTINUING}


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_head_sizes(dim: int) -> None:
    check(make_case(MIXED, dim=dim, dtype=HALF, device=DEVICE, padding=3))


@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (8, 2), (14, 2), (16, 1)])
def test_grouped_queries(heads: int, kv_heads: int) -> None:
    check(make_case(MIXED, heads=heads, kv_heads=kv_heads, dim=32, dtype=HALF, device=DEVICE))


OPTIONS: list[dict[str, Any]] = [
    {"dim": 64, "value_dim": 32},
    {"window": 1},
    {"window": 20},
    {"window": 64},
    {"window": 75},
    {"softcap": 2.0},
    {"sinks": True},
    {"alibi": True},
    {"sinks": True, "window": 40, "alibi": True, "softcap": 3.0},
    {"fused_qkv": True, "padding": 5},
    {"head_major": True, "block_size": 32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options(options: dict[str, Any]) -> None:
    check(make_case(MIXED, **({"dim": 32} | options), dtype=HALF, device=DEVICE))


@pytest.mark.parametrize("block_m,block_n", [(64, 64), (128, 64), (128, 128), (16, 16)])
def test_tile_sizes(block_m: int, block_n: int) -> None:
    tiles = FreshConfig(block_m=block_m, block_n=block_n, num_warps=8 if block_m > 64 else 4, num_stages=2)
    check(make_case([*MIXED, (200, 200)], dim=32, dtype=HALF, device=DEVICE), tiles)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["half", "fp8"])
def test_rope(cache_dtype: torch.dtype | None) -> None:
    """Turned keys are read from a copy of the step's rows, and written to the cache as ever."""
    case = make_case(MIXED, dim=64, dtype=HALF, device=DEVICE, padding=2, fused_qkv=True, cache_dtype=cache_dtype)
    rows = case.tensors["q"].shape[0]
    half = torch.randint(0, 4, (rows, 32), generator=torch.Generator().manual_seed(3)) * (torch.pi / 2)
    whole = torch.cat((half, half), dim=1)  # quarter turns: exact in every dtype
    rope = Rope(*(part.round().to(HALF).to(DEVICE) for part in (whole.cos(), whole.sin())), interleaved=False)
    turned = Case(case.tensors | {"q": rope.turn(case.tensors["q"]), "k": rope.turn(case.tensors["k"])}, case.options)
    expected = turned.clone().call(triton.paged_attention, fresh=TILES)
    paged = turned.clone().call(triton.paged_attention, fresh="paged")
    torch.testing.assert_close(expected, paged, rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])
    own = case.clone()
    torch.testing.assert_close(own.call(triton.paged_attention, rope=rope, fresh=TILES), expected, rtol=0, atol=0)
    turned.call(triton.paged_attention, fresh="paged")
    for name in ("k_cache", "v_cache"):
        assert torch.equal(own.tensors[name].view(torch.uint8), turned.tensors[name].view(torch.uint8))


def test_a_nan_stays_in_its_sequence() -> None:
    case = make_case([(40, 40), (37, 37), (45, 90)], dim=32, dtype=HALF, device=DEVICE)
    before = case.clone().call(triton.paged_attention, fresh=TILES)
    for name in ("k", "v"):
        case.tensors[name][40:77] = float("nan")
    after = case.call(triton.paged_attention, fresh=TILES)
    assert torch.equal(after[:40], before[:40]) and torch.equal(after[77:], before[77:])
    assert after[40:77].isnan().all()


def test_rows_that_are_not_cached() -> None:
    """Slots of -1 write nothing, and fresh sequences do not need the cache."""
    case = make_case([(40, 40), (37, 37)], dim=32, dtype=HALF, device=DEVICE)
    case.tensors["slot_mapping"] = torch.full_like(case.tensors["slot_mapping"], -1)
    rows = case.tensors["q"].shape[0]
    still = torch.ones(rows, 32, dtype=HALF, device=DEVICE), torch.zeros(rows, 32, dtype=HALF, device=DEVICE)
    check(case, rope=Rope(*still, interleaved=False))
    assert case.tensors["k_cache"].isnan().all()


def test_layers_share_their_tiles_and_invariant_steps_read_the_cache() -> None:
    state = AttentionState()
    for seed in range(2):
        case = make_case(MIXED, dim=32, dtype=HALF, device=DEVICE, seed=seed)
        out = case.call(triton.paged_attention, fresh=TILES, state=state).cpu().double()
        torch.testing.assert_close(out, dense_attention(case), rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])
    assert len(state.tiles) == 2
    state.begin_step()
    case.call(triton.paged_attention, fresh=TILES, state=state, batch_invariant=True)
    assert {kind for kind, _, _ in state.tiles} == {ALL}


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "fresh_config", lambda *_: TILES)
    state = AttentionState()
    make_case([(40, 40)], dim=32, dtype=HALF, device=DEVICE).call(triton.paged_attention, state=state)
    assert {kind for kind, _, _ in state.tiles} == {FRESH, CONTINUING}
    state.begin_step()
    make_case([(5, 5)], dim=32, dtype=HALF, device=DEVICE).call(triton.paged_attention, state=state)
    assert {kind for kind, _, _ in state.tiles} == {ALL}  # few rows: one launch


def test_what_it_cannot_read() -> None:
    def why(**options: Any) -> str:
        tensors = make_case([(40, 40)], **({"dim": 32, "dtype": HALF} | options), device=DEVICE).tensors
        assert fresh_config(tensors["q"], tensors["k"], tensors["v"], None) is None
        return why_not_fresh(tensors["q"], tensors["k"], tensors["v"], None)

    assert why() == ""
    assert "dtypes" in why(dtype=torch.float32)
    assert "powers of two" in why(dim=80)
    assert "powers of two" in why(dim=512)
    tensors = make_case([(40, 40)], dim=32, dtype=HALF, device=DEVICE).tensors
    odd = torch.zeros(40, 2 * 32 + 4, dtype=HALF, device=DEVICE)[:, 4:].unflatten(1, (2, 32))
    assert "v has strides" in why_not_fresh(tensors["q"], tensors["k"], odd, None)
    with pytest.raises(ValueError, match="powers of two"):
        make_case([(40, 40)], dim=80, dtype=HALF, device=DEVICE).call(triton.paged_attention, fresh=TILES)
    with pytest.raises(ValueError, match="too many"):
        case = make_case([(40, 40)], heads=71, kv_heads=1, dim=32, dtype=HALF, device=DEVICE)
        case.call(triton.paged_attention, fresh=TILES)


@needs_cuda_graphs
def test_captured_in_a_cuda_graph() -> None:
    """Captured with one batch, replayed with other lengths, some of them no longer fresh."""
    captured = make_case([(100, 100), (60, 60), (1, 90), (30, 30)], dim=64, dtype=HALF, device=DEVICE, seed=1)
    other = make_case([(40, 40), (80, 110), (1, 30), (70, 70)], dim=64, dtype=HALF, device=DEVICE, seed=2)
    bounds = {"max_query_len": 191, "max_seq_len": 191}
    captured.options |= bounds
    captured.clone().call(triton.paged_attention, fresh=TILES)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.call(triton.paged_attention, fresh=TILES)
    for name, tensor in other.tensors.items():
        static = captured.tensors[name]
        part = static[:, : tensor.shape[1]] if name == "block_tables" else static[: tensor.shape[0]]
        part.copy_(tensor[: part.shape[0], : part.shape[1]] if name == "block_tables" else tensor[: part.shape[0]])
    graph.replay()
    expected = dense_attention(other)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])
