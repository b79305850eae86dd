"""Ceilings: the time that a workload takes at least on a device, from its bytes and floating-point operations. Imports no torch.

A step of B tokens over weights of W bytes with P parameters in matrices, and KV of K bytes to read:

    step >= max(2 * P * B / peak_flops, W / bandwidth) + K / bandwidth

The matrix products and attention are different kernels that run one after the other, so their times add up (after the roofline
model of Williams, Waterman and Patterson, 2009). A full batch in every step and no other kernel is assumed; nothing reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...export.manifest import BuildConfig


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a device reaches, measured: bytes per second that it reads, and floating-point operations per second by dtype."""

    read_bytes_s: float
    flops: Mapping[str, float]


PEAKS = {"NVIDIA H200": Peaks(read_bytes_s=4.0e12, flops={"bfloat16": 788e12, "float16": 788e12, "fp8": 1419e12})}
"""Measured peaks by the name of the GPU: reading weights, and matrix products of 8192 x 8192 x 8192."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a step costs. Parameters are counts, sizes are bytes.

    linear_parameters: in matrices that every token goes through. head_parameters: in the one to the logits, which only sampled
    rows go through. step_weight_bytes: weights that a step reads, the table of embeddings aside. kv_token_bytes: keys and values of
    one token over all layers. attention_width: query heads times head size, summed over the layers; 0 where it is not known.
    """

    linear_parameters: int
    head_parameters: int
    step_weight_bytes: int
    kv_token_bytes: float
    attention_width: int
    precision: str
    """Key of `Peaks.flops`: the dtype of the matrix products."""
    head_precision: str
    """The same of the product that gives the logits."""


def shape_facts(engine: Any) -> dict[str, Any] | None:
    """A compiled engine's `ModelShape` as plain data; None for mixtures of experts, whose steps read some of their weights only."""
    weights = [engine.weights[name] for name in engine.plan.weight_names]
    matrices = [w for w in weights if len(w.shape) >= 2 and min(w.shape) > 1]
    vocabulary = [w for w in matrices if engine.vocab_size in w.shape]
    if any(len(w.shape) > 2 for w in matrices) or not vocabulary:
        return None
    table = max(w.num_bytes for w in vocabulary) if len(vocabulary) > 1 else 0  # rows are looked up, not all read
    groups = engine.cache_groups
    config = engine.config
    return asdict(
        ModelShape(
            linear_parameters=sum(math.prod(w.shape) for w in matrices) - sum(math.prod(w.shape) for w in vocabulary),
            head_parameters=math.prod(vocabulary[0].shape),
            step_weight_bytes=sum(w.num_bytes for w in weights) - table,
            kv_token_bytes=sum(group.bytes_per_block for group in groups) / engine.block_size,
            attention_width=_head_width(engine.manifest.model) * sum(group.num_layers for group in groups),
            precision=_precision(config),
            head_precision="fp8" if min(w.dtype.itemsize for w in vocabulary) == 1 else config.dtype,
        )
    )


def _precision(config: BuildConfig) -> str:
    """What linear layers multiply in."""
    from ...export.quantization import recipe_of

    recipe = recipe_of(config.quantize)
    formats = () if recipe is None else recipe.formats
    return "fp8" if any(format.activations.startswith("fp8") for format in formats) else config.dtype


def _head_width(model: Any) -> int:
    """Query heads times head size of a layer; 0 where the config does not tell."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(model.model_type, **{k: v for k, v in model.config.items() if k != "model_type"})
    except (ValueError, KeyError, TypeError):
        return 0
    heads, hidden = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
    return int(heads * (getattr(config, "head_dim", None) or (hidden // heads if heads else 0)))


def shape_of(document: Mapping[str, Any]) -> ModelShape:
    """The shape that a benchmark document holds. Raises ValueError where it holds none."""
    facts = document["model"].get("shape")
    if facts is None:
        raise ValueError("the document has no model.shape: it was made by an earlier version; measure again")
    return ModelShape(**facts)


def peaks_of(document: Mapping[str, Any]) -> Peaks | None:
    """The measured peaks of the document's GPU, None where there are none."""
    gpus = document["machine"].get("gpus") or [""]
    return PEAKS.get(gpus[0])


def decode_floor_s(shape: ModelShape, peaks: Peaks, *, sequences: int, context: float) -> float:
    """Least seconds of a decode step of `sequences` tokens, each with `context` tokens behind it."""
    return step_floor_s(shape, peaks, tokens=sequences, sampled=sequences, kv_tokens=sequences * context, attended=0.0)


def step_floor_s(
    shape: ModelShape, peaks: Peaks, *, tokens: float, sampled: float, kv_tokens: float, attended: float
) -> float:
    """Least seconds of a step: `tokens` go through the layers, `sampled` through the head; decoding reads the keys and values of
    `kv_tokens`, and prompts attend to `attended` pairs of tokens.
    """
    layers = 2.0 * shape.linear_parameters * tokens / peaks.flops[shape.precision]
    head = 2.0 * shape.head_parameters * sampled / peaks.flops[shape.head_precision]
    products = max(layers + head, shape.step_weight_bytes / peaks.read_bytes_s)
    half = peaks.flops.get("bfloat16", peaks.flops[shape.precision])
    prefill = 4.0 * shape.attention_width * attended / half
    return products + prefill + kv_tokens * shape.kv_token_bytes / peaks.read_bytes_s


def throughput_ceiling(
    shape: ModelShape, peaks: Peaks, *, num_requests: int, input_len: float, output_len: float, max_sequences: int
) -> float:
    """Most output tokens per second of `num_requests` requests that are all queued, `max_sequences` at a time.

    Prompts are spread over the decode steps: each has `batch` sequences and the share of the prompts' tokens that falls to it.
    """
    batch = min(max_sequences, num_requests)
    steps = num_requests * output_len / batch
    prompts = num_requests * input_len / steps
    step = step_floor_s(
        shape, peaks,
        tokens=batch * (output_len - 1) / output_len + prompts, sampled=batch,
        kv_tokens=batch * (input_len + output_len / 2), attended=prompts * input_len / 2,
    )  # fmt: skip
    return num_requests * output_len / (steps * step)


def latency_ceiling(shape: ModelShape, peaks: Peaks, *, input_len: float, output_len: float) -> float:
    """Most tokens per second of one request alone, its prompt aside."""
    return 1.0 / decode_floor_s(shape, peaks, sequences=1, context=input_len + output_len / 2)
