"""A segment as an ONNX model, written node by node from the tables of `onnx_*ops`; nothing is traced.

    x0.. (activations) -> nodes -> y0..        w0.. (weights) are external initializers without data

What each node yields (dtype, rank, which sizes vary) comes from running the segment on PyTorch's meta device with two sets of
sizes: a size that differs between the two varies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...graph.serialize import target_name
from ..emitter import UnsupportedError, call_emitter
from ..segment import Segment
from .base import LoweringError

OPSET = 23
IR_VERSION = 11
MICROSOFT = "com.microsoft"

_ELEMENT_NAMES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int16: "INT16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
}
_HALF_NAMES = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


@dataclass(frozen=True)
class Value:
    """A tensor of the ONNX graph. shape: None for a size that varies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Size:
    """A size that varies: an int64 tensor [1] of the ONNX graph."""

    name: str


Operand = Value | Size | bool | int | float
"""What an operator may be given in place of a tensor."""


def element_type(dtype: torch.dtype, *, halves: bool = False) -> int:
    """The ONNX element type of a torch dtype; `halves` allows 16-bit floats, in which ONNX Runtime's CPU kernels do not compute.

    Raises UnsupportedError for one that is not allowed.
    """
    import onnx

    names = {**_ELEMENT_NAMES, **_HALF_NAMES} if halves else _ELEMENT_NAMES
    if dtype not in names:
        raise UnsupportedError(f"dtype {dtype} (allowed: {', '.join(str(d).removeprefix('torch.') for d in names)})")
    return int(onnx.TensorProto.DataType.Value(names[dtype]))


def static(size: int | None, what: str) -> int:
    """A size that must not vary. Raises UnsupportedError if it does."""
    if size is None:
        raise UnsupportedError(f"{what} that varies")
    return size


