"""What steps cost, measured: the time of a step by its tokens and by how deep its drafts are. Imports no torch.

    seconds[depth][bucket of tokens]      the median of the last few steps of that kind, prompts excluded

A kind of step that has not been measured costs, as far as anybody knows, what a smaller one does. That is hopeful, so it is tried,
and a few steps later it is known.
"""

from __future__ import annotations

from collections import deque
from statistics import median

_WINDOW = 7
"""Steps of a kind that its estimate is the median of."""
KNOWN_FROM = 3
"""Steps of a kind from which it counts as measured: a kernel is compiled, or a graph captured, in one of the first two."""


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
        self._medians: dict[tuple[int, int], float] = {}

    def observe(self, num_tokens: int, depth: int, seconds: float) -> None:
        """Takes in a step of decodes and verifications; `depth` is the most drafts of any request in it."""
        key = (depth, token_bucket(num_tokens))
        samples = self._samples.setdefault(key, deque(maxlen=_WINDOW))
        samples.append(seconds)
        if len(samples) >= KNOWN_FROM:
            self._medians[key] = median(samples)

    def estimate(self, num_tokens: int, depth: int) -> float | None:
        """Seconds of a step; None while nothing like it or smaller is known."""
        bucket = token_bucket(num_tokens)
        known = self._medians.get((depth, bucket))
        if known is not None:
            return known
        smaller = [s for (d, b), s in self._medians.items() if d <= depth and b <= bucket]
        return max(smaller, default=None)

    def is_known(self, num_tokens: int, depth: int) -> bool:
        """Whether this kind of step has been measured."""
        return (depth, token_bucket(num_tokens)) in self._medians

    def table(self) -> dict[tuple[int, int], float]:
        """(depth, bucket of tokens) -> seconds, of what has been measured."""
        return dict(self._medians)
