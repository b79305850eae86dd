"""Engine: a compiled decoder, ready to be stepped, saved and looked at."""

from __future__ import annotations

import logging
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..graph.weights import Weight
from .executor import Executor, StepContext
from .manifest import BuildConfig, Manifest
from .segment import Plan
from .targets.base import get_target

if TYPE_CHECKING:
    from ..graph.display import PassTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroupSpec:
    """The KV storage of the layers that share one block table.

    window: sliding window in tokens, 0: full attention. bytes_per_block: bytes of one block over all of the group's layers.
    """

    window: int
    bytes_per_block: int
    num_layers: int


class Engine:
    """A compiled decoder.

    manifest: what it was built from and for. plan: its segments and steps. weights: name -> Weight, read on first use.
    engine_dir: directory of the segments' engine files. tokenizer_path: directory of tokenizer files, or None.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        weights: Mapping[str, Weight],
        engine_dir: Path,
        tokenizer_path: Path | None,
    ) -> None:
        self.manifest = manifest
        self.plan = plan
        self.weights = weights
        self.engine_dir = engine_dir
        self.tokenizer_path = tokenizer_path
        self.device = torch.device(manifest.build.device)
        self._target = get_target(manifest.build.target)
        self._executor: Executor | None = None
        self._inputs: list[str] = list(plan.inputs)

    def remove_with_engine(self, directory: Path) -> None:
        """Ties a temporary directory to this engine: it is removed when the engine is, or when Python ends."""
        weakref.finalize(self, shutil.rmtree, directory, True)

    # ------------------------------------------------------------------------------------------------------- properties
    @property
    def config(self) -> BuildConfig:
        """What the engine was built for."""
        return self.manifest.build

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.manifest.model.vocab_size

    @property
    def max_seq_len(self) -> int:
        """Most tokens of one sequence, prompt and output."""
        return self.config.max_seq_len

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens in a step."""
        return self.config.max_batch_tokens

    @property
    def max_sequences(self) -> int:
        """Most sequences in a step."""
        return self.config.max_sequences

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return self.config.block_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a text."""
        return self.manifest.model.eos_token_ids

    @property
    def weights_bytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(self.weights[name].num_bytes for name in self.plan.weight_names)

    @property
    def cache_groups(self) -> tuple[CacheGroupSpec, ...]:
        """The groups of layers that share a block table."""
        cache = self.manifest.cache
        return tuple(
            CacheGroupSpec(
                window=window, bytes_per_block=cache.bytes_per_block(group), num_layers=len(cache.layers_of(group))
            )
            for group, window in enumerate(cache.windows)
        )

    @property
    def passes(self) -> PassTable:
        """What each pass of the build did; it prints as a table."""
        from ..graph.display import PassTable

        return PassTable(self.manifest.passes)

    # -------------------------------------------------------------------------------------------------------------- run
    def prepare(self) -> Executor:
        """Reads the weights onto the device and opens the segments' engines (once); called by the first use."""
        if self._executor is None:
            tensors = {name: self.weights[name].load().to(self.device) for name in self.plan.weight_names}
            lowered = {}
            for segment in self.plan.segments.values():
                target = get_target("eager") if segment.eager else self._target
                file = self.manifest.engines.get(segment.id)
                lowered[segment.id] = target.load(segment, self.engine_dir / file if file else None, self.device)
            self._executor = Executor(self.plan, lowered, tensors)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # parts of joined weights: the KV cache can have their memory
        return self._executor

    def bind_cache(self, num_blocks: Sequence[int]) -> None:
        """Allocates the KV tensors, one number of blocks per cache group: [blocks, block_size, heads, D] per layer."""
        cache = self.manifest.cache
        if len(num_blocks) != len(cache.windows):
            raise ValueError(
                f"{len(num_blocks)} numbers of blocks for {len(cache.windows)} cache groups; give one each"
            )
        executor = self.prepare()
        executor.caches = []
        for index, layer in enumerate(cache.layers):
            shape = (num_blocks[cache.group_of(index)], cache.block_size, layer.num_kv_heads)
            sizes = ((*shape, layer.head_dim), (*shape, layer.value_dim))
            k_cache, v_cache = (_zeros(size, layer.dtype, self.device) for size in sizes)
            executor.caches.append((k_cache, v_cache))

    def step(self, batch: Any) -> Tensor:
        """Runs one step on a runtime Batch: writes keys and values, returns logits [R, V] float32 on the device."""
        executor = self.prepare()
        if not executor.caches and self.manifest.cache.layers:
            raise ValueError("the engine has no KV cache yet; call bind_cache, or use camshaft.LLM")
        missing = self._target.min_tokens - batch.token_ids.shape[0]
        values = {"token_ids": batch.token_ids, "positions": batch.positions, "sample_rows": batch.sample_rows}
        groups = [(group.slot_mapping, group.block_tables) for group in batch.groups]
        num_rows = batch.sample_rows.shape[0]
        if missing > 0:
            values["token_ids"] = _pad(values["token_ids"], missing, 0)
            values["positions"] = _pad(values["positions"], missing, 0)
            groups = [(_pad(slots, missing, -1), tables) for slots, tables in groups]
        if num_rows == 0:  # a chunk of a prompt in the middle: one row is computed and dropped
            values["sample_rows"] = torch.zeros(1, dtype=torch.int64, device=self.device)
        if values["sample_rows"].shape[0] < self._target.min_tokens:
            values["sample_rows"] = _pad(
                values["sample_rows"], self._target.min_tokens - values["sample_rows"].shape[0], 0
            )
        context = StepContext(groups, batch.query_start, batch.seq_lens, batch.max_query_len, batch.max_seq_len)
        inputs = [values[name][None] if name != "sample_rows" else values[name] for name in self._inputs]
        with torch.inference_mode():
            logits = executor.run(inputs, context)[0]
        return logits[0, :num_rows].float()

    def activation_bytes(self) -> int:
        """Estimate of the memory of a full step besides weights and KV cache, in bytes."""
        itemsize = getattr(torch, self.config.dtype).itemsize
        widest = 0
        for segment in self.plan.segments.values():
            width = 0
            for entry in segment.placeholders:
                sizes = [size for size in entry["shape"] if isinstance(size, int)]
                if any(isinstance(size, str) for size in entry["shape"]):
                    count = 1
                    for size in sizes:
                        count *= size
                    width += count
                elif len(sizes) == 2 and self.vocab_size not in sizes:
                    width += max(sizes)
            widest = max(widest, width)
        rows = self.max_batch_tokens * widest * itemsize
        return 2 * rows + 3 * self.max_sequences * self.vocab_size * 4

    # ------------------------------------------------------------------------------------------------------------- save
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the engine as an artifact directory and returns its path; nothing is left behind if it fails.

        Raises ValueError if `path` exists and is not an artifact that may be overwritten, OSError if the disk is full.
        """
        from .artifact import save_engine

        return save_engine(self, Path(path), overwrite=overwrite)

    def __repr__(self) -> str:
        build = self.config
        return (
            f"Engine({self.manifest.model.name}, target={build.target}, device={build.device}, dtype={build.dtype}, "
            f"segments={len(self.plan.segments)}, weights={self.weights_bytes / 1e6:.1f} MB)"
        )

    def _repr_html_(self) -> str:
        from .display import engine_html

        return engine_html(self)


def _pad(tensor: Tensor, count: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, count), value=value)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU in pages that the system hands out when they are first touched, so that a large cache costs no time."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = dtype.itemsize
    for size in shape:
        count *= size
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
