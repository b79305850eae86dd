"""camshaft::quantized_linear as TensorRT networks: what they compute, and engines for GPUs that have the formats."""

from __future__ import annotations

import pytest
import torch
from camshaft.export.segment import Segment
from camshaft.export.targets.base import LoweringError
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import quantize_weight
from camshaft.graph.quantized_linear import QUANTIZED_LINEAR
from camshaft.graph.serialize import graph_hash, graph_to_json
from operator_cases import CPU
from tensorrt_interpreter import run_network
from torch import Tensor, fx

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.network import build_segment, emit_segment

TOKENS, NUM_OUTPUTS, DIM = 3, 160, 256
FORMATS = (
    "int8/none", "int8/int8", "int8/int8_static", "int8:g64/none", "int4/none", "int4:g64/none", "int4:g64/fp8", "int4/int8_static",
    "int8:g64/int8",
    "fp8/none", "fp8/fp8", "fp8:tensor/fp8_static", "fp8:g64/none", "fp8:block128/fp8_block",
    "nvfp4/none", "nvfp4/nvfp4", "mxfp4/none", "mxfp4/mxfp4", "mxfp8/none", "mxfp8/mxfp8",
)  # fmt: skip
BLACKWELL = ("nvfp4/none", "nvfp4/nvfp4", "mxfp4/mxfp4", "mxfp8/mxfp8", "int4:g64/none")


def layer(text: str, dtype: torch.dtype, *, static: bool = False) -> tuple[Segment, dict[str, Tensor]]:
    """A segment of one quantized layer with a bias, and its inputs by name."""
    generator = torch.Generator().manual_seed(3)
    format = LinearFormat.parse(text)
    parts = quantize_weight(torch.randn(NUM_OUTPUTS, DIM, generator=generator), format)
    x = torch.randn(1, TOKENS, DIM, generator=generator) * torch.tensor([0.1, 1.0, 3.0])[:, None]
    given: dict[str, Tensor | None] = {
        "x0": x.to(dtype), "weight": parts.values, "scale": parts.scale, "zero_point": parts.zero_point,
        "global_scale": parts.global_scale, "bias": torch.randn(NUM_OUTPUTS, generator=generator).to(dtype),
        "x_scale": torch.tensor(0.1) if static or format.activations.endswith("_static") else None,
    }  # fmt: skip
    inputs = {name: value for name, value in given.items() if value is not None}
    graph = fx.Graph()
    nodes = {}
    for name, value in inputs.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["spec"] = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
    graph.output((graph.call_function(QUANTIZED_LINEAR, (*(nodes.get(name) for name in given), text)),))
    entries = graph_to_json(graph)
    return Segment(graph_hash(entries), entries, len(inputs), 0, 1), inputs


def check(segment: Segment, inputs: dict[str, Tensor]) -> dict[str, int]:
    """The network against the definition. Returns the number of its layers by kind."""
    _, builder = emit_segment(find_library(), segment, {})
    actual = run_network(builder.trt, builder.network, inputs)["y0"]
    (expected,) = segment.graph_module(CPU)(*inputs.values())
    assert actual.dtype == expected.dtype
    # operands in 16 bits lose 2^-9 of their size, products average that out; in float32 only the order of sums differs
    bound = 1e-4 if expected.dtype == torch.float32 else 8e-3
    error = (actual.float() - expected.float()).abs().amax(-1)
    assert (error <= bound * expected.float().abs().amax(-1)).all(), error
    kinds = [builder.network.get_layer(index).type.name for index in range(builder.network.num_layers)]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_formats_equal_the_definition(text: str, dtype: torch.dtype) -> None:
    segment, inputs = layer(text, dtype)
    layers = check(segment, inputs)
    assert layers["MATRIX_MULTIPLY"] == 1
    blockwise = text.endswith(("/nvfp4", "/mxfp4", "/mxfp8"))
    assert layers.get("DYNAMIC_QUANTIZE", 0) == int(blockwise)
    assert layers.get("QUANTIZE", 0) == int(not blockwise and not text.endswith("/none"))


@pytest.mark.parametrize("text", FORMATS)
def test_formats_build(text: str) -> None:
    segment, inputs = layer(text, torch.bfloat16)
    built = build_segment(segment, {})
    for info, tensor in zip(built.inputs, inputs.values(), strict=True):
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))  # as they are stored


@pytest.mark.parametrize("text", BLACKWELL)
def test_formats_build_for_compute_capability_12(text: str) -> None:
    segment, _ = layer(text, torch.bfloat16)
    assert build_segment(segment, {}, capabilities=("12.0",)).num_bytes


def test_nvfp4_with_a_stored_scale_of_activations() -> None:
    segment, inputs = layer("nvfp4/nvfp4", torch.bfloat16, static=True)
    inputs["x_scale"] = torch.tensor(0.004)
    check(segment, inputs)
    assert build_segment(segment, {}, capabilities=("12.0",)).num_bytes


def test_four_bit_floats_do_not_build_for_a_gpu_without_them() -> None:
    segment, _ = layer("nvfp4/none", torch.bfloat16)
    with pytest.raises(LoweringError, match="cannot build the network.*fp4"):
        build_segment(segment, {}, capabilities=("8.9",))


@pytest.mark.parametrize("text", ["int4:g64:zp/none", "int8:zp/none"])
def test_zero_points_are_refused(text: str) -> None:
    with pytest.raises(LoweringError, match="TensorRT's are symmetric"):
        build_segment(layer(text, torch.bfloat16)[0], {})


def test_searched_scales_of_activations_are_refused() -> None:
    with pytest.raises(LoweringError, match="TensorRT takes a block's scale from its largest number"):
        build_segment(layer("nvfp4/nvfp4_search", torch.bfloat16)[0], {})
