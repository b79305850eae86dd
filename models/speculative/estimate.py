"""Accepted lengths by teacher forcing: the target's own greedy texts, walked as verification would."""

from __future__ import annotations

import torch
from torch import Tensor

from .objectives import Objective, Target


def mean_accepted_length(hits_BTK: Tensor, first: int) -> float:
    """Tokens per verification, the target's own included.

    hits_BTK: [B, T, K] bool, whether draft k after token i is right. first: the last token that is known at the beginning.
    """
    accepted = hits_BTK.to(torch.int64).cumprod(-1).sum(-1).tolist()
    num_drafts, num_verifications, num_tokens = hits_BTK.shape[-1], 0, 0
    for row in accepted:
        at = first
        while at + num_drafts < len(row):
            num_verifications += 1
            num_tokens += 1 + row[at]
            at += 1 + row[at]
    return num_tokens / max(num_verifications, 1)


@torch.no_grad()
def estimate(
    objective: Objective, target: Target, texts: Tensor, first: int, num_drafts: int, rows: int = 16
) -> tuple[float, list[float]]:
    """(mean accepted length, share of right drafts at each position given those before) on greedy texts [B, T] of the target.

    rows: texts at a time.
    """
    hits = torch.cat(
        [objective.hits(target.features(part, objective.layers), num_drafts).cpu() for part in texts.split(rows)]
    )
    inside = hits[:, first : hits.shape[1] - num_drafts].flatten(0, 1).double()
    reached = torch.cat([torch.ones_like(inside[:, :1]), inside.cumprod(-1)], -1).sum(0)
    return mean_accepted_length(hits, first), (reached[1:] / reached[:-1].clamp(min=1)).tolist()
