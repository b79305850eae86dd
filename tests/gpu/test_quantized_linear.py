"""The CUDA kernels of quantized_linear against its definition in float32.

On a GPU: `pytest -m gpu tests/gpu/test_quantized_linear.py -s`. Without one, Triton's interpreter runs small cases on the CPU:
`TRITON_INTERPRET=1 pytest tests/gpu/test_quantized_linear.py`. It cuts off where hardware rounds to fp8, so rounded activations are
compared loosely there, and it has no fp8 products.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, FP8_VALUES, HALF, INTERPRET, needs_cuda_graphs, require_triton

require_triton()

from camshaft.export.kernels.gemm_tiled import TiledConfig  # noqa: E402
from camshaft.export.kernels.quantized import linear, tables  # noqa: E402
from camshaft.export.kernels.quantized.activations import quantize_planes, round_rows  # noqa: E402
from camshaft.export.kernels.quantized.block_fp8 import multiply_block_fp8  # noqa: E402
from camshaft.export.kernels.quantized.dequantize import dequantize  # noqa: E402
from camshaft.export.kernels.quantized.few_rows import FewRowsConfig, multiply_few_rows, takes  # noqa: E402
from camshaft.export.kernels.quantized.packed_fp8 import PackedFp8Config, multiply_packed_fp8, step_of  # noqa: E402
from camshaft.export.kernels.quantized.prepare import QuantizedLayer, prepare  # noqa: E402
from camshaft.export.kernels.quantized.stored import Stored, obstacle, stored  # noqa: E402
from camshaft.export.kernels.quantized.weight_tile import WeightTileConfig, fits, multiply_weight_tile  # noqa: E402
from camshaft.graph.linear_format import LinearFormat  # noqa: E402
from camshaft.graph.quant_formats import QuantizedWeight, dequantize_weight, quantize_weight  # noqa: E402
from camshaft.graph.quantized_linear import quantize_activations  # noqa: E402
from camshaft.graph.quantized_linear import quantized_linear as definition  # noqa: E402

pytestmark = pytest.mark.gpu
N, K = (72, 256) if INTERPRET else (1040, 4096)
ROWS = (1, 70) if INTERPRET else (1, 2, 3, 8, 33, 64, 65, 256, 600, 2048)
WEIGHTS = (
    "int4", "int4:g128", "int4:g64", "int4:g32:zp", "int4:zp", "int8", "int8:g64", "int8:zp", "fp8", "fp8:tensor",
    "fp8:block128", "nvfp4", "mxfp4", "mxfp8",
)  # fmt: skip
ROUNDED = (
    "fp8/fp8", "fp8:tensor/fp8_static", "fp8:block128/fp8_block", "int8/int8", "int8/int8_static", "int4:g128/fp8",
    "int4:g64:zp/fp8_static", "int4:g128/int8", "nvfp4/nvfp4", "nvfp4/nvfp4_search", "mxfp4/mxfp4", "mxfp8/mxfp8", "int8/fp8_block",
)  # fmt: skip
CONFIGS = (
    WeightTileConfig(block_n=32, block_k=128),
    WeightTileConfig(block_n=64, block_k=128, splits=2, weight_left=True, block_m=32),
    WeightTileConfig(block_n=32, block_k=64, splits=4, scale_sums=True),
)


def weight_of(format: LinearFormat, n: int = N, k: int = K) -> QuantizedWeight:
    """A random weight [n, k] in a format."""
    rng = torch.Generator(device=DEVICE).manual_seed(0)
    return quantize_weight(torch.randn(n, k, generator=rng, device=DEVICE) / k**0.5, format)


def kept(parts: QuantizedWeight, format: LinearFormat) -> Stored:
    """The weight as kernels take it."""
    assert obstacle(parts.values, format) is None
    return stored(parts.values, parts.scale, parts.zero_point, parts.global_scale, format)


def rows_of(count: int, k: int = K, dtype: torch.dtype = HALF) -> Tensor:
    """Rows with values of several sizes."""
    rng = torch.Generator(device=DEVICE).manual_seed(count)
    return (torch.randn(count, k, generator=rng, device=DEVICE) * 1.7).to(dtype)


def check(actual: Tensor, wanted: Tensor, limit: float) -> None:
    """The error in the norm, relative."""
    error = ((actual.float() - wanted.float()).norm() / wanted.float().norm()).item()
    print(f"  relative error {error:.1e}", end="")
    assert torch.isfinite(actual).all() and error < limit


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().flatten().view(torch.uint8)


def is_loose(format: LinearFormat) -> bool:
    """Whether the interpreter rounds the activations in another way."""
    return INTERPRET and format.activations in ("fp8", "fp8_static", "fp8_block", "mxfp8")


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.block_n}-{config.splits}-{config.scale_sums}")
def test_weight_tile(text: str, config: WeightTileConfig) -> None:
    format = LinearFormat.parse(f"{text}/none")
    parts = weight_of(format)
    weight = kept(parts, format)
    bias = rows_of(1, N)[0]
    for count in (1, 20) if INTERPRET else (1, 20, 100):
        x = rows_of(count)
        wanted = x.float() @ dequantize_weight(parts, format).t() + bias.float()
        check(multiply_weight_tile(x, weight, bias, HALF, config), wanted, 4e-3)


@pytest.mark.parametrize(
    "text",
    ["int4", "int4:g128", "int4:g16", "int4:g32:zp", "int4:zp", "int8", "int8:zp", "int8:g32:zp", "fp8:tensor", "fp8:block128",
     "nvfp4", "mxfp4", "mxfp8"],
)  # fmt: skip
def test_few_rows(text: str) -> None:
    """In float32: what the kernel computes is as good as float32 sums are."""
    format = LinearFormat.parse(f"{text}/none")
    n, k = (20, 384) if INTERPRET else (1030, 14336)
    parts = weight_of(format, n, k)
    weight = kept(parts, format)
    dense = dequantize_weight(parts, format)
    bias = rows_of(1, n)[0]
    for count, config in (
        (1, FewRowsConfig(block_n=4, block_k=256)),
        (2, FewRowsConfig(block_n=8, block_k=4096, warps=8)),
        (5, FewRowsConfig(block_n=2, block_k=128, warps=1)),
    ):
        x = rows_of(count, k) + 0.5  # a mean, which zero points act on
        wanted = (x.double() @ dense.double().t()).float() + bias.float()
        check(multiply_few_rows(x, weight, bias, torch.float32, config), wanted, 3e-6)


@pytest.mark.parametrize("text", ["int4:g128", "int8", "nvfp4"])
def test_few_rows_with_scales(text: str) -> None:
    format = LinearFormat.parse(f"{text}/none")
    parts = weight_of(format, 16)
    x = rows_of(2)
    given = torch.rand(2, device=DEVICE) + 0.5
    group_scale = torch.rand(2, K // 128, device=DEVICE) + 0.5
    config = FewRowsConfig(block_n=4, block_k=256)
    weight = kept(parts, format)
    actual = multiply_few_rows(x, weight, None, torch.float32, config, x_scale=given, x_group_scale=group_scale)
    scaled = x.float() * group_scale.repeat_interleave(128, 1) * given[:, None]
    check(actual, scaled @ dequantize_weight(parts, format).t(), 3e-6)


@pytest.mark.parametrize("text", ["int4:g128:zp", "int8", "mxfp8"])
def test_few_rows_of_any_size(text: str) -> None:
    """What the kernel's power of two must not bring to overflow or underflow."""
    format = LinearFormat.parse(f"{text}/none")
    parts = weight_of(format, 16)
    weight = kept(parts, format)
    x = rows_of(1).float()
    config = FewRowsConfig(block_n=4, block_k=256)
    for factor in (2.0**-30, 2.0**55):
        out = multiply_few_rows(x * factor, weight, None, torch.float32, config) / factor
        check(out, x @ dequantize_weight(parts, format).t(), 3e-6)
    assert (multiply_few_rows(torch.zeros_like(x), weight, None, HALF, config) == 0).all()
    x[0, 3] = float("nan")
    assert multiply_few_rows(x, weight, None, HALF, config).isnan().all()


