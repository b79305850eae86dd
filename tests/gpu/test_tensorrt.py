"""TensorRT on a GPU: what an engine computes against PyTorch, damaged engines, kept kernels, a module, and doctor's self-test.

pytest -m gpu tests/gpu/test_tensorrt.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from camshaft.export.segment import Segment
from camshaft.export.targets.base import LoweringError, get_target
from camshaft.export.tensorrt.network import build_segment
from camshaft.export.tensorrt.runtime import TensorRtRuntime
from camshaft.export.tensorrt.selftest import TOLERANCE, self_test, self_test_segment, self_test_tensors
from camshaft.graph import ops as _ops  # noqa: F401  registers camshaft::*
from camshaft.graph.serialize import graph_hash, graph_to_json
from torch import Tensor, fx, nn

import camshaft

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
LOOSE = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference from fp32 on values of about 1: a few roundings of the dtype; of TF32 for fp32, see `selftest.TOLERANCE`."""


@pytest.fixture(autouse=True)
def tensorrt() -> None:
    reason = get_target("tensorrt").unavailable(DEVICE)
    if reason is not None:
        pytest.skip(reason)


def segment_of(inputs: Sequence[Tensor], write: Callable[..., fx.Node]) -> Segment:
    """A segment of activations alone; `write` takes the graph and its inputs and returns the output's node."""
    graph = fx.Graph()
    nodes = []
    for index, tensor in enumerate(inputs):
        node = graph.placeholder(f"x{index}")
        node.meta["spec"] = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        nodes.append(node)
    graph.output((write(graph, *nodes),))
    made = graph_to_json(graph)
    return Segment(graph_hash(made), made, num_inputs=len(inputs), num_weights=0, num_outputs=1)


def run(segment: Segment, inputs: Sequence[Tensor]) -> Tensor:
    """The one output of a segment's engine, on the CPU."""
    engine = TensorRtRuntime(DEVICE).open(build_segment(segment, {}).data, "the test's engine")
    (result,) = engine.bind([])(*(tensor.to(DEVICE) for tensor in inputs))
    torch.cuda.synchronize(DEVICE)
    return result.cpu()


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -------------------------------------------------------------------------------------------------------------- masks
def attention_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(random(2, 4, 16, 64, seed=seed, dtype=dtype) for seed in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", list(LOOSE))
@pytest.mark.parametrize("heads", [1, 4])
def test_true_in_a_mask_means_visible(dtype: torch.dtype, heads: int) -> None:
    q, k, v = attention_inputs(dtype)
    mask = torch.rand(2, heads, 16, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    mask |= torch.eye(16, dtype=torch.bool)  # every query sees something, and not everything
    mask[..., 0, 1:] = False
    inputs = (q, k, v, mask)
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    made = run(segment_of(inputs, lambda graph, *nodes: graph.call_function(sdpa, nodes)), inputs).float()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    inverted = mask.logical_not() | torch.eye(16, dtype=torch.bool)
    wrong = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), inverted)
    assert float((made - expected).abs().max()) < LOOSE[dtype]
    assert float((made - wrong).abs().max()) > 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float_mask_is_added(dtype: torch.dtype) -> None:
    q, k, v = attention_inputs(dtype)
    mask = random(2, 1, 16, 16, seed=4, dtype=dtype)
    mask[..., 8:] = torch.finfo(dtype).min
    inputs = (q, k, v, mask)
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    made = run(segment_of(inputs, lambda graph, *nodes: graph.call_function(sdpa, nodes)), inputs).float()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask.float())
    assert float((made - expected).abs().max()) < LOOSE[dtype]


@pytest.mark.parametrize("dtype", list(LOOSE))
@pytest.mark.parametrize("window", [0, 5])
def test_causal_attention_and_windows(dtype: torch.dtype, window: int) -> None:
    inputs = attention_inputs(dtype)

    def write(graph: fx.Graph, *nodes: fx.Node) -> fx.Node:
        return graph.call_function(torch.ops.camshaft.attention.default, (*nodes, None, None, None, 0.125, window, 0.0))

    made = run(segment_of(inputs, write), inputs).float()
    i, j = torch.arange(16)[:, None], torch.arange(16)[None, :]
    seen = (j <= i) & (i - j < window) if window else j <= i
    expected = F.scaled_dot_product_attention(*(x.float() for x in inputs), seen).transpose(1, 2)
    assert float((made - expected).abs().max()) < LOOSE[dtype]


# -------------------------------------------------------------------------------------------------------------- casts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
@pytest.mark.parametrize("operator", ["cast", "not"])
def test_a_cast_to_bool_tests_for_nonzero(dtype: torch.dtype, operator: str) -> None:
    numbers = [0.0, -0.0, 1.0, -1.0, 2.0, -3.0, 256.0, 512.0]
    if dtype.is_floating_point:
        numbers += [0.25, -0.25, 1e-3, float("inf"), float("-inf"), 0.999]
    x = torch.tensor(numbers, dtype=dtype).reshape(2, -1)

    def write(graph: fx.Graph, node: fx.Node) -> fx.Node:
        if operator == "not":
            return graph.call_function(torch.ops.aten.logical_not.default, (node,))
        return graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.bool})

    made = run(segment_of((x,), write), (x,))
    assert made.dtype == torch.bool
    assert made.tolist() == ((x == 0) if operator == "not" else (x != 0)).tolist()


