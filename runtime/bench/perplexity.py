"""Perplexity of a text under an engine: what a build's precision costs, measured where it is served.

tokens      t0 t1 t2 ... tC | tC tC+1 ... t2C | ...      windows of C + 1 tokens, the last of one is the first of the next
scored         t1 t2 ... tC |    tC+1 ... t2C | ...      each token once, after up to C tokens of its window
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..llm import LLM


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The score of a text. num_tokens: how many were scored. nats_per_token: their mean negative log-likelihood."""

    num_tokens: int
    nats_per_token: float

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


def document_tokens(tokenizer: Any, text: str) -> list[int]:
    """A text's documents (separated by form feeds) as one row of tokens, each followed by the tokenizer's first end token.

    tokenizer: a runtime `Tokenizer`. Raises ValueError for a tokenizer that names no end of text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token to separate documents with; score one document a call")
    row: list[int] = []
    for part in text.split("\f"):
        if part.strip():
            row += [*tokenizer.encode(part, add_special_tokens=False), end]
    return row


def perplexity(llm: LLM, token_ids: Sequence[int], *, context: int = 512) -> Perplexity:
    """Scores a row of tokens in windows of `context` tokens, as prompts of the serving engine.

    Raises ValueError for fewer than two tokens, or a context that the engine has no room for.
    """
    from ..sampling_params import SamplingParams

    limit = llm.engine.max_seq_len - 2  # the token behind the window, and the one that a request generates
    if not 1 <= context <= limit:
        raise ValueError(f"context is {context} tokens; allowed: 1 to {limit}, max_seq_len less 2")
    if len(token_ids) < 2:
        raise ValueError(f"the text has {len(token_ids)} tokens; perplexity needs at least 2")
    starts = range(0, len(token_ids) - 1, context)
    windows = [list(token_ids[start : start + context + 1]) for start in starts]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    total, count = 0.0, 0
    for result in llm.generate(windows, params):
        scores = result.prompt_logprobs
        assert scores is not None
        for token, entry in zip(result.prompt_token_ids[1:], scores[1:], strict=True):
            assert entry is not None
            total -= entry[token].logprob
            count += 1
    return Perplexity(num_tokens=count, nats_per_token=total / count)
