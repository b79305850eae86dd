"""Drafts from an EAGLE-3 layer (Li et al. 2025): a draft model that reads the target's hidden states beside the tokens.

The layer is an engine of its own, with keys and values in blocks of the target's numbers, as a draft model's. Its row at position
p holds token p and the target's hidden state in front of it, f_(p-1):

    verified     | t0    t1    ..  t(n-1) |             rows with the target's hidden states; computed once, after verification
                   0     f0        f(n-2)
    drafted                                 d0     d1   rows with the draft's own, g; computed again once they are verified
                                            g(n-1) g(n)

So each proposal computes the tokens that the last verification brought, and from there one draft after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...models.speculative.eagle import capture_layers, read_eagle
from ..plan import StepPlan
from ..request import RequestStatus
from .draft_model import DraftModelProposer
from .hidden_store import HiddenStore
from .proposer import ProposerContext, Target, Verified


class EagleProposer(DraftModelProposer):
    """Drafts by a compiled EAGLE-3 layer."""

    def __init__(self, context: ProposerContext) -> None:
        super().__init__(context)
        draft = read_eagle(Path(str(context.config.model)))
        engine: Any = context.engine
        self.hidden_layers = capture_layers(draft.config, len(engine.manifest.cache.layers))
        check_width(draft.fc.weight.shape[1], len(self.hidden_layers), engine.manifest.model.hidden_size)
        draft_engine: Any = self._engine
        dtype = getattr(torch, draft_engine.config.dtype)
        self._fc = draft.fc.weight.to(self._device, dtype)
        whole = draft.config.draft_vocab_size == draft.config.vocab_size
        self._tokens = None if whole else draft.draft_tokens.to(self._device)
        self._store = HiddenStore(self._fc.shape[0], dtype, self._device)
        self._ends: list[torch.Tensor] = []
        self._own = self._fc[:0]
        """[R, H] hidden states that the last step gave to the rows that it sampled."""

    def release(self, request_id: str) -> None:
        """Forgets a request; what was computed for it stays in its blocks."""
        super().release(request_id)
        self._store.release(request_id)

    # --- the target's hidden states -----------------------------------------------------------------------------

    @torch.inference_mode()
    def observe(self, verified: Sequence[Verified]) -> None:
        """Keeps the hidden states of tokens that are part of their texts, until the layer reads them."""
        given = [item for item in verified if item.states is not None and item.request.request_id in self._requests]
        if not given:
            return
        states = given[0].states
        assert states is not None
        features = torch.nn.functional.linear(states.flatten(1).to(self._fc.dtype), self._fc)
        self._store.add(features, [(item.request.request_id, item.start, item.rows) for item in given])
        if self._store.num_rows > self._engine.max_batch_tokens:
            self._advance()

    def _advance(self) -> None:
        """Computes what waits, so that long prompts, and texts that are not drafted for, do not pile up."""
        pending = []
        for name, progress in self._requests.items():
            request = progress.request
            if request.status is not RequestStatus.RUNNING:
                self._store.release(name)
                continue
            end = min(self._store.end(name) + 1, request.num_tokens, request.num_computed_tokens)
            if end > 1:
                pending.append((request, end))
        self._make_rows(len(pending))
        self._compute([(request, min(self._begin(request), end), end) for request, end in pending], samples=False)
        for request, end in pending:
            self._learn(request, end)
            self._computed_to(request.request_id, end)

    def _computed_to(self, name: str, end: int) -> None:
        """Rows up to `end` are computed; the last may be wanted again, for its logits."""
        progress = self._requests[name]
        progress.computed = max(progress.computed, end)
        self._store.drop(name, end - 2)

    # --- steps of the layer -------------------------------------------------------------------------------------

    def _catch_up(self, targets: Sequence[Target]) -> torch.Tensor:
        self._ends = []
        logits = super()._catch_up(targets)
        self._own = self._ends[0] if len(self._ends) == 1 else torch.cat(self._ends)
        for target in targets:
            self._computed_to(target.request.request_id, target.request.num_tokens)
        return logits

    def _keep(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        self._own = self._own.index_select(0, rows)
        return super()._keep(rows, chosen)

    def _forward(self, plan: StepPlan, in_flight: torch.Tensor | None) -> torch.Tensor:
        batch = self._builder.build(plan, in_flight, in_order=True)
        if in_flight is None:
            rows = [(row.request.request_id, row.start - 1, row.num_tokens) for row in plan.others]
            batch.hidden = self._store.gather(rows)
        else:
            batch.hidden = self._own
        engine: Any = self._engine
        logits, hidden = engine.step_outputs(batch)
        self._own = hidden[:, 0]
        if in_flight is None:
            self._ends.append(self._own.index_select(0, batch.sample_rows))
        return logits

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over the target's vocabulary; minus infinity for tokens that are never drafted."""
        if self._tokens is None:
            return super()._fit(logits)
        everything = logits.new_full((logits.shape[0], self._vocab_size), float("-inf"), dtype=torch.float32)
        return everything.index_copy_(1, self._tokens, logits.float())


def check_width(fc_inputs: int, num_layers: int, hidden_size: int | None) -> None:
    """Raises ValueError where a checkpoint's fc is not as wide as the target's captured hidden states."""
    if hidden_size is None or fc_inputs != num_layers * hidden_size:
        raise ValueError(
            f"the EAGLE checkpoint's fc reads {fc_inputs} numbers, and the target's {num_layers} captured hidden states have "
            f"{num_layers} x {hidden_size}; give a checkpoint that was trained for this target"
        )
