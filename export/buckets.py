"""Buckets: the token counts for which engines of fixed size are built and CUDA graphs are captured.

A step of T tokens runs in the smallest bucket that holds them. Decode steps are dense at the low end, where each size has its
own best kernels; above, a step is at most half as large again as its tokens.

    1 2 4 8 16 32 48 64 96 128 192 256 ... max_sequences     decode: one token a sequence, captured
    512 768 1024 1536 2048 3072 4096 ... max_batch_tokens    chunks of prompts among them
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .segment import Segment
from .targets.base import Bound, Lowered, LoweringError

_SMALL = (1, 2, 4, 8, 16)


def default_buckets(max_batch_tokens: int, max_sequences: int) -> tuple[int, ...]:
    """Ascending token counts; `max_sequences` and `max_batch_tokens` are among them."""
    sizes = {size for size in _SMALL if size < max_batch_tokens}
    size = 32
    while size < max_batch_tokens:
        sizes.update(s for s in (size, size + size // 2) if s < max_batch_tokens)
        size *= 2
    return tuple(sorted(sizes | {min(max_sequences, max_batch_tokens), max_batch_tokens}))


def engine_sizes(buckets: Sequence[int]) -> tuple[int, ...]:
    """Those of the buckets that engines of fixed size are built for: powers of two below 512, and all above.

    Between powers of two TensorRT has no good kernels for few rows: on an H200 a layer of Llama-3.1-8B takes 0.23 ms at 96
    rows and 0.18 at 128, 0.44 at 384 and 0.36 at 512. The largest bucket is always among them.
    """
    return tuple(size for size in buckets if size >= 512 or size & (size - 1) == 0 or size == buckets[-1])


def bucket_of(buckets: Sequence[int], count: int) -> int:
    """The smallest bucket that holds `count`. Raises ValueError if none does."""
    index = bisect_left(buckets, count)
    if index == len(buckets):
        raise ValueError(f"a step of {count} tokens; the engine was built for at most {buckets[-1] if buckets else 0}")
    return buckets[index]


def captured_sizes(buckets: Sequence[int], max_sequences: int) -> list[int]:
    """The buckets that decode steps of up to `max_sequences` sequences run in."""
    return [size for size in buckets if size <= bucket_of(buckets, max_sequences)]


class StepShape(NamedTuple):
    """The shape of a captured step."""

    tokens: int
    """Rows of tokens, padding and all."""
    sequences: int
    rows: int
    """Rows whose logits are computed."""
    decode: bool
    """Whether every sequence has one row."""
    query_len: int = 0
    """Of a step that verifies drafts: most rows of a sequence; 0 for all others."""
    trees: bool = False
    """Whether it verifies token trees."""

    def __str__(self) -> str:
        kind = "decode" if self.decode else "mixed"
        if self.query_len:
            kind = "tree verification" if self.trees else "verification"
        return f"a {kind} step of {self.tokens} tokens, {self.sequences} sequences, {self.rows} rows of logits"


def decode_sizes(buckets: Sequence[int], max_sequences: int) -> list[int]:
    """Numbers of sequences that decode steps are captured for: `captured_sizes`, and multiples of 128 from 256 on, from where on
    a step's time follows its rows."""
    captured = captured_sizes(buckets, max_sequences)
    return sorted({*captured, *range(256, captured[-1], 128)})


def mixed_sizes(max_batch_tokens: int) -> list[int]:
    """Numbers of tokens that mixed steps are captured for: at most an eighth of a step, or 64 rows, is padding."""
    sizes = {
        *range(64, 1025, 64),
        *range(1152, 2049, 128),
        *range(2304, 4097, 256),
        *range(4608, max_batch_tokens, 512),
    }
    return sorted({size for size in sizes if size < max_batch_tokens} | {max_batch_tokens})


MIXED_GRAPHS = 32
"""Most shapes of mixed steps that are captured; the rest are launched piece by piece. A service meets fewer as a rule."""


