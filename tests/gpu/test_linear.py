"""The kernels of linear layers against fp32 products of the same rounded operands.

On a GPU: `pytest -m gpu tests/gpu/test_linear.py -s`. Without one, Triton's interpreter runs the small cases on the CPU:
`TRITON_INTERPRET=1 pytest tests/gpu/test_linear.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, FP8_VALUES, HALF, INTERPRET, needs_cuda_graphs, require_triton

require_triton()

from camshaft.export.kernels import gemm, row_quantize  # noqa: E402
from camshaft.export.kernels.gemm import Config  # noqa: E402
from camshaft.export.kernels.gemm_skinny import RowsConfig, TileConfig  # noqa: E402
from camshaft.export.kernels.gemm_tiled import TiledConfig  # noqa: E402
from camshaft.graph import ops as _semantic_ops  # noqa: E402, F401  registers the operators
from camshaft.graph.quant_ops import quantize_rows  # noqa: E402

pytestmark = pytest.mark.gpu
ops = torch.ops.camshaft
FP8 = torch.float8_e4m3fn
K, N = (192, 72) if INTERPRET else (4096, 6144)
WIDTH = 32 if INTERPRET else 128


def operands(rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    """x [rows, k], weight [n, k], bias [n] and, for fp8, scales."""
    rng = torch.Generator(device=DEVICE).manual_seed(seed)
    x = torch.randn(rows, k, generator=rng, device=DEVICE)
    weight = torch.randn(n, k, generator=rng, device=DEVICE) / k**0.5
    bias = torch.randn(n, generator=rng, device=DEVICE).to(HALF)
    if dtype != FP8:
        return {"x": x.to(dtype), "weight": weight.to(dtype), "x_scale": None, "weight_scale": None, "bias": bias}
    x8, x_scale = quantize_rows(x)
    weight8, weight_scale = quantize_rows(weight)
    return {"x": x8, "weight": weight8, "x_scale": x_scale, "weight_scale": weight_scale[:, 0].clone(), "bias": bias}


def expected(given: dict[str, Tensor | None]) -> Tensor:
    """The product in fp32 (float64 sums)."""
    x, weight = given["x"], given["weight"]
    assert x is not None and weight is not None
    product = (x.double() @ weight.double().t()).float()
    if given["x_scale"] is not None and given["weight_scale"] is not None:
        product = product * given["x_scale"] * given["weight_scale"]
    return product if given["bias"] is None else product + given["bias"].float()


def check(actual: Tensor, given: dict[str, Tensor | None]) -> None:
    """The output is rounded to 8 (bf16) or 11 (fp16) bits; fp8 sums on tensor cores keep about 14 bits."""
    assert actual.dtype == HALF
    wanted = expected(given)
    error = ((actual.float() - wanted).norm() / wanted.norm()).item()
    print(f"  relative error {error:.1e}", end="")
    assert error < 4e-3
    torch.testing.assert_close(actual.float(), wanted, rtol=1.6e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [HALF, FP8], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_rows_kernel(rows: int, dtype: torch.dtype) -> None:
    given = operands(rows, N + 1, K, dtype)
    config = RowsConfig(block_n=4, block_k=2 * WIDTH)
    check(gemm.run(config, **given, dtype=HALF), given)
    given["bias"] = None
    check(gemm.run(config, **given, dtype=HALF), given)


TILES = [
    TileConfig(block_n=64, block_k=WIDTH),
    TileConfig(block_n=32, block_k=WIDTH, weight_left=False),
    TileConfig(block_n=64, block_k=WIDTH, splits=4),
    TileConfig(block_n=64, block_k=WIDTH, splits=4, tma=True),
    TileConfig(block_n=64, block_k=2 * WIDTH, splits=3, stages=2, weight_left=False),
]


@pytest.mark.parametrize("dtype", [HALF, FP8], ids=str)
@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64])
def test_tile_kernel(rows: int, config: TileConfig, dtype: torch.dtype) -> None:
    given = operands(rows, N + 8, K, dtype)
    for _ in range(2):  # the counters are as they were
        check(gemm.run(config, **given, dtype=HALF), given)


@pytest.mark.parametrize("dtype", [HALF, FP8], ids=str)
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("rows", [1, 100, 300])
def test_tiled_kernel(rows: int, persistent: bool, dtype: torch.dtype) -> None:
    given = operands(rows, N + 8, K, dtype)
    config = TiledConfig(block_m=64, block_n=64, block_k=WIDTH, group=2, warps=4, persistent=persistent)
    check(gemm.run(config, **given, dtype=HALF), given)


@pytest.mark.parametrize("k", [K + 16, 16])
def test_row_lengths_that_no_block_divides(k: int) -> None:
    configs: list[Config] = [RowsConfig(block_n=8, block_k=64), *TILES, gemm.INVARIANT_HALF]
    for config in configs:
        given = operands(3, 40, k, HALF)
        check(gemm.run(config, **given, dtype=HALF), given)


def test_splits_beyond_the_row() -> None:
    given = operands(3, 40, WIDTH, HALF)  # one block of K for four splits
    check(gemm.run(TILES[2], **given, dtype=HALF), given)


@pytest.mark.parametrize("rows", [1, 2, 17, 64, 200])
def test_scaled_linear_by_the_table(rows: int) -> None:
    if INTERPRET and rows > 16:
        pytest.skip("cuBLASLt")
    given = operands(rows, N, K, FP8)
    out = gemm.scaled_linear(**given, dtype=HALF)  # type: ignore[arg-type]
    check(out, given)


LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
"""N and K of its linear layers."""


@pytest.mark.skipif(INTERPRET, reason="cuBLASLt")
@pytest.mark.parametrize(("n", "k"), LLAMA_8B)
def test_scaled_linear_of_any_number_of_rows(n: int, k: int) -> None:
    """Against fp32 products of the same operands, each row: the library's kernels have been wrong at single sizes."""
    given = operands(8192, n, k, FP8)
    x, weight, x_scale, weight_scale, bias = (given[key] for key in ("x", "weight", "x_scale", "weight_scale", "bias"))
    assert x is not None and weight is not None and x_scale is not None and weight_scale is not None
    assert bias is not None and not torch.backends.cuda.matmul.allow_tf32
    wanted = (x.float() @ weight.float().t()) * x_scale * weight_scale
    for rows in (1, 2, 16, 17, 64, 65, 100, 128, 129, 200, 511, 1000, 1536, 2048, 2049, 3000, 4096, 5000, 8192):
        for added in (None, bias):
            out = gemm.scaled_linear(x[:rows], x_scale[:rows], weight, weight_scale, added, HALF).float()
            right = wanted[:rows] if added is None else wanted[:rows] + added.float()
            assert out.isfinite().all(), (rows, added is None)
            worst = ((out - right).norm(dim=1) / right.norm(dim=1)).max().item()
            assert worst < 1e-2, (rows, added is None, worst)


