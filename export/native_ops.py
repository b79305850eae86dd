"""The operators that the native step has: each is checked and becomes instructions of native_program.Program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..graph.linear_format import LinearFormat
from .native_program import Instruction, Program, Unsupported, coalesce, evaluate
from .native_weights import WeightStore

_UNARY = (
    "neg",
    "relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "tanh",
    "sigmoid",
    "cos",
    "sin",
    "pow",
    "reciprocal",
    "sqrt",
    "rsqrt",
)
_BINARY = ("add", "sub", "mul", "div")
_ACTIVATIONS = {name: _UNARY.index(name) for name in ("silu", "gelu", "gelu_tanh", "relu")}
_SMALL_PRODUCT = 1 << 16
_ROUNDINGS = ("none", "int8", "int8_static")
"""Activations of quantized layers, in the order of ROUND_ROWS' kinds in step_quantized.c."""

VIEWS = frozenset({
    "aten.reshape.default", "aten.view.default", "aten._unsafe_view.default", "aten.transpose.int", "aten.permute.default",
    "aten.t.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.slice.Tensor", "aten.select.int",
    "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.expand.default", "aten.alias.default",
    "aten.flatten.using_ints",
})  # fmt: skip
"""Operators that move nothing; where one has to, a copy goes before it."""


def supported(target: str) -> bool:
    """Whether there is a translation of an operator at all."""
    return target in VIEWS or target in _HANDLERS or target.startswith(("operator.", "aten.sym_size."))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [found for item in value for found in _tensors(item)] if isinstance(value, list | tuple) else []


