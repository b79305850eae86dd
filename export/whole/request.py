"""What an export was asked for, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ...models.huggingface import ModelSource
from ...passes.expose_cache import CacheKind
from ..build import DEFAULT_MAX_SEQ_LEN, DTYPES

Format = Literal["onnx", "tensorrt"]
Logits = Literal["last", "all"]

PREFILL_TOKENS = 128
"""Rows per sequence of a TensorRT prefill engine unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What was asked for, before defaults depend on the model; see `camshaft.export_model`."""

    format: str = "onnx"
    cache: str = "linear"
    dtype: str | torch.dtype | None = None
    batch_size: int | None = None
    max_seq_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    prefill_tokens: int | None = None
    logits: str = "last"
    baked_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is exported.

    dtype: of weights, caches and computation. batch_size: sequences in a step, None where it varies. max_seq_len: most tokens of
    one sequence. block_size (tokens) and num_blocks (the scratch block among them; None where it varies) are None for linear
    caches. num_tokens: rows per sequence of each program, by name; None where they vary. logits: of the "last" row of each
    sequence, or of "all" rows.
    """

    format: Format
    cache: CacheKind
    dtype: str
    batch_size: int | None
    max_seq_len: int
    block_size: int | None
    num_blocks: int | None
    num_tokens: dict[str, int | None]
    logits: Logits
    baked_weights: bool


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def check_request(request: ExportRequest) -> None:
    """Raises ValueError for a request that no model could meet; before anything is read."""
    _choice("format", request.format, get_args(Format))
    _choice("cache", request.cache, get_args(CacheKind))
    _choice("logits", request.logits, get_args(Logits))
    dtype_of(request)
    for name, number, low in (
        ("batch_size", request.batch_size, 1),
        ("max_seq_len", request.max_seq_len, 2),
        ("block_size", request.block_size, 1),
        ("num_blocks", request.num_blocks, 2),
        ("prefill_tokens", request.prefill_tokens, 2),
    ):
        if number is not None and number < low:
            raise ValueError(f"{name} is {number}; allowed: {low} or more")
    if request.cache == "linear" and request.num_blocks is not None:
        raise ValueError("num_blocks is for paged caches; give cache='paged' too, or leave it out")
    if request.format == "onnx" and request.baked_weights:
        raise ValueError(
            "baked_weights is for format='tensorrt'; an ONNX export always keeps its weights in one file beside the graph"
        )
    if request.format == "onnx" and request.prefill_tokens is not None:
        raise ValueError("prefill_tokens is for format='tensorrt'; one ONNX file takes any number of tokens")


def dtype_of(request: ExportRequest) -> torch.dtype:
    """The dtype: float32 for ONNX and bfloat16 for TensorRT unless told otherwise. Raises ValueError for an unknown one."""
    if request.dtype is None or request.dtype == "auto":
        return torch.float32 if request.format == "onnx" else torch.bfloat16
    name = str(request.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name}; allowed: {', '.join(DTYPES)}, auto")
    return DTYPES[name]


def make_config(request: ExportRequest, source: ModelSource) -> ExportConfig:
    """Fills in defaults and checks the numbers against the model. Raises ValueError."""
    limit = source.max_positions
    max_seq_len = request.max_seq_len or min(limit or DEFAULT_MAX_SEQ_LEN, DEFAULT_MAX_SEQ_LEN)
    if limit is not None and max_seq_len > limit:
        raise ValueError(
            f"max_seq_len is {max_seq_len}, but {source.name} knows {limit} positions; give at most {limit}"
        )
    paged = request.cache == "paged"
    batch_size, num_blocks = request.batch_size, request.num_blocks
    num_tokens: dict[str, int | None] = {"model": None}
    if request.format == "tensorrt":
        batch_size = batch_size or 1
        prefill = request.prefill_tokens or min(PREFILL_TOKENS, max_seq_len)
        if request.max_seq_len is None and not paged and prefill <= max_seq_len:
            max_seq_len -= max_seq_len % prefill  # a linear cache takes whole chunks
        if prefill > max_seq_len or max_seq_len % prefill and not paged:
            raise ValueError(
                f"max_seq_len is {max_seq_len} and prefill_tokens {prefill}; a linear cache takes whole chunks of a prompt, so "
                f"max_seq_len must be a multiple of prefill_tokens, such as {max(max_seq_len // prefill, 1) * prefill}"
            )
        num_tokens = {"prefill": prefill, "decode": 1}
        if paged and num_blocks is None:
            num_blocks = batch_size * -(-max_seq_len // request.block_size) + 1
    return ExportConfig(
        format=_choice("format", request.format, get_args(Format)),
        cache=_choice("cache", request.cache, get_args(CacheKind)),
        dtype=str(dtype_of(request)).removeprefix("torch."),
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        block_size=request.block_size if paged else None,
        num_blocks=num_blocks if paged else None,
        num_tokens=num_tokens,
        logits=_choice("logits", request.logits, get_args(Logits)),
        baked_weights=request.baked_weights,
    )
