"""An engine without a model, for tests of the runtime around it.

Its logits depend on every token of the context, read back through a real paged cache and the batch's block tables, so
a wrong block table, slot or position changes the tokens. `expected_tokens` computes the same without any cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from camshaft.runtime.batch import Batch, CacheGroupSpec

_PRIME = 1_000_003


def context_hash(tokens: Sequence[int]) -> int:
    """A number that depends on all tokens and their places."""
    positions = np.arange(1, len(tokens) + 1, dtype=np.int64)
    return int(((np.asarray(tokens, dtype=np.int64) + 1) * (positions * 7919 % _PRIME)).sum() % _PRIME)


def logits_of(key: int, vocab_size: int) -> np.ndarray:
    """[V] float32 logits of a context hash: a fixed scramble with a clear maximum."""
    ids = np.arange(vocab_size, dtype=np.int64)
    return ((((ids + 1) * (key + 12345)) % 10007) / 10007 * 8).astype(np.float32)


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, vocab_size: int, windows: Sequence[int] = (0,)
) -> list[int]:
    """Greedy continuation of a prompt, straight from the definition."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        key = sum(context_hash(tokens[-w:] if w else tokens) * (g + 1) for g, w in enumerate(windows))
        tokens.append(int(logits_of(key, vocab_size).argmax()))
    return tokens[len(prompt) :]


class FakeEngine:
    """See the module; `windows` gives one cache group per entry.

    `on_step` is called before every step and may raise; `cheap` skips the cache (for timing the host).
    """

    def __init__(
        self,
        *,
        vocab_size: int = 101,
        max_seq_len: int = 256,
        max_batch_tokens: int = 64,
        max_sequences: int = 8,
        block_size: int = 4,
        windows: Sequence[int] = (0,),
        eos_token_ids: tuple[int, ...] = (),
        tokenizer_path: Path | None = None,
        on_step: Callable[[Batch], None] | None = None,
        cheap: bool = False,
    ) -> None:
        self.device = torch.device("cpu")
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.block_size = block_size
        self.eos_token_ids = eos_token_ids
        self.tokenizer_path = tokenizer_path
        self.cache_groups = tuple(
            CacheGroupSpec(window=w, bytes_per_block=16 * block_size, num_layers=1) for w in windows
        )
        self.weights_bytes = 1000
        self.on_step = on_step
        self.cheap = cheap
        self.caches: list[np.ndarray] = []
        self.num_steps = 0
        self._logits = (
            torch.randn(max_sequences, vocab_size, generator=torch.Generator().manual_seed(0)) if cheap else None
        )

    def activation_bytes(self) -> int:
        return 1000

    def prepare(self) -> None:
        pass

    def release_cache(self) -> None:
        self.caches = []

    def graph_bytes(self) -> int:
        return 0

    def capture(self) -> None:
        pass

    def bind_cache(self, num_blocks: Sequence[int]) -> None:
        # -7 where nothing was written: reading it changes the hash
        self.caches = [np.full(n * self.block_size, -7, dtype=np.int64) for n in num_blocks]

    def step(self, batch: Batch) -> torch.Tensor:
        if self.on_step is not None:
            self.on_step(batch)
        self.num_steps += 1
        if self._logits is not None:
            return self._logits[: batch.sample_rows.shape[0]].clone()
        tokens, positions = batch.token_ids.numpy(), batch.positions.numpy()
        starts, lengths = batch.query_start.numpy(), batch.seq_lens.numpy()
        keys = np.zeros(len(tokens), dtype=np.int64)
        for number, (spec, group) in enumerate(zip(self.cache_groups, batch.groups)):
            cache, slots = self.caches[number], group.slot_mapping.numpy()
            assert (slots >= 0).all(), "a token has no block"
            assert len(set(slots.tolist())) == len(slots), "two tokens of a step share a slot"
            cache[slots] = tokens
            for s, length in enumerate(lengths):
                assert positions[starts[s + 1] - 1] == length - 1
                table = group.block_tables[s].numpy()
                for row in range(starts[s], starts[s + 1]):
                    end = positions[row] + 1
                    first = max(0, end - spec.window) if spec.window else 0
                    seen = np.arange(first, end)
                    context = cache[table[seen // self.block_size] * self.block_size + seen % self.block_size]
                    keys[row] += context_hash(context) * (number + 1)
        logits = np.zeros((batch.sample_rows.shape[0], self.vocab_size), dtype=np.float32)
        for i, row in enumerate(batch.sample_rows.tolist()):
            logits[i] = logits_of(int(keys[row]), self.vocab_size)
        return torch.from_numpy(logits)
