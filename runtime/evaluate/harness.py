"""An engine as a model of lm-evaluation-harness (`pip install camshaft[eval]`).

    lm_eval.simple_evaluate(model=CamshaftLM("my-engine"), tasks=["arc_easy"], num_fewshot=5)

    python -m camshaft.runtime.evaluate.harness --model camshaft --model_args pretrained=my-engine --tasks arc_easy

The second is the harness's own command line, with the model "camshaft" known to it. Imports lm_eval.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ..sampling_params import SamplingParams
from .likelihood import TokenPair, encode_context, encode_pair, likelihoods, prefix_token

if TYPE_CHECKING:
    from ..llm import LLM
    from ..tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_GEN_TOKENS = 256
"""Tokens of an output where a task says nothing."""
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed")


@register_model("camshaft")
class CamshaftLM(LM):  # type: ignore[misc, unused-ignore]
    """Answers the harness's requests with an LLM: all of a call at once, batched in flight, with the prefix cache.

    Args:
        pretrained: an LLM, which stays the caller's; or what `LLM` takes: an engine, its directory, or a model to compile.
        batch_size, max_batch_size: not used, since the engine batches by itself; the harness passes them.
        device: for a model to compile; None: the GPU where there is one.
        options: for `LLM` (or, through it, for `camshaft.compile`) where `pretrained` is none.

    Raises:
        ValueError: an engine without a tokenizer, or options that do not fit.
    """

    def __init__(
        self,
        pretrained: LLM | str | Path,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        from ..llm import LLM

        super().__init__()
        if device is not None:
            options["device"] = device
        if isinstance(pretrained, LLM):
            if options:
                raise ValueError(
                    f"{', '.join(options)} are options of an LLM, and `pretrained` is one already; leave them out"
                )
            self.llm = pretrained
        else:
            self.llm = LLM(pretrained, **options)
        if self.llm.tokenizer is None:
            raise ValueError(
                "the engine has no tokenizer; the harness gives texts: build from a directory with tokenizer.json"
            )
        self.tokenizer: Tokenizer = self.llm.tokenizer

    # --- requests -------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding gives) of each request's (context, continuation)."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        found = likelihoods(self.llm, pairs, progress=False if disable_tqdm else None)
        _tell_truncated(sum(entry.truncated for entry in found), len(found))
        results = [(entry.logprob, entry.is_greedy) for entry in found]
        self._remember("loglikelihood", requests, results)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's whole text, in windows of the engine's length, each token scored once."""
        limit = self.llm.engine.max_seq_len - 1
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            windows = rolling_windows(tokens, prefix_token(self.tokenizer), limit)
            pairs += windows
            owners += [number] * len(windows)
        results = [0.0] * len(requests)
        for owner, entry in zip(owners, likelihoods(self.llm, pairs, progress=False if disable_tqdm else None)):
            results[owner] += entry.logprob
        self._remember("loglikelihood_rolling", requests, results)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each request's context, up to one of its stop texts; greedy unless the task samples."""
        prompts, params, num_truncated = [], [], 0
        for request in requests:
            context, options = request.args
            own = self.sampling_params(options)
            room = self.llm.engine.max_seq_len - (own.max_tokens or 0)
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {own.max_tokens}; allowed: less than {self.llm.engine.max_seq_len}, max_seq_len"
                )
            tokens = encode_context(self.tokenizer, context) or [prefix_token(self.tokenizer)]
            num_truncated += len(tokens) > room
            prompts.append({"prompt_token_ids": tokens[-room:]})
            params.append(own)
        _tell_truncated(num_truncated, len(prompts))
        outputs = self.llm.generate(prompts, params, progress=False if disable_tqdm else None)
        results = [output.text for output in outputs]
        self._remember("generate_until", requests, results)
        return results

    @staticmethod
    def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
        """What a task's generation options mean. Raises ValueError for unknown ones."""
        unknown = sorted(set(options) - set(_GENERATION))
        if unknown:
            raise ValueError(f"generation options {', '.join(unknown)} are unknown; allowed: {', '.join(_GENERATION)}")
        until = options.get("until") or []
        temperature = options.get("temperature")
        if not options.get("do_sample", bool(temperature)):
            temperature = 0.0
        given = {name: options[name] for name in ("top_p", "top_k", "min_p", "seed") if options.get(name) is not None}
        return SamplingParams(
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            max_tokens=int(options.get("max_gen_toks", MAX_GEN_TOKENS)),
            temperature=1.0 if temperature is None else float(temperature),
            **given,
        )

    def _remember(self, kind: str, requests: Sequence[Any], results: Sequence[Any]) -> None:
        """Hands results to the harness's cache, where it has one."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)

    # --- chat templates -------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's request cache."""
        return str(self.llm.engine.tokenizer_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of a template by name, or of the default one; None where it is not asked for."""
        if not chat_template:
            return None
        return self.tokenizer.chat_templates["default" if chat_template is True else chat_template]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the model's template."""
        return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)


def rolling_windows(tokens: Sequence[int], prefix: int, limit: int) -> list[TokenPair]:
    """Pairs whose continuations are a text's tokens, each once, with prompts of at most `limit` tokens.

    prefix | t0 t1 t2        t2 | t3 t4 t5        t3 t4 t5 | t6        limit 4: the last context reaches back as far as it can
    """
    pairs, size = [], limit - 1
    for begin in range(0, len(tokens), size):
        scored = tokens[begin : begin + size]
        context = tokens[max(0, begin - (limit - len(scored))) : begin] if begin else [prefix]
        pairs.append(TokenPair(tuple(context), tuple(scored)))
    return pairs


def _tell_truncated(count: int, total: int) -> None:
    if count:
        logger.warning(
            "%d of %d contexts were longer than the engine's sequences and lost their first tokens", count, total
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
