"""The Builder: adds layers to a TensorRT network, value by value, and walks FX graphs with the tables of `ops_*`.

Every shape is static: what a node yields is known before it is emitted, and what TensorRT infers is compared with it. TensorRT
is strongly typed: operands of one layer share dtype and rank, so casts and reshapes are written out here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...graph.serialize import target_name
from ..emitter import UnsupportedError, call_emitter
from .library import Library

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "FP8",
}
"""dtypes of torch to TensorRT's names."""

HALF = (torch.float16, torch.bfloat16)
_CONSTANT = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.int32: np.int32}


@dataclass(frozen=True)
class Spec:
    """What a node yields."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Value(Spec):
    """A tensor of the network (an ITensor) with its dtype and static shape."""

    tensor: Any


Operand = Value | bool | int | float
"""What an operator may be given in place of a tensor."""

Emit = Callable[..., Any]
"""(builder, spec, *arguments) -> the Value that it wrote, or several; spec says what the node yields."""


def describe(value: Any) -> Any:
    """What a traced node yields (its `meta["val"]`) as Spec, number or tuple. Raises UnsupportedError for a varying size."""
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        if not all(isinstance(size, int) for size in shape):
            raise UnsupportedError(f"a tensor {list(shape)} whose size varies")
        return Spec(value.dtype, shape)
    if isinstance(value, list | tuple):
        return tuple(describe(item) for item in value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UnsupportedError(f"a value {value!r} ({type(value).__name__})")


class Builder:
    """Adds layers to one network.

    library, network: the package and its INetworkDefinition. scope: goes in front of the names of layers that are added; the
    graph walk puts the node's name there, so that TensorRT's messages lead back to the graph.
    """

    def __init__(self, library: Library, network: Any) -> None:
        self.library, self.trt, self.network = library, library.trt, network
        self.scope = ""
        self._kept: list[Any] = []  # TensorRT reads constants when it builds, not when they are added
        self._constants: dict[Any, Value] = {}

    # ---------------------------------------------------------------------------------------------------- the network
    def type(self, dtype: torch.dtype) -> Any:
        """TensorRT's name for a dtype. Raises UnsupportedError for one that it does not have."""
        if dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise UnsupportedError(f"dtype {str(dtype).removeprefix('torch.')} (allowed: {allowed})")
        return getattr(self.trt.DataType, DTYPES[dtype])

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Value:
        """A network input."""
        return Value(dtype, tuple(shape), self.network.add_input(name, self.type(dtype), tuple(shape)))

    def output(self, value: Value, name: str) -> None:
        """Makes a value the network output `name`; it may be an input, or leave twice."""
        tensor = value.tensor
        if tensor.is_network_input or tensor.is_network_output:
            tensor = self.layer("identity", tensor).get_output(0)
        tensor.name = name
        self.network.mark_output(tensor)

    def layer(self, kind: str, *args: Any) -> Any:
        """Adds a layer with the network's method add_<kind>. Raises UnsupportedError if TensorRT refuses it."""
        if not self.library.has_method(f"add_{kind}"):
            raise UnsupportedError(f"a layer {kind}, which {self.library.flavour} {self.library.version} does not have")
        with self.library.messages() as errors:
            layer = getattr(self.network, f"add_{kind}")(*args)
        if layer is None:
            raise UnsupportedError(f"a layer {kind} ({'; '.join(errors) or 'no reason given'})")
        layer.name = f"{self.scope}.{kind}.{self.network.num_layers - 1}"
        return layer

    def value(self, layer: Any, dtype: torch.dtype, index: int = 0) -> Value:
        """The output of a layer; its shape is the one that TensorRT infers, its dtype must be `dtype`."""
        tensor = layer.get_output(index)
        with self.library.messages() as errors:
            try:
                shape = tuple(tensor.shape)
            except (RuntimeError, ValueError) as error:
                raise UnsupportedError(f"a layer {layer.name} ({'; '.join(errors) or error})") from error
        if tensor.dtype != self.type(dtype):
            raise UnsupportedError(f"a layer {layer.name} that yields {tensor.dtype}, not {dtype}")
        return Value(dtype, shape, tensor)

    # ------------------------------------------------------------------------------------------------------- constants
    def constant(self, values: Any, dtype: torch.dtype, shape: Sequence[int] | None = None) -> Value:
        """A small constant of numbers; `shape` is theirs where it is not given."""
        array = np.asarray(values) != 0 if dtype == torch.bool else np.asarray(values)
        shape = tuple(array.shape if shape is None else shape)
        key = (array.tobytes(), array.dtype.str, dtype, shape)
        if key not in self._constants:
            stored = dtype if dtype in _CONSTANT else torch.float32 if dtype.is_floating_point else torch.int32
            kept = np.ascontiguousarray(array, dtype=_CONSTANT[stored]).reshape(-1)
            self._kept.append(kept)
            layer = self.layer("constant", shape, self.trt.Weights(kept))
            self._constants[key] = self.cast(self.value(layer, stored), dtype)
        return self._constants[key]

    def filled(self, number: float, dtype: torch.dtype, shape: Sequence[int]) -> Value:
        """A tensor of one number."""
        return self.expand(self.constant(number, dtype, (1,) * len(shape)), shape)

    # -------------------------------------------------------------------------------------------------- dtypes, shapes
    def cast(self, value: Operand, dtype: torch.dtype) -> Value:
        """The operand as a tensor of `dtype`; a number becomes a 0-d tensor."""
        if not isinstance(value, Value):
            return self.constant(value, dtype, ())
        if value.dtype == dtype:
            return value
        if torch.float8_e4m3fn in (value.dtype, dtype):
            raise UnsupportedError("a cast to or from float8_e4m3fn (camshaft.quantize and dequantize convert)")
        return self.value(self.layer("cast", value.tensor, self.type(dtype)), dtype)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The same elements in another shape."""
        if value.shape == tuple(shape):
            return value
        layer = self.layer("shuffle", value.tensor)
        layer.reshape_dims = tuple(shape)
        return self.value(layer, value.dtype)

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """Dimensions in another order."""
        order = [axis % len(value.shape) for axis in order]
        if order == sorted(order):
            return value
        layer = self.layer("shuffle", value.tensor)
        layer.first_transpose = tuple(order)
        return self.value(layer, value.dtype)

    def transpose(self, value: Value, first: int, second: int) -> Value:
        """Two dimensions exchanged."""
        order = list(range(len(value.shape)))
        if order:
            order[first], order[second] = order[second], order[first]
        return self.permute(value, order)

    def raise_rank(self, value: Value, rank: int) -> Value:
        """Leading dimensions of 1 until the rank is reached."""
        return self.reshape(value, (1,) * (rank - len(value.shape)) + value.shape)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """Broadcasts to `shape`: a slice with stride 0 where the size was 1."""
        value = self.raise_rank(value, len(shape))
        if value.shape == tuple(shape):
            return value
        strides = [0 if old == 1 and new != 1 else 1 for old, new in zip(value.shape, shape)]
        return self.value(
            self.layer("slice", value.tensor, (0,) * len(shape), tuple(shape), tuple(strides)), value.dtype
        )

    def slice(self, value: Value, dim: int, begin: int, size: int, step: int = 1) -> Value:
        """`size` elements of one dimension, from `begin` on; a negative step goes backwards."""
        if (begin, size, step) == (0, value.shape[dim], 1):
            return value
        start, shape, stride = [0] * len(value.shape), list(value.shape), [1] * len(value.shape)
        start[dim], shape[dim], stride[dim] = begin, size, step
        return self.value(self.layer("slice", value.tensor, tuple(start), tuple(shape), tuple(stride)), value.dtype)

    def longer(self, value: Value, dim: int, size: int) -> Value:
        """A dimension made `size` long, with zeros at its end."""
        shape = list(value.shape)
        shape[dim] = size
        layer = self.layer("slice", value.tensor, (0,) * len(shape), tuple(shape), (1,) * len(shape))
        layer.mode = self.trt.SampleMode.FILL
        return self.value(layer, value.dtype)

    def concat(self, values: Sequence[Value], dim: int) -> Value:
        """Side by side; all of one dtype."""
        if len(values) == 1:
            return values[0]
        layer = self.layer("concatenation", [value.tensor for value in values])
        layer.axis = dim % len(values[0].shape)
        return self.value(layer, values[0].dtype)

    # ------------------------------------------------------------------------------------------------------- arithmetic
    def elementwise(self, kind: str, x: Operand, y: Operand, dtype: torch.dtype) -> Value:
        """An ElementWiseOperation on operands of `dtype`, broadcast; comparisons yield bool."""
        left, right = self.cast(x, dtype), self.cast(y, dtype)
        rank = max(len(left.shape), len(right.shape))
        tensors = [self.raise_rank(value, rank).tensor for value in (left, right)]
        layer = self.layer("elementwise", *tensors, getattr(self.trt.ElementWiseOperation, kind))
        return self.value(layer, torch.bool if kind in ("EQUAL", "GREATER", "LESS") else dtype)

    def unary(self, kind: str, x: Value) -> Value:
        """A UnaryOperation; ISNAN and ISINF yield bool."""
        layer = self.layer("unary", x.tensor, getattr(self.trt.UnaryOperation, kind))
        return self.value(layer, torch.bool if kind in ("ISNAN", "ISINF") else x.dtype)

    def activation(self, kind: str, x: Value, alpha: float | None = None, beta: float | None = None) -> Value:
        """An ActivationType."""
        layer = self.layer("activation", x.tensor, getattr(self.trt.ActivationType, kind))
        if alpha is not None:
            layer.alpha = alpha
        if beta is not None:
            layer.beta = beta
        return self.value(layer, x.dtype)

    def select(self, condition: Value, x: Value, y: Value) -> Value:
        """x where the condition is true, else y, broadcast."""
        rank = max(len(item.shape) for item in (condition, x, y))
        return self.value(
            self.layer("select", *(self.raise_rank(item, rank).tensor for item in (condition, x, y))), x.dtype
        )

    def reduce(self, kind: str, x: Value, dims: Sequence[int], keepdim: bool) -> Value:
        """A ReduceOperation over `dims`."""
        mask = sum(1 << axis for axis in {dim % len(x.shape) for dim in dims})
        return self.value(
            self.layer("reduce", x.tensor, getattr(self.trt.ReduceOperation, kind), mask, keepdim), x.dtype
        )

    def softmax(self, x: Value, dim: int) -> Value:
        """Softmax along one dimension."""
        layer = self.layer("softmax", x.tensor)
        layer.axes = 1 << (dim % len(x.shape))
        return self.value(layer, x.dtype)

    def matmul(self, x: Value, y: Value, transpose_y: bool = False) -> Value:
        """A product of matrices [.., M, K] and [.., K, N] (or [.., N, K] where `transpose_y`); the rest is broadcast."""
        if x.dtype not in (torch.float32, *HALF):
            raise UnsupportedError(f"a matrix product of {x.dtype}")
        rank = max(len(x.shape), len(y.shape))
        x, y = self.raise_rank(x, rank), self.raise_rank(y, rank)
        if x.shape[-1] == 1:  # an outer product is exact as an elementwise one
            return self.elementwise("PROD", x, self.transpose(y, -2, -1) if transpose_y else y, x.dtype)
        none, turned = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self.value(
            self.layer("matrix_multiply", x.tensor, none, y.tensor, turned if transpose_y else none), x.dtype
        )

    def gather(self, x: Value, indices: Value, dim: int) -> Value:
        """Rows of a dimension by indices of any shape, which takes the place of that dimension."""
        return self.value(self.layer("gather", x.tensor, indices.tensor, dim % len(x.shape)), x.dtype)

    # ------------------------------------------------------------------------------------------------------- the graph
    def graph(self, graph: fx.Graph, values: Mapping[fx.Node, Any], specs: Mapping[fx.Node, Any] | None = None) -> Any:
        """Emits a whole graph and returns what its output node holds.

        values: of the placeholders, Values or numbers. specs: what each node yields; taken from `meta["val"]` where not
        given. Raises UnsupportedError (with `node`, the fx.Node, as attribute) at the first node that has no emitter.
        """
        made = dict(values)
        for node in graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], made.__getitem__)
            if node.op == "placeholder":
                continue
            try:
                spec = specs[node] if specs is not None else describe(node.meta.get("val"))
                made[node] = self.node(node, made, spec)
            except UnsupportedError as error:
                error.node = node  # type: ignore[attr-defined]
                raise
        raise ValueError("the graph has no output node")

    def node(self, node: fx.Node, values: Mapping[fx.Node, Any], spec: Any) -> Any:
        """Emits one node and returns its Value (a tuple for several, the number for a size). Raises UnsupportedError."""
        if node.op != "call_function":
            raise UnsupportedError(f"a node of kind {node.op}")
        if spec is None or isinstance(spec, bool | int | float):
            return spec
        name = target_name(node.target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if name == "operator.getitem":
            return args[0][args[1]]
        table = operators()
        if name not in table:
            raise UnsupportedError(f"operator {name}")
        for item in spec if isinstance(spec, tuple) else (spec,):
            self.type(item.dtype)
            if item.dtype == torch.uint8:
                raise UnsupportedError("a result of uint8, which TensorRT takes as an input and casts, no more")
        self.scope = f"{node.name}.{name}"
        made = call_emitter(name, table[name], self, spec, *args, **kwargs)
        pairs = zip(made, spec, strict=True) if isinstance(spec, tuple) else [(made, spec)]
        for value, wanted in pairs:
            assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), (node.format_node(), value, wanted)
        return tuple(made) if isinstance(spec, tuple) else made


def exact(number: float, dtype: torch.dtype) -> bool:
    """Whether `dtype` can hold the number without rounding."""
    return not math.isfinite(number) or float(torch.tensor(number, dtype=dtype)) == number


@functools.cache
def operators() -> Mapping[str, Emit]:
    """The table: operator names to the functions that emit them."""
    from .ops_attention import ATTENTION_OPERATORS
    from .ops_math import MATH_OPERATORS
    from .ops_nn import NN_OPERATORS
    from .ops_quant import QUANT_OPERATORS
    from .ops_reduce import REDUCE_OPERATORS
    from .ops_shape import SHAPE_OPERATORS

    table: dict[str, Emit] = {}
    for part in (MATH_OPERATORS, REDUCE_OPERATORS, NN_OPERATORS, SHAPE_OPERATORS, ATTENTION_OPERATORS, QUANT_OPERATORS):
        table.update(part)
    return MappingProxyType(table)
