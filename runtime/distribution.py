"""Row-wise arithmetic of the sampler, exact to the last bit whatever rows are computed beside a row.

A sum of floats depends on its order, and a GPU chooses the order by the shape of the whole tensor: `logsumexp`, `softmax`
and `cumsum` of a row may change with the number of rows. Sums of integers do not depend on any order, so a row of logits
becomes fixed-point weights first, of as many bits as a sum over the vocabulary leaves room for:

    w = floor(exp(x - max(x)) * 2^b)        b = 62 - ceil(log2 V), 45 for V = 128,256;  sum(w) <= 2^62

All else is elementwise, a maximum, or a selection by value. A token 2^b times less likely than the likeliest has weight 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch

_BLOCK = 256
_CHUNK_ELEMENTS = 1 << 24
"""Rows are taken in pieces of so many logits, so that their 64-bit weights take 128 MiB and not a multiple of the logits."""
_LOW_HALF = (1 << 31) - 1


def weight_bits(vocab_size: int) -> int:
    """The number b of the module's formula."""
    return 62 - (vocab_size - 1).bit_length()


def fixed_point_weights(x_NV: torch.Tensor, max_N1: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, V] int64 `floor(exp(x - max) * 2^bits)` of float32 logits; undefined in rows whose maximum is not finite."""
    return (x_NV - max_N1).exp_().mul_(2.0**bits).to(torch.int64)


def greedy_tokens(logits_RV: torch.Tensor) -> torch.Tensor:
    """[R] int64: the most likely token of each row (the lowest id among equals), -1 where the maximum is not finite."""
    if logits_RV.device.type == "cpu":  # over a large vocabulary NumPy's argmax takes a quarter of the time
        logits = logits_RV.float().numpy()  # which has no bfloat16
        best = logits.argmax(1)
        return torch.from_numpy(np.where(np.isfinite(logits[np.arange(len(best)), best]), best, -1))
    values, indices = logits_RV.max(-1)
    return torch.where(values.isfinite(), indices, -1)


def cut_threshold(
    x_NV: torch.Tensor,
    low: torch.Tensor | None,
    k: torch.Tensor,
    p: torch.Tensor | None,
    width: int,
    any_unlimited: bool,
) -> torch.Tensor:
    """[N, 1] smallest logit that survives `low` (min_p), then top_k, then top_p.

    Args:
        low: [N, 1] least logit allowed so far, or None.
        k: [N, 1] int64, V where off.
        p: [N, 1] float64, infinite where off (then k is below V); None where no row asks.
        width: how many of the largest logits to look at; at least every k that is below V.
        any_unlimited: whether some row has k = V. If that row also has p, and width is below V, the host waits for the
            device to learn whether the largest logits hold enough mass; rows where they do not are sorted in full.
    """
    vocab_size = x_NV.shape[1]
    full = width >= vocab_size
    top = x_NV.sort(-1, descending=True).values if full else x_NV.topk(width, -1).values
    alive = torch.arange(top.shape[1], device=x_NV.device)[None] < k
    if low is not None:
        alive &= top >= low
    uncovered = None
    if p is not None:
        weight = fixed_point_weights(top, top[:, :1], weight_bits(vocab_size)).masked_fill_(~alive, 0)
        running = weight.cumsum(-1)
        total = running[:, -1:]
        if any_unlimited and not full:
            total = torch.where(k >= vocab_size, _mass(x_NV, low, top[:, :1]), total)
        wanted = p * total.double()
        if any_unlimited and not full:
            short = running[:, -1:].double() < wanted
            uncovered = (alive[:, -1:] & (k >= vocab_size) & p.isfinite() & short)[:, 0]
        alive &= (running - weight).double() < wanted
    kept = alive.sum(-1, keepdim=True).clamp_(min=1)
    threshold = top.gather(-1, kept - 1)
    if uncovered is not None and bool(uncovered.any()):
        rows = uncovered.nonzero()[:, 0]
        rest = cut_threshold(x_NV[rows], None if low is None else low[rows], k[rows], p[rows] if p is not None else None,
                             vocab_size, True)  # fmt: skip
        threshold.index_copy_(0, rows, rest)
    return threshold


def _mass(x_NV: torch.Tensor, low: torch.Tensor | None, max_N1: torch.Tensor) -> torch.Tensor:
    """[N, 1] int64 sum of the weights of logits that are not below `low`."""
    sums = []
    for begin in range(0, x_NV.shape[0], _num_rows(x_NV)):
        rows = slice(begin, begin + _num_rows(x_NV))
        weights = fixed_point_weights(x_NV[rows], max_N1[rows], weight_bits(x_NV.shape[1]))
        if low is not None:
            weights.masked_fill_(x_NV[rows] < low[rows], 0)
        sums.append(weights.sum(-1, keepdim=True))
    return torch.cat(sums)


def _num_rows(x_NV: torch.Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // x_NV.shape[1])


def draw_tokens(x_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """[N] int64: a token from softmax(x) of each row, the one at `uniform` of the cumulative distribution.

    Args:
        x_NV: [N, V] float32 logits; minus infinity is never drawn.
        uniform_N: [N] float64 in [0, 1).

    A row whose maximum is not finite gives -1.
    """
    tokens = []
    for x, uniform in zip(x_NV.split(_num_rows(x_NV)), uniform_N.split(_num_rows(x_NV))):
        largest = x.amax(-1, keepdim=True)
        token = invert_cumulative(fixed_point_weights(x, largest, weight_bits(x.shape[1])), uniform)
        tokens.append(torch.where(largest[:, 0].isfinite(), token, -1))
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens)


def invert_cumulative(weights_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """[N] int64: the token at which each row's cumulative sum first exceeds `uniform` times its total, in two levels.

    Args:
        weights_NV: [N, V] int64, not negative, with sums up to 2^62.
        uniform_N: [N] float64 in [0, 1).

    A token of weight zero is never chosen; a row whose weights are all zero gives -1.
    """
    vocab_size = weights_NV.shape[1]
    split = vocab_size - vocab_size % _BLOCK
    sums = weights_NV[:, :split].unflatten(1, (-1, _BLOCK)).sum(-1) if split else weights_NV[:, :0]
    if split < vocab_size:
        sums = torch.cat([sums, weights_NV[:, split:].sum(-1, keepdim=True)], 1)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniform_N[:, None] * total.double()).to(torch.int64), total - 1)
    block = (cumulative <= target).sum(-1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0)
    index = block * _BLOCK + torch.arange(_BLOCK, device=weights_NV.device)
    inside = weights_NV.gather(1, index.clamp(max=vocab_size - 1)).masked_fill_(index >= vocab_size, 0).cumsum(-1)
    token = block * _BLOCK + (inside <= target - before).sum(-1, keepdim=True)
    return torch.where(total > 0, token, -1)[:, 0]


def token_logprobs(
    logits_NV: torch.Tensor, tokens_N: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top tokens [N, k], their log-probabilities [N, k], and log-probability [N] and rank [N] of the given tokens.

    Ids are int64, log-probabilities float32, k is `num_top` or the vocabulary's size. Among equal logits the lower id comes
    first. The logits may be of any float dtype; where a row's maximum is not finite, its log-probabilities are NaN.
    """
    rows = _num_rows(logits_NV)
    parts = [_token_logprobs(x.float(), t, num_top) for x, t in zip(logits_NV.split(rows), tokens_N.split(rows))]
    if len(parts) == 1:
        return parts[0]
    top_ids, top_logprobs, logprobs, ranks = (torch.cat(part) for part in zip(*parts))
    return top_ids, top_logprobs, logprobs, ranks


