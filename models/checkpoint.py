"""Safetensors checkpoints: which tensor is where, under which name the model wants it, and its lazy reading.

Renames and conversions (experts stored one by one, fused projections) are Transformers' own, taken from its conversion
mapping and run one target tensor at a time.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.weights import Weight
from .quantized_checkpoint.load import read_quantized
from .quantized_checkpoint.settings import Settings

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where there is one.

    Raises ValueError if there is none, or if the index names a file that is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(
                f"{index} names {len(missing)} missing file(s), first {missing[0]!r}; download the checkpoint again"
            )
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        hint = f" (found {others[0]}: save it as safetensors with save_pretrained)" if others else ""
        raise ValueError(f"{directory} holds no *.safetensors file{hint}")
    return files


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a safetensors file. Raises ValueError for a file that is truncated or none at all."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in list(handle.keys())}
            return {name: (tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); download or write it again") from error
    except KeyError as error:
        raise ValueError(f"{file} holds a dtype that is not known: {error}") from error


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)

    return load


@dataclass(frozen=True)
class Checkpoint:
    """Weights by the model's own names, and lines for the build's report."""

    weights: dict[str, Weight]
    notes: tuple[str, ...] = ()


def open_checkpoint(directory: Path, model: nn.Module, quantization: Settings | None = None) -> Checkpoint:
    """Lazily read weights for every parameter and persistent buffer of `model`.

    quantization: how the checkpoint is quantized, or None; weights of quantized layers then carry what they are `stored` as.
    Raises ValueError if a file is missing or truncated, a weight is missing, or a shape does not fit.
    """
    stored: dict[str, Weight] = {}
    files: dict[str, Path] = {}
    for file in checkpoint_files(directory):
        for name, (shape, dtype) in read_header(file).items():
            stored[name], files[name] = Weight(shape, dtype, _reader(file, name)), file
    if quantization is None:
        return Checkpoint(_fitted(directory, model, stored, []))
    read = read_quantized(quantization, stored, files)
    dense: list[str] = []
    weights = _fitted(directory, model, read.weights, dense)
    if not dense:
        return Checkpoint(weights, read.notes)
    note = (
        f"{dense[0]} and {len(dense) - 1} more are dequantized when they are loaded: several make one tensor (experts)"
    )
    return Checkpoint(weights, (*read.notes, f"{quantization.method}: {note}"))


def _fitted(directory: Path, model: nn.Module, stored: dict[str, Weight], dense: list[str]) -> dict[str, Weight]:
    """Stored tensors as the model wants them; names of those that are dequantized for it are added to `dense`.

    Raises ValueError for what is missing or has another shape.
    """
    wanted = dict(model.state_dict())
    weights = _convert(stored, wanted, model, dense)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, origin in tied.items():
        if target not in weights and origin in weights:
            weights[target] = weights[origin]
        elif origin not in weights and target in weights:
            weights[origin] = weights[target]
    buffers = dict(model.named_buffers())
    missing = [name for name in wanted if name not in weights and name not in buffers]
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of {len(wanted)} weights of {type(model).__name__}, first {missing[0]!r}; "
            f"the checkpoint holds {len(stored)} tensors, first {next(iter(stored), 'none')!r}"
        )
    for name, weight in weights.items():
        if weight.shape != tuple(wanted[name].shape):
            raise ValueError(
                f"{directory}: weight {name!r} has shape {list(weight.shape)}, the config asks for {list(wanted[name].shape)}; "
                "config.json and the checkpoint do not belong together"
            )
    return weights


def _convert(stored: dict[str, Weight], wanted: dict[str, Tensor], model: Any, dense: list[str]) -> dict[str, Weight]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    weights: dict[str, Weight] = {}
    merged: dict[str, list[tuple[str, str]]] = defaultdict(list)
    prefix = model.base_model_prefix
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            _refuse_lost_bias(key, stored)
            continue
        if pattern is not None:
            merged[name].append((key, pattern))
        else:
            weights[name] = stored[key].cast(wanted[name].dtype)
    for name, parts in merged.items():
        dense += [key for key, _ in parts if stored[key].stored is not None]
        _add_converted(weights, name, parts, by_pattern[parts[0][1]], stored, wanted, model)
    return weights


def _refuse_lost_bias(key: str, stored: dict[str, Weight]) -> None:
    """Some writers of quantized layers give each a bias of zeros, which the model has no place for; others may not be lost."""
    weight = stored.get(key.removesuffix(".bias") + ".weight")
    if key.endswith(".bias") and weight is not None and weight.stored is not None and bool(stored[key].load().any()):
        raise ValueError(
            f"{key!r} of the checkpoint is not zero, and config.json describes a model that has no such bias"
        )


def _add_converted(
    weights: dict[str, Weight],
    first: str,
    parts: list[tuple[str, str]],
    converter: Any,
    stored: dict[str, Weight],
    wanted: dict[str, Tensor],
    model: Any,
) -> None:
    """Adds the weights that one conversion makes out of several stored tensors (or of one, split)."""

    def run(device: str) -> dict[str, Tensor]:
        work = copy.deepcopy(converter)
        for key, pattern in parts:
            part = stored[key]
            read = part.load if device == "cpu" else partial(torch.empty, part.shape, dtype=part.dtype, device="meta")
            work.add_tensor(first, key, pattern, read)
        made = work.convert(first, model=model, config=model.config)
        return {name: (value[0] if isinstance(value, list) else value) for name, value in made.items()}

    for name, shape_only in run("meta").items():
        if name in wanted:
            target = wanted[name].dtype
            weight = Weight(tuple(shape_only.shape), shape_only.dtype, partial(_item, run, name))
            weights[name] = weight.cast(target)


def _item(run: Callable[[str], dict[str, Tensor]], name: str) -> Tensor:
    return run("cpu")[name]
