"""A plan becomes a flat program for kernels/step.c, for one number of tokens T and of sampled rows R.

The segments are walked on meta tensors: a view stays a view of the same memory, everything else becomes an instruction that
writes a new buffer, and the buffers are then laid into one arena, where one takes the place of another that is no longer read.

    n11 = linear(n10, w3)            LINEAR    out buffer 4, x buffer 3, weight copy
    n12 = split(n11); n14 = n12[1]   (views of buffer 4)
    n17 = reshape(n14)               (view of buffer 4)
    n20 = rope(n17, n8, n9)          ROPE      out buffer 5, x buffer 4 + 256
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..graph.serialize import decode_value, find_target
from .kernels.cpu import ARGUMENTS, CACHE_DTYPES
from .segment import AttentionStep, Plan, SegmentStep

if TYPE_CHECKING:
    from .native_weights import WeightStore

_INSTRUCTION = struct.Struct("@3q4q2q2d" + "P4q" * 5)  # instr_t in step_ops.c
_ALIGN = 64
_META = torch.device("meta")
OPS = ("COPY", "UNARY", "BINARY", "BINARY_INT", "GATHER", "RMS_NORM", "LAYER_NORM", "MEAN", "ROPE", "GLU", "MATMUL",
       "LINEAR", "ATTENTION", "ROUND_ROWS", "LINEAR_INT")  # fmt: skip
"""The instructions, in the order of step_ops.c."""


class Unsupported(Exception):
    """A plan that the interpreter cannot run; the message names the operator or property."""


@dataclass
class Instruction:
    """One instruction; operands are tensors (meta: in the arena) with up to four strides each, [0] is written."""

    op: str
    operands: list[tuple[Tensor, tuple[int, ...]] | None]
    size: tuple[int, ...]
    kind: int = 0
    chunks: int = 1
    number: tuple[int, int] = (0, 0)
    value: tuple[float, float] = (0.0, 0.0)
    attention: dict[str, Any] | None = None


@dataclass
class _Buffer:
    """A piece of the arena: bytes, first and last instruction that touch it."""

    num_bytes: int
    first: int
    last: int
    offset: int = -1


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass
class Program:
    """Instructions of one (T, R), and where their buffers lie in the arena.

    inputs: per name of the plan's inputs, its buffer; output: the logits, contiguous [1, R, V], if any; hidden: hidden states,
    contiguous [1, T, H] each.
    """

    instructions: list[Instruction] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    arena_bytes: int = 0
    _buffers: dict[int, _Buffer] = field(default_factory=dict)
    _alive: list[Tensor] = field(default_factory=list)

    def new(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A new buffer for the next instruction to write."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=_META)
        now = len(self.instructions)
        self._buffers[_key(tensor)] = _Buffer(tensor.numel() * tensor.element_size(), now, now)
        self._alive.append(tensor)  # the key is an address, which must not be given out again
        return tensor

    def add(self, instruction: Instruction) -> None:
        """Appends an instruction and notes what it touches."""
        read = [operand[0] for operand in instruction.operands if operand is not None]
        if instruction.attention is not None:
            read += [instruction.attention[name] for name in ("q", "k", "v", "out")]
        for tensor in read:
            self.touch(tensor, len(self.instructions))
        self.instructions.append(instruction)

    def touch(self, tensor: Tensor, index: int) -> None:
        """Keeps a buffer until instruction `index`, or a constant for as long as the program lives."""
        if tensor.is_meta:
            buffer = self._buffers[_key(tensor)]
            buffer.last = max(buffer.last, index)
        else:
            self._alive.append(tensor)

    def place(self) -> None:
        """Gives every buffer an offset: the lowest gap between those that live at the same time."""
        live: list[_Buffer] = []
        for buffer in sorted(self._buffers.values(), key=lambda entry: entry.first):
            live = sorted((other for other in live if other.last >= buffer.first), key=lambda entry: entry.offset)
            at = 0
            for other in live:
                if other.offset - at >= buffer.num_bytes:
                    break
                at = -(-(other.offset + other.num_bytes) // _ALIGN) * _ALIGN
            buffer.offset = at
            live.append(buffer)
            self.arena_bytes = max(self.arena_bytes, at + buffer.num_bytes)

    def address(self, tensor: Tensor, arena: int) -> int:
        """Where a tensor's first element lies."""
        if not tensor.is_meta:
            return tensor.data_ptr()
        return arena + self._buffers[_key(tensor)].offset + int(tensor.storage_offset()) * tensor.element_size()

    def view(self, tensor: Tensor, arena: Tensor, base: int) -> Tensor:
        """A contiguous float32 tensor of the program, where it lies in the arena [bytes] whose buffers begin at address `base`."""
        begin = self.address(tensor, base) - arena.data_ptr()
        return arena[begin : begin + 4 * tensor.numel()].view(torch.float32).view(tensor.shape)

    def pack(self, arena: int, attention: int) -> tuple[bytes, bytes]:
        """The instructions as step.c reads them, and the arguments of attention, which will lie at `attention`."""
        code, arguments = bytearray(), bytearray()
        for entry in self.instructions:
            fields: list[Any] = [OPS.index(entry.op), entry.kind, entry.chunks]
            fields += [*([1] * (4 - len(entry.size))), *entry.size, *entry.number, *entry.value]
            operands = list(entry.operands) + [None] * (5 - len(entry.operands))
            for operand in operands:
                strides = () if operand is None else operand[1]
                fields.append(0 if operand is None else self.address(operand[0], arena))
                fields += [*([0] * (4 - len(strides))), *strides]
            if entry.attention is not None:
                fields[16] = attention + len(arguments)  # the pointer of operand 1
                arguments += self._pack_attention(entry.attention, arena)
            code += _INSTRUCTION.pack(*fields)
        return bytes(code), bytes(arguments)

    def _pack_attention(self, call: dict[str, Any], arena: int) -> bytes:
        q, k, v, out, k_cache, v_cache = (call[name] for name in ("q", "k", "v", "out", "k_cache", "v_cache"))
        extra = [0 if call[name] is None else call[name].data_ptr() for name in ("sinks", "slopes")]
        num_blocks, block_size, num_kv_heads, value_dim = v_cache.shape
        return ARGUMENTS.pack(
            *(self.address(tensor, arena) for tensor in (q, k, v)), k_cache.data_ptr(), v_cache.data_ptr(), 0, 0, 0, 0,
            *extra, 0, self.address(out, arena),
            *q.stride()[1:3], *k.stride()[1:3], *v.stride()[1:3], *k_cache.stride()[:3], *v_cache.stride()[:3], 0,
            q.shape[1], 0, q.shape[2], num_kv_heads, q.shape[3], value_dim,
            num_blocks, block_size, 0, call["window"], 1, CACHE_DTYPES.index(k_cache.dtype), call["scale"], call["softcap"],
        )  # fmt: skip


