"""The table of operators for TensorRT, first part: arithmetic, comparisons, activations.

Every function takes (builder, spec, *the operator's arguments) and returns the Value that it wrote. Like eager PyTorch, functions
of 16-bit floats are computed in fp32 and rounded once, and a number keeps its fp32 value beside a 16-bit tensor.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..emitter import UnsupportedError, each_name
from .builder import HALF, Builder, Emit, Operand, Spec, Value, exact


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a function of `dtype` is computed: fp32 for 16-bit floats."""
    return torch.float32 if dtype in HALF else dtype


def promoted(x: Operand, y: Operand) -> torch.dtype:
    """The dtype in which torch combines two operands."""

    def like(value: Operand) -> Any:
        if isinstance(value, Value):
            return torch.empty((1,) * min(len(value.shape), 1), dtype=value.dtype, device="meta")
        return value

    return torch.result_type(like(x), like(y))


def _working(dtype: torch.dtype, *operands: Operand) -> torch.dtype:
    """fp32 where a number among the operands would be rounded by a 16-bit dtype."""
    numbers = [item for item in operands if not isinstance(item, Value)]
    return torch.float32 if dtype in HALF and not all(exact(item, dtype) for item in numbers) else dtype


# --------------------------------------------------------------------------------------------------------- arithmetic
_ON_BOOL = {"PROD": "AND", "MIN": "AND", "SUM": "OR", "MAX": "OR"}


def _binary(kind: str) -> Emit:
    def write(b: Builder, out: Spec, x: Operand, y: Operand, alpha: float = 1) -> Value:
        if out.dtype == torch.bool:
            return b.elementwise(_ON_BOOL[kind], x, y, torch.bool)
        dtype = _working(out.dtype, x, y) if alpha == 1 else compute_dtype(out.dtype)
        right = y if alpha == 1 else b.elementwise("PROD", b.cast(y, dtype), b.cast(alpha, dtype), dtype)
        return b.cast(b.elementwise(kind, x, right, dtype), out.dtype)

    return write


def _rsub(b: Builder, out: Spec, x: Operand, y: Operand, alpha: float = 1) -> Value:
    return _binary("SUB")(b, out, y, x, alpha)


