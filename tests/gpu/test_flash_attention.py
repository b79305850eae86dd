"""Prompts without cached tokens through FlashAttention, beside our kernels for everything else of the step.

Where the package is missing, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1), a dense attention stands in for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_attention_cases import Case, dense_attention, make_case
from torch import Tensor
from triton_cases import DEVICE, HALF, INTERPRET, TOLERANCE, needs_cuda_graphs, require_triton

require_triton()

from camshaft.export.kernels import flash, triton  # noqa: E402
from camshaft.export.kernels.rope import Rope  # noqa: E402
from camshaft.export.kernels.state import AttentionState  # noqa: E402

pytestmark = pytest.mark.gpu
MIXED = [(1, 37), (150, 150), (0, 0), (30, 70), (1, 1), (33, 33), (17, 17), (2, 2), (1, 90), (200, 200)]


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, seqused_q: Tensor, seqused_k: Tensor, softmax_scale: float,
    window_size_left: int | None, out: Tensor, **more: Any,
) -> None:  # fmt: skip
    """The package's function, sequence by sequence."""
    assert more["causal"] and torch.equal(seqused_q, seqused_k) and seqused_q.dtype == torch.int32
    group = q.shape[1] // k.shape[1]
    for start, rows in zip(cu_seqlens_q.tolist(), seqused_q.tolist()):
        part = slice(start, start + rows)
        keys, values = (x[part].float().repeat_interleave(group, 1) for x in (k, v))
        distance = torch.arange(rows)[:, None] - torch.arange(rows)[None]
        hidden = distance < 0
        if window_size_left is not None:
            hidden = hidden | (distance > window_size_left)
        scores = torch.einsum("qhd,khd->hqk", q[part].float(), keys) * softmax_scale
        weights = scores.masked_fill(hidden.to(scores.device), float("-inf")).softmax(-1)
        out[part] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)


@pytest.fixture(autouse=True, params=["stand-in", "package"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stand-in":
        monkeypatch.setattr(flash, "forward", lambda: stand_in)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    elif INTERPRET or flash.forward() is None:
        pytest.skip("FlashAttention is not installed here (pip install 'camshaft[flash-attention]')")
    return str(request.param)


def run(case: Case, **more: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRET:  # the check asks for a CUDA tensor
            patch.setattr(flash, "why_not_flash", lambda *args, **options: "")
        return case.call(triton.paged_attention, fresh="flash", **more)


def check(case: Case, **more: Any) -> None:
    """Results equal the dense attention's, and rows of padding are zero."""
    out = run(case, **more).cpu().double()
    tolerance = TOLERANCE[case.tensors["q"].dtype]
    torch.testing.assert_close(out, dense_attention(case), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (8, 2)])
def test_head_sizes(dim: int, heads: int, kv_heads: int) -> None:
    check(make_case(MIXED, heads=heads, kv_heads=kv_heads, dim=dim, dtype=HALF, device=DEVICE, padding=3))


@pytest.mark.parametrize(
    "options",
    [{"window": 20}, {"window": 1}, {"fused_qkv": True, "padding": 5}, {"head_major": True, "block_size": 32}],
)
def test_options(options: dict[str, Any]) -> None:
    check(make_case(MIXED, **({"dim": 64} | options), dtype=HALF, device=DEVICE))


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["half", "fp8"])
def test_rope(cache_dtype: torch.dtype | None) -> None:
    """It gets turned queries and keys of the step; the cache is written as ever."""
    case = make_case(MIXED, dim=64, dtype=HALF, device=DEVICE, padding=2, fused_qkv=True, cache_dtype=cache_dtype)
    rows = case.tensors["q"].shape[0]
    half = torch.randint(0, 4, (rows, 32), generator=torch.Generator().manual_seed(3)) * (torch.pi / 2)
    whole = torch.cat((half, half), dim=1)  # quarter turns: exact in every dtype
    rope = Rope(*(part.round().to(HALF).to(DEVICE) for part in (whole.cos(), whole.sin())), interleaved=False)
    turned = Case(case.tensors | {"q": rope.turn(case.tensors["q"]), "k": rope.turn(case.tensors["k"])}, case.options)
    paged = turned.clone().call(triton.paged_attention, fresh="paged")
    own = case.clone()
    found = run(own, rope=rope)
    wide = 0.1 if cache_dtype is not None else TOLERANCE[HALF]  # the cache's keys are rounded, the step's are not
    torch.testing.assert_close(found, paged, rtol=wide, atol=wide)
    turned.call(triton.paged_attention, fresh="paged")
    for name in ("k_cache", "v_cache"):
        assert torch.equal(own.tensors[name].view(torch.uint8), turned.tensors[name].view(torch.uint8))


def test_layers_share_the_lengths() -> None:
    case, state = make_case(MIXED, dim=64, dtype=HALF, device=DEVICE), AttentionState()
    run(case.clone(), state=state)
    lens = state.fresh_lens
    assert lens is not None and lens.tolist() == [0, 150, 0, 0, 0, 33, 17, 2, 0, 200]
    run(case.clone(), state=state)
    assert state.fresh_lens is lens
    state.begin_step()
    assert state.fresh_lens is None


@needs_cuda_graphs
def test_replayed_with_other_sequences(package: str) -> None:
    if package == "stand-in":
        pytest.skip("it reads lengths back")
    first = make_case([(1, 9), (140, 140), (60, 60), (20, 50)], dim=128, dtype=HALF, device=DEVICE, padding=29)
    second = make_case([(1, 9), (60, 60), (140, 140), (20, 50)], dim=128, dtype=HALF, device=DEVICE, padding=29, seed=1)
    first.options |= {"max_query_len": 250, "max_seq_len": 250}  # bounds, as captured steps have them
    for _ in range(2):
        run(first.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(first)
    for case in (first.clone(), second):
        for name, value in case.tensors.items():
            first.tensors[name].copy_(value)
        graph.replay()
        expected = dense_attention(case)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1.6e-2, atol=1.6e-2)
