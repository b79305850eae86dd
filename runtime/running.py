"""The running requests and, in arrays beside them, what changes of them in every step. Imports no torch.

    index       0     1     2     3
    requests    a     b     c     d        by arrival
    next        17    40    9     0        the position that is computed next; launched steps are counted in
    planned     1     1     1     4        tokens of the newest plan, until advance() counts them in
    due         32    40    64    0        `next` at which somebody has to look at the request
    decoding    yes   yes   yes   no       its prompt is computed: it takes a token in every step

Here b needs a look (a block is full, say) and so does d, whose prompt is under way; a and c cost no more than their share
of a few array operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .request import Request, RequestStatus

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

ALWAYS = 0
"""`due` of a request that is looked at in every step."""


class RunningSet:
    """At most `capacity` requests by arrival; see the module for the arrays. Those are written by the scheduler."""

    def __init__(self, capacity: int) -> None:
        self.requests: list[Request] = []
        self.next: Ints = np.zeros(capacity, dtype=np.int64)
        self.planned: Ints = np.zeros(capacity, dtype=np.int64)
        self.due: Ints = np.zeros(capacity, dtype=np.int64)
        self.decoding: Flags = np.zeros(capacity, dtype=np.bool_)
        self.limit: Ints = np.zeros(capacity, dtype=np.int64)
        """Most tokens of prompt and output."""
        self._places: dict[Request, int] = {}
        """Of the running requests; empty where nobody has asked since they changed."""
        self._decodes: tuple[Request, ...] | None = None
        self._last: Flags = np.zeros(0, dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def index(self, request: Request) -> int:
        """The index of a running request."""
        if not self._places:
            self._places = {running: index for index, running in enumerate(self.requests)}
        return self._places[request]

    def append(self, request: Request) -> int:
        """Adds the latest arrival, at the beginning of its prompt, and returns its index."""
        self._places = {}
        index = len(self.requests)
        self.requests.append(request)
        self.next[index] = request.num_computed_tokens
        self.planned[index] = 0
        self.due[index] = ALWAYS
        self.decoding[index] = False
        self.limit[index] = request.max_total_tokens
        return index

    def pop(self) -> Request:
        """Takes the latest arrival out."""
        self._decodes, self._places = None, {}
        return self.requests.pop()

    def keep_running(self) -> None:
        """Takes out all requests whose status is not RUNNING any more."""
        running = RequestStatus.RUNNING
        gone = [index for index, request in enumerate(self.requests) if request.status is not running]
        if not gone:
            return
        old = len(self.requests)
        for index in reversed(gone):
            del self.requests[index]
        kept = np.delete(np.arange(old), gone)
        for array in (self.next, self.planned, self.due, self.decoding, self.limit):
            array[: len(kept)] = array[kept]
        self._decodes, self._places = None, {}

    def wanting_a_look(self) -> list[int]:
        """Indices of the requests that somebody has to look at, ascending."""
        n = len(self.requests)
        found: list[int] = np.flatnonzero(self.next[:n] >= self.due[:n]).tolist()
        return found

    def advance(self) -> None:
        """Counts the newest plan's tokens as computed."""
        n = len(self.requests)
        self.next[:n] += self.planned[:n]
        self.planned[:n] = 0
        for request, computed in zip(self.requests, self.next[:n].tolist()):
            request.num_computed_tokens = computed

    def plan_decodes(self, chosen: Flags) -> tuple[tuple[Request, ...], Ints, Flags]:
        """Plans one token for each of the `chosen` ([n]).

        Returns the requests, the positions [D], and whether the token that comes out is the last one by length [D].
        The same tuple is returned for as long as it holds the same requests.
        """
        n = len(chosen)
        self.planned[:n][chosen] = 1
        starts = self.next[:n][chosen]
        if not len(starts):
            return (), starts, np.zeros(0, dtype=np.bool_)
        decodes = self._decodes
        if decodes is None or len(decodes) != len(starts) or not np.array_equal(chosen[: len(self._last)], self._last):
            decodes = self._decodes = tuple([self.requests[i] for i in np.flatnonzero(chosen).tolist()])
            self._last = np.trim_zeros(chosen, "b")
        return decodes, starts, starts + 2 >= self.limit[:n][chosen]
