"""Log-likelihoods of continuations: what the model says of given tokens after a given context.

    context tokens            | continuation tokens         one prompt of an LLM
    from the prefix cache ... | their log-probabilities

Pairs go through the LLM all at once, batched in flight. Those that share a context (the choices of a question) come in two waves:
the first computes the context, and the others take it from the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import RequestOutput
    from ..tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A context of at least one token, and at least one token whose likelihood is asked for."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of a continuation."""

    logprob: float
    """Sum of its tokens' log-probabilities, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest after those before it."""
    num_tokens: int
    truncated: bool
    """Whether the context was cut off at its beginning, since the engine's sequences are not longer."""


def prefix_token(tokenizer: Tokenizer) -> int:
    """The token that stands before a text without context: beginning of sequence, or end where there is none.

    Raises ValueError for a tokenizer that names neither.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ValueError(
            "the tokenizer has neither a bos nor an eos token to stand for an empty context; give a context"
        )
    return token


def encode_context(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that begins a prompt: special tokens are added, unless it brings its own bos (as chat templates do)."""
    bos = tokenizer.special_tokens.get("bos_token")
    return tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> TokenPair:
    """Tokens of a context and its continuation, encoded as one text, so that they are those of the text as it is read.

    Spaces at the end of the context go with the continuation: in most vocabularies a word begins with its space.

    Raises ValueError for a continuation of no tokens.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        first = [prefix_token(tokenizer)]
        rest = tokenizer.encode(continuation, add_special_tokens=False)
    else:
        whole = encode_context(tokenizer, stripped + continuation)
        first = whole[: len(encode_context(tokenizer, stripped))]
        rest = whole[len(first) :]
    if not rest:
        raise ValueError(f"the continuation {continuation!r} has no tokens of its own; give a text")
    return TokenPair(tuple(first), tuple(rest))


def likelihoods(llm: LLM, pairs: Sequence[TokenPair], *, progress: bool | None = False) -> list[Likelihood]:
    """The log-likelihood of each pair's continuation, in the order of the pairs.

    A context that is too long for the engine loses its first tokens. Raises ValueError for a continuation that is too long itself.
    """
    limit = llm.engine.max_seq_len - 1  # the prompt, and room for the token that a request generates
    found: list[Likelihood | None] = [None] * len(pairs)
    for wave in _waves(pairs, llm.memory.kv_tokens):
        prompts, params = zip(*(_request(pairs[index], limit) for index in wave))
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, progress=progress)
        for index, output in zip(wave, outputs, strict=True):
            found[index] = _likelihood(pairs[index], output)
    return [entry for entry in found if entry is not None]


def _waves(pairs: Sequence[TokenPair], kv_tokens: int) -> list[list[int]]:
    """Indices in the order of calls; contexts that fit the KV cache together are computed, and then used by their other pairs."""
    waves: list[list[int]] = []
    firsts: dict[tuple[int, ...], int] = {}
    others: list[int] = []
    held = 0
    for index, pair in enumerate(pairs):
        if pair.context in firsts:
            others.append(index)
            continue
        size = len(pair.context) + len(pair.continuation)
        if firsts and held + size > kv_tokens:
            waves += [list(firsts.values()), others]
            firsts, others, held = {}, [], 0
        firsts[pair.context] = index
        held += size
    waves += [list(firsts.values()), others]
    return [wave for wave in waves if wave]


def _request(pair: TokenPair, limit: int) -> tuple[list[int], SamplingParams]:
    """Prompt and parameters: context, or what there is room for of it, and continuation."""
    room = limit - len(pair.continuation)
    if room < 1:
        raise ValueError(
            f"a continuation has {len(pair.continuation)} tokens; allowed: at most {limit - 1}, so that a token of context stands "
            "before it; build with a larger max_seq_len"
        )
    context = pair.context[-room:]
    params = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=0, prompt_logprobs_start=len(context), detokenize=False
    )
    return [*context, *pair.continuation], params


def _likelihood(pair: TokenPair, output: RequestOutput) -> Likelihood:
    entries = output.prompt_logprobs
    assert entries is not None
    total, greedy = 0.0, True
    for token, entry in zip(pair.continuation, entries[-len(pair.continuation) :], strict=True):
        assert entry is not None
        total += entry[token].logprob
        greedy &= entry[token].rank == 1
    num_given = len(pair.context) + len(pair.continuation)
    return Likelihood(total, greedy, len(pair.continuation), len(output.prompt_token_ids) < num_given)
