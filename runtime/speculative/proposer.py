"""The interface of everything that drafts: `Proposer`.

One proposer serves one LLM, on its serving thread. A step with speculation goes like this:

    propose(targets)                  drafts for each request, after its last known token
    (verification, acceptance)        the target's step over [last token, drafts], one row of logits each
    observe(verified)                 what was accepted, and hidden states if `hidden_layers` asks for them

Drafts of a chain are d0 d1 d2 ...; those of a tree name each node's parent, -1 for children of the last known token:

    tokens   [a, b, c, d]             last -- a -- c
    parents  [-1, -1, 0, 1]                `-- b -- d

A proposer with `hidden_layers` reads the target's hidden states. `observe` brings it those of every row that is part of a text:
prompts (a chunk at a time, as they are computed), last known tokens, accepted drafts. So it sees each position of a running request
once, in order, with two exceptions, for which it needs its own answer:

- What the prefix cache holds is not computed again, and its rows are not seen: a request's first rows begin at the end of the hit.
  A proposer that keeps keys and values of its own has them in blocks of the same numbers as the target's (as `DraftModelProposer`
  does), so that what is found there was computed with the same tokens in front of it.
- A preempted request loses its blocks (`request.num_preemptions` counts up) and is computed again from its beginning, or from the
  end of another hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ..batch import Engine
from ..logits import SamplingState
from ..packing import upload
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
    hidden: torch.Tensor | None = None
    """Of an early exit: [S, K, H] what `Engine.draft` gave for the last known token and each draft but the last, undefined behind
    a length; verification goes on from there (`Batch.early`)."""


@dataclass(slots=True)
class Verified:
    """What a step made of a request's rows: its drafts, and the rows that are part of its text now.

    With hidden states it is given for every request that runs on, whether it was drafted for or not, and whether a token was
    sampled or a part of the prompt computed; otherwise for those with drafts alone. The text has a token behind the last row: the
    one that was sampled, or the prompt's next.
    """

    request: Request
    num_drafts: int
    """Drafts that were verified."""
    num_accepted: int
    """How many of them became output."""
    start: int = 0
    """Position of the first row; the token of row i is `request.all_token_ids[start + i]`."""
    nodes: Sequence[int] = ()
    """[num_accepted] numbers of the accepted drafts, ascending: 0, 1 ... for a chain, those of the branch for a tree."""
    states: torch.Tensor | None = None
    """[T, layers, H] hidden states of the whole step, in the order of the proposer's `hidden_layers`, on the device; one tensor for
    all requests of a step, which nobody writes to afterwards. None where `hidden_layers` is empty and for requests that ended."""
    rows: Sequence[int] = ()
    """The request's rows of `states`, by position."""

    @property
    def hidden(self) -> torch.Tensor | None:
        """[len(rows), layers, H] the request's own hidden states."""
        if self.states is None:
            return None
        if isinstance(self.rows, range):
            return self.states[self.rows.start : self.rows.stop]
        return self.states.index_select(0, upload(np.array(self.rows, dtype=np.int64), self.states.device))


class Proposer(Protocol):
    """Drafts tokens; see the module. Whatever a method raises fails the requests of the step."""

    hidden_layers: tuple[int, ...]
    """Hidden states that `observe` wants, as `camshaft.compile(hidden_layers=...)` numbers them; () for none."""

    def add(self, request: Request, state: SamplingState) -> None:
        """Takes note of a new request that may speculate."""

    def release(self, request_id: str) -> None:
        """Forgets a request that has ended; harmless for an unknown one."""

    def propose(self, targets: Sequence[Target]) -> Drafts:
        """Drafts for each target; work on the device is launched, not waited for, where that is possible."""
        ...

    def observe(self, verified: Sequence[Verified]) -> None:
        """Takes in a step's outcome; called before the next `propose`, for requests that were added, only where `hidden_layers` is
        not empty or the request was drafted for. While no drafts are wanted, steps are planned ahead: then the step behind this one
        is on the device already."""
