"""scale_kv_cache: outputs stay, keys and values fill the range of int8, and factors cost nothing where rows can be scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_cases import data, traced
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.numerics import run_program
from camshaft.graph.program import Program
from camshaft.models.huggingface import open_model, trace_decoder
from camshaft.passes.manager import PassManager
from camshaft.passes.match import is_call
from camshaft.passes.pipeline import canonicalize_passes, fuse_passes, quantize_passes
from camshaft.passes.quantization.calibrator import Calibrator
from camshaft.passes.quantization.recipe import Recipe
from camshaft.passes.resolve_masks import ATTENTION
from camshaft.passes.scale_kv_cache import LIMIT, ScaleKVCache
from families import random_model
from torch import Tensor

INPUTS = {"token_ids": torch.arange(40)[None] * 3 % 128, "positions": torch.arange(40)[None]}
MUL = torch.ops.aten.mul.Tensor
CPU = torch.device("cpu")


def _observer() -> Calibrator:
    return Calibrator(data(), CPU)


def _ranges(program: Program) -> list[tuple[Tensor, Tensor]]:
    """(largest size of each channel of the keys [G, D], largest value) of each attention, on the calibration tokens."""
    nodes = [node for node in program.graph.nodes if is_call(node, ATTENTION)]
    operands: Any = {operand for node in nodes for operand in node.args[1:3]}
    found = {
        node: torch.cat([piece.abs() for piece in pieces], 2).amax((0, 2))
        for node, pieces in _observer().values_of(program, operands)
    }
    return [(found[node.args[1]], found[node.args[2]].amax()) for node in nodes]  # type: ignore[index]


def _check(program: Program, *, products: int) -> None:
    scaled = ScaleKVCache(_observer())(program)
    assert scaled.num_matches == 2
    assert scaled.program.count(MUL) - program.count(MUL) == products
    before, after = (run_program(p, INPUTS)[0] for p in (program, scaled.program))
    assert (before - after).abs().max() < 1e-5 * before.abs().max()  # float32
    for keys, value in _ranges(scaled.program):
        assert keys.max() <= LIMIT and keys.min() > LIMIT / 8  # powers of two, and norms of pairs
        assert value == pytest.approx(LIMIT)


def test_factors_go_into_dense_weights() -> None:
    _check(traced(), products=0)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_factors_go_into_the_scales_of_quantized_weights(name: str) -> None:
    recipe = Recipe.named(name) if name != "int4" else Recipe.named(name, group=32)
    _check(PassManager(quantize_passes(recipe)).run(traced()), products=0)


def test_static_scales_of_inputs_keep_the_output_as_it_was() -> None:
    recipe = Recipe(format=LinearFormat.parse("int8/int8_static"))
    _check(PassManager(quantize_passes(recipe, _observer())).run(traced()), products=2)


def test_normalized_and_partly_turned_keys() -> None:
    """Norms of heads share a weight: factors stay products, in front of rope."""
    import transformers

    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip
    qwen = random_model(transformers.Qwen3Config(**sizes, head_dim=16))
    phi = random_model(transformers.PhiConfig(**{**sizes, "num_key_value_heads": 4}, partial_rotary_factor=0.5))
    for model, products in ((qwen, 4), (phi, None)):
        program = PassManager([*canonicalize_passes(), *fuse_passes()]).run(
            trace_decoder(open_model(model, torch.float32))
        )
        scaled = ScaleKVCache(_observer())(program).program
        before, after = (run_program(p, INPUTS)[0] for p in (program, scaled))
        assert (before - after).abs().max() < 1e-5 * before.abs().max()
        assert products is None or scaled.count(MUL) - program.count(MUL) == products
        for keys, _ in _ranges(scaled):
            assert LIMIT / 8 < keys.max() <= LIMIT


def test_it_needs_data() -> None:
    with pytest.raises(ValueError, match="int8 KV cache needs calibration data"):
        ScaleKVCache(None)(traced())
