"""Perplexity of a text, and how far one engine's predictions are from another's: KL divergence and top-1 agreement.

For every token of the text, with p the reference's and q the other engine's distribution over the vocabulary after the same tokens:

    nll = -log q(token)            kl = sum over v of p(v) (log p(v) - log q(v))            top1 = argmax p == argmax q
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..distribution import token_logprobs
from .numbers import standard_error
from .teacher_forcing import ForcedStep, forced_steps

if TYPE_CHECKING:
    from ..batch import Engine

_CHUNK_ELEMENTS = 1 << 24
"""Rows are compared in pieces of so many logits: three float32 copies of them are 192 MiB."""


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """How well a text is predicted."""

    num_tokens: int
    """Tokens that were scored."""
    nats_per_token: float
    """Their mean negative log-likelihood."""

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Distance of an engine from the reference over a text; KL divergences are in nats per token.

    Standard errors take tokens for independent, so they are somewhat small.
    """

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    """Share of tokens after which both engines' likeliest tokens are the same."""
    perplexity_ratio: float
    """The engine's perplexity over the reference's."""
    perplexity_ratio_stderr: float
    """By the paired differences of the two engines' log-likelihoods."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two engines on one text."""

    reference: TextScore
    score: TextScore
    divergence: Divergence


def score_text(engine: Engine, token_ids: Sequence[int], *, context: int = 512) -> TextScore:
    """Scores a text in windows of `context` tokens, see teacher_forcing.py.

    Raises ValueError as `forced_steps` does, and RuntimeError where logits are NaN or infinite.
    """
    nll = np.zeros(len(token_ids))
    with closing(forced_steps([engine], token_ids, context=context)) as steps:
        for step in steps:
            nll[step.indices] = _nll(step, 0)
    return _score(nll[1:])


def compare_engines(reference: Engine, engine: Engine, token_ids: Sequence[int], *, context: int = 512) -> Comparison:
    """Scores a text with both engines and compares their predictions; raises as `score_text`."""
    nll = np.zeros((2, len(token_ids)))
    kl = np.zeros(len(token_ids))
    same = np.zeros(len(token_ids), dtype=bool)
    with closing(forced_steps([reference, engine], token_ids, context=context)) as steps:
        for step in steps:
            for number in range(2):
                nll[number, step.indices] = _nll(step, number)
            kl_R, same_R = divergence_rows(*step.logits)
            kl[step.indices], same[step.indices] = kl_R.cpu().numpy(), same_R.cpu().numpy()
    return Comparison(
        reference=_score(nll[0, 1:]),
        score=_score(nll[1, 1:]),
        divergence=_divergence(kl[1:], same[1:], nll[1, 1:] - nll[0, 1:]),
    )


def divergence_rows(reference_RV: torch.Tensor, other_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([R] float64 KL divergence in nats, [R] bool whether the largest logits are the same token's).

    Log-probabilities are float32, their sum over the vocabulary float64; what rounding makes negative is 0.
    """
    rows = max(1, _CHUNK_ELEMENTS // reference_RV.shape[1])
    kl, same = [], []
    for one, two in zip(reference_RV.split(rows), other_RV.split(rows), strict=True):
        log_p, log_q = one.float().log_softmax(-1), two.float().log_softmax(-1)
        terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)
        kl.append(terms.sum(-1, dtype=torch.float64).clamp_(min=0))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
    return torch.cat(kl), torch.cat(same)


def _nll(step: ForcedStep, number: int) -> np.ndarray:
    """[R] negative log-likelihoods of a step's tokens under engine `number`."""
    logprobs = token_logprobs(step.logits[number], step.targets, 0)[2].cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if len(bad):
        which = f"engine {number + 1} of {len(step.logits)}" if len(step.logits) > 1 else "the engine"
        raise RuntimeError(
            f"the log-probability of token {int(step.indices[bad[0]])} of the text is not finite under {which}: its logits are "
            "NaN or infinite, the model's numerics are at fault: compare with target='eager'"
        )
    return -logprobs.astype(np.float64)


def _score(nll: np.ndarray) -> TextScore:
    return TextScore(num_tokens=len(nll), nats_per_token=float(nll.mean()))


def _divergence(kl: np.ndarray, same: np.ndarray, more_nats: np.ndarray) -> Divergence:
    ratio = math.exp(more_nats.mean())
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_stderr=standard_error(kl),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=ratio * standard_error(more_nats),
    )
