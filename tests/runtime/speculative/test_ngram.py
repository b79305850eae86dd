"""The suffix automaton against a search by brute force, and the drafts that come of it."""

import random

import pytest
from camshaft.runtime.logits import SamplingState
from camshaft.runtime.request import Request
from camshaft.runtime.sampling_params import SamplingParams
from camshaft.runtime.speculative.config import SpeculativeConfig
from camshaft.runtime.speculative.ngram import TRUST, NgramProposer, repeat_draft
from camshaft.runtime.speculative.proposer import ProposerContext, Target
from camshaft.runtime.speculative.suffix_automaton import SuffixAutomaton


def longest_repeated(tokens):
    """Length of the longest end of the text that also occurs earlier."""
    for length in range(len(tokens) - 1, 0, -1):
        end = tokens[-length:]
        if any(tokens[i : i + length] == end for i in range(len(tokens) - length)):
            return length
    return 0


@pytest.mark.parametrize("alphabet", [1, 2, 3, 10])
def test_longest_repetition_and_its_place(alphabet):
    rng = random.Random(alphabet)
    for _ in range(20):
        automaton, tokens = SuffixAutomaton(), []
        for _ in range(60):
            tokens.append(rng.randrange(alphabet))
            automaton.extend(tokens[-1:])
            length, end = automaton.repeated()
            assert length == longest_repeated(tokens)
            if length:
                assert length <= end < len(tokens)
                assert tokens[end - length : end] == tokens[-length:]
        assert len(automaton) == 60


def test_the_place_is_a_late_one():
    automaton = SuffixAutomaton()
    automaton.extend([1, 2, 7, 1, 2, 8, 1, 2])
    assert automaton.repeated() == (2, 5)


def test_drafts_repeat_periods():
    assert repeat_draft([5, 6, 7, 5, 6], 2, 4) == [7, 5, 6, 7]
    assert repeat_draft([4, 4, 4], 2, 3) == [4, 4, 4]


@pytest.mark.parametrize(("text", "num_repeated"), [([5, 6, 7, 8, 9, 4, 7], 1), ([5, 6, 7, 8, 9, 4, 6, 7], 2)])
def test_drafts_are_trusted_as_far_as_the_text_repeats(text, num_repeated):
    config = SpeculativeConfig(method="ngram", num_draft_tokens=8, ngram_min=1)
    proposer = NgramProposer(ProposerContext(config=config, engine=None, draft_engine=None))
    request = Request("r", text, SamplingParams())
    state = SamplingState(request.params, text, (), 0)
    drafts = proposer.propose([Target(request, state, 8), Target(request, state, 1)])
    assert drafts.lengths == [TRUST * num_repeated, 1]
    assert drafts.token_ids == [[8, 9, 4, text[6]][: TRUST * num_repeated], [8]]
