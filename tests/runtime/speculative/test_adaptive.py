"""Draft lengths from measured acceptance and step times; deterministic, with made-up times."""

import random
from collections import Counter

import pytest
from camshaft.runtime.speculative import cost
from camshaft.runtime.speculative.account import MOST, MOST_LOST, SHARE, DraftAccount
from camshaft.runtime.speculative.adaptive import PLAIN_EVERY, PROBE_AFTER, REST, Acceptance, AdaptiveLengths
from camshaft.runtime.speculative.cost import KNOWN_FROM, StepCosts, fit_plane, token_bucket


def measured(step_time, num_draft_tokens=5, rate=0.8, most_tokens=512):
    """Lengths after every kind of step has been measured: `step_time(tokens, depth)` seconds."""
    lengths = AdaptiveLengths(num_draft_tokens)
    for depth in range(num_draft_tokens + 1):
        for tokens in range(1, most_tokens):
            if token_bucket(tokens) == tokens:
                for _ in range(KNOWN_FROM):
                    lengths.costs.observe(tokens, depth, step_time(tokens, depth))
                lengths.costs._num_drafting = 0  # they have all been measured just now
    for _ in range(100):
        lengths.count("other", 10, round(10 * rate))
    return lengths


def memory_bound(tokens, depth):
    return 1.0


def compute_bound(tokens, depth):
    return float(tokens)


def test_buckets_are_fine_for_few_tokens():
    assert [token_bucket(n) for n in (1, 7, 16, 17, 24, 25, 33, 64, 65, 512, 513)] == [
        1, 7, 16, 24, 24, 32, 48, 64, 96, 512, 768,
    ]  # fmt: skip


def test_costs_are_usual_times_and_hopeful_where_nothing_is_known():
    costs = StepCosts()
    assert costs.estimate(8, 0) is None
    for seconds in (9.0, 8.0, 1.0, 1.0):  # the first two compiled something
        costs.observe(8, 0, seconds)
    assert costs.estimate(8, 0) == costs.estimate(32, 3) == 1.0 and costs.estimate(7, 0) is None
    assert costs.is_known(8, 0) and not costs.is_known(32, 3)
    for _ in range(KNOWN_FROM):
        costs.observe(16, 2, 3.0)
    assert (
        costs.estimate(32, 2) == 3.0 and costs.estimate(32, 1) == 1.0 and costs.table() == {(0, 8): 1.0, (2, 16): 3.0}
    )


def test_kinds_of_steps_are_predicted_from_three_others():
    def drafting(tokens, depth):
        return 3.0 + 0.01 * tokens + 0.8 * depth

    costs = StepCosts()
    for tokens, depth in ((64, 0), (96, 1), (128, 1), (128, 2)):
        for _ in range(KNOWN_FROM):
            costs.observe(tokens, depth, drafting(tokens, depth))
    for tokens, depth in ((192, 3), (384, 5)):
        assert 0.9 * drafting(tokens, depth) < costs.estimate(tokens, depth) < drafting(tokens, depth), "hopeful"


def test_the_prediction_is_fitted_where_somebody_asks(monkeypatch):
    fits = []
    monkeypatch.setattr(cost, "fit_plane", lambda seconds: fits.append(seconds) or fit_plane(seconds))
    costs = StepCosts()
    for tokens, depth in ((64, 0), (96, 1), (128, 1), (128, 2)):
        for _ in range(2 * KNOWN_FROM):
            costs.observe(tokens, depth, 1.0 + 0.01 * tokens)
    assert costs.estimate(128, 2) == pytest.approx(2.28) and not fits, "measured"
    predicted = costs.estimate(192, 3)
    assert costs.estimate(384, 3) > predicted and len(fits) == 1, "kept until there is something new"
    costs.measure_again(128, 2)
    assert costs.estimate(192, 3) == predicted and len(fits) == 1, "what is measured again counts until it is known"
    costs.observe(96, 1, 1.96)
    costs.estimate(192, 3)
    assert len(fits) == 2


