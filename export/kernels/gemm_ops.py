"""Operators of linear layers that stay whole in compiled code, so that their kernels are chosen when the sizes are known.

    camshaft::linear                     aten.linear
    camshaft::invariant_linear           aten.linear, with a row's result independent of the other rows, to the last bit
    camshaft::scaled_linear              (defined in graph/quant_ops.py; its CUDA kernels are registered here)
    camshaft::invariant_scaled_linear    scaled_linear, with a row's result independent of the other rows, to the last bit
    camshaft::weight_only_linear         scaled_linear of rows that are not quantized; made by `inline_one_row`
    camshaft::quantized_linear           (defined in graph/quantized_linear.py; its CUDA kernels are those of `quantized`)

Operators that end in a quantization have kernels written by hand (`row_quantize`), used where WHOLE_QUANTIZATIONS names them:

    camshaft::add_rms_norm_quantize, camshaft::glu_quantize    (defined in graph/ops.py)
    camshaft::quantize_rows                                    (defined in graph/quant_ops.py)

Importing this registers them and imports neither Triton nor CUDA. Compiled segments name them, so it is imported before one is
opened. On the CPU they are their definitions, and nothing is promised of invariance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graph import ops as _semantic_ops  # noqa: F401  defines the operators
from ...graph import quant_ops
from ...graph.registry import define, implement
from .quantized import operator as _quantized_operator  # noqa: F401  registers kernels

WHOLE_QUANTIZATIONS: frozenset[str] = frozenset({"add_rms_norm_quantize", "glu_quantize", "quantize_rows"})
"""Which of these three run in the kernels written by hand; Inductor makes the others.

On an H200, 8,192 rows of Llama-3.1-8B: norm and gate take 0.06 and 0.25 ms by hand, 0.16 and 0.78 ms by Inductor
(`bench/gpu_linear.py`).
"""

Inline = Callable[[Any], Callable[..., Any] | None]
"""Operator -> the function that takes its place while a segment is exported, or None where it stays."""

_WIDEST_ROW = 32768
"""Values: `row_quantize.MAX_WIDTH`. A gate's input has twice as many."""
_ATEN_LINEAR = torch.ops.aten.linear.default
_SCALED = torch.ops.camshaft.scaled_linear.default
_QUANTIZED = torch.ops.camshaft.quantized_linear.default
_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _scaled_linear_fake(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


# x [.., K], weight [N, K], bias [N] or None, of one dtype -> [.., N].
define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", F.linear, _linear_fake)
define("invariant_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", F.linear, _linear_fake)

# As scaled_linear: x [.., K] with scales [.., 1], weight [N, K] with scales [N], bias [N] or None -> [.., N] in `dtype`.
define(
    "invariant_scaled_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    quant_ops.QUANT_DEFINITIONS[torch.ops.camshaft.scaled_linear.default],
    _scaled_linear_fake,
)


def _weight_only_definition(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    product = torch.matmul(x.float(), weight.float().t()) * weight_scale
    return (product if bias is None else product + bias.float()).to(dtype)


# x [.., K] bf16 or fp16, weight [N, K] float8_e4m3fn with scales [N], bias [N] or None -> [.., N] in `dtype`, rounded once.
define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    _weight_only_definition,
    lambda x, weight, weight_scale, bias, dtype: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype),
)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from . import gemm

    return gemm.linear(x, weight, bias)


def _invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from . import gemm

    return gemm.invariant_linear(x, weight, bias)


def _scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from . import gemm

    return gemm.scaled_linear(x, x_scale, weight, weight_scale, bias, dtype)


def _invariant_scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from . import gemm

    return gemm.invariant_scaled_linear(x, x_scale, weight, weight_scale, bias, dtype)


def _weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    from . import gemm

    return gemm.weight_only_linear(x, weight, weight_scale, bias, dtype)


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    from . import row_quantize

    if x.shape[-1] > _WIDEST_ROW:
        return quant_ops.quantize_rows(x)
    return row_quantize.quantize_rows(x.contiguous())


