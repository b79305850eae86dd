"""What steps cost, measured: the time of a step by its tokens and by how deep its drafts are. Imports no torch.

    seconds[depth][bucket of tokens]      the lower quartile of the last few steps of that kind, prompts excluded

The first steps of a kind are left out: kernels are compiled and graphs captured in them.

A kind of step that has not been measured costs, as far as anybody knows, what a smaller one does. That is hopeful, so it is tried,
and a few steps later it is known.
"""

from __future__ import annotations

from collections import Counter, deque

_WINDOW = 8
"""Steps of a kind that its estimate is made of."""
_FIRST = 2
"""Steps of a kind that are left out at its beginning."""
KNOWN_FROM = 4
"""Steps of a kind from which it counts as measured. One is not enough: a draft model may have had to catch up in it."""


def token_bucket(num_tokens: int) -> int:
    """The kind of a step of so many tokens: exact up to 16, then four kinds per power of two."""
    if num_tokens <= 16:
        return num_tokens
    step = 1 << max(0, num_tokens.bit_length() - 3)
    return -(-num_tokens // step) * step


class StepCosts:
    """Measured step times in seconds; depth 0 are steps without drafts."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._counts: Counter[tuple[int, int]] = Counter()
        self._estimates: dict[tuple[int, int], float] = {}

    def observe(self, num_tokens: int, depth: int, seconds: float) -> None:
        """Takes in a step of decodes and verifications; `depth` is the most drafts of any request in it."""
        key = (depth, token_bucket(num_tokens))
        self._counts[key] += 1
        if self._counts[key] <= _FIRST:
            return
        samples = self._samples.setdefault(key, deque(maxlen=_WINDOW))
        samples.append(seconds)
        if len(samples) >= KNOWN_FROM - _FIRST:
            self._estimates[key] = sorted(samples)[len(samples) // 4]

    def forget_drafts(self) -> None:
        """Forgets the times of steps with drafts: load and lengths have changed since, and they are to be tried again."""
        for times in (self._samples, self._estimates):
            for key in [key for key in times if key[0]]:
                del times[key]

    def estimate(self, num_tokens: int, depth: int) -> float | None:
        """Seconds of a step; None while nothing like it or smaller is known."""
        bucket = token_bucket(num_tokens)
        known = self._estimates.get((depth, bucket))
        if known is not None:
            return known
        smaller = [s for (d, b), s in self._estimates.items() if d <= depth and b <= bucket]
        return max(smaller, default=None)

    def is_known(self, num_tokens: int, depth: int) -> bool:
        """Whether this kind of step has been measured."""
        return (depth, token_bucket(num_tokens)) in self._estimates

    def table(self) -> dict[tuple[int, int], float]:
        """(depth, bucket of tokens) -> seconds, of what has been measured."""
        return dict(self._estimates)
