"""The definitions of quantized tensors: known values, shapes of scales, and what is refused."""

from __future__ import annotations

import camshaft.graph.ops  # noqa: F401  registers camshaft::*
import pytest
import torch
from camshaft.graph.quant_ops import FP4_VALUES, QUANT_DEFINITIONS, saturate, spread_scale, unpack
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.camshaft
FP8 = torch.float8_e4m3fn


def test_int8_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 200.0, -200.0])
    assert ops.quantize(x, torch.tensor(1.0), 0, torch.int8).tolist() == [0, 2, 2, 0, 127, -128]


def test_fp8_saturates_instead_of_nan() -> None:
    x = torch.tensor([1000.0, -1000.0, 1.06])
    assert ops.quantize(x, torch.tensor(1.0), 0, FP8).float().tolist() == [448.0, -448.0, 1.0]


def test_packed_halves() -> None:
    packed = torch.tensor([[0x8F, 0x70]], dtype=torch.uint8)
    assert unpack(packed, "int4").tolist() == [[-1.0, -8.0, 0.0, 7.0]]
    assert unpack(packed, "fp4").tolist() == [[-6.0, -0.0, 0.0, 6.0]]
    every = unpack(torch.arange(16, dtype=torch.uint8), "fp4")[::2]
    assert every.tolist() == [*FP4_VALUES, *(-value for value in FP4_VALUES)]


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (2, 6)])
def test_quantized_and_back(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    scale = torch.full(shape, 0.05)
    quantized = ops.quantize(x, scale, 0, torch.int8)
    assert (ops.dequantize(quantized, scale, 0, torch.float32) - x).abs().max() <= 0.025 + 1e-6


def test_scales_belong_to_a_dimension_or_a_block() -> None:
    assert spread_scale(torch.tensor([1.0, 2.0, 3.0]), (2, 3), -1).shape == (1, 3)
    blocks = spread_scale(torch.tensor([[1.0, 2.0]]), (2, 4), 0)
    assert blocks.tolist() == [[1.0, 1.0, 2.0, 2.0]] * 2


def test_two_levels_of_scales() -> None:
    packed = torch.full((2, 8), 0x22, dtype=torch.uint8)  # 1.0 everywhere
    scale = torch.tensor([[2.0], [4.0]]).to(FP8)
    values = ops.dequantize_packed(packed, scale, torch.tensor(0.5), "fp4", torch.bfloat16)
    assert values.dtype == torch.bfloat16 and values[:, 0].tolist() == [1.0, 2.0] and values.shape == (2, 16)


@pytest.mark.parametrize(
    ("scale", "axis", "message"),
    [(torch.ones(5), 0, "5 scales for dimension 0"), (torch.ones(2, 4), 0, "do not divide"),
     (torch.ones(1, 1, 1), 0, "do not divide")],
)  # fmt: skip
def test_scales_that_do_not_fit(scale: Tensor, axis: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.quantize(torch.ones(4, 6), scale, axis, torch.int8)


def test_unknown_formats() -> None:
    with pytest.raises(ValueError, match="allowed: torch.int8, torch.float8_e4m3fn"):
        ops.quantize(torch.ones(2), torch.tensor(1.0), 0, torch.int32)
    with pytest.raises(ValueError, match="allowed: int4, fp4"):
        ops.dequantize_packed(torch.ones(2, 2, dtype=torch.uint8), torch.ones(2, 1), None, "int3", torch.float32)


def test_shape_functions_tell_the_truth() -> None:
    x, packed = torch.ones(4, 6), torch.ones((4, 3), dtype=torch.uint8)
    calls = [
        (ops.quantize, (x, torch.ones(4), 0, FP8)), (ops.dequantize, (x.to(torch.int8), torch.ones(()), 0, torch.bfloat16)),
        (ops.quantize_rows, (x,)), (ops.rms_norm_quantize, (x, x[0], 1e-6, 0.0, True)),
        (ops.add_rms_norm_quantize, (x, x, None, 1e-6, 0.0, False)), (ops.glu_quantize, (x, "silu")),
        (ops.scaled_linear, (x.to(FP8), torch.ones(4, 1), x.to(FP8), torch.ones(4), None, torch.bfloat16)),
        (ops.dequantize_packed, (packed, torch.ones(4, 2), None, "int4", torch.float16)),
        (ops.quantized_linear, (x, x.to(torch.int8), x[:, 0], None, None, None, None, "int8/int8")),
    ]  # fmt: skip
    assert {op.default for op, _ in calls} >= set(QUANT_DEFINITIONS)
    for op, args in calls:
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
        for a, b in zip(_tensors(fake), _tensors(real), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_rows_and_their_scales() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -448.0], [1e-3, 2e-3]])
    values, scale = ops.quantize_rows(x)
    assert values.dtype == FP8 and scale.shape == (3, 1) and scale.dtype == torch.float32
    assert values[1].float().tolist() == [1.0, -448.0] and values[2].float().tolist() == [224.0, 448.0]
    assert (values.float() * scale - x).abs().max() <= 1.0 / 16


def test_scaled_linear_is_the_product_of_what_was_quantized() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 32), torch.randn(16, 32), torch.randn(16)
    (xq, xs), (wq, ws) = ops.quantize_rows(x), ops.quantize_rows(weight)
    expected = (xq.float() * xs) @ (wq.float() * ws).t() + bias
    result = ops.scaled_linear(xq, xs, wq, ws.squeeze(1), bias, torch.float32)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert ops.scaled_linear(xq, xs, wq, ws.squeeze(1), None, torch.bfloat16).dtype == torch.bfloat16


def test_fused_operators_are_their_parts() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(16)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6, 0.0, True)
    fused = ops.add_rms_norm_quantize(x, residual, weight, 1e-6, 0.0, True)
    alone = ops.rms_norm_quantize(total, weight, 1e-6, 0.0, True)
    gated = ops.glu_quantize(x, "silu")
    for got, expected in (
        (fused, (*ops.quantize_rows(normed), total)),
        (alone, ops.quantize_rows(normed)),
        (gated, ops.quantize_rows(ops.glu(x, "silu"))),
    ):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, expected, strict=True))


def test_a_cache_of_fp8_saturates() -> None:
    assert saturate(torch.tensor([1e6, -500.0, 1.0]), FP8).float().tolist() == [448.0, -448.0, 1.0]
    assert saturate(torch.tensor([1e6]), torch.bfloat16).dtype == torch.bfloat16
