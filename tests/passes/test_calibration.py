"""Calibration: node by node over packed sequences equals the model; what it refuses; statistics; memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_cases import data, plan_of, tiny_model, traced
from camshaft.graph.quant_formats import dequantize_weight
from camshaft.graph.weights import Weight
from camshaft.passes.quantization.calibration import MIN_TOKENS, CalibrationData, CalibrationRun, linear_layers
from camshaft.passes.quantization.calibrator import Calibrator
from camshaft.passes.quantization.recipe import Recipe
from camshaft.passes.quantization.statistics import InputStatistics, load_statistics, save_statistics

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [(128, 128), (128, 100, 70)], ids=["equal", "ragged"])
def test_a_run_is_the_model_on_each_sequence(lengths: tuple[int, ...]) -> None:
    program, tokens = traced(), data(lengths)
    run = CalibrationRun(program, tokens, device=CPU, chunk_tokens=256)
    names = [group.name for group in run.inputs_of(linear_layers(program), to_end=True)]
    assert len(names) == len(set(names)) == 9  # qkv, o, gate_up, down for two layers, and the logits
    sequences = iter(tokens.sequences)
    for logits, parts in run.outputs():
        for row in logits[0].split(parts):
            with torch.no_grad():
                expected = tiny_model()(torch.tensor([next(sequences)])).logits[0]
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=2e-5)  # float32, other orders of sums


def test_only_one_segment_of_weights_is_held() -> None:
    program = traced().clone()
    held, most = 0, 0
    for name, weight in list(program.weights.items()):

        def load(weight: Weight = weight) -> torch.Tensor:
            nonlocal held, most
            held += 1
            most = max(most, held)
            return weight.load()

        program.weights._weights[name] = Weight(weight.shape, weight.dtype, load)
    run = CalibrationRun(program, data(), device=CPU)
    for _ in run.inputs_of(linear_layers(program)):
        assert not run._loaded
        held = 0
    assert most <= 3  # the layer, the norm behind it, and at the start the table and the rotary frequencies


def test_quantizing_twice_gives_the_same_bits() -> None:
    program = traced()
    plan = plan_of(program, Recipe.named("int4_gptq", group=32))
    first, second = (Calibrator(data(), CPU).quantize(program, plan) for _ in range(2))
    for layer, item in first.items():
        assert torch.equal(item.weight.values, second[layer].weight.values)
        assert torch.equal(item.weight.scale, second[layer].weight.scale)


def test_too_few_tokens_are_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=rf"has 30 tokens and needs {MIN_TOKENS}"):
        CalibrationData.of([list(range(30))])


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="token id 500; .* has 128 tokens"):
        CalibrationRun(traced(), CalibrationData.of([[500] * 300]), device=CPU)
    with pytest.raises(ValueError, match="negative token id"):
        CalibrationData.of([[-1] * 300])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_their_layer(bad: float) -> None:
    program = traced().clone()
    name = next(n for n in program.weights if "layers.1.post_attention_layernorm" in n)
    damaged = program.weights[name].load().clone()
    damaged[3] = bad
    program.weights._weights[name] = Weight.from_tensor(damaged)
    plan = plan_of(program, Recipe.named("int8_smoothquant"))
    with pytest.raises(ValueError, match=r"input of model\.layers\.1\.mlp\.gate_proj.* NaN or Inf among"):
        Calibrator(data(), CPU).quantize(program, plan)


def test_a_group_that_does_not_divide_is_refused() -> None:
    program = traced()
    plan = plan_of(program, Recipe.named("int4_gptq", group=128))
    with pytest.raises(ValueError, match="groups of 128 .* do not divide its 64 columns"):
        Calibrator(data(), CPU).quantize(program, plan)


def test_the_digest_follows_tokens_and_boundaries() -> None:
    assert data().digest() == data().digest()
    assert data((300,)).digest() != data((150, 150)).digest()


def test_statistics_by_chunks_are_those_of_all_rows() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    found = InputStatistics.of(x.split(70), moment=True)
    torch.testing.assert_close(found.amax, x.abs().amax(0))
    torch.testing.assert_close(found.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(found.moment, x.t() @ x / 300)


def test_saved_statistics_quantize_without_a_run(tmp_path: Path) -> None:
    program, tokens = traced(), data()
    calibrator = Calibrator(tokens, CPU)
    found = calibrator.collect(program, linear_layers(program)[:-1], moments=True)
    file = tmp_path / "statistics.safetensors"
    save_statistics(file, found, model=program.name, data_digest=tokens.digest(), moments=True)
    loaded = load_statistics(file, model=program.name, data_digest=tokens.digest())
    assert found.keys() == loaded.keys()
    with pytest.raises(ValueError, match="is of model .*, not 'other'"):
        load_statistics(file, model="other")
    for name in ("int8_smoothquant", "int4_gptq"):
        recipe = Recipe.named(name) if name == "int8_smoothquant" else Recipe.named(name, group=32)
        plan = plan_of(program, recipe)
        reused = replace(calibrator, statistics=loaded)
        reused.run = None  # type: ignore[assignment,method-assign]
        layers = reused.quantize(program, plan)
        expected = calibrator.quantize(program, plan)
        first = next(iter(plan))  # the first input is the same; later ones are of the unquantized model
        assert torch.equal(layers[first].weight.values, expected[first].weight.values)


@pytest.mark.parametrize("name", ["int4_awq", "int4_gptq", "int8_smoothquant", "fp8_static", "nvfp4_gptq"])
def test_layers_act_as_the_originals(name: str) -> None:
    recipe = Recipe.named(name, group=32) if name.startswith("int4") else Recipe.named(name)
    program = traced()
    found = Calibrator(data(), CPU).quantize(program, plan_of(program, recipe))
    for layer, item in found.items():
        weight: Any = layer.args[1]
        original = program.weights[program.input_of(weight).key].load()  # type: ignore[union-attr]
        dense = dequantize_weight(item.weight, item.format)
        if item.channel_factor is not None:
            dense = dense * item.channel_factor
        assert (dense - original).norm() / original.norm() < 0.35
        assert (item.x_scale is not None) == (name == "fp8_static")


_SCRIPT = """
import resource, sys, torch
from camshaft.models.random_weights import RandomWeights
from camshaft.models.huggingface import trace_decoder
from camshaft.passes.manager import PassManager
from camshaft.passes.pipeline import canonicalize_passes, fuse_passes
from camshaft.passes.quantization.calibration import CalibrationData, CalibrationRun, linear_layers
weights = RandomWeights.of("llama-3.2-1b", device="cpu")
config = weights.config
config.vocab_size, config.num_hidden_layers, config.hidden_size, config.intermediate_size = 256, 16, 1024, 2048
config.num_attention_heads, config.head_dim = 16, 64
program = PassManager([*canonicalize_passes(), *fuse_passes()]).run(trace_decoder(weights.open(torch.float32)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = CalibrationRun(program, CalibrationData.of([[1] * 256]), device=torch.device("cpu"))
for group in run.inputs_of(linear_layers(program)):
    pass
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown, sum(w.num_bytes for w in program.weights.values()))
"""


@pytest.mark.long
def test_memory_is_of_a_segment_not_of_the_model() -> None:
    child = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]
    grown, model = map(int, child.stdout.split())
    assert model > 400e6 and grown < model / 4
