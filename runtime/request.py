"""One sequence on its way through the runtime: `Request`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .sampling_params import SamplingParams

NULL_BLOCK = -1
"""Stands in a request's block table where a sliding window has moved past a block: nothing is stored there."""


class RequestStatus(StrEnum):
    """Where a request is; preemption is the way back from RUNNING to WAITING.

    ENDING: its last token is under way in a launched step, and nothing else of it is left to compute.
    """

    WAITING = "waiting"
    RUNNING = "running"
    ENDING = "ending"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended: a stop token or string, its length limit, or the caller's abort."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(eq=False, slots=True)
class Request:
    """A prompt, what has been generated for it, and how far its KV cache has come.

    There are no phases: each step only lets `num_computed_tokens` catch up with `num_tokens`.

        all_token_ids   | prompt ................. | output ... |
        KV cache        | computed .......... |  <- num_computed_tokens, catching up

    While a step is planned on top of one that is still computing, `num_computed_tokens` counts that one in, and the
    token that it samples is at position `num_tokens`: it has a place, and a value once `update()` brings it.

    The fields below `output_token_ids` belong to the scheduler and its KV cache manager: others only read them,
    except `draft_token_ids`, which a drafter sets between `update()` and `schedule()`.
    Compared by identity. Raises ValueError when the request id is empty.
    """

    request_id: str
    """Unique among the requests the scheduler holds."""
    prompt_token_ids: list[int]
    """The prompt; not changed after construction."""
    params: SamplingParams
    """How to sample and when to stop."""
    eos_token_ids: frozenset[int] = frozenset()
    """The model's end-of-sequence tokens."""
    lora_id: str | None = None
    """The adapter, which changes the KV content and so the prefix cache's key."""
    cache_salt: str | None = None
    """Requests share cached prefixes only with requests of an equal salt (tenants; media behind placeholder tokens)."""
    wait_for: str | None = None
    """Id of an earlier request (a sibling of n > 1) whose prompt must be computed before this one is admitted."""
    multimodal: object | None = None
    """Media inputs. Their tokens do not tell their content, so without a cache_salt the prefix cache is not used."""

    reports_tokens: bool = field(init=False, default=True)
    """Whether update() tells of every token, or only of the first and of the end."""
    output_token_ids: list[int] = field(init=False, default_factory=list)
    """Tokens generated so far."""
    all_token_ids: list[int] = field(init=False)
    """Prompt and output in one list."""
    arrival: int = field(init=False, default=-1)
    """Position in the order of add_request, the order requests are served in; -1 before."""
    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    """WAITING, RUNNING or FINISHED."""
    finish_reason: FinishReason | None = field(init=False, default=None)
    """Set when FINISHED."""
    stop_reason: int | str | None = field(init=False, default=None)
    """The stop_token_ids entry or stop string that ended it; None for end-of-sequence and the other reasons."""
    num_computed_tokens: int = field(init=False, default=0)
    """Tokens whose keys and values are in the cache, or will be when the launched steps are over."""
    num_cached_tokens: int = field(init=False, default=0)
    """Prompt tokens found in the prefix cache when first admitted."""
    num_preemptions: int = field(init=False, default=0)
    """Times its blocks were taken away."""
    draft_token_ids: list[int] = field(init=False, default_factory=list)
    """Guesses of the next tokens, verified in the next step; update() empties it."""
    max_total_tokens: int = field(init=False, default=0)
    """Prompt and output at most, min(prompt + max_tokens, max_seq_len); set by add_request."""
    stop_ids: frozenset[int] = field(init=False)
    """Every token that stops this request: end-of-sequence (unless ignored) and stop_token_ids."""
    prefill_end: int = field(init=False, default=0)
    """num_tokens when last admitted: below it the request prefills (or recomputes), from it on it decodes."""
    prefilling: bool = field(init=False, default=False)
    """RUNNING with num_computed_tokens < prefill_end."""

    block_ids: list[list[int]] = field(init=False, default_factory=list)
    """Block table per cache group, by logical block; NULL_BLOCK where the window has moved past."""
    block_hashes: dict[int, list[bytes]] = field(init=False, default_factory=dict)
    """Block size to the chained content hashes of the full blocks, as far as they were asked for."""
    kv_capacity: int = field(init=False, default=0)
    """Tokens that fit the blocks held (the smallest over the groups)."""
    kv_next_event: int = field(init=False, default=0)
    """num_computed_tokens at which the manager next has a block to hash or to free."""
    kv_committed: list[int] = field(init=False, default_factory=list)
    """Per group, how many leading logical blocks have been offered to the prefix cache."""
    kv_dropped: list[int] = field(init=False, default_factory=list)
    """Per group, how many leading logical blocks are NULL_BLOCK."""

    def __post_init__(self) -> None:
        if not self.request_id:
            raise ValueError("request_id is empty; allowed: a non-empty string that no live request has")
        self.prompt_token_ids = list(self.prompt_token_ids)
        self.all_token_ids = list(self.prompt_token_ids)
        stop_ids = frozenset(self.params.stop_token_ids or ())
        self.stop_ids = stop_ids if self.params.ignore_eos else stop_ids | self.eos_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Length of the output so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Length of prompt and output so far."""
        return len(self.all_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether logits of prompt rows are wanted, from `first_logit_row` on; once a token was sampled all were delivered."""
        return self.params.prompt_logprobs is not None and not self.output_token_ids

    @property
    def first_logit_row(self) -> int:
        """The first prompt row whose logits are wanted, where `needs_prompt_logits`: it predicts the token behind it."""
        return max(0, self.params.prompt_logprobs_start - 1)

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether its token ids (with lora_id and cache_salt) tell the content of its KV blocks."""
        return self.multimodal is None or self.cache_salt is not None

    def append_output(self, tokens: Sequence[int]) -> list[int]:
        """Append sampled tokens up to the first one that ends the request; returns those appended.

        Sets `finish_reason` and `stop_reason` when one ends it. A stop token counts only after `min_tokens` others;
        a token that stops and also reaches the length limit is a stop.
        """
        if len(self.all_token_ids) + len(tokens) < self.max_total_tokens and self.stop_ids.isdisjoint(tokens):
            self.output_token_ids.extend(tokens)
            self.all_token_ids.extend(tokens)
            return list(tokens)
        appended: list[int] = []
        for token in tokens:
            if token in self.stop_ids and len(self.output_token_ids) >= self.params.min_tokens:
                self.finish_reason = FinishReason.STOP
                is_eos = token in self.eos_token_ids and not self.params.ignore_eos
                self.stop_reason = None if is_eos else token
            self.output_token_ids.append(token)
            self.all_token_ids.append(token)
            appended.append(token)
            if self.finish_reason is None and len(self.all_token_ids) >= self.max_total_tokens:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                break
        return appended
