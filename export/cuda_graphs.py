"""Steps as CUDA graphs: a step of one shape is captured once and replayed with new contents of the same input buffers.

A graph launches a whole step in one call, so a step costs the device's time instead of the host's. Two kinds of shapes:

    decode   S sequences with one row each         powers of two and the largest size are captured at the start, the sizes between
                                                   them when they have been needed often; until then the next larger one serves
    mixed    T rows of S sequences, R rows sampled captured when the same shape comes a second time; the first launch, piece by
                                                   piece, has compiled its kernels and opened its engines; at most MIXED_GRAPHS
    verify   as mixed, few rows, all of them sampled   likewise, but where a larger one is captured it serves until the shape has
                                                   been needed often; at most VERIFY_GRAPHS. Token trees have graphs of their
                                                   own, with a mask for each row

A step runs in the smallest shape that holds it. What it lacks has no rows and writes nothing:

    query_start  [0, q1, ..., T, T, ..., T]     seq_lens  [l0, ..., l(S-1), 0, ..., 0]     slot_mapping  [..., -1, -1]

All graphs share one memory pool, one buffer of logits and one of hidden states: they run one after another, on one stream.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .buckets import (
    MIXED_GRAPHS,
    VERIFY_GRAPHS,
    VERIFY_SIZES,
    StepShape,
    bucket_of,
    decode_sizes,
    mixed_sizes,
    row_sizes,
    verify_shape,
)
from .executor import StepContext
from .kernels.dispatch import compiling
from .kernels.errors import and_kernel_errors, reason_of
from .step_outputs import GraphPool, StepOutputs

if TYPE_CHECKING:
    from .execution import StepSizes

logger = logging.getLogger(__name__)

Launch = Callable[[Mapping[str, Tensor], StepContext], tuple[Tensor, list[Tensor]]]
"""Launches a step on the current stream: (plan inputs by name, metadata) -> logits [R, V] in the compute dtype, and hidden
states [1, T, H] in the order of the build's `hidden_layers`."""


_USES_BEFORE_CAPTURE = 8
"""Decode steps of a size between two captured ones that run in the larger, before that size gets a graph of its own."""
_VERIFICATIONS_BEFORE_CAPTURE = 32
"""Likewise, verifications that run in a larger one. A capture takes as long as some hundred steps, and shapes come and go: as
requests end, draft lengths change, and lengths are tried."""


class CaptureLimits(NamedTuple):
    """For which steps graphs are captured: the buckets of the build, and the most of everything in a step."""

    buckets: Sequence[int]
    max_batch_tokens: int
    max_sequences: int
    max_seq_len: int
    table_width: int
    """KV blocks of the longest sequence."""
    num_groups: int
    """Cache groups."""
    vocab_size: int
    hidden_input: int | None = None
    """Width of the hidden states that steps bring beside their tokens; None: none."""
    dtype: torch.dtype = torch.float32
    """Of these hidden states."""


