"""`camshaft.compile`, `camshaft.calibrate`, `camshaft.distill`, `camshaft.load` and `camshaft.trace`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .export.build import Progress
    from .export.distillation.distill import Distillation
    from .export.engine import Engine
    from .export.quantization import ReadCalibration
    from .graph.program import Program
    from .models.huggingface import ModelSource
    from .passes.quantization.calibration import CalibrationData
    from .passes.quantization.recipe import Recipe

    Calibration = str | Path | Sequence[str] | Sequence[Sequence[int]] | CalibrationData | None


def compile(
    model: Any,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    target: str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_seq_len: int | None = None,
    max_batch_tokens: int | None = None,
    max_sequences: int | None = None,
    block_size: int = 16,
    buckets: Sequence[int] | None = None,
    capabilities: Sequence[str] | None = None,
    quantize: str | Recipe | None = None,
    group: int | None = None,
    calibration: Calibration = None,
    kv_cache_dtype: str = "auto",
    batch_invariant: bool = False,
    hidden_layers: Sequence[int] | None = None,
    early_exit: int | str | Path | None = None,
    cache: bool = True,
    verify: bool = False,
    dump_dir: str | Path | None = None,
    dynamic_shapes: Any = None,
    progress: bool | None = None,
) -> Any:
    """Compiles a decoder into an `Engine`, or any module with example inputs into a callable.

    Args:
        model: a Hugging Face directory or hub id, "demo" for the bundled model, a Transformers causal LM in memory, or (with
            `example_inputs`) any nn.Module.
        example_inputs: tensors for the module's forward; a callable `CompiledModule` is returned instead of an Engine.
        target: "auto" (measured), "eager", "inductor" (CPU, CUDA), "onnxruntime" (CPU) or "tensorrt" (CUDA; it is built
            without a GPU too, and then saved).
        device: "cpu" or "cuda"; None: CUDA where torch sees a GPU; a module's: where its example inputs are.
        dtype: of weights and computation: "float32", "bfloat16", "float16"; None: bfloat16 on CUDA, float32 on the CPU.
        max_seq_len: most tokens of one sequence, prompt and output; None: what the model knows, at most 4,096.
        max_batch_tokens: most tokens in one step; None: 8,192 on CUDA, 1,024 on the CPU.
        max_sequences: most sequences in one step; None: 256 on CUDA, 64 on the CPU.
        block_size: tokens in a KV block.
        buckets: on CUDA, token counts that TensorRT engines are built for and decode steps are captured for; None: 1, 2, 4
            ... max_sequences ... max_batch_tokens.
        capabilities: compute capabilities that TensorRT engines are built for, such as "8.9"; None: any.
        quantize: a recipe for linear layers, by name ("fp8", "int8", "int4_awq", "nvfp4" ...) or as a `camshaft.Recipe`; None: as
            the weights are. See docs/quantization.md.
        group: another length of the recipe's groups along K.
        calibration: for recipes that need data, and an int8 KV cache: texts, rows of token ids, `CalibrationData`, or the path of
            a text or of statistics that `calibrate` wrote; None: for "demo" its own text.
        kv_cache_dtype: what keys and values are stored as: "auto", the compute dtype, "fp8", float8_e4m3fn, or "int8", with scales
            that are found on `calibration`.
        batch_invariant: a token's logits do not depend, to the last bit, on what else is in its step; CUDA only, slower.
        hidden_layers: hidden states that every step gives besides logits (`Engine.step_outputs`): 0 the embeddings, i the output of
            the first i layers, -1 what the head reads, behind the final norm; None: none.
        early_exit: number of layers in front of an exit that drafts (speculative method "self"); or the directory of an exit that
            was trained, which says how many; None: no exit. See docs/speculative.md.
        cache: reuse an equal build, and keep this one for the next ($CAMSHAFT_CACHE or ~/.cache/camshaft).
        verify: run the program after each pass on the CPU and record the error in the pass table.
        dump_dir: write the graph before and after each pass there ($CAMSHAFT_DUMP does the same).
        dynamic_shapes: for a module: as `torch.export` takes them.
        progress: show a progress bar; None: where the output is a terminal.

    Raises:
        ValueError: a model, checkpoint or number that does not fit; the message says what is allowed.
        camshaft.graph.capture.CaptureError: a model that cannot be traced; it names the module or operator in the way.
    """
    if example_inputs is not None:
        from .export.module import compile_module

        for_decoders = (quantize, calibration, hidden_layers, early_exit)
        if any(option is not None for option in for_decoders) or kv_cache_dtype != "auto" or batch_invariant:
            raise ValueError(
                "quantize, calibration, kv_cache_dtype, batch_invariant, hidden_layers and early_exit are options of decoders; "
                "leave them out with example_inputs"
            )
        return compile_module(model, example_inputs, target=target, device=device, dynamic_shapes=dynamic_shapes)
    from .export.build import BuildRequest, build_engine, is_decoder

    read = calibration_reader(model, quantize, calibration, kv_cache_dtype)
    if model == "demo":
        from .models import demo

        model = demo.path()
    if not is_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is no Transformers causal LM; give example_inputs to compile it as a module"
        )
    dump = dump_dir or os.environ.get("CAMSHAFT_DUMP") or None
    request = BuildRequest(
        target=target,
        device=device,
        dtype=dtype,
        max_seq_len=max_seq_len,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        block_size=block_size,
        buckets=tuple(buckets) if buckets is not None else None,
        capabilities=tuple(capabilities or ()),
        quantize=quantize,
        group=group,
        calibration=read,
        kv_cache_dtype=kv_cache_dtype,
        batch_invariant=batch_invariant,
        hidden_layers=tuple(hidden_layers or ()),
        early_exit=early_exit,
        use_cache=cache,
        verify=verify,
        dump_dir=Path(dump) if dump else None,
    )
    with progress_bar(progress) as report:
        return build_engine(model, request, report)


def calibration_reader(
    model: Any, quantize: str | Recipe | None, calibration: Calibration, kv_cache_dtype: str = "auto"
) -> ReadCalibration | None:
    """What makes token ids of calibration data with a model's tokenizer; None: there is no data.

    The demo model's own text is taken where a recipe or the KV cache needs data and none is given. Raises ValueError for an unknown
    recipe.
    """
    from .export.quantization import cache_dtype_of, is_calibrated, resolve_recipe

    if calibration is None:
        recipe = resolve_recipe(quantize)
        if model != "demo" or not is_calibrated(recipe, cache_dtype_of(recipe, kv_cache_dtype)):
            return None
        from .models import demo

        calibration = demo.calibration_path()
    if isinstance(calibration, Path) and calibration.suffix == ".safetensors":
        from .export.calibrate import read_statistics

        return functools.partial(read_statistics, calibration)
    given = _opened(calibration)

    def read(source: ModelSource) -> CalibrationData:
        return _token_rows(given, source)

    return read


def calibrate(
    model: Any,
    path: str | Path,
    calibration: Calibration = None,
    *,
    moments: bool = True,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool | None = None,
) -> int:
    """Writes what a model's linear layers see on calibration text to a file, which `compile` takes as `calibration`.

    Args:
        model: as in `compile`.
        path: of the file, `NAME.safetensors`.
        calibration: texts, rows of token ids, or `CalibrationData`; None: for "demo" its own text.
        moments: with the second moments of the inputs, which AWQ and GPTQ need: most of the file.
        device, dtype, progress: as in `compile`.

    Returns:
        How many tokens it ran.

    Raises:
        ValueError: a model or text that does not fit, or a file of another name.
    """
    from .export.calibrate import write_statistics
    from .models import demo

    to = Path(path)
    if to.suffix != ".safetensors":
        raise ValueError(f"statistics go to a file NAME.safetensors, not {to.name!r}")
    if calibration is None and model == "demo":
        calibration = demo.calibration_path()
    if calibration is None:
        raise ValueError("calibration is missing; give texts or rows of token ids, of the kind that the model will see")
    read = calibration_reader(model, None, calibration)
    assert read is not None
    with progress_bar(progress) as report:
        return write_statistics(
            demo.path() if model == "demo" else model,
            to,
            read,
            moments=moments,
            device=device,
            dtype=dtype,
            progress=report,
        )


def distill(
    model: Any,
    output: str | Path,
    *,
    quantize: str | Recipe | None = None,
    group: int | None = None,
    kv_cache_dtype: str = "auto",
    center_keys: bool = False,
    data: str | Path | Sequence[str] | Sequence[Sequence[int]] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool | None = None,
    **settings: int | float | None,
) -> Distillation:
    """Tunes a model's weights so that a recipe's rounding costs it little, and writes them as a Hugging Face directory.

    The unquantized model teaches a copy of itself whose weights and inputs are rounded as the recipe's operators do
    (quantization-aware distillation). Build the directory with the same `quantize`, `group` and `kv_cache_dtype`.

    Args:
        model: a Hugging Face directory or hub id, "demo" for the bundled model, or a Transformers causal LM in memory.
        output: a directory that is new or empty.
        quantize, group: as in `compile`; recipes that round to nearest, without calibration.
        kv_cache_dtype: "auto", or "fp8": keys and values are rounded, too.
        center_keys: the build will be given calibration data, so that its fp8 cache holds keys without their mean.
        data: texts, rows of token ids, or the path of a text, of the kind that the model will see; None: for "demo" its calibration
            text, for others the model writes all that it learns from.
        device: "cpu" or "cuda"; None: CUDA where torch sees a GPU.
        dtype: of the computation; None: float32. The weights that are trained are float32 always, and are written in the
            checkpoint's own dtypes, whose rounding the training knows.
        progress: show a progress bar; None: where the output is a terminal.
        settings: fields of `camshaft.export.distillation.settings.DistillationSettings`, such as steps=400, learning_rate=1e-4,
            batch_tokens, context, sampled_tokens, seed.

    Returns:
        How far the rounded model was from the unquantized one, before and after, in nats per token on text it did not learn from.

    Raises:
        ValueError: a model, recipe, text or number that does not fit, or an output directory that is not empty.
        RuntimeError: a loss that is NaN or infinite, with its step.
    """
    import torch

    from .export.build import resolve_device, resolve_dtype
    from .export.distillation.distill import distill as run
    from .export.distillation.settings import DistillationSettings
    from .export.quantization import resolve_recipe
    from .models import demo

    if data is None and model == "demo":
        data = demo.calibration_path()
    given = _opened(data)

    def read(source: ModelSource) -> list[Sequence[int]]:
        return _read_rows(given, source)

    place = resolve_device(device)
    with progress_bar(progress) as report:
        return run(
            demo.path() if model == "demo" else model,
            Path(output),
            recipe=resolve_recipe(quantize, group),
            kv_cache_dtype=kv_cache_dtype,
            center_keys=center_keys,
            read=None if given is None else read,
            settings=DistillationSettings.of(**settings),
            device=place,
            dtype=torch.float32 if dtype is None else resolve_dtype(dtype, place),
            progress=report,
        )


def _opened(data: Any) -> Any:
    """Texts or rows of token ids as they are; one text, or the file of one, as a list of it."""
    text = data.read_text(encoding="utf-8") if isinstance(data, Path) else data
    return [text] if isinstance(text, str) else text


def _token_rows(given: Any, source: ModelSource) -> CalibrationData:
    from .passes.quantization.calibration import CalibrationData

    return given if isinstance(given, CalibrationData) else CalibrationData.of(_read_rows(given, source))


def _read_rows(given: Any, source: ModelSource) -> list[Sequence[int]]:
    """Rows of token ids of texts, or those that were given."""
    rows: list[Sequence[int]] = []
    tokenizer = None
    for item in given:
        if not isinstance(item, str):
            rows.append(item)
            continue
        if tokenizer is None:
            from .runtime.tokenizer import Tokenizer

            if source.tokenizer_dir is None:
                raise ValueError(f"the data has texts and {source.name} no tokenizer; give rows of token ids")
            tokenizer = Tokenizer.from_dir(source.tokenizer_dir)
        rows += _documents(tokenizer, item)
    return rows


def _documents(tokenizer: Any, text: str) -> list[list[int]]:
    """A text's documents as one row, an end token behind each, as models see them in training; a row each where there is none."""
    end = tokenizer.eos_token_id
    rows = [tokenizer.encode(part) for part in text.split("\f") if part.strip()]
    return rows if end is None else [[token for row in rows for token in (*row, end)]]


