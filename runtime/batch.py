"""What a step is made of, and who takes it: `Batch` and the `Engine` protocol. `batch_builder` makes batches.

Sequences lie behind one another, without padding (S sequences, T tokens, R rows of logits):

    token_ids    | a | b b b | c c c c c |      query_start = [0, 1, 4, 9]
    positions    | 7 | 4 5 6 | 0 1 2 3 4 |      seq_lens    = [8, 7, 5]
    sample_rows  [0, 3, 8]                      the rows of T whose logits are wanted

Sequences with one new token come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..export.engine import CacheGroupSpec

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class GroupMetadata:
    """Where one cache group's keys and values are."""

    slot_mapping: torch.Tensor
    """[T] int64: block * block_size + offset for every token; -1 writes nothing."""
    block_tables: torch.Tensor
    """[S, W] int32, W the most blocks of any sequence in the batch; unused entries are 0."""


@dataclass(slots=True)
class EarlyRows:
    """Which rows of a batch of T have passed the layers in front of an early exit, and which have not."""

    hidden: torch.Tensor
    """[K, H] hidden states behind these layers, as `Engine.draft` gave them."""
    rows: torch.Tensor
    """[K] int64: rows of T that they belong to."""
    rest: Batch | None
    """The T - K other rows as a batch of their own, whose `sample_rows` name one row a sequence; None where there are none."""
    rest_rows: torch.Tensor
    """[T - K] int64: rows of T that these are."""


@dataclass(slots=True)
class Batch:
    """Input of one engine step, on the engine's device.

    On the CPU the memory belongs to the builder and is used again two steps later.
    """

    token_ids: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int64"""
    groups: tuple[GroupMetadata, ...]
    query_start: torch.Tensor
    """[S + 1] int32: first row of each sequence, and T."""
    seq_lens: torch.Tensor
    """[S] int32: tokens in the cache after this step."""
    sample_rows: torch.Tensor
    """[R] int64: rows of T whose logits are wanted, ascending."""
    max_query_len: int
    max_seq_len: int
    num_decodes: int = 0
    """Leading sequences with exactly one token: all that decode without drafts. (A prompt's last token may come later.)"""
    tree_mask: torch.Tensor | None = None
    """[T] int64, None where no sequence verifies a token tree. 0: the row attends its context and, as usual, the rows before it.
    Otherwise bit j says whether it attends row j of its own sequence (itself included); the context in front of the sequence's
    rows is always attended. Keys of a tree are at the slots of their rows, and `positions` are those of their depths: windows and
    ALiBi measure the distance of these positions. Bits of later rows are not looked at."""
    early: EarlyRows | None = None
    """Rows that the layers in front of an early exit have computed, for an engine with one; None: the whole model computes all."""
    hidden: torch.Tensor | None = None
    """[T, H] hidden states beside the tokens, in the compute dtype, for an engine that takes them (EAGLE's draft); else None."""

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """S"""
        return self.seq_lens.shape[0]


class Engine(Protocol):
    """A compiled model, as the runtime sees it."""

    device: torch.device
    vocab_size: int
    """Width of the logits."""
    max_seq_len: int
    """Most tokens of one sequence, prompt and output."""
    max_batch_tokens: int
    """Most tokens in a step."""
    max_sequences: int
    """Most sequences in a step."""
    block_size: int
    """Tokens in a KV block."""
    eos_token_ids: tuple[int, ...]
    tokenizer_path: Path | None
    """Directory of tokenizer.json and its companions, None where the model came without."""
    cache_groups: tuple[CacheGroupSpec, ...]
    weights_bytes: int

    def activation_bytes(self) -> int:
        """Estimate of the memory that a full step needs besides weights and KV cache."""
        ...

    def prepare(self) -> object:
        """Puts the weights on the device, once, so that what is free there can be told."""
        ...

    def bind_cache(self, num_blocks: Sequence[int]) -> None:
        """Allocates the KV tensors, one number of blocks per cache group."""
        ...

    def release_cache(self) -> None:
        """Frees what `bind_cache` and `capture` made."""
        ...

    def graph_bytes(self) -> int:
        """Estimate of the memory that `capture` takes."""
        ...

    def capture(self) -> object | None:
        """Captures decode steps as CUDA graphs, where the engine can."""
        ...

    def step(self, batch: Batch) -> torch.Tensor:
        """Runs the model: writes the new tokens' keys and values and returns logits [R, V] on `device`.

        Of any float dtype; what they say is compared as it is, and summed in float32.
        """
        ...
