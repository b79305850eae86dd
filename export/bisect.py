"""bisect over a lowered plan, and the check of a whole engine: does a target compute what the program says?

x --> [segment, eager] --> y    the oracle: its outputs feed the next step
x --> [segment, target] -> y'   compared with y on the same inputs, so that one wrong segment does not hide the others
x' -> [segment, target] -> ...  the target's own outputs, fed forward: their logits are compared at the end
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph.program import CacheSpec, Program
from ..graph.weights import WeightMap
from ..passes.bisect import random_row, relative_error, run_row
from .buckets import varying_size
from .engine import Engine
from .executor import StepContext
from .kernels import dispatch, reference
from .kernels.rope import Rope
from .partition import partition
from .segment import AttentionStep, Plan, Segment, SegmentStep
from .targets.base import Bound, Lowered, LoweringError, LowerRequest, Target, get_target

logger = logging.getLogger(__name__)

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Allowed `relative_error` of logits by dtype: roughly the rounding of one element times the depth of a deep model."""
FP8_TOLERANCE = 5e-2
"""The same where something is stored in fp8: a value near the middle of two steps, which are 1/8 apart, falls to either side."""


@dataclass(frozen=True, kw_only=True)
class StepCheck:
    """One step of a plan, run by the target and by eager on the same inputs.

    step: index in the plan. what: "segment" or "attention". segment: id of the segment, or "attention layer 3".
    operators: the most frequent ones of the segment. error: largest `relative_error` of its outputs.
    """

    step: int
    what: str
    segment: str
    operators: str
    error: float
    ok: bool
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class TargetBisection:
    """What a bisection of one target found.

    logits_error: `relative_error` of the logits of the whole plan, each step fed with the target's own results;
    inf where a step could not run.
    """

    target: str
    tolerance: float
    checks: tuple[StepCheck, ...]
    logits_error: float

    @property
    def first_bad(self) -> StepCheck | None:
        """The first step whose outputs leave the tolerance, or None."""
        return next((check for check in self.checks if not check.ok), None)

    @property
    def ok(self) -> bool:
        """Whether every step and the logits at the end agree."""
        return self.first_bad is None and self.logits_error <= self.tolerance


def bisect_target(
    program: Program,
    target: str | Target,
    *,
    device: torch.device,
    tolerance: float,
    num_tokens: int = 24,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> TargetBisection:
    """Lowers a paged program and compares it with eager, step by step, on one row of random tokens.

    target: a name, or a Target of your own. on_progress: (what, done, total). Raises ValueError if the target cannot run here.
    """
    chosen = get_target(target) if isinstance(target, str) else target
    reason = chosen.unavailable(device)
    if reason is not None:
        raise ValueError(f"target {chosen.name} cannot run on {device.type}: {reason}")
    assert program.cache is not None, "bisect_target takes a program behind page_attention"
    plan = partition(program, chosen.supports, split_rows=chosen.fixed_sizes)
    with tempfile.TemporaryDirectory(prefix="camshaft-bisect-") as directory, torch.inference_mode():
        lowered, problems = _lower(plan, chosen, device, Path(directory), num_tokens, on_progress)
        walk = _Walk(plan, program.weights, program.cache, device, tolerance, lowered, problems)
        return walk.run(chosen.name, random_row(program, num_tokens, seed), on_progress)


def _lower(
    plan: Plan,
    target: Target,
    device: torch.device,
    directory: Path,
    num_tokens: int,
    on_progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, Lowered], dict[str, str]]:
    """(lowered segments, segment id -> why it could not be lowered or opened)."""
    lowered: dict[str, Lowered] = {}
    problems: dict[str, str] = {}
    for index, segment in enumerate(plan.segments.values()):
        if on_progress is not None:
            on_progress(f"lowering for {target.name}", index, len(plan.segments))
        owner = get_target("eager") if segment.eager else target
        file = None
        try:
            if owner.extension:
                file = directory / f"{segment.id}.{owner.extension}"
                file.write_bytes(owner.lower(segment, _request(segment, owner, device, num_tokens)).data)
            lowered[segment.id] = owner.load(segment, file, device)
        except LoweringError as error:
            problems[segment.id] = str(error)
    return lowered, problems


