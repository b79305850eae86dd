"""Whole-graph export: from token ids to logits in one file, for use without Camshaft's runtime. See docs/export.md."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .export import Export, export_decoder
from .request import ExportRequest

if TYPE_CHECKING:
    import torch

__all__ = ["Export", "ExportRequest", "export_decoder", "export_model"]


def export_model(
    model: Any,
    path: str | Path,
    *,
    format: str = "onnx",
    cache: str = "linear",
    dtype: str | torch.dtype | None = None,
    batch_size: int | None = None,
    max_seq_len: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    prefill_tokens: int | None = None,
    logits: str = "last",
    baked_weights: bool = False,
    progress: bool | None = None,
) -> Export:
    """Writes a decoder as one graph, token ids to logits, that runs without Camshaft: ONNX, or TensorRT engines.

    The KV caches are inputs and outputs of the graph; export.json in the directory says how to call it.

    Args:
        model: a Hugging Face directory or hub id, "demo" for the bundled model, or a Transformers causal LM in memory.
        path: the directory to write; it must not exist, or be empty.
        format: "onnx" (model.onnx and its weights), or "tensorrt" (an engine for prefill and one for decode).
        cache: "linear", [batch, heads, max_seq_len, head size] per layer; or "paged", blocks that block tables name.
        dtype: of weights, caches and computation: "float32", "bfloat16", "float16"; None: float32 for ONNX, bfloat16 for TensorRT.
        batch_size: sequences in a step; None: any number (ONNX), 1 (TensorRT).
        max_seq_len: most tokens of one sequence, prompt and output; None: what the model knows, at most 4,096.
        block_size: tokens in a block of a paged cache.
        num_blocks: blocks of a paged cache, block 0 among them, which belongs to no sequence; None: any number (ONNX), enough for
            batch_size sequences of max_seq_len (TensorRT).
        prefill_tokens: rows per sequence of the TensorRT prefill engine; None: 128, or max_seq_len if that is less.
        logits: "last": of one row of each sequence, which the input last_rows names, [batch, vocabulary]; "all": of every row.
        baked_weights: TensorRT: weights inside the engines, instead of inputs beside a safetensors file.
        progress: show a progress bar; None: where the output is a terminal.

    Raises:
        ValueError: a model, format, cache, number or path that does not fit; the message says what is allowed.
        camshaft.graph.capture.CaptureError: a model that cannot be traced; it names the module or operator in the way.
    """
    from ...api import progress_bar

    if model == "demo":
        from ...models import demo

        model = demo.path()
    request = ExportRequest(
        format=format,
        cache=cache,
        dtype=dtype,
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        block_size=block_size,
        num_blocks=num_blocks,
        prefill_tokens=prefill_tokens,
        logits=logits,
        baked_weights=baked_weights,
    )
    with progress_bar(progress) as report:
        return export_decoder(model, Path(path), request, report)