def test_a_kind_that_became_faster_takes_the_others_along():
    costs = StepCosts()
    for tokens, depth in ((64, 0), (128, 1), (192, 2)):
        for _ in range(KNOWN_FROM):
            costs.observe(tokens, depth, 10.0 * depth + 2.0)
    costs.measure_again(128, 1)
    assert not costs.is_known(128, 1)
    for _ in range(KNOWN_FROM):
        costs.observe(128, 1, 6.0)
    assert costs.table() == {(0, 64): 2.0, (1, 128): 6.0, (2, 192): 11.0}


def test_a_kind_that_has_not_come_for_long_is_tried_again():
    costs = StepCosts()
    for _ in range(KNOWN_FROM):
        costs.observe(6, 5, 9.0)  # at a bad moment
    for _ in range(KNOWN_FROM):
        costs.observe(3, 2, 4.0)
    assert costs.estimate(6, 5) == 9.0
    before = costs.estimate(6, 5)
    for _ in range(100):
        costs.observe(3, 2, 4.0)
    assert costs.estimate(6, 5) < 0.4 * before, "faded"
    for _ in range(2):
        costs.observe(6, 5, 6.0)
    assert costs.estimate(6, 5) == 6.0
    for _ in range(2):  # each time that it is confirmed, it lasts longer
        lasted = 0
        while costs.estimate(6, 5) == 6.0:
            costs.observe(3, 2, 4.0)
            lasted += 1
        for _ in range(2):
            costs.observe(6, 5, 6.0)
    assert lasted > 16
    for _ in range(KNOWN_FROM):
        costs.observe(1, 0, 3.0)
    for _ in range(1000):
        costs.observe(3, 2, 4.0)
    assert costs.estimate(6, 5) == 3.0, "a step without drafts takes no longer"


def test_no_step_is_slower_than_a_larger_one():
    costs = StepCosts()
    for tokens, depth, seconds in ((1, 0, 8.0), (3, 2, 7.0), (9, 4, 9.0), (5, 4, 5.0)):
        for _ in range(KNOWN_FROM):
            costs.observe(tokens, depth, seconds)
    assert costs.table() == {(0, 1): 8.0, (2, 3): 5.0, (4, 9): 9.0, (4, 5): 5.0}
    for _ in range(2):
        costs.observe(3, 2, 4.0)
    assert costs.estimate(3, 2) == 4.0


def test_fitted_costs_never_fall_with_tokens_or_depth():
    assert fit_plane({(1, 8): 2.0, (2, 8): 1.9}) is None
    step, token, level = fit_plane({(1, 8): 2.0, (2, 8): 1.9, (1, 16): 1.8})
    assert token == level == 0.0 and step == pytest.approx(1.9, rel=0.02)


