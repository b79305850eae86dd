"""The operators that whole graphs add to the ONNX table, each against its definition, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import camshaft.graph.cache_ops
import camshaft.graph.ops  # noqa: F401  registers camshaft::*
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from camshaft.export.targets.onnx_graph import Builder, UnsupportedError, Value  # noqa: E402
from camshaft.export.whole.onnx_model import IR_VERSION, OPSET  # noqa: E402
from camshaft.export.whole.onnx_operators import whole_operators  # noqa: E402

OPS = torch.ops.camshaft
HALF = torch.float16


def run(name: str, *args: Any) -> tuple[Tensor, ...]:
    """What ONNX Runtime makes of one operator; tensors are inputs whose first dimension varies."""
    from onnx import helper

    packet = getattr(torch.ops, name.split(".")[0])
    expected = getattr(packet, name.split(".")[1]).default(*args)
    results = expected if isinstance(expected, tuple) else (expected,)
    builder = Builder(halves=True)
    values = [
        Value(f"x{i}", arg.dtype, tuple(arg.shape)) if isinstance(arg, Tensor) else arg for i, arg in enumerate(args)
    ]
    outs = tuple(Value("", item.dtype, tuple(item.shape)) for item in results)
    made = whole_operators()[f"{name}.default"](builder, outs if isinstance(expected, tuple) else outs[0], *values)
    names = made if isinstance(made, list) else [made]
    inputs = [
        helper.make_tensor_value_info(value.name, builder.element_type(value.dtype), list(value.shape))
        for value in values
        if isinstance(value, Value)
    ]
    outputs = [
        helper.make_tensor_value_info(n, builder.element_type(o.dtype), list(o.shape)) for n, o in zip(names, outs)
    ]
    graph = helper.make_graph(builder.nodes, "one", inputs, outputs, builder.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: arg.numpy() for value, arg in zip(values, args) if isinstance(arg, Tensor)}
    got = tuple(torch.from_numpy(array) for array in session.run(None, feeds))
    for one, other in zip(got, results, strict=True):
        tolerance = 5e-3 if other.dtype == HALF else 2e-6  # fp16 rounds at 1e-3
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    return got


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("extra", ["", "bias", "sinks", "bias sinks"])
def test_masked_attention(extra: str, softcap: float, dtype: torch.dtype) -> None:
    """Grouped heads; values of another size than keys; rows of different lengths, one that sees a single entry."""
    q, k, v = (
        randn(2, 4, 3, 8, dtype=dtype),
        randn(2, 2, 6, 8, dtype=dtype, seed=1),
        randn(2, 2, 6, 4, dtype=dtype, seed=2),
    )
    positions = torch.tensor([[0, 1, 2], [3, 4, 5]])
    mask = torch.arange(6) <= positions[:, None, :, None]
    bias = randn(2, 4, 3, 6, seed=3) if "bias" in extra else None
    sinks = randn(4, dtype=dtype, seed=4) if "sinks" in extra else None
    run("camshaft.masked_attention", q, k, v, mask, bias, sinks, 0.3, softcap)


def test_caches() -> None:
    run("camshaft.update_cache", randn(2, 3, 8, 4), randn(2, 3, 5, 4, seed=1), torch.tensor([0, 3]))
    written = run(
        "camshaft.write_blocks", randn(6, 4, 3, 5), randn(7, 3, 5, seed=1), torch.tensor([4, 5, 6, 7, 20, 0, 13])
    )
    run("camshaft.read_blocks", written[0], torch.tensor([[1, 5, 0], [3, 0, 0]]))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("offset, cast_first", [(0.0, True), (1.0, False)])
def test_norms(offset: float, cast_first: bool, dtype: torch.dtype) -> None:
    x, y, weight = randn(1, 5, 8, dtype=dtype), randn(1, 5, 8, dtype=dtype, seed=1), randn(8, dtype=dtype, seed=2)
    run("camshaft.rms_norm", x, weight, 1e-5, offset, cast_first)
    run("camshaft.rms_norm", x, None, 1e-5, 0.0, cast_first)
    run("camshaft.add_rms_norm", x, y, weight, 1e-5, offset, cast_first)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rotated", [8, 4])
def test_rope(rotated: int, dtype: torch.dtype) -> None:
    angles = torch.cat([randn(1, 5, rotated // 2)] * 2, dim=-1)
    run("camshaft.rope", randn(1, 5, 3, 8, dtype=dtype), angles.cos().to(dtype), angles.sin().to(dtype), False)
    if dtype == torch.float32:
        angles = randn(1, 5, rotated // 2).repeat_interleave(2, dim=-1)
        run("camshaft.rope", randn(1, 5, 3, 8), angles.cos(), angles.sin(), True)


def test_interleaved_rope_of_halves_is_refused() -> None:
    values = [Value(name, HALF, (1, 5, *rest, 8)) for name, rest in (("x", (3,)), ("cos", ()), ("sin", ()))]
    with pytest.raises(UnsupportedError, match="interleaved rope of torch.float16"):
        whole_operators()["camshaft.rope.default"](Builder(halves=True), values[0], *values, True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_glu(activation: str) -> None:
    run("camshaft.glu", randn(1, 5, 16), activation)


def test_linear() -> None:
    run("aten.linear", randn(1, 5, 8), randn(6, 8, seed=1))
    run("aten.linear", randn(5, 8), randn(6, 8, seed=1), randn(6, seed=2))


@pytest.mark.parametrize(
    "activation, gated, transposed, interleaved",
    [
        ("silu", True, False, False),
        ("silu", True, True, False),
        ("gelu_tanh", True, False, True),
        ("relu", False, False, False),
        ("swiglu_clamped", True, True, True),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_moe(activation: str, gated: bool, transposed: bool, interleaved: bool, bias: bool) -> None:
    """Four experts, two choices, one of which is masked (index 4)."""
    hidden = 6
    up, down = randn(4, hidden * (2 if gated else 1), 8, seed=1), randn(4, 8, hidden, seed=2)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = [randn(4, hidden * (2 if gated else 1), seed=3), randn(4, 8, seed=4)] if bias else [None, None]
    index = torch.tensor([[0, 3], [1, 2], [3, 4], [2, 0], [1, 1]])
    weights = randn(5, 2, seed=5).softmax(-1)
    run("camshaft.moe", randn(5, 8), index, weights, up, down, *biases, activation, gated, transposed, interleaved)
