"""Capture: an nn.Module becomes a Program through torch.export.

The module may live on the meta device: parameters and buffers become placeholders and are looked up by name later.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from .functional import make_functional
from .program import InputKind, InputSpec, Program
from .weights import WeightMap

logger = logging.getLogger(__name__)

_ALIASES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.lift_fresh_copy.default)
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten.sym_constrain_range_for_size.default)


_HERE = os.path.dirname(os.path.abspath(__file__))
_OWN_CODE = (
    *(os.path.join(os.path.dirname(_HERE), part, "") for part in ("graph", "export", "models", "passes", "camshaft")),
    os.path.join(os.path.dirname(torch.__file__), ""),
)
"""Where a frame of the tracer's or the compiler's own lies; any other frame is the model's."""


class CaptureError(ValueError):
    """A module that cannot be traced: the message names the operator or module in the way."""


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    *,
    dynamic_shapes: Any = None,
    kwargs: dict[str, Any] | None = None,
    weights: Mapping[str, Any],
    kind: str,
    name: str,
    token_inputs: tuple[str, ...] = (),
    prefix: str = "",
) -> Program:
    """Traces `module(*args)` into a Program.

    weights: name -> Weight for every parameter and buffer, named as in `module.state_dict()`; tensors that the trace
    lifts as constants are added. prefix: dropped from parameter names. token_inputs: names of inputs that are per-token
    tensors of a decoder. Raises CaptureError.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export's own, about its tree specs
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            exported = make_functional(exported)
    except (
        torch._dynamo.exc.TorchDynamoException,
        RuntimeError,
        ValueError,
        TypeError,
        NotImplementedError,
        AssertionError,
        KeyError,
        AttributeError,
    ) as error:
        if isinstance(error, CaptureError):
            raise
        raise CaptureError(_explain(name, error)) from error
    graph_module = exported.graph_module
    signature = exported.graph_signature
    weight_map = WeightMap(dict(weights))
    inputs: list[InputSpec] = []
    arguments: list[str] = []
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    for node in [n for n in graph_module.graph.nodes if n.op == "placeholder"]:
        value = node.meta["val"]
        if node.name not in names and node.name not in constants:
            arguments.append(node.name)
        if not isinstance(value, torch.Tensor):
            if node.users:
                raise CaptureError(f"{name}: input {node.name} is a {type(value).__name__}; only tensors can vary")
            graph_module.graph.erase_node(node)
            continue
        input_kind: InputKind
        if node.name in names:
            key = names[node.name].removeprefix(prefix)
            input_kind = "weight"
        elif node.name in constants:
            key = f"constant.{node.name}"
            weight_map.add(key, _constant(exported.constants[constants[node.name]]))
            input_kind = "weight"
        else:
            key = node.name
            input_kind = "token" if node.name in token_inputs else "user"
        if input_kind == "weight" and key not in weight_map:
            raise CaptureError(f"{name}: the trace needs weight {key!r}, which the model does not hold")
        inputs.append(InputSpec(name=node.name, kind=input_kind, key=key, shape=spec_shape(value), dtype=value.dtype))
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise CaptureError(
            f"{name}: forward changes {', '.join(map(str, changed))} in place; engines hold no such state"
        )
    _clean(graph_module)
    program = Program(
        graph_module=fx.GraphModule(nn.Module(), graph_module.graph),
        inputs=inputs,
        weights=weight_map,
        kind=cast(Any, kind),
        name=name,
        out_spec=exported.call_spec.out_spec,
        in_spec=exported.call_spec.in_spec,
        arguments=tuple(arguments),
    )
    program.info["ranges"] = {str(symbol): _bounds(limits) for symbol, limits in exported.range_constraints.items()}
    drop_unused_inputs(program)
    program.graph_module.recompile()
    return program


def _bounds(limits: Any) -> tuple[int, int | None]:
    """Smallest and largest legal value of a varying size; None: no limit."""
    upper = int(limits.upper) if limits.upper.is_Integer and limits.upper < 1 << 62 else None
    return (int(limits.lower) if limits.lower.is_Integer else 0), upper


def _constant(value: Any) -> Any:
    from .weights import Weight

    return Weight.from_tensor(value)


def spec_shape(value: torch.Tensor) -> tuple[int | str, ...]:
    """A tensor's shape with symbolic sizes as text."""
    return tuple(int(size) if isinstance(size, int) else str(size) for size in value.shape)


def _explain(name: str, error: BaseException) -> str:
    """One sentence that says which op or module stands in the way, taken from the exporter's error and traceback."""
    text = [line for line in str(error).strip().splitlines() if line.strip()]
    if len(text) > 1 and "Constraints violated" in text[0]:
        text[0] = text[1].strip(" -")
    where = ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        file = frame.f_code.co_filename
        if not file.startswith(("<", *_OWN_CODE)):
            owner = frame.f_locals.get("self")
            label = f"{type(owner).__name__}.{frame.f_code.co_name}" if owner is not None else frame.f_code.co_name
            where = f" in {label} ({file.rsplit('/', 1)[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{name} cannot be traced{where}: {text[0] if text else type(error).__name__}"


def _clean(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def drop_unused_inputs(program: Program) -> None:
    """Removes weight placeholders without users, their specs, and weights that nothing names any more."""
    kept = []
    for node, spec in program.placeholders():
        if spec.kind == "weight" and not node.users:
            program.graph.erase_node(node)
        else:
            kept.append(spec)
    program.inputs[:] = kept
    program.weights = program.weights.only({spec.key for spec in kept if spec.kind == "weight"})
