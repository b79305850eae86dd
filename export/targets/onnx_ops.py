"""The table of operators for ONNX, first part: arithmetic, comparisons, activations, reductions.

Every function takes (builder, output, *the operator's arguments) and returns the name of what it wrote; `output` carries dtype
and shape. ONNX Runtime's fused CPU kernels stand where they compute the same in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..emitter import UnsupportedError, each_name, reduce_dims
from .onnx_graph import MICROSOFT, Builder, Emit, Operand, Size, Value, static


# --------------------------------------------------------------------------------------------------------- arithmetic
def promoted(x: Operand, y: Operand) -> torch.dtype:
    """The dtype in which torch compares or combines two operands."""

    def like(value: Operand) -> Any:
        if isinstance(value, Value):
            return torch.empty((1,) * min(len(value.shape), 1), dtype=value.dtype, device="meta")
        return 1 if isinstance(value, Size) else value

    return torch.result_type(like(x), like(y))


def _unary(kind: str) -> Emit:
    return lambda b, out, x: b.op(kind, b.cast(x, out.dtype))


def _keep(kind: str) -> Emit:
    """A function of a tensor of any dtype whose result is of another."""
    return lambda b, out, x: b.op(kind, x)


def _binary(kind: str) -> Emit:
    def write(b: Builder, out: Value, x: Operand, y: Operand, alpha: float = 1) -> str:
        right = b.cast(y, out.dtype)
        if alpha != 1:
            right = b.op("Mul", right, b.constant(alpha, out.dtype))
        return b.op(kind, b.cast(x, out.dtype), right)

    return write


def _rsub(b: Builder, out: Value, x: Operand, y: Operand, alpha: float = 1) -> str:
    return str(_binary("Sub")(b, out, y, x, alpha))


def _compare(kind: str, negate: bool = False) -> Emit:
    def write(b: Builder, out: Value, x: Operand, y: Operand) -> str:
        dtype = promoted(x, y)
        result = b.op(kind, b.cast(x, dtype), b.cast(y, dtype))
        return b.op("Not", result) if negate else result

    return write


def _logical(kind: str) -> Emit:
    return lambda b, out, x, y: b.op(kind, b.cast(x, torch.bool), b.cast(y, torch.bool))


def _bitwise(kind: str) -> Emit:
    def write(b: Builder, out: Value, x: Operand, y: Operand) -> str:
        name = kind if out.dtype == torch.bool else f"Bitwise{kind}"
        return b.op(name, b.cast(x, out.dtype), b.cast(y, out.dtype))

    return write


def _not(b: Builder, out: Value, x: Value) -> str:
    return b.op("Not" if out.dtype == torch.bool else "BitwiseNot", x)


def _divide(b: Builder, out: Value, x: Operand, y: Operand, rounding_mode: str | None = None) -> str:
    if rounding_mode == "floor":
        return _floor_divide(b, out, x, y)
    result = b.op("Div", b.cast(x, out.dtype), b.cast(y, out.dtype))
    if rounding_mode == "trunc" and out.dtype.is_floating_point:
        raise UnsupportedError("division of floats rounded towards zero")
    return result


def _floor_divide(b: Builder, out: Value, x: Operand, y: Operand) -> str:
    left, right = b.cast(x, out.dtype), b.cast(y, out.dtype)
    if out.dtype.is_floating_point:
        return b.op("Floor", b.op("Div", left, right))
    return b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right)  # ONNX's integer Div rounds towards zero


def _remainder(b: Builder, out: Value, x: Operand, y: Operand) -> str:
    left, right = b.cast(x, out.dtype), b.cast(y, out.dtype)
    if not out.dtype.is_floating_point:
        return b.op("Mod", left, right)
    return b.op("Sub", left, b.op("Mul", b.op("Floor", b.op("Div", left, right)), right))


def _pow(b: Builder, out: Value, x: Operand, exponent: Operand) -> str:
    base = b.cast(x, out.dtype)
    if isinstance(exponent, int | float):
        if exponent == 1:
            return base
        if exponent in (2, 3):
            square = b.op("Mul", base, base)
            return square if exponent == 2 else b.op("Mul", square, base)
        if exponent in (0.5, -0.5, -1) and out.dtype.is_floating_point:
            root = base if exponent == -1 else b.op("Sqrt", base)
            return root if exponent == 0.5 else b.op("Reciprocal", root)
    return b.op("Pow", base, b.cast(exponent, out.dtype))


def _clamp(b: Builder, out: Value, x: Value, min: Operand | None = None, max: Operand | None = None) -> str:
    result = b.cast(x, out.dtype)
    result = result if min is None else b.op("Max", result, b.cast(min, out.dtype))
    return result if max is None else b.op("Min", result, b.cast(max, out.dtype))


def _where(b: Builder, out: Value, condition: Value, x: Operand, y: Operand) -> str:
    return b.op("Where", b.cast(condition, torch.bool), b.cast(x, out.dtype), b.cast(y, out.dtype))


def _masked_fill(b: Builder, out: Value, x: Value, mask: Value, value: Operand) -> str:
    return b.op("Where", mask, b.cast(value, out.dtype), b.cast(x, out.dtype))


def _convert(b: Builder, out: Value, x: Value, *_: Any, **__: Any) -> str:
    """Copies, casts and aliases: the same values in the dtype of the output."""
    return b.cast(x, out.dtype)


def _dropout(b: Builder, out: Value, x: Value, p: float, train: bool) -> str:
    if train and p:
        raise UnsupportedError("dropout in training")
    return x.name


# -------------------------------------------------------------------------------------------------------- activations
def _rsqrt(b: Builder, out: Value, x: Value) -> str:
    return b.op("Reciprocal", b.op("Sqrt", b.cast(x, out.dtype)))


def _expm1(b: Builder, out: Value, x: Value) -> str:
    return b.op("Sub", b.op("Exp", b.cast(x, out.dtype)), b.constant(1, out.dtype))


def _log1p(b: Builder, out: Value, x: Value) -> str:
    return b.op("Log", b.op("Add", b.cast(x, out.dtype), b.constant(1, out.dtype)))


def _softplus(b: Builder, out: Value, x: Value, beta: float = 1, threshold: float = 20) -> str:
    if beta == 1:
        return b.op("Softplus", x)
    factor = b.constant(beta, out.dtype)
    return b.op("Div", b.op("Softplus", b.op("Mul", x, factor)), factor)


def _silu(b: Builder, out: Value, x: Value) -> str:
    return _activation(b, x.name, out.dtype, "silu")


def _gelu(b: Builder, out: Value, x: Value, approximate: str = "none") -> str:
    return _activation(b, x.name, out.dtype, "gelu_tanh" if approximate == "tanh" else "gelu")


def _activation(b: Builder, x: str, dtype: torch.dtype, name: str) -> str:
    if name == "relu":
        return b.op("Relu", x)
    if name == "silu":
        if dtype == torch.float32:
            return b.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)
        return b.op("Mul", x, b.op("Sigmoid", x))
    if name in ("gelu", "gelu_tanh"):
        return b.op("Gelu", x, approximate="none" if name == "gelu" else "tanh")
    raise UnsupportedError(f"activation {name!r}")


def _leaky_relu(b: Builder, out: Value, x: Value, slope: float = 0.01) -> str:
    return b.op("LeakyRelu", x, alpha=float(slope))


def _elu(b: Builder, out: Value, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> str:
    if scale != 1 or input_scale != 1:
        raise UnsupportedError("elu with a scale")
    return b.op("Elu", x, alpha=float(alpha))


def _glu(b: Builder, out: Value, gate_up: Value, activation: str) -> str:
    size = static(out.shape[-1], "a hidden size")
    gate, up = b.multi("Split", 2, gate_up, b.ints(size, size), axis=-1)
    return b.op("Mul", _activation(b, gate, out.dtype, activation), up)


# --------------------------------------------------------------------------------------------------------- reductions
def _reduce(kind: str) -> Emit:
    def write(b: Builder, out: Value, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> str:
        return b.op(kind, b.cast(x, out.dtype), b.ints(*reduce_dims(x.shape, dim)), keepdims=int(keepdim))

    return write


def _reduce_all(kind: str) -> Emit:
    return lambda b, out, x, dtype=None: b.op(
        kind, b.cast(x, out.dtype), b.ints(*reduce_dims(x.shape, None)), keepdims=0
    )


def _extreme(kind: str) -> Emit:
    def write(b: Builder, out: tuple[Value, Value], x: Value, dim: int, keepdim: bool = False) -> list[str]:
        values = b.op(f"Reduce{kind}", x, b.ints(dim), keepdims=int(keepdim))
        return [values, b.op(f"Arg{kind}", x, axis=dim, keepdims=int(keepdim))]

    return write


def _argmax(kind: str) -> Emit:
    def write(b: Builder, out: Value, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
        if dim is None:
            if keepdim:
                raise UnsupportedError("argmax over all dimensions with keepdim")
            return b.op(kind, b.op("Reshape", x, b.ints(-1)), axis=0, keepdims=0)
        return b.op(kind, x, axis=dim, keepdims=int(keepdim))

    return write


def _vector_norm(
    b: Builder, out: Value, x: Value, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> str:
    if ord not in (1, 2):
        raise UnsupportedError(f"a vector norm of order {ord}")
    return b.op(f"ReduceL{int(ord)}", b.cast(x, out.dtype), b.ints(*reduce_dims(x.shape, dim)), keepdims=int(keepdim))


def _softmax(kind: str) -> Emit:
    return lambda b, out, x, dim, dtype=None: b.op(kind, b.cast(x, out.dtype), axis=dim)


def _cumsum(b: Builder, out: Value, x: Value, dim: int, dtype: Any = None) -> str:
    return b.op("CumSum", b.cast(x, out.dtype), b.constant(dim, torch.int64))


_UNARY: dict[str, str] = {
    "neg": "Neg",
    "abs": "Abs",
    "cos": "Cos",
    "sin": "Sin",
    "tan": "Tan",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "reciprocal": "Reciprocal",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "erf": "Erf",
    "sign": "Sign",
    "hardswish": "HardSwish",
    "mish": "Mish",
}
_COMPARE: dict[str, tuple[str, bool]] = {
    "eq": ("Equal", False),
    "ne": ("Equal", True),
    "gt": ("Greater", False),
    "ge": ("GreaterOrEqual", False),
    "lt": ("Less", False),
    "le": ("LessOrEqual", False),
}
_arithmetic: Callable[[str], tuple[str, str]] = lambda name: (f"{name}.Tensor", f"{name}.Scalar")  # noqa: E731

OPERATORS: dict[str, Emit] = {
    **{f"aten.{name}.default": _unary(kind) for name, kind in _UNARY.items()},
    **{f"aten.{name}.{kind}": _compare(*how) for name, how in _COMPARE.items() for kind in ("Tensor", "Scalar")},
    **each_name(_binary("Add"), *_arithmetic("add")),
    **each_name(_binary("Sub"), *_arithmetic("sub")),
    **each_name(_binary("Mul"), *_arithmetic("mul")),
    **each_name(_rsub, *_arithmetic("rsub")),
    **each_name(_divide, *_arithmetic("div"), "div.Tensor_mode", "div.Scalar_mode"),
    **each_name(_floor_divide, "floor_divide.default", "floor_divide.Scalar"),
    **each_name(_remainder, *_arithmetic("remainder")),
    **each_name(_pow, "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    **each_name(_pow, "float_power.Tensor_Scalar"),
    **each_name(lambda b, out, x: _pow(b, out, x, 2), "square.default"),
    **each_name(_clamp, "clamp.default", "clamp.Tensor"),
    **each_name(lambda b, out, x, low=-1, high=1: _clamp(b, out, x, low, high), "hardtanh.default"),
    **each_name(lambda b, out, x, low: _clamp(b, out, x, low), "clamp_min.default", "clamp_min.Tensor"),
    **each_name(lambda b, out, x, high: _clamp(b, out, x, None, high), "clamp_max.default", "clamp_max.Tensor"),
    **each_name(_binary("Min"), "minimum.default", "min.other"),
    **each_name(_binary("Max"), "maximum.default", "max.other"),
    **each_name(_logical("And"), "logical_and.default"),
    **each_name(_logical("Or"), "logical_or.default"),
    **each_name(_logical("Xor"), "logical_xor.default"),
    **each_name(lambda b, out, x: b.op("Not", b.cast(x, torch.bool)), "logical_not.default"),
    **each_name(_bitwise("And"), *_arithmetic("bitwise_and"), "__and__.Tensor"),
    **each_name(_bitwise("Or"), *_arithmetic("bitwise_or"), "__or__.Tensor"),
    **each_name(_not, "bitwise_not.default"),
    **each_name(_keep("IsNaN"), "isnan.default"),
    **each_name(_keep("IsInf"), "isinf.default"),
    **each_name(_where, "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar"),
    **each_name(_masked_fill, "masked_fill.Scalar", "masked_fill.Tensor"),
    **each_name(
        _convert,
        "_to_copy.default",
        "to.dtype",
        "to.dtype_layout",
        "to.device",
        "to.other",
        "type_as.default",
        "clone.default",
        "contiguous.default",
        "alias.default",
        "detach.default",
        "detach_.default",
        "lift_fresh_copy.default",
        "lift_fresh.default",
    ),
    **each_name(_dropout, "dropout.default", "feature_dropout.default"),
    **each_name(_rsqrt, "rsqrt.default"),
    **each_name(_expm1, "expm1.default"),
    **each_name(_log1p, "log1p.default"),
    **each_name(_softplus, "softplus.default"),
    **each_name(_silu, "silu.default"),
    **each_name(_gelu, "gelu.default"),
    **each_name(_leaky_relu, "leaky_relu.default"),
    **each_name(_elu, "elu.default"),
    **each_name(lambda b, out, x: _clamp(b, out, x, 0, 6), "relu6.default"),
    "camshaft.glu.default": _glu,
    **each_name(_reduce("ReduceMean"), "mean.dim"),
    **each_name(_reduce("ReduceSum"), "sum.dim_IntList"),
    **each_name(_reduce("ReduceMax"), "amax.default"),
    **each_name(_reduce("ReduceMin"), "amin.default"),
    **each_name(_reduce_all("ReduceMean"), "mean.default"),
    **each_name(_reduce_all("ReduceSum"), "sum.default"),
    **each_name(_reduce_all("ReduceMax"), "max.default"),
    **each_name(_reduce_all("ReduceMin"), "min.default"),
    **each_name(_extreme("Max"), "max.dim"),
    **each_name(_extreme("Min"), "min.dim"),
    **each_name(_argmax("ArgMax"), "argmax.default"),
    **each_name(_argmax("ArgMin"), "argmin.default"),
    **each_name(_vector_norm, "linalg_vector_norm.default"),
    **each_name(_cumsum, "cumsum.default"),
    **each_name(_softmax("Softmax"), "softmax.int", "_softmax.default"),
    **each_name(_softmax("LogSoftmax"), "log_softmax.int", "_log_softmax.default"),
}
"""Operator names to the functions that write them."""
