"""Which drafts become output: tokens for every row of a verification, and how far they follow the drafts.

    row            r0 (last known token)   r1 (draft a)   r2 (draft b)
    drafted next   a                       b              -
    token          a                       x              y              -> accepted: a, and then x

Every row gets a token, drawn from the target's distribution given the drafts before it; a draft is accepted where it is the
token of the row before it and all drafts before it are accepted. How the token is drawn decides what is preserved:

    certain drafts (greedy, n-grams, trees)     the row's own draw, as without drafts. The draft d is hit with probability p(d),
                                                as in rejection sampling from a certain draft, and nothing else changes.
    drawn drafts (a draft model that samples)   the draft with probability min(1, p(d) / q(d)), otherwise a draw from
                                                max(p - q, 0), normalised (Leviathan et al. 2023, section 2.3): distributed as p.
    typical acceptance                          the draft if p(d) > min(epsilon, delta exp(-entropy(p))), otherwise a draw from p.

All sums are those of integers (runtime/distribution.py), so that no row depends on the batch around it.
"""

from __future__ import annotations

import math

import torch

from ..distribution import fixed_point_weights, invert_cumulative, weight_bits

_CHUNK_ELEMENTS = 1 << 22
"""Rows are taken in pieces of so many logits: a handful of 64-bit tables of that size live at once."""
_RESIDUAL_BITS = 52
_ENTROPY_BITS = 48


def rejection_tokens(
    x_NV: torch.Tensor,
    q_NV: torch.Tensor,
    drafts_N: torch.Tensor,
    accept_N: torch.Tensor,
    draw_N: torch.Tensor,
) -> torch.Tensor:
    """[N] int64 tokens distributed as softmax(x), equal to the drafts as often as that allows.

    Args:
        x_NV: [N, V] float32 logits of the target, after temperature, cuts and penalties.
        q_NV: [N, V] float32 logits of the distribution that each draft was drawn from.
        drafts_N: [N] int64.
        accept_N, draw_N: [N] float64 in [0, 1), independent of each other and of the draft's draw.

    A row whose maximum is not finite gives -1.
    """
    parts = []
    for rows in _chunks(x_NV):
        parts.append(_rejection(x_NV[rows], q_NV[rows], drafts_N[rows], accept_N[rows], draw_N[rows]))
    return torch.cat(parts)


def _rejection(
    x: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, accept: torch.Tensor, draw: torch.Tensor
) -> torch.Tensor:
    p_weights, p = _probabilities(x)
    _, q = _probabilities(q)
    chosen = drafts[:, None].clamp(0, x.shape[1] - 1)
    accepted = accept * q.gather(1, chosen)[:, 0] < p.gather(1, chosen)[:, 0]
    residual = (p - q).clamp_(min=0).mul_(2.0**_RESIDUAL_BITS).to(torch.int64)
    # Equal distributions reject by rounding alone; then there is no residual, and any draw from p will do.
    empty = residual.sum(-1, keepdim=True) == 0
    other = invert_cumulative(torch.where(empty, p_weights, residual), draw)
    return torch.where(_finite(x), torch.where(accepted, drafts, other), -1)


def typical_tokens(
    x_NV: torch.Tensor, drafts_NC: torch.Tensor, drawn_N: torch.Tensor, epsilon: float, delta: float
) -> torch.Tensor:
    """[N] int64: the likeliest draft that typical acceptance takes, otherwise the token drawn (Cai et al. 2024, 2.3.1).

    Args:
        x_NV: [N, V] float32 logits of the target, after temperature, cuts and penalties.
        drafts_NC: [N, C] int64 drafts after each row, -1 for none.
        drawn_N: [N] int64 tokens drawn from softmax(x).
    """
    parts = []
    for rows in _chunks(x_NV):
        parts.append(_typical(x_NV[rows], drafts_NC[rows], drawn_N[rows], epsilon, delta))
    return torch.cat(parts)


def _typical(x: torch.Tensor, drafts: torch.Tensor, drawn: torch.Tensor, epsilon: float, delta: float) -> torch.Tensor:
    _, p = _probabilities(x)
    terms = torch.where(p > 0, -p * p.clamp(min=1e-300).log(), 0.0)
    entropy = terms.mul_(2.0**_ENTROPY_BITS).to(torch.int64).sum(-1, keepdim=True).double() / 2.0**_ENTROPY_BITS
    least = (delta * (-entropy).exp()).clamp(max=epsilon)
    of_drafts = torch.where(drafts >= 0, p.gather(1, drafts.clamp(min=0)), 0.0)
    best, index = of_drafts.max(-1, keepdim=True)
    taken = torch.where(best > least, drafts.gather(1, index), drawn[:, None])[:, 0]
    return torch.where(drawn >= 0, taken, -1)


def _probabilities(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed-point weights [N, V] int64 and probabilities [N, V] float64 of logits."""
    weights = fixed_point_weights(x, x.amax(-1, keepdim=True), weight_bits(x.shape[1]))
    return weights, weights.double() / weights.sum(-1, keepdim=True).double()


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.amax(-1).isfinite()


def _chunks(x_NV: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // x_NV.shape[1])
    return [slice(begin, begin + step) for begin in range(0, x_NV.shape[0], step)]


def follow_chains(hits_QW: torch.Tensor) -> torch.Tensor:
    """[Q] int64 number of accepted drafts of chains.

    hits_QW: [Q, W] bool, whether draft i of a request is the token of the row before it; False behind the last draft.
    """
    return hits_QW.to(torch.int64).cumprod(-1).sum(-1)


def follow_trees(hits_QW: torch.Tensor, parents_QW: torch.Tensor, max_depth: int) -> torch.Tensor:
    """[Q] int64 the last accepted node of each tree, counted from 1; 0 where no draft is accepted.

    Args:
        hits_QW: [Q, W] bool, whether draft i is the token of its parent's row; False behind the last draft.
        parents_QW: [Q, W] int64, each draft's parent counted from 1, 0 for the last known token.
        max_depth: of any tree, >= 1.
    """
    num_requests, width = hits_QW.shape
    root = torch.ones(num_requests, 1, dtype=torch.bool, device=hits_QW.device)
    alive = hits_QW & (parents_QW == 0)
    for _ in range(max_depth - 1):
        alive = hits_QW & torch.cat([root, alive], 1).gather(1, parents_QW)
    # Nodes are in order of depth and siblings differ, so the last accepted one is the deepest.
    numbers = torch.arange(1, width + 1, device=hits_QW.device)
    return torch.where(alive, numbers, 0).amax(-1)


def expected_accepted(rate: float, num_drafts: int) -> float:
    """Mean number of accepted drafts of a chain whose drafts are each accepted with probability `rate`, given those before."""
    return float(num_drafts) if rate >= 1 else rate * (1 - math.pow(rate, num_drafts)) / (1 - rate)
