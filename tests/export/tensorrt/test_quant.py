"""Quantized graphs: layers that mean what the operators mean, and engines for the GPUs that have the formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import CPU
from tensorrt_interpreter import run_network
from torch import Tensor, fx

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from camshaft.export.segment import Segment
from camshaft.export.targets.base import LoweringError
from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.network import build_segment, emit_segment
from camshaft.graph import ops as _ops  # noqa: F401  registers camshaft::*
from camshaft.graph.serialize import graph_hash, graph_to_json

ops = torch.ops.camshaft
FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
Inputs = dict[str, Tensor]


def segment_of(inputs: Inputs, make: Any) -> Segment:
    """A segment of what `make` does with the placeholders."""
    graph = fx.Graph()
    nodes = []
    for name, tensor in inputs.items():
        node = graph.placeholder(name)
        node.meta["spec"] = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        nodes.append(node)
    result = make(graph.call_function, *nodes)
    graph.output(result if isinstance(result, tuple) else (result,))
    for index, node in enumerate(node for node in graph.nodes if node.op == "call_function"):
        node.name = f"n{index}"
    entries = graph_to_json(graph)
    return Segment(graph_hash(entries), entries, len(inputs), 0, 1)


def check(inputs: Inputs, make: Any, capabilities: tuple[str, ...] = ()) -> dict[str, int]:
    """Network against reference, bit by bit but for sums; the engine builds. Returns its layers."""
    segment = segment_of(inputs, make)
    _, builder = emit_segment(find_library(), segment, {})
    actual = run_network(builder.trt, builder.network, inputs)["y0"]
    (expected,) = segment.graph_module(CPU)(*inputs.values())
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=2**-6)
    built = build_segment(segment, {}, capabilities=capabilities)
    for info, tensor in zip(built.inputs, inputs.values(), strict=True):
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))  # packed weights as they are stored
    return dict(built.layers)


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    """Random numbers with a seed of their own."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def codes(dtype: torch.dtype, *shape: int) -> Tensor:
    """Quantized values of all sizes."""
    return (
        torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        if dtype == torch.uint8
        else random(*shape, scale=50.0).float().clamp(-128, 127).to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("scale", [(), (8,), (8, 4)], ids=["tensor", "channel", "block"])
def test_quantize(dtype: torch.dtype, scale: tuple[int, ...]) -> None:
    inputs = {"x0": random(8, 64, scale=20.0), "x1": random(*scale).abs() + 0.1}
    layers = check(inputs, lambda call, x, s: call(ops.quantize.default, (x, s, 0, dtype)))
    assert layers["QUANTIZE"] == 1


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("scale", [(), (16,), (16, 4)], ids=["tensor", "channel", "block"])
@pytest.mark.parametrize("scale_dtype", [BF16, torch.float32], ids=str)
def test_weight_only(dtype: torch.dtype, scale: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    inputs = {"x0": random(3, 64), "w0": codes(dtype, 16, 64), "w1": random(*scale, dtype=scale_dtype, scale=0.01)}

    def make(call: Any, x: fx.Node, weight: fx.Node, scale: fx.Node) -> fx.Node:
        return call(torch.ops.aten.linear.default, (x, call(ops.dequantize.default, (weight, scale, 0, BF16))))

    assert check(inputs, make)["DEQUANTIZE"] == 1


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("capabilities", [(), ("8.9",), ("12.0",)], ids=str)
def test_quantized_product(dtype: torch.dtype, capabilities: tuple[str, ...]) -> None:
    """Activations per tensor with a stored scale, weights per channel: what a quantization pass writes."""
    inputs = {
        "x0": random(3, 64), "w0": codes(dtype, 16, 64), "w1": random(16, scale=0.01).abs() + 0.001,
        "w2": torch.tensor(0.03, dtype=BF16),
    }  # fmt: skip

    def make(call: Any, x: fx.Node, weight: fx.Node, scale: fx.Node, x_scale: fx.Node) -> fx.Node:
        quantized = call(ops.quantize.default, (x, x_scale, 0, dtype))
        back = call(ops.dequantize.default, (quantized, x_scale, 0, BF16))
        return call(torch.ops.aten.linear.default, (back, call(ops.dequantize.default, (weight, scale, 0, BF16))))

    layers = check(inputs, make, capabilities)
    assert (layers["QUANTIZE"], layers["DEQUANTIZE"], layers["MATRIX_MULTIPLY"]) == (1, 2, 1)


def test_a_scale_for_each_token_is_computed() -> None:
    """Dynamic quantization: the scale is a value of the graph, along a dimension that is not the first."""

    def make(call: Any, x: fx.Node) -> fx.Node:
        largest = call(torch.ops.aten.amax.default, (call(torch.ops.aten.abs.default, (x,)), [0, 2]))
        scale = call(torch.ops.aten.clamp_min.default, (call(torch.ops.aten.div.Tensor, (largest, 448.0)), 1e-6))
        return call(ops.dequantize.default, (call(ops.quantize.default, (x, scale, -2, FP8)), scale, -2, torch.float32))

    check({"x0": random(1, 5, 64, dtype=torch.float32)}, make)


@pytest.mark.parametrize("scale_dtype", [BF16, torch.float32], ids=str)
def test_int4_weights(scale_dtype: torch.dtype) -> None:
    inputs = {"x0": random(3, 128), "w0": codes(torch.uint8, 16, 64), "w1": random(16, 2, dtype=scale_dtype, scale=0.1)}

    def make(call: Any, x: fx.Node, weight: fx.Node, scale: fx.Node) -> fx.Node:
        values = call(ops.dequantize_packed.default, (weight, scale, None, "int4", BF16))
        return call(torch.ops.aten.linear.default, (x, values))

    assert check(inputs, make)["DEQUANTIZE"] == 1


@pytest.mark.parametrize("capabilities", [(), ("12.0",)], ids=str)
def test_fp4_weights(capabilities: tuple[str, ...]) -> None:
    inputs = {
        "x0": random(3, 64), "w0": codes(torch.uint8, 16, 32), "w1": (random(16, 4).abs() + 0.5).to(FP8),
        "w2": torch.tensor(0.0625, dtype=torch.float32),
    }  # fmt: skip

    def make(call: Any, x: fx.Node, weight: fx.Node, scale: fx.Node, factor: fx.Node) -> fx.Node:
        values = call(ops.dequantize_packed.default, (weight, scale, factor, "fp4", BF16))
        return call(torch.ops.aten.linear.default, (x, values))

    assert check(inputs, make, capabilities)["DEQUANTIZE"] == 2


def test_fp4_does_not_build_for_a_gpu_without_it() -> None:
    inputs = {"w0": codes(torch.uint8, 16, 32), "w1": random(16, 4)}
    segment = segment_of(inputs, lambda call, w, s: call(ops.dequantize_packed.default, (w, s, None, "fp4", BF16)))
    with pytest.raises(LoweringError, match="cannot build the network.*sm89.*fp4"):
        build_segment(segment, {}, capabilities=("8.9",))


def test_packed_weights_must_be_inputs() -> None:
    inputs = {"w0": codes(torch.uint8, 16, 32), "w1": random(16, 4)}

    def make(call: Any, weight: fx.Node, scale: fx.Node) -> tuple[fx.Node, ...]:
        return call(ops.dequantize_packed.default, (weight, scale, None, "int4", BF16)), weight

    make_both = segment_of(inputs, lambda call, w, s: make(call, w, s)[0])
    assert build_segment(make_both, {}).num_bytes
    with pytest.raises(LoweringError, match="packed as int4 alone"):
        build_segment(segment_of(inputs, make), {})


def test_casts_to_fp8_are_refused() -> None:
    segment = segment_of(
        {"x0": random(8, 8)}, lambda call, x: call(torch.ops.aten._to_copy.default, (x,), {"dtype": FP8})
    )
    with pytest.raises(LoweringError, match="camshaft.quantize and dequantize convert"):
        build_segment(segment, {})
