"""The Triton attention kernels against a dense attention in float64.

On a GPU: `pytest -m "gpu and not slow" tests/gpu/test_triton_attention.py -s` (prints the largest error of every case);
`-m gpu` adds the rest of the grid, a minute or two more of compiling.
Without one, Triton's interpreter runs the same cases on the CPU: `TRITON_INTERPRET=1 pytest tests/gpu/...`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from paged_attention_cases import Case, dense_attention, make_case
from triton_cases import DEVICE, HALF, INTERPRET, TOLERANCE, needs_cuda_graphs, needs_dispatch, require_triton

require_triton()

from camshaft.export.kernels import dispatch, triton  # noqa: E402
from camshaft.export.kernels.state import AttentionState  # noqa: E402
from camshaft.export.kernels.triton.attention import num_processors  # noqa: E402
from camshaft.export.kernels.triton.configs import DecodeConfig, num_splits  # noqa: E402

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.float32] if INTERPRET else [torch.bfloat16, torch.float16, torch.float32]
MIXED = [(1, 37), (5, 5), (0, 0), (130, 200), (1, 1), (17, 90), (1, 64), (64, 128)]
DECODE = [(1, n) for n in (1, 2, 15, 16, 17, 63, 64, 65, 150)]
LONG = [(1, 1500), (0, 0), (1, 700)]  # few and long: the decode kernel splits the keys


def check(case: Case, dtype: torch.dtype, kernel: Any = None, score_scale: float = 1.0) -> None:
    """Output and cache after a call; prints the largest error."""
    before = case.tensors["k_cache"].clone()
    out = case.call(kernel or triton.paged_attention).cpu()
    assert out.dtype == dtype
    expected = dense_attention(case)
    error = (out.double() - expected).abs().max().item() if out.numel() else 0.0
    print(f"  {str(dtype):15} max error {error:.2e}", end="")
    tolerance = TOLERANCE[dtype] * score_scale
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    slots = case.tensors["slot_mapping"].cpu()
    kept, cache, block_size = slots >= 0, before.cpu().float(), before.shape[1]
    cache[slots[kept] // block_size, slots[kept] % block_size] = case.tensors["k"].cpu()[kept].float()
    torch.testing.assert_close(case.tensors["k_cache"].cpu().float(), cache, rtol=0, atol=0, equal_nan=True)


QUICK = [(dim, HALF) for dim in (16, 64, 80, 96, 128, 256)] + [(128, torch.float16), (64, torch.float32)]
REST = [(dim, dtype) for dim in (16, 64, 80, 96, 128, 256) for dtype in DTYPES if (dim, dtype) not in QUICK]


@pytest.mark.parametrize("dim,dtype", QUICK + [pytest.param(*pair, marks=pytest.mark.slow) for pair in REST], ids=str)
def test_head_sizes(dim: int, dtype: torch.dtype) -> None:
    for lengths in (MIXED, DECODE):
        check(make_case(lengths, dim=dim, dtype=dtype, device=DEVICE), dtype)


@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (14, 2), (71, 1)])
def test_grouped_queries(heads: int, kv_heads: int) -> None:
    for lengths in (MIXED, DECODE):
        case = make_case(lengths, heads=heads, kv_heads=kv_heads, dim=16, dtype=HALF, device=DEVICE)
        check(case, HALF)


OPTIONS: list[dict[str, Any]] = [
    {"dim": 192, "value_dim": 128},
    {"dim": 10, "value_dim": 33},
    {"window": 1},
    {"window": 50},
    {"softcap": 2.0, "score_scale": 4.0},
    {"sinks": True},
    {"alibi": True},
    {"sinks": True, "window": 20, "alibi": True, "softcap": 3.0},
    {"padding": 7},
    {"fused_qkv": True, "padding": 3, "value_dim": 24},
    {"block_size": 32},
    {"block_size": 64, "window": 70},
    {"head_major": True, "padding": 2},
    {"cache_dtype": torch.float8_e4m3fn, "dim": 64, "padding": 2},
    {"cache_dtype": torch.float8_e4m3fn, "sinks": True, "window": 20, "head_major": True},
    {"cache_dtype": torch.int8, "dim": 64, "padding": 2},
]


@pytest.mark.parametrize("dtype", [HALF, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    for lengths in (MIXED, DECODE):
        case = make_case(lengths, dtype=dtype, device=DEVICE, **options)
        check(case, dtype, score_scale=options.get("score_scale", 1.0))


@pytest.mark.parametrize("options", [{}, {"sinks": True, "window": 400, "alibi": True}], ids=str)
def test_split_decode(options: dict[str, Any]) -> None:
    processors = num_processors(torch.device(DEVICE))
    assert num_splits(DecodeConfig(block_n=64, num_warps=4, num_stages=1), 6, 1500, processors) > 1
    case = make_case(LONG, dim=32, dtype=torch.float32, device=DEVICE, **options)
    check(case, torch.float32)


@pytest.mark.parametrize("join", ["kernel", "last"])
@pytest.mark.parametrize("options", [{}, {"sinks": True, "window": 400, "alibi": True}, {"heads": 14}], ids=str)
def test_who_joins_the_splits(join: Any, options: dict[str, Any]) -> None:
    """Twice with one state: the counters are back at zero after a call. In a mixed step, too."""
    state = AttentionState()
    config = DecodeConfig(block_n=32, num_warps=4, num_stages=1, min_span=64, join=join, programs_per_processor=2)
    for lengths in (LONG, LONG, [*LONG, (3, 70)]):
        case = make_case(lengths, dim=32, dtype=torch.float32, device=DEVICE, **options)
        state.begin_step()
        check(case, torch.float32, lambda **arguments: triton.paged_attention(**arguments, state=state, decode=config))
    assert state._counters is None or not state._counters.any()


TRANSPOSED = DecodeConfig(block_n=32, num_warps=1, num_stages=3, transposed=True, min_span=64, programs_per_processor=2)
TRANSPOSED_OPTIONS: list[dict[str, Any]] = [
    *({"dim": dim} for dim in (64, 80, 128, 256)),
    {"dim": 192, "value_dim": 128},
    {"dim": 10, "value_dim": 33},
    {"window": 50},
    {"sinks": True, "window": 20, "alibi": True, "softcap": 3.0},
    {"softcap": 2.0, "score_scale": 4.0},
    {"heads": 14},
    {"heads": 8, "kv_heads": 8},
    {"heads": 71, "kv_heads": 1},
    {"block_size": 64, "window": 70},
    {"block_size": 8},
    {"head_major": True, "padding": 2},
    {"fused_qkv": True, "padding": 3, "value_dim": 24},
]


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["half", "fp8"])
@pytest.mark.parametrize("options", TRANSPOSED_OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_transposed_decode(options: dict[str, Any], cache_dtype: torch.dtype | None) -> None:
    """Decode with keys as rows: sequences with one row, split or not, alone and in a mixed step."""
    state, scale = AttentionState(), options.get("score_scale", 1.0)
    for lengths in ([(1, 1), (1, 32), (0, 0), (1, 33), (1, 230)], [(1, 49), (2, 20)]):
        case = make_case(lengths, dtype=HALF, cache_dtype=cache_dtype, device=DEVICE, **options)
        state.begin_step()
        check(
            case, HALF, lambda **given: triton.paged_attention(**given, state=state, decode=TRANSPOSED), scale
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_n,num_warps,block_size", [(16, 1, 16), (64, 2, 16), (32, 4, 128)])
def test_transposed_decode_of_other_blocks(block_n: int, num_warps: int, block_size: int, dtype: torch.dtype) -> None:
    """Steps of one KV block, of four, and smaller than a block; several warps; float32."""
    config = dataclasses.replace(TRANSPOSED, block_n=block_n, num_warps=num_warps)
    for cache_dtype in (dtype, torch.float8_e4m3fn):
        case = make_case(DECODE, dim=64, dtype=dtype, cache_dtype=cache_dtype, block_size=block_size, device=DEVICE)
        check(case, dtype, lambda **arguments: triton.paged_attention(**arguments, decode=config))


def test_layers_share_the_tiles_of_a_step() -> None:
    state = AttentionState()
    for seed in range(2):
        case = make_case(MIXED, device=DEVICE, seed=seed)
        check(case, torch.float32, lambda **arguments: triton.paged_attention(**arguments, state=state))
    (tiles,) = state.tiles.values()
    assert tiles[0, 0] == sum(-(-n // 16) for n, _ in MIXED if n > 1)  # 32 query vectors of 2 heads a kv head
    state.begin_step()
    assert not state.tiles


def test_tiles_of_many_sequences() -> None:
    """More sequences than a program of `tiles_kernel` adds up at once."""
    lengths = [(1, 3)] * 300 + [(40, 40), (0, 0), (2, 9)] + [(1, 2)] * 100 + [(17, 20)]
    check(make_case(lengths, kv_heads=1, heads=2, device=DEVICE), torch.float32)


def test_fp8_cache_saturates() -> None:
    """Keys and values beyond 448 are stored as 448."""
    for lengths in ([(1, 40), (1, 7)], [(4, 9), (1, 3)]):
        case = make_case(lengths, dtype=HALF, cache_dtype=torch.float8_e4m3fn, device=DEVICE)
        case.tensors["k"][0, 0, 0], case.tensors["v"][0, 0, 1] = 5000.0, -5000.0
        case.call(triton.paged_attention)
        slot = int(case.tensors["slot_mapping"][0])
        k_cache, v_cache = (case.tensors[name][slot // 16, slot % 16].float() for name in ("k_cache", "v_cache"))
        assert k_cache[0, 0] == 448 and v_cache[0, 1] == -448


def test_int8_cache_rounds_and_saturates() -> None:
    """Keys and values are stored as the nearest integers, even in the middle, from -127 to 127."""
    for lengths in ([(1, 40), (1, 7)], [(4, 9), (1, 3)]):
        case = make_case(lengths, dtype=HALF, cache_dtype=torch.int8, device=DEVICE)
        numbers = torch.tensor([0.5, 1.5, -2.5, -3.25, 500.0, -500.0], dtype=HALF, device=DEVICE)
        for name in ("k", "v"):
            case.tensors[name][0, 0, :6] = numbers
        case.call(triton.paged_attention)
        slot = int(case.tensors["slot_mapping"][0])
        for name in ("k_cache", "v_cache"):
            stored = case.tensors[name][slot // 16, slot % 16, 0, :6]
            assert stored.tolist() == [0, 2, -2, -3, 127, -127]


INVARIANT: list[dict[str, Any]] = [{}, {"window": 40, "sinks": True}, {"softcap": 5.0, "alibi": True}]


@pytest.mark.parametrize("options", INVARIANT, ids=str)
def test_batch_invariance(options: dict[str, Any]) -> None:
    """A row of a batch equals, to the last bit, the row computed alone, in another chunk, or in another batch."""
    case = make_case([(1, 70), (150, 200), (3, 3)], dim=64, dtype=HALF, device=DEVICE, **options)
    check(case, HALF, lambda **arguments: triton.paged_attention(**arguments, batch_invariant=True))
    tensors, rows = case.tensors, slice(1, 151)
    whole = case.call(triton.paged_attention, batch_invariant=True)[rows]
    nothing = torch.full_like(tensors["slot_mapping"], -1)  # the cache holds all keys by now
    for first, end in ((0, 150), (0, 1), (149, 150), (17, 90), (64, 128)):
        cut = slice(1 + first, 1 + end)
        chunk = tensors | {name: tensors[name][cut] for name in ("q", "k", "v")}
        chunk |= {
            "slot_mapping": nothing[cut], "block_tables": tensors["block_tables"][1:2],
            "query_start": torch.tensor([0, end - first], dtype=torch.int32, device=DEVICE),
            "seq_lens": torch.tensor([50 + end], dtype=torch.int32, device=DEVICE),
        }  # fmt: skip
        bounds = {"max_query_len": end - first, "max_seq_len": 50 + end, "batch_invariant": True}
        alone = triton.paged_attention(**(case.options | chunk | bounds))
        # the interpreter's products (NumPy's) depend on a row's place in the matrix
        tolerance = 2e-3 if INTERPRET else 0.0
        torch.testing.assert_close(alone, whole[first:end], rtol=0, atol=tolerance, msg=f"rows {first} to {end}")


def test_decode_and_mixed_kernels_agree() -> None:
    """A bound that is not tight launches the other kernels too and gives the same answer."""
    case = make_case(DECODE, device=DEVICE, sinks=True)
    split = case.clone().call(triton.paged_attention)
    case.options["max_query_len"] = 16
    torch.testing.assert_close(case.call(triton.paged_attention), split, rtol=1e-5, atol=1e-5)


def test_shared_blocks_and_rows_that_write_nothing() -> None:
    case = make_case([(1, 40), (5, 37), (8, 60)], shared_blocks=2, device=DEVICE)
    check(case, torch.float32)
    nothing = torch.full_like(case.tensors["slot_mapping"], -1)
    again = Case(case.tensors | {"slot_mapping": nothing}, case.options, case.dense)
    check(again, torch.float32)


def test_empty_batches() -> None:
    assert make_case([(0, 0)], device=DEVICE).call(triton.paged_attention).shape == (0, 4, 16)
    padding = make_case([(0, 0)], padding=3, device=DEVICE).call(triton.paged_attention)
    assert torch.equal(padding.cpu(), torch.zeros(3, 4, 16))


@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    lengths = []
    for _ in range(pick(1, 3, 9, 20)):
        n = pick(0, 1, 1, 1, 2, 9, 70)
        lengths.append((n, n + pick(0, 1, 15, 16, 100)))
    lengths.append((2, 9))
    kv_heads = pick(1, 2, 3)
    case = make_case(
        lengths, kv_heads=kv_heads, heads=kv_heads * pick(1, 3, 4, 5), dim=pick(16, 40, 64), block_size=pick(16, 32),
        window=pick(0, 0, 9), padding=pick(0, 5), fused_qkv=bool(pick(0, 1)), sinks=bool(pick(0, 1)), device=DEVICE,
        seed=seed,
    )  # fmt: skip
    check(case, torch.float32)


@needs_cuda_graphs
@pytest.mark.parametrize("lengths", [MIXED, LONG], ids=["mixed", "decode"])
def test_captured_in_a_cuda_graph(lengths: list[tuple[int, int]]) -> None:
    """Captured with one batch, replayed with another of the same sizes: no launch depends on the data."""
    captured = make_case(lengths, dim=64, dtype=HALF, device=DEVICE, seed=1)
    shorter = [(n, max(n, length // 2)) for n, length in lengths]
    other = make_case(shorter, dim=64, dtype=HALF, device=DEVICE, seed=2)
    captured.clone().call(triton.paged_attention)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.call(triton.paged_attention)
    for name, tensor in other.tensors.items():
        static = captured.tensors[name]
        if tensor.shape == static.shape:
            static.copy_(tensor)
        elif name == "block_tables":
            static[:, : tensor.shape[1]].copy_(tensor)
        else:
            static[: tensor.shape[0]].copy_(tensor)
    graph.replay()
    expected = dense_attention(other)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1.6e-2, atol=1.6e-2)


@needs_dispatch
def test_dispatch_picks_triton_on_cuda() -> None:
    check(make_case(MIXED, device=DEVICE), torch.float32, kernel=dispatch.paged_attention)
    assert dispatch.describe()["cuda"]["available"]


@pytest.mark.skipif(INTERPRET, reason="the interpreter's cast to fp8 loses NaN")
@pytest.mark.parametrize("lengths", [[(1, 20)], [(3, 20)]], ids=["decode", "write"])
def test_a_nan_stays_one_in_an_fp8_cache(lengths: list[tuple[int, int]]) -> None:
    case = make_case(lengths, dtype=HALF, device=DEVICE, cache_dtype=torch.float8_e4m3fn)
    tensors = case.tensors
    tensors["k"][0, 0, 3], tensors["v"][0, 1, 2], tensors["k"][0, 1, 5] = float("nan"), float("nan"), 1000.0
    case.call(triton.paged_attention)
    block, offset = divmod(int(tensors["slot_mapping"][0]), tensors["k_cache"].shape[1])
    key, value = (tensors[name][block, offset].float().cpu() for name in ("k_cache", "v_cache"))
    assert key.isnan().nonzero().tolist() == [[0, 3]] and value.isnan().nonzero().tolist() == [[1, 2]]
    assert float(key[1, 5]) == 448.0
