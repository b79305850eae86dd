"""Hidden states that wait for a draft layer: rows of a few tensors on the device, found by request and position.

    tensors    | zeros | step 1 ........ | step 2 ... |      one behind another, rows numbered through
    request a    positions 4 .. 7 -> rows 1 .. 4, 8 -> row 9

Row 0 is zero: what is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..packing import upload

_MOST_TENSORS = 16
"""Tensors from which the rows that are still needed are copied into one."""


@dataclass(slots=True)
class _Held:
    """Rows of one request, of positions that follow each other."""

    first: int
    rows: list[int] = field(default_factory=list)


class HiddenStore:
    """Rows [H] of float `dtype` on `device`."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._zero = torch.zeros(1, size, dtype=dtype, device=device)
        self._tensors = [self._zero]
        self._end = 1
        self._held: dict[str, _Held] = {}
        self.num_rows = 0
        """Rows that are held for requests."""

    def add(self, states_TH: torch.Tensor, items: Iterable[tuple[str, int, Sequence[int]]]) -> None:
        """Takes in a step's rows; items: (request id, position of its first row, its rows of `states_TH`).

        Rows that do not follow those held replace them: the request was computed again.
        """
        if len(self._tensors) >= _MOST_TENSORS:
            self._compact()
        for request_id, start, rows in items:
            held = self._held.get(request_id)
            if held is None or held.first + len(held.rows) != start:
                self.release(request_id)
                held = self._held[request_id] = _Held(start)
            held.rows += [self._end + row for row in rows]
            self.num_rows += len(rows)
        self._tensors.append(states_TH)
        self._end += states_TH.shape[0]

    def end(self, request_id: str) -> int:
        """The position behind the last that is held; 0 for none."""
        held = self._held.get(request_id)
        return 0 if held is None else held.first + len(held.rows)

    def gather(self, wanted: Iterable[tuple[str, int, int]]) -> torch.Tensor:
        """[N, H] of (request id, first position, number of positions) one behind another; zeros where nothing is held."""
        index: list[int] = []
        for request_id, start, count in wanted:
            held = self._held.get(request_id)
            if held is None:
                index += [0] * count
                continue
            at = start - held.first
            before = min(count, max(0, -at))
            found = held.rows[max(at, 0) : max(at + count, 0)]
            index += [0] * before + found + [0] * (count - before - len(found))
        return self._take(index)

    def drop(self, request_id: str, before: int) -> None:
        """Forgets a request's rows of positions in front of `before`."""
        held = self._held.get(request_id)
        if held is not None and before > held.first:
            dropped = min(before - held.first, len(held.rows))
            del held.rows[:dropped]
            held.first += dropped
            self.num_rows -= dropped

    def release(self, request_id: str) -> None:
        """Forgets a request."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self.num_rows -= len(held.rows)

    def _take(self, index: Sequence[int]) -> torch.Tensor:
        everything = self._tensors[0] if len(self._tensors) == 1 else torch.cat(self._tensors)
        return everything.index_select(0, upload(np.array(index, dtype=np.int64), everything.device))

    def _compact(self) -> None:
        index = [row for held in self._held.values() for row in held.rows]
        self._tensors = [self._zero, self._take(index)]
        at = 1
        for held in self._held.values():
            held.rows = list(range(at, at + len(held.rows)))
            at += len(held.rows)
        self._end = at
