"""Token trees in the Triton attention kernels: against the reference, in steps that mix trees, texts and decodes.

Without a GPU: `TRITON_INTERPRET=1 pytest tests/gpu/test_triton_tree.py` runs them on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_attention_cases import make_case
from triton_cases import DEVICE, HALF, TOLERANCE, check_against_reference, needs_cuda_graphs, require_triton

require_triton()

from camshaft.export.kernels import reference, triton  # noqa: E402
from camshaft.export.kernels.rope import Rope  # noqa: E402

pytestmark = pytest.mark.gpu
TREES = [(1, 37), (9, 90), (5, 5), (64, 130), (1, 1), (80, 80), (5, 21)]
FEW = [(6, 70), (1, 40), (4, 19)]


OPTIONS: list[dict[str, Any]] = [
    {"heads": 6, "kv_heads": 2, "dim": 24},
    {"window": 1},
    {"window": 5, "block_size": 4, "padding": 3},
    {"softcap": 2.0, "sinks": True},
    {"alibi": True, "window": 9, "block_size": 32},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options(options: dict[str, Any]) -> None:
    check_against_reference(make_case(TREES, trees=True, device=DEVICE, **options))


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["half", "fp8"])
@pytest.mark.parametrize("dim", [64, 128])
def test_half(dim: int, cache_dtype: torch.dtype | None) -> None:
    case = make_case(FEW, trees=True, heads=8, dim=dim, dtype=HALF, cache_dtype=cache_dtype, device=DEVICE, padding=2)
    check_against_reference(case)


def test_rope_is_applied_first() -> None:
    case = make_case(FEW, trees=True, dim=32, device=DEVICE)
    angle = torch.rand(case.tensors["q"].shape[0], 16, device=DEVICE).repeat(1, 2)
    check_against_reference(case, rope=Rope(angle.cos(), angle.sin(), False))


def test_batch_invariant() -> None:
    case = make_case(TREES, trees=True, window=20, device=DEVICE)
    check_against_reference(case, batch_invariant=True)


def test_masks_of_zeros_are_texts() -> None:
    case = make_case(TREES, dim=32, device=DEVICE)
    plain = case.clone().call(triton.paged_attention)
    mask = torch.zeros(case.tensors["q"].shape[0], dtype=torch.int64, device=DEVICE)
    torch.testing.assert_close(case.call(triton.paged_attention, tree_mask=mask), plain, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [6, 3])
def test_slots_are_copied_all_at_once(dim: int) -> None:
    """Words of four bytes and of one; slots that are read and written."""
    caches = [torch.randn(20, 2, width, device=DEVICE).to(HALF) for width in (dim, 2 * dim, 1)]
    moves = torch.tensor([[5, 7, 8, 1], [4, 5, 7, 8]], device=DEVICE)
    expected = [cache.index_copy(0, moves[1], cache[moves[0]]) for cache in caches]
    triton.copy_slots(caches, triton.slot_table(caches), moves)
    assert all(torch.equal(cache, want) for cache, want in zip(caches, expected))


@needs_cuda_graphs
def test_captured_in_a_cuda_graph() -> None:
    """Captured once, replayed with other trees of the same sizes."""
    case = make_case(TREES, trees=True, dim=64, dtype=HALF, device=DEVICE, seed=1)
    case.clone().call(triton.paged_attention)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.call(triton.paged_attention)
    other = make_case(TREES, trees=True, dim=64, dtype=HALF, device=DEVICE, seed=2)
    case.tensors["tree_mask"].copy_(other.tensors["tree_mask"])
    expected = case.clone().call(reference.paged_attention)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[HALF], atol=TOLERANCE[HALF])
