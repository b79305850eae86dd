"""Quantizing a Llama-3.1-8B-shaped model on a GPU: seconds and peak memory of AWQ, GPTQ and SmoothQuant.

    python3 bench/gpu_quantize.py --out OUT [--shape llama-3.1-8b] [--tokens 65536] [--layers N] [--variants awq,gptq]
        [--budget-s 900] [--skip-numerics] [--skip-streamed] [--skip-resident]

numerics   a small model quantized on the GPU and on the CPU: scales, codes and outputs must agree but for rounding
streamed   weights are drawn when calibration asks for them, as they are read from a checkpoint: memory is what quantizing needs
resident   the bf16 model lies on the GPU meanwhile: the ratio to the model's bytes is the one that counts

Writes OUT/gpu-quantize.json as sections end; a section that fails leaves its error, and the next go on. A section starts within
--budget-s; at the end of it a section stops, and says how far it came and what all layers would take. `--device cpu --shape small`
tries the script without a GPU. Goal: at most 300 s, and 1.5 times the bf16 model's memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from camshaft.graph.program import Program  # noqa: E402
from camshaft.graph.quant_formats import dequantize_weight  # noqa: E402
from camshaft.graph.weights import Weight, WeightMap  # noqa: E402
from camshaft.models.huggingface import trace_decoder  # noqa: E402
from camshaft.models.random_weights import RandomWeights  # noqa: E402
from camshaft.passes.manager import PassManager  # noqa: E402
from camshaft.passes.pipeline import canonicalize_passes, fuse_passes  # noqa: E402
from camshaft.passes.quantization.calibration import CalibrationData  # noqa: E402
from camshaft.passes.quantization.calibrator import Calibrator  # noqa: E402
from camshaft.passes.quantization.plan import plan_layers  # noqa: E402
from camshaft.passes.quantization.recipe import Recipe  # noqa: E402
from gpu_core import Results  # noqa: E402

VARIANTS = {"awq": "int4_awq", "gptq": "int4_gptq", "smoothquant": "int8_smoothquant"}
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 512,
}  # fmt: skip


def fused_program(shape: str, dtype: torch.dtype, device: str, layers: int | None) -> Program:
    """A random model of a shape ("small": two layers of width 256), canonical and fused."""
    weights = RandomWeights.of("llama-3.1-8b" if shape == "small" else shape, device=device)
    for key, number in (SMALL if shape == "small" else {}).items():
        setattr(weights.config, key, number)
    if layers is not None:
        weights.config.num_hidden_layers = layers
    program = trace_decoder(weights.open(dtype))
    return PassManager([*canonicalize_passes(), *fuse_passes()]).run(program)


def random_data(program: Program, num_tokens: int, context: int = 512) -> CalibrationData:
    """Random tokens in sequences of `context`."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(program.info["vocab_size"])
    rows = torch.randint(0, vocabulary, (max(1, num_tokens // context), context), generator=generator).tolist()
    return CalibrationData.of(rows, context=context, max_tokens=num_tokens)


class OutOfTimeError(Exception):
    """The budget ended within a quantization: (groups of layers done, of how many)."""


def quantize(
    program: Program, recipe: Recipe, data: CalibrationData, device: torch.device, deadline: float = float("inf")
) -> dict[str, Any]:
    """The layers by the names of their weights. Raises OutOfTimeError past the deadline (of time.perf_counter)."""
    plan = plan_layers(program, recipe).layers

    def progress(done: int, total: int, name: str) -> None:
        if time.perf_counter() > deadline and done < total:
            raise OutOfTimeError(done, total)

    found = Calibrator(data, device, progress=progress).quantize(program, plan)
    return {plan[node].weight: layer for node, layer in found.items()}


def numerics(out: dict[str, Any], device: torch.device) -> None:
    """The same small model (weights from the CPU) on both devices."""
    program = fused_program("small", torch.float32, "cpu", None)
    data = random_data(program, 2048)
    for name, recipe_name in VARIANTS.items():
        expected = quantize(program, Recipe.named(recipe_name), data, torch.device("cpu"))
        actual = quantize(program, Recipe.named(recipe_name), data, device)
        errors = []
        for key, layer in actual.items():
            left, right = (dequantize_weight(item.weight, item.format) for item in (layer, expected[key]))
            for item, dense in ((layer, left), (expected[key], right)):
                if item.channel_factor is not None:
                    dense *= item.channel_factor
            errors.append(float((left - right).norm() / right.norm()))
        out[name] = {"relative_difference_max": max(errors), "relative_difference_first": errors[0]}
        assert errors[0] < 0.05, f"{name}: the first layer differs by {errors[0]:.4f} between {device} and the CPU"


@dataclass(frozen=True)
class Measured:
    """What every section quantizes, and until when."""

    data: CalibrationData
    device: torch.device
    model_bytes: int
    deadline: float

    def run(self, out: dict[str, Any], program: Program, recipe: Recipe) -> None:
        """Seconds and peak memory of one quantization."""
        on_gpu = self.device.type == "cuda"
        if time.perf_counter() > self.deadline:
            out["left_out"] = "no time left"
            return
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            out["allocated_before_bytes"] = torch.cuda.memory_allocated()
        out |= {"recipe": recipe.to_json(), "tokens": self.data.num_tokens, "model_bytes": self.model_bytes}
        start = time.perf_counter()
        try:
            out["layers"] = len(quantize(program, recipe, self.data, self.device, self.deadline))
        except OutOfTimeError as error:
            out["groups_done"], out["groups"] = error.args
        if on_gpu:
            torch.cuda.synchronize()
        out["seconds"] = round(time.perf_counter() - start, 2)
        if "groups" in out:
            out["seconds_of_all"] = round(out["seconds"] * out["groups"] / max(out["groups_done"], 1), 1)
        if on_gpu:
            out["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            out["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            out["peak_over_model"] = round(out["peak_allocated_bytes"] / self.model_bytes, 3)


def resident(program: Program, device: torch.device) -> Program:
    """The program with its weights on the device."""
    clone = program.clone()
    clone.weights = WeightMap({name: Weight.from_tensor(w.to(device)) for name, w in program.weights.items()})
    return clone


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a shape of models/random_weights.py, or small")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--variants", default="awq,gptq", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip-numerics", action="store_true")
    parser.add_argument("--skip-streamed", action="store_true")
    parser.add_argument("--skip-resident", action="store_true")
    parser.add_argument("--budget-s", type=float, default=900.0, help="seconds of the whole script")
    args = parser.parse_args()
    unknown = set(args.variants.split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"unknown variants {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    deadline = time.perf_counter() + args.budget_s
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    results = Results(args.out / "gpu-quantize.json")
    if not args.skip_numerics:
        results.section("numerics", lambda out: numerics(out, device))
    program = fused_program(args.shape, torch.bfloat16, args.device, args.layers)
    model_bytes = sum(weight.num_bytes for weight in program.weights.values())
    measured = Measured(random_data(program, args.tokens), device, model_bytes, deadline)
    recipes = {name: Recipe.named(VARIANTS[name]) for name in args.variants.split(",")}
    for name, recipe in recipes.items() if not args.skip_streamed else ():
        results.section(f"{name} streamed", lambda out, recipe=recipe: measured.run(out, program, recipe))
    if not args.skip_resident:
        held = resident(program, device)
        for name, recipe in recipes.items():
            results.section(f"{name} resident", lambda out, recipe=recipe: measured.run(out, held, recipe))
    print(f"{'section':24} {'seconds':>9} {'peak GB':>9} {'of model':>9}")
    for name, entry in results.data.items():
        if isinstance(entry, dict) and "seconds" in entry:
            peak, ratio = entry.get("peak_allocated_bytes", 0) / 1e9, entry.get("peak_over_model", 0.0)
            whole = f"  {entry['groups_done']} of {entry['groups']} groups" if "groups" in entry else ""
            print(f"{name:24} {entry['seconds']:9.1f} {peak:9.2f} {ratio:9.3f}{whole}")
    print(json.dumps({name: entry.get("error") for name, entry in results.data.items() if isinstance(entry, dict)}))


if __name__ == "__main__":
    main()
