"""Mixed precision: the greedy choice on given numbers, and budgets of bits and of divergence on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from calibration_cases import data, plan_of, traced
from camshaft.graph.linear_format import LinearFormat
from camshaft.passes.quantization.calibrator import Calibrator
from camshaft.passes.quantization.recipe import Recipe
from camshaft.passes.quantization.sensitivity import Choice, upgrades
from torch import fx

INT4, INT8 = LinearFormat.parse("int4:g32/none"), LinearFormat.parse("int8/none")
CALIBRATOR = Calibrator(data(), torch.device("cpu"))


def test_steps_are_taken_in_the_order_of_what_a_bit_gains() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    options = {
        a: [
            Choice(format=INT4, bits=400, error=0.1),
            Choice(format=INT8, bits=800, error=0.01),
            Choice(format=None, bits=1600, error=0),
        ],
        b: [
            Choice(format=INT4, bits=400, error=0.5),
            Choice(format=INT8, bits=800, error=0.45),  # above the line from int4 to none: never a step
            Choice(format=None, bits=1600, error=0),
        ],
    }
    start, steps = upgrades(options)
    assert {choice.format for choice in start.values()} == {INT4}
    assert [(step.layer, step.choice.format) for step in steps] == [(b, None), (a, INT8), (a, None)]


def test_a_budget_of_bits_is_kept() -> None:
    program = traced()
    recipe = Recipe(format=INT4, alternatives=(INT8,), max_bits=7.0)
    plan = plan_of(program, recipe)
    chosen = CALIBRATOR.assign(program, plan, recipe)
    total = bits = 0.0
    for layer, item in plan.items():
        rows, columns = program.weights[item.weight].shape
        format = chosen[layer].format if layer in chosen else None
        total += rows * columns
        bits += rows * columns * (32.0 if format is None else format.bits)
    assert 6.0 < bits / total <= 7.0
    assert {str(item.format) for item in chosen.values()} == {"int4:g32/none", "int8/none"}
    with pytest.raises(ValueError, match=r"max_bits is 3 .* take 5\.000"):
        CALIBRATOR.assign(program, plan, replace(recipe, max_bits=3.0))


def test_a_budget_of_activation_bits_is_kept() -> None:
    program = traced()
    fp4, fp8 = LinearFormat.parse("nvfp4/nvfp4"), LinearFormat.parse("nvfp4/fp8")
    recipe = Recipe(format=fp4, alternatives=(fp8,), max_activation_bits=6.0)
    plan = plan_of(program, recipe)
    chosen = CALIBRATOR.assign(program, plan, recipe)
    assert recipe.calibrated and chosen.keys() == plan.keys()  # no layer is left as it is
    sizes = {layer: math.prod(program.weights[item.weight].shape) for layer, item in chosen.items()}
    bits = sum(sizes[layer] * (4.5 if item.format == fp4 else 8) for layer, item in chosen.items())
    assert 5.0 < bits / sum(sizes.values()) <= 6.0
    assert {
        item.format for item in CALIBRATOR.assign(program, plan, replace(recipe, max_activation_bits=8.0)).values()
    } == {fp8}
    with pytest.raises(ValueError, match=r"max_activation_bits is 4 .* take 4\.500"):
        CALIBRATOR.assign(program, plan, replace(recipe, max_activation_bits=4.0))
    with pytest.raises(ValueError, match="max_bits and max_activation_bits are given"):
        replace(recipe, max_bits=5.0)


def test_a_budget_of_divergence_takes_the_fewest_steps() -> None:
    program = traced()
    recipe = Recipe(format=INT4, alternatives=(INT8,), max_error=1e9)
    plan = plan_of(program, recipe)
    assert all(item.format == INT4 for item in CALIBRATOR.assign(program, plan, recipe).values())
    assert len(CALIBRATOR.assign(program, plan, replace(recipe, max_error=1e-12))) < len(plan)
    middle = CALIBRATOR.assign(program, plan, replace(recipe, max_error=0.02))
    assert any(item.format == INT8 for item in middle.values()) or len(middle) < len(plan)
