"""What steps cost, measured: the time of a step by its tokens and by how deep its drafts are. Imports no torch.

    seconds[depth][bucket of tokens]      the lower quartile of the last few steps of that kind, prompts excluded

The first steps of a kind are left out: kernels are compiled and graphs captured in them.

A kind of step that has not been measured costs at least what a smaller one does. Once three kinds with drafts are known, so are a
step's cost, a token's and that of a draft's depth, by least squares; a little less than their sum is expected of the other kinds.
That is hopeful, so what might pay is tried, and a few steps later it is known; what cannot pay is not tried.

Load changes, and some times are unlucky. A kind that is not among many steps with drafts is expected to be faster little by little,
until it is tried again; each time that its time is confirmed, that takes twice as many steps. And no step is taken to be slower
than a larger and deeper one.
"""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

_WINDOW = 8
"""Steps of a kind that its estimate is made of."""
_FIRST = 2
"""Steps of a kind that are left out at its beginning."""
KNOWN_FROM = 4
"""Steps of a kind from which it counts as measured. One is not enough: a draft model may have had to catch up in it."""
_FITTED_FROM = 3
"""Kinds with drafts from which others are predicted."""
_LASTING, _LASTING_MOST = 16, 4096
"""Steps with drafts after which a kind that is not among them is expected to be faster, at first and after many confirmations."""
_FADED = 0.8
"""By how much."""
_HOPE = 0.95
"""Share of a prediction that is expected."""