def trace(model: Any, *, dtype: str | torch.dtype | None = None) -> Program:
    """Traces a decoder into a Program, as it is before the first pass; nothing is lowered and no weight is read.

    Args:
        model: as in `compile`: a Hugging Face directory or hub id, "demo", or a Transformers causal LM in memory.
        dtype: of weights and computation: "float32", "bfloat16", "float16"; None: float32.

    Raises:
        ValueError: a model or checkpoint that does not fit.
        camshaft.graph.capture.CaptureError: a model that cannot be traced.
    """
    import torch

    from .export.build import resolve_dtype
    from .models import demo
    from .models.huggingface import open_model, trace_decoder

    source = open_model(demo.path() if model == "demo" else model, resolve_dtype(dtype, torch.device("cpu")))
    return trace_decoder(source)


def load(path: str | Path, *, max_sequences: int | None = None, verify: bool = True, rebuild: bool = False) -> Engine:
    """Opens a saved engine; needs neither the checkpoint nor Transformers.

    Args:
        path: the directory that `Engine.save` wrote.
        max_sequences: a smaller limit than the engine was built for.
        verify: compare every file with its sha256.
        rebuild: lower the segments again for this machine, from the graphs in the artifact.

    Raises:
        ValueError: no engine, a damaged file, a newer format, or versions or hardware that do not fit; it names the fix.
    """
    from .export.artifact import load_engine

    return load_engine(path, max_sequences=max_sequences, verify=verify, rebuild=rebuild)


@contextmanager
def progress_bar(show: bool | None) -> Iterator[Progress | None]:
    """A progress function that draws a bar on stderr, or None; `show` None means: where stderr is a terminal."""
    import sys

    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("compiling", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report