def _request(segment: Segment, target: Target, device: torch.device, num_tokens: int) -> LowerRequest:
    """Every row of the one batch is sampled, so all sizes that vary are `num_tokens`."""
    symbol = varying_size(segment) if target.fixed_sizes else None
    sizes = {symbol: num_tokens} if symbol else None
    return LowerRequest(device=device, max_tokens=max(num_tokens, 16), sizes=sizes)


class _Walk:
    """Walks a plan with two sets of slots: the oracle's, and the target's own."""

    def __init__(
        self,
        plan: Plan,
        weights: WeightMap,
        cache: CacheSpec,
        device: torch.device,
        tolerance: float,
        lowered: dict[str, Lowered],
        problems: dict[str, str],
    ) -> None:
        self.plan, self.weights, self.cache, self.device = plan, weights, cache, device
        self.tolerance, self.lowered, self.problems = tolerance, lowered, problems
        eager = get_target("eager")
        self.oracle = {key: eager.load(segment, None, device) for key, segment in plan.segments.items()}
        self.expected: dict[str, Tensor] = {}
        self.actual: dict[str, Tensor] = {}
        self.checks: list[StepCheck] = []

    def run(
        self, target_name: str, token_ids: Tensor, on_progress: Callable[[str, int, int], None] | None
    ) -> TargetBisection:
        rows = torch.arange(token_ids.shape[0], device=self.device)
        given = {"token_ids": token_ids.to(self.device)[None], "positions": rows[None], "sample_rows": rows}
        self.expected = {name: given[name] for name in self.plan.inputs}
        self.actual = dict(self.expected)
        context = row_context(self.cache, token_ids.shape[0], self.device)
        for index, step in enumerate(self.plan.steps):
            if on_progress is not None:
                on_progress(f"comparing {target_name}", index, len(self.plan.steps))
            if isinstance(step, SegmentStep):
                self._segment(index, step)
            else:
                self._attention(index, step, context)
        output = self.plan.outputs[0]
        whole = output in self.actual
        error = relative_error(self.expected[output], self.actual[output]) if whole else math.inf
        return TargetBisection(
            target=target_name, tolerance=self.tolerance, checks=tuple(self.checks), logits_error=error
        )

    def _segment(self, index: int, step: SegmentStep) -> None:
        segment = self.plan.segments[step.segment]
        weights = [self.weights[name].load().to(self.device) for name in step.weights]
        inputs = [self.expected[name] for name in step.inputs]
        expected = self.oracle[step.segment].bind(weights)(*inputs)
        problem, error = self.problems.get(segment.id), math.inf
        if problem is None:
            try:
                bound = self.lowered[segment.id].bind(weights)
                error = max(relative_error(e, a) for e, a in zip(expected, bound(*inputs), strict=True))
                self._advance(step, bound)
            except (LoweringError, RuntimeError, ValueError) as reason:
                problem = f"{type(reason).__name__}: {str(reason).strip().splitlines()[0]}"
        self.expected.update(zip(step.outputs, expected))
        self._add(index, "segment", segment.id, operators_text(segment), error, problem)

    def _advance(self, step: SegmentStep, bound: Bound) -> None:
        """The target's own way: nothing where an earlier step could not run."""
        if all(name in self.actual for name in step.inputs):
            self.actual.update(zip(step.outputs, bound(*[self.actual[name] for name in step.inputs])))

    def _attention(self, index: int, step: AttentionStep, context: StepContext) -> None:
        expected = self._attend(reference.paged_attention, step, self.expected, context)
        same_inputs = self._attend(dispatch.paged_attention, step, self.expected, context)
        self.expected[step.output] = expected
        if all(name in self.actual for name in step.inputs):
            self.actual[step.output] = self._attend(dispatch.paged_attention, step, self.actual, context)
        error = relative_error(expected, same_inputs)
        self._add(index, "attention", f"attention layer {step.layer}", "attention kernel", error, None)

    def _attend(
        self, kernel: Callable[..., Tensor], step: AttentionStep, slots: dict[str, Tensor], context: StepContext
    ) -> Tensor:
        layer = self.cache.layers[step.layer]
        num_blocks = -(-context.max_seq_len // self.cache.block_size)
        shape = (num_blocks, self.cache.block_size, layer.num_kv_heads)
        caches = [
            torch.zeros((*shape, size), dtype=layer.dtype, device=self.device)
            for size in (layer.head_dim, layer.value_dim)
        ]
        sinks, slopes = (
            self.weights[name].load().to(self.device).float() if name else None
            for name in (step.sinks, step.alibi_slopes)
        )
        slot_mapping, block_tables = context.groups[step.group]
        result = kernel(
            slots[step.q][0],
            slots[step.k][0],
            slots[step.v][0],
            *caches,
            slot_mapping,
            block_tables,
            context.query_start,
            context.seq_lens,
            scale=step.scale,
            window=step.window,
            softcap=step.softcap,
            sinks=sinks,
            alibi_slopes=slopes,
            max_query_len=context.max_query_len,
            max_seq_len=context.max_seq_len,
            rope=Rope(slots[step.cos][0], slots[step.sin][0], step.interleaved) if step.cos and step.sin else None,
        )
        return result[None]

    def _add(self, index: int, what: str, name: str, operators: str, error: float, problem: str | None) -> None:
        self.checks.append(
            StepCheck(
                step=index,
                what=what,
                segment=name,
                operators=operators,
                error=error,
                ok=problem is None and error <= self.tolerance,
                problem=problem,
            )
        )


def operators_text(segment: Segment, most: int = 6) -> str:
    """The operators of a segment by frequency: "5 linear, 2 rope, glu"."""
    names = [name.split(".")[1] for name in segment.operators if not name.startswith("operator.")]
    counts = Counter(name for name in names if name != "sym_size").most_common()
    text = ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts[:most])
    return text + (", ..." if len(counts) > most else "")


