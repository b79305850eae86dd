"""Rounding of a student: to the last bit what a build stores and its operators compute; gradients as if there were none."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.distillation.rounding import (
    WeightRounding,
    cast_through,
    round_cache,
    round_input,
)
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import dequantize_weight, quantize_weight
from camshaft.graph.quantized_linear import quantize_activations

FORMATS = (
    "nvfp4/nvfp4", "int4:g32/none", "int4:g64:zp/none", "int4/fp8", "int8/int8", "int8:g32:zp/none", "fp8/fp8", "fp8:tensor/none",
    "fp8:block128/fp8_block", "mxfp4/mxfp4", "mxfp8/mxfp8",
)  # fmt: skip


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(160, 192, generator=generator) * torch.linspace(0.01, 3, 160)[:, None]
    made[3], made[5, :64] = 0, 0  # rows and groups of zeros
    return made.to(dtype)


@pytest.mark.parametrize("candidates", [1, 8])
@pytest.mark.parametrize("text", FORMATS)
def test_a_weight_is_what_a_build_stores(text: str, candidates: int) -> None:
    format = LinearFormat.parse(text)
    stored = dequantize_weight(quantize_weight(weight(), format, candidates=candidates), format)
    leaf = weight().requires_grad_()
    rounded = WeightRounding(format, candidates)(leaf)
    assert torch.equal(rounded, stored)
    factor = torch.arange(rounded.numel()).view_as(rounded).float()
    (rounded * factor).sum().backward()
    assert torch.equal(leaf.grad, factor)


def test_scales_stay_until_they_are_searched_for() -> None:
    format = LinearFormat.parse("int4:g32/none")
    rounding = WeightRounding(format, 8)
    rounding(weight())
    larger = 2 * weight()
    exact = dequantize_weight(quantize_weight(larger, format, candidates=8), format)
    assert not torch.equal(rounding(larger), exact)  # with the scales of the weight before
    rounding.search(larger)
    assert torch.equal(rounding(larger), exact)


def test_a_bfloat16_weight_is_rounded_from_its_own_values() -> None:
    format = LinearFormat.parse("nvfp4/none")
    short = weight(torch.bfloat16)
    stored = dequantize_weight(quantize_weight(short, format, candidates=8), format)
    assert torch.equal(WeightRounding(format, 8)(short), stored)


@pytest.mark.parametrize("kind", ["none", "fp8", "fp8_block", "int8", "nvfp4", "nvfp4_search", "mxfp4", "mxfp8"])
def test_inputs_are_what_operators_round_to(kind: str) -> None:
    format = LinearFormat(weights="fp8", activations=kind)  # type: ignore[arg-type]
    leaf = weight().requires_grad_()
    rounded = round_input(leaf, format)
    values, scale = quantize_activations(weight(), format)
    assert torch.equal(rounded, values if scale is None else values * scale)
    rounded.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_caches_saturate_and_casts_round() -> None:
    leaf = torch.tensor([500.0, 1.03, -900.0], requires_grad=True)
    rounded = round_cache(leaf, torch.float8_e4m3fn)
    assert rounded.tolist() == [448.0, 1.0, -448.0]
    rounded.sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [1.0, 1.0, 1.0]
    assert cast_through(leaf, torch.bfloat16).tolist() == leaf.detach().bfloat16().float().tolist()
    assert cast_through(leaf, torch.float32) is leaf