class StepGraphs:
    """Captured steps.

    launch: a step; sizes: to what its numbers of rows are padded. pool: memory that is shared with other graphs of this stream.

    The logits that `run` returns are overwritten by the next step.
    """

    def __init__(
        self,
        launch: Launch,
        sizes: StepSizes,
        limits: CaptureLimits,
        device: torch.device,
        stream: torch.cuda.Stream,
        pool: GraphPool | None = None,
    ) -> None:
        self._launch, self._sizes, self._limits = launch, sizes, limits
        self._device, self._stream = device, stream
        self.decode_sizes = tuple(decode_sizes(limits.buckets, limits.max_sequences))
        self._mixed_sizes = mixed_sizes(limits.max_batch_tokens)
        self._row_sizes = row_sizes(limits.max_sequences)
        most = max(self.decode_sizes[-1], self._row_sizes[-1])
        rows = max(sizes.padded("T", max(self._mixed_sizes[-1], most)), sizes.padded("R", most))

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._tokens, self._positions = (zeros(rows, dtype=torch.int64) for _ in range(2))
        self._slots = [zeros(rows, dtype=torch.int64) for _ in range(limits.num_groups)]
        self._tables = [zeros(most, limits.table_width, dtype=torch.int32) for _ in range(limits.num_groups)]
        self._lens, self._starts = zeros(most, dtype=torch.int32), zeros(most + 1, dtype=torch.int32)
        self._sample_rows = zeros(sizes.padded("R", most), dtype=torch.int64)
        self._hidden_input: Tensor | None = None
        if limits.hidden_input is not None:
            self._hidden_input = zeros(rows, limits.hidden_input, dtype=limits.dtype)
        self._logits: Tensor | None = None
        self._hidden: Tensor | None = None
        """[T, L, H] of the largest step, where there are hidden states."""
        self._verify_rows: Tensor | None = None
        self._verify_logits: Tensor | None = None
        """As the two above, of steps that verify drafts: more rows, made when the first is captured."""
        self._tree_mask: Tensor | None = None
        """[T] int64 of steps that verify trees; likewise."""
        self._pool = pool or GraphPool()
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._uses: Counter[StepShape] = Counter()
        self.failures: dict[StepShape, str] = {}
        """Shapes that could not be captured, with the reason; their steps are launched piece by piece."""
        self._told_full = False
        self.num_bytes, self.seconds = 0, 0.0
        """What the captures took: device memory, and time."""

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """What has been captured."""
        return tuple(self._graphs)

    def capture_decodes(self) -> None:
        """Captures the largest step and decode steps, the largest first: the others find room in its memory."""
        largest = StepShape(self._mixed_sizes[-1], self._row_sizes[-1], self._row_sizes[-1], False)
        sizes = [size for size in self.decode_sizes if size & (size - 1) == 0 or size == self.decode_sizes[-1]]
        shapes = (largest, *(_decode(size) for size in reversed(sizes)))
        self._compile(shapes)
        for shape in shapes:
            self._capture(shape)
        torch.cuda.synchronize(self._device)
        logger.info(
            "%d steps captured in %.1f s, %.0f MB", len(self._graphs), self.seconds, self.num_bytes / 1e6
        )  # fmt: skip

    def shape_of(self, batch: Any) -> StepShape | None:
        """The shape that a runtime Batch runs in; None for one that is never captured (the logits of prompts)."""
        count, tokens, rows = batch.seq_lens.shape[0], batch.token_ids.shape[0], batch.sample_rows.shape[0]
        if batch.max_query_len == 1 and tokens == rows == count <= self.decode_sizes[-1]:
            return _decode(bucket_of(self.decode_sizes, count))
        if count > self._row_sizes[-1] or tokens > self._mixed_sizes[-1]:
            return None
        trees = batch.tree_mask is not None
        if rows > count or trees:
            most = self._row_sizes[-1], self._mixed_sizes[-1]
            return verify_shape(tokens, count, batch.max_query_len, *most, trees=trees)
        sequences = bucket_of(self._row_sizes, count)
        return StepShape(bucket_of(self._mixed_sizes, max(tokens, sequences)), sequences, sequences, False)

    def run(self, batch: Any) -> StepOutputs | None:
        """The results of a batch, replayed; None if no captured shape holds it yet: then the caller launches it."""
        shape = self._captured(batch)
        if shape is None:
            return None
        self._fill(batch, shape)
        self._graphs[shape].replay()
        _, logits = self._outputs(shape)
        assert logits is not None
        hidden = None if self._hidden is None else self._hidden[: batch.token_ids.shape[0]].clone()
        return StepOutputs(logits[: batch.sample_rows.shape[0]], hidden)

    def _captured(self, batch: Any) -> StepShape | None:
        """The shape with a graph that a batch runs in; captures one if it is time to."""
        shape = self.shape_of(batch)
        if shape is None or shape in self._graphs:
            return shape
        larger = self._larger(shape)
        if not shape.decode and self._is_full(shape):
            return larger
        self._uses[shape] += 1
        in_larger = _VERIFICATIONS_BEFORE_CAPTURE if shape.query_len else _USES_BEFORE_CAPTURE
        is_due = self._uses[shape] > (1 if larger is None else in_larger)
        if is_due and shape not in self.failures and self._capture(shape):
            return shape
        return larger

    def _larger(self, shape: StepShape) -> StepShape | None:
        """The smallest captured shape that holds a decode step or a verification; None for other steps."""
        if not (shape.decode or shape.query_len):
            return None
        return min(
            (
                other
                for other in self._graphs
                if (other.decode, other.trees) == (shape.decode, shape.trees)
                and bool(other.query_len) == bool(shape.query_len)
                and other.tokens >= shape.tokens
                and other.sequences >= shape.sequences
                and other.query_len >= shape.query_len
            ),
            default=None,
        )

    def _is_full(self, shape: StepShape) -> bool:
        """Whether no further step of the kind is captured; says so once."""
        most = VERIFY_GRAPHS if shape.query_len else MIXED_GRAPHS
        if sum(not s.decode and bool(s.query_len) == bool(shape.query_len) for s in self._graphs) < most:
            return False
        if not self._told_full:
            self._told_full = True
            logger.info("%d shapes of mixed steps are captured; further ones are launched piece by piece", most)
        return True

    def _outputs(self, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        """The buffers of a shape's sample rows and logits; the latter come with the first capture."""
        if not shape.query_len:
            return self._sample_rows, self._logits
        if self._verify_rows is None:
            most = self._mixed_sizes[-1]
            rows = max(self._sizes.padded("R", min(size, most)) for size in VERIFY_SIZES)
            self._verify_rows = torch.zeros(rows, dtype=torch.int64, device=self._device)
        if shape.trees and self._tree_mask is None:
            self._tree_mask = torch.zeros_like(self._tokens)
        return self._verify_rows, self._verify_logits

    # ---------------------------------------------------------------------------------------------------------- capture
    def _capture(self, shape: StepShape) -> bool:
        """Captures a step; False, with a warning and an entry in `failures`, if that fails."""
        start = time.perf_counter()
        torch.cuda.empty_cache()  # as a capture does: its own memory is what is missing afterwards
        before = torch.cuda.mem_get_info(self._device)[0]
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._record(shape, graph)
        except and_kernel_errors(RuntimeError) as error:  # of CUDA, or of a kernel that reads back or does not compile
            torch.cuda.set_stream(current)  # a capture that cannot be ended leaves its own
            self.failures[shape] = reason_of(error)
            logger.warning("%s is launched piece by piece, it cannot be captured: %s", shape, self.failures[shape])
            return False
        self._graphs[shape] = graph
        self.num_bytes += max(0, before - torch.cuda.mem_get_info(self._device)[0])
        self.seconds += time.perf_counter() - start
        return True

    @torch.inference_mode()
    def _compile(self, shapes: Sequence[StepShape]) -> None:
        """Compiles the attention kernels of steps, several at once; what fails here fails in its capture, and is said there."""
        start = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with compiling(self._device), torch.cuda.stream(self._stream):
                for shape in shapes:
                    self._launch(*self._inputs(shape))
        except and_kernel_errors(RuntimeError) as error:
            logger.debug("steps are compiled one by one: %s", reason_of(error))
        self._stream.synchronize()
        self.seconds += time.perf_counter() - start

    @torch.inference_mode()
    def _record(self, shape: StepShape, graph: torch.cuda.CUDAGraph) -> None:
        for slots in self._slots:
            slots.fill_(-1)
        sample_rows, _ = self._outputs(shape)
        masks = () if self._tree_mask is None else (self._tree_mask,)
        for metadata in (self._lens, self._starts, sample_rows, *masks):
            metadata.zero_()  # no sequence has rows: the trial run writes nothing
        values, context = self._inputs(shape)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            logits, states = self._launch(values, context)  # compiles kernels and opens engines, which a capture cannot
        self._stream.synchronize()
        if self._outputs(shape)[1] is None:
            made = logits.new_zeros(sample_rows.shape[0], logits.shape[1])
            if shape.query_len:
                self._verify_logits = made
            else:
                self._logits = made
        if self._hidden is None and states:
            self._hidden = states[0].new_zeros(self._tokens.shape[0], len(states), states[0].shape[-1])
        result = self._outputs(shape)[1]
        assert result is not None
        # thread_local: what other threads ask of CUDA meanwhile is no part of the capture, and does not end it
        with torch.cuda.graph(graph, pool=self._pool.handle(), stream=self._stream, capture_error_mode="thread_local"):
            logits, states = self._launch(values, context)
            result[: values["sample_rows"].shape[0]].copy_(logits)
            for number, state in enumerate(states):
                assert self._hidden is not None
                self._hidden[: state.shape[1], number].copy_(state[0])

    def _inputs(self, shape: StepShape) -> tuple[dict[str, Tensor], StepContext]:
        """The part of the buffers that a shape reads."""
        tokens, rows = self._sizes.padded("T", shape.tokens), self._sizes.padded("R", shape.rows)
        values = {
            "token_ids": self._tokens[None, :tokens],
            "positions": self._positions[None, :tokens],
            "sample_rows": self._outputs(shape)[0][:rows],
        }
        if self._hidden_input is not None:
            values["hidden"] = self._hidden_input[None, :tokens]
        context = StepContext(
            [(slots[:tokens], tables[: shape.sequences]) for slots, tables in zip(self._slots, self._tables)],
            self._starts[: shape.sequences + 1], self._lens[: shape.sequences],
            1 if shape.decode else shape.query_len or shape.tokens, self._limits.max_seq_len,
            self._tree_mask[:tokens] if shape.trees and self._tree_mask is not None else None,
        )  # fmt: skip
        return values, context

    # ------------------------------------------------------------------------------------------------------------ replay
    @torch.inference_mode()
    def _fill(self, batch: Any, shape: StepShape) -> None:
        """Copies a batch into the graphs' buffers."""
        count, tokens, rows = batch.seq_lens.shape[0], batch.token_ids.shape[0], batch.sample_rows.shape[0]
        sample_rows, _ = self._outputs(shape)
        into = [self._tokens[:tokens], self._positions[:tokens], sample_rows[:rows]]
        into += [slots[:tokens] for slots in self._slots]
        values = [batch.token_ids, batch.positions, batch.sample_rows, *(group.slot_mapping for group in batch.groups)]
        if shape.trees and self._tree_mask is not None:
            into.append(self._tree_mask[:tokens])
            values.append(batch.tree_mask)
        torch._foreach_copy_(into, values)
        torch._foreach_copy_([self._lens[:count], self._starts[: count + 1]], [batch.seq_lens, batch.query_start])
        if self._hidden_input is not None:
            self._hidden_input[:tokens].copy_(batch.hidden)
        for tables, group in zip(self._tables, batch.groups):
            tables[:count, : group.block_tables.shape[1]].copy_(group.block_tables)
        if count < shape.sequences:
            self._lens[count : shape.sequences].zero_()
            self._starts[count + 1 : shape.sequences + 1].fill_(tokens)
        padded = self._sizes.padded("T", shape.tokens)
        if tokens < padded:
            for slots in self._slots:
                slots[tokens:padded].fill_(-1)
            if shape.trees and self._tree_mask is not None:
                self._tree_mask[tokens:padded].zero_()
        padded = self._sizes.padded("R", shape.rows)
        if rows < padded:
            sample_rows[rows:padded].zero_()


def _decode(size: int) -> StepShape:
    return StepShape(size, size, size, True)
