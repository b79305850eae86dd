"""The build: model -> Program -> passes -> segments -> engines. The compiler's half of `camshaft.compile`."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn

from .. import __version__
from ..graph.program import Program
from ..graph.verify import verify_packed
from ..models.huggingface import ModelSource, open_model, trace_decoder
from ..passes.base import GraphPass
from ..passes.capture_hidden import check_layers
from ..passes.manager import PassManager
from ..passes.match import value
from ..passes.pipeline import decoder_passes
from ..passes.quantization.algorithm import LayerQuantizer
from ..passes.quantization.recipe import Recipe
from ..passes.select_rows import head_of
from ..passes.split_early_exit import ExitWeights
from . import cache
from .buckets import default_buckets
from .choose import Lowering, lower_program
from .early_exit import ExitOption, read_exit_option
from .engine import Engine
from .manifest import (
    CACHE_DTYPES,
    FORMAT_VERSION,
    BuildConfig,
    Manifest,
    ModelFacts,
    hardware_of,
)
from .quantization import (
    ReadCalibration,
    cache_dtype_of,
    kernel_support,
    quantizer_of,
    read_calibration,
    recipe_data,
    recipe_of,
    recipe_text,
    resolve_recipe,
    uses_fp8,
)
from .targets.base import available_targets, get_target
from .timer import Progress, Timer

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FP8_CAPABILITY = (8, 9)
DEFAULT_MAX_SEQ_LEN = 4096
"""Longest sequence that an engine is built for unless told otherwise, in tokens (less where the model knows less)."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What was asked for, before defaults depend on the model and the machine; see `camshaft.compile`."""

    target: str = "auto"
    device: str | None = None
    dtype: str | torch.dtype | None = None
    max_seq_len: int | None = None
    max_batch_tokens: int | None = None
    max_sequences: int | None = None
    block_size: int = 16
    use_cache: bool = True
    verify: bool = False
    dump_dir: Path | None = None
    buckets: tuple[int, ...] | None = None
    capabilities: tuple[str, ...] = ()
    quantize: str | Recipe | None = None
    group: int | None = None
    calibration: ReadCalibration | None = None
    kv_cache_dtype: str = "auto"
    batch_invariant: bool = False
    hidden_layers: tuple[int, ...] = ()
    early_exit: ExitOption = None


