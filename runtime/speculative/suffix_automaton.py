"""The suffix automaton of a growing text: which end of it has occurred before, and where. Imports no torch.

Each state stands for all substrings that end at the same places; its link leads to the state of their longest suffix that ends at
further places, too. The state of the whole text has all suffixes of it that occurred only once, so its link has the longest
suffix that has occurred before:

    text   a b c x a b c        whole text -- link --> {a b c, b c, c}: ends at 3 and 7

Appending a token takes amortised constant time (Blumer et al. 1985, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable


class SuffixAutomaton:
    """The automaton of the tokens appended so far; state 0 is the empty string."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._end: list[int] = [0]
        self._last = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_tokens

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens."""
        for token in tokens:
            self._append(token)

    def repeated(self) -> tuple[int, int]:
        """(length of the longest end of the text that has occurred before, where it ended then); (0, 0) if nothing has.

        The place is that of an earlier occurrence, a late one as a rule: the text behind it begins there.
        """
        state = self._link[self._last]
        if state <= 0:
            return 0, 0
        return self._length[state], self._end[state]

    def _append(self, token: int) -> None:
        """One more token. Before it is added, the place of the repeated end so far becomes its latest occurrence."""
        if self._num_tokens:
            repeated = self._link[self._last]
            if repeated > 0:
                self._end[repeated] = self._num_tokens
        self._num_tokens += 1
        new = self._add(self._length[self._last] + 1, self._num_tokens, {}, 0)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state >= 0:
            target = self._next[state][token]
            if self._length[target] != self._length[state] + 1:
                target = self._split(state, token, target)
            self._link[new] = target
        self._last = new

    def _add(self, length: int, end: int, transitions: dict[int, int], link: int) -> int:
        self._next.append(transitions)
        self._length.append(length)
        self._end.append(end)
        self._link.append(link)
        return len(self._link) - 1

    def _split(self, state: int, token: int, target: int) -> int:
        """A state of its own for the shorter strings of `target`, which now end at a further place."""
        length = self._length[state] + 1
        clone = self._add(length, self._end[target], dict(self._next[target]), self._link[target])
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        self._link[target] = clone
        return clone
