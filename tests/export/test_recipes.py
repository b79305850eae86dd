"""Every recipe end to end: prefix cache, chunked prefill and in-flight batching against the quantized program run in one row."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.export.bisect import run_row
from camshaft.export.quantization import quantizer_of, recipe_data, recipe_of, resolve_recipe
from camshaft.models import demo
from camshaft.models.huggingface import open_model
from camshaft.passes import quantize_fp8
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import canonicalize_passes, fuse_passes, quantize_passes
from camshaft.passes.quantization.calibration import CalibrationData
from camshaft.passes.quantization.recipe import RECIPES, Recipe
from families import random_model, tiny_config
from shared_traces import trace_decoder

import camshaft
from camshaft import LLM, SamplingParams

TIE = 0.02  # of the largest logit: roundings of activations fall to either side where sums differ in their last bits
PREFIX = [(7 * i) % 90 + 3 for i in range(40)]
PROMPTS = [[*PREFIX, *range(5, 5 + n)] for n in (3, 9, 17)] + [[11, 12, 13]]
CALIBRATION = CalibrationData.of([[(13 * i + 5 * j) % 95 + 2 for i in range(64)] for j in range(8)])


def _recipe(name: str) -> Recipe:
    """A recipe whose groups divide a width of 64."""
    recipe = Recipe.named(name)
    grouped = recipe.format is not None and recipe.format.group in (64, 128) and not recipe.format.block
    return recipe.with_group(32) if grouped else recipe


def _check(model: Any, recipe: Recipe, data: CalibrationData | None, tie: float = TIE) -> None:
    engine = camshaft.compile(
        model, target="eager", device="cpu", max_seq_len=96, max_batch_tokens=16, max_sequences=4, block_size=8,
        quantize=recipe, calibration=data, cache=False, progress=False,
    )  # fmt: skip
    assert recipe_of(engine.config.quantize) == recipe
    passes = [*canonicalize_passes(), *fuse_passes(), *quantize_passes(recipe, quantizer_of(data, torch.device("cpu")))]
    reference = PassManager(passes).run(trace_decoder(open_model(model, torch.float32)))
    with LLM(engine, kv_cache_bytes=4 << 20) as llm:
        for _ in range(2):  # the second time from the prefix cache
            params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
            results = llm.generate(PROMPTS, params)
    assert results[0].metrics.num_cached_tokens >= 32
    for prompt, result in zip(PROMPTS, results):
        tokens = result.outputs[0].token_ids
        rows = run_row(reference, torch.tensor([*prompt, *tokens[:-1]]))[len(prompt) - 1 :].float()
        chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (rows.amax(1) - chosen <= tie * rows.abs().max()).all()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_as_their_program_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)
    recipe = _recipe(name)
    _check(random_model(tiny_config("llama")), recipe, CALIBRATION if recipe.calibrated else None)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.calibrated])
def test_recipes_on_the_demo_model(name: str) -> None:
    _check(str(demo.path()), Recipe.named(name), None, tie=0.05)  # what `camshaft build --verify` allows


def test_recipes_as_data() -> None:
    for name, recipe in RECIPES.items():
        assert recipe_data(recipe) == name and recipe_of(name) == recipe
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    own = dataclasses.replace(
        Recipe.named("int4", group=64),
        overrides=(("*down*", Recipe.named("int8")), ("*.0.*", None)),
        alternatives=(Recipe.named("int8").format,),  # type: ignore[arg-type]
        max_bits=5.0,
    )
    data = recipe_data(own)
    assert isinstance(data, dict) and recipe_of(json.loads(json.dumps(data))) == own
    with pytest.raises(ValueError, match="recipe has unknown fields colour; known: act_order"):
        Recipe.from_json({"format": "int8/int8", "colour": 1})


def test_calibration_that_is_missing_or_for_nothing(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    with pytest.raises(ValueError, match="needs calibration data"):
        camshaft.compile(model, target="eager", device="cpu", quantize="int4_gptq", group=32)
    with pytest.raises(ValueError, match="calibration is given and quantize is int8, which does not use it"):
        camshaft.compile(model, target="eager", device="cpu", quantize="int8", calibration=[[1, 2, 3]])
    with pytest.raises(ValueError, match="calibration has 3 tokens and needs 256"):
        camshaft.compile(model, target="eager", device="cpu", quantize="int8_smoothquant", calibration=[[1, 2, 3]])
    with pytest.raises(ValueError, match="group is 64 and quantize is None"):
        resolve_recipe(None, 64)
    with pytest.raises(ValueError, match=r"fp8:block128/fp8_block has no groups along K"):
        resolve_recipe("fp8_block", 64)


def test_a_calibrated_build_is_cached_with_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSHAFT_CACHE", str(tmp_path))
    model = random_model(tiny_config("llama"))
    options: dict[str, Any] = {
        "target": "eager", "device": "cpu", "max_seq_len": 64, "quantize": "int8_smoothquant", "calibration": CALIBRATION,
        "progress": False,
    }  # fmt: skip
    first, second = (camshaft.compile(model, **options) for _ in range(2))
    assert "cached" not in first.manifest.timings and "cached" in second.manifest.timings
    assert second.config.calibration == CALIBRATION.digest()
    assert set(first.weights) >= set(second.weights)
    for name in second.weights:
        a, b = first.weights[name].load(), second.weights[name].load()
        assert torch.equal(a.float(), b.float()), name
