"""Engines from segments: one network of static shapes, built without a GPU.

x0.. (activations), w0.. (weights) -> layers -> y0..     all of them network inputs, so equal layers share one engine
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...graph.serialize import target_name
from ..emitter import UnsupportedError
from ..segment import Segment
from ..targets.base import LoweringError
from .builder import DTYPES, Builder, Spec, describe
from .library import Library, find_library
from .ops_quant import graph_input

logger = logging.getLogger(__name__)

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A network input or output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and what is known of it (it cannot be opened without a GPU).

    layers: how many of each layer type the network had; seconds: that the build took.
    """

    data: bytes
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layers: Mapping[str, int]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """The size of the engine."""
        return len(self.data)


# ------------------------------------------------------------------------------------------------------------ networks
def new_network(library: Library) -> tuple[Any, Builder]:
    """A strongly typed network. Returns TensorRT's builder, which must live as long as the network, and ours."""
    maker = library.trt.Builder(library.log)
    flags = 0
    if library.needs_strongly_typed_flag:
        flags = 1 << int(library.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return maker, Builder(library, maker.create_network(flags))


def serialize(maker: Any, builder: Builder, capabilities: Sequence[str] = ()) -> BuiltEngine:
    """Builds the engine of a network whose outputs are marked.

    capabilities: compute capabilities such as "8.9"; none given, the engine is portable. Raises LoweringError with TensorRT's
    messages.
    """
    library, network, start = builder.library, builder.network, time.perf_counter()
    config = maker.create_builder_config()
    if hasattr(library.trt.BuilderFlag, "TF32"):
        config.clear_flag(library.trt.BuilderFlag.TF32)  # TensorRT-RTX computes fp32 products in TF32 all the same
    if capabilities:
        members = [library.compute_capability(name) for name in capabilities]
        config.num_compute_capabilities = len(members)
        for index, member in enumerate(members):
            config.set_compute_capability(member, index)
    with library.messages() as errors:
        data = maker.build_serialized_network(network, config)
    if data is None:
        raise LoweringError(
            f"{library.flavour} {library.version} cannot build the network: {'; '.join(errors) or 'no reason given'}"
        )
    layers = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    inputs = tuple(_info(network.get_input(index)) for index in range(network.num_inputs))
    outputs = tuple(_info(network.get_output(index)) for index in range(network.num_outputs))
    return BuiltEngine(bytes(data), inputs, outputs, dict(layers), time.perf_counter() - start)


def _info(tensor: Any) -> TensorInfo:
    name, shape = tensor.dtype.name, tuple(tensor.shape)
    if name in ("INT4", "FP4"):  # two values to a byte
        return TensorInfo(tensor.name, torch.uint8, (*shape[:-1], shape[-1] // 2))
    if name == "E8M0":
        return TensorInfo(tensor.name, torch.uint8, shape)
    return TensorInfo(tensor.name, _TORCH[name], shape)


def emit_segment(library: Library, segment: Segment, sizes: Mapping[str, int]) -> tuple[Any, Builder]:
    """The network of a segment, not yet built. Raises LoweringError for operators without emitter, all of them named."""
    module, specs = _specs(segment, sizes)
    maker, builder = new_network(library)
    values: dict[fx.Node, Any] = {}
    try:
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = graph_input(builder, node, node.name, specs[node])
        results = builder.graph(module.graph, values, specs)
    except UnsupportedError as error:
        missing = _missing(library, module.graph, specs)
        raise LoweringError(
            f"segment {segment.id}: TensorRT has no layers for {'; '.join(missing.values()) or error}; "
            "let these operators run in PyTorch, or use another target",
            operators=tuple(dict.fromkeys(target_name(node.target) for node in missing)),
        ) from error
    for index, value in enumerate(results):
        builder.output(value, f"y{index}")
    return maker, builder


def build_segment(
    segment: Segment, sizes: Mapping[str, int], *, capabilities: Sequence[str] = (), library: Library | None = None
) -> BuiltEngine:
    """The engine of a segment for one set of sizes ({"T": 8, "R": 4}); every size that varies must be given.

    Raises LoweringError for operators without emitter (in `operators`), and with TensorRT's messages for a failed build.
    """
    maker, builder = emit_segment(library or find_library(), segment, sizes)
    try:
        built = serialize(maker, builder, capabilities)
    except LoweringError as error:
        raise LoweringError(f"segment {segment.id} at {dict(sizes)}: {error}") from error
    logger.debug("segment %s at %s: %d bytes in %.2f s", segment.id, dict(sizes), built.num_bytes, built.seconds)
    return built


# --------------------------------------------------------------------------------------------------------------- specs
class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node yields."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.specs: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        self.specs[n] = describe(made)
        return made


def _specs(segment: Segment, sizes: Mapping[str, int]) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """What every node of a segment yields at these sizes, from a run on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = segment.graph_module(torch.device("cpu"))
    recorder = _Recorder(module)
    with FakeTensorMode(), torch.no_grad():
        inputs = [
            torch.empty([_size(segment, size, sizes) for size in entry["shape"]], dtype=getattr(torch, entry["dtype"]))
            for entry in segment.placeholders
        ]
        recorder.run(*inputs)
    return module, recorder.specs


def _size(segment: Segment, size: int | str, sizes: Mapping[str, int]) -> int:
    expression = sympy.sympify(size)
    names = sorted(map(str, expression.free_symbols))
    missing = [name for name in names if name not in sizes]
    if missing:
        raise ValueError(f"segment {segment.id}: no value for size {', '.join(missing)}; given: {dict(sizes)}")
    return int(expression.subs({name: sizes[name] for name in names}))


# ------------------------------------------------------------------------------------------------------------ supports
def supports(node: fx.Node) -> bool:
    """Whether TensorRT has layers for a traced node (its dtypes and arguments too); see `unsupported` for the reason."""
    reason = unsupported(node)
    if reason is not None:
        logger.debug("%s: %s", node.name, reason)
    return reason is None


def unsupported(node: fx.Node, library: Library | None = None) -> str | None:
    """Why a traced node has no layers, or None. Sizes that vary take small values of their own."""
    return _unsupported(node, library or find_library(), lambda operand: _example(operand.meta.get("val")))


def _missing(library: Library, graph: fx.Graph, specs: Mapping[fx.Node, Any]) -> dict[fx.Node, str]:
    """Every node of a graph that has no layers, with the reason."""
    found = {}
    for node in graph.nodes:
        if node.op == "call_function":
            reason = _unsupported(node, library, specs.__getitem__)
            if reason is not None:
                found[node] = f"{reason} (node {node.name})"
    return found


def _unsupported(node: fx.Node, library: Library, spec_of: Any) -> str | None:
    maker, builder = new_network(library)
    try:
        values: dict[fx.Node, Any] = {}
        for operand in node.all_input_nodes:
            values[operand] = _as_inputs(builder, operand, spec_of(operand), f"x{len(values)}")
        builder.node(node, values, spec_of(node))
    except UnsupportedError as error:
        return str(error)
    finally:
        del builder, maker
    return None


def _as_inputs(builder: Builder, node: fx.Node, spec: Any, name: str) -> Any:
    if isinstance(spec, Spec):
        return graph_input(builder, node, name, spec)
    if isinstance(spec, tuple):
        return tuple(_as_inputs(builder, node, item, f"{name}_{index}") for index, item in enumerate(spec))
    return spec


def _example(value: Any) -> Any:
    """What a node yields with numbers for the sizes that vary."""
    if isinstance(value, Tensor):
        return Spec(value.dtype, tuple(_number(size) for size in value.shape))
    if isinstance(value, list | tuple):
        return tuple(_example(item) for item in value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return _number(value)
    return describe(value)


def _number(size: Any) -> Any:
    if isinstance(size, int | float):
        return size
    expression = size.node.expr
    made = expression.subs({symbol: _symbol_value(str(symbol)) for symbol in expression.free_symbols})
    if isinstance(size, torch.SymInt):
        return int(made)
    return bool(made) if isinstance(size, torch.SymBool) else float(made)


@functools.cache
def _symbol_value(name: str) -> int:
    """A small size for a symbol, the same each time and different for most."""
    return 8 + sum(name.encode()) % 7
