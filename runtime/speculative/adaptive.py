"""How many drafts each request gets in a step: those that make the step yield the most tokens per second. Imports no torch.

Draft i of request r becomes output with probability a_r^(i+1), a_r being the request's measured acceptance. Sorted by that, the
best n drafts of a step are the first n, so for every depth and every n

    tokens per second = (requests + sum of the first n probabilities) / time of a step of (requests + n) tokens, measured

and the best wins (cf. Liu et al. 2024, "goodput"). Where no draft pays there are none, and nobody asks for a while. What is not
done is not measured either, and load changes, so it is tried again: drafts after a number of rests that doubles each time in vain
(one each, unless drafts would not pay even if all were accepted), a step without drafts now and then. What all that may cost is
bounded by an account (account.py).

    rests -> promising -> choose -> (the step) -> observe          each once per step, in this order, as far as it comes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from .account import DraftAccount
from .cost import StepCosts, token_bucket

DECAY = 0.95
"""How much of a request's counts is kept from one verification to the next: some twenty are remembered."""
PRIOR_WEIGHT = 2.0
"""Drafts that the acceptance of all requests counts as in a request's own."""
FIRST_GUESS = 0.7
"""Acceptance before anything is known."""
REST = 16
"""Steps that nobody is drafted for once drafts do not pay, until the question is asked again."""
PROBE_AFTER, PROBE_AFTER_MOST = 4, 128
"""Rests after which drafts are tried again, at first and after many attempts in vain."""
PLAIN_EVERY = 128
"""Steps with drafts after which there is one without."""
_FEW = 32
"""Chances that are quicker sorted one by one than as an array."""
MIN_GAIN = 1.05
"""Drafts have to promise that much more tokens per second than none: estimates are noisy, and steps without drafts overlap with the
host's work."""


@dataclass(slots=True)
class Acceptance:
    """Decayed counts of drafts whose predecessors were accepted, and of those accepted themselves."""

    tried: float = 0.0
    accepted: float = 0.0

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """One verification."""
        self.tried = self.tried * DECAY + min(num_accepted + 1, num_drafts)
        self.accepted = self.accepted * DECAY + num_accepted

    def rate(self, prior: float) -> float:
        """Estimated probability that a draft is accepted, given those before it."""
        return (self.accepted + PRIOR_WEIGHT * prior) / (self.tried + PRIOR_WEIGHT)


