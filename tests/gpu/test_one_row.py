"""Kernels of a step of one token, fp8 weights with rows of 16 bits, and those that quantize rows.

On a GPU: `pytest -m gpu tests/gpu/test_one_row.py -s`. Without one, Triton's interpreter runs the small cases on the CPU:
`TRITON_INTERPRET=1 pytest tests/gpu/test_one_row.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, FP8_VALUES, HALF, INTERPRET, require_triton

require_triton()

from camshaft.export.kernels import gemm, row_quantize  # noqa: E402
from camshaft.export.kernels.gemm import Config  # noqa: E402
from camshaft.export.kernels.gemm_one_row import OneRowConfig  # noqa: E402
from camshaft.export.kernels.gemm_skinny import RowsConfig, TileConfig  # noqa: E402
from camshaft.graph import ops as _semantic_ops  # noqa: E402, F401  registers the operators
from camshaft.graph.quant_ops import quantize_rows  # noqa: E402

pytestmark = pytest.mark.gpu
ops = torch.ops.camshaft
HALVES = [torch.float16] if INTERPRET else [torch.float16, torch.bfloat16]
FP8 = torch.float8_e4m3fn
K, N = (192, 72) if INTERPRET else (4096, 6144)
WIDTH = 32 if INTERPRET else 256
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def operands(rows: int, n: int, k: int, dtype: torch.dtype = HALF) -> Operands:
    """x [rows, k], an fp8 weight [n, k], its scales [n], bias [n]."""
    rng = torch.Generator(device=DEVICE).manual_seed(0)
    x = torch.randn(rows, k, generator=rng, device=DEVICE).to(dtype)
    weight, scale = quantize_rows(torch.randn(n, k, generator=rng, device=DEVICE) / k**0.5)
    return x, weight, scale[:, 0].clone(), torch.randn(n, generator=rng, device=DEVICE).to(dtype)


def check(actual: Tensor, given: Operands, bias: bool = True) -> None:
    """Against float64 sums: the output is rounded to 8 (bf16) or 11 (fp16) bits, and nothing else is."""
    x, weight, scale, added = given
    wanted = (x.double() @ weight.double().t()).float() * scale + (added.float() if bias else 0.0)
    error = ((actual.float() - wanted).norm() / wanted.norm()).item()
    print(f"  relative error {error:.1e}", end="")
    assert actual.dtype == x.dtype and error < 4e-3
    torch.testing.assert_close(actual.float(), wanted, rtol=1.6e-2, atol=3e-2)


CONFIGS: list[Config] = [
    OneRowConfig(block_n=4, block_k=4 * WIDTH),
    OneRowConfig(block_n=16, block_k=2 * WIDTH, warps=8, stages=3),
    OneRowConfig(block_n=8, block_k=16 * WIDTH, warps=8),
    RowsConfig(block_n=4, block_k=2 * WIDTH),
    TileConfig(block_n=64, block_k=WIDTH),
    TileConfig(block_n=64, block_k=WIDTH, asm=True),
    TileConfig(block_n=32, block_k=WIDTH, weight_left=False),
    TileConfig(block_n=64, block_k=WIDTH, splits=2, asm=True),
]
if not INTERPRET:
    CONFIGS += [OneRowConfig(block_n=8, block_k=2048), TileConfig(block_n=64, block_k=128)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_row(config: Config, dtype: torch.dtype) -> None:
    given = operands(1, N + 8, K, dtype)
    x, weight, scale, bias = given
    for _ in range(2):  # the counters are as they were
        check(gemm.run(config, x, weight, None, scale, bias, dtype), given)
    check(gemm.run(config, x, weight, None, scale, None, dtype), given, bias=False)


@pytest.mark.parametrize("k", [K + 16, 16])
def test_row_lengths_that_no_block_divides(k: int) -> None:
    given = operands(1, 24, k)
    x, weight, scale, bias = given
    for config in CONFIGS:
        check(gemm.run(config, x, weight, None, scale, bias, HALF), given)


def test_large_and_small_rows() -> None:
    """What fp16 could not hold, where the row is bfloat16; tiny values elsewhere."""
    x, weight, scale, _ = operands(1, 64, K)
    for factor in (2.0**-12, 1.0) if INTERPRET else (2.0**-60, 2.0**60):
        given = (x * factor, weight, scale, torch.zeros(64, device=DEVICE, dtype=HALF))
        for config in CONFIGS:
            out = gemm.run(config, given[0], weight, None, scale, None, HALF).float() / factor
            wanted = (x.double() @ weight.double().t()).float() * scale
            assert torch.isfinite(out).all() and (out - wanted).norm() / wanted.norm() < 4e-3, config


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (0,), (2, 3)])
@pytest.mark.parametrize("n", [64, 4112, 8208])
def test_the_operator(shape: tuple[int, ...], n: int) -> None:
    n = min(n, 64) if INTERPRET and len(shape) == 2 and shape != (1, 1) else n
    rows = int(torch.Size(shape).numel())
    given = operands(rows, n, K)
    x, weight, scale, bias = given
    out = gemm.weight_only_linear(x.view(*shape, K), weight, scale, bias, HALF)
    assert out.shape == (*shape, n)
    if rows:
        check(out.view(rows, n), given)
        alone = gemm.weight_only_linear(x[-1:], weight, scale, bias, HALF)
        assert torch.equal(alone[0], out.view(rows, n)[-1])


def test_rows_that_do_not_fit_are_refused() -> None:
    x, weight, scale, _ = operands(1, 32, 24)
    with pytest.raises(ValueError, match=r"rows of 24 values, allowed: a multiple of 16"):
        gemm.run(CONFIGS[0], x, weight, None, scale, None, HALF)


def test_kernels_are_prepared() -> None:
    layers = [gemm.Layer(32, 64, FP8), gemm.Layer(16384, 64, FP8, bias=True), gemm.Layer(32, 64, HALF)]
    device = torch.device(DEVICE)
    assert gemm.prepare(layers, HALF, device, one_row=True) == gemm.prepare(layers, HALF, device) + 2


# ---------------------------------------------------------------------------------------------------------- quantization
def same_quantized(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """As the definition, but for values that lie between two steps of e4m3, an eighth apart."""
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-2, atol=0)
    values, reference = (part[0].float() * part[1] for part in (actual, wanted))
    torch.testing.assert_close(values, reference, rtol=0.13, atol=2e-2)
    assert ((values - reference).norm() / reference.norm()).item() < 2e-2


@pytest.mark.parametrize("rows,width", [(1, 200), (3, 64)] if INTERPRET else [(1, 4096), (300, 4096), (3, 14336)])
def test_quantize_rows(rows: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, rows, width).to(DEVICE, HALF)
    x[0, 0, 0] = 0
    out, scale = row_quantize.quantize_rows(x, FP8_VALUES)
    wanted, steps = quantize_rows(x)
    assert scale.shape == (1, rows, 1)
    torch.testing.assert_close(scale, steps, rtol=2e-7, atol=0)  # CUDA's torch divides by 448 by its rounded reciprocal
    same_quantized((out.to(FP8), scale), (wanted, steps))
    out, scale = row_quantize.quantize_rows(torch.zeros(2, 64, dtype=HALF, device=DEVICE), FP8_VALUES)
    assert (out.float() == 0).all() and (scale > 0).all()


@pytest.mark.parametrize("activation", row_quantize.ACTIVATIONS)
def test_gates_in_parts(activation: str) -> None:
    """Equal to the last bit, whether a program owns a row or a part of it."""
    torch.manual_seed(0)
    y = torch.randn(1, 3, 600).to(DEVICE, HALF)
    out, scale = row_quantize.glu_quantize_parts(y, activation, FP8_VALUES, part=64)
    same_quantized((out.to(FP8), scale), quantize_rows(ops.glu(y, activation)))
    whole, steps = row_quantize.glu_quantize_whole(y, activation, FP8_VALUES)
    assert torch.equal(out.float(), whole.float()) and torch.equal(scale, steps)


@pytest.mark.skipif(INTERPRET, reason="large")
def test_gates_of_few_and_many_rows() -> None:
    torch.manual_seed(0)
    y = torch.randn(row_quantize.MAX_SPLIT_ROWS + 1, 2 * 14336).to(DEVICE, HALF)
    many, steps = row_quantize.glu_quantize(y, "silu")
    few, few_steps = row_quantize.glu_quantize(y[:5], "silu")
    assert torch.equal(few.float(), many[:5].float()) and torch.equal(few_steps, steps[:5])
