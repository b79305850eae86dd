"""Copies slots of many caches in two launches: all rows into a scratch buffer, and from there to their places.

    table    [N, 2] int64    of each of N caches its address, and the words of a slot
    scratch  [N, M, W]       M moves; W the words of the widest slot

One launch could overwrite what another of its programs has yet to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_moves"])
def copy_slots_kernel(
    table, moves, scratch, num_moves, scratch_row, WORD: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr
):
    # moves [2, M] int64: from, to. Program (move, cache): GATHER into its row of `scratch`, otherwise back.
    move, cache = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = tl.load(table + 2 * cache).to(tl.pointer_type(WORD))
    words = tl.load(table + 2 * cache + 1)
    slot = tl.load(moves + (move if GATHER else num_moves + move))
    kept = scratch + (cache * num_moves + move) * scratch_row
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < words
        if GATHER:
            tl.store(kept + at, tl.load(begin + slot * words + at, mask=inside), mask=inside)
        else:
            tl.store(begin + slot * words + at, tl.load(kept + at, mask=inside), mask=inside)


def _word(caches: Sequence[Tensor]) -> torch.dtype:
    """The widest integer that all slots consist of: 4 bytes or 1."""
    whole = all(_slot_bytes(cache) % 4 == 0 == cache.data_ptr() % 4 for cache in caches)
    return torch.int32 if whole else torch.int8


def _slot_bytes(cache: Tensor) -> int:
    return int(cache[0].numel()) * cache.element_size()


def slot_table(caches: Sequence[Tensor]) -> Tensor:
    """[N, 2] int64 on the caches' device; caches [slots, KV, D], contiguous, of any dtypes."""
    size = _word(caches).itemsize
    rows = [(cache.data_ptr(), _slot_bytes(cache) // size) for cache in caches]
    return torch.tensor(rows, dtype=torch.int64, device=caches[0].device)


def copy_slots(caches: Sequence[Tensor], table: Tensor, moves: Tensor) -> None:
    """In every cache, slot moves[0, i] to slot moves[1, i] for all i at once. table: of `slot_table`. moves [2, M] int64."""
    word, num_moves = _word(caches), moves.shape[1]
    width = max(_slot_bytes(cache) for cache in caches) // word.itemsize
    scratch = torch.empty((len(caches), num_moves, width), dtype=word, device=moves.device)
    for gather in (True, False):
        copy_slots_kernel[(num_moves, len(caches))](
            table, moves, scratch, num_moves, width, WORD=tl.int32 if word == torch.int32 else tl.int8, GATHER=gather,
            BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        )  # fmt: skip
