"""The torch.compile backend: `torch.compile(module, backend="camshaft", options={"target": "eager"})`, for inference.

    TorchDynamo -> graph of torch functions -> AOTAutograd -> functional aten graph -> Program -> passes -> segments

AOTAutograd takes operators apart on the way: linear arrives as view, t, addmm and view (put together by `match_linear`),
scaled_dot_product_attention as the kernel that the device would choose and layer_norm as native_layer_norm (put together here).
Norms, rotary embeddings and gates that a model writes out arrive as in an export. Parameters are weights; buffers stay inputs.
Sizes that vary are read from tensors; a number that no tensor has as a size travels as the length of an empty tensor.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..graph import ops as _ops  # noqa: F401  registers camshaft::*
from ..graph.capture import drop_unused_inputs, spec_shape
from ..graph.program import InputSpec, Program
from ..graph.weights import Weight, WeightMap
from .flat import FlatProgram, Runner, lower_for, rewrite
from .targets.base import get_target

logger = logging.getLogger(__name__)

aten = torch.ops.aten

Role = Literal["weight", "user", "size"]

_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (None, 3, 4),
    aten._scaled_dot_product_flash_attention.default: (None, 3, 4),
    aten._scaled_dot_product_efficient_attention.default: (3, 5, 6),
    aten._scaled_dot_product_cudnn_attention.default: (3, 5, 6),
    aten._scaled_dot_product_fused_attention_overrideable.default: (3, 4, 5),
}
"""Positions of (mask, dropout, is_causal) among the arguments of PyTorch's attention kernels."""


