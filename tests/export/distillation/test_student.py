"""The student's graph: the model itself without rounding, and with it what the build's passes make of the model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from camshaft.export.distillation.checkpoint import read_parameters
from camshaft.export.distillation.student import CacheRounding, ProgramModel, plan_student
from camshaft.export.distillation.update import feature_error
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.numerics import run_program
from camshaft.graph.program import Program
from camshaft.models.huggingface import open_model, trace_decoder
from camshaft.passes import quantize_fp8
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import canonicalize_passes, fuse_passes, quantize_passes
from camshaft.passes.quantization.recipe import Recipe
from families import random_model, tiny_config

CPU = torch.device("cpu")
TOKENS = torch.arange(48)[None] * 7 % 128


@cache
def opened(family: str) -> tuple[Any, Program]:
    """A model and its program, canonical and fused; neither is to be changed."""
    model = random_model(tiny_config(family))
    return model, PassManager([*canonicalize_passes(), *fuse_passes()]).run(
        trace_decoder(open_model(model, torch.float32))
    )


def student_of(model: Any, program: Program, recipe: Recipe | None, cache: CacheRounding | None = None) -> ProgramModel:
    found = read_parameters(model, program, CPU)
    return ProgramModel(program, found.student, found.stored, CPU, plan_student(program, recipe, cache))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_without_rounding_it_is_the_model(family: str) -> None:
    model, program = opened(family)
    rows = torch.stack([TOKENS[0], TOKENS[0].flip(0)])
    with torch.no_grad():
        expected = model(rows).logits
        logits = student_of(model, program, None)(rows)[0].view_as(expected)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()  # float32, sums in another order


@pytest.mark.parametrize("text", ["nvfp4/nvfp4", "int4:g32/fp8", "fp8/fp8", "int8/int8"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # with biases and joined weights; with transposed weights
def test_with_rounding_it_is_the_quantized_program(family: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)
    model, program = opened(family)
    recipe = Recipe(format=LinearFormat.parse(text))
    quantized = PassManager(quantize_passes(recipe)).run(program)
    with torch.no_grad():
        expected = run_program(quantized, {"token_ids": TOKENS, "positions": torch.arange(48)[None]})[0][0]
        student = student_of(model, program, recipe)
        plain = student_of(model, program, None)(TOKENS)[0]
        logits = student(TOKENS)[0]
    # float32: a sum in another order moves a few inputs over the middle between two steps, which later tokens see
    assert (logits - expected).abs().mean() < 0.1 * (plain - expected).abs().mean()
    assert len(student.plan.layers) == quantized.history[-3].num_matches


def test_gradients_reach_every_parameter_and_tied_ones_once() -> None:
    model, program = opened("gemma2")  # its head is its embedding
    found = read_parameters(model, program, CPU)
    assert (
        len(found.trained)
        == len(dict(model.named_parameters()))
        < len(dict(model.named_parameters(remove_duplicate=False)))
    )
    plan = plan_student(program, Recipe.named("nvfp4"), CacheRounding(torch.float8_e4m3fn, True))
    ProgramModel(program, found.student, found.stored, CPU, plan)(TOKENS)[0].square().mean().backward()
    for name, parameter in found.trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_an_fp8_cache_and_its_centred_keys() -> None:
    model, program = opened("llama")
    with torch.no_grad():
        plain = student_of(model, program, None)(TOKENS)[0]
        rounded = student_of(model, program, None, CacheRounding(torch.float8_e4m3fn, False))(TOKENS)[0]
        centred = student_of(model, program, None, CacheRounding(torch.float8_e4m3fn, True))(TOKENS)[0]
    for logits in (rounded, centred):
        assert 0 < (logits - plain).abs().max() < 0.1 * plain.abs().max()
    assert not torch.equal(rounded, centred)


def test_weights_are_rounded_to_what_the_checkpoint_stores() -> None:
    model, program = opened("llama")
    found = read_parameters(copy.deepcopy(model).bfloat16(), program, CPU)
    assert set(found.stored.values()) == {torch.bfloat16}
    with torch.no_grad():
        expected = ProgramModel(program, found.teacher, {}, CPU)(TOKENS)[0]
        for parameter in found.trained.values():
            parameter.mul_(1 + 2**-10)  # less than half a step of bfloat16
        student = ProgramModel(program, found.student, found.stored, CPU)
        assert torch.equal(student(TOKENS)[0], expected)


def test_what_layers_read_is_seen() -> None:
    model, program = opened("llama")
    student = student_of(model, program, Recipe.named("nvfp4"))
    watched = student.plan.layers.keys()
    with torch.no_grad():
        _, inputs = student(TOKENS, watched)
        _, wanted = student_of(model, program, None)(TOKENS, watched)
    assert [x.shape[-1] for x in inputs] == [64, 64, 64, 96] * 2
    assert torch.equal(inputs[0], wanted[0])  # nothing was rounded before the first layer
    errors = [float(feature_error([x], [y])) for x, y in zip(inputs, wanted)]
    assert errors[0] == 0 and 0 < errors[1] < 0.2
    assert float(feature_error(inputs, wanted)) == pytest.approx(sum(errors) / len(errors))