def translate(
    plan: Plan,
    weights: Mapping[str, Tensor],
    caches: Sequence[tuple[Tensor, Tensor]],
    store: WeightStore,
    num_tokens: int,
    num_rows: int,
    hidden_input: int | None = None,
) -> Program:
    """The program of a plan for T tokens and R sampled rows.

    store: makes weights what the interpreter reads. hidden_input: width of the plan's input `hidden`. Raises Unsupported.
    """
    from .native_ops import Translator

    program = Program()
    slots: dict[str, Any] = {}
    for name in plan.inputs:
        if name == "hidden":
            assert hidden_input is not None, "a plan with hidden states as an input says how wide they are"
            slots[name] = program.inputs[name] = program.new((1, num_tokens, hidden_input))
        else:
            shape = (num_rows,) if name == "sample_rows" else (1, num_tokens)
            slots[name] = program.inputs[name] = program.new(shape, torch.int64)
        program.touch(slots[name], 0)
    translator = Translator(program, store)
    for step in plan.steps:
        if isinstance(step, AttentionStep):
            slots[step.output] = _attention(program, translator, step, slots, weights, caches)
            continue
        operands = [slots[name] for name in step.inputs] + [weights[name] for name in step.weights]
        slots.update(zip(step.outputs, _segment(plan, step, translator, operands)))
    for tensor in (slots[name] for name in plan.outputs):
        if not tensor.is_meta or tensor.dtype != torch.float32:
            raise Unsupported(f"an output in {tensor.dtype}")
        program.hidden.append(translator.contiguous(tensor))
    for tensor in program.hidden:
        program.touch(tensor, len(program.instructions))
    if plan.has_logits:
        program.output = program.hidden.pop(0)
    program.place()
    return program


def _segment(plan: Plan, step: SegmentStep, translator: Any, operands: list[Tensor]) -> list[Any]:
    """Walks a segment's nodes; returns its outputs."""
    values: dict[str, Any] = {}
    given = iter(operands)
    for entry in plan.segments[step.segment].nodes:
        if entry["op"] == "placeholder":
            values[entry["name"]] = next(given)
            continue
        args = decode_value(entry["args"], values, torch.device("cpu"))
        if entry["op"] == "output":
            return list(args[0])
        kwargs = {key: decode_value(item, values, torch.device("cpu")) for key, item in entry.get("kwargs", {}).items()}
        values[entry["name"]] = translator.node(entry["target"], args, kwargs)
    raise AssertionError("a segment without output")


def _attention(
    program: Program,
    translator: Any,
    step: AttentionStep,
    slots: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    caches: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    k_cache, v_cache = caches[step.layer]
    if step.cos is not None:
        raise Unsupported("rope inside attention")
    if k_cache.dtype not in CACHE_DTYPES or v_cache.dtype != k_cache.dtype:
        raise Unsupported(f"a KV cache in {k_cache.dtype}")
    q, k, v = (translator.unit_rows(slots[name]) for name in (step.q, step.k, step.v))
    sinks, slopes = (weights[name].float().contiguous() if name else None for name in (step.sinks, step.alibi_slopes))
    out = program.new((*q.shape[:3], v.shape[3]))
    call = {"q": q, "k": k, "v": v, "out": out, "k_cache": k_cache, "v_cache": v_cache, "sinks": sinks, "slopes": slopes,
            "scale": step.scale, "window": step.window, "softcap": step.softcap}  # fmt: skip
    program.add(Instruction("ATTENTION", [(out, ())], (), number=(step.group, 0), attention=call))
    for tensor in (sinks, slopes):
        if tensor is not None:
            program.touch(tensor, 0)
    return out


def coalesce(shape: Sequence[int], strides: Sequence[Sequence[int]], limit: int) -> tuple[list[int], list[list[int]]]:
    """The fewest loops over `shape` that visit the same elements of every operand. Raises Unsupported beyond `limit`."""
    sizes: list[int] = []
    steps: list[list[int]] = []
    for index, size in enumerate(shape):
        here = [stride[index] for stride in strides]
        if size == 1:
            continue
        if sizes and all(before == now * size for before, now in zip(steps[-1], here)):
            sizes[-1], steps[-1] = sizes[-1] * size, here
        else:
            sizes.append(size)
            steps.append(here)
    if len(sizes) > limit:
        raise Unsupported(f"an operand of shape {list(shape)} with {len(sizes)} independent strides")
    return sizes, [[step[operand] for step in steps] for operand in range(len(strides))]


def evaluate(target: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An operator run by torch itself: on constants, on sizes, or a view of a meta tensor."""
    return find_target(target)(*args, **kwargs)
