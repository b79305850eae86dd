"""NVIDIA ModelOpt's unified Hugging Face checkpoints: config.json's quantization_config, or hf_quant_config.json.

quant_algo                   tensors of a layer
FP8                          weight float8_e4m3fn [N, K], weight_scale [], input_scale []
FP8_PER_CHANNEL_PER_TOKEN    weight float8_e4m3fn [N, K], weight_scale [N]
FP8_PB_WO                    weight float8_e4m3fn [N, K], weight_scale [N / 128, 1, K / 128, 1]; activations as they are
NVFP4                        weight uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16], weight_scale_2 [] and
                             input_scale [], which multiply
W4A16_NVFP4                  the same without input_scale; activations as they are
MXFP8                        weight float8_e4m3fn [N, K], weight_scale uint8 (e8m0) [N, K / 32]
MIXED_PRECISION              quantized_layers maps names of layers to the above
"""

from __future__ import annotations

from collections.abc import Callable

from ...graph.linear_format import LinearFormat
from ...graph.stored_weight import StoredWeight
from ...graph.weights import Weight
from .layers import byte_modules, float4_layer, fp8_layer, mxfp8_layer
from .settings import Settings
from .tensors import Tensors


def _fp8(tensors: Tensors, module: str) -> StoredWeight:
    return fp8_layer(tensors, module, scale="weight_scale", group=-1, activations="fp8_static")


def _fp8_rows(tensors: Tensors, module: str) -> StoredWeight:
    return fp8_layer(tensors, module, scale="weight_scale", group=0, activations="fp8")


def _fp8_blocks(tensors: Tensors, module: str) -> StoredWeight:
    return fp8_layer(tensors, module, scale="weight_scale", group=128, block=True, activations="none")


def _nvfp4(tensors: Tensors, module: str) -> StoredWeight:
    format = LinearFormat(weights="nvfp4", activations="nvfp4")
    return float4_layer(
        tensors, module, format, values="weight", global_name="weight_scale_2", input_name="input_scale"
    )


def _nvfp4_weights(tensors: Tensors, module: str) -> StoredWeight:
    format = LinearFormat(weights="nvfp4")
    return float4_layer(
        tensors, module, format, values="weight", global_name="weight_scale_2", input_name="input_scale"
    )


def _mxfp8(tensors: Tensors, module: str) -> StoredWeight:
    return mxfp8_layer(tensors, module, "mxfp8")


ALGORITHMS: dict[str, Callable[[Tensors, str], StoredWeight]] = {
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_rows,
    "FP8_PB_WO": _fp8_blocks,
    "NVFP4": _nvfp4,
    "W4A16_NVFP4": _nvfp4_weights,
    "MXFP8": _mxfp8,
}


def read(settings: Settings, tensors: Tensors, notes: list[str]) -> dict[str, Weight]:
    """The layers of a ModelOpt checkpoint by the names of their weights. Raises ValueError for another quant_algo."""
    settings = Settings(settings.file, {**settings.facts, **settings.get("quantization", {})})
    if settings.get("kv_cache_quant_algo") or settings.get("kv_cache_scheme"):
        notes.append(
            "modelopt: the KV cache's scheme is ignored; kv_cache_dtype decides how keys and values are stored"
        )
    return {f"{module}.weight": _layer(settings, tensors, module).dense() for module in byte_modules(tensors)}


def _layer(settings: Settings, tensors: Tensors, module: str) -> StoredWeight:
    algorithm = str(settings.get("quant_algo"))
    if algorithm == "MIXED_PRECISION":
        facts = settings.get("quantized_layers", {}).get(module)
        if facts is None:
            raise settings.error(f"layer {module!r} is stored quantized and quantized_layers does not name it")
        algorithm = str(facts.get("quant_algo"))
    if algorithm not in ALGORITHMS:
        raise settings.error(f"quant_algo is {algorithm!r}, allowed: {', '.join(ALGORITHMS)}, MIXED_PRECISION")
    return ALGORITHMS[algorithm](tensors, module)
