"""Drafts from the target's own first layers (LayerSkip, Elhoushi et al. 2024, section 4): self speculation.

    draft    | last |   layers 0 .. k-1 -> hidden, exit -> d0
             |  d0  |   layers 0 .. k-1 -> hidden, exit -> d1        a step for each draft, all requests in a batch
    verify   | last d0 d1 |   d1 through layers 0 .. k-1; then all three from their hidden states through layers k .. n-1

Drafting writes the keys and values of its layers where the target's own would be, and keeps its hidden states: verification goes on
from both, so that nothing is computed twice, and there is neither a second cache nor a second set of weights. Whatever the target
has computed, its first layers have, too: there is nothing to catch up on, whether prompts were computed or found in the prefix
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..batch import Engine
from ..batch_builder import BatchBuilder
from ..logits import SamplingState
from ..packing import upload
from ..plan import ScheduledRequest, StepPlan
from ..request import Request, RequestStatus
from .config import SpeculativeConfig
from .draws import Draws
from .proposer import Drafts, ProposerContext, Target, Verified


class EarlyExitProposer:
    """Drafts by the exit of an engine that was built with `early_exit`."""

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, context: ProposerContext) -> None:
        """Raises ValueError for an engine without the exit that the config names."""
        check_exit(context.config, context.engine)
        self._engine: Any = context.engine
        self._draws = Draws(context.config, context.engine.vocab_size, context.engine.device)
        self._requests: dict[str, tuple[Request, int]] = {}
        """Live requests, and how often each had been preempted when it was last drafted for."""
        self._num_steps = 0
        self._builder = BatchBuilder(
            num_groups=len(context.engine.cache_groups), block_size=context.engine.block_size,
            max_seq_len=context.engine.max_seq_len, max_sequences=context.engine.max_sequences, device=context.engine.device,
        )  # fmt: skip

    def add(self, request: Request, state: SamplingState) -> None:
        """Prepares the request's own draws."""
        self._requests[request.request_id] = request, 0
        self._draws.add(request.request_id, state)

    def release(self, request_id: str) -> None:
        """Forgets a request."""
        if self._requests.pop(request_id, None) is not None:
            self._draws.release(request_id)
            self._builder.release(request_id)

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing to learn: the target's caches are those that drafting reads."""

    @torch.inference_mode()
    def propose(self, targets: Sequence[Target]) -> Drafts:
        """Drafts of the wanted lengths for all targets, with the hidden states that verification goes on from."""
        self._make_rows(targets)
        wanted = np.array([target.num_drafts for target in targets], dtype=np.int64)
        width = int(wanted.max())
        chains = self._draws.begin(targets, width)
        hidden_SKH: torch.Tensor | None = None
        chosen: torch.Tensor | None = None
        for number in range(width):
            places = np.flatnonzero(wanted > number)
            logits_RV, states_R1H = self._step([targets[i].request for i in places.tolist()], number, chosen)
            if hidden_SKH is None:
                hidden_SKH = states_R1H.new_empty(len(targets), width, states_R1H.shape[2])
            if len(places) == len(targets):
                hidden_SKH[:, number] = states_R1H[:, 0]
            else:
                hidden_SKH[upload(places, hidden_SKH.device), number] = states_R1H[:, 0]
            chosen = chains.choose(logits_RV, number, places)
        return chains.drafts(hidden_SKH)

    def _step(
        self, requests: Sequence[Request], number: int, in_flight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [R, V] of the exit and hidden states [R, 1, H] of each request's last known token (number 0), or of the draft that
        was chosen last."""
        self._num_steps += 1
        starts = np.array([request.num_tokens - 1 + number for request in requests], dtype=np.int64)
        if in_flight is None:
            rows = tuple(ScheduledRequest(request, int(start), 1) for request, start in zip(requests, starts))
            plan = StepPlan(self._num_steps, rows, len(rows))
        else:
            plan = StepPlan(self._num_steps, (), len(requests), decodes=tuple(requests), starts=starts, on_top=True)
        logits, states = self._engine.draft(self._builder.build(plan, in_flight))
        return logits, states

    def _make_rows(self, targets: Sequence[Target]) -> None:
        """Takes places in the batch builder's tables from requests that lost their blocks."""
        for target in targets:
            request = target.request
            if self._requests[request.request_id][1] != request.num_preemptions:
                self._builder.release(request.request_id)
                self._requests[request.request_id] = request, request.num_preemptions
        if self._builder.num_free_rows < len(targets):
            for request, _ in self._requests.values():
                if request.status is not RequestStatus.RUNNING:
                    self._builder.release(request.request_id)


def check_exit(config: SpeculativeConfig, engine: Engine) -> None:
    """Raises ValueError where an engine has no early exit, or another one than a config of method self names."""
    found: int | None = getattr(engine, "early_exit", None)
    wanted = config.exit_layer
    if found is None:
        raise ValueError(
            f"method 'self' drafts by the model's first layers and the engine was built without an early exit; compile it with "
            f"early_exit={'a number of layers' if wanted is None else wanted}"
        )
    if wanted is not None and wanted != found:
        raise ValueError(
            f"exit_layer is {wanted} and the engine was built with early_exit={found}; allowed: {found}, or compile it with "
            f"early_exit={wanted}"
        )


def exit_option(config: SpeculativeConfig) -> int | str | None:
    """What a model is compiled with as `early_exit` for a config of method self. Raises ValueError where it does not say."""
    if config.method != "self":
        return None
    option = config.exit_layer if config.model is None else config.model
    if option is None:
        raise ValueError(
            "method 'self' needs exit_layer=, the number of layers that draft, to compile the model; about half of them"
        )
    assert isinstance(option, (int, str))
    return option