def camshaft_backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Compiles one graph of TorchDynamo for inference.

    kwargs: `options` of torch.compile, {"target": "auto" | "eager" | "inductor" | "onnxruntime"}; the program is lowered, and
    "auto" timed, at the first call. Parameters that change later, in place or by assignment, are bound anew. Raises
    ValueError for unknown options, and RuntimeError if gradients would be needed.
    """
    target = _target_of(kwargs)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise RuntimeError(_INFERENCE_ONLY)
    from torch._dynamo.backends.common import aot_autograd

    names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    real = list(example_inputs)

    def compile_inference(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        known = real if len(real) == len(examples) else [None] * len(examples)
        return _compile(graph, known, names, target)

    def compile_training(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        raise RuntimeError(_INFERENCE_ONLY)

    backend = aot_autograd(
        fw_compiler=compile_training,
        bw_compiler=compile_training,
        inference_compiler=compile_inference,
        decompositions={},
    )
    return backend(graph_module, example_inputs)


_INFERENCE_ONLY = (
    "the camshaft backend compiles for inference only, and these inputs or weights require gradients; call the module under "
    "torch.no_grad() or torch.inference_mode()"
)


def _target_of(kwargs: dict[str, Any]) -> str:
    options = dict(kwargs.pop("options", None) or {})
    if kwargs.get("mode") not in (None, "default"):
        raise ValueError(
            f"mode is {kwargs['mode']!r}; the camshaft backend has no modes, use options={{'target': ...}}"
        )
    target = options.pop("target", "auto")
    if options:
        raise ValueError(f"unknown options {sorted(options)}; allowed: 'target'")
    if target != "auto":
        get_target(target)
    return target


def _compile(graph: fx.GraphModule, real: Sequence[Any], names: Sequence[str], target: str) -> Callable[..., Any]:
    program, roles, values = _to_program(graph, real, names)
    flat = rewrite(program)
    return _boxed(_Call(flat, roles, values, target, [_stride_order(node) for node in _results(graph)]))


def _results(graph: fx.GraphModule) -> list[Any]:
    return list(next(node for node in graph.graph.nodes if node.op == "output").args[0])


def _boxed(call: Callable[[list[Any]], list[Any]]) -> Callable[..., Any]:
    """AOTAutograd's calling convention: one list of arguments, which the callee may empty."""

    def run(arguments: list[Any]) -> list[Any]:
        return call(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return torch.compiler.disable(run)


# ------------------------------------------------------------------------------------------------------------- program
class _ParameterValue:
    """The value of a parameter while it is compiled; remembers whether a pass looked at it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.was_read = tensor, False

    def load(self) -> Tensor:
        """The parameter itself."""
        self.was_read = True
        return self.tensor.detach()


@dataclass(frozen=True)
class _Role:
    """What one argument of the graph is, and a weight's name."""

    kind: Role
    name: str


def _to_program(
    graph_module: fx.GraphModule, real: Sequence[Any], names: Sequence[str]
) -> tuple[Program, list[_Role], dict[str, _ParameterValue]]:
    """The Program of a functional graph: parameters are weights, other tensors inputs, sizes are read from tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    roles: list[_Role] = []
    inputs: list[InputSpec] = []
    weights, values = WeightMap(), {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(placeholders):
        example = node.meta["val"]
        if not isinstance(example, Tensor):
            roles.append(_Role("size", f"{node.name}_carrier"))
            continue
        parameter = real[index]
        key = node.name
        is_weight = isinstance(parameter, nn.Parameter) and parameter.shape == example.shape
        if is_weight:
            value = _ParameterValue(parameter)
            key = weights.add(
                names[index] if index < len(names) else node.name,
                Weight(tuple(example.shape), example.dtype, value.load),
            )
            values[key] = value
        roles.append(_Role("weight" if is_weight else "user", key))
        inputs.append(
            InputSpec(
                name=node.name,
                kind="weight" if is_weight else "user",
                key=key,
                shape=spec_shape(example),
                dtype=example.dtype,
            )
        )
    inputs += _replace_sizes(graph, [n for n in placeholders if not isinstance(n.meta["val"], Tensor)])
    _restore_attention(graph)
    _restore_layer_norm(graph)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    inputs.sort(key=lambda spec: order[spec.name])
    program = Program(
        graph_module=fx.GraphModule(nn.Module(), graph),
        inputs=inputs,
        weights=weights,
        kind="module",
        name="graph of torch.compile",
    )
    drop_unused_inputs(program)
    return program, roles, values


def _replace_sizes(graph: fx.Graph, sizes: list[fx.Node]) -> list[InputSpec]:
    """Reads each SymInt input from a tensor that has it as a size, else from the length of an empty tensor in its place."""
    found: dict[Any, tuple[fx.Node, int]] = {}
    tensors = [n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)]
    for node in tensors:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (node, axis))
    first = next(node for node in graph.nodes if node.op != "placeholder")
    carriers = []
    for node in sizes:
        value = node.meta["val"]
        if not isinstance(value, torch.SymInt):
            if node.users:
                raise ValueError(
                    f"argument {node.name} is a varying {type(value).__name__}; only tensors and integers can vary"
                )
            graph.erase_node(node)
            continue
        source = found.get(value.node.expr)
        if source is None and node.users:
            source = (_carrier(graph, node, tensors), 0)
            spec = InputSpec(
                name=source[0].name, kind="user", key=source[0].name, shape=(str(value), 0), dtype=torch.float32
            )
            carriers.append(spec)
        if source is not None:
            with graph.inserting_before(first):
                read = graph.call_function(aten.sym_size.int, source)
            read.meta["val"] = value
            node.replace_all_uses_with(read)
        graph.erase_node(node)
    return carriers


def _carrier(graph: fx.Graph, node: fx.Node, tensors: list[fx.Node]) -> fx.Node:
    value = node.meta["val"]
    mode = next((n.meta["val"].fake_mode for n in tensors), None)
    if mode is None:
        raise ValueError(
            f"argument {node.name} is a varying integer, and the graph has no tensor inputs; call it with tensors"
        )
    with graph.inserting_before(node):
        carrier = graph.placeholder(f"{node.name}_carrier")
    with mode:
        carrier.meta["val"] = torch.empty((value, 0))
    return carrier


def _restore_attention(graph: fx.Graph) -> None:
    """PyTorch's attention kernels become aten.scaled_dot_product_attention again where only their first result is used."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _ATTENTION:
            continue
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
            continue
        mask, dropout, causal = (
            node.args[i] if i is not None and i < len(node.args) else None for i in _ATTENTION[node.target]
        )
        mask = node.kwargs.get("attn_mask") if mask is None else mask
        q, k, v = node.args[:3]
        grouped = q.meta["val"].shape[1] != k.meta["val"].shape[1]
        options = {"scale": node.kwargs.get("scale"), "enable_gqa": grouped}
        with graph.inserting_before(node):
            new = graph.call_function(
                aten.scaled_dot_product_attention.default, (q, k, v, mask, dropout or 0.0, bool(causal)), options
            )
        for user in list(node.users):
            new.meta["val"] = user.meta["val"]
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)


