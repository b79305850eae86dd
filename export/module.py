"""Any nn.Module compiled ahead of time: `camshaft.compile(module, example_inputs)`.

The module is captured in evaluation mode with its weights by reference, rewritten by the passes of a module, lowered, and
called as before: with its own arguments, returning its own structure.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..graph.capture import CaptureError, capture
from ..graph.program import Program
from ..graph.weights import Weight
from .build import resolve_device
from .flat import FlatProgram, Runner, evaluate, lower_for, read_weights, rewrite
from .segment import Plan
from .targets.base import get_target

logger = logging.getLogger(__name__)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def compile_module(
    module: nn.Module,
    example_inputs: tuple[Any, ...] | list[Any] | Mapping[str, Any] | Tensor,
    *,
    target: str = "auto",
    device: str | torch.device | None = None,
    dynamic_shapes: Any = None,
) -> CompiledModule:
    """Compiles a module for inference.

    Args:
        module: captured in evaluation mode; its parameters and buffers are shared, not copied, where the device is the same.
        example_inputs: positional arguments of forward (a tuple), or keyword arguments (a mapping). Tensors may differ in later
            calls, everything else (numbers, strings, None) is fixed.
        target: "auto" (CUDA: inductor; CPU: eager and onnxruntime are timed on the example), "eager", "inductor",
            "onnxruntime", or with fixed sizes "tensorrt" and "torch_tensorrt" (CUDA).
        device: where it runs; None: where the example inputs (or the weights) are.
        dynamic_shapes: which sizes vary, as `torch.export.export` takes it; None: all sizes are fixed.

    Raises:
        ValueError: arguments that do not fit, or a target that cannot run here.
        CaptureError: a module that cannot be traced, or that changes its buffers.
        LoweringError: the target failed on the program as a whole.
    """
    start = time.perf_counter()
    if not isinstance(module, nn.Module):
        raise ValueError(f"module is a {type(module).__name__}; give an nn.Module, or wrap the function in one")
    args, kwargs = _example_call(example_inputs)
    if target != "auto":
        get_target(target)  # an unknown name fails before the trace
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    chosen = resolve_device(device) if device is not None else _device_of(module, tensors)
    weights = {
        name: Weight.from_tensor(tensor)
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }
    with _evaluation(module):
        program = capture(
            module, args, kwargs=kwargs or None, dynamic_shapes=dynamic_shapes, weights=weights, kind="module",
            name=type(module).__name__,
        )  # fmt: skip
    flat = rewrite(program)
    bound = read_weights(flat, chosen)
    signature = Signature(flat, inspect.signature(module.forward), (args, kwargs), chosen)
    inputs = [tensor.detach().to(chosen) for tensor in signature.tensors(args, kwargs)]
    runner = lower_for(flat, target, chosen, inputs, bound)
    return CompiledModule(runner, signature, time.perf_counter() - start)


def _example_call(example_inputs: Any) -> Call:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise ValueError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tuple of positional arguments or a dict of keyword arguments"
    )


def _device_of(module: nn.Module, tensors: list[Tensor]) -> torch.device:
    found = {tensor.device.type for tensor in tensors} or {tensor.device.type for tensor in module.parameters()}
    if len(found) > 1:
        raise ValueError(
            f"the example inputs are on {' and '.join(sorted(found))}; move them to one device, or name the device"
        )
    return resolve_device(found.pop() if found else "cpu")


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode while it is open; afterwards each submodule is in the mode that it was in."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


class Signature:
    """What a compiled module takes and returns: trees, shapes, dtypes, sizes that vary and their limits."""

    def __init__(self, flat: FlatProgram, parameters: inspect.Signature, example: Call, device: torch.device) -> None:
        program = flat.program
        self._flat, self._parameters, self._device = flat, parameters, device
        self._num_args, self._keywords = len(example[0]), tuple(example[1])
        leaves, self._in_spec = pytree.tree_flatten(example)
        self._out_spec = program.out_spec
        assert len(leaves) == len(program.arguments), (len(leaves), program.arguments)
        nodes = {node.name: node for node, _ in program.placeholders("user")}
        order = list(nodes)
        self._fixed = {i: leaf for i, leaf in enumerate(leaves) if program.arguments[i] not in nodes}
        self._values = {i: nodes[name].meta["val"] for i, name in enumerate(program.arguments) if name in nodes}
        self._order = [program.arguments.index(name) for name in order]
        self._ranges = program.info.get("ranges", {})

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call in graph order; raises ValueError for a call of another form than the example's."""
        leaves = self._leaves(args, kwargs)
        for index, value in self._fixed.items():
            given = leaves[index]
            if isinstance(given, Tensor) or type(given) is not type(value) or given != value:
                raise ValueError(
                    f"{self._label(index)} is {given!r}; it was {value!r} in the example, which fixed it; compile again"
                )
        for index in self._order:
            if not isinstance(leaves[index], Tensor):
                raise ValueError(f"{self._label(index)} is a {type(leaves[index]).__name__}; a tensor is needed")
        return [leaves[index] for index in self._order]

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if len(args) != self._num_args or tuple(kwargs) != self._keywords:
            args, kwargs = self._rearranged(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._in_spec:
            raise ValueError(f"the arguments form the tree {spec}; the example formed {self._in_spec}")
        return leaves

    def _rearranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call with each argument positional or by keyword as in the example."""
        try:
            given = dict(self._parameters.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise ValueError(f"the arguments do not fit forward{self._parameters}: {error}") from error
        names = [p.name for p in self._parameters.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        wanted = [*names[: self._num_args], *self._keywords]
        if set(given) != set(wanted) or len(names) < self._num_args:
            raise ValueError(
                f"the arguments are {sorted(given)}; the example gave {sorted(wanted)}; give the same, or compile again"
            )
        return tuple(given[n] for n in wanted[: self._num_args]), {n: given[n] for n in self._keywords}

    def _label(self, index: int) -> str:
        return f"argument {self._flat.program.arguments[index]}"

    def check(self, tensors: list[Tensor]) -> None:
        """Compares dtypes, devices and shapes with the trace. Raises ValueError with what is allowed."""
        for index, tensor in zip(self._order, tensors):
            value = self._values[index]
            if tensor.dtype != value.dtype:
                raise ValueError(f"{self._label(index)} has dtype {tensor.dtype}; {value.dtype} was compiled")
            if tensor.device.type != self._device.type:
                raise ValueError(
                    f"{self._label(index)} is on {tensor.device}; the module was compiled for {self._device}"
                )
            if tensor.dim() != value.dim():
                raise ValueError(
                    f"{self._label(index)} has shape {list(tensor.shape)}; {self._shape(index)} was compiled"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{self._label(index)} requires gradients; compiled modules are for inference: use torch.no_grad()"
                )
        sizes = {s: tensors[position].shape[axis] for s, (position, axis) in self._flat.symbols.items()}
        for symbol, size in sizes.items():
            low, high = self._ranges.get(str(symbol), (0, None))
            if size < low or high is not None and size > high:
                index, axis = self._order[self._flat.symbols[symbol][0]], self._flat.symbols[symbol][1]
                allowed = f"{low} or more" if high is None else f"{low} to {high}"
                raise ValueError(f"{self._label(index)} has size {size} in dimension {axis}; allowed: {allowed}")
        for index, tensor in zip(self._order, tensors):
            for size, compiled in zip(tensor.shape, self._values[index].shape):
                if size != (compiled if isinstance(compiled, int) else evaluate(compiled, sizes)):
                    raise ValueError(
                        f"{self._label(index)} has shape {list(tensor.shape)}; {self._shape(index)} was compiled"
                        + (f", with {sizes}" if sizes else "; name the sizes that vary in dynamic_shapes")
                    )

    def _shape(self, index: int) -> str:
        return "[" + ", ".join(map(str, self._values[index].shape)) + "]"

    def result(self, leaves: list[Any]) -> Any:
        """The outputs in the module's own structure."""
        return pytree.tree_unflatten(leaves, self._out_spec)


class CompiledModule:
    """A module compiled for inference; called as the module itself.

    It holds the weights that the module had when it was compiled: weights that passes join or transpose are copies, the others
    are shared. Compile again after changing weights. Not thread-safe.
    """

    def __init__(self, runner: Runner, signature: Signature, seconds: float) -> None:
        self._runner = runner
        self._signature = signature
        self.seconds = seconds
        """Time that compiling took."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module. Raises ValueError for arguments of another shape, dtype, device or form than were compiled."""
        tensors = self._signature.tensors(args, kwargs)
        self._signature.check(tensors)
        return self._signature.result(self._runner(tensors))

    @property
    def program(self) -> Program:
        """The rewritten graph, with the passes that it went through in `history`."""
        return self._runner.flat.program

    @property
    def plan(self) -> Plan:
        """The segments and steps that a call runs."""
        return self._runner.plan

    @property
    def target(self) -> str:
        """The target that the segments were lowered for."""
        return self._runner.target

    @property
    def report(self) -> list[str]:
        """What is worth knowing of the build: the choice of the target, and operators that run in PyTorch."""
        return list(self._runner.report)

    @property
    def passes(self) -> list[dict[str, Any]]:
        """The pass table: name, stage, number of matches, seconds, nodes before and after."""
        return [
            {
                "name": r.name, "stage": r.stage, "matches": r.num_matches, "seconds": round(r.seconds, 4),
                "nodes_before": r.nodes_before, "nodes_after": r.nodes_after,
            }
            for r in self.program.history
        ]  # fmt: skip

    def __repr__(self) -> str:
        lowered = sum(1 for segment in self.plan.segments.values() if not segment.eager)
        beside = len(self.plan.segments) - lowered
        return f"CompiledModule({self.program.name}, target={self.target}, segments={lowered}" + (
            f", in PyTorch={beside})" if beside else ")"
        )


__all__ = ["CaptureError", "CompiledModule", "compile_module"]
