"""The search for the operation that makes a row depend on its batch: it finds none on the CPU, and one that is planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from camshaft.export.engine import Engine
from families import random_model, tiny_config
from row_traces import bind_caches, chunked, first_difference, interleaved, trace_steps

import camshaft

LENGTHS = [3, 40, 1, 17]
PROMPTS = [[(7 * i + 3 * j) % 120 + 1 for j in range(n)] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return camshaft.compile(
        random_model(tiny_config("gemma2")), target="eager", device="cpu", max_seq_len=64, max_batch_tokens=64,
        max_sequences=4, block_size=4, cache=False,
    )  # fmt: skip


def test_pieces() -> None:
    assert chunked(1, 8) == [(0, 1)] and chunked(9, 8) == [(0, 8), (8, 9)] and chunked(4, 2) == [(0, 2), (2, 3), (3, 4)]
    assert interleaved([1, 4], 2) == [[(0, 0, 1), (1, 0, 2)], [(1, 2, 3)], [(1, 3, 4)]]


def test_alone_and_together(engine: Engine) -> None:
    bind_caches(engine, len(PROMPTS))
    alone = [trace_steps(engine, PROMPTS, [[(i, *chunk)] for chunk in chunked(n, 8)])[i] for i, n in enumerate(LENGTHS)]
    assert len(alone[0]) > 2 * len(engine.manifest.cache.layers)
    together = trace_steps(engine, PROMPTS, interleaved(LENGTHS, 5))
    for index, trace in enumerate(alone):
        assert first_difference(trace, together[index], tolerance=1e-4) is None  # float32 sums in another order

    executor = engine.prepare().executor
    planted = executor._operations[3]  # the second layer's attention

    def wrong(slots: list[Any], context: Any) -> None:
        before = [value is None for value in slots]
        planted(slots, context)
        for value, new in zip(slots, before):
            if new and isinstance(value, torch.Tensor) and value.shape[1] > 10:
                value[:, 0] += 1.0

    executor._operations[3] = wrong
    together = trace_steps(engine, PROMPTS, interleaved(LENGTHS, 8))
    found = first_difference(alone[0], together[0], tolerance=1e-4)
    assert (
        found is not None and found.startswith("3: attention of layer 1 -> ") and "positions [0, 2] of 3" in found
    )  # steps of 19, 17 rows
    assert first_difference(alone[2], together[2], tolerance=1e-4) is None
