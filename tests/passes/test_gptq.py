"""GPTQ against the algorithm written out, column by column, and against rounding to nearest, in every format and order."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import QuantizedWeight, dequantize_weight, quantize_weight
from camshaft.passes.quantization.gptq import corrected, gptq, output_error
from camshaft.passes.quantization.grid import Grid
from torch import Tensor

FORMATS = (
    "int4:g32/none", "int4:g32:zp/none", "int8/int8", "int8:g32:zp/none", "fp8/fp8", "fp8:tensor/fp8_static",
    "fp8:block128/fp8_block", "nvfp4/nvfp4", "mxfp4/none", "mxfp8/none",
)  # fmt: skip


def _case(rows: int = 48, dim: int = 128) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, dim, generator=generator) * 0.05
    x = torch.randn(1024, dim, generator=generator)
    mixed = x @ (torch.eye(dim) + torch.randn(dim, dim, generator=generator) * 0.1)
    mixed[:, 5] *= 6
    return weight, mixed.t() @ mixed / 1024


def _by_hand(weight: Tensor, hessian: Tensor, grid: Grid, order: list[int], damp: float) -> Tensor:
    """Solves for the best update of all columns left, after each column (Optimal Brain Quantization, equation 3 of the paper)."""
    work, left = weight.double().clone(), list(order)
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        first = left[0]
        rounded = grid.round(work[:, first].float(), first).double()
        step = (work[:, first] - rounded) / inverse[0, 0]
        work[:, left] -= step[:, None] * inverse[0]
        work[:, first] = rounded
        left = left[1:]
    return work.float()


@pytest.mark.parametrize("act_order", ["none", "static"])
def test_it_is_the_algorithm_written_out(act_order: str) -> None:
    format = LinearFormat.parse("int8/none")  # one scale a row: the grid is known beforehand in any order
    weight, hessian = _case(16, 32)
    order = (
        list(range(32)) if act_order == "none" else hessian.diagonal().argsort(descending=True, stable=True).tolist()
    )
    grid = Grid.of(weight, format, hessian.diagonal())
    expected = _by_hand(weight, hessian, grid, order, 0.01)
    found = gptq(weight, hessian, format, block=8, act_order=act_order)  # type: ignore[arg-type]
    actual = dequantize_weight(found.parts, format)
    step = grid.scale
    # float32 against float64: a value at the middle of two steps may fall to either side
    assert ((actual - expected).abs() < 0.5 * step).float().mean() > 0.98


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("act_order", ["none", "static", "gather"])
def test_it_beats_rounding_to_nearest(format: str, act_order: str) -> None:
    parsed = LinearFormat.parse(format)
    weight, hessian = _case()
    kept = hessian.clone()
    nearest = dequantize_weight(quantize_weight(weight, parsed, candidates=16), parsed)
    found = gptq(weight, hessian, parsed, act_order=act_order)  # type: ignore[arg-type]
    dense = dequantize_weight(found.parts, parsed)
    if found.order is not None:
        dense = torch.empty_like(dense).index_copy_(1, found.order, dense)
    assert output_error(weight, dense, hessian) < 0.75 * output_error(weight, nearest, hessian)
    assert torch.equal(hessian, kept)


def test_the_size_of_blocks_does_not_matter() -> None:
    weight, hessian = _case()
    format = LinearFormat.parse("int4:g32/none")
    small, large = (gptq(weight, hessian, format, block=block).parts.values for block in (32, 128))
    assert (small != large).float().mean() < 0.02


def test_inputs_that_are_always_zero_do_not_hinder() -> None:
    weight, hessian = _case()
    hessian[7], hessian[:, 7] = 0, 0
    format = LinearFormat.parse("int4:g32/none")
    found = gptq(weight, hessian, format, act_order="static")
    assert not dequantize_weight(found.parts, format)[:, 7].any()


def test_moments_of_few_tokens_are_damped() -> None:
    weight, _ = _case()
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    found = gptq(weight, x.t() @ x / 4, LinearFormat.parse("int4:g32/none"))
    assert torch.isfinite(found.parts.scale).all()
    with pytest.raises(ValueError, match="q_proj: .* no Cholesky factor"):
        gptq(weight, torch.full((128, 128), float("nan")), LinearFormat.parse("int4:g32/none"), name="q_proj")


def test_correction_fits_the_output_of_the_original_inputs() -> None:
    weight, hessian = _case()
    torch.testing.assert_close(corrected(weight, hessian, hessian), weight, atol=1e-5, rtol=1e-4)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2048, 128, generator=generator)
    q = x + 0.3 * torch.randn(2048, 128, generator=generator) + 0.2 * x.roll(1, 1)
    fitted = corrected(weight, q.t() @ q / 2048, x.t() @ q / 2048)
    expected = x @ weight.t()
    assert (q @ fitted.t() - expected).norm() < 0.95 * (q @ weight.t() - expected).norm()


@pytest.mark.parametrize("format", ["int4:g32:zp/none", "int8/int8", "fp8/fp8", "nvfp4/none"])
def test_sweeps_lower_the_loss(format: str) -> None:
    parsed = LinearFormat.parse(format)
    weight, hessian = _case()
    losses = [
        output_error(weight, dequantize_weight(gptq(weight, hessian, parsed, sweeps=sweeps).parts, parsed), hessian)
        for sweeps in (0, 1, 3)
    ]
    assert losses[2] <= losses[1] * 1.001 and losses[1] < 0.97 * losses[0]


def test_fitted_scales_are_the_least_squares_ones() -> None:
    """Values as they are: no other scale of a group is better."""
    format = LinearFormat.parse("int4:g32:zp/none")
    weight, hessian = _case(8)
    parts = gptq(weight, hessian, format, sweeps=2).parts
    least = output_error(weight, dequantize_weight(parts, format), hessian)
    for factor in (0.99, 1.01):
        scale = parts.scale.clone()
        scale[3, 2] *= factor
        other = QuantizedWeight(parts.values, scale, parts.zero_point)
        assert output_error(weight, dequantize_weight(other, format), hessian) > least


@pytest.mark.parametrize("act_order", ["none", "static"])
@pytest.mark.parametrize("format", ["int4:g32:zp/none", "nvfp4/none", "mxfp4/none"])
def test_a_sweep_over_groups_raises_the_loss_of_no_row(format: str, act_order: str) -> None:
    """Rows are problems of their own; what is stored must have the scales that were found, not those before."""
    parsed = LinearFormat.parse(format)
    weight, hessian = _case()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    losses = []
    for sweeps in (0, 1):
        parts = gptq(weight, hessian, parsed, sweeps=sweeps, act_order=act_order).parts  # type: ignore[arg-type]
        difference = dequantize_weight(parts, parsed) - weight
        losses.append(((difference @ damped) * difference).sum(1))
    assert (losses[1] <= losses[0] * 1.0001).all() and losses[1].sum() < 0.97 * losses[0].sum()


def test_a_group_keeps_what_no_candidate_beats() -> None:
    format = LinearFormat.parse("nvfp4/none")
    weight, hessian = _case()
    grid = Grid.of(weight, format)
    current = dequantize_weight(grid.parts, format)[:, 16:32]
    before = grid.parts.scale.view(torch.uint8).clone()
    own = hessian[16:32, 16:32]
    factor = torch.linalg.cholesky(torch.linalg.inv(own), upper=True)
    assert torch.equal(grid.improve(current, current.clone(), 16, own, factor), current)
    assert torch.equal(grid.parts.scale.view(torch.uint8), before)