def test_the_library_takes_no_fp8_product_that_it_gets_wrong() -> None:
    for n in (16, 1024, 4096, 4112, 8192, 8208, 28672, 1 << 20):
        for rows in range(1, gemm.LIBRARY_FEWEST_ROWS):
            assert gemm.choose_fp8(rows, n, 4096) is not None
        for rows in (2049, 8192, 1 << 20):
            assert gemm.choose_fp8(rows, n, 14336) == gemm.LONG_FP8
            assert gemm.choose_fp8(rows, n, 8192) is None
        assert gemm.choose_fp8(2048, n, 14336) is None


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 64, 200])
def test_linear_by_the_table(rows: int) -> None:
    given = operands(rows, N, K, HALF)
    out = gemm.linear(given["x"].view(1, rows, K), given["weight"], given["bias"])  # type: ignore[union-attr, arg-type]
    assert out.shape == (1, rows, N)
    if rows:
        check(out[0], given)


@pytest.mark.parametrize("dtype", [HALF, FP8], ids=str)
def test_a_row_alone_and_in_batches(dtype: torch.dtype) -> None:
    """Equal to the last bit, wherever in the batch the row stands."""
    given = operands(200, N, K, dtype)
    x, weight, x_scale, weight_scale, bias = (given[k] for k in ("x", "weight", "x_scale", "weight_scale", "bias"))

    def product(begin: int, end: int) -> Tensor:
        assert x is not None and weight is not None
        if x_scale is None or weight_scale is None:
            return gemm.invariant_linear(x[begin:end], weight, bias)
        return gemm.invariant_scaled_linear(x[begin:end], x_scale[begin:end], weight, weight_scale, bias, HALF)

    whole = product(0, 200)
    check(whole, given)
    slices = [(0, 1), (199, 1), (57, 1), (3, 2), (100, 17), (136, 64)]
    if INTERPRET:  # NumPy's products depend on where in the tile a row stands
        slices = [(0, 1), (64, 2), (128, 17), (64, 64)]
    for begin, size in slices:
        assert torch.equal(product(begin, begin + size), whole[begin : begin + size]), (begin, size)


def test_what_the_invariant_kernel_refuses() -> None:
    with pytest.raises(ValueError, match=r"rows of 20 bytes, allowed: .* multiple of 16"):
        gemm.invariant_linear(torch.zeros(2, 10, dtype=HALF), torch.zeros(4, 10, dtype=HALF), None)
    with pytest.raises(ValueError, match=r"float32 .* allowed: one dtype of torch.float16, torch.bfloat16"):
        gemm.invariant_linear(torch.zeros(2, 16), torch.zeros(4, 16), None)


# ----------------------------------------------------------------------------------------------------- fused quantization
def _same_quantized(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-2, atol=0)
    values, reference = (part[0].float() * part[1] for part in (actual, wanted))
    torch.testing.assert_close(values, reference, rtol=0.13, atol=2e-2)  # a step of e4m3 is an eighth
    assert ((values - reference).norm() / reference.norm()).item() < 2e-2


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("cast_first,gain", [(True, True), (False, True), (False, False)])
def test_add_rms_norm_quantize(rows: int, cast_first: bool, gain: bool) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 1, rows, 200).to(DEVICE, HALF)
    weight = torch.randn(200).to(DEVICE, HALF) if gain else None
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5, 0.0, cast_first)
    out, scale, added = row_quantize.add_rms_norm_quantize(x, residual, weight, 1e-5, 0.0, cast_first, FP8_VALUES)
    assert torch.equal(added, total) and scale.shape == (1, rows, 1)
    _same_quantized((out.to(FP8), scale), quantize_rows(normed))


