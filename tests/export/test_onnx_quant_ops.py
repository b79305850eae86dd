"""Quantized linear layers in ONNX against the operator's definition."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.segment import Segment
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import quantize_weight
from camshaft.graph.quantized_linear import QUANTIZED_LINEAR, quantized_linear
from camshaft.graph.serialize import graph_hash, graph_to_json
from torch import Tensor, fx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from camshaft.export.targets.onnx_graph import segment_to_onnx  # noqa: E402
from camshaft.export.targets.onnxruntime import OnnxRuntimeTarget  # noqa: E402

CPU = torch.device("cpu")
NUM_OUTPUTS, DIM = 48, 384
FORMATS = (
    "int8/none", "int8/int8", "int8/int8_static", "int8:zp/int8", "int8:g64/none", "int8:g64:zp/int8_static",
    "int4/none", "int4:g32/none", "int4:g128/none", "int4:g128:zp/none", "int4:g96:zp/none", "int4:g64/int8_static",
)  # fmt: skip


def operands(text: str, dim: int = DIM, bias: bool = True) -> dict[str, Tensor | None]:
    """The operator's tensors by name, in its order."""
    generator = torch.Generator().manual_seed(3)
    format = LinearFormat.parse(text)
    parts = quantize_weight(torch.randn(NUM_OUTPUTS, dim, generator=generator) + 0.2, format)
    return {
        "weight": parts.values,
        "scale": parts.scale,
        "zero_point": parts.zero_point,
        "global_scale": parts.global_scale,
        "bias": torch.randn(NUM_OUTPUTS, generator=generator) if bias else None,
        "x_scale": torch.tensor(0.02) if format.activations.endswith("_static") else None,
    }


def layer(text: str, given: dict[str, Tensor | None], dim: int = DIM) -> tuple[Segment, fx.Node]:
    """A segment of one quantized layer, and its node as traced."""
    graph = fx.Graph()
    nodes = {}
    entries = {"x": torch.empty(1, 5, dim)} | {name: value for name, value in given.items() if value is not None}
    for name, value in entries.items():
        nodes[name] = graph.placeholder("x0" if name == "x" else f"w{len(nodes) - 1}")
        shape = ["1", "T", str(dim)] if name == "x" else list(map(str, value.shape))
        sizes = tuple(int(size) if size.isdigit() else size for size in shape)
        nodes[name].meta = {"spec": (sizes, str(value.dtype).removeprefix("torch.")), "val": value.to("meta")}
    node = graph.call_function(QUANTIZED_LINEAR, (nodes["x"], *(nodes.get(name) for name in given), text))
    node.meta["val"] = torch.empty(1, 5, NUM_OUTPUTS, device="meta")
    graph.output((node,))
    recorded = graph_to_json(graph)
    return Segment(graph_hash(recorded), recorded, 1, len(entries) - 1, 1), node


def run(segment: Segment, given: dict[str, Tensor | None], x: Tensor, folder: object) -> Tensor:
    """The stored segment's output."""
    from pathlib import Path

    file = Path(str(folder)) / "segment.onnx"
    file.write_bytes(segment_to_onnx(segment))
    bound = OnnxRuntimeTarget().load(segment, file, CPU).bind([value for value in given.values() if value is not None])
    return bound(x)[0]


@pytest.mark.parametrize("text", FORMATS)
def test_formats_equal_the_definition(text: str, tmp_path: object) -> None:
    given = operands(text, bias="g" in text)
    segment, node = layer(text, given)
    assert OnnxRuntimeTarget().supports(node)
    for num_tokens in (1, 9):
        x = torch.randn(1, num_tokens, DIM, generator=torch.Generator().manual_seed(num_tokens))
        expected = quantized_linear(x, *given.values(), text)
        # float32 sums in another order
        torch.testing.assert_close(
            run(segment, given, x, tmp_path), expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max())
        )


def test_activations_with_a_scale_for_each_block_err_no_more_than_with_one(tmp_path: object) -> None:
    given = operands("int4:g64/int8", bias=False)
    segment, _ = layer("int4:g64/int8", given)
    x = torch.randn(1, 33, DIM, generator=torch.Generator().manual_seed(5))
    exact = quantized_linear(x, *given.values(), "int4:g64/none")
    by_token = (quantized_linear(x, *given.values(), "int4:g64/int8") - exact).norm() / exact.norm()
    by_block = (run(segment, given, x, tmp_path) - exact).norm() / exact.norm()
    assert 0 < by_block < 1.1 * by_token < 0.02


def test_largest_sums_are_exact(tmp_path: object) -> None:
    given = operands("int8/int8", bias=False)
    given["weight"] = torch.full((NUM_OUTPUTS, DIM), 127, dtype=torch.int8)
    given["scale"] = torch.ones(NUM_OUTPUTS)
    segment, _ = layer("int8/int8", given)
    x = torch.full((1, 20, DIM), 127.0)
    x[0, 1] *= -1
    assert torch.equal(run(segment, given, x, tmp_path), quantized_linear(x, *given.values(), "int8/int8"))


@pytest.mark.parametrize("text", ["fp8/fp8_static", "nvfp4/nvfp4", "mxfp4/none", "int8/fp8", "int4:g24/none"])
def test_other_formats_are_left_to_pytorch(text: str) -> None:
    assert not OnnxRuntimeTarget().supports(layer(text, operands(text))[1])
