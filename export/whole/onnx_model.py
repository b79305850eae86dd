"""A Program with exposed caches as one ONNX model: the graph in one file, the weights in another beside it.

    token_ids, positions, last_rows, [block_tables, slot_mapping], k_cache.0, v_cache.0, ... -> logits, k_cache_out.0, ...

Standard operators only (`onnx_operators`). Weights are external initializers, written one after the other, each read when its turn
comes: a model is never held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ...graph.program import Program
from ...graph.serialize import target_name
from ...graph.weights import Weight
from ..targets.onnx_graph import Builder, UnsupportedError, Value, describe, emit
from .interface import Interface, Tensor
from .onnx_operators import whole_operators

OPSET = 24
"""TensorScatter is new in opset 24."""
IR_VERSION = 11
DATA_ALIGNMENT = 4096
"""Bytes at whose multiples a weight begins, so that it can be mapped into memory."""


def check_available() -> None:
    """Raises ValueError where the package onnx is missing or too old, before anything else is done."""
    fix = "pip install --upgrade 'camshaft[onnxruntime]'"
    try:
        import onnx
    except ImportError as error:
        raise ValueError(f"format 'onnx' needs the package onnx, which is not installed; {fix}") from error
    known = onnx.defs.onnx_opset_version()
    if known < OPSET:
        raise ValueError(f"onnx {onnx.__version__} knows opset {known}, and the export is written in {OPSET}; {fix}")


def write_onnx(program: Program, interface: Interface, directory: Path, name: str, facts: Mapping[str, str]) -> None:
    """Writes `name` and `name.data` into `directory` and checks the result.

    facts: the model's metadata. Raises ValueError for an operator that has no ONNX form here.
    """
    import onnx
    from onnx import helper

    builder, values, results = _emit_graph(program, interface)
    _name_outputs(builder, results, interface, set(values.values()))
    weights = {values[node].name: program.weights[spec.key] for node, spec in program.placeholders("weight")}
    data = f"{name}.data"
    initializers = write_weights(directory / data, weights, builder)
    graph = helper.make_graph(
        builder.nodes,
        "model",
        [_value_info(builder, tensor) for tensor in interface.inputs],
        [_value_info(builder, tensor) for tensor in interface.outputs],
        [*builder.initializers, *initializers],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="camshaft"
    )
    helper.set_model_props(model, dict(facts))
    path = directory / name
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)


def _emit_graph(program: Program, interface: Interface) -> tuple[Builder, dict[fx.Node, Any], list[Value]]:
    builder, table = Builder(halves=True), whole_operators()
    names = {spec.name: spec.key if spec.kind == "weight" else interface.name_of(spec) for spec in program.inputs}
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            return builder, values, [values[item] for item in node.args[0]]
        try:
            described = describe(node.meta["val"])
            if node.op == "placeholder":
                builder.element_type(described.dtype)
                values[node] = Value(names[node.name], described.dtype, described.shape)
            else:
                values[node] = emit(builder, table, node, values, described)
        except UnsupportedError as error:
            where = target_name(node.target) if node.op == "call_function" else node.name
            raise ValueError(
                f"{program.name} cannot be written as ONNX: {error} (node {node.name}, {where}); "
                "`camshaft build` can run such a model, `camshaft inspect MODEL` shows where the operator comes from"
            ) from error
    raise AssertionError("a graph without output")


def _name_outputs(builder: Builder, results: Sequence[Value], interface: Interface, taken: set[Any]) -> None:
    """Gives the results their plain names: the node that makes one is renamed, so that nothing is copied."""
    from onnx import helper

    inputs = {value.name for value in taken if isinstance(value, Value)}
    made = {name for node in builder.nodes for name in node.output}
    renamed: dict[str, str] = {}
    for value, tensor in zip(results, interface.outputs, strict=True):
        if value.name in renamed or value.name not in made:
            source = renamed.get(value.name, value.name)
            assert value.name in renamed or value.name in inputs, value.name
            builder.nodes.append(helper.make_node("Identity", [source], [tensor.name]))
        else:
            renamed[value.name] = tensor.name
    for node in builder.nodes:
        for field in (node.input, node.output):
            field[:] = [renamed.get(name, name) for name in field]


def _value_info(builder: Builder, tensor: Tensor) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(tensor.name, builder.element_type(tensor.torch_dtype), list(tensor.shape))


def write_weights(path: Path, weights: Mapping[str, Weight], builder: Builder) -> list[Any]:
    """Writes weights to one file and returns their initializers. Raises ValueError if one has not its declared shape."""
    import onnx

    initializers = []
    with open(path, "wb") as file:
        for name, weight in weights.items():
            file.write(b"\0" * (-file.tell() % DATA_ALIGNMENT))
            tensor = weight.load()
            if tuple(tensor.shape) != weight.shape or tensor.dtype != weight.dtype:
                raise ValueError(
                    f"weight {name!r} was read as {list(tensor.shape)} {tensor.dtype}, "
                    f"declared as {list(weight.shape)} {weight.dtype}"
                )
            proto = onnx.TensorProto(name=name, data_type=builder.element_type(weight.dtype), dims=weight.shape)
            proto.data_location = onnx.TensorProto.EXTERNAL
            for key, item in (("location", path.name), ("offset", file.tell()), ("length", weight.num_bytes)):
                proto.external_data.add(key=key, value=str(item))
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            initializers.append(proto)
    return initializers