# ------------------------------------------------------------------------------------------------------------ modules
@pytest.mark.parametrize("dtype", list(LOOSE))
def test_a_compiled_module_equals_eager(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = (
        nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 32)).to(DEVICE, dtype).eval()
    )
    x = random(8, 64, seed=0, dtype=dtype).to(DEVICE)
    compiled = camshaft.compile(module, (x,), target="tensorrt")
    assert compiled.target == "tensorrt" and not compiled.report
    assert not any(segment.eager for segment in compiled.plan.segments.values())
    with torch.no_grad():
        for seed in range(2):
            x = random(8, 64, seed=seed, dtype=dtype).to(DEVICE)
            assert float((compiled(x) - module(x)).abs().max()) < LOOSE[dtype]


class Masked(nn.Module):
    """Self-attention over [B, T, 64] that sees what a mask [B, T] of integers allows, as an encoder's does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        made = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].bool())
        return x + self.out(made.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("target", ["tensorrt", "torch_tensorrt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_encoder_sees_behind_itself_what_its_mask_allows(target: str, dtype: torch.dtype) -> None:
    reason = get_target(target).unavailable(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    module = Masked().to(DEVICE, dtype).eval()
    mask = torch.ones(2, 24, dtype=torch.int64, device=DEVICE)
    mask[1, 9:] = 0
    inputs = (random(2, 24, 64, seed=5, dtype=dtype).to(DEVICE), mask)
    compiled = camshaft.compile(module, inputs, target=target)
    with torch.no_grad():
        for given in (inputs, tuple(tensor.flip(0) for tensor in inputs)):
            assert float((compiled(*given) - module(*given)).abs().max()) < LOOSE[dtype]


def test_sizes_that_vary_are_refused() -> None:
    rows = torch.export.Dim("rows", min=2, max=16)
    with pytest.raises(LoweringError, match="engines take one size only"):
        example = torch.zeros(4, 8, device=DEVICE)
        camshaft.compile(nn.Linear(8, 8).to(DEVICE), (example,), target="tensorrt", dynamic_shapes=({0: rows},))


# ------------------------------------------------------------------------------------------------------------ engines
def test_a_truncated_engine_is_refused(tmp_path: Path) -> None:
    segment, file = self_test_segment(), tmp_path / "a.engine"
    data = build_segment(segment, {}).data
    target = get_target("tensorrt")
    for size, message in ((len(data) - 1, "damaged"), (len(data) // 2, "damaged"), (20, "no complete header")):
        file.write_bytes(data[:size])
        with pytest.raises(LoweringError, match=message):
            target.load(segment, file, DEVICE)
    file.write_bytes(data)
    assert target.load(segment, file, DEVICE)


def test_weights_of_another_shape_are_refused() -> None:
    engine = TensorRtRuntime(DEVICE).open(build_segment(self_test_segment(), {}).data, "an engine")
    _, *weights = self_test_tensors(DEVICE)
    with pytest.raises(LoweringError, match="weight w2 is .*the engine takes"):
        engine.bind([*weights[:2], weights[2][:, :32], weights[3]])


def test_compiled_kernels_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = build_segment(self_test_segment(), {}).data
    x, *weights = self_test_tensors(DEVICE)
    first = TensorRtRuntime(DEVICE)
    if not first.library.has_runtime_cache:
        pytest.skip(f"{first.library.flavour} compiles no kernels when an engine is opened")
    (expected,) = first.open(data, "first").bind(weights)(x)
    assert first.kernels()
    file = tmp_path / "a.kernels"
    first.keep_kernels(file)
    assert file.stat().st_size > 0
    with caplog.at_level(logging.WARNING):
        second = TensorRtRuntime(DEVICE, (tmp_path / "missing", file))
        (made,) = second.open(data, "second").bind(weights)(x)
    assert torch.equal(made, expected) and second.kernels()
    assert "do not fit this machine" not in caplog.text


def test_an_engine_is_captured_in_a_graph() -> None:
    x, *weights = self_test_tensors(DEVICE)
    call: Any = TensorRtRuntime(DEVICE).open(build_segment(self_test_segment(), {}).data, "an engine").bind(weights)
    stream, graph = torch.cuda.Stream(DEVICE), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        call(x)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        (result,) = call(x)
    x.copy_(random(4, 64, seed=9))
    graph.replay()
    torch.cuda.synchronize(DEVICE)
    norm, shift, weight, bias = weights
    expected = F.linear(F.layer_norm(x.cpu(), [64], norm.cpu(), shift.cpu()), weight.cpu(), bias.cpu())
    assert float((result.cpu() - expected).abs().max()) < TOLERANCE


def test_the_self_test_runs() -> None:
    made = self_test()
    assert made.ok and made.ran, made.detail
    assert made.max_error is not None and made.max_error <= TOLERANCE and made.ms is not None and made.ms > 0
