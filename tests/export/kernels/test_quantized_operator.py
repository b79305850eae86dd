"""quantized_linear in a segment for CUDA: a whole operator in Inductor's code, whose kernels are prepared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from camshaft.export.kernels import gemm_ops
from camshaft.export.kernels.quantized.stored import obstacle, stored
from camshaft.export.targets.inductor import quantized_layers
from camshaft.graph import ops
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import quantize_weight
from camshaft.graph.quantized_linear import QUANTIZED_LINEAR


def segment_of(*formats: str, bias: bool = False) -> Any:
    """A segment with a layer of 32 by 64 in each format."""
    placeholders: list[dict[str, Any]] = [{"name": "x", "shape": ["T", 64], "dtype": "bfloat16"}]
    nodes: list[dict[str, Any]] = []
    for index, text in enumerate(formats):
        parts = quantize_weight(torch.randn(32, 64), LinearFormat.parse(text))
        placeholders.append({"name": f"w{index}", "shape": list(parts.values.shape), "dtype": "uint8"})
        args = [
            {"node": "x"},
            {"node": f"w{index}"},
            {"node": "s"},
            None,
            None,
            {"node": "b"} if bias else None,
            None,
            text,
        ]
        nodes.append({"op": "call_function", "target": "camshaft.quantized_linear.default", "args": args})
    return SimpleNamespace(placeholders=placeholders, nodes=nodes, num_inputs=1)


def test_the_layers_of_a_segment_are_found_once_each() -> None:
    segment = segment_of("int4:g32/none", "int4:g32/none", "int8/int8")
    assert quantized_layers(segment) == [(32, 64, "int4:g32/none", False, False), (32, 64, "int8/int8", False, False)]
    assert quantized_layers(segment_of("mxfp4/none", bias=True)) == [(32, 64, "mxfp4/none", True, False)]


def test_the_operator_stays_whole() -> None:
    assert gemm_ops.inline_around(ops.inline, batch_invariant=False)(QUANTIZED_LINEAR) is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("camshaft::quantized_linear", "CUDA")


def test_batch_invariant_builds_refuse_it_by_name() -> None:
    refuse = gemm_ops.inline_around(ops.inline, batch_invariant=True)(QUANTIZED_LINEAR)
    assert refuse is not None
    with pytest.raises(ValueError, match="no kernel for a linear layer in int4:g32/none"):
        refuse(None, None, None, None, None, None, None, "int4:g32/none")


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("int8/none", (4, 32), None),
        ("int8/none", (4, 30), "rows of 30 bytes"),
        ("int4/none", (4, 36), "rows of 18 bytes"),
        ("int4:g48/none", (4, 96), "groups of 48"),
        ("nvfp4/none", (4, 32), None),
    ],
)
def test_what_the_kernels_cannot_read(text: str, shape: tuple[int, int], reason: str | None) -> None:
    format = LinearFormat.parse(text)
    found = obstacle(quantize_weight(torch.randn(shape), format).values, format)
    assert found is None if reason is None else found is not None and reason in found


def test_words_hold_the_first_value_in_the_lowest_bits() -> None:
    format = LinearFormat.parse("int4/none")
    parts = quantize_weight(torch.randn(3, 16), format)
    kept = stored(parts.values, parts.scale, None, None, format)
    assert (kept.rows, kept.columns, kept.values_per_word) == (3, 16, 8)
    assert kept.words.dtype == torch.int32
    assert torch.equal(kept.words[:, 0] & 15, (parts.values[:, 0] & 15).int())
    assert torch.equal(kept.words[:, 1] >> 28 & 15, (parts.values[:, 7] >> 4).int())