def _divide(b: Builder, out: Spec, x: Operand, y: Operand, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "floor":
        return _floor_divide(b, out, x, y)
    if rounding_mode == "trunc" and out.dtype.is_floating_point:
        raise UnsupportedError("division of floats rounded towards zero")
    return _binary("DIV")(b, out, x, y)


def _floor_divide(b: Builder, out: Spec, x: Operand, y: Operand) -> Value:
    dtype = compute_dtype(out.dtype)
    if not dtype.is_floating_point:
        return b.elementwise("FLOOR_DIV", x, y, dtype)
    return b.cast(b.unary("FLOOR", b.elementwise("DIV", x, y, dtype)), out.dtype)


def _remainder(b: Builder, out: Spec, x: Operand, y: Operand) -> Value:
    dtype = compute_dtype(out.dtype)
    left, right = b.cast(x, dtype), b.cast(y, dtype)
    whole = _floor_divide(b, Spec(dtype, out.shape), left, right)
    return b.cast(b.elementwise("SUB", left, b.elementwise("PROD", whole, right, dtype), dtype), out.dtype)


def _pow(b: Builder, out: Spec, x: Operand, exponent: Operand) -> Value:
    dtype = compute_dtype(out.dtype)
    base = b.cast(x, dtype)
    if not isinstance(exponent, Value) and isinstance(x, Value):
        made = _power(b, base, float(exponent))
        if made is not None:
            return b.cast(made, out.dtype)
    if not dtype.is_floating_point:
        raise UnsupportedError(f"pow of integers with exponent {exponent}")
    return b.cast(b.elementwise("POW", base, exponent, dtype), out.dtype)


def _power(b: Builder, x: Value, exponent: float) -> Value | None:
    if exponent == 1:
        return x
    if exponent in (2, 3):
        square = b.elementwise("PROD", x, x, x.dtype)
        return square if exponent == 2 else b.elementwise("PROD", square, x, x.dtype)
    if exponent in (0.5, -0.5, -1) and x.dtype.is_floating_point:
        root = x if exponent == -1 else b.unary("SQRT", x)
        return root if exponent == 0.5 else b.unary("RECIP", root)
    return None


def _clamp(b: Builder, out: Spec, x: Value, min: Operand | None = None, max: Operand | None = None) -> Value:
    result = b.cast(x, out.dtype)
    result = result if min is None else b.elementwise("MAX", result, min, out.dtype)
    return result if max is None else b.elementwise("MIN", result, max, out.dtype)


def _convert(b: Builder, out: Spec, x: Value, *_: Any, **__: Any) -> Value:
    """Copies, casts and aliases: the same values in the dtype of the output."""
    return b.cast(x, out.dtype)


def _dropout(b: Builder, out: Spec, x: Value, p: float, train: bool) -> Value:
    if train and p:
        raise UnsupportedError("dropout in training")
    return x


# -------------------------------------------------------------------------------------------------------- comparisons
_SWAPPED = {"LE": "GREATER", "GE": "LESS", "NE": "EQUAL"}


def _compare(kind: str) -> Emit:
    def write(b: Builder, out: Spec, x: Operand, y: Operand) -> Value:
        dtype = _working(promoted(x, y), x, y)
        dtype = torch.int32 if dtype == torch.bool else dtype
        result = b.elementwise(_SWAPPED.get(kind, kind), x, y, dtype)
        return b.unary("NOT", result) if kind in _SWAPPED else result

    return write


def _logical(kind: str) -> Emit:
    return lambda b, out, x, y: b.elementwise(kind, x, y, torch.bool)


def _bitwise(kind: str) -> Emit:
    def write(b: Builder, out: Spec, x: Operand, y: Operand) -> Value:
        if out.dtype != torch.bool:
            raise UnsupportedError(f"bitwise operations on {out.dtype}")
        return b.elementwise(kind, x, y, torch.bool)

    return write


def _not(b: Builder, out: Spec, x: Value) -> Value:
    if out.dtype != torch.bool:  # two's complement: ~x = -1 - x
        return b.elementwise("SUB", -1, x, out.dtype)
    return b.unary("NOT", x)


def _test(kind: str) -> Emit:
    def write(b: Builder, out: Spec, x: Value) -> Value:
        if not x.dtype.is_floating_point:
            return b.filled(0, torch.bool, out.shape)
        return b.unary(kind, b.cast(x, compute_dtype(x.dtype)))

    return write


def _where(b: Builder, out: Spec, condition: Value, x: Operand, y: Operand) -> Value:
    return b.select(b.cast(condition, torch.bool), b.cast(x, out.dtype), b.cast(y, out.dtype))


def _masked_fill(b: Builder, out: Spec, x: Value, mask: Value, value: Operand) -> Value:
    return _where(b, out, mask, value, x)


# -------------------------------------------------------------------------------------------------------- activations
def _unary(kind: str) -> Emit:
    def write(b: Builder, out: Spec, x: Value) -> Value:
        return b.cast(b.unary(kind, b.cast(x, compute_dtype(out.dtype))), out.dtype)

    return write


def _rounded(kind: str) -> Emit:
    return lambda b, out, x: _unary(kind)(b, out, x) if out.dtype.is_floating_point else x


def _negate(b: Builder, out: Spec, x: Value) -> Value:
    return b.unary("NEG", x) if out.dtype.is_floating_point else b.elementwise("SUB", 0, x, out.dtype)


def _absolute(b: Builder, out: Spec, x: Value) -> Value:
    if out.dtype.is_floating_point:
        return b.unary("ABS", x)
    return b.elementwise("MAX", x, b.elementwise("SUB", 0, x, out.dtype), out.dtype)


def _function(name: str) -> Emit:
    return lambda b, out, x, *_: activate(b, x, name, out.dtype)


def activate(b: Builder, x: Value, name: str, dtype: torch.dtype) -> Value:
    """An activation of the graph (`graph.ops.ACTIVATIONS`, sigmoid, tanh): in fp32 for 16-bit floats, rounded to `dtype`."""
    kinds = {"relu": "RELU", "sigmoid": "SIGMOID", "tanh": "TANH", "gelu": "GELU_ERF", "gelu_tanh": "GELU_TANH"}
    wide = b.cast(x, compute_dtype(dtype))
    if name == "silu":
        made = b.elementwise("PROD", wide, b.activation("SIGMOID", wide), wide.dtype)
    elif name in kinds:
        made = b.activation(kinds[name], wide)
    else:
        raise UnsupportedError(f"activation {name!r}")
    return b.cast(made, dtype)


def _gelu(b: Builder, out: Spec, x: Value, approximate: str = "none") -> Value:
    return activate(b, x, "gelu_tanh" if approximate == "tanh" else "gelu", out.dtype)


def _glu(b: Builder, out: Spec, gate_up: Value, activation: str) -> Value:
    size = out.shape[-1]
    gate, up = (b.slice(gate_up, len(out.shape) - 1, begin, size) for begin in (0, size))
    return b.elementwise("PROD", activate(b, gate, activation, out.dtype), up, out.dtype)


def in_fp32(emit: Emit) -> Emit:
    """An emitter that works in fp32 for 16-bit floats, its result rounded once."""

    @functools.wraps(emit)
    def write(b: Builder, out: Spec, x: Value, *args: Any, **kwargs: Any) -> Value:
        dtype = compute_dtype(out.dtype)
        return b.cast(emit(b, Spec(dtype, out.shape), b.cast(x, dtype), *args, **kwargs), out.dtype)

    return write


@in_fp32
def _rsqrt(b: Builder, out: Spec, x: Value) -> Value:
    return b.unary("RECIP", b.unary("SQRT", x))


@in_fp32
def _expm1(b: Builder, out: Spec, x: Value) -> Value:
    """2 tanh(x / 2) / (1 - tanh(x / 2)): exp(x) - 1 would cancel near 0, and this overflows for large x, so it is a choice."""
    half = b.activation("TANH", b.elementwise("PROD", x, 0.5, out.dtype))
    near = b.elementwise(
        "DIV", b.elementwise("PROD", half, 2, out.dtype), b.elementwise("SUB", 1, half, out.dtype), out.dtype
    )
    far = b.elementwise("SUB", b.unary("EXP", x), 1, out.dtype)
    return b.select(b.elementwise("LESS", b.unary("ABS", x), 0.5, out.dtype), near, far)


@in_fp32
def _log1p(b: Builder, out: Spec, x: Value) -> Value:
    return b.unary("LOG", b.elementwise("SUM", x, 1, out.dtype))


@in_fp32
def _softplus(b: Builder, out: Spec, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    """max(z, 0) + log(1 + exp(-|z|)) with z = beta x, which overflows for no z."""
    z = x if beta == 1 else b.elementwise("PROD", x, beta, out.dtype)
    tail = b.unary("EXP", b.unary("NEG", b.unary("ABS", z)))
    soft = b.elementwise(
        "SUM", b.activation("RELU", z), b.unary("LOG", b.elementwise("SUM", tail, 1, out.dtype)), out.dtype
    )
    return soft if beta == 1 else b.elementwise("DIV", soft, beta, out.dtype)


@in_fp32
def _leaky_relu(b: Builder, out: Spec, x: Value, slope: float = 0.01) -> Value:
    return b.activation("LEAKY_RELU", x, float(slope))


@in_fp32
def _elu(b: Builder, out: Spec, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if scale != 1 or input_scale != 1:
        raise UnsupportedError("elu with a scale")
    return b.activation("ELU", x, float(alpha))


@in_fp32
def _hardswish(b: Builder, out: Spec, x: Value) -> Value:
    gate = _clamp(b, out, b.elementwise("SUM", x, 3, out.dtype), 0, 6)
    return b.elementwise("PROD", x, b.elementwise("PROD", gate, 1 / 6, out.dtype), out.dtype)


@in_fp32
def _mish(b: Builder, out: Spec, x: Value) -> Value:
    return b.elementwise("PROD", x, b.activation("TANH", _softplus(b, out, x)), out.dtype)


_UNARY = {
    "cos": "COS",
    "sin": "SIN",
    "tan": "TAN",
    "exp": "EXP",
    "log": "LOG",
    "sqrt": "SQRT",
    "reciprocal": "RECIP",
    "erf": "ERF",
    "sign": "SIGN",
}
_COMPARE = {"eq": "EQUAL", "ne": "NE", "gt": "GREATER", "ge": "GE", "lt": "LESS", "le": "LE"}
_COPIES = (
    *("_to_copy.default", "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default", "clone.default"),
    *("contiguous.default", "alias.default", "detach.default", "detach_.default", "lift_fresh_copy.default"),
    "lift_fresh.default",
)


def _both(name: str) -> tuple[str, str]:
    return f"{name}.Tensor", f"{name}.Scalar"


MATH_OPERATORS: dict[str, Emit] = {
    **{f"aten.{name}.default": _unary(kind) for name, kind in _UNARY.items()},
    **{f"aten.{name}.default": _function(name) for name in ("relu", "sigmoid", "tanh", "silu")},
    **{f"aten.{name}.{kind}": _compare(how) for name, how in _COMPARE.items() for kind in ("Tensor", "Scalar")},
    **{f"aten.{name}.default": _rounded(name.upper()) for name in ("floor", "ceil", "round")},
    **each_name(_negate, "neg.default"),
    **each_name(_absolute, "abs.default"),
    **each_name(_binary("SUM"), *_both("add")),
    **each_name(_binary("SUB"), *_both("sub")),
    **each_name(_binary("PROD"), *_both("mul")),
    **each_name(_rsub, *_both("rsub")),
    **each_name(_divide, *_both("div"), "div.Tensor_mode", "div.Scalar_mode"),
    **each_name(_floor_divide, "floor_divide.default", "floor_divide.Scalar"),
    **each_name(_remainder, *_both("remainder")),
    **each_name(_pow, "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    **each_name(lambda b, out, x: _pow(b, out, x, 2), "square.default"),
    **each_name(_clamp, "clamp.default", "clamp.Tensor"),
    **each_name(lambda b, out, x, low=-1, high=1: _clamp(b, out, x, low, high), "hardtanh.default"),
    **each_name(lambda b, out, x, low: _clamp(b, out, x, low), "clamp_min.default", "clamp_min.Tensor"),
    **each_name(lambda b, out, x, high: _clamp(b, out, x, None, high), "clamp_max.default", "clamp_max.Tensor"),
    **each_name(_binary("MIN"), "minimum.default", "min.other"),
    **each_name(_binary("MAX"), "maximum.default", "max.other"),
    **each_name(_logical("AND"), "logical_and.default"),
    **each_name(_logical("OR"), "logical_or.default"),
    **each_name(_logical("XOR"), "logical_xor.default"),
    **each_name(lambda b, out, x: b.unary("NOT", b.cast(x, torch.bool)), "logical_not.default"),
    **each_name(_bitwise("AND"), *_both("bitwise_and"), "__and__.Tensor"),
    **each_name(_bitwise("OR"), *_both("bitwise_or"), "__or__.Tensor"),
    **each_name(_not, "bitwise_not.default"),
    **each_name(_test("ISNAN"), "isnan.default"),
    **each_name(_test("ISINF"), "isinf.default"),
    **each_name(_where, "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar"),
    **each_name(_masked_fill, "masked_fill.Scalar", "masked_fill.Tensor"),
    **each_name(_convert, *_COPIES),
    **each_name(_dropout, "dropout.default", "feature_dropout.default"),
    **each_name(_rsqrt, "rsqrt.default"),
    **each_name(_expm1, "expm1.default"),
    **each_name(_log1p, "log1p.default"),
    **each_name(_softplus, "softplus.default"),
    **each_name(_gelu, "gelu.default"),
    **each_name(_leaky_relu, "leaky_relu.default"),
    **each_name(_elu, "elu.default"),
    **each_name(_hardswish, "hardswish.default"),
    **each_name(_mish, "mish.default"),
    **each_name(lambda b, out, x: _clamp(b, out, x, 0, 6), "relu6.default"),
    "camshaft.glu.default": _glu,
}
"""Operator names to the functions that emit them."""
