"""What every operation of a step gives each token, to find the first that treats rows differently in another batch.

sequences cut into chunks -> steps -> per sequence and operation: its rows [n, ..] in the order of their positions
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from camshaft.export.engine import Engine
from camshaft.runtime.batch import Batch, GroupMetadata
from torch import Tensor

Chunk = tuple[int, int, int]
"""A sequence and its positions [first, end) that a step computes."""
Trace = dict[str, list[Tensor]]
"""Operation and slot -> the rows of a sequence, a tensor for each chunk."""


def batch_of(engine: Engine, prompts: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> Batch:
    """A step of these chunks, which samples every row. Sequence i owns the blocks from i * W on, W those of max_seq_len."""
    width, size = -(-engine.max_seq_len // engine.block_size), engine.block_size
    device = engine.device
    positions = torch.cat([torch.arange(first, end) for _, first, end in chunks])
    owners = torch.cat([torch.full((end - first,), sequence) for sequence, first, end in chunks])
    tables = torch.stack([torch.arange(width, dtype=torch.int32) + sequence * width for sequence, _, _ in chunks])
    slots = owners * width * size + positions
    ends = torch.tensor([end for _, _, end in chunks], dtype=torch.int32)
    rows = torch.tensor([0] + [end - first for _, first, end in chunks], dtype=torch.int32)
    longest = int(ends.max())
    return Batch(
        token_ids=torch.tensor([prompts[s][i] for s, first, end in chunks for i in range(first, end)], device=device),
        positions=positions.to(device),
        groups=tuple(
            GroupMetadata(slots.to(device), tables[:, : -(-longest // size)].contiguous().to(device))
            for _ in engine.cache_groups
        ),
        query_start=rows.cumsum(0).int().to(device),
        seq_lens=ends.to(device),
        sample_rows=torch.arange(len(positions), device=device),
        max_query_len=int(rows.max()),
        max_seq_len=longest,
    )


def bind_caches(engine: Engine, num_sequences: int) -> None:
    """A KV cache for `batch_of`."""
    width = -(-engine.max_seq_len // engine.block_size)
    engine.bind_cache([num_sequences * width] * len(engine.cache_groups))


@torch.inference_mode()
def trace_steps(engine: Engine, prompts: Sequence[Sequence[int]], steps: Sequence[Sequence[Chunk]]) -> dict[int, Trace]:
    """Runs the steps without graphs, and returns what every operation gave each sequence. The last operation is the logits."""
    execution, plan = engine.prepare(), engine.plan
    executor = execution.executor
    names = [
        (step.outputs, f"{index}: segment {step.segment[:8]}")
        if hasattr(step, "segment")
        else ((step.output,), f"{index}: attention of layer {step.layer}")
        for index, step in enumerate(plan.steps)
    ]
    slot_names = {number: name for name, number in executor._slots.items()}
    traces: dict[int, Trace] = {}
    operations = executor._operations
    for chunks in steps:
        batch = batch_of(engine, prompts, chunks)
        seen: dict[str, Tensor] = {}

        def watched(index: int, seen: dict[str, Tensor] = seen) -> None:
            def run(slots, context) -> None:  # type: ignore[no-untyped-def]
                operations[index](slots, context)
                for number, value in enumerate(slots):
                    if value is not None and slot_names[number] in names[index][0]:
                        seen[f"{names[index][1]} -> {slot_names[number]}"] = value.clone()

            return run  # type: ignore[return-value]

        executor._operations = [watched(index) for index in range(len(operations))]  # type: ignore[misc]
        graphs, execution._graphs = execution._graphs, None
        try:
            execution.step(batch)
        finally:
            executor._operations, execution._graphs = operations, graphs
        first_row = 0
        for sequence, first, end in chunks:
            rows = slice(first_row, first_row + end - first)
            trace = traces.setdefault(sequence, {})
            for name, value in seen.items():
                assert value.shape[0] == 1 and value.shape[1] >= batch.num_tokens, (name, value.shape)
                trace.setdefault(name, []).append(value[0, rows].cpu())
            first_row = rows.stop
    return traces


def first_difference(one: Trace, other: Trace, tolerance: float = 0.0) -> str | None:
    """The first operation whose rows differ by more than `tolerance` of its largest value, where and by how much; None: none."""
    assert list(one) == list(other)
    for name in one:
        a, b = (torch.cat(trace[name]) for trace in (one, other))
        assert a.shape == b.shape, (name, a.shape, b.shape)
        if tolerance == 0.0 and torch.equal(a, b):
            continue
        error = (a.double() - b.double()).abs().flatten(1).amax(1)
        wrong = ~(error <= tolerance * float(a.double().abs().max()))
        if tolerance == 0.0 or wrong.any():
            positions = wrong.nonzero()[:, 0].tolist()
            return f"{name}: positions {positions[:20]} of {len(a)} differ, by {float(error.max()):.1e}"
    return None


def chunked(length: int, size: int) -> list[tuple[int, int]]:
    """[0, length) in pieces of `size`; the last position is a piece of its own, as a decode step computes it."""
    cuts = [*range(0, length - 1, size), length - 1, length]
    return [(first, end) for first, end in zip(cuts, cuts[1:]) if end > first]


def interleaved(lengths: Sequence[int], size: int) -> list[list[Chunk]]:
    """Steps in which every sequence that is not at its end computes its next piece."""
    pieces = [chunked(length, size) for length in lengths]
    return [
        [(sequence, *cuts[step]) for sequence, cuts in enumerate(pieces) if step < len(cuts)]
        for step in range(max(map(len, pieces)))
    ]
