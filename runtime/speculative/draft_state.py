"""How drafts are drawn: as the target draws, from random numbers of their own."""

from __future__ import annotations

from dataclasses import replace

from ..logits import SamplingState
from ..sampler import Sampler, derive_seed

_DRAFT_STREAM = 0x5BEC0DE
"""Index of the seed that draws drafts, among those derived from a request's."""


def draft_state(state: SamplingState, sampler: Sampler, *, exact: bool) -> SamplingState:
    """Draws as the target does, without what follows tokens that the host does not know, or makes it wait.

    exact: with the target's own random numbers.
    """
    params = replace(
        state.params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, bad_token_ids=None,
        logprobs=None, prompt_logprobs=None,
    )  # fmt: skip
    seed = state.seed if exact else derive_seed(state.seed, _DRAFT_STREAM)
    drawn = SamplingState(params, state.prompt_token_ids, state.output_token_ids, seed, state.stop_ids)
    if sampler.reads_device(drawn):
        drawn.params = replace(params, top_p=1.0)
    return drawn
