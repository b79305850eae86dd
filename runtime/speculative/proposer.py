"""The interface of everything that drafts: `Proposer`.

One proposer serves one LLM, on its serving thread. A step with speculation goes like this:

    propose(targets)                  drafts for each request, after its last known token
    (verification, acceptance)        the target's step over [last token, drafts], one row of logits each
    observe(verified)                 what was accepted, and hidden states if `hidden_layers` asks for them

Drafts of a chain are d0 d1 d2 ...; those of a tree name each node's parent, -1 for children of the last known token:

    tokens   [a, b, c, d]             last -- a -- c
    parents  [-1, -1, 0, 1]                `-- b -- d
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ..batch import Engine
from ..logits import SamplingState
from ..request import Request

if TYPE_CHECKING:
    from .config import SpeculativeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerContext:
    """What a proposer is made for."""

    config: SpeculativeConfig
    engine: Engine
    """The target."""
    draft_engine: Engine | None
    """Of method draft, with its KV cache bound: block b of it goes with block b of the target."""


@dataclass(frozen=True, slots=True)
class Target:
    """A request that is to be drafted for."""

    request: Request
    """All its tokens are known, and all but the last are computed. Its blocks have room for `num_drafts` more."""
    state: SamplingState
    num_drafts: int
    """Most tokens to draft, >= 1; fewer, or none, are legal. For a tree: most nodes, those of the config's tree or the first of
    them."""


@dataclass(slots=True)
class Drafts:
    """Drafts for some targets, in their order."""

    lengths: Sequence[int]
    """[S] drafts of each target."""
    token_ids: Sequence[Sequence[int]] | torch.Tensor
    """[S][lengths[s]] on the host; or [S, K] int64 on the device, K >= max(lengths), what is behind a length undefined."""
    logits: torch.Tensor | None = None
    """[S, K, V] float32 logits whose softmax each draft was drawn from (temperature and cuts applied, minus infinity for what
    cannot be drawn); None: the drafts are certain, not drawn."""
    drawn: Sequence[bool] = ()
    """[S] whether a target's drafts were drawn from `logits`; all others are certain."""
    parents: Sequence[Sequence[int]] | None = None
    """[S][lengths[s]] node of each draft's parent, -1 for the last known token, ascending by depth; None: chains."""


@dataclass(slots=True)
class Verified:
    """What verification made of the rows of a step, for every request whose tokens were sampled in it.

    Rows are given for requests without drafts, too: a proposer on hidden states needs each token's.
    """

    request: Request
    num_drafts: int
    """Drafts that were verified."""
    num_accepted: int
    """How many of them became output."""
    hidden: torch.Tensor | None = None
    """[1 + num_accepted, layers, H] hidden states of the last known token and the accepted drafts, on the device."""


class Proposer(Protocol):
    """Drafts tokens; see the module. Whatever a method raises fails the requests of the step."""

    hidden_layers: tuple[int, ...]
    """Layers whose hidden states `observe` wants, () for none."""

    def add(self, request: Request, state: SamplingState) -> None:
        """Takes note of a new request that may speculate."""

    def release(self, request_id: str) -> None:
        """Forgets a request that has ended; harmless for an unknown one."""

    def propose(self, targets: Sequence[Target]) -> Drafts:
        """Drafts for each target; work on the device is launched, not waited for, where that is possible."""
        ...

    def observe(self, verified: Sequence[Verified]) -> None:
        """Takes in a step's outcome; called before the next `propose`, only where `hidden_layers` is not empty or the
        request was drafted for."""