class Translator:
    """Turns the nodes of segments into instructions of `program`.

    Values are meta tensors (in the arena) or real ones (constants: weights and what is computed of weights alone).
    """

    def __init__(self, program: Program, store: WeightStore) -> None:
        self.program = program
        self.store = store

    def node(self, target: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The value of a node. Raises Unsupported."""
        operands = _tensors(args) + _tensors(list(kwargs.values()))
        if target.startswith(("operator.", "aten.sym_size.")):
            return evaluate(target, args, kwargs)
        if not any(tensor.is_meta for tensor in operands):
            if not operands:
                raise Unsupported(f"{target} without operands")
            return evaluate(target, args, kwargs)
        if target in VIEWS:
            return self._view(target, args, kwargs)
        if target not in _HANDLERS:
            raise Unsupported(target)
        try:
            return _HANDLERS[target](self, *args, **kwargs)
        except TypeError as error:  # an argument that the handler does not know
            raise Unsupported(f"{target} ({error})") from error
        except Unsupported as error:
            raise Unsupported(f"{target} on {error}") from error

    # ----------------------------------------------------------------------------------------------------- helpers
    def _view(self, target: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        source = args[0]
        result = evaluate(target, args, kwargs)
        first = result if isinstance(result, Tensor) else result[0]
        if first.untyped_storage()._cdata == source.untyped_storage()._cdata:
            return result
        return evaluate(target, [self.contiguous(source), *args[1:]], kwargs)

    def contiguous(self, tensor: Tensor) -> Tensor:
        """The tensor itself if its elements lie one behind the other, or a copy."""
        if tensor.is_contiguous():
            return tensor
        return (
            self._copy(tensor, self.program.new(tensor.shape, tensor.dtype)) if tensor.is_meta else tensor.contiguous()
        )

    def unit_rows(self, tensor: Tensor) -> Tensor:
        """The tensor with its last dimension contiguous."""
        return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else self.contiguous(tensor)

    def _copy(self, source: Tensor, into: Tensor) -> Tensor:
        if source.dtype == into.dtype and source.element_size() in (4, 8):
            kind = 0 if source.element_size() == 4 else 1
        elif source.dtype == torch.int64 and into.dtype == torch.float32:
            kind = 2
        else:
            raise Unsupported(f"{source.dtype} to {into.dtype}")
        size, steps = coalesce(into.shape, [into.stride(), source.stride()], 4)
        operands: list[Any] = [(into, tuple(steps[0])), (source, tuple(steps[1]))]
        self.program.add(Instruction("COPY", operands, tuple(size), kind))
        return into

    def _float(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.dtype != torch.float32:
                raise Unsupported(f"{str(tensor.dtype).removeprefix('torch.')}")

    def _along_rows(
        self, op: str, out: list[Tensor], inputs: list[Tensor], constants: list[Tensor | None], length: int, **more: Any
    ) -> None:
        """An instruction on rows of the last dimension. Operands: out[0], inputs[0], constants, inputs[1:], out[1:]."""
        moving = [*out, *inputs]
        shape = out[0].shape[:-1]
        size, steps = coalesce(shape, [tensor.expand(*shape, -1).stride()[:-1] for tensor in moving], 3)
        bound: list[Any] = [(tensor, (*step, 1)) for tensor, step in zip(moving, steps)]
        fixed: list[Any] = [None if tensor is None else (tensor, ()) for tensor in constants]
        count = len(out)
        operands = [bound[0], bound[count], *fixed, *bound[count + 1 :], *bound[1:count]]
        self.program.add(Instruction(op, operands, (*size, length), **more))

    # --------------------------------------------------------------------------------------------------- operators
    def unary(self, name: str, x: Tensor, value: float = 0.0) -> Tensor:
        """A function of every element."""
        self._float(x)
        out = self.program.new(x.shape)
        size, steps = coalesce(x.shape, [out.stride(), x.stride()], 4)
        operands: list[Any] = [(out, tuple(steps[0])), (x, tuple(steps[1]))]
        self.program.add(Instruction("UNARY", operands, tuple(size), _UNARY.index(name), value=(float(value), 0.0)))
        return out

    def binary(self, name: str, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
        """Sum, difference, product or quotient, with broadcasting; a number counts as a tensor of one element."""
        like = a if isinstance(a, Tensor) else b
        a, b = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=like.dtype) for x in (a, b))
        integers = a.dtype == b.dtype == torch.int64 and name != "div" and isinstance(alpha, int)
        if not integers:
            self._float(a, b)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        out = self.program.new(shape, a.dtype)
        size, steps = coalesce(shape, [out.stride(), a.expand(shape).stride(), b.expand(shape).stride()], 4)
        operands: list[Any] = [(tensor, tuple(step)) for tensor, step in zip((out, a, b), steps)]
        self.program.add(
            Instruction(
                "BINARY_INT" if integers else "BINARY", operands, tuple(size), _BINARY.index(name),
                number=(int(alpha), 0), value=(float(alpha), 0.0),
            )
        )  # fmt: skip
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times weight [N, K] transposed, plus bias [N]."""
        self._float(x, weight, bias)
        if weight.is_meta or (bias is not None and bias.is_meta):
            raise Unsupported("a computed weight")
        num_outputs, dim = weight.shape
        x, step = self._even_rows(x)
        lead = x.shape[:-1]
        stored, kind, per_chunk = self.store.linear(weight)
        out = self.program.new((*lead, num_outputs))
        operands: list[Any] = [(out, (num_outputs, 1)), (x, (step, 1)), (stored, (dim, 1)),
                               None if bias is None else (bias.contiguous(), ())]  # fmt: skip
        size = (out.numel() // num_outputs, num_outputs, dim)
        self.program.add(
            Instruction("LINEAR", operands, size, kind, chunks=-(-num_outputs // per_chunk), number=(per_chunk, 0))
        )
        return out

    def _even_rows(self, x: Tensor) -> tuple[Tensor, int]:
        """x [..., K], copied where its rows have no one stride, and that stride."""
        x = self.unit_rows(x)
        _, steps = coalesce(x.shape[:-1], [x.stride()[:-1]], 4)
        if len(steps[0]) > 1:
            x = self.contiguous(x)
        return x, x.stride(-2) if len(steps[0]) != 1 else steps[0][0]

    def quantized_linear(
        self, x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None,
        bias: Tensor | None, x_scale: Tensor | None, format: str,
    ) -> Tensor:  # fmt: skip
        """camshaft::quantized_linear on int8 and int4 weights: the rows of x rounded to integers, then integer products."""
        self._float(x, bias)
        parsed = LinearFormat.parse(format)
        if parsed.activations not in _ROUNDINGS:
            raise Unsupported(f"{parsed.activations} activations")
        if any(tensor is not None and tensor.is_meta for tensor in (weight, scale, zero_point, bias, x_scale)):
            raise Unsupported("a computed weight")
        panels = self.store.integers(weight, scale, zero_point, parsed)
        x, step = self._even_rows(x)
        num_rows = x.numel() // x.shape[-1]
        rounded = self.program.new((num_rows, panels.num_groups * panels.group), torch.int16)
        sums = self.program.new((num_rows, panels.num_groups, 2))
        static = None if x_scale is None else (x_scale.float().contiguous(), ())
        operands: list[Any] = [(rounded, ()), (x, (step, 1)), static, None, (sums, ())]
        size = (panels.num_groups, num_rows, x.shape[-1], panels.group)
        self.program.add(Instruction("ROUND_ROWS", operands, size, _ROUNDINGS.index(parsed.activations)))
        out = self.program.new((*x.shape[:-1], panels.num_outputs))
        added = None if bias is None else (bias.contiguous(), ())
        operands = [(out, (panels.num_outputs, 1)), (rounded, ()), (panels.stored, ()), added, (sums, ())]
        size = (panels.num_groups, num_rows, panels.num_outputs, panels.group)
        self.program.add(
            Instruction(
                "LINEAR_INT", operands, size, int(panels.four_bits) + 2 * int(panels.has_zero_points),
                chunks=-(-panels.num_outputs // panels.per_chunk), number=(panels.per_chunk, panels.zero_point),
            )
        )  # fmt: skip
        return out

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """A product with a constant matrix, or a small one of up to one batch dimension."""
        self._float(a, b)
        if b.dim() == 2 and not b.is_meta and a.dim() > 1:
            return self.linear(a, b.t())
        if a.dim() < 2 or b.dim() < 2:
            raise Unsupported("a vector")
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        out = self.program.new((*batch, a.shape[-2], b.shape[-1]))
        if out.numel() * a.shape[-1] > _SMALL_PRODUCT:
            raise Unsupported(f"{list(a.shape)} times {list(b.shape)}, computed both")
        left, right = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
        size, steps = coalesce(batch, [left.stride()[:-2], right.stride()[:-2]], 1)
        operands: list[Any] = [(out, ())]
        for tensor, step in zip((left, right), steps):
            operands.append((tensor, (step[0] if step else 0, *tensor.stride()[-2:], 0)))
        self.program.add(Instruction("MATMUL", operands, (*(size or [1]), *out.shape[-2:], a.shape[-1])))
        return out

    def gather(self, table: Tensor, dim: int, index: Tensor) -> Tensor:
        """Rows of `table` along `dim`, as index_select with an index of any shape."""
        self._float(table)
        if index.dtype != torch.int64:
            raise Unsupported(f"an index in {index.dtype}")
        dim %= table.dim()
        table, index = self.contiguous(table), self.contiguous(index)
        outer = table.shape[:dim].numel()
        length = table.shape[dim + 1 :].numel()
        out = self.program.new((*table.shape[:dim], *index.shape, *table.shape[dim + 1 :]))
        operands: list[Any] = [(out, ()), (table, (table.shape[dim] * length, length, 0, 1)), (index, ())]
        size = (outer, index.numel(), 1, length)
        self.program.add(Instruction("GATHER", operands, size, number=(table.shape[dim], 0)))
        return out

    def index(self, table: Tensor, indices: list[Tensor | None]) -> Tensor:
        """table[index] with one index, on the first dimension."""
        if len(indices) != 1 or indices[0] is None:
            raise Unsupported(f"{len(indices)} indices")
        return self.gather(table, 0, indices[0])

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool) -> Tensor:
        """camshaft::rms_norm."""
        return self._rms_norm(x, None, weight, eps, offset, cast_first)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool
    ) -> tuple[Tensor, Tensor]:
        """camshaft::add_rms_norm."""
        normed, total = self._rms_norm(x, residual, weight, eps, offset, cast_first)
        return normed, total

    def _rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float,
                  cast_first: bool) -> list[Tensor]:  # fmt: skip
        self._float(x, residual, weight)
        if residual is not None and residual.shape != x.shape:
            raise Unsupported(f"{list(x.shape)} and {list(residual.shape)}")
        if weight is not None:
            weight = self.contiguous(weight)
        inputs = [self.unit_rows(tensor) for tensor in (x, residual) if tensor is not None]
        out = [self.program.new(x.shape) for _ in inputs]
        value = (float(eps), 0.0 if cast_first else float(offset))
        self._along_rows("RMS_NORM", out, inputs, [weight], x.shape[-1], value=value)
        return out

    def layer_norm(self, x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None,
                   eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:  # fmt: skip
        """Over the last dimension."""
        self._float(x, weight, bias)
        if list(shape) != [x.shape[-1]]:
            raise Unsupported(f"the dimensions {shape} of {list(x.shape)}")
        weight, bias = (None if tensor is None else self.contiguous(tensor) for tensor in (weight, bias))
        out = self.program.new(x.shape)
        self._along_rows("LAYER_NORM", [out], [self.unit_rows(x)], [weight, bias], x.shape[-1], value=(float(eps), 0.0))
        return out

    def mean(self, x: Tensor, dims: list[int], keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        """Over the last dimension."""
        self._float(x)
        if [dim % x.dim() for dim in dims] != [x.dim() - 1] or dtype not in (None, torch.float32):
            raise Unsupported(f"the dimensions {dims} of {list(x.shape)}")
        out = self.program.new((*x.shape[:-1], 1))
        self._along_rows("MEAN", [out], [self.unit_rows(x)], [], x.shape[-1])
        return out if keepdim else out.squeeze(-1)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """camshaft::rope."""
        self._float(x, cos, sin)
        out = self.program.new(x.shape)
        turns = [self.unit_rows(tensor).unsqueeze(2) for tensor in (cos, sin)]
        rotated = cos.shape[-1]
        inputs = [self.unit_rows(x), *turns]
        self._along_rows("ROPE", [out], inputs, [], x.shape[-1], kind=int(interleaved), number=(rotated, 0))
        return out

    def glu(self, gate_up: Tensor, activation: str) -> Tensor:
        """camshaft::glu."""
        self._float(gate_up)
        if activation not in _ACTIVATIONS:
            raise Unsupported(f"the activation {activation}")
        length = gate_up.shape[-1] // 2
        out = self.program.new((*gate_up.shape[:-1], length))
        self._along_rows("GLU", [out], [self.unit_rows(gate_up)], [], length, kind=_ACTIVATIONS[activation])
        return out

    def cat(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        """Side by side, by copies."""
        dtype = tensors[0].dtype
        dim %= tensors[0].dim()
        shape = list(tensors[0].shape)
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        out, at = self.program.new(shape, dtype), 0
        for tensor in tensors:
            self._copy(tensor, out.narrow(dim, at, tensor.shape[dim]))
            at += tensor.shape[dim]
        return out

    def stack(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        """Along a new dimension."""
        return self.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)

    def repeat_interleave(self, x: Tensor, count: int, dim: int | None = None) -> Tensor:
        """Every element `count` times."""
        if dim is None:
            raise Unsupported("all dimensions at once")
        dim %= x.dim()
        wide = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], count, *x.shape[dim + 1 :])
        return self.contiguous(wide).flatten(dim, dim + 1)

    def to_copy(self, x: Tensor, *, dtype: torch.dtype | None = None, **layout: Any) -> Tensor:
        """Another dtype; the same one leaves the value where it is."""
        if dtype in (None, x.dtype):
            return x
        return self._copy(x, self.program.new(x.shape, dtype or x.dtype))


def _unary(name: str) -> Callable[..., Tensor]:
    return lambda self, x: self.unary(name, x)


def _binary(name: str) -> Callable[..., Tensor]:
    return lambda self, a, b, **more: self.binary(name, a, b, **more)


_HANDLERS: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}.default": _unary(name) for name in _UNARY if name not in ("gelu_tanh", "pow", "gelu")},
    **{f"aten.{name}.{kind}": _binary(name) for name in _BINARY for kind in ("Tensor", "Scalar")},
    "aten.gelu.default": lambda self, x, approximate="none": self.unary(
        "gelu" if approximate == "none" else "gelu_tanh", x
    ),
    "aten.pow.Tensor_Scalar": lambda self, x, exponent: self.unary("pow", x, exponent),
    "aten.square.default": lambda self, x: self.unary("pow", x, 2.0),
    "aten.linear.default": Translator.linear,
    "aten.matmul.default": Translator.matmul,
    "aten.mm.default": Translator.matmul,
    "aten.bmm.default": Translator.matmul,
    "aten.embedding.default": lambda self, table, index, *_: self.gather(table, 0, index),
    "aten.index_select.default": Translator.gather,
    "aten.index.Tensor": Translator.index,
    "aten.layer_norm.default": Translator.layer_norm,
    "aten.mean.dim": Translator.mean,
    "aten.cat.default": Translator.cat,
    "aten.stack.default": Translator.stack,
    "aten.repeat_interleave.self_int": Translator.repeat_interleave,
    "aten._to_copy.default": Translator.to_copy,
    "aten.clone.default": lambda self, x, **layout: x,
    "camshaft.rms_norm.default": Translator.rms_norm,
    "camshaft.add_rms_norm.default": Translator.add_rms_norm,
    "camshaft.rope.default": Translator.rope,
    "camshaft.glu.default": Translator.glu,
    "camshaft.quantized_linear.default": Translator.quantized_linear,
}