class Device:
    """A serving loop at 64 sequences on a device of made-up times: steps, seconds, and what plain decoding would have taken.

    step_s: (tokens, depth) -> seconds. acceptance: of each draft, given those before it.
    """

    WAIT_S, CAPTURE_S = 1e-3, 0.5

    def __init__(self, step_s, acceptance, num_requests=64):
        self.lengths = AdaptiveLengths(5)
        self.seconds = self.plain_seconds = 0.0
        self.num_asked = self.num_drafting = 0
        self._step_s, self._acceptance = step_s, acceptance
        self._names = [str(i) for i in range(num_requests)]
        self._rng, self._verifies = random.Random(0), False
        self._uses, self._captured = Counter(), set()

    def run(self, num_steps):
        for _ in range(num_steps):
            self.step()

    def step(self):
        names, seconds = self._names, 0.0
        group = (names, [5] * len(names), 0, 2048)
        chosen = [0] * len(names)
        asks = self._verifies or not self.lengths.rests() and self.lengths.promising(*group)
        if asks:  # the step in flight is waited for, so the device idles
            seconds += self.WAIT_S
            self.num_asked += 1
            chosen = self.lengths.choose(*group)
        tokens, depth = len(names) + sum(chosen), max(chosen)
        self.num_drafting += depth > 0
        seconds += self._step_s(tokens, depth)
        if depth:
            seconds += self._capture_s(token_bucket(tokens))
        self._verifies = depth > 0
        num_new = len(names)
        for name, drafts in zip(names, chosen):
            accepted = 0
            while accepted < drafts and self._rng.random() < self._acceptance:
                accepted += 1
            self.lengths.count(name, drafts, accepted)
            num_new += accepted
        self.lengths.observe(len(names), num_new, tokens, depth, seconds)
        self.seconds += seconds
        self.plain_seconds += self._step_s(len(names), 0) * num_new / len(names)

    def _capture_s(self, size):
        """A graph is captured when its shape comes a second time, or later where a larger one serves."""
        self._uses[size] += 1
        is_due = self._uses[size] > (32 if max(self._captured, default=0) > size else 1)
        if size in self._captured or not is_due:
            return 0.0
        self._captured.add(size)
        return self.CAPTURE_S


def one_layer(tokens, depth):
    """As measured on an H200 with a draft model of one layer that has to catch up, at 64 sequences of an 8B model in fp8."""
    return 3.75e-3 if depth == 0 else 1e-3 * (9.5 + 0.35 * depth + 0.0075 * (tokens - 64))


def free_drafts(tokens, depth):
    """As measured there with drafts that cost nothing."""
    return 3.75e-3 if depth == 0 else 1e-3 * (6.5 + 0.0085 * (tokens - 64))


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.75, 0.8])
def test_where_drafts_do_not_pay_they_cost_little(acceptance):
    device = Device(one_layer, acceptance)
    device.run(400)
    captures = device.CAPTURE_S * len(device._captured)
    assert captures <= 2 * device.CAPTURE_S and device.seconds - captures < 1.15 * device.plain_seconds, "it learns"
    before, asked = (device.seconds, device.plain_seconds), device.num_asked
    device.run(4000)
    assert device.seconds - before[0] < 1.02 * (device.plain_seconds - before[1])
    assert device.num_asked - asked < 0.02 * 4000, "all others are planned ahead"


def test_where_drafts_pay_they_are_found():
    device = Device(free_drafts, 0.8)
    device.run(200)
    before = device.seconds, device.plain_seconds
    device.run(600)
    assert device.seconds - before[0] < 0.75 * (device.plain_seconds - before[1])


def test_what_drafts_may_lose_is_limited():
    account = DraftAccount()
    lost = 0.0
    for _ in range(10_000):
        if account.allows:
            account.draft(tokens_per_request=1.0, seconds=3.0, base_s=2.0)
            lost += 0.5
        else:
            account.rest()
    assert lost == pytest.approx(MOST + SHARE * 10_000, rel=0.02)
    for _ in range(10_000):
        account.draft(tokens_per_request=3.0, seconds=4.0, base_s=2.0)
    assert account.balance == MOST, "what was gained is not all put at risk"
    account.draft(tokens_per_request=1.0, seconds=900.0, base_s=2.0)
    assert account.balance == MOST - MOST_LOST, "a graph is captured once"


def test_nobody_waits_for_a_step_where_no_drafts_are_promised():
    lengths = measured(compute_bound)
    group = (["a", "b"], [5, 5], 0, 100)
    for _ in range(PROBE_AFTER - 1):
        assert not lengths.promising(*group)
        assert [lengths.rests() for _ in range(REST)] == [True] * (REST - 1) + [False]
    assert lengths.promising(*group), "they are tried again"
    assert measured(memory_bound).promising(*group)
    lengths = measured(memory_bound)
    lengths.account.balance = 0.0
    assert not lengths.promising(*group) and lengths.choose(*group) == [0, 0]
    assert not AdaptiveLengths(5).promising(*group), "plain steps are measured first"
    assert AdaptiveLengths(5, adaptive=False).promising(*group)


