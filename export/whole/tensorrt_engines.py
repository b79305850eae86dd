"""Programs with exposed caches as TensorRT engines: one of static shapes for each number of rows, all sharing weights and caches.

    prefill.engine (S = a chunk of a prompt)   \  one set of addresses: weights (inputs from weights.safetensors), k_cache.0, ...
    decode.engine  (S = 1)                     /

An engine is built without a GPU. Static shapes, because engines whose shapes vary are slower by half and more (docs/export.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from ...graph.program import Program
from ...graph.serialize import target_name
from ...graph.weights import Weight
from ..artifact import write_safetensors
from .request import ExportConfig

if TYPE_CHECKING:
    from ..tensorrt.library import Library
    from ..tensorrt.network import BuiltEngine
    from .export import Piece
    from .tensorrt_operators import WholeBuilder

WEIGHTS_FILE = "weights.safetensors"


def check_available() -> None:
    """Raises ValueError where no TensorRT is installed, before anything else is done."""
    from ..targets.base import LoweringError
    from ..tensorrt.library import find_library

    try:
        find_library()
    except LoweringError as error:
        raise ValueError(f"format 'tensorrt' is not possible here: {error}") from error


def write_engines(pieces: list[Piece], config: ExportConfig, work: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Writes one engine for each piece and the weights that they share; returns what export.json says of them.

    Raises ValueError for an operator without layers, and LoweringError with TensorRT's messages for a failed build.
    """
    from ..tensorrt.header import EngineHeader
    from ..tensorrt.library import find_library

    library = find_library()
    programs = []
    for piece in pieces:
        built = build_engine(library, piece, baked=config.baked_weights)
        file = f"{piece.name}.engine"
        (work / file).write_bytes(built.data)
        header = EngineHeader.parse(built.data)
        programs.append(
            {
                "name": piece.name,
                "file": file,
                "num_tokens": config.num_tokens[piece.name],
                "inputs": [tensor.to_json() for tensor in piece.interface.inputs],
                "outputs": [tensor.to_json() for tensor in piece.interface.outputs],
                "compute_capabilities": list(header.capabilities),
            }
        )
    weights = _used_weights(pieces)
    extra: dict[str, Any] = {
        "versions": {library.flavour: library.version},
        "tensorrt": {"package": library.flavour, "version": library.version},
        "weights": {"baked": config.baked_weights, "file": None if config.baked_weights else WEIGHTS_FILE},
    }
    if not config.baked_weights:
        write_safetensors(work / WEIGHTS_FILE, weights)
    return programs, extra


def _used_weights(pieces: list[Piece]) -> dict[str, Weight]:
    used: dict[str, Weight] = {}
    for piece in pieces:
        used |= {spec.key: piece.program.weights[spec.key] for _, spec in piece.program.placeholders("weight")}
    return used


def build_engine(library: Library, piece: Piece, *, baked: bool) -> BuiltEngine:
    """The engine of one program. Raises ValueError for an operator that has no layers, and LoweringError."""
    from ..tensorrt.network import serialize

    maker, builder, kept = emit_network(library, piece, baked=baked)
    built = serialize(maker, builder)
    del kept  # TensorRT reads constants when it builds
    return built


def emit_network(library: Library, piece: Piece, *, baked: bool) -> tuple[Any, WholeBuilder, list[Tensor]]:
    """The network of one program: TensorRT's builder, ours, and the baked weights, which must live until the engine is built.

    Raises ValueError for an operator that has no layers.
    """
    from ..emitter import UnsupportedError
    from ..tensorrt.builder import Value
    from ..tensorrt.network import new_network
    from .tensorrt_operators import WholeBuilder

    program, interface = piece.program, piece.interface
    maker, plain = new_network(library)
    builder = WholeBuilder(library, plain.network)
    nodes = {interface.name_of(spec): node for node, spec in program.placeholders() if spec.kind != "weight"}
    values: dict[fx.Node, Any] = {}
    kept: list[Tensor] = []
    for tensor in interface.inputs:  # their order in the network is that of export.json
        sizes = [size for size in tensor.shape if isinstance(size, int)]
        assert len(sizes) == len(tensor.shape), tensor
        values[nodes[tensor.name]] = builder.input(tensor.name, tensor.torch_dtype, sizes)
    for node, spec in program.placeholders("weight"):
        weight = program.weights[spec.key]
        if baked:
            kept.append(weight.load().detach().cpu().contiguous())
            values[node] = Value(weight.dtype, weight.shape, _constant(builder, kept[-1]))
        else:
            values[node] = builder.input(spec.key, weight.dtype, weight.shape)
    try:
        results = builder.graph(program.graph, values)
    except UnsupportedError as error:
        raise ValueError(_explain(program, error)) from error
    for value, tensor in zip(results, interface.outputs, strict=True):
        builder.output(value, tensor.name)
    return maker, builder, kept


def _constant(builder: Any, tensor: Tensor) -> Any:
    """The tensor of a constant layer that refers to `tensor`'s memory."""
    trt = builder.trt
    weights = trt.Weights(builder.type(tensor.dtype), tensor.data_ptr(), tensor.numel())
    return builder.layer("constant", tuple(tensor.shape), weights).get_output(0)


def _explain(program: Program, error: Exception) -> str:
    node = getattr(error, "node", None)
    where = f" (node {node.name}, {target_name(node.target)})" if isinstance(node, fx.Node) else ""
    return (
        f"{program.name} cannot be written as a TensorRT engine: no layers for {error}{where}; format 'onnx' may take it, and "
        "`camshaft build` runs such operators in PyTorch"
    )