def test_few_rows_read_whole_vectors() -> None:
    format = LinearFormat.parse("int8/none")
    parts = weight_of(format, 16, 40)
    weight = kept(parts, format)
    x = rows_of(1, 40)
    assert not takes(weight)
    with pytest.raises(ValueError, match="rows of 40 bytes, allowed: a multiple of 16"):
        multiply_few_rows(x, weight, None, HALF, FewRowsConfig(block_n=4, block_k=64))
    out = linear.quantized_linear(x, parts.values, parts.scale, None, None, None, None, "int8/none")
    check(out, x.float() @ dequantize_weight(parts, format).t(), 4e-3)


@pytest.mark.parametrize("text", ["int4:g32", "int8", "mxfp4"])
def test_rows_that_no_step_divides(text: str) -> None:
    format = LinearFormat.parse(f"{text}/none")
    parts = weight_of(format, 40, 160)
    x = rows_of(5, 160)
    out = multiply_weight_tile(x, kept(parts, format), None, HALF, WeightTileConfig(block_n=32, block_k=64, splits=2))
    check(out, x.float() @ dequantize_weight(parts, format).t(), 4e-3)


def test_a_configuration_that_does_not_fit_is_refused() -> None:
    format = LinearFormat.parse("int4:g128/none")
    weight = kept(weight_of(format), format)
    config = WeightTileConfig(block_n=32, block_k=192)
    assert not fits(weight, config)
    with pytest.raises(ValueError, match="block_k must divide a group"):
        multiply_weight_tile(rows_of(1), weight, None, HALF, config)


