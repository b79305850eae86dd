"""Moves keys and values between slots of a paged cache: those of a token tree's accepted branch go where its text goes on.

    slots of a step   | n  n+1  n+2  n+3  n+4 |
    rows of the tree  | 0   a    b    c    d  |

Where a and d are accepted, slot n+4 is copied to n+2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SlotCopier:
    """Copies slots in all layers of a cache group.

    caches: (k, v) of each layer, [blocks, block size, KV, D] and [blocks, block size, KV, Dv], contiguous, of one block size and
    number of blocks; they are kept, not copied.
    """

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._slots = [cache.flatten(0, 1) for pair in caches for cache in pair]
        self._table: Tensor | None = None
        """On CUDA, see `triton/copy_slots.py`."""

    def copy(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies slot sources[i] to slot destinations[i], all at once: what is read is what was there before.

        On CUDA two launches on the current stream, whatever the number of layers; the host does not wait.

        Raises ValueError for lists that differ in length, slots outside the cache, or a destination that occurs twice.
        """
        self._check(sources, destinations)
        if not sources or not self._slots:
            return
        moves = torch.tensor([list(sources), list(destinations)], dtype=torch.int64)
        if self._slots[0].device.type == "cuda":
            self._copy_on_cuda(moves)
            return
        for slots in self._slots:
            rows = slots.view(torch.uint8) if slots.dtype.itemsize == 1 else slots
            rows[moves[1]] = rows[moves[0]]

    def _copy_on_cuda(self, moves: Tensor) -> None:
        from . import triton

        device = self._slots[0].device
        if self._table is None:
            self._table = triton.slot_table(self._slots)
        triton.copy_slots(self._slots, self._table, moves.pin_memory().to(device, non_blocking=True))

    def _check(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        if len(sources) != len(destinations) or len(set(destinations)) != len(destinations):
            raise ValueError(
                f"copy_slots: sources {list(sources)} and destinations {list(destinations)}; needed: as many of each, and "
                "every destination once"
            )
        num_slots = self._slots[0].shape[0] if self._slots else 0
        for slot in (*sources, *destinations):
            if not 0 <= slot < num_slots:
                raise ValueError(f"copy_slots: slot {slot}; allowed: 0..{num_slots - 1}")
