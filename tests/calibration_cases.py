"""A tiny decoder, canonical and fused, and calibration data for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from camshaft.graph.program import Program
from camshaft.models.huggingface import open_model, trace_decoder
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import canonicalize_passes, fuse_passes
from camshaft.passes.quantization.algorithm import LayerPlan
from camshaft.passes.quantization.calibration import CalibrationData, linear_layers
from camshaft.passes.quantization.recipe import Recipe
from families import random_model
from torch import fx


@cache
def tiny_model() -> Any:
    """Two layers of a Llama with grouped queries."""
    import transformers

    return random_model(
        transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128, max_position_embeddings=256,
        )
    )  # fmt: skip


@cache
def traced() -> Program:
    """Do not change: take a clone."""
    return PassManager([*canonicalize_passes(), *fuse_passes()]).run(
        trace_decoder(open_model(tiny_model(), torch.float32))
    )


def data(lengths: tuple[int, ...] = (128, 100, 128), seed: int = 0) -> CalibrationData:
    """Random tokens in sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return CalibrationData.of([torch.randint(0, 128, (n,), generator=generator).tolist() for n in lengths])


def plan_of(program: Program, recipe: Recipe) -> dict[fx.Node, LayerPlan]:
    """Every layer but the one that makes the logits."""
    assert recipe.format is not None
    plan = {}
    for layer in linear_layers(program)[:-1]:
        weight: Any = layer.args[1]
        spec = program.input_of(weight)
        assert spec is not None
        plan[layer] = LayerPlan(weight=spec.key, format=recipe.format, recipe=recipe)
    return plan
