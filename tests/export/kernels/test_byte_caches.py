"""The C attention kernel over caches of int8 and float8_e4m3fn against the torch reference."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from camshaft.export.kernels import cpu, dispatch, reference
from camshaft.graph.quant_ops import saturate
from paged_attention_cases import Case, make_case
from torch import Tensor

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler here: the C kernel cannot be built"
)
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in cpu.CACHE_DTYPES[1:]]
MIXED = [(1, 37), (5, 5), (0, 0), (130, 200), (1, 1), (17, 90), (1, 64), (64, 128)]
DECODE = [(1, n) for n in (1, 2, 15, 16, 17, 63, 64, 65, 150)]
SCALE = 40.0
"""Of keys and values, so that integers keep some of their digits."""


def byte_case(dtype: torch.dtype, lengths: list[tuple[int, int]], **options: Any) -> Case:
    """A case whose keys and values are SCALE times as large and whose caches hold them in `dtype`."""
    case = make_case(lengths, **options)
    for name in ("k", "v"):
        case.tensors[name] = case.tensors[name] * SCALE
        case.tensors[f"{name}_cache"] = saturate(case.tensors[f"{name}_cache"].nan_to_num() * SCALE, dtype)
    case.options["scale"] /= SCALE
    return case


def assert_matches_reference(case: Case, **more: Any) -> None:
    """The same bytes in the caches, and outputs that differ by the rounding of float32 sums alone."""
    other = case.clone()
    expected, got = other.call(reference.paged_attention), case.call(cpu.paged_attention, **more)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * SCALE)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(case.tensors[name].view(torch.uint8), other.tensors[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 8, 64, 80, 128])
@pytest.mark.parametrize("lengths", [MIXED, DECODE], ids=["mixed", "decode"])
def test_head_sizes(dtype: torch.dtype, dim: int, lengths: list[tuple[int, int]]) -> None:
    assert_matches_reference(byte_case(dtype, lengths, dim=dim, heads=6, kv_heads=2))


OPTIONS: list[dict[str, Any]] = [
    {"heads": 16, "kv_heads": 1},
    {"dim": 10, "value_dim": 33},
    {"dim": 192, "value_dim": 128, "heads": 2, "kv_heads": 2},
    {"window": 20, "softcap": 3.0, "sinks": True, "alibi": True, "block_size": 7},
    {"padding": 3, "fused_qkv": True, "value_dim": 24},
    {"head_major": True, "block_size": 64},
    {"trees": True},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options(dtype: torch.dtype, options: dict[str, Any]) -> None:
    lengths = [(9, 90), (64, 200), (1, 37), (5, 5)] if "trees" in options else MIXED
    assert_matches_reference(byte_case(dtype, lengths, **options), num_threads=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_shared_by_sequences_and_slots_that_write_nothing(dtype: torch.dtype) -> None:
    case = byte_case(dtype, [(1, 40), (5, 37), (8, 60)], shared_blocks=2)
    assert_matches_reference(case)
    case.tensors["slot_mapping"].fill_(-1)
    case.tensors["k"].zero_()
    assert_matches_reference(case)


def hard_values() -> Tensor:
    """float32 [1, 1, N]: all of float8_e4m3fn, halfway points between neighbours and integers, what is out of range, and NaN."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    beside = torch.cat([halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))])
    more = torch.tensor(
        [0.5, 1.5, 2.5, 126.5, 127.5, 128.0, 463.9, 464.0, 480.0, 1e30, float("inf"), 1e-30, 2.0**-10, 3 * 2.0**-10]
    )
    sizes = torch.cat([codes, halves, beside, more, torch.randn(501, generator=torch.Generator().manual_seed(3)) * 50])
    return torch.cat([sizes, -sizes, torch.tensor([float("nan")])]).view(1, 1, -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_stored_and_read_as_the_reference_does(dtype: torch.dtype) -> None:
    """With one key in sight, which a query of zeros scores, attention returns the value as it is stored."""
    values = hard_values()
    cache = torch.zeros(2, 4, 1, values.shape[-1]).to(dtype)
    case = Case(
        {
            "q": torch.zeros(1, 1, 5), "k": torch.zeros(1, 1, 5), "v": values, "k_cache": torch.zeros(2, 4, 1, 5).to(dtype),
            "v_cache": cache, "slot_mapping": torch.tensor([4]), "block_tables": torch.tensor([[1]], dtype=torch.int32),
            "query_start": torch.tensor([0, 1], dtype=torch.int32), "seq_lens": torch.tensor([1], dtype=torch.int32),
        },
        {"scale": 1.0, "max_query_len": 1, "max_seq_len": 1},
    )  # fmt: skip
    got = case.call(cpu.paged_attention)
    stored = saturate(values, dtype)
    assert torch.equal(case.tensors["v_cache"][1, 0].view(torch.uint8), stored[0].view(torch.uint8))
    torch.testing.assert_close(got, stored.float(), rtol=0, atol=0, equal_nan=True)


def test_dispatch_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    kernel = cpu.paged_attention
    monkeypatch.setattr(
        cpu, "paged_attention", lambda *args, **more: calls.append(args[3].dtype) or kernel(*args, **more)
    )
    for dtype in cpu.CACHE_DTYPES[1:]:
        case = byte_case(dtype, [(3, 9)])
        case.call(dispatch.paged_attention)
    assert calls == list(cpu.CACHE_DTYPES[1:])


def test_other_caches_are_refused() -> None:
    case = make_case([(1, 4)])
    for name in ("k_cache", "v_cache"):
        case.tensors[name] = case.tensors[name].to(torch.bfloat16)
    with pytest.raises(
        NotImplementedError,
        match=r"caches in torch.float32, torch.int8, torch.float8_e4m3fn; .* cache is torch.bfloat16",
    ):
        case.call(cpu.paged_attention)
    case = byte_case(torch.int8, [(1, 4)])
    case.tensors["v_cache"] = case.tensors["v_cache"].float()
    with pytest.raises(ValueError, match="v_cache is torch.float32, expected torch.int8"):
        case.call(cpu.paged_attention)
