"""AWQ and SmoothQuant against the formulas written out, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import dequantize_weight, quantize_weight
from camshaft.passes.quantization.awq import clip, group_moments, search_scale
from camshaft.passes.quantization.channels import tied, untied
from camshaft.passes.quantization.smoothquant import smoothing_scale
from camshaft.passes.quantization.statistics import InputStatistics
from torch import Tensor

INT4 = LinearFormat.parse("int4:g32:zp/none")


def _case() -> tuple[Tensor, Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator) * 0.05
    x = torch.randn(512, 64, generator=generator)
    x[:, ::8] *= 12
    return weight, x, InputStatistics.of([x], moment=True)


def test_the_search_measures_the_error_of_the_output() -> None:
    weight, x, statistics = _case()
    found = search_scale([weight], statistics, INT4)
    assert found.scale is not None
    expected = x @ weight.t()
    restored = dequantize_weight(quantize_weight(weight * found.scale, INT4), INT4) / found.scale
    error = (x @ restored.t() - expected).square().sum() / expected.square().sum()
    assert found.error == pytest.approx(float(error), rel=1e-3)
    plain = dequantize_weight(quantize_weight(weight, INT4), INT4)
    assert found.plain_error == pytest.approx(
        float((x @ plain.t() - expected).square().sum() / expected.square().sum()), rel=1e-3
    )
    assert found.error < 0.7 * found.plain_error


def test_layers_that_read_one_input_share_a_scale() -> None:
    weight, _, statistics = _case()
    both = search_scale([weight, weight * 3], statistics, INT4)
    assert both.scale is not None and both.error <= both.plain_error


def test_clipping_weighs_the_parts_of_the_output() -> None:
    weight, x, statistics = _case()
    moment = statistics.require_moment("x")
    blocks = group_moments(moment, INT4, 64)
    torch.testing.assert_close(blocks[1], moment[32:, 32:])
    clipped, nearest = clip(weight, moment, INT4), quantize_weight(weight, INT4)

    def parts_error(dense: Tensor) -> float:
        return sum(float((x[:, g] @ (dense - weight)[:, g].t()).square().sum()) for g in (slice(0, 32), slice(32, 64)))

    assert parts_error(dequantize_weight(clipped, INT4)) <= parts_error(dequantize_weight(nearest, INT4))


def test_a_search_without_moments_is_refused() -> None:
    weight, x, _ = _case()
    with pytest.raises(ValueError, match="statistics of q_proj hold no second moments"):
        search_scale([weight], InputStatistics.of([x]), INT4, name="q_proj")


def test_smoothing_is_the_papers_formula() -> None:
    weight, _, statistics = _case()
    scale = smoothing_scale(statistics.amax, [weight, weight * 2], 0.5)
    expected = (statistics.amax / (2 * weight.abs().amax(0))).sqrt()
    torch.testing.assert_close(scale / scale[0], expected / expected[0])
    with pytest.raises(ValueError, match="alpha is 2"):
        smoothing_scale(statistics.amax, [weight], 2.0)


def test_smoothing_lowers_the_error_of_int8() -> None:
    weight, x, statistics = _case()
    format = LinearFormat.parse("int8/int8")
    from camshaft.graph.quantized_linear import quantized_linear

    def error(scale: Tensor) -> float:
        parts = quantize_weight(weight * scale, format)
        y = quantized_linear(x / scale, parts.values, parts.scale, None, None, None, None, str(format))
        return float((y - x @ weight.t()).square().sum())

    assert error(smoothing_scale(statistics.amax, [weight])) < error(torch.ones(64))


def test_copies_of_a_value_channel_get_one_scale() -> None:
    heads = (2, 3, 4)  # key/value heads, query heads for each, size
    scale = torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.5
    assert untied(scale, heads) is None
    rows = untied(tied(scale, heads), heads)
    assert rows is not None and rows.shape == (8,)
    torch.testing.assert_close(rows.view(2, 4), scale.view(heads).log().mean(1).exp())
