"""The export: model -> Program -> passes -> one graph with exposed caches -> files in a directory.

DIR/export.json                 what the files are: names, dtypes and shapes of inputs and outputs, limits, versions, sha256
DIR/model.onnx, model.onnx.data one ONNX model and its weights, or
DIR/prefill.engine, decode.engine, weights.safetensors   TensorRT engines for two numbers of rows, and the weights they share
DIR/tokenizer/...               tokenizer.json and its companions, where the model has them
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ... import __version__
from ...graph.program import PassRecord, Program
from ...graph.verify import verify_packed
from ...models.huggingface import ModelSource, open_model, trace_decoder
from ...passes.expose_cache import ExposeCache
from ...passes.manager import PassManager
from ...passes.normalize import Normalize
from ...passes.page_attention import PageAttention
from ...passes.pipeline import canonicalize_passes, fuse_passes
from ...passes.select_rows import SelectRows
from ..artifact import atomic_directory, copy_tokenizer, file_digest
from ..build import is_decoder
from .interface import Interface, describe_interface
from .request import ExportConfig, ExportRequest, check_request, dtype_of, make_config

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SCRATCH_BLOCK = 0
"""The block of a paged cache that belongs to no sequence: rows and table entries that mean nothing name it."""

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A finished export. document: what export.json says; passes: the pass table of the last program."""

    path: Path
    config: ExportConfig
    document: dict[str, Any]
    passes: tuple[PassRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One program of an export, before it is written: its name, graph and interface."""

    name: str
    program: Program
    interface: Interface


def export_decoder(model: Any, path: Path, request: ExportRequest, progress: Progress | None = None) -> Export:
    """Exports a decoder; see `camshaft.export_model`."""
    check_request(request)
    check_path(path)
    tell = progress or (lambda what, done, total: None)
    if request.format == "tensorrt":
        from .tensorrt_engines import check_available
    else:
        from .onnx_model import check_available
    check_available()
    if not is_decoder(model):
        raise ValueError(f"{type(model).__name__} is no Transformers causal LM; only decoders can be exported")
    tell("opening the model", 0, 0)
    source = open_model(model, dtype_of(request))
    config = make_config(request, source)
    tell("tracing", 0, 0)
    program = trace_decoder(source)
    tell("passes", 0, 0)
    base = _fused(program, config)
    pieces = [_piece(base, config, name, rows) for name, rows in config.num_tokens.items()]
    with atomic_directory(path, overwrite=True) as work:
        tell("writing", 0, 0)
        programs, extra = _write(pieces, config, source, work)
        if source.tokenizer_dir is not None:
            copy_tokenizer(source.tokenizer_dir, work / "tokenizer")
        document = _document(source, config, pieces[-1].program, programs, extra)
        document["files"] = _files(work)
        (work / "export.json").write_text(json.dumps(document, indent=1) + "\n")
    for note in document["notes"]:
        logger.warning("%s", note)
    return Export(path=path, config=config, document=document, passes=pieces[-1].program.history)


def check_path(path: Path) -> None:
    """Raises ValueError for a path that is taken, unless it is an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists; give a path that does not, or remove it first")


def _fused(program: Program, config: ExportConfig) -> Program:
    """The canonical and fused program, which mixes no tokens outside attention. Raises ValueError if it does."""
    rows = [SelectRows()] if config.logits == "last" else []
    fused = PassManager([*canonicalize_passes(), *fuse_passes(), *rows]).run(program)
    verify_packed(PageAttention(block_size=1)(fused).program)
    return fused


def _piece(base: Program, config: ExportConfig, name: str, num_tokens: int | None) -> Piece:
    width = None
    if config.block_size is not None and num_tokens is not None:
        width = -(-config.max_seq_len // config.block_size)
    expose = ExposeCache(
        kind=config.cache,
        batch_size=config.batch_size,
        num_tokens=num_tokens,
        max_seq_len=config.max_seq_len,
        block_size=config.block_size or 1,
        num_blocks=config.num_blocks,
        table_width=width,
    )
    program = PassManager([expose, Normalize()]).run(base)
    if program.cache is None:
        raise ValueError(
            f"{base.name} cannot be exported: no attention was found in it, so there is no cache to expose"
        )
    return Piece(name=name, program=program, interface=describe_interface(program))


def _write(
    pieces: list[Piece], config: ExportConfig, source: ModelSource, work: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Writes the programs; returns what export.json says of each, and what it says beside them."""
    if config.format == "tensorrt":
        from .tensorrt_engines import write_engines

        return write_engines(pieces, config, work)
    from .onnx_model import OPSET, write_onnx

    (piece,) = pieces
    file = f"{piece.name}.onnx"
    facts = {
        "model": source.name,
        "architecture": source.info["architecture"],
        "cache": config.cache,
        "dtype": config.dtype,
        "max_seq_len": str(config.max_seq_len),
        "block_size": str(config.block_size or 0),
        "eos_token_ids": json.dumps(list(source.eos_token_ids)),
        **{f"version.{name}": text for name, text in _versions("onnx").items()},
    }
    write_onnx(piece.program, piece.interface, work, file, facts)
    notes = []
    if config.dtype == "bfloat16":
        notes.append(
            "ONNX Runtime's CPU provider has no bfloat16 kernels: this file needs another provider or runtime; export with "
            "dtype float32 (or float16) to run it on a CPU"
        )
    return [_program(piece, file)], {"opset": OPSET, "notes": notes}


def _program(piece: Piece, file: str) -> dict[str, Any]:
    """What export.json says of one program."""
    return {
        "name": piece.name,
        "file": file,
        "inputs": [tensor.to_json() for tensor in piece.interface.inputs],
        "outputs": [tensor.to_json() for tensor in piece.interface.outputs],
    }


def _versions(*packages: str) -> dict[str, str]:
    named = {name: version(name) for name in ("transformers", *packages)}
    return {"camshaft": __version__, "torch": str(torch.__version__), **named}


def _document(
    source: ModelSource, config: ExportConfig, program: Program, programs: list[dict[str, Any]], extra: dict[str, Any]
) -> dict[str, Any]:
    output = next(node for node in program.graph.nodes if node.op == "output")
    logits: fx.Node = output.args[0][0]
    assert program.cache is not None
    layers = [
        {"num_kv_heads": x.num_kv_heads, "head_dim": x.head_dim, "value_dim": x.value_dim, "window": x.window}
        for x in program.cache.layers
    ]
    cache: dict[str, Any] = {"kind": config.cache, "dtype": config.dtype, "layers": layers}
    if config.cache == "paged":
        cache |= {"block_size": config.block_size, "num_blocks": config.num_blocks, "scratch_block": SCRATCH_BLOCK}

    return {
        "camshaft_export": FORMAT_VERSION,
        "format": config.format,
        "model": {
            "name": source.name,
            "architecture": source.info["architecture"],
            "vocab_size": int(logits.meta["val"].shape[-1]),
            "eos_token_ids": list(source.eos_token_ids),
        },
        "dtype": config.dtype,
        "max_seq_len": config.max_seq_len,
        "batch_size": config.batch_size,
        "logits": config.logits,
        "cache": cache,
        "programs": programs,
        "weights": extra.pop("weights", None),
        "notes": extra.pop("notes", []),
        "versions": _versions(*(("onnx",) if config.format == "onnx" else ())) | extra.pop("versions", {}),
        **extra,
    }


def _files(work: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in work.rglob("*") if path.is_file())
    return {str(path.relative_to(work)): {"sha256": file_digest(path), "bytes": path.stat().st_size} for path in files}