def row_context(cache: CacheSpec, num_tokens: int, device: torch.device) -> StepContext:
    """The paging metadata of one sequence of `num_tokens` from position 0, in blocks 0, 1, 2, ... of every group."""
    return _context(cache, 0, num_tokens, device)


def _context(cache: CacheSpec, start: int, end: int, device: torch.device) -> StepContext:
    """One sequence of which the positions start .. end - 1 are computed."""
    num_blocks = -(-end // cache.block_size)
    slots = torch.arange(start, end, device=device)
    table = torch.arange(num_blocks, dtype=torch.int32, device=device)[None]
    query_start = torch.tensor([0, end - start], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([end], dtype=torch.int32, device=device)
    return StepContext([(slots, table)] * len(cache.windows), query_start, seq_lens, end - start, end)


# ------------------------------------------------------------------------------------------------------ a whole engine
@dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """An engine's greedy tokens and logits beside those of the program that it was made from, run by eager.

    logits_error: `relative_error` of the logits of all rows. tokens: the engine's; expected_tokens: eager's choice after
    the same prefix. num_ties: tokens that differ where eager's two logits are equal up to the tolerance.
    """

    tolerance: float
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    expected_tokens: tuple[int, ...]
    num_ties: int
    logits_error: float

    @property
    def num_equal(self) -> int:
        """Tokens that are equal."""
        return sum(a == b for a, b in zip(self.tokens, self.expected_tokens))

    @property
    def ok(self) -> bool:
        """Whether the logits are within the tolerance and every token is eager's, ties aside."""
        return self.logits_error <= self.tolerance and self.num_equal + self.num_ties == len(self.tokens)


@dataclass
class _Group:
    slot_mapping: Tensor
    block_tables: Tensor


@dataclass
class _RowBatch:
    """One sequence as the engine takes it; the fields of the runtime's Batch."""

    token_ids: Tensor
    positions: Tensor
    groups: tuple[_Group, ...]
    query_start: Tensor
    seq_lens: Tensor
    sample_rows: Tensor
    max_query_len: int
    max_seq_len: int
    tree_mask: Tensor | None = None
    early: None = None


def check_engine(
    engine: Engine,
    program: Program,
    *,
    tolerance: float | None = None,
    num_prompt_tokens: int = 24,
    num_output_tokens: int = 16,
    seed: int = 0,
) -> EngineCheck:
    """Decodes greedily with the engine and compares with `program` (as captured, not paged) run by eager on the same tokens.

    The prompt is computed in two chunks, then token by token, so prefill, chunked prefill and decode all take part. The
    engine's KV cache is bound anew. tolerance: None: by the engine's dtype (`TOLERANCES`, `FP8_TOLERANCE`). A quantized engine
    belongs beside the program that its own passes made (`build.passes_of`), which is run as it is.
    """
    config = engine.config
    fp8 = config.quantize is not None or config.kv_cache_dtype != "auto"
    allowed = max(TOLERANCES[config.dtype], FP8_TOLERANCE if fp8 else 0.0) if tolerance is None else tolerance
    room = min(engine.max_seq_len, engine.max_batch_tokens)
    num_prompt = max(2, min(num_prompt_tokens, room - 2))
    num_output = max(1, min(num_output_tokens, engine.max_seq_len - num_prompt))
    prompt = random_row(program, num_prompt, seed).tolist()
    tokens, logits = _decode(engine, prompt, num_output)
    expected = run_row(program, torch.tensor([*prompt, *tokens[:-1]]))
    rows = expected[num_prompt - 1 :].float()
    scale = max(1e-6, float(rows.abs().max()))
    best = rows.max(dim=-1)
    chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    differs = best.indices != torch.tensor(tokens)
    ties = differs & (best.values - chosen <= 2 * allowed * scale)
    return EngineCheck(
        tolerance=allowed,
        prompt=tuple(prompt),
        tokens=tuple(tokens),
        expected_tokens=tuple(best.indices.tolist()),
        num_ties=int(ties.sum()),
        logits_error=relative_error(expected, logits),
    )


def _decode(engine: Engine, prompt: Sequence[int], num_output: int) -> tuple[list[int], Tensor]:
    """(greedy tokens, logits [rows, V] of every position computed)."""
    num_blocks = -(-(len(prompt) + num_output) // engine.block_size)
    engine.bind_cache([num_blocks] * len(engine.cache_groups))
    tokens = list(prompt)
    half = len(prompt) // 2
    parts = [_step(engine, tokens, 0, half), _step(engine, tokens, half, len(prompt))]
    for _ in range(num_output):
        tokens.append(int(parts[-1][-1].argmax()))
        if len(tokens) - len(prompt) < num_output:
            parts.append(_step(engine, tokens, len(tokens) - 1, len(tokens)))
    return tokens[len(prompt) :], torch.cat(parts)


def _step(engine: Engine, tokens: Sequence[int], start: int, end: int) -> Tensor:
    context = _context(engine.manifest.cache, start, end, engine.device)
    batch: Any = _RowBatch(
        token_ids=torch.tensor(tokens[start:end], device=engine.device),
        positions=torch.arange(start, end, device=engine.device),
        groups=tuple(_Group(*group) for group in context.groups),
        query_start=context.query_start,
        seq_lens=context.seq_lens,
        sample_rows=torch.arange(end - start, device=engine.device),
        max_query_len=context.max_query_len,
        max_seq_len=context.max_seq_len,
    )
    return engine.step(batch).cpu()
