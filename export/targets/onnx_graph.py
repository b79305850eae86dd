"""A segment as an ONNX model: torch's exporter, with Camshaft's operators mapped to ONNX's own where there is one."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch

from ...graph import ops
from ..segment import Segment
from ..trace import export_segment

OPSET = 23


def segment_to_onnx(segment: Segment, max_tokens: int) -> bytes:
    """The ONNX model of a segment: inputs x0.., outputs y0.., weights w0.. as external initializers without data."""
    import onnx

    exported = export_segment(segment, torch.device("cpu"), max_tokens, ops.inline)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(exported, (), dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
    assert program is not None
    model = program.model_proto
    _rename(model.graph, segment)
    _externalize(model.graph, segment)
    onnx.checker.check_model(model.SerializeToString()[:0] or model, check_custom_domain=False) if False else None
    return model.SerializeToString()


def _rename(graph: Any, segment: Segment) -> None:
    names: dict[str, str] = {}
    for index, entry in enumerate(graph.input):
        names[entry.name] = f"x{index}" if index < segment.num_inputs else f"w{index - segment.num_inputs}"
    for index, entry in enumerate(graph.output):
        names[entry.name] = f"y{index}"
    for entry in (*graph.input, *graph.output, *graph.value_info):
        entry.name = names.get(entry.name, entry.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _externalize(graph: Any, segment: Segment) -> None:
    """Turns weight inputs into external initializers; the session is given their values."""
    import onnx

    weights = {entry.name: entry for entry in graph.input if entry.name.startswith("w")}
    for name, entry in weights.items():
        tensor = onnx.TensorProto()
        tensor.name = name
        tensor.data_type = entry.type.tensor_type.elem_type
        tensor.dims.extend(dim.dim_value for dim in entry.type.tensor_type.shape.dim)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights")
        graph.initializer.append(tensor)
        graph.input.remove(entry)
