"""Where the keys and values of an accepted branch go: to the slots of the positions that its tokens have in the text.

    rows of the step     | last | a | b | c | d |        tree: a, b after the last token, c after a, d after b
    slots of positions   |  n   |n+1|n+2|n+3|n+4|
    accepted: b, d       | last | b | d |                slot n+2 -> n+1, n+4 -> n+2

What is left behind in the other slots is overwritten by the next steps, like the keys and values of rejected chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SlotMoves:
    """The moves of a step, collected for all requests and launched at once.

    engine: whose cache it is; it has `block_size` and `copy_slots`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._slots: dict[int, tuple[list[int], list[int]]] = {}
        """Cache group -> (from, to)."""

    def add(self, block_ids: Sequence[Sequence[int]], first: int, nodes: Sequence[int]) -> None:
        """Takes in a request's accepted drafts.

        block_ids: its blocks in each cache group, below 0 what a window has left. first: the position of draft 0. nodes: the
        numbers of the accepted drafts, ascending.
        """
        moved = [(first + node, first + place) for place, node in enumerate(nodes) if node != place]
        if not moved:
            return
        size = self._engine.block_size
        for group, blocks in enumerate(block_ids):
            sources, destinations = self._slots.setdefault(group, ([], []))
            for source, destination in moved:
                if min(blocks[source // size], blocks[destination // size]) >= 0:
                    sources.append(blocks[source // size] * size + source % size)
                    destinations.append(blocks[destination // size] * size + destination % size)

    def launch(self) -> None:
        """Puts the copies behind the step that made the keys and values, in front of whatever is launched later."""
        for group, (sources, destinations) in self._slots.items():
            self._engine.copy_slots(group, sources, destinations)