@pytest.mark.parametrize("text", WEIGHTS)
def test_dequantize(text: str) -> None:
    format = LinearFormat.parse(f"{text}/none")
    parts = weight_of(format, 40, 192 if "128" not in text else 256)
    wanted = dequantize_weight(parts, format)
    torch.testing.assert_close(dequantize(kept(parts, format), torch.float32), wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("text", [*(f"{text}/none" for text in WEIGHTS), *ROUNDED])
def test_every_format_by_the_tables(text: str) -> None:
    format = LinearFormat.parse(text)
    parts = weight_of(format)
    bias = rows_of(1, N)[0]
    x_scale = torch.tensor(0.03, device=DEVICE) if format.activations.endswith("_static") else None
    for count in ROWS:
        x = rows_of(count)
        given = (parts.values, parts.scale, parts.zero_point, parts.global_scale)
        if INTERPRET and count > tables.FEW_ROWS and text.startswith("int4:") and "fp8" in format.activations:
            continue  # fp8 products
        actual = linear.quantized_linear(x, *given, bias, x_scale, text)
        wanted = definition(x.float(), *given, bias.float(), x_scale, text)
        check(actual, wanted, 0.08 if is_loose(format) else 6e-3)


@pytest.mark.parametrize(
    "kind", ["int8", "int8_static", "nvfp4", "nvfp4_search", "mxfp4", "fp8", "fp8_static", "fp8_block", "mxfp8"]
)
def test_rounded_rows(kind: str) -> None:
    format = LinearFormat(weights="fp8", activations=kind)  # type: ignore[arg-type]
    if INTERPRET and kind.startswith("nvfp4"):
        pytest.skip("the interpreter does not round scales to e4m3")
    k = 352 if kind in ("int8", "fp8_block") else 320
    x = rows_of(6, k)
    x[2] = 0
    given = torch.tensor(0.01, device=DEVICE) if kind.endswith("_static") else None
    on_cpu = quantize_activations(x.cpu(), format, None if given is None else given.cpu())
    values, scale = (None if part is None else part.to(DEVICE) for part in on_cpu)
    assert values is not None
    rounded = round_rows(x, kind, given, torch.float32)
    actual = rounded.values
    if rounded.group_scale is not None:
        actual = actual * rounded.group_scale.repeat_interleave(128, 1)[:, :k]
    if is_loose(format):
        wanted = values if scale is None else values * scale
        check(actual if rounded.scale is None else actual * rounded.scale[:, None], wanted, 0.08)
        return
    assert torch.equal(actual, values)
    if rounded.scale is not None:
        assert scale is not None and torch.equal(rounded.scale, scale.flatten().expand(6))


@pytest.mark.skipif(INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("text", [*WEIGHTS, *ROUNDED])
def test_definitions_give_the_same_bits_on_both_devices(text: str) -> None:
    format = LinearFormat.parse(text if "/" in text else f"{text}/none")
    rng = torch.Generator().manual_seed(0)
    dense = torch.randn(256, 512, generator=rng).to(HALF)
    there, here = quantize_weight(dense.to(DEVICE), format), quantize_weight(dense, format)
    for name in ("values", "scale", "zero_point", "global_scale"):
        left, right = getattr(there, name), getattr(here, name)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(bits(left.cpu()), bits(right)), name
    given = torch.tensor(0.01) if format.activations.endswith("_static") else None
    left, right = (
        quantize_activations(dense, format, given),
        quantize_activations(dense.to(DEVICE), format, None if given is None else given.to(DEVICE)),
    )
    assert all(one is two is None or torch.equal(one, two.cpu()) for one, two in zip(left, right))


def test_rows_with_nan_are_nan() -> None:
    x = rows_of(3)
    x[1, 5] = float("nan")
    for kind in ("int8", "fp8", "int8_static"):
        rounded = round_rows(x, kind, torch.tensor(0.01, device=DEVICE), HALF)
        assert rounded.scale is not None
        assert rounded.scale.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("text", ["int4:g64", "int4:g128:zp", "int4", "int4:zp"])
def test_int4_by_fp8(text: str) -> None:
    format = LinearFormat.parse(f"{text}/fp8")
    parts = weight_of(format)
    weight = kept(parts, format)
    step = step_of(weight)
    assert step is not None
    x = rows_of(20)
    planes, scale, sums = quantize_planes(x, None, step, FP8_VALUES)
    config = PackedFp8Config(block_m=16, block_n=32, warps=4) if INTERPRET else PackedFp8Config()
    actual = multiply_packed_fp8(planes, weight, sums, scale, None, HALF, config)
    rounded = torch.stack((planes.float()[:, : K // 2], planes.float()[:, K // 2 :]), -1).flatten(1) * scale[:, None]
    check(actual, rounded @ dequantize_weight(parts, format).t(), 6e-3)
    check(rounded, x, 0.08)


def test_fp8_in_blocks() -> None:
    format = LinearFormat.parse("fp8:block128/fp8_block")
    parts = weight_of(format, 200, 320)
    x = round_rows(rows_of(20, 320), "fp8_block", None, FP8_VALUES)
    assert x.group_scale is not None
    config = TiledConfig(block_m=64, block_n=64, block_k=128, warps=4)
    weight = parts.values.float() if INTERPRET else parts.values
    actual = multiply_block_fp8(x.values, weight, x.group_scale, parts.scale, None, HALF, config)
    wanted = x.values.float() * x.group_scale.repeat_interleave(128, 1)[:, :320]
    check(actual, wanted @ dequantize_weight(parts, format).t(), 6e-3)
    with pytest.raises(ValueError, match="tiles that divide 128"):
        multiply_block_fp8(x.values, weight, x.group_scale, parts.scale, None, HALF, replace(config, block_n=256))


def test_a_split_product_is_the_same_every_time() -> None:
    format = LinearFormat.parse("int4:g128/none")
    weight = kept(weight_of(format), format)
    config = WeightTileConfig(block_n=32, block_k=64, splits=4, scale_sums=True)
    x = rows_of(4)
    first = multiply_weight_tile(x, weight, None, HALF, config)
    assert all(torch.equal(multiply_weight_tile(x, weight, None, HALF, config), first) for _ in range(3))


def test_what_kernels_cannot_read_runs_by_the_definition(caplog: pytest.LogCaptureFixture) -> None:
    format = LinearFormat.parse("int8/none")
    parts = weight_of(format, 16, 30)
    x = rows_of(2, 30)
    actual = linear.quantized_linear(x, parts.values, parts.scale, None, None, None, None, "int8/none")
    assert torch.equal(actual, definition(x, parts.values, parts.scale, None, None, None, None, "int8/none"))
    assert "rows of 30 bytes" in caplog.text


@needs_cuda_graphs
def test_a_prepared_layer_can_be_captured() -> None:
    text = "int4:g128/none"
    parts = weight_of(LinearFormat.parse(text))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert prepare([QuantizedLayer(N, K, text)], HALF, torch.device("cuda")) > 0
        x = rows_of(4)
        linear.quantized_linear(x, parts.values, parts.scale, None, None, None, None, text)  # the stream's counters
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = linear.quantized_linear(x, parts.values, parts.scale, None, None, None, None, text)
    graph.replay()
    torch.cuda.synchronize()
    check(out, definition(x.float(), parts.values, parts.scale, None, None, None, None, text), 6e-3)
