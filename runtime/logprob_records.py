"""Log-probabilities as results hold them: by token, with ranks and texts, made from the arrays of the sampler."""

from __future__ import annotations

from collections.abc import Sequence

from .generation import Generation, Sample
from .outputs import Logprob, TokenLogprobDict
from .request import Request
from .sampler import TokenLogprobs
from .tokenizer import Tokenizer


class LogprobRecords:
    """Writes log-probabilities into samples and generations that asked for them.

    tokenizer: for the tokens' texts, each decoded once; None: there are none.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def add_output(self, sample: Sample, values: TokenLogprobs, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """New tokens of a sample, and the rows of `values` that they are of: as many, or more behind one that ended the text."""
        assert sample.logprobs is not None and sample.cumulative_logprob is not None
        for row, token in zip(rows, tokens):
            sample.logprobs.append(self._record(values, row, token, sample.request.params.logprobs or 0))
            sample.cumulative_logprob += float(values.logprobs[row])

    def add_prompt(self, generation: Generation, request: Request, first: int, values: TokenLogprobs) -> None:
        """The prompt's tokens from position `first` on, one for each row of `values`."""
        num_top = request.params.prompt_logprobs or 0
        for row in range(len(values.logprobs)):
            token = request.prompt_token_ids[first + row]
            generation.prompt_logprobs[first + row] = self._record(values, row, token, num_top)

    def _record(self, values: TokenLogprobs, row: int, token: int, num_top: int) -> TokenLogprobDict:
        found = {token: Logprob(float(values.logprobs[row]), int(values.ranks[row]), self._text(token))}
        tops = zip(values.top_ids[row, :num_top].tolist(), values.top_logprobs[row, :num_top].tolist())
        for rank, (top, logprob) in enumerate(tops, start=1):
            found.setdefault(top, Logprob(logprob, rank, self._text(top)))
        return found

    def _text(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode_token(token)
        return self._texts[token]