def token_bucket(num_tokens: int) -> int:
    """The kind of a step of so many tokens: exact up to 16, then two kinds per power of two, as graphs of verifications are
    captured (24, 32, 48, 64, 96, 128 ...)."""
    if num_tokens <= 16:
        return num_tokens
    step = 1 << ((num_tokens - 1).bit_length() - 2)
    return -(-num_tokens // step) * step


class StepCosts:
    """Measured step times in seconds; depth 0 are steps without drafts."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._counts: Counter[tuple[int, int]] = Counter()
        self._estimates: dict[tuple[int, int], float] = {}
        self._before: dict[tuple[int, int], float] = {}
        """Estimates of kinds that are measured again."""
        self._num_drafting = 0
        self._last: dict[tuple[int, int], int] = {}
        """By kind: which of the steps with drafts was the last of it, or that at which its estimate faded."""
        self._lasting: dict[tuple[int, int], int] = {}
        self._faded: dict[tuple[int, int], float] = {}
        """Estimates as they were measured, of kinds whose have faded since."""
        self._plane: tuple[float, float, float] | None = None
        self._is_fitted = True
        """Whether `_plane` is that of the estimates, those of steps that are measured again included."""

    def observe(self, num_tokens: int, depth: int, seconds: float) -> bool:
        """Takes in a step of decodes and verifications; `depth` is the most drafts of any request in it.

        False: it is one of the first of its kind, which do not count.
        """
        key = (depth, token_bucket(num_tokens))
        self._counts[key] += 1
        if depth:
            self._num_drafting += 1
            self._last[key] = self._num_drafting
            if self._num_drafting % _LASTING == 0:
                self._fade()
        if self._counts[key] <= _FIRST:
            return False
        samples = self._samples.setdefault(key, deque(maxlen=_WINDOW))
        samples.append(seconds)
        if len(samples) >= KNOWN_FROM - _FIRST:
            before, found = self._before.pop(key, None), sorted(samples)[len(samples) // 4]
            if before is not None and found < before:
                self._speed_up(found / before)
            measured = self._faded.pop(key, None)
            if measured is not None:
                confirmed = found > _FADED * measured
                self._lasting[key] = min(2 * self._lasting.get(key, _LASTING), _LASTING_MOST) if confirmed else _LASTING
            self._estimates[key] = found
            self._is_fitted = False
            if depth:
                self._cap(key, found)
        return True

    def _cap(self, key: tuple[int, int], seconds: float) -> None:
        """Smaller steps with drafts take no longer than a larger one: what says so was measured at a bad moment."""
        for smaller in [k for k, s in self._estimates.items() if s > seconds and 0 < k[0] <= key[0] and k[1] <= key[1]]:
            self._estimates[smaller] = seconds
            self._samples.pop(smaller, None)

    def _fade(self) -> None:
        """Kinds with drafts that have not come for long are expected to be faster, down to a step without drafts."""
        least = min((seconds for (depth, _), seconds in self._estimates.items() if not depth), default=0.0)
        for key, seconds in self._estimates.items():
            if key[0] and self._num_drafting - self._last[key] >= self._lasting.get(key, _LASTING):
                self._faded.setdefault(key, seconds)
                self._samples.pop(key, None)
                self._estimates[key] = min(seconds, max(_FADED * seconds, least))
                self._last[key] = self._num_drafting
                self._is_fitted = False

    def measure_again(self, num_tokens: int, depth: int) -> None:
        """Forgets the times of a kind of step, since load changes.

        If it turns out faster, other kinds with drafts are expected to be faster by the same factor.
        """
        key = (depth, token_bucket(num_tokens))
        self._fitted_plane()  # what is known now counts until the kind is known again
        self._samples.pop(key, None)
        before = self._estimates.pop(key, None)
        if before is not None:
            self._before[key] = before

    def _speed_up(self, share: float) -> None:
        """All kinds with drafts take that share of their time."""
        for key in [key for key in self._estimates if key[0]]:
            self._estimates[key] *= share
            if key in self._samples:
                self._samples[key] = deque((share * s for s in self._samples[key]), maxlen=_WINDOW)

    def mean(self, num_requests: int) -> float | None:
        """Mean seconds of the last few steps without drafts of so many requests: what is lost is counted, not predicted. Where
        there were none, as `estimate`."""
        samples = self._samples.get((0, token_bucket(num_requests)))
        return sum(samples) / len(samples) if samples else self.estimate(num_requests, 0)

    def estimate(self, num_tokens: int, depth: int) -> float | None:
        """Seconds of a step; None while nothing like it or smaller is known."""
        bucket = token_bucket(num_tokens)
        known = self._estimates.get((depth, bucket))
        if known is not None:
            return known
        smaller = [s for (d, b), s in self._estimates.items() if d <= depth and b <= bucket]
        plane = self._fitted_plane() if depth and smaller else None
        if plane is not None:
            step, token, level = plane
            smaller.append(_HOPE * (step + token * bucket + level * depth))
        return max(smaller, default=None)

    def _fitted_plane(self) -> tuple[float, float, float] | None:
        """Seconds of a step with drafts, of each of its tokens, and of each step of depth; fitted where somebody asks."""
        if not self._is_fitted:
            self._plane = fit_plane({key: s for key, s in self._estimates.items() if key[0]})
            self._is_fitted = True
        return self._plane

    def is_known(self, num_tokens: int, depth: int) -> bool:
        """Whether this kind of step has been measured."""
        return (depth, token_bucket(num_tokens)) in self._estimates

    def table(self) -> dict[tuple[int, int], float]:
        """(depth, bucket of tokens) -> seconds, of what has been measured."""
        return dict(self._estimates)


def fit_plane(seconds: dict[tuple[int, int], float]) -> tuple[float, float, float] | None:
    """(a, b, c) >= 0 of seconds = a + b tokens + c depth, relative errors' least squares; None for less than three kinds.

    seconds: by (depth, tokens).
    """
    if len(seconds) < _FITTED_FROM:
        return None
    kinds = np.array([(1.0, tokens, depth) for depth, tokens in seconds])
    times = np.array(list(seconds.values()))
    used = [0, 1, 2]
    while used:
        found, *_ = np.linalg.lstsq(kinds[:, used] / times[:, None], np.ones(len(times)), rcond=None)
        if (found >= 0).all():
            plane = np.zeros(3)
            plane[used] = found
            return float(plane[0]), float(plane[1]), float(plane[2])
        used.remove(used[int(found.argmin())])
    return None
