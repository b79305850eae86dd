"""The executor: runs a Plan's steps on slots, with every segment bound to its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.dispatch import paged_attention
from .kernels.rope import Rope
from .kernels.state import AttentionState
from .segment import AttentionStep, Plan, SegmentStep
from .targets.base import Bound, Lowered


@dataclass(frozen=True)
class StepContext:
    """What attention needs of a step: per group (slot_mapping, block_tables), and the sequences' bounds."""

    groups: Sequence[tuple[Tensor, Tensor]]
    query_start: Tensor
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int
    tree_mask: Tensor | None = None
    """[T] int64 what rows of token trees see of their own sequence's rows, see kernels/reference.py; None: no trees."""


Operation = Callable[[list[Tensor | None], StepContext | None], None]


class Executor:
    """One pass through a plan. Slots are numbered; a slot is freed after its last reader.

    lowered: the segments by id. weights: name -> tensor on `device`. caches: (k, v) tensors per layer, may be set later. like: an
    executor of the same engine, whose segments are used where they are bound to the same weights.
    batch_invariant: attention's results of a token do not depend, to the last bit, on what else is in its step (CUDA).
    """

    def __init__(
        self,
        plan: Plan,
        lowered: Mapping[str, Lowered],
        weights: Mapping[str, Tensor],
        *,
        batch_invariant: bool = False,
        like: Executor | None = None,
    ) -> None:
        self._bound: dict[tuple[str, tuple[str, ...]], Bound] = {} if like is None else like._bound
        self.caches: list[tuple[Tensor, Tensor]] = []
        self._batch_invariant = batch_invariant
        self._attention_state = AttentionState()
        self._slots: dict[str, int] = {}
        self._inputs = [self._slot(name) for name in plan.inputs]
        last_use = _last_uses(plan)
        self._operations: list[Operation] = []
        for index, step in enumerate(plan.steps):
            frees = [self._slot(name) for name, last in last_use.items() if last == index]
            if isinstance(step, SegmentStep):
                key = (step.segment, step.weights)
                if key not in self._bound:
                    self._bound[key] = lowered[step.segment].bind([weights[name] for name in step.weights])
                self._operations.append(self._segment(step, self._bound[key], frees))
            else:
                self._operations.append(self._attention(step, weights, frees))
        self._outputs = [self._slot(name) for name in plan.outputs]
        self._num_slots = len(self._slots)

    def _slot(self, name: str) -> int:
        return self._slots.setdefault(name, len(self._slots))

    def _segment(self, step: SegmentStep, bound: Bound, frees: list[int]) -> Operation:
        inputs = [self._slot(name) for name in step.inputs]
        outputs = [self._slot(name) for name in step.outputs]

        def run(slots: list[Tensor | None], context: StepContext | None) -> None:
            results = bound(*[slots[i] for i in inputs])
            for slot, result in zip(outputs, results):
                slots[slot] = result
            for slot in frees:
                slots[slot] = None

        return run

    def _attention(self, step: AttentionStep, weights: Mapping[str, Tensor], frees: list[int]) -> Operation:
        q_slot, k_slot, v_slot, out = (self._slot(name) for name in (step.q, step.k, step.v, step.output))
        sinks = weights[step.sinks].float() if step.sinks else None
        slopes = weights[step.alibi_slopes].float() if step.alibi_slopes else None
        layer, group = step.layer, step.group
        scale, window, softcap = step.scale, step.window, step.softcap
        angles = (self._slot(step.cos), self._slot(step.sin)) if step.cos and step.sin else None

        def run(slots: list[Tensor | None], context: StepContext | None) -> None:
            assert context is not None
            k_cache, v_cache = self.caches[layer]
            slot_mapping, block_tables = context.groups[group]
            q, k, v = slots[q_slot], slots[k_slot], slots[v_slot]
            assert q is not None and k is not None and v is not None
            rope = None
            if angles is not None:
                cos, sin = (slots[slot] for slot in angles)
                assert cos is not None and sin is not None
                rope = Rope(cos[0], sin[0], step.interleaved)
            result = paged_attention(
                q[0],
                k[0],
                v[0],
                k_cache,
                v_cache,
                slot_mapping,
                block_tables,
                context.query_start,
                context.seq_lens,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                alibi_slopes=slopes,
                max_query_len=context.max_query_len,
                max_seq_len=context.max_seq_len,
                rope=rope,
                tree_mask=context.tree_mask,
                batch_invariant=self._batch_invariant,
                state=self._attention_state,
            )
            slots[out] = result[None]
            for slot in frees:
                slots[slot] = None

        return run

    def run(self, inputs: Sequence[Tensor], context: StepContext | None = None) -> list[Tensor]:
        """The plan's outputs for its inputs, in the order of `plan.inputs`."""
        self._attention_state.begin_step()
        slots: list[Tensor | None] = [None] * self._num_slots
        for slot, value in zip(self._inputs, inputs):
            slots[slot] = value
        for operation in self._operations:
            operation(slots, context)
        return [result for slot in self._outputs if isinstance(result := slots[slot], torch.Tensor)]


def _last_uses(plan: Plan) -> dict[str, int]:
    last: dict[str, int] = {}
    for index, step in enumerate(plan.steps):
        for name in step.inputs:
            last[name] = index
    return {name: index for name, index in last.items() if name not in plan.outputs}
