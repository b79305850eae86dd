"""Teacher forcing: engines of one model are stepped side by side over the tokens of a text, and their logits taken as they come.

    tokens      t0 t1 t2 ... tC | tC tC+1 ... t2C | ...      windows of C + 1 tokens, the last of one is the first of the next
    rows        t0 t1 ...  tC-1 | tC ...    t2C-1 | ...      what goes through the engines, several windows in a step
    targets     t1 t2 ...  tC   | tC+1 ...  t2C   | ...      what each row of logits predicts: each token of the text once

One scheduler plans the steps, and every engine runs each of them, so the rows of all engines are rows of the same token. Logits of
the whole text never exist at once, and nothing is done per token in Python.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..batch_builder import BatchBuilder
from ..kv_cache import CacheGroup
from ..ownership import EngineClaim
from ..packing import upload
from ..plan import SchedulerConfig, StepPlan
from ..request import Request
from ..sampling_params import SamplingParams
from ..scheduler import Scheduler

if TYPE_CHECKING:
    from ..batch import Engine

LOGITS_BYTES = 256 << 20
"""Most bytes of the float32 logits of a step, of each engine."""


@dataclass(frozen=True, slots=True)
class ForcedStep:
    """What one step gave, R rows."""

    logits: tuple[torch.Tensor, ...]
    """Per engine [R, V] of any float dtype, on the engines' device; they may be overwritten by the next step."""
    targets: torch.Tensor
    """[R] int64 on the same device: the tokens that follow."""
    indices: np.ndarray
    """[R] int64: where in the text those tokens are."""


def check_text(token_ids: Sequence[int], context: int, engine: Engine) -> None:
    """Raises ValueError for a context that the engine has no room for, or a text that does not fill one window of it."""
    limit = engine.max_seq_len - 1  # a request has room for one more token than its prompt
    if not 1 <= context <= limit:
        raise ValueError(
            f"context is {context} tokens; allowed: 1 to {limit}, max_seq_len less 1; lower it, or build with a larger max_seq_len"
        )
    if not token_ids:
        raise ValueError("the text is empty; give a text of at least one window of the context, and one token more")
    if len(token_ids) <= context:
        raise ValueError(
            f"the text has {len(token_ids)} tokens and context is {context}; allowed: more tokens than the context. Give a longer "
            "text, or lower the context"
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= engine.vocab_size:
        raise ValueError(f"the text's token ids reach from {low} to {high}; allowed: 0 to {engine.vocab_size - 1}")


def forced_steps(
    engines: Sequence[Engine], token_ids: Sequence[int], *, context: int
) -> Generator[ForcedStep, None, None]:
    """Steps through a text, until every token but the first was predicted once, after up to `context` tokens of its window.

    engines: of one model, on one device, none of them serving an LLM; they have KV caches of a step's windows meanwhile.

    The engines are let go when the generator ends or is closed. Raises ValueError, with the first step, for engines that differ in
    vocabulary, cache layout or device, and for what `check_text` refuses.
    """
    _check_alike(engines)
    first = engines[0]
    check_text(token_ids, context, first)
    config = _config(engines, context)
    with ExitStack() as undo:
        for engine in engines:
            undo.callback(EngineClaim(engine).release)
            engine.prepare()
            undo.callback(engine.release_cache)
            engine.bind_cache([group.num_blocks for group in config.groups])
        yield from _steps(engines, config, token_ids, context)


def _steps(
    engines: Sequence[Engine], config: SchedulerConfig, token_ids: Sequence[int], context: int
) -> Iterator[ForcedStep]:
    first = engines[0]
    scheduler = Scheduler(config)
    builder = BatchBuilder(
        num_groups=len(config.groups),
        block_size=first.block_size,
        max_seq_len=config.max_seq_len,
        max_sequences=config.max_sequences,
        device=first.device,
    )
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    for begin in range(0, len(token_ids) - 1, context):
        window = list(token_ids[begin : min(begin + context, len(token_ids) - 1)])
        scheduler.add_request(Request(str(begin), window, params))
    text = np.asarray(token_ids, dtype=np.int64)
    while (plan := scheduler.schedule()) is not None:
        batch = builder.build(plan)
        with torch.inference_mode():
            logits = tuple(engine.step(batch) for engine in engines)
        indices = _target_indices(plan)
        yield ForcedStep(logits, upload(text[indices], first.device), indices)
        sampled = [[0] if row.samples else [] for row in plan.scheduled]
        for update in scheduler.update(plan, sampled):
            if update.finished:
                builder.release(update.request.request_id)


def _target_indices(plan: StepPlan) -> np.ndarray:
    """[R] where in the text the tokens are that the rows of a plan's logits predict."""
    parts = []
    for row in plan.scheduled:
        begin = int(row.request.request_id) + row.start + 1
        parts.append(np.arange(begin, begin + row.num_tokens, dtype=np.int64))
    return np.concatenate(parts)


def _config(engines: Sequence[Engine], context: int) -> SchedulerConfig:
    """Limits that all engines keep, with room for the windows of a step's logits."""
    first = engines[0]
    rows = max(1, LOGITS_BYTES // (4 * first.vocab_size))
    tokens = min(rows, *(engine.max_batch_tokens for engine in engines))
    sequences = min(tokens, tokens // context + 2, *(engine.max_sequences for engine in engines))
    groups = []
    for spec in first.cache_groups:
        group = CacheGroup(num_blocks=1, block_size=first.block_size, window=spec.window)
        blocks = sequences * group.max_blocks_held(context + 1, tokens)
        groups.append(CacheGroup(num_blocks=blocks, block_size=first.block_size, window=spec.window))
    return SchedulerConfig(
        groups=tuple(groups),
        max_batch_tokens=tokens,
        max_sequences=sequences,
        max_seq_len=context + 1,
        enable_prefix_cache=False,
    )


def _check_alike(engines: Sequence[Engine]) -> None:
    first = engines[0]
    for engine in engines[1:]:
        for what, ours, theirs in (
            ("vocabularies", first.vocab_size, engine.vocab_size),
            ("block sizes", first.block_size, engine.block_size),
            ("windows of cache groups", _windows(first), _windows(engine)),
            ("devices", str(first.device), str(engine.device)),
        ):
            if ours != theirs:
                raise ValueError(
                    f"the engines' {what} are {ours} and {theirs}; engines that are compared must be of one model and device, "
                    "built with one block size"
                )


def _windows(engine: Engine) -> list[int]:
    return [group.window for group in engine.cache_groups]
