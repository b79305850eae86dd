"""Prompts and sampling parameters of a user become checked token ids, before anything is queued."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

Message = Mapping[str, Any]
"""One message of a chat: {"role": ..., "content": ...}."""
Prompt = str | Sequence[int] | Mapping[str, Any] | Sequence[Message]
"""Text; token ids; {"prompt": text} or {"prompt_token_ids": ids}; or the messages of a chat."""
_FORMS = (
    'a string, a list of token ids, {"prompt": str}, {"prompt_token_ids": [...]}, or a chat: [{"role": ..., "content": '
    "...}]"
)


@dataclass(frozen=True, slots=True)
class CheckedInput:
    """A prompt and its parameters, found to be in order."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams


def split_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """(the single prompts, whether the user gave one alone).

    A list of integers is one prompt of token ids, a list of messages is one chat, any other list is several prompts.
    """
    if isinstance(prompts, (str, Mapping)):
        return [prompts], True
    if isinstance(prompts, np.ndarray):
        return ([prompts], True) if prompts.ndim == 1 else (list(prompts), False)
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is a {type(prompts).__name__}; allowed: {_FORMS}, or a list of these")
    if not prompts:
        return [], False
    first = prompts[0]
    if isinstance(first, (int, np.integer)) or (isinstance(first, Mapping) and "role" in first):
        return [prompts], True
    return list(prompts), False


class InputChecker:
    """Checks inputs against one model. All errors are ValueErrors that name the value, what is allowed, and the fix."""

    def __init__(
        self, tokenizer: Tokenizer | None, *, vocab_size: int, max_seq_len: int, speculates: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._speculates = speculates
        self._vocab_size = vocab_size
        self._max_seq_len = max_seq_len

    def check_all(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[CheckedInput]:
        """All inputs, or one ValueError that lists what is wrong with each bad one."""
        all_params = self._spread(params, len(prompts))
        checked: list[CheckedInput] = []
        errors: list[str] = []
        for number, (prompt, own) in enumerate(zip(prompts, all_params)):
            try:
                checked.append(self.check(prompt, own))
            except ValueError as error:
                errors.append(f"prompts[{number}]: {error}" if len(prompts) > 1 else str(error))
        if errors:
            more = [] if len(errors) <= 5 else [f"and {len(errors) - 5} more"]
            raise ValueError("\n".join(errors[:5] + more))
        return checked

    def check(self, prompt: Any, params: SamplingParams) -> CheckedInput:
        """One prompt of any form."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}; allowed: SamplingParams or a list of them")
        text, ids = self._token_ids(prompt)
        if not ids:
            raise ValueError(f"the prompt is empty ({prompt!r}); allowed: at least one token, such as the bos token")
        self._check_ids("token", ids)
        if len(ids) >= self._max_seq_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_seq_len is {self._max_seq_len}; allowed: at most "
                f"{self._max_seq_len - 1}, so that one token can follow. Shorten it or raise max_seq_len"
            )
        if params.prompt_logprobs_start >= len(ids):
            raise ValueError(
                f"prompt_logprobs_start is {params.prompt_logprobs_start} and the prompt has {len(ids)} tokens; allowed: 0 to "
                f"{len(ids) - 1}"
            )
        return CheckedInput(text, ids, self._complete(params))

    def _spread(
        self, params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            return [SamplingParams()] * num_prompts
        if isinstance(params, SamplingParams) or not isinstance(params, Sequence):
            return [params] * num_prompts
        if len(params) != num_prompts:
            raise ValueError(f"{len(params)} sampling_params for {num_prompts} prompts; give one, or one per prompt")
        return params

    def _token_ids(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._need_tokenizer("a text prompt").encode(prompt)
        if isinstance(prompt, Mapping):
            if set(prompt) == {"prompt"} and isinstance(prompt["prompt"], str):
                return self._token_ids(prompt["prompt"])
            if set(prompt) in ({"prompt_token_ids"}, {"prompt_token_ids", "prompt"}):
                return prompt.get("prompt"), self._token_ids(list(prompt["prompt_token_ids"]))[1]
            raise ValueError(f"the prompt is a dict with the keys {sorted(map(str, prompt))}; allowed: {_FORMS}")
        if isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence):
            raise ValueError(f"the prompt is a {type(prompt).__name__}; allowed: {_FORMS}")
        if prompt and isinstance(prompt[0], Mapping):
            tokenizer = self._need_tokenizer("a chat")
            text = tokenizer.render_chat(prompt)
            return text, tokenizer.encode(text, add_special_tokens=False)
        if set(map(type, prompt)) <= {int}:
            return None, list(prompt)
        for position, token in enumerate(prompt):
            if type(token) is not int and (isinstance(token, bool) or not isinstance(token, (int, np.integer))):
                raise ValueError(
                    f"the prompt holds {token!r} ({type(token).__name__}) at position {position}; allowed: {_FORMS}"
                )
        return None, [int(token) for token in prompt]

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        if min(ids) >= 0 and max(ids) < self._vocab_size:
            return
        position, token = next((i, t) for i, t in enumerate(ids) if not 0 <= t < self._vocab_size)
        raise ValueError(
            f"{what} id {token} at position {position} is outside the vocabulary; allowed: 0 to "
            f"{self._vocab_size - 1}. Was it made by another model's tokenizer?"
        )

    def _complete(self, params: SamplingParams) -> SamplingParams:
        """Checks the parameters that concern this model, and turns bad words into tokens."""
        if params.speculative and not self._speculates:
            raise ValueError(
                "speculative is True and this LLM does not speculate; make it with speculative=SpeculativeConfig(...), or "
                "leave it out"
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            ids = getattr(params, name)
            if ids:
                self._check_ids(name, list(ids))
        for word in params.bad_token_ids or ():
            self._check_ids("bad_token_ids", word)
        if params.stop:
            self._need_tokenizer("a stop string")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self._vocab_size:
                raise ValueError(f"{name} is {value}; allowed: at most the vocabulary's {self._vocab_size} tokens")
        if not params.bad_words:
            return params
        tokenizer = self._need_tokenizer("a bad word")
        words = {tuple(word) for word in params.bad_token_ids or ()}
        for text in params.bad_words:
            # The same word at the beginning of a text and after a space is other tokens.
            for spelling in (text, " " + text.lstrip()):
                words.add(tuple(tokenizer.encode(spelling, add_special_tokens=False)))
        return dataclasses.replace(params, bad_words=None, bad_token_ids=tuple(sorted(w for w in words if w)))

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer and this engine has none; pass token ids and stop_token_ids, or compile "
                "from a directory with tokenizer.json"
            )
        return self._tokenizer