def _restore_layer_norm(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target != aten.native_layer_norm.default or any(user.args[1] != 0 for user in node.users):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(aten.layer_norm.default, node.args)
        new.meta["val"] = node.meta["val"][0]
        for user in list(node.users):
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)


# ---------------------------------------------------------------------------------------------------------------- call
class _Call:
    """Runs a program on the arguments of AOTAutograd; lowers it at the first call and binds parameters that changed anew."""

    def __init__(
        self, flat: FlatProgram, roles: list[_Role], values: dict[str, _ParameterValue], target: str, orders: list[Any]
    ) -> None:
        self._flat, self._target, self._orders = flat, target, orders
        nodes = [node.name for node, _ in flat.program.placeholders("user")]
        index = {role.name: i for i, role in enumerate(roles)}
        self._inputs = [(index[name], roles[index[name]].kind == "size") for name in nodes]
        self._parameters = {role.name: i for i, role in enumerate(roles) if role.kind == "weight"}
        self._fixed = {name for name, value in values.items() if value.was_read}
        self._values = values
        self._state: list[tuple[Any, ...]] | None = None
        self._runner: Runner | None = None

    def __call__(self, arguments: list[Any]) -> list[Any]:
        inputs = [torch.empty((arguments[i], 0)) if is_size else arguments[i] for i, is_size in self._inputs]
        parameters = {name: arguments[i] for name, i in self._parameters.items()}
        state = [_identity(tensor) for tensor in parameters.values()]
        if state != self._state:
            self._bind(inputs, parameters)
            self._state = state
        assert self._runner is not None
        leaves = self._runner(inputs)
        return [leaf if order is None else _restride(leaf, order) for leaf, order in zip(leaves, self._orders)]

    def _bind(self, inputs: list[Tensor], parameters: dict[str, Tensor]) -> None:
        for name in self._fixed:
            if parameters[name] is not self._values[name].tensor:
                raise RuntimeError(
                    f"parameter {name} decided how the graph was rewritten, and has changed; call torch.compiler.reset()"
                )
        program = self._flat.program
        weights = _made_weights(program, self._values, parameters)
        if self._runner is None:
            device = next((t.device for t in (*inputs, *weights.values()) if t.numel()), torch.device("cpu"))
            # AOTAutograd calls with dispatch keys excluded, under which nothing can be traced: not so in a thread of its own
            with ThreadPoolExecutor(1) as pool:
                job = pool.submit(lower_for, self._flat, self._target, torch.device(device.type), inputs, weights)
                self._runner = job.result()
        else:
            self._runner.bind(weights)


def _made_weights(
    program: Program, values: dict[str, _ParameterValue], parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The program's weights (joined, transposed) made of the parameters as they are now."""
    for name, value in values.items():
        value.tensor = parameters[name]
    return {name: weight.load().detach() for name, weight in program.weights.items()}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a parameter is replaced or written to: its object, its memory and its version."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _stride_order(node: Any) -> list[int] | None:
    """Dimensions from the outermost to the innermost in memory, where an output is dense but not contiguous; else None."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() < 2 or value.is_contiguous():
        return None
    hints = [stride if isinstance(stride, int) else stride.node.hint for stride in value.stride()]
    return sorted(range(value.dim()), key=lambda axis: -hints[axis])


def _restride(tensor: Tensor, order: list[int]) -> Tensor:
    inverse = [order.index(axis) for axis in range(len(order))]
    return tensor.permute(order).contiguous().permute(inverse)


__all__ = ["camshaft_backend"]