def _token_logprobs(
    x_NV: torch.Tensor, tokens_N: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    bits = weight_bits(x_NV.shape[1])
    largest = x_NV.amax(-1, keepdim=True)
    total = fixed_point_weights(x_NV, largest, bits).sum(-1, keepdim=True)
    log_total = torch.where(largest.isfinite(), total.double().log() - bits * math.log(2), math.nan)

    def logprobs(x: torch.Tensor) -> torch.Tensor:
        return ((x - largest).double() - log_total).float()

    chosen = x_NV.gather(1, tokens_N[:, None])
    ranks = (x_NV > chosen).sum(-1) + 1
    top_ids = _largest_ids(x_NV, num_top)
    return top_ids, logprobs(x_NV.gather(1, top_ids)), logprobs(chosen)[:, 0], ranks


def _largest_ids(x_NV: torch.Tensor, num_top: int) -> torch.Tensor:
    """[N, k] ids of the largest logits. `topk` may order and choose equal values as it likes, so it gets unequal ones:

    key = (bits of the float32, as an integer of the same order) * 2^32 + (2^31 - 1 - id)
    """
    vocab_size = x_NV.shape[1]
    if num_top == 0:
        return torch.empty(x_NV.shape[0], 0, dtype=torch.int64, device=x_NV.device)
    bits = (x_NV + 0.0).view(torch.int32)  # + 0.0: no negative zero
    order = torch.where(bits < 0, bits ^ _LOW_HALF, bits).to(torch.int64)
    ids = torch.arange(vocab_size, device=x_NV.device)
    keys = order.mul_(1 << 32).add_(_LOW_HALF - ids)
    return _LOW_HALF - (keys.topk(min(num_top, vocab_size), -1).values & _LOW_HALF)
