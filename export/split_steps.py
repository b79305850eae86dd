"""The steps of an engine with an early exit: drafts by its first layers, and their verification by the others.

    draft    token_ids -> layers 0 .. k-1 -> hidden [T, H] -> exit -> logits                     as often as there are drafts
    verify   hidden [T, H], kept from drafting -> layers k .. n-1, head -> logits               once
             ^ rows that were not drafted (prompts, last drafts) go through layers 0 .. k-1 first, in a batch of their own

See passes/split_early_exit.py for the graphs. All of them share weights, lowered segments and KV caches with the whole model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .buckets import VERIFY_SIZES
from .execution import Execution, Opened
from .manifest import Manifest
from .native_step import NativeStep, make_native_part
from .segment import Plan
from .step_outputs import StepOutputs

Caches = list[tuple[Tensor, Tensor]]


class _Part:
    """One graph: a native step where it fits, else an execution."""

    def __init__(self, execution: Execution, native: NativeStep | None) -> None:
        self.execution, self.native = execution, native

    def step(self, batch: Any) -> StepOutputs:
        if self.native is not None and self.native.takes(batch):
            return self.native.step_outputs(batch, self.execution.executor.caches)
        return self.execution.step(batch)


class SplitSteps:
    """The draft and verify graphs of a plan with the parts early, exit and late.

    opened: the engine of the plan. whole, native: what runs the whole plan.
    """

    def __init__(self, plan: Plan, opened: Opened, whole: Execution, native: NativeStep | None) -> None:
        def part(of: Plan) -> _Part:
            native_part = None if native is None else make_native_part(of, opened.manifest, native)
            return _Part(Execution(of, opened, like=whole), native_part)

        early, exit, late = (plan.parts[name] for name in ("early", "exit", "late"))
        self._draft = part(early.then(exit, {"hidden": early.outputs[0]}))
        self._early, self._late = part(early), part(late)
        self._parts = (self._draft, self._early, self._late)

    def bind_caches(self, caches: Caches) -> None:
        """Takes the KV tensors of all layers."""
        for part in self._parts:
            part.execution.bind_caches(caches)

    def capture(self, max_sequences: int, max_batch_tokens: int) -> None:
        """Has steps captured as CUDA graphs when their shape comes again."""
        for part in self._parts:
            part.execution.capture_later(max_sequences, captured_tokens(max_sequences, max_batch_tokens))

    def draft(self, batch: Any) -> StepOutputs:
        """Logits of the exit [R, V], and hidden states [T, 1, H] behind the first layers, whose keys and values are written."""
        return self._draft.step(batch)

    @torch.inference_mode()
    def verify(self, batch: Any) -> StepOutputs:
        """Logits of the whole model [R, V] for a batch whose `early` rows the first layers have computed; no hidden states."""
        early = batch.early
        hidden = early.hidden.new_empty(batch.token_ids.shape[0], early.hidden.shape[1])
        hidden.index_copy_(0, early.rows, early.hidden)
        if early.rest is not None:
            states = self._early.step(early.rest).hidden
            assert states is not None
            hidden.index_copy_(0, early.rest_rows, states[:, 0])
        logits = self._late.step(dataclasses.replace(batch, hidden=hidden, early=None)).logits
        return StepOutputs(logits)


def captured_tokens(max_sequences: int, max_batch_tokens: int) -> int:
    """Most tokens of a step that is captured: those that verify drafts, and one for each sequence."""
    return min(max_batch_tokens, max(VERIFY_SIZES[-1], max_sequences))


def graph_bytes(manifest: Manifest, plan: Plan, max_sequences: int) -> int:
    """Estimate of what the graphs' buffers take besides the whole plan's, in bytes."""
    width, dtype = plan.parts["late"].hidden_input or (0, torch.float32)
    tokens = captured_tokens(max_sequences, manifest.build.max_batch_tokens)
    hidden = 3 * tokens * width * dtype.itemsize
    return hidden + (max_sequences + VERIFY_SIZES[-1]) * manifest.model.vocab_size * dtype.itemsize