@pytest.mark.parametrize("activation", row_quantize.ACTIVATIONS)
def test_glu_quantize(activation: str) -> None:
    torch.manual_seed(0)
    y = torch.randn(1, 3, 600).to(DEVICE, HALF)
    out, scale = row_quantize.glu_quantize(y, activation, FP8_VALUES)
    _same_quantized((out.to(FP8), scale), quantize_rows(ops.glu(y, activation)))


def test_rows_of_zeros_are_quantized() -> None:
    out, scale = row_quantize.glu_quantize(torch.zeros(2, 64, dtype=HALF, device=DEVICE), "silu")
    assert (out.float() == 0).all() and (scale > 0).all()


@needs_cuda_graphs
@pytest.mark.parametrize("dtype", [HALF, FP8], ids=str)
def test_captured_in_a_cuda_graph(dtype: torch.dtype) -> None:
    """Products in a row, each the next one's input, replayed with new values: split sums wait rightly."""
    first, second = operands(5, 4096, 4096, dtype), operands(5, 4096, 4096, dtype, seed=1)
    config = TileConfig(block_n=64, block_k=128, splits=4)

    def chain(x: Tensor, x_scale: Tensor | None) -> Tensor:
        for given in (first, second, first, second):
            y = gemm.run(config, x, given["weight"], x_scale, given["weight_scale"], None, HALF)  # type: ignore[arg-type]
            x, x_scale = quantize_rows(y) if dtype == FP8 else (y, None)
        return x.float()

    static = {name: value.clone() for name, value in first.items() if value is not None}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(static["x"], static.get("x_scale"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = chain(static["x"], static.get("x_scale"))
    for given in (second, first):
        static["x"].copy_(given["x"])  # type: ignore[arg-type]
        if dtype == FP8:
            static["x_scale"].copy_(given["x_scale"])  # type: ignore[arg-type]
        results = []
        for _ in range(20):
            graph.replay()
            results.append(out.clone())
        torch.cuda.synchronize()
        assert all(torch.equal(result, results[0]) for result in results)
        with torch.cuda.stream(stream):
            assert torch.equal(chain(static["x"], static.get("x_scale")), results[0])


@pytest.mark.parametrize("kernel", ["rows", "norm", "glu", "glu_parts"])
@pytest.mark.parametrize("activation", row_quantize.ACTIVATIONS)
def test_a_nan_stays_one(kernel: str, activation: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1200).to(DEVICE, HALF)
    x[1, 7] = float("nan")
    if kernel == "rows":
        out, scale = row_quantize.quantize_rows(x, FP8_VALUES)
    elif kernel == "norm":
        out, scale, _ = row_quantize.add_rms_norm_quantize(x, torch.zeros_like(x), None, 1e-5, 0.0, False, FP8_VALUES)
    elif kernel == "glu":
        out, scale = row_quantize.glu_quantize_whole(x, activation, FP8_VALUES)
    else:
        out, scale = row_quantize.glu_quantize_parts(x, activation, FP8_VALUES, part=256)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert out[1].float().isnan().all() and out[::2].float().isfinite().all()


@pytest.mark.parametrize("activation", row_quantize.ACTIVATIONS)
def test_parts_of_a_row_give_the_same_bits(activation: str) -> None:
    torch.manual_seed(0)
    for rows, width in ((1, 1536), (5, 768), (64, 14336)) if not INTERPRET else ((2, 300),):
        y = 3 * torch.randn(rows, 2 * width).to(DEVICE, HALF)
        whole = row_quantize.glu_quantize_whole(y, activation, FP8_VALUES)
        parts = row_quantize.glu_quantize_parts(y, activation, FP8_VALUES, part=64 if INTERPRET else row_quantize.PART)
        assert torch.equal(whole[0].float(), parts[0].float()) and torch.equal(whole[1], parts[1])


def test_kernels_are_prepared() -> None:
    layers = [gemm.Layer(32, 64, HALF), gemm.Layer(16384, 64, HALF, bias=True), gemm.Layer(32, 64, FP8)]
    assert gemm.prepare(layers, HALF, torch.device(DEVICE)) >= 1
    assert gemm.prepare(layers, HALF, torch.device(DEVICE), batch_invariant=True) == 3
    jobs = set(gemm._jobs(gemm.Layer(4096, 16384, FP8), HALF, False))
    assert {job.config for job in jobs} >= {gemm.choose(gemm.FP8_TABLE, 128, 4096), gemm.LONG_FP8}
    assert gemm.prepare([], HALF, torch.device(DEVICE)) == 0
