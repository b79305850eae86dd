"""Distillation from start to end: a model and a recipe in, a checkpoint out whose weights bear the recipe's rounding.

    model --> teacher: the graph with the model's weights              \\
          --> student: the same graph, weights and inputs rounded       > train --> checkpoint --> camshaft build --quantize RECIPE
    text and what the teacher writes --> rows of tokens                /
"""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...graph.program import Program
from ...models.huggingface import ModelSource, open_model, trace_decoder
from ...passes.manager import PassManager
from ...passes.pipeline import canonicalize_passes, fuse_passes
from ...passes.quantization.recipe import Recipe
from ..quantization import cache_dtype_of, recipe_data, recipe_text
from ..timer import Progress, Timer
from .checkpoint import check_output, load_transformers, read_parameters, write_checkpoint
from .settings import DistillationSettings
from .student import CacheRounding, Plan, ProgramModel, plan_student
from .text import Rows, cut_rows, split_rows, write_rows
from .train import train

ReadRows = Callable[[ModelSource], Sequence[Sequence[int]]]
"""Makes token ids of the text that was given, with the model's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What `distill` did.

    divergence: of the rounded model from the unquantized one, nats per token on the validation rows, before and after. best_step:
    the step whose weights were kept; 0: training did not help, and the checkpoint holds the model's own weights.
    """

    output: Path
    divergence_before: float
    divergence: float
    best_step: int
    steps: int
    train_tokens: int
    seconds: float
    report: tuple[str, ...]


def distill(
    model: Any,
    output: Path,
    *,
    recipe: Recipe | None,
    kv_cache_dtype: str,
    center_keys: bool,
    read: ReadRows | None,
    settings: DistillationSettings,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Distillation:
    """See `camshaft.distill`. read: None: the model writes all that it learns from. dtype: of the computation."""
    check_output(output)
    cache = cache_rounding(recipe, kv_cache_dtype, center_keys)
    check_recipe(recipe, cache)
    timer = Timer(progress)
    timer.begin("opening the model")
    source = open_model(model, dtype)
    if source.max_positions is not None and settings.context > source.max_positions:
        raise ValueError(
            f"context is {settings.context} tokens and {source.name} knows {source.max_positions}; give fewer"
        )
    hf = load_transformers(source, model)
    stored = {name: parameter.dtype for name, parameter in hf.named_parameters()}
    timer.begin("tracing")
    program = PassManager([*canonicalize_passes(), *fuse_passes()]).run(trace_decoder(source))
    plan = plan_student(program, recipe, cache)
    report = describe(program, plan)
    parameters = read_parameters(hf, program, device)
    timer.begin("writing text")
    rows = _rows(hf, read, source, settings, device, dtype, progress)
    timer.begin("distilling")
    teacher = ProgramModel(program, parameters.teacher, {}, device)
    student = ProgramModel(program, parameters.student, parameters.stored, device, plan)

    def told(done: int, total: int, loss: float) -> None:
        if progress is not None:
            progress(f"distilling, loss {loss:.4f}", done, total)

    with _fast_products():
        outcome = train(teacher, student, parameters.trained, rows, settings, device, told)
    timer.begin("writing the checkpoint")
    facts = {
        "quantize": recipe_data(recipe),
        "kv_cache_dtype": "auto" if cache is None else "fp8",
        "center_keys": center_keys,
        "settings": asdict(settings),
        "train_tokens": rows.train.numel(),
        "outcome": asdict(outcome),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_checkpoint(output, hf, parameters.trained, stored, source.tokenizer_dir, facts)
    timer.end()
    return Distillation(
        output=output,
        divergence_before=outcome.first_divergence,
        divergence=outcome.divergence,
        best_step=outcome.best_step,
        steps=settings.steps,
        train_tokens=rows.train.numel(),
        seconds=outcome.seconds,
        report=report,
    )


def cache_rounding(recipe: Recipe | None, kv_cache_dtype: str, center_keys: bool) -> CacheRounding | None:
    """How the student's keys and values are rounded. Raises ValueError for a cache that cannot be trained for."""
    asked = cache_dtype_of(recipe, kv_cache_dtype)
    if asked == "fp8":
        return CacheRounding(torch.float8_e4m3fn, center_keys)
    if asked == "int8":
        raise ValueError(
            "kv_cache_dtype is 'int8', whose scales are found when the engine is built; distil without it (what it loses is small) "
            "and give it to the build. Allowed: 'auto', 'fp8'"
        )
    if asked != "auto":
        raise ValueError(f"kv_cache_dtype is {asked!r}; allowed: 'auto', 'fp8'")
    if center_keys:
        raise ValueError("center_keys is of an fp8 KV cache; give kv_cache_dtype='fp8', or leave it out")
    return None


def check_recipe(recipe: Recipe | None, cache: CacheRounding | None) -> None:
    """Raises ValueError for recipes whose rounding a student cannot do: what calibration decides is not known in training."""
    if recipe is None and cache is None:
        raise ValueError("nothing is rounded: give quantize, such as 'nvfp4', or kv_cache_dtype='fp8'")
    if recipe is not None and recipe.calibrated:
        raise ValueError(
            f"recipe {recipe_text(recipe_data(recipe))} needs calibration, which would round the tuned weights in another way; "
            "distillation takes its place: give a recipe that rounds to nearest, such as 'nvfp4', 'int4', 'w4a8', 'fp8', or "
            "camshaft.Recipe(format=LinearFormat.parse('int4:g64:zp/none'))"
        )


def describe(program: Program, plan: Plan) -> tuple[str, ...]:
    """What a student rounds and what it leaves, as a build's report says it. Raises ValueError where nothing is rounded."""
    kept = [
        f"not rounded: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in plan.kept.items()
    ]
    if not plan.layers and plan.cache is None:
        raise ValueError(
            f"the recipe rounds no layer of {program.name}: {'; '.join(kept) or 'it has no linear layers'}"
        )
    formats: dict[str, int] = {}
    for format in map(str, plan.formats):
        formats[format] = formats.get(format, 0) + 1
    lines = [f"rounded: {count} linear layers to {format}" for format, count in formats.items()]
    if plan.cache is not None:
        how = "keys without their mean" if plan.cache.centered else "keys as they are"
        lines.append(f"rounded: keys and values to {str(plan.cache.dtype).removeprefix('torch.')}, {how}")
    return (*lines, *kept)


def _rows(
    hf: Any,
    read: ReadRows | None,
    source: ModelSource,
    settings: DistillationSettings,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> Rows:
    """Rows of the text, and those that a copy of the model writes, on the device and in the dtype."""

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress("writing text", done, total)

    count = settings.sampled_tokens // settings.context

    def written(prompts: Tensor | None) -> Tensor:
        return write_rows(copy.deepcopy(hf).to(device, dtype), prompts, count, settings, told)

    if read is None:
        return split_rows(written(None), settings)
    rows = split_rows(cut_rows(read(source), settings.context), settings)
    return rows.joined(written(rows.train), settings) if count else rows


@contextlib.contextmanager
def _fast_products() -> Iterator[None]:
    """Float32 products in TF32 on a GPU while it is open: their error is far below that of the rounding that is trained for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
