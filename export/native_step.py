"""The native step: a decode step of few tokens as one call into kernels/step.c, without a session or a call per segment.

With few tokens a step takes as long as reading the weights does. Where a float32 weight holds bfloat16 values exactly, as those
of most checkpoints do, the step reads a bfloat16 copy of it: the same numbers from half the memory. Quantized layers keep their
int8 or int4 weights. Steps of more tokens, and plans with an operator that it does not have, go through the target's engines.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels.cpu import raise_status
from .kernels.native import NativeBuildError, build_library
from .native_ops import supported
from .native_program import Program, Unsupported, translate
from .native_weights import WeightStore
from .segment import Plan
from .step_outputs import StepOutputs, stack_hidden

if TYPE_CHECKING:
    from ..graph.program import CacheSpec
    from .manifest import BuildConfig, Manifest

logger = logging.getLogger(__name__)

MAX_TOKENS = 16
"""Most tokens of a step that runs natively: at twice as many, ONNX Runtime's matrix products begin to be faster."""
_MAX_PROGRAMS = 32
"""Programs that are kept; the one written first goes first."""
_TARGETS = ("onnxruntime", "inductor")
"""Targets whose small steps may run natively: eager is what others are compared with, and a new target should see its work."""
_SOURCE = Path(__file__).parent / "kernels" / "step.c"
_STEP = struct.Struct("@P2q" + "2Pq" * 4 + "3PqP2q")  # step_t in step.c
_GROUP = struct.Struct("@2P2q")  # group_t in step.c
_BAD_INDEX = 6
_ALIGN = 64


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled interpreter. Raises NativeBuildError."""
    try:
        library = ctypes.CDLL(str(build_library(_SOURCE).path))
    except OSError as error:
        raise NativeBuildError(f"the compiled step does not load: {error}; delete it to rebuild") from error
    library.camshaft_step_create.restype = ctypes.c_void_p
    library.camshaft_step_destroy.argtypes = [ctypes.c_void_p]
    library.camshaft_step_run.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.camshaft_step_run.restype = ctypes.c_int64
    library.camshaft_step_panel.restype = ctypes.c_int64
    return library


def refusal(plan: Plan, build: BuildConfig) -> str | None:
    """Why a plan has no native step, as far as the plan itself tells, or None."""
    if build.device != "cpu":
        return f"it runs on {build.device}"
    if build.target not in _TARGETS:
        return f"the {build.target} target runs all steps itself"
    missing = {
        name for segment in plan.segments.values() for name in segment.operators if not supported(name)
    }  # fmt: skip
    if missing:
        return f"no native {', '.join(sorted(missing))}"
    return f"it is in {build.dtype}; native steps are in float32" if build.dtype != "float32" else None


def outlook(plan: Plan, build: BuildConfig) -> str:
    """One line on the native step of an engine that is not prepared yet; nothing is compiled or run for it."""
    reason = refusal(plan, build)
    return f"no native step: {reason}" if reason else f"native step up to {MAX_TOKENS} tokens, as far as the plan tells"


class NativeStep:
    """Runs steps of up to `max_tokens` tokens of a plan.

    weights: name -> float32 tensor on the CPU. like: the step of another plan, with which threads and weights are shared.

    Programs are written when a step of their size first comes. Steps of one object, and of those like it, run one at a time, from
    whichever thread; torch.get_num_threads() decides how many threads share the work. Raises Unsupported or NativeBuildError if the
    plan cannot run.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        vocab_size: int,
        max_tokens: int = MAX_TOKENS,
        like: NativeStep | None = None,
    ) -> None:
        library = _library()
        self.max_tokens = max_tokens
        self._plan, self._weights = plan, weights
        self._width = vocab_size if plan.has_logits else 0
        self._hidden_input = None if plan.hidden_input is None else plan.hidden_input[0]
        self._run = library.camshaft_step_run
        self._like = like  # whose threads and copies of weights must live as long
        self._store: WeightStore = WeightStore(int(library.camshaft_step_panel())) if like is None else like._store
        self._lock: threading.Lock = threading.Lock() if like is None else like._lock
        self._pool: Any = library.camshaft_step_create() if like is None else like._pool
        if not self._pool:
            raise MemoryError("no memory for the native step")
        if like is None:
            self._finalizer = weakref.finalize(self, library.camshaft_step_destroy, self._pool)
        self._caches: Sequence[tuple[Tensor, Tensor]] | None = None
        self._arena = _arena(0)
        self._ready: dict[tuple[int, int], _Ready] = {}

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights, by name."""
        return self._weights

    @property
    def copied_bytes(self) -> int:
        """Size of the weights that are held a second time, in bytes."""
        return self._store.copied_bytes

    def check(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Writes the largest program, for its arena and all copies of weights. Raises Unsupported."""
        with torch.inference_mode():
            size = self.max_tokens
            program = translate(self._plan, self._weights, caches, self._store, size, size, self._hidden_input)
        self._arena = _arena(program.arena_bytes)

    def takes(self, batch: Any) -> bool:
        """Whether a batch is of a size that runs here."""
        return batch.token_ids.shape[0] <= self.max_tokens and batch.sample_rows.shape[0] > 0

    def step(self, batch: Any, caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """As `step_outputs`; the logits [R, V] alone."""
        return self.step_outputs(batch, caches).logits

    def step_outputs(self, batch: Any, caches: Sequence[tuple[Tensor, Tensor]]) -> StepOutputs:
        """Writes keys and values of a runtime Batch and returns its logits [R, V] and hidden states, both float32.

        Raises ValueError for token ids, slots or block tables outside their ranges.
        """
        num_tokens, num_rows = batch.token_ids.shape[0], batch.sample_rows.shape[0]
        with self._lock:
            ready = self._program(num_tokens, num_rows, caches)
            _check_batch(batch, num_tokens)
            logits = torch.empty((num_rows, self._width))
            ready.fill(batch, logits)
            status = self._run(self._pool, ready.buffer)
            if status:
                ready.fail(status, batch, caches)
            return StepOutputs(logits, stack_hidden(ready.hidden, num_tokens))

    def write_ahead(self, sizes: Sequence[tuple[int, int]], caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Writes the programs of steps of (tokens, rows of logits); each takes as long as some twenty steps of a small model."""
        with self._lock:
            for num_tokens, num_rows in sizes:
                if num_rows <= num_tokens <= self.max_tokens:
                    self._program(num_tokens, num_rows, caches)

    def _program(self, num_tokens: int, num_rows: int, caches: Sequence[tuple[Tensor, Tensor]]) -> _Ready:
        """The program of a size over these caches, written if need be."""
        if self._caches is not caches:
            self._caches, self._ready = caches, {}
        ready = self._ready.get((num_tokens, num_rows))
        if ready is None:
            ready = self._ready[num_tokens, num_rows] = self._write(num_tokens, num_rows)
        return ready

    def _write(self, num_tokens: int, num_rows: int) -> _Ready:
        assert self._caches is not None
        with torch.inference_mode():
            program = translate(
                self._plan, self._weights, self._caches, self._store, num_tokens, num_rows, self._hidden_input
            )  # fmt: skip
        while len(self._ready) >= _MAX_PROGRAMS:
            del self._ready[next(iter(self._ready))]
        fits = program.arena_bytes + _ALIGN <= self._arena.numel()
        arena = self._arena if fits else _arena(program.arena_bytes)  # one step at a time: programs share it
        return _Ready(program, arena, len(self._caches))


class _Ready:
    """A program in memory, with the buffer that a step fills in."""

    def __init__(self, program: Program, arena: Tensor, num_groups: int) -> None:
        self.program = program
        self.arena = arena
        base = -(-arena.data_ptr() // _ALIGN) * _ALIGN
        _, arguments = program.pack(base, 0)
        self.arguments = ctypes.create_string_buffer(arguments, max(len(arguments), 1))
        code, _ = program.pack(base, ctypes.addressof(self.arguments))
        self.code = ctypes.create_string_buffer(code, len(code))
        self.buffer = ctypes.create_string_buffer(_STEP.size)
        self.inputs = [program.inputs.get(name) for name in ("token_ids", "positions", "sample_rows")]
        self.places = [0 if tensor is None else program.address(tensor, base) for tensor in self.inputs]
        self.result = 0 if program.output is None else program.address(program.output, base)
        self.hidden = [program.view(tensor, arena, base) for tensor in program.hidden]
        given = program.inputs.get("hidden")
        self.hidden_input = None if given is None else program.view(given, arena, base)
        self.head = (ctypes.addressof(self.code), len(program.instructions))
        self.groups = ctypes.create_string_buffer(_GROUP.size * max(num_groups, 1))

    def fill(self, batch: Any, logits: Tensor) -> None:
        """Puts a batch's addresses into the buffer, and its hidden states where the program reads them."""
        if self.hidden_input is not None:
            self.hidden_input[0].copy_(batch.hidden)
        for index, group in enumerate(batch.groups):
            tables = group.block_tables
            _GROUP.pack_into(self.groups, index * _GROUP.size, group.slot_mapping.data_ptr(), tables.data_ptr(),
                             tables.shape[1], tables.shape[1])  # fmt: skip
        tokens, positions, rows = self.places
        size, rows_size = batch.token_ids.shape[0] * 8, batch.sample_rows.shape[0] * 8
        _STEP.pack_into(
            self.buffer, 0, *self.head, torch.get_num_threads(),
            tokens, batch.token_ids.data_ptr(), size if tokens else 0,
            positions, batch.positions.data_ptr(), size if positions else 0,
            rows, batch.sample_rows.data_ptr(), rows_size if rows else 0,
            logits.data_ptr(), self.result, logits.numel() * 4,
            batch.query_start.data_ptr(), batch.seq_lens.data_ptr(),
            0 if batch.tree_mask is None else batch.tree_mask.data_ptr(), batch.seq_lens.shape[0],
            ctypes.addressof(self.groups), 0, 0,
        )  # fmt: skip

    def fail(self, status: int, batch: Any, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Raises what a failed step returned."""
        *_, at, value = _STEP.unpack(self.buffer)
        instruction = self.program.instructions[at]
        if status % 8 == _BAD_INDEX:
            raise ValueError(
                f"row {status // 8} of the step looks up row {value} of a table of {instruction.number[0]} rows "
                f"(token_ids {batch.token_ids.tolist()}, positions {batch.positions.tolist()}); allowed: "
                f"0..{instruction.number[0] - 1}"
            )
        group = batch.groups[instruction.number[0]]
        assert instruction.attention is not None
        raise_status(status, group.slot_mapping, group.block_tables, batch.query_start, batch.seq_lens,
                     instruction.attention["k_cache"])  # fmt: skip


def _arena(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes + _ALIGN, dtype=torch.uint8)


def _check_batch(batch: Any, num_tokens: int) -> None:
    """What the interpreter takes for granted. Raises ValueError."""
    for index, group in enumerate(batch.groups):
        tables = group.block_tables
        if (
            group.slot_mapping.shape[0] != num_tokens
            or tables.shape[0] != batch.seq_lens.shape[0]
            or group.slot_mapping.dtype != torch.int64
            or tables.dtype != torch.int32
            or not tables.is_contiguous()
        ):
            raise ValueError(
                f"cache group {index}: slot_mapping {group.slot_mapping.dtype} {list(group.slot_mapping.shape)} and "
                f"block_tables {tables.dtype} {list(tables.shape)} do not fit {num_tokens} tokens of "
                f"{batch.seq_lens.shape[0]} sequences; needed: int64 [T], int32 [S, W], contiguous"
            )
    masks = () if batch.tree_mask is None else (batch.tree_mask,)
    longs = (batch.token_ids, batch.positions, batch.sample_rows, *masks)
    shorts = (batch.query_start, batch.seq_lens)
    if (
        batch.positions.shape[0] != num_tokens
        or any(mask.shape[0] != num_tokens for mask in masks)
        or batch.query_start.shape[0] != batch.seq_lens.shape[0] + 1
        or any(tensor.dtype != torch.int64 for tensor in longs)
        or any(tensor.dtype != torch.int32 for tensor in shorts)
    ):
        raise ValueError(
            "a step needs token_ids [T], positions [T], sample_rows and tree_mask [T] or None in int64, query_start [S + 1] and "
            f"seq_lens [S] in int32; got {[(str(tensor.dtype), list(tensor.shape)) for tensor in (*longs, *shorts)]}"
        )


def make_native_step(plan: Plan, manifest: Manifest, weights: Mapping[str, Tensor]) -> tuple[NativeStep | None, str]:
    """The native step of a plan, or None, and a line that says what there is or why there is none."""
    reason = refusal(plan, manifest.build)
    native: NativeStep | None = None
    if reason is None:
        try:
            native = NativeStep(plan, weights, manifest.model.vocab_size)
            native.check(_empty_caches(manifest.cache))
        except (Unsupported, NativeBuildError) as error:
            native, reason = None, str(error)
    if native is None:
        line = f"no native step: {reason}"
    else:
        line = f"native step up to {native.max_tokens} tokens, {native.copied_bytes / 1e6:.1f} MB of weights copied"
    logger.info("%s", line)
    return native, line


def make_native_part(plan: Plan, manifest: Manifest, whole: NativeStep) -> NativeStep | None:
    """The native step of a part of a plan, which shares threads and weights with that of the whole; None, which is logged, where
    there is none."""
    try:
        native = NativeStep(plan, whole.weights, manifest.model.vocab_size, like=whole)
        native.check(_empty_caches(manifest.cache))
    except Unsupported as error:
        logger.warning("no native step of %s: %s; it runs in %s", ", ".join(plan.outputs), error, manifest.build.target)
        return None
    return native


def _empty_caches(cache: CacheSpec) -> list[tuple[Tensor, Tensor]]:
    """Stand-ins for the KV tensors, before their number of blocks is known."""
    shapes = [((1, cache.block_size, layer.num_kv_heads), layer) for layer in cache.layers]
    return [
        (
            torch.empty(*shape, layer.head_dim, dtype=layer.dtype),
            torch.empty(*shape, layer.value_dim, dtype=layer.dtype),
        )
        for shape, layer in shapes
    ]
