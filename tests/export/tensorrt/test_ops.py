"""Every entry of the TensorRT table: its network against PyTorch for two numbers of tokens, and a real engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from operator_cases import CASES, CPU, HEADS, IDS, MASK, Case, In, Q, X, Y, build, flat, traced, value

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from camshaft.export.targets.base import LoweringError
from camshaft.export.tensorrt.builder import operators
from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.network import build_segment, emit_segment, supports, unsupported
from tensorrt_interpreter import run_network

HALF = (torch.bfloat16, torch.float16)
UNINITIALIZED = {"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"}
REFUSED = {
    "aten.float_power.Tensor_Scalar": "float_power",
    "aten.bitwise_and.Scalar": "bitwise operations on torch.int64",
    "aten.bitwise_or.Scalar": "bitwise operations on torch.int64",
    "aten._to_copy.default-normal-torch.float64": "dtype float64",
    "aten.silu.default-double": "dtype float64",
    "aten.sum.dim_IntList-dtype": "dtype float64",
    "aten.scatter_add.default": "scatter_add",
    "aten.sort.stable": "sort.stable",
    "aten.argsort.stable": "argsort.stable",
    **{f"aten.{name}.default": name for name in (
        "group_norm", "batch_norm", "conv1d", "conv2d", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    )},
    "aten.group_norm.default-plain": "group_norm",
}  # fmt: skip


def attention(label: str, *, keys: Any = "T", groups: int = 2, size: int = 6, sinks: bool = False, slopes: bool = False,
              window: int = 0, softcap: float = 0.0) -> Case:  # fmt: skip
    """Attention of four heads on T queries and `keys` keys."""
    q, k, v = In([1, 4, "T", 6]), In([1, groups, keys, 6]), In([1, groups, keys, size])
    extra = [In([4], weight=True) if given else None for given in (sinks, slopes)]
    return Case("camshaft.attention.default", [q, k, v, None, *extra, 0.3, window, softcap], label=label)


def moe(
    label: str, activation: str, gated: bool, transposed: bool, interleaved: bool, biases: bool, experts: int = 4
) -> Case:
    """Two of the experts for each token; hidden size 6."""
    wide = 12 if gated else 6
    up, down = ([experts, 8, wide], [experts, 6, 8]) if transposed else ([experts, wide, 8], [experts, 8, 6])
    bias = [In([experts, wide], weight=True), In([experts, 8], weight=True)] if biases else [None, None]
    args = [In(["T", 8]), In(["T", 2], "ids"), In(["T", 2]), In(up, weight=True), In(down, weight=True), *bias]
    return Case("camshaft.moe.default", [*args, activation, gated, transposed, interleaved], label=label)


OWN_CASES = [
    attention("causal"), attention("window", window=3), attention("more-keys", keys=9), attention("mha", groups=4),
    attention("mqa", groups=1), attention("value-size", size=4), attention("softcap", softcap=5.0),
    attention("sinks", sinks=True), attention("slopes", slopes=True),
    attention("all", sinks=True, slopes=True, window=2, softcap=3.0),
    Case("aten.scaled_dot_product_attention.default", [HEADS, In([1, 2, "T", 6]), In([1, 2, "T", 6])],
         {"scale": 0.3, "enable_gqa": True}, label="gqa"),
    Case("aten.scaled_dot_product_attention.default", [HEADS, In([1, 4, 7, 6]), In([1, 4, 7, 6]), In([1, 1, "T", 7], "bool")],
         label="bool-mask"),
    Case("aten.scaled_dot_product_attention.default", [HEADS, In([1, 4, 7, 6]), In([1, 4, 7, 6]), In([1, 4, "T", 7])],
         label="mask"),
    moe("silu", "silu", True, False, False, False), moe("biases", "gelu", True, False, False, True),
    moe("gpt-oss", "swiglu_clamped", True, True, True, True), moe("plain", "relu", False, False, False, True),
    moe("interleaved", "silu", True, True, True, False), moe("masked", "silu", True, False, False, False, experts=3),
    *[Case(f"aten.{name}.{kind}", [MASK, *rest], label="own") for name in ("any", "all") for kind, rest in
      (("default", []), ("dim", [-1, True]))],
    Case("aten.expand_as.default", [In([1, 1, 8]), X]), Case("aten.add.Tensor", [MASK, In([1, "T", 8], "bool")], label="bool"),
    *[Case(f"aten.bitwise_{name}.Scalar", [MASK, True], label="bool") for name in ("and", "or")],
    *[Case(f"aten.{name}.default", [IDS], label="ids") for name in ("abs", "floor", "sign", "amax", "argmax")],
 Case("aten.neg.default", [IDS], label="ids"),
    Case("aten.index.Tensor", [Q, [None, None, In([3], "ids"), In([3], "ids")]], label="two"),
    Case("aten.matmul.default", [X, In([8])], label="vector"), Case("aten.matmul.default", [X, In([8, 1])], label="column"),
    Case("aten.argmax.default", [In([8])], label="vector"), Case("aten.mul.Tensor", [X, 0.3], label="inexact"),
]  # fmt: skip
TESTED = [case for case in CASES if str(case) not in REFUSED] + OWN_CASES


def segment_inputs(case: Case, num_tokens: int) -> tuple[Any, list[torch.Tensor]]:
    """The segment of a case and values for it."""
    segment, specs = build(case)
    return segment, [value(spec, num_tokens, seed) for seed, spec in enumerate(specs)]


def compare(case: Case, num_tokens: int, tolerance: float) -> None:
    """The network of a case, run in PyTorch, against the case itself."""
    segment, inputs = segment_inputs(case, num_tokens)
    _, builder = emit_segment(find_library(), segment, {"T": num_tokens})
    names = [entry["name"] for entry in segment.placeholders]
    with torch.no_grad():
        expected = segment.graph_module(CPU)(*[tensor.clone() for tensor in inputs])
        actual = run_network(builder.trt, builder.network, dict(zip(names, inputs)))
    for index, wanted in enumerate(expected):
        torch.testing.assert_close(actual[f"y{index}"], wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_entry_equals_torch_and_builds(case: Case) -> None:
    for num_tokens in (1, 7):
        compare(case, num_tokens, 1e-5)  # fp32: sums in another order
    built = build_segment(build(case)[0], {"T": 7})
    assert built.num_bytes > 1000 and built.outputs


def test_every_entry_is_tested() -> None:
    quantized = {
        f"camshaft.{name}.default" for name in ("quantize", "dequantize", "dequantize_packed", "quantized_linear")
    }
    assert set(operators()) - {case.name for case in TESTED} == UNINITIALIZED | quantized


def converted(item: Any, dtype: torch.dtype, made: dict[int, In]) -> Any:
    """The arguments with their floats in `dtype`."""
    if isinstance(item, In):
        return made.setdefault(id(item), dataclasses.replace(item, dtype=dtype) if item.kind in FLOATS else item)
    return [converted(part, dtype, made) for part in item] if isinstance(item, list | tuple) else item


FLOATS = ("normal", "positive", "halves", "pairs")
WITH_FLOATS = [
    case for case in TESTED
    if any(isinstance(item, In) and item.kind in FLOATS for item in flat(case.args))
    and torch.float32 not in flat([*case.args, *case.kwargs.values()])
]  # fmt: skip


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_floats_round_like_eager(dtype: torch.dtype) -> None:
    """Two units of the last place: eager adds a bias before it rounds, kernels of the CPU round sums in their own order.

    MoE has two products of sums up to 20 behind each other, so that a unit in between is 32 times one at 1.
    """
    failed = []
    for case in WITH_FLOATS:
        tolerance = (32 if "moe" in case.name else 2) * torch.finfo(dtype).eps
        try:
            compare(dataclasses.replace(case, args=converted(case.args, dtype, {})), 7, tolerance)
        except AssertionError as error:
            failed.append(f"{case}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("case", [attention("causal"), attention("window", window=3), attention("value-size", size=4),
                                  CASES[0], moe("silu", "silu", True, False, False, False)], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_16_bit_floats_build(case: Case, dtype: torch.dtype) -> None:
    segment, _ = build(dataclasses.replace(case, args=converted(case.args, dtype, {})))
    built = build_segment(segment, {"T": 7})
    assert built.outputs[0].dtype == dtype
    fused = case.name == "camshaft.attention.default" and case.label != "value-size"
    assert ("ATTENTION_OUTPUT" in built.layers) == fused


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in REFUSED], ids=str)
def test_refused_with_the_reason(case: Case) -> None:
    node = traced(case)
    assert not supports(node) and REFUSED[str(case)] in str(unsupported(node))
    with pytest.raises(LoweringError, match="TensorRT has no layers for") as caught:
        build_segment(build(case)[0], {"T": 7})
    assert caught.value.operators == (case.name,)
    assert REFUSED[str(case)] in str(caught.value)


@pytest.mark.parametrize("case", TESTED[::9], ids=str)
def test_supports_accepts(case: Case) -> None:
    assert unsupported(traced(case)) is None


def test_8_bit_integers_are_refused() -> None:
    small = In([1, "T", 8], dtype=torch.uint8), In([5, 8], dtype=torch.int8)
    with pytest.raises(LoweringError, match="a result of uint8"):
        build_segment(build(Case("aten.add.Tensor", [small[0], small[0]]))[0], {"T": 7})
    with pytest.raises(LoweringError, match="a matrix product of torch.int8"):
        build_segment(build(Case("aten.linear.default", [small[1], small[1]]))[0], {"T": 7})


def test_every_operator_without_layers_is_named() -> None:
    segment, _ = build(Case("aten.erfinv.default", [X]))
    nodes = [dict(entry) for entry in segment.nodes]
    nodes.insert(
        2, {"name": "n9", "op": "call_function", "target": "aten.fmod.Tensor", "args": [{"node": "x0"}, {"node": "x0"}]}
    )
    segment = dataclasses.replace(segment, nodes=nodes)
    with pytest.raises(LoweringError, match="erfinv.*fmod|fmod.*erfinv") as caught:
        build_segment(segment, {"T": 7})
    assert set(caught.value.operators) == {"aten.erfinv.default", "aten.fmod.Tensor"}


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match="no value for size T"):
        build_segment(build(Case("aten.add.Tensor", [X, Y]))[0], {"R": 3})


@pytest.mark.parametrize(("num_tokens", "cut"), [(1, True), (8, True), (64, False), (128, True), (512, False)])
def test_long_sums_of_few_rows_are_cut(num_tokens: int, cut: bool) -> None:
    x, weight = In([1, "T", 2048], dtype=torch.bfloat16), In([24, 2048], dtype=torch.bfloat16, weight=True)
    case = Case("aten.linear.default", [x, weight])
    compare(
        case, num_tokens, 4 * torch.finfo(torch.bfloat16).eps * 45
    )  # sums of 2,048 products: their size is about 45
    segment, _ = segment_inputs(case, num_tokens)
    layers = build_segment(segment, {"T": num_tokens}).layers
    assert layers["MATRIX_MULTIPLY"] == 1
    assert layers.get("REDUCE", 0) == cut


@pytest.mark.parametrize(
    ("dtype", "columns", "num_tokens", "layer"),
    [
        (torch.float32, 24, 8, None),
        (torch.bfloat16, 20000, 8, "REDUCE"),
        (torch.bfloat16, 20000, 16, None),
        (torch.bfloat16, 20000, 32, "SLICE"),  # as 64 rows
        (torch.bfloat16, 6144, 64, "SLICE"),  # as 128
        (torch.bfloat16, 4096, 64, None),
    ],
)
def test_products_in_float32_and_wide_ones_are_whole(
    dtype: torch.dtype, columns: int, num_tokens: int, layer: str | None
) -> None:
    x, weight = In([1, "T", 2048], dtype=dtype), In([columns, 2048], dtype=dtype, weight=True)
    segment, _ = segment_inputs(Case("aten.linear.default", [x, weight]), num_tokens)
    layers = build_segment(segment, {"T": num_tokens}).layers
    assert {name for name in ("REDUCE", "SLICE") if name in layers} == ({layer} if layer else set())
