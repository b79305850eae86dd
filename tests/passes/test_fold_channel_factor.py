"""fold_channel_factor: factors go into norms, gates and values; the model's outputs stay; what cannot take them keeps them."""

from __future__ import annotations

import pytest
import torch
from calibration_cases import data, traced
from camshaft.graph.numerics import run_program
from camshaft.passes.fold_channel_factor import FoldChannelFactor
from camshaft.passes.quantization.calibrator import Calibrator
from camshaft.passes.quantization.recipe import Recipe
from camshaft.passes.quantize_linear import QuantizeLinear
from torch import Tensor

INPUTS = {"token_ids": torch.arange(40)[None] * 3 % 128, "positions": torch.arange(40)[None]}
MUL = torch.ops.aten.mul.Tensor


def _close(before: Tensor, after: Tensor) -> None:
    # float32; a value near the middle of two steps of int8 may fall to either side
    assert (before - after).abs().max() < 0.02 * before.abs().max()
    assert (before - after).norm() < 2e-3 * before.norm()


@pytest.mark.parametrize("name", ["int4_awq", "int8_smoothquant"])
def test_factors_become_part_of_what_makes_the_input(name: str) -> None:
    recipe = Recipe.named(name, group=32) if name == "int4_awq" else Recipe.named(name)
    quantized = QuantizeLinear(recipe, Calibrator(data(), torch.device("cpu")))(traced()).program
    factors = quantized.count(MUL)
    assert factors >= 6
    folded = FoldChannelFactor()(quantized)
    assert folded.num_matches == factors and folded.program.count(MUL) == 0
    _close(run_program(quantized, INPUTS)[0], run_program(folded.program, INPUTS)[0])
    again = FoldChannelFactor()(folded.program)
    assert again.num_matches == 0


def test_rows_that_cannot_be_scaled_keep_the_multiplication() -> None:
    recipe = Recipe.named("nvfp4_gptq")
    import dataclasses

    awq = dataclasses.replace(recipe, algorithm="awq")
    quantized = QuantizeLinear(awq, Calibrator(data(), torch.device("cpu")))(traced()).program
    folded = FoldChannelFactor()(quantized)
    norms = sum("norm" in str(node.target) for node in quantized.graph.nodes) - 1
    assert folded.num_matches <= norms and folded.program.count(MUL) == quantized.count(MUL) - folded.num_matches
    _close(run_program(quantized, INPUTS)[0], run_program(folded.program, INPUTS)[0])


def test_a_program_without_factors_stays_as_it_is() -> None:
    assert FoldChannelFactor()(traced()).num_matches == 0