class AdaptiveLengths:
    """Chooses draft lengths; not thread-safe.

    Args:
        num_draft_tokens: the most for one request.
        adaptive: False gives everybody the most.
    """

    def __init__(self, num_draft_tokens: int, *, adaptive: bool = True) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.adaptive = adaptive
        self.costs = StepCosts()
        self.account = DraftAccount()
        self._all = Acceptance()
        self._requests: dict[str, Acceptance] = {}
        self._num_rests = 0
        self._resting = 0
        self._probe_after = PROBE_AFTER
        self._num_drafted = 0
        self._gives = False
        """Whether the last step that asked got drafts."""

    @property
    def acceptance(self) -> float:
        """Estimated acceptance over all requests."""
        return self._all.rate(FIRST_GUESS)

    def acceptance_of(self, request_id: str) -> float:
        """Estimated acceptance of a request."""
        found = self._requests.get(request_id)
        return self.acceptance if found is None else found.rate(self.acceptance)

    def _rates(self, request_ids: Sequence[str]) -> npt.NDArray[np.float64]:
        """[S] `acceptance_of` each request."""
        prior, known = self.acceptance, self._requests
        return np.array([known[name].rate(prior) if name in known else prior for name in request_ids])

    def release(self, request_id: str) -> None:
        """Forgets a request."""
        self._requests.pop(request_id, None)

    def count(self, request_id: str, num_drafts: int, num_accepted: int) -> None:
        """Takes in what became of a request's drafts."""
        if num_drafts:
            self._all.count(num_drafts, num_accepted)
            self._requests.setdefault(request_id, Acceptance()).count(num_drafts, num_accepted)

    def observe(self, num_requests: int, num_new: int, num_tokens: int, depth: int, seconds: float) -> None:
        """Takes in a step of decodes and verifications.

        Args:
            num_requests: of the step. num_new: their new output tokens.
            num_tokens: rows of tokens that the step computed. depth: the most drafts of any request; -1: drafts were sought for in
                vain, 0: they were not sought for.
            seconds: what the step took.
        """
        is_first = depth >= 0 and not self.costs.observe(num_tokens, depth, seconds)
        if depth == 0:
            self.account.rest()
        elif (base_s := self.costs.mean(num_requests)) is not None:
            self.account.draft(num_new / num_requests, seconds, base_s, is_first=is_first)

    def rests(self) -> bool:
        """Whether drafts were found not to pay a few steps ago; called once per step."""
        self._resting = max(0, self._resting - 1)
        return self._resting > 0

    def promising(self, request_ids: Sequence[str], limits: Sequence[int], num_others: int, budget: int) -> bool:
        """Whether `choose` might give drafts, as far as is known while a step is in flight: without waiting for it.

        If not, nobody asks for a while. Arguments as those of `choose`.
        """
        if not self.adaptive or self._gives:
            return True
        base_s = self.costs.estimate(len(limits) + num_others, 0)
        if base_s is None:
            return False
        if self.account.allows:
            limits = [min(limit, self.num_draft_tokens) for limit in limits]
            if self._num_rests + 1 >= self._probe_after or any(
                self._best(request_ids, limits, num_others, budget, base_s)
            ):
                return True
        self._rest()
        return False

    def choose(self, request_ids: Sequence[str], limits: Sequence[int], num_others: int, budget: int) -> list[int]:
        """Drafts for each request, at most its limit, and at most `budget` in all.

        num_others: further tokens of the step, of requests that are not drafted for.
        """
        limits = [min(limit, self.num_draft_tokens) for limit in limits]
        if not self.adaptive:
            return _shared_out(limits, budget)
        lengths = self._choose(request_ids, limits, num_others, budget)
        self._gives = any(lengths)
        return lengths

    def _choose(self, request_ids: Sequence[str], limits: Sequence[int], num_others: int, budget: int) -> list[int]:
        nobody = [0] * len(limits)
        base_s = self.costs.estimate(len(limits) + num_others, 0)
        if base_s is None:  # steps without drafts have to be measured first
            return nobody
        if not self.account.allows:
            self._rest()
            return nobody
        lengths = self._best(request_ids, limits, num_others, budget, base_s)
        if any(lengths):
            self._num_rests = 0
            self._num_drafted += 1
            if self._num_drafted % PLAIN_EVERY == 0:
                return nobody
            if self._num_drafted > PLAIN_EVERY:
                self._probe_after = PROBE_AFTER  # it has paid for long
            return lengths
        self._rest()
        if self._num_rests < self._probe_after:
            return nobody
        self._num_rests = 0
        self._probe_after = min(2 * self._probe_after, PROBE_AFTER_MOST)
        tried = _shared_out([min(limit, 1) for limit in limits], budget)
        self.costs.measure_again(len(limits) + num_others + sum(tried), 1)
        if not self._could_pay(limits, num_others, base_s):
            return nobody
        self._resting = 0
        return tried

    def _rest(self) -> None:
        """Nobody is drafted for, and nobody asks for some steps."""
        self._num_drafted = 0
        self._num_rests += 1
        self._resting = REST

    def _best(
        self, request_ids: Sequence[str], limits: Sequence[int], num_others: int, budget: int, base_s: float
    ) -> list[int]:
        num_base = len(limits) + num_others
        rates = self._rates(request_ids)
        best_rate, best = num_base / base_s * MIN_GAIN, (0, 0)
        depths = np.arange(1, max(limits, default=0) + 1)
        chances = np.where(depths <= np.array(limits)[:, None], rates[:, None] ** depths, 0.0)
        for depth in depths.tolist():
            sums = _best_sums(chances[:, :depth], budget)
            for count in _counts_to_try(num_base, depth, len(sums)):
                seconds = self.costs.estimate(num_base + count, depth)
                assert seconds is not None, "a step without drafts is known, so something is known of all"
                rate = (num_base + sums[count - 1]) / seconds
                if rate > best_rate:
                    best_rate, best = rate, (depth, count)
        depth, count = best
        if not count:
            return [0] * len(limits)
        order = np.argsort(-chances[:, :depth], axis=None, kind="stable")[:count]
        # a request's chances fall with the position, so those chosen are its first
        found: list[int] = np.bincount(order // depth, minlength=len(limits)).tolist()
        return found

    def _could_pay(self, limits: Sequence[int], num_others: int, base_s: float) -> bool:
        """Whether some number of drafts would pay if all of them were accepted."""
        num_base = len(limits) + num_others
        for depth in range(1, max(limits, default=0) + 1):
            count = sum(min(limit, depth) for limit in limits)
            seconds = self.costs.estimate(num_base + count, depth)
            if seconds is not None and (num_base + count) / seconds > num_base / base_s * MIN_GAIN:
                return True
        return False


def _best_sums(chances: npt.NDArray[np.float64], most: int) -> Sequence[float]:
    """Sums of the one best, the two best ... of all chances above 0, at most of so many."""
    if chances.size <= _FEW:
        return list(accumulate(sorted([chance for chance in chances.ravel().tolist() if chance], reverse=True)[:most]))
    gains = np.sort(chances, axis=None)[::-1]
    sums: list[float] = np.cumsum(gains[gains > 0][:most]).tolist()
    return sums


def _counts_to_try(num_base: int, least: int, most: int) -> list[int]:
    """Numbers of drafts from `least` on that fill their kind of step (cost.token_bucket), and the most."""
    counts: list[int] = []
    count = least - 1
    while count < most:
        count = min(token_bucket(num_base + count + 1) - num_base, most)
        counts.append(count)
    return counts


def _shared_out(limits: Sequence[int], budget: int) -> list[int]:
    """As many as wanted, first come, first served."""
    lengths = []
    for limit in limits:
        lengths.append(min(limit, budget))
        budget -= lengths[-1]
    return lengths