VERIFY_QUERY_LEN = 33
"""Most rows of a sequence in a step that verifies drafts: the last known token and 32 of them."""
TREE_QUERY_LEN = 64
"""As VERIFY_QUERY_LEN, of token trees: as many rows as a mask has bits."""
VERIFY_GRAPHS = 48
"""Most shapes of such steps that are captured."""
VERIFY_SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows of tokens in them, all sequences together; larger ones are launched piece by piece."""


def verify_shape(
    num_tokens: int,
    num_sequences: int,
    query_len: int,
    max_sequences: int,
    max_batch_tokens: int,
    *,
    trees: bool = False,
) -> StepShape | None:
    """The shape that a step which verifies drafts is captured in, with the logits of all rows; None for too large a one."""
    longest = next((most for most in (8, VERIFY_QUERY_LEN, TREE_QUERY_LEN) if query_len <= most), TREE_QUERY_LEN + 1)
    if num_tokens > VERIFY_SIZES[-1] or longest > (TREE_QUERY_LEN if trees else VERIFY_QUERY_LEN):
        return None
    sequences = min(1 << (num_sequences - 1).bit_length(), max_sequences)
    tokens = min(bucket_of(VERIFY_SIZES, max(num_tokens, sequences)), max_batch_tokens)
    return StepShape(tokens, sequences, tokens, False, min(tokens, longest), trees)


def row_sizes(max_sequences: int) -> list[int]:
    """Numbers of sequences, and of rows of logits, in captured mixed steps."""
    return sorted({size for size in (8, 64, 256, 512, 1024) if size < max_sequences} | {max_sequences})


def varying_sizes(segment: Segment) -> set[str]:
    """The symbols of the sizes that vary in a segment's inputs: T, R, or an expression of them."""
    return {size for entry in segment.placeholders for size in entry["shape"] if isinstance(size, str)}


def varying_size(segment: Segment) -> str | None:
    """The symbol of the one size that varies in a segment (T or R), None where none does.

    Raises LoweringError for a segment in which several vary: it has no engine of fixed size.
    """
    names = varying_sizes(segment)
    if len(names) > 1:
        raise LoweringError(f"segment {segment.id} has several varying sizes ({', '.join(sorted(names))})")
    return names.pop() if names else None


class Bucketed:
    """A segment with engines for some fixed sizes, opened when they are first needed, and maybe one for any other size.

    fixed: size -> a function that opens the engine. varying: the engine for all other sizes, or None.
    """

    def __init__(self, segment: Segment, fixed: Mapping[int, Callable[[], Lowered]], varying: Lowered | None) -> None:
        self.segment = segment
        self._openers = dict(fixed)
        self._opened: dict[int, Lowered] = {}
        self._varying = varying
        self._input, self._axis = next(
            (
                (index, axis)
                for index, entry in enumerate(segment.placeholders[: segment.num_inputs])
                for axis, size in enumerate(entry["shape"])
                if isinstance(size, str)
            ),
            (0, 0),
        )

    def open(self, size: int) -> Lowered | None:
        """The engine for a size."""
        if size in self._openers and size not in self._opened:
            self._opened[size] = self._openers[size]()
        return self._opened.get(size, self._varying)

    def is_fixed(self, size: int) -> bool:
        """Whether inputs must have exactly this size, because the engine for it takes no other."""
        return size in self._openers

    @property
    def takes_any(self) -> bool:
        """Whether sizes without an engine of their own run, too."""
        return self._varying is not None

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        """The segment with weights; a size that no engine takes raises LoweringError when it is called."""
        bounds: dict[int, Bound] = {}
        varying: list[Bound] = []
        index, axis = self._input, self._axis

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            size = inputs[index].shape[axis]
            if size in bounds:
                return bounds[size](*inputs)
            lowered = self.open(size)
            if lowered is None:
                raise LoweringError(
                    f"segment {self.segment.id} has no engine for {size} tokens, only for {sorted(self._openers)}"
                )
            if self.is_fixed(size):
                bounds[size] = lowered.bind(weights)
                return bounds[size](*inputs)
            if not varying:
                varying.append(lowered.bind(weights))
            return varying[0](*inputs)

        return call