def resolve_device(name: str | torch.device | None, target: str = "auto") -> torch.device:
    """The device to build for: CUDA where torch sees a GPU, else the CPU. TensorRT engines are built for a GPU without one.

    Raises ValueError for a device that is not there.
    """
    ahead = target == "tensorrt"
    if name is None:
        name = "cuda" if ahead or torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; allowed: 'cpu', 'cuda'")
    if device.type == "cuda" and not ahead and not torch.cuda.is_available():
        raise ValueError(
            "device is cuda, but torch sees no CUDA device; use device='cpu', or install a CUDA build of torch"
        )
    return torch.device(device.type)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The compute dtype: bfloat16 on CUDA, float32 on the CPU unless told otherwise. Raises ValueError for an unknown one."""
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name}; allowed: {', '.join(DTYPES)}, auto")
    return DTYPES[name]


def build_engine(model: Any, request: BuildRequest, progress: Progress | None = None) -> Engine:
    """Compiles a decoder; see `camshaft.compile`."""
    timer = Timer(progress)
    device = resolve_device(request.device, request.target)
    dtype = resolve_dtype(request.dtype, device)
    timer.begin("opening the model")
    source = open_model(model, dtype)
    _check_stored(source, request)
    layer, exit_weights = read_exit_option(request.early_exit, dtype, source.name)
    config = replace(
        _config(request, source, device, dtype), early_exit=layer,
        exit_head=None if exit_weights is None else exit_weights.digest,
    )  # fmt: skip
    data = read_calibration(recipe_of(config.quantize), request.calibration, source, config.kv_cache_dtype)
    config = replace(config, calibration=None if data is None else data.digest())
    key = cache.build_key(_identity(source, config, request))
    if request.use_cache and not request.verify and request.dump_dir is None:
        engine = cache.find(key, source.weights, source.tokenizer_dir)
        if engine is not None:
            timer.end()
            engine.manifest = replace(engine.manifest, timings={**timer.seconds, "cached": 1.0})
            logger.info("%s: build %s reused from the cache", source.name, key)
            return engine
    timer.begin("tracing")
    program = trace_decoder(source)
    timer.begin("passes")
    program = _run_passes(program, config, request, quantizer_of(data, device, progress), exit_weights)
    verify_packed(program)
    facts = _facts(source, program)
    return _lower(program, source, config, facts, key, request, timer)


def _run_passes(
    program: Program,
    config: BuildConfig,
    request: BuildRequest,
    quantizer: LayerQuantizer | None,
    exit_weights: ExitWeights | None,
) -> Program:
    compare = None
    if request.verify:
        from ..graph.numerics import Comparison

        compare = Comparison(program)
    manager = PassManager(passes_of(config, quantizer, exit_weights), dump_dir=request.dump_dir, compare=compare)
    return manager.run(program)


def passes_of(
    config: BuildConfig, quantizer: LayerQuantizer | None = None, exit_weights: ExitWeights | None = None
) -> list[GraphPass]:
    """The passes of a build. quantizer: needed where its recipe is calibrated; exit_weights: where the early exit was trained."""
    return decoder_passes(
        block_size=config.block_size,
        quantize=recipe_of(config.quantize),
        quantizer=quantizer,
        kernels=kernel_support(config.target, torch.device(config.device)),
        cache_dtype=CACHE_DTYPES[config.kv_cache_dtype],
        fuse_rope=config.device == "cuda",
        hidden_layers=config.hidden_layers,
        early_exit=config.early_exit,
        exit_weights=exit_weights,
    )


def _lower(
    program: Program,
    source: ModelSource,
    config: BuildConfig,
    facts: ModelFacts,
    key: str,
    request: BuildRequest,
    timer: Timer,
) -> Engine:
    device = torch.device(config.device)
    assert program.cache is not None
    work = Path(tempfile.mkdtemp(prefix="camshaft-build-"))
    kept = False
    try:
        lowering = lower_program(program, config, work / "engines", timer, use_cache=request.use_cache)
        timer.end()
        plan, weights = lowering.plan, program.all_weights
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            camshaft_version=__version__,
            versions=_versions(lowering),
            hardware=hardware_of(device),
            build=replace(config, target=lowering.target),
            model=facts,
            cache=program.cache,
            passes=program.history,
            report=(*program.info.get("notes", ()), *lowering.report, *plan.report),
            timings=timer.seconds,
            engines=lowering.files,
            choices=lowering.choices,
        )
        if request.use_cache:
            entry = cache.store(key, manifest, plan, weights, work / "engines")
            return Engine(manifest, plan, weights, entry / "engines", source.tokenizer_dir)
        engine = Engine(manifest, plan, weights, work / "engines", source.tokenizer_dir)
        engine.remove_with_engine(work)
        kept = True
        return engine
    finally:
        if not kept:
            shutil.rmtree(work, ignore_errors=True)


def _versions(lowering: Lowering) -> dict[str, str]:
    """The packages that a build depends on."""
    versions = {"torch": str(torch.__version__), "transformers": _version("transformers")}
    for name in {lowering.target, *(file.target for file in lowering.files)} - {"auto"}:
        versions |= get_target(name).versions()
    return versions


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _config(request: BuildRequest, source: ModelSource, device: torch.device, dtype: torch.dtype) -> BuildConfig:
    """Fills in defaults and checks the numbers. Raises ValueError."""
    limit = source.max_positions
    max_seq_len = request.max_seq_len or min(limit or DEFAULT_MAX_SEQ_LEN, DEFAULT_MAX_SEQ_LEN)
    if limit is not None and max_seq_len > limit:
        raise ValueError(
            f"max_seq_len is {max_seq_len}, but {source.name} knows {limit} positions; give at most {limit}"
        )
    on_gpu = device.type == "cuda"
    max_batch_tokens = request.max_batch_tokens or (8192 if on_gpu else 1024)
    max_sequences = request.max_sequences or min(256 if on_gpu else 64, max_batch_tokens)
    for name, number, low in (
        ("max_seq_len", max_seq_len, 2),
        ("max_batch_tokens", max_batch_tokens, 2),
        ("max_sequences", max_sequences, 1),
        ("block_size", request.block_size, 1),
    ):
        if number < low:
            raise ValueError(f"{name} is {number}; allowed: {low} or more")
    if max_sequences > max_batch_tokens:
        raise ValueError(
            f"max_sequences is {max_sequences}, more than max_batch_tokens ({max_batch_tokens}); each needs a token a step"
        )
    if request.target == "torch_tensorrt":
        raise ValueError(
            "target torch_tensorrt compiles modules with example_inputs; for a decoder use target='tensorrt', or 'auto'"
        )
    if request.target != "auto":
        reason = get_target(request.target).unavailable(device)
        if reason is not None:
            usable = [name for name, why in available_targets(device).items() if why is None]
            raise ValueError(
                f"target {request.target} cannot run on {device.type}: {reason}. Targets that can: {', '.join(usable)}, auto"
            )
    if request.capabilities and request.target != "tensorrt":
        raise ValueError(f"capabilities are for target tensorrt, and the target is {request.target}; leave them out")
    recipe = resolve_recipe(request.quantize, request.group)
    kv_cache_dtype = cache_dtype_of(recipe, request.kv_cache_dtype)
    _check_precision(request, recipe, kv_cache_dtype, device)
    check_layers(request.hidden_layers, None, source.name)
    return BuildConfig(
        target=request.target,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        max_seq_len=max_seq_len,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        block_size=request.block_size,
        buckets=_buckets(request.buckets, max_batch_tokens, max_sequences) if on_gpu else (),
        capabilities=request.capabilities,
        quantize=recipe_data(recipe),
        kv_cache_dtype=kv_cache_dtype,
        batch_invariant=request.batch_invariant,
        hidden_layers=request.hidden_layers,
    )


def _check_stored(source: ModelSource, request: BuildRequest) -> None:
    """Raises ValueError where a checkpoint that is quantized already is to be quantized."""
    if source.quantized is not None and request.quantize is not None:
        raise ValueError(
            f"quantize is {request.quantize!s}, and the checkpoint {source.name} is quantized already ({source.quantized}); leave "
            "it out, or give a checkpoint that is not quantized"
        )


def _check_precision(request: BuildRequest, recipe: Recipe | None, kv_cache_dtype: str, device: torch.device) -> None:
    """Raises ValueError for an unknown dtype of the cache, or for what the device has no kernels for."""
    if kv_cache_dtype not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}; allowed: {', '.join(map(repr, CACHE_DTYPES))}")
    if device.type == "cuda" and torch.cuda.is_available() and not request.capabilities:
        _check_fp8(recipe, kv_cache_dtype, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    if request.batch_invariant and device.type != "cuda":
        raise ValueError(
            f"batch_invariant is on and the device is {device.type}; its kernels run on CUDA only: leave it out, or build with "
            "device='cuda'"
        )


def _check_fp8(recipe: Recipe | None, kv_cache_dtype: str, gpu: str, capability: tuple[int, int]) -> None:
    """Raises ValueError where fp8 is asked of a GPU that has none: neither conversions nor products before 8.9."""
    asked = [f"quantize={recipe_text(recipe_data(recipe))!r}"] if uses_fp8(recipe) else []
    asked += ["kv_cache_dtype='fp8'"] if kv_cache_dtype == "fp8" else []
    if asked and capability < _FP8_CAPABILITY:
        least = ".".join(map(str, _FP8_CAPABILITY))
        raise ValueError(
            f"{' and '.join(asked)} on {gpu} of compute capability {capability[0]}.{capability[1]}; fp8 needs {least} or newer: "
            "build without it, or on another GPU"
        )


def _buckets(given: tuple[int, ...] | None, max_batch_tokens: int, max_sequences: int) -> tuple[int, ...]:
    """The token counts to build for; full steps and full decode steps are among them. Raises ValueError for impossible ones."""
    if given is None:
        return default_buckets(max_batch_tokens, max_sequences)
    wrong = [size for size in given if not 1 <= size <= max_batch_tokens]
    if wrong:
        raise ValueError(f"buckets hold {wrong}; allowed: 1 to max_batch_tokens ({max_batch_tokens})")
    return tuple(sorted({*given, min(max_sequences, max_batch_tokens), max_batch_tokens}))


def _identity(source: ModelSource, config: BuildConfig, request: BuildRequest) -> dict[str, Any]:
    """Everything that decides what a build looks like, weights' values aside."""
    model: Any = source.model
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.device.type != "meta" and name not in model.state_dict()
    }
    device = torch.device(config.device)
    return {
        "camshaft": cache.source_fingerprint(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "targets": {
            name: get_target(name).versions() for name, why in available_targets(device).items() if why is None
        },
        "hardware": hardware_of(device),
        "build": vars(config),
        "class": type(model).__qualname__,
        "config": model.config.to_dict(),
        "weights": {
            n: [list(w.shape), str(w.dtype), w.stored.identity if w.stored is not None else None]
            for n, w in source.weights.items()
        },
        "constants": cache.constant_digest(buffers),
        # what calibration finds depends on the weights themselves, and is kept in the cache
        "values": None if config.calibration is None else cache.weight_digest(source.weights),
        "name": source.name,
        "eos": source.eos_token_ids,
    }


def _facts(source: ModelSource, program: Program) -> ModelFacts:
    output = next(node for node in program.graph.nodes if node.op == "output")
    logits: fx.Node = output.args[0][0]
    info = source.info
    head = head_of(logits)
    return ModelFacts(
        name=source.name,
        architecture=info["architecture"],
        model_type=info["model_type"],
        config=info["config"],
        vocab_size=int(logits.meta["val"].shape[-1]),
        eos_token_ids=source.eos_token_ids,
        max_positions=source.max_positions,
        hidden_size=None if head is None else int(value(cast(fx.Node, head.args[0])).shape[-1]),
        hidden_input=source.hidden_input,
        num_parameters=sum(_count(program.weights[spec.key].shape) for _, spec in program.placeholders("weight")),
    )


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def is_decoder(model: Any) -> bool:
    """Whether `model` is what `build_engine` takes: a path, a hub id or a Transformers model."""
    return not isinstance(model, nn.Module) or hasattr(model, "config") and hasattr(model, "get_output_embeddings")