def test_all_drafts_where_they_cost_nothing_and_none_where_they_cost_as_much():
    assert measured(memory_bound).choose(["a", "b"], [5, 5], 0, 100) == [5, 5]
    assert measured(compute_bound).choose(["a", "b"], [5, 5], 0, 100) == [0, 0]
    assert measured(memory_bound).choose(["a", "b"], [5, 2], 3, 6) == [4, 2], "the budget goes to the likeliest"


def test_lengths_fall_as_the_batch_grows():
    def roofline(tokens, depth):
        return max(1.0, tokens / 64) + 0.02 * depth

    lengths = measured(roofline)
    chosen = [lengths.choose(["r"] * size, [5] * size, 0, 512)[0] for size in (1, 8, 32, 64)]
    assert chosen[0] >= 4 and chosen[-1] == 0 and chosen == sorted(chosen, reverse=True)


def test_requests_get_what_their_own_acceptance_earns():
    lengths = measured(lambda tokens, depth: 1.0 + 0.1 * tokens)
    for _ in range(30):
        lengths.count("good", 5, 5)
        lengths.count("bad", 5, 0)
    chosen = lengths.choose(["good", "bad"], [5, 5], 0, 100)
    assert chosen[0] == 5 and chosen[1] == 0
    assert lengths.acceptance_of("good") > 0.9 > 0.1 > lengths.acceptance_of("bad")
    lengths.release("good")
    assert lengths.acceptance_of("good") == lengths.acceptance


def test_nothing_is_drafted_before_plain_steps_are_measured():
    lengths = AdaptiveLengths(4)
    assert lengths.choose(["a"], [4], 0, 100) == [0] and not lengths.rests()
    for _ in range(KNOWN_FROM):
        lengths.costs.observe(1, 0, 1.0)
    assert lengths.choose(["a"], [4], 0, 100) == [4], "unknown steps are tried"


def test_rests_and_probes_where_drafts_do_not_pay():
    lengths = measured(lambda tokens, depth: 1.0 + 0.1 * tokens, rate=0.0)
    probes = []
    for number in range(6 * PROBE_AFTER + 1):
        chosen = lengths.choose(["a"], [5], 0, 100)
        assert chosen in ([0], [1])
        if chosen == [1]:
            probes.append(number)
            lengths.count("a", 1, 0)
            for depth in range(1, 6):
                for _ in range(KNOWN_FROM):
                    lengths.costs.observe(1 + depth, depth, 1.1 + 0.1 * depth)
            assert not lengths.rests()
        else:
            assert [lengths.rests() for _ in range(REST)] == [True] * (REST - 1) + [False]
    assert probes == [PROBE_AFTER - 1, 3 * PROBE_AFTER - 1], "twice as long each time in vain"


def test_one_step_in_many_is_plain_to_measure_it():
    lengths = measured(memory_bound)
    chosen = [lengths.choose(["a"], [5], 0, 100) for _ in range(2 * PLAIN_EVERY)]
    assert chosen.count([0]) == 2 and chosen.count([5]) == 2 * PLAIN_EVERY - 2


def test_without_adaptation_everybody_gets_the_most_within_the_budget():
    lengths = AdaptiveLengths(4, adaptive=False)
    assert lengths.choose(["a", "b", "c"], [4, 2, 4], 0, 8) == [4, 2, 2] and not lengths.rests()


def test_acceptance_estimates():
    acceptance = Acceptance()
    assert acceptance.rate(0.7) == pytest.approx(0.7)
    for _ in range(200):
        acceptance.count(4, 2)  # two accepted, the third tried
    assert acceptance.rate(0.7) == pytest.approx(2 / 3, abs=0.01)
