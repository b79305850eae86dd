"""`camshaft export`: a model becomes one graph that runs without Camshaft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import BlockSizeOption, JsonOption, ModelArgument, Output, SeqLenOption, format_bytes, output, table

if TYPE_CHECKING:
    from ..export.whole import Export

EXAMPLES = (
    "Example: [bold]camshaft export demo -o demo-onnx[/], then [bold]python docs/examples/run_onnx.py demo-onnx "
    '--text "Once upon a time"[/]. More: docs/export.md.'
)


def export(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Directory to write; it must be new.", show_default=False),
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help='"onnx": one model.onnx, for ONNX Runtime and others. "tensorrt": engines for NVIDIA GPUs.',
        ),
    ] = "onnx",
    cache: Annotated[
        str,
        typer.Option(
            "--cache",
            help='KV cache of each layer: "linear" (one row of max-seq-len tokens per sequence, simple) or "paged" '
            "(blocks that a block table names, as serving engines hold them).",
        ),
    ] = "linear",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help='"float32", "bfloat16" or "float16"; default: float32 for ONNX, bfloat16 for TensorRT. ONNX Runtime on '
            "a CPU does not run bfloat16.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences in a step; default: any number (ONNX), 1 (TensorRT).")
    ] = None,
    max_seq_len: SeqLenOption = None,
    block_size: BlockSizeOption = None,
    num_blocks: Annotated[
        int | None,
        typer.Option("--num-blocks", help="Blocks of a paged cache; default: any number (ONNX), enough (TensorRT)."),
    ] = None,
    prefill_tokens: Annotated[
        int | None,
        typer.Option("--prefill-tokens", help="TensorRT: tokens that the prefill engine takes at once; default: 128."),
    ] = None,
    logits: Annotated[
        str, typer.Option("--logits", help='Which logits come out: of the "last" token of each sequence, or of "all".')
    ] = "last",
    baked_weights: Annotated[
        bool, typer.Option("--baked-weights", help="TensorRT: put the weights into the engines, not beside them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as one graph, token ids to logits, that runs without Camshaft; its KV cache goes in and out.

    To serve with Camshaft's own runtime (batching, prefix cache, streaming) use `camshaft build` instead.
    """
    import camshaft

    with output(as_json) as to:
        made = camshaft.export_model(
            model,
            out,
            format=format,
            cache=cache,
            dtype=dtype,
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            block_size=16 if block_size is None else block_size,
            num_blocks=num_blocks,
            prefill_tokens=prefill_tokens,
            logits=logits,
            baked_weights=baked_weights,
        )
        to.document = {"path": str(out), **made.document}
        _print(to, made, out)


def _print(to: Output, made: Export, out: Path) -> None:
    document = made.document
    for program in document["programs"]:
        shown = [[entry["name"], entry["dtype"], _shape(entry)] for entry in _heads(program["inputs"])]
        shown += [["-> " + entry["name"], entry["dtype"], _shape(entry)] for entry in _heads(program["outputs"])]
        to.console.print(table(f"{program['file']}", ["tensor", "dtype", "shape"], shown, left=(0, 1, 2)))
    for note in document["notes"]:
        to.print(f"note: {note}")
    total = sum(facts["bytes"] for facts in document["files"].values())
    layers = len(document["cache"]["layers"])
    to.print(
        f"{out}: {document['model']['name']}, {document['format']}, {document['cache']['kind']} cache of {layers} layers, "
        f"{document['dtype']}, {document['max_seq_len']} tokens a sequence; {format_bytes(total)}",
        style="bold",
    )
    script = "run_onnx.py" if document["format"] == "onnx" else "run_engine.py"
    to.print(f"run it: python docs/examples/{script} {out} --ids 1,2,3")


def _heads(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tensors without the caches of all layers but the first."""
    return [t for t in tensors if "_cache" not in t["name"] or t["name"].endswith(".0")]


def _shape(entry: dict[str, Any]) -> str:
    return "[" + ", ".join(map(str, entry["shape"])) + "]"