def _add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from . import row_quantize

    return row_quantize.add_rms_norm_quantize(x.contiguous(), residual.contiguous(), weight, eps, offset, cast_first)


def _glu_quantize(gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from . import row_quantize

    return row_quantize.glu_quantize(gate_up.contiguous(), activation)


implement("add_rms_norm_quantize", _add_rms_norm_quantize, "CUDA")
implement("quantize_rows", _quantize_rows, "CUDA")
implement("glu_quantize", _glu_quantize, "CUDA")
implement("weight_only_linear", _weight_only_linear, "CUDA")
implement("linear", _linear, "CUDA")
implement("invariant_linear", _invariant_linear, "CUDA")
implement("scaled_linear", _scaled_linear, "CUDA")
implement("invariant_scaled_linear", _invariant_scaled_linear, "CUDA")


# -------------------------------------------------------------------------------------------------------------- lowering
def inline_around(inline: Inline, *, batch_invariant: bool) -> Inline:
    """`inline` for a CUDA segment whose linear layers stay whole.

    batch_invariant: they are the invariant ones, outer products (rotary angles) are plain multiplications, and other products are
    refused: the library picks their kernels by the number of rows. The function that is returned, or what it names, raises
    ValueError for a layer that has no invariant kernel.
    """

    def chosen(target: Any) -> Callable[..., Any] | None:
        if target is _ATEN_LINEAR:
            return _whole_invariant if batch_invariant else _whole
        if batch_invariant and target in _PRODUCTS:
            return functools.partial(_outer, target)
        if target is _SCALED:
            return torch.ops.camshaft.invariant_scaled_linear.default if batch_invariant else None
        if target is _QUANTIZED:
            return _refuse_quantized if batch_invariant else None
        definition = inline(target)
        if definition is not None and any(target is _overload(name) for name in WHOLE_QUANTIZATIONS):
            return functools.partial(_whole_quantization, target, definition)
        return definition

    return chosen


def _refuse_quantized(*args: Any) -> Tensor:
    raise ValueError(
        f"batch_invariant: no kernel for a linear layer in {args[-1]}, allowed: fp8/fp8 (quantize='fp8'); build without "
        "batch_invariant"
    )


def _overload(name: str) -> Any:
    return getattr(torch.ops.camshaft, name).default


def _whole_quantization(target: Any, definition: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """The operator itself for rows that its kernel holds, else its definition."""
    widest = 2 * _WIDEST_ROW if target is _overload("glu_quantize") else _WIDEST_ROW
    return (target if x.shape[-1] <= widest else definition)(x, *args)


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dtype in (torch.float16, torch.bfloat16) and weight.dim() == 2:
        return torch.ops.camshaft.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _outer(target: Any, *args: Any, **kwargs: Any) -> Tensor:
    """x [.., M, 1] @ y [.., 1, N] as x * y: exact, whatever M, N and the library's precision of fp32 products."""
    shapes = [list(value.shape) for value in args if isinstance(value, Tensor)]
    x, y = args[:2]
    if len(args) != 2 or kwargs or x.dim() < 2 or y.dim() < 2 or x.shape[-1] != 1:
        raise ValueError(
            f"batch_invariant: no kernel for {target} of {' and '.join(map(str, shapes))}, allowed: linear layers, attention and "
            "outer products; build without batch_invariant"
        )
    product: Tensor = x * y
    return product


def _whole_invariant(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.shape[-1] % 8:
        raise ValueError(
            f"batch_invariant: no kernel for a linear layer with a {weight.dtype} weight {list(weight.shape)}, allowed: float16 "
            "and bfloat16 with rows of a multiple of 8; build without batch_invariant, or with dtype='bfloat16'"
        )
    return torch.ops.camshaft.invariant_linear(x, weight, bias)
