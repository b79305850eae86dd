"""Reads a quantized checkpoint of any scheme: its tensors become dense weights that carry what they are stored as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...graph.weights import Weight
from . import awq, compressed_tensors, fp8, gptq, modelopt, mxfp4
from .settings import Settings
from .tensors import Tensors

SCHEMES: dict[str, Callable[[Settings, Tensors, list[str]], dict[str, Weight]]] = {
    "awq": awq.read,
    "gptq": gptq.read,
    "compressed-tensors": compressed_tensors.read,
    "modelopt": modelopt.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "mxfp4": mxfp4.read,
}
"""Schemes by the `quant_method` of quantization_config."""


@dataclass(frozen=True)
class QuantizedTensors:
    """A checkpoint's tensors by name, those of quantized layers dense with `stored` set; lines for the build's report."""

    weights: dict[str, Weight]
    notes: tuple[str, ...]


def check_scheme(settings: Settings) -> None:
    """Raises ValueError, naming the scheme and those that are known, where it is not one of them."""
    if settings.method not in SCHEMES:
        raise ValueError(
            f"{settings.file}: the checkpoint is quantized as {settings.method!r}, which is not known; "
            f"known: {', '.join(SCHEMES)}. Give a checkpoint in one of these, or one that is not quantized and quantize='...'"
        )


def read_quantized(settings: Settings, tensors: Mapping[str, Weight], files: Mapping[str, Path]) -> QuantizedTensors:
    """Reads the tensors of a checkpoint (lazily; single scales, shapes and orders of columns at once).

    Raises ValueError for an unknown scheme, and for tensors that are missing, do not fit, or are not understood.
    """
    check_scheme(settings)
    held = Tensors(tensors, files)
    notes: list[str] = []
    layers = SCHEMES[settings.method](settings, held, notes)
    kept = held.unused()
    scales = held.cache_scales()
    if scales:
        notes.append(f"{settings.method}: {len(scales)} scales of a quantized KV cache are ignored, first {scales[0]}")
    for name in kept:
        module, _, part = name.rpartition(".")
        if f"{module}.weight" in layers and part != "bias" and name not in scales:
            raise ValueError(
                f"{held.where(name)}: {name!r} belongs to a quantized layer, and {settings.method} with these settings has no such "
                f"tensor; {settings.file} and the checkpoint do not belong together, or the scheme has an unknown extension"
            )
    if not layers and not scales and not notes:
        raise ValueError(
            f"{settings.file} says that the checkpoint is quantized ({settings.method}), and no layer of it is stored so; take "
            "quantization_config out if it is not, or download the checkpoint again"
        )
    formats = Counter(str(weight.stored.format) for weight in layers.values() if weight.stored is not None)
    notes = [f"{settings.method}: {count} layers are stored as {format}" for format, count in formats.items()] + notes
    return QuantizedTensors({**kept, **layers}, tuple(notes))
