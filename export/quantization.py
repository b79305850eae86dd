"""Recipes of quantization in a build: as options and in manifests, by what a target can run, and with calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph.linear_format import LinearFormat, part_shapes
from ..models.huggingface import ModelSource
from ..passes.quantization.algorithm import LayerQuantizer
from ..passes.quantization.calibration import CalibrationData
from ..passes.quantization.plan import FP8_ROWS
from ..passes.quantization.recipe import RECIPES, Recipe
from ..passes.quantization.statistics import SavedStatistics
from ..passes.quantization.support import KernelSupport
from ..passes.quantize_linear import needs_calibration
from ..passes.scale_kv_cache import needs_calibration as cache_needs_calibration
from .timer import Progress

RecipeData = str | dict[str, Any] | None
"""A recipe in a manifest: its name, its fields where it has none (`Recipe.to_json`), or None."""
Calibrated = CalibrationData | SavedStatistics
ReadCalibration = Callable[[ModelSource], Calibrated]
"""Makes token ids of what calibration was given, with the model's tokenizer, or reads the statistics of such ids."""

_CPU_WEIGHTS = ("int4", "int8")
_CPU_ACTIVATIONS = ("none", "int8", "int8_static")
_FP8_WEIGHTS = ("fp8", "mxfp8")
_FP8_ACTIVATIONS = ("fp8", "fp8_static", "fp8_block", "mxfp8")


def resolve_recipe(quantize: str | Recipe | None, group: int | None = None) -> Recipe | None:
    """The recipe of a name, with groups of `group` along K where that is given. Raises ValueError for an unknown name."""
    if quantize is None:
        if group is not None:
            raise ValueError(
                f"group is {group} and quantize is None; groups are a recipe's: give quantize, such as 'int4'"
            )
        return None
    if isinstance(quantize, Recipe):
        return quantize if group is None else quantize.with_group(group)
    return Recipe.named(quantize, group=group)


def recipe_data(recipe: Recipe | None) -> RecipeData:
    """What a manifest keeps of a recipe."""
    if recipe is None:
        return None
    return next((name for name, known in RECIPES.items() if known == recipe), None) or recipe.to_json()


def recipe_of(data: RecipeData) -> Recipe | None:
    """The recipe that `recipe_data` wrote. Raises ValueError for an unknown one."""
    return Recipe.from_json(data) if isinstance(data, dict) else resolve_recipe(data)


def recipe_text(data: RecipeData) -> str:
    """A recipe in a few words: its name, or formats and algorithm."""
    if data is None or isinstance(data, str):
        return str(data)
    recipe = Recipe.from_json(data)
    formats = " + ".join(map(str, recipe.formats)) or "no format"
    return formats if recipe.algorithm == "round" else f"{formats} {recipe.algorithm}"


def uses_fp8(recipe: Recipe | None) -> bool:
    """Whether a recipe multiplies or converts float8_e4m3fn."""
    formats = () if recipe is None else recipe.formats
    return any(f.weights in _FP8_WEIGHTS or f.activations in _FP8_ACTIVATIONS for f in formats)


def cache_dtype_of(recipe: Recipe | None, kv_cache_dtype: str) -> str:
    """What keys and values are asked to be stored as: where a build says "auto", what its recipe says."""
    return recipe.kv_cache if recipe is not None and kv_cache_dtype == "auto" else kv_cache_dtype


def is_calibrated(recipe: Recipe | None, kv_cache_dtype: str) -> bool:
    """Whether a build needs calibration data, for its linear layers or for the scales of an int8 KV cache."""
    return kv_cache_dtype == "int8" or recipe is not None and recipe.calibrated


def read_calibration(
    recipe: Recipe | None, read: ReadCalibration | None, source: ModelSource, kv_cache_dtype: str = "auto"
) -> Calibrated | None:
    """The data of a build that is calibrated. Raises ValueError where it is missing, or given for nothing."""
    if not is_calibrated(recipe, kv_cache_dtype):
        if read is not None and kv_cache_dtype == "fp8":  # keys are stored without their mean
            return read(source)
        if read is not None:
            name = "None" if recipe is None else recipe_text(recipe_data(recipe))
            raise ValueError(
                f"calibration is given and quantize is {name}, which does not use it; leave one of them out"
            )
        return None
    if read is None:
        raise ValueError(
            needs_calibration(recipe) if recipe is not None and recipe.calibrated else cache_needs_calibration()
        )
    return read(source)


def quantizer_of(
    data: Calibrated | None, device: torch.device, progress: Progress | None = None
) -> LayerQuantizer | None:
    """What quantizes by calibration data or statistics, on the device of the build where it is here; None without either."""
    if data is None:
        return None
    from ..passes.quantization.calibrator import Calibrator

    here = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    told = None
    if progress is not None:
        report = progress

        def told(done: int, total: int, name: str) -> None:
            report(f"calibrating {name}", done, total)

    if isinstance(data, SavedStatistics):
        return Calibrator(None, here, data.layers, progress=told)
    return Calibrator(data, here, progress=told)


def kernel_support(target: str, device: torch.device) -> KernelSupport:
    """What a target does about quantized linear layers. On CUDA one without a kernel is an error, elsewhere a note."""
    where = f"{'every target' if target == 'auto' else target} on {device.type}"
    on_gpu = device.type == "cuda"
    return KernelSupport(where=where, missing=_missing_on_cuda if on_gpu else _missing_on_cpu, required=on_gpu)


def runs_on_cpu(recipe: Recipe) -> bool:
    """Whether ONNX Runtime and native steps have kernels for each of its formats."""
    return all(_missing_on_cpu(format, ()) is None for format in recipe.formats)


def _missing_on_cuda(format: LinearFormat, shape: tuple[int, ...]) -> str | None:
    if format == FP8_ROWS:
        return None
    from .kernels.quantized.stored import obstacle

    size, dtype = part_shapes(format, shape)["values"]
    return obstacle(torch.empty(size, dtype=dtype, device="meta"), format)


def _missing_on_cpu(format: LinearFormat, shape: tuple[int, ...]) -> str | None:
    if format.weights in _CPU_WEIGHTS and format.activations in _CPU_ACTIVATIONS:
        return None
    return "on processors there are kernels for int4 and int8 weights alone"
