"""Formats of linear layers: text, shapes, round trips, and the operator against a naive product."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph import ops as _ops  # noqa: F401  registers the operator
from camshaft.graph.linear_format import LinearFormat, part_shapes
from camshaft.graph.quant_formats import dequantize_weight, quantize_weight
from camshaft.graph.quantized_linear import SEARCH_FACTORS, quantize_activations
from camshaft.graph.small_floats import (
    ceil_e8m0,
    decode_e8m0,
    e2m1_codes,
    floor_e8m0,
    pack_halves,
    quotient,
    round_to_e2m1,
)

# relative error of normally distributed weights [96, 512] after max-abs scales, at most
ERRORS = {
    "int8/none": 0.008, "int8/int8": 0.008, "int8:g64/none": 0.0065, "int8:g64:zp/int8": 0.006, "int4:g128/none": 0.12,
    "int4:g64:zp/none": 0.1, "int4/int8_static": 0.13, "fp8/fp8": 0.028, "fp8:tensor/fp8_static": 0.028,
    "fp8:block128/fp8_block": 0.028, "fp8:g128/none": 0.027, "nvfp4/nvfp4": 0.1, "mxfp4/mxfp4": 0.12, "mxfp8/mxfp8": 0.028,
    "nvfp4/nvfp4_search": 0.1, "int4:g128/fp8": 0.12,
}  # fmt: skip


def _weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(96, 512, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("text", ERRORS)
def test_round_trip_of_weights(text: str) -> None:
    format, weight = LinearFormat.parse(text), _weight()
    assert str(format) == text
    errors = []
    for candidates in (1, 8):
        parts = quantize_weight(weight, format, candidates=candidates)
        for name, (shape, dtype) in part_shapes(format, (96, 512)).items():
            tensor = getattr(parts, name)
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        restored = dequantize_weight(parts, format)
        errors.append(float((restored - weight).norm() / weight.norm()))
        again = dequantize_weight(quantize_weight(restored, format), format)
        if candidates == 1 and not format.zero_point and format.weights not in ("int4", "mxfp4"):
            torch.testing.assert_close(
                again, restored, rtol=0.02, atol=1e-6
            )  # scales of rounded weights may round again
    assert errors[0] <= ERRORS[text] and errors[1] <= errors[0] * (1 + 1e-6)


@pytest.mark.parametrize("text", ERRORS)
def test_operator_against_a_naive_product(text: str) -> None:
    format = LinearFormat.parse(text)
    parts = quantize_weight(_weight(), format)
    x = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(1))
    bias, x_scale = torch.randn(96), torch.tensor(0.03) if "static" in text else None
    args = (parts.values, parts.scale, parts.zero_point, parts.global_scale, bias, x_scale, text)
    found = torch.ops.camshaft.quantized_linear(x, *args)
    values, scale = quantize_activations(x, format, x_scale)
    rounded = values if scale is None else values * scale
    expected = rounded.double() @ dequantize_weight(parts, format).double().t() + bias
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)
    half = torch.ops.camshaft.quantized_linear(x.bfloat16(), *args)
    assert half.dtype == torch.bfloat16 and half.shape == (2, 5, 96)
    for row in range(5):  # a token's result does not depend on the others
        alone = torch.ops.camshaft.quantized_linear(x[:, row : row + 1], *args)
        torch.testing.assert_close(alone, found[:, row : row + 1], rtol=1e-5, atol=1e-5)


def test_integer_sums_are_exact() -> None:
    weight, x = torch.full((16, 4096), 127, dtype=torch.int8), torch.full((1, 4096), 127.0)
    found = torch.ops.camshaft.quantized_linear(x, weight, torch.ones(16), None, None, None, None, "int8/int8")
    assert found.tolist() == [[127.0 * 127.0 * 4096.0] * 16]


def test_e2m1_rounds_to_the_nearest_and_to_even() -> None:
    x = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 2.51, 3.5, 5.0, 5.01, 100.0, -0.75, -7.0])
    expected = [0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0, -1.0, -6.0]
    assert round_to_e2m1(x).tolist() == expected
    codes = e2m1_codes(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -6.0]))
    assert codes.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 15]
    assert pack_halves(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    assert round_to_e2m1(torch.tensor([float("nan")])).isnan().all()


def test_e8m0() -> None:
    amax = torch.tensor([0.0, 1.0, 6.0, 448.0, 449.0, float("inf"), float("nan")])
    assert floor_e8m0(amax, 8).tolist() == [0, 119, 121, 127, 127, 255, 255]
    assert ceil_e8m0(amax, 448.0).tolist() == [0, 119, 121, 127, 128, 255, 255]
    decoded = decode_e8m0(torch.tensor([0, 1, 127, 130, 255], dtype=torch.uint8))
    assert decoded[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 8.0] and decoded[4].isnan()


@pytest.mark.parametrize(
    "text",
    ["fp8/fp8", "int8/int8", "fp8:block128/fp8_block", "nvfp4/nvfp4", "nvfp4/nvfp4_search", "mxfp4/mxfp4", "mxfp8/mxfp8"],
)  # fmt: skip
def test_nan_and_zero_rows(text: str) -> None:
    format = LinearFormat.parse(text)
    x = torch.zeros(3, 128)
    x[1, 5] = float("nan")
    parts = quantize_weight(torch.zeros(16, 128), format)
    out = torch.ops.camshaft.quantized_linear(x, parts.values, parts.scale, None, parts.global_scale, None, None, text)
    assert out[0].eq(0).all() and out[2].eq(0).all() and out[1].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_searched_nvfp4_activations_lose_least(scale: float) -> None:
    """Each block is e2m1 numbers times an e4m3 scale, loses no more than with the scale of its largest number, and less in all."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) * scale
    values, token = quantize_activations(x, LinearFormat.parse("nvfp4/nvfp4_search"))
    assert token is not None and torch.equal(token, quotient(x.abs().amax(-1, keepdim=True), 6.0 * 280))
    blocks, exact = values.unflatten(-1, (-1, 16)), (x / token).unflatten(-1, (-1, 16))
    largest = exact.abs().amax(-1, keepdim=True)
    scales = [quotient(largest * f, 6.0).to(torch.float8_e4m3fn).float() for f in SEARCH_FACTORS]
    errors = torch.stack([(round_to_e2m1(exact / s) * s - exact).square().sum(-1) for s in scales])
    found = (blocks - exact).square().sum(-1)
    assert torch.stack([(round_to_e2m1(blocks / s) * s == blocks).all(-1) for s in scales]).any(0).all()
    assert (found <= 1.05 * errors[0]).all()  # errors are counted in steps of 1/1024 of the largest number
    assert found.sum() < 0.8 * errors[0].sum() and found.sum() < 1.01 * errors.amin(0).sum()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3/none", "weights are 'int3'; allowed: fp8, int8"),
        ("int4/fp16", "activations are 'fp16'; allowed: none"),
        ("nvfp4:g32/none", "nvfp4 has groups of 16, and group is 32"),
        ("int8:tensor/none", "for fp8, not int8"),
        ("int4:block128/none", "blocks are 128 x 128 of fp8"),
        ("fp8:zp/none", "fp8 has no zero point"),
        ("int4", "is not WEIGHTS"),
    ],
)
def test_what_is_no_format(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearFormat.parse(text)


def test_groups_and_scales_that_are_missing() -> None:
    with pytest.raises(ValueError, match=r"16 x 96, and groups of 128 .* do not divide its 96 columns"):
        quantize_weight(torch.ones(16, 96), LinearFormat.parse("int4:g128/none"))
    with pytest.raises(ValueError, match="needs x_scale"):
        quantize_activations(torch.ones(1, 16), LinearFormat.parse("fp8:tensor/fp8_static"))


def test_blocks_at_the_edges() -> None:
    format = LinearFormat.parse("fp8:block128/fp8_block")
    weight = torch.randn(200, 208, generator=torch.Generator().manual_seed(0))
    parts = quantize_weight(weight, format, candidates=4)
    assert parts.scale.shape == (2, 2)
    assert float((dequantize_weight(parts, format) - weight).norm() / weight.norm()) < 0.03