class Builder:
    """Collects the nodes of one ONNX graph; equal nodes are written once. halves: 16-bit floats are legal."""

    def __init__(self, *, halves: bool = False) -> None:
        self.halves = halves
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._known: dict[Any, list[str]] = {}
        self._constants: dict[Any, str] = {}
        self._count = 0

    def op(self, kind: str, *inputs: Value | Size | str | None, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns its name; an input that is None is left out."""
        return self.multi(kind, 1, *inputs, domain=domain, **attributes)[0]

    def multi(
        self, kind: str, num_outputs: int, *inputs: Value | Size | str | None, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node with several outputs and returns their names."""
        from onnx import helper

        names = ["" if item is None else item if isinstance(item, str) else item.name for item in inputs]
        while names and not names[-1]:
            names.pop()
        key = (kind, domain, num_outputs, tuple(names), repr(sorted(attributes.items())))
        if key not in self._known:
            outputs = [self._fresh() for _ in range(num_outputs)]
            self.nodes.append(helper.make_node(kind, names, outputs, domain=domain, **attributes))
            self._known[key] = outputs
        return self._known[key]

    def _fresh(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def element_type(self, dtype: torch.dtype) -> int:
        """The ONNX element type of a torch dtype in this graph. Raises UnsupportedError."""
        return element_type(dtype, halves=self.halves)

    def constant(self, values: Sequence[Any] | float, dtype: torch.dtype) -> str:
        """A small constant stored in the graph: a scalar, or a vector of a sequence."""
        from onnx import helper

        shape = [len(values)] if isinstance(values, Sequence) else []
        content: list[Any] = list(values) if isinstance(values, Sequence) else [values]
        key = (repr(content), len(shape), dtype)
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            kept = [int(v) if not dtype.is_floating_point else float(v) for v in content]
            self.initializers.append(helper.make_tensor(name, self.element_type(dtype), shape, kept))
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(values, torch.int64)

    def cast(self, value: Operand, dtype: torch.dtype) -> str:
        """The operand as a tensor of `dtype`: a cast where it differs, a 0-d tensor of a number or a size."""
        if isinstance(value, Value):
            if value.dtype == dtype:
                return value.name
            return self.op("Cast", value, to=self.element_type(dtype))
        if isinstance(value, Size):
            scalar = self.op("Squeeze", value, self.ints(0))
            return scalar if dtype == torch.int64 else self.op("Cast", scalar, to=self.element_type(dtype))
        return self.constant(value, dtype)

    def sizes(self, values: Sequence[int | Size]) -> str:
        """An int64 vector of sizes, some of which may vary."""
        if all(isinstance(value, int) for value in values):
            return self.constant(list(values), torch.int64)
        return self.op("Concat", *(v if isinstance(v, Size) else self.ints(v) for v in values), axis=0)

    def reshape(
        self, value: Value | str, shape: Sequence[int | None], asked: Sequence[int | Size] | None = None
    ) -> str:
        """A reshape to `shape`; `asked` gives the sizes where more than one of them varies."""
        varying = [size for size in shape if size is None]
        if len(varying) <= 1 and 0 not in shape:
            return self.op("Reshape", value, self.ints(*(-1 if size is None else size for size in shape)))
        if asked is None:
            raise UnsupportedError(f"a reshape to {list(shape)} with several sizes that vary")
        return self.op("Reshape", value, self.sizes(asked))


Emit = Callable[..., Any]
"""(builder, output, *arguments) -> the name of the output, or the names of all outputs."""


def operators() -> dict[str, Emit]:
    """The table: operator names to the functions that write them."""
    from .onnx_nn_ops import NN_OPERATORS
    from .onnx_ops import OPERATORS
    from .onnx_quant_ops import QUANT_OPERATORS
    from .onnx_shape_ops import SHAPE_OPERATORS

    return {**OPERATORS, **NN_OPERATORS, **SHAPE_OPERATORS, **QUANT_OPERATORS}


def emit(builder: Builder, table: dict[str, Emit], node: fx.Node, values: dict[fx.Node, Any], output: Any) -> Any:
    """Writes one node. values: of its operands; output: what it yields, without names. Raises UnsupportedError."""
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    if isinstance(output, int | Size):
        return output if isinstance(output, int) else _emit_size(builder, node, args)
    name = target_name(node.target)
    if name == "operator.getitem":
        return args[0][args[1]]
    if name not in table:
        raise UnsupportedError(f"operator {name}")
    kwargs = {key: fx.node.map_arg(item, values.__getitem__) for key, item in node.kwargs.items()}
    for value in output if isinstance(output, tuple) else (output,):
        builder.element_type(value.dtype)
    made = call_emitter(name, table[name], builder, output, *args, **kwargs)
    if isinstance(output, tuple):
        return tuple(Value(text, value.dtype, value.shape) for text, value in zip(made, output))
    return Value(made, output.dtype, output.shape)


def _emit_size(builder: Builder, node: fx.Node, args: Any) -> Size:
    name = target_name(node.target)
    if name == "aten.sym_size.int":
        axis = args[1] % len(args[0].shape)
        return Size(builder.op("Shape", args[0], start=axis, end=axis + 1))
    kinds = {
        "operator.add": "Add",
        "operator.sub": "Sub",
        "operator.mul": "Mul",
        "operator.floordiv": "Div",
        "operator.mod": "Mod",
    }
    if name == "operator.neg":
        return Size(builder.op("Neg", args[0]))
    if name not in kinds:
        raise UnsupportedError(f"{name} of a size that varies")
    return Size(builder.op(kinds[name], *(arg if isinstance(arg, Size) else builder.ints(arg) for arg in args)))


def describe(value: Any) -> Any:
    """What a traced node yields (its `meta["val"]`) as Value, Size, a number or a tuple; names are empty."""
    if isinstance(value, Tensor):
        return Value("", value.dtype, tuple(size if isinstance(size, int) else None for size in value.shape))
    if isinstance(value, torch.SymInt):
        return Size("")
    if isinstance(value, list | tuple):
        return tuple(describe(item) for item in value)
    if isinstance(value, int):
        return value
    raise UnsupportedError(f"a value {value!r} ({type(value).__name__})")


def _merge(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return Value(
            "", first.dtype, tuple(a if a == b else None for a, b in zip(first.shape, second.shape, strict=True))
        )
    if isinstance(first, list | tuple):
        return tuple(_merge(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, int):
        return first if first == second else Size("")
    raise UnsupportedError(f"a value {first!r} ({type(first).__name__})")


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node yields."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.results[n] = super().run_node(n)
        return self.results[n]


def _examples(segment: Segment, factor: int) -> list[Tensor]:
    """Meta tensors for the segment's inputs; sizes that vary are `factor` times those of the trace."""
    sizes: dict[Any, int] = {}
    examples = []
    for entry in segment.placeholders:
        shape = []
        for size in entry["shape"]:
            expression = sympy.sympify(size)
            for symbol in sorted(expression.free_symbols, key=str):
                sizes.setdefault(symbol, factor * segment.sizes.get(str(symbol), 8 + len(sizes)))
            shape.append(int(expression.subs(sizes)))
        examples.append(torch.empty(shape, dtype=getattr(torch, entry["dtype"]), device="meta"))
    return examples


def segment_to_onnx(segment: Segment) -> bytes:
    """The serialised ONNX model of a segment. Raises LoweringError for a segment with operators that the table lacks."""
    module = segment.graph_module(torch.device("meta"))
    runs = [_Recorder(module), _Recorder(module)]
    with torch.no_grad():
        for factor, run in enumerate(runs, start=1):
            run.run(*_examples(segment, factor))
    builder, table = Builder(), operators()
    values: dict[fx.Node, Any] = {}
    placeholders: list[tuple[Value, list[Any]]] = []
    specs = {entry["name"]: entry for entry in segment.placeholders}
    results: list[Value] = []
    for node in module.graph.nodes:
        try:
            if node.op == "output":
                results = [values[item] for item in node.args[0]]
                break
            merged = _merge(runs[0].results[node], runs[1].results[node])
            if node.op == "placeholder":
                element_type(merged.dtype)
                values[node] = Value(node.name, merged.dtype, merged.shape)
                placeholders.append((values[node], specs[node.name]["shape"]))
            else:
                values[node] = emit(builder, table, node, values, merged)
        except UnsupportedError as error:
            raise LoweringError(
                f"segment {segment.id}: ONNX Runtime has no kernel for {error} (node {node.name}); "
                "compile in float32, or use another target",
                operators=(target_name(node.target),) if node.op == "call_function" else (),
            ) from error
    inputs, weights = placeholders[: segment.num_inputs], [value for value, _ in placeholders[segment.num_inputs :]]
    return _serialize(builder, inputs, weights, results)


def node_to_onnx(node: fx.Node) -> bytes:
    """The ONNX model of one traced node, its operands as inputs. Raises UnsupportedError."""
    builder = Builder()
    values: dict[fx.Node, Any] = {}
    inputs: list[tuple[Value, list[Any]]] = []
    for operand in node.all_input_nodes:
        described = describe(operand.meta["val"])
        name = f"x{len(values)}"
        if isinstance(described, Value):
            element_type(described.dtype)
            described = Value(name, described.dtype, described.shape)
            inputs.append((described, list(described.shape)))
        elif isinstance(described, Size):
            described = Size(name)
            inputs.append((Value(name, torch.int64, (1,)), [1]))
        values[operand] = described
    result = emit(builder, operators(), node, values, describe(node.meta["val"]))
    return _serialize(builder, inputs, [], list(result) if isinstance(result, tuple) else [result])


def _serialize(
    builder: Builder, inputs: list[tuple[Value, list[Any]]], weights: list[Value], results: list[Value]
) -> bytes:
    import onnx
    from onnx import helper

    outputs = []
    for index, value in enumerate(results):  # an Identity each: a value may leave twice, or be an input
        builder.nodes.append(helper.make_node("Identity", [value.name], [f"y{index}"]))
        sizes = [f"y{index}_{axis}" if size is None else size for axis, size in enumerate(value.shape)]
        outputs.append(helper.make_tensor_value_info(f"y{index}", element_type(value.dtype), sizes))
    used = {name for node in builder.nodes for name in node.input}
    for value in weights:  # ONNX Runtime forgets a weight that no node reads, and would then refuse its value
        if value.name not in used:
            builder.nodes.append(helper.make_node("Shape", [value.name], [f"unused_{value.name}"]))
    external = [_external(onnx, value) for value in weights]
    entries = [
        helper.make_tensor_value_info(
            value.name,
            element_type(value.dtype),
            [f"{value.name}_{axis}" if size is None else size for axis, size in enumerate(shape)],
        )
        for value, shape in inputs
    ]
    graph = helper.make_graph(builder.nodes, "segment", entries, outputs, [*builder.initializers, *external])
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="camshaft")
    return bytes(model.SerializeToString())


def _external(onnx: Any, value: Value) -> Any:
    """An initializer whose data the session is given at load."""
    tensor = onnx.TensorProto(name=value.name, data_type=element_type(value.dtype), dims=value.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    return tensor
