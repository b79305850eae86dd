"""Drafts from a smaller model with the target's tokenizer (Leviathan et al. 2023, section 2; Chen et al. 2023).

The draft engine's KV cache has as many blocks as the target's, and block b of it belongs to whoever has block b of the target:
one pool of blocks, one table per request, and nothing more to allocate, share or evict. Its content is tracked apart, since the
draft model lags behind the target:

    target   | computed ..................................... | last token |
    draft    | computed .......... | to catch up ............ | last token | d0 | d1 |

The step that catches up samples d0, one step more each further draft, all requests in a batch. Tokens stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..batch import Engine
from ..batch_builder import BatchBuilder
from ..logits import SamplingState
from ..packing import upload
from ..plan import ScheduledRequest, StepPlan
from ..request import Request, RequestStatus
from .draws import Draws
from .proposer import Drafts, ProposerContext, Target, Verified

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Progress:
    """How far the draft model has come with a request."""

    request: Request
    computed: int = -1
    """Leading tokens whose keys and values are right; -1 before the first drafts."""
    num_preemptions: int = 0
    drafted_at: int = 0
    """Tokens that the request had when it was last drafted for, and the drafts it then got."""
    num_drafted: int = 0


class DraftModelProposer:
    """Drafts by an engine of its own, in steps over all requests at once."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, context: ProposerContext) -> None:
        assert context.draft_engine is not None, "method draft comes with an engine"
        self._engine = engine = context.draft_engine
        self._device = engine.device
        self._vocab_size = context.engine.vocab_size
        self._table = full_group(context.engine)
        self._draws = Draws(context.config, self._vocab_size, self._device)
        self._requests: dict[str, _Progress] = {}
        self._contents: dict[int, bytes] = {}
        """Block of the shared table -> hash of the tokens that the draft model has computed in it."""
        self._num_steps = 0
        self._builder = BatchBuilder(
            num_groups=len(engine.cache_groups), block_size=engine.block_size, max_seq_len=engine.max_seq_len,
            max_sequences=engine.max_sequences, device=self._device, tables=[self._table] * len(engine.cache_groups),
        )  # fmt: skip

    def add(self, request: Request, state: SamplingState) -> None:
        """Prepares the request's own draws."""
        self._requests[request.request_id] = _Progress(request)
        self._draws.add(request.request_id, state)

    def release(self, request_id: str) -> None:
        """Forgets a request; what was computed for it stays in its blocks."""
        if self._requests.pop(request_id, None) is not None:
            self._draws.release(request_id)
            self._builder.release(request_id)

    # --- drafting -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def propose(self, targets: Sequence[Target]) -> Drafts:
        """Drafts of the wanted lengths for all targets."""
        width = max(target.num_drafts for target in targets)
        chains = self._draws.begin(targets, width)
        self._make_rows(len(targets))
        places = np.arange(len(targets))
        chosen = chains.choose(self._catch_up(targets), 0, places)
        batch = tuple(target.request for target in targets)
        starts = np.array([target.request.num_tokens - 1 for target in targets], dtype=np.int64)
        for number in range(1, width):
            kept = np.array(
                [n for n, i in enumerate(places.tolist()) if targets[i].num_drafts > number], dtype=np.int64
            )
            if len(kept) < len(places):
                places = places[kept]
                batch = tuple(targets[i].request for i in places.tolist())
                chosen = self._keep(upload(kept, self._device), chosen)
            logits = self._step(batch, starts[places] + number, chosen)
            chosen = chains.choose(logits, number, places)
        for target in targets:
            progress = self._requests[target.request.request_id]
            progress.computed = progress.drafted_at = target.request.num_tokens
            progress.num_drafted = target.num_drafts
        return chains.drafts()

    def _keep(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The tokens of those rows of the last step that are drafted for in the next one."""
        return chosen.index_select(0, rows)

    # --- steps of the draft engine ------------------------------------------------------------------------------

    def _catch_up(self, targets: Sequence[Target]) -> torch.Tensor:
        """[S, V] logits after the last known token of every target, what comes before it computed in as many steps as needed."""
        requests = [target.request for target in targets]
        last = self._compute(
            [(request, self._begin(request), request.num_tokens) for request in requests], samples=True
        )
        for request in requests:
            self._learn(request, request.num_tokens)
        return last[0] if len(last) == 1 else torch.cat(last)

    def _compute(self, pending: Sequence[tuple[Request, int, int]], *, samples: bool) -> list[torch.Tensor]:
        """Computes (request, first token, end) in as many steps as needed; logits of the last tokens if it `samples`, by step."""
        last: list[torch.Tensor] = []
        budget = self._engine.max_batch_tokens
        rows: list[ScheduledRequest] = []
        for request, start, end in pending:
            while start < end:
                if not budget:
                    last += self._run(rows)
                    rows, budget = [], self._engine.max_batch_tokens
                count = min(budget, end - start)
                ends = samples and start + count == end
                rows.append(ScheduledRequest(request, start, count, 0, int(ends), ends))
                start, budget = start + count, budget - count
        return last + self._run(rows)

    def _run(self, rows: Sequence[ScheduledRequest]) -> list[torch.Tensor]:
        """Logits of the rows that end in this step; [] if none does."""
        plan = StepPlan(self._next_id(), tuple(rows), sum(row.num_tokens for row in rows))
        logits = self._forward(plan, None)
        return [self._fit(logits).clone()] if any(row.samples for row in rows) else []

    def _step(self, requests: tuple[Request, ...], starts: Ints, in_flight: torch.Tensor) -> torch.Tensor:
        """[R, V] logits after one more token of each request: the one sampled last."""
        plan = StepPlan(self._next_id(), (), len(requests), decodes=requests, starts=starts, on_top=True)
        return self._fit(self._forward(plan, in_flight))

    def _forward(self, plan: StepPlan, in_flight: torch.Tensor | None) -> torch.Tensor:
        """Logits [R, V'] of a step of the draft engine. in_flight: [D] tokens of the plan's decodes; None where they are known."""
        return self._engine.step(self._builder.build(plan, in_flight, in_order=True))

    def _next_id(self) -> int:
        self._num_steps += 1
        return self._num_steps

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over the target's vocabulary: models of one tokenizer may pad theirs differently."""
        missing = self._vocab_size - logits.shape[1]
        if missing <= 0:
            return logits[:, : self._vocab_size]
        return torch.nn.functional.pad(logits.float(), (0, missing), value=float("-inf"))

    def _make_rows(self, num_targets: int) -> None:
        """Takes the places in the batch builder's tables from requests that lost their blocks."""
        if self._builder.num_free_rows < num_targets:
            for progress in self._requests.values():
                if progress.request.status is not RequestStatus.RUNNING:
                    self._builder.release(progress.request.request_id)
                    progress.computed = -1

    # --- what is computed ---------------------------------------------------------------------------------------

    def _begin(self, request: Request) -> int:
        """The first token of the request that the draft model has to compute now."""
        progress = self._requests[request.request_id]
        if progress.computed < 0 or progress.num_preemptions != request.num_preemptions:
            self._builder.release(request.request_id)
            progress.num_preemptions = request.num_preemptions
            progress.computed = self._found(request)
        return min(progress.computed, request.num_tokens - 1)

    def _found(self, request: Request) -> int:
        """Leading tokens that earlier requests have left in the request's blocks."""
        size = self._engine.block_size
        hashes = request.block_hashes.get(size, [])
        found = 0
        for block, content in zip(request.block_ids[self._table], hashes):
            if self._contents.get(block) != content:
                break
            found += 1
        return found * size

    def _learn(self, request: Request, end: int) -> None:
        """Notes the full blocks that the draft model has now computed, those of the tokens up to `end`."""
        size = self._engine.block_size
        hashes = request.block_hashes.get(size, [])
        full = slice(max(self._requests[request.request_id].computed, 0) // size, end // size)
        for block, content in zip(request.block_ids[self._table][full], hashes[full]):
            self._contents[block] = content

    def observe(self, verified: Sequence[Verified]) -> None:
        """The drafts that were accepted are computed already, except for the last one of a proposal."""
        for item in verified:
            progress = self._requests.get(item.request.request_id)
            if progress is not None:
                progress.computed = progress.drafted_at + min(item.num_accepted, progress.num_drafted - 1)


def full_group(target: Engine) -> int:
    """The target's cache group whose blocks the draft model shares: one of full attention, whose blocks stay.

    Raises ValueError where there is none: blocks behind a window are given back before a draft model that starts later, with the
    prompt, has computed what they hold.
    """
    for number, group in enumerate(target.cache_groups):
        if group.window == 0:
            return number
    raise ValueError(
        f"all layers of the target have windows ({[group.window for group in target.cache_groups]} tokens), so no blocks hold "
        "the whole text for a draft model; use method 'ngram'"
    )
