"""Engine: a compiled decoder, ready to be stepped, saved and looked at."""

from __future__ import annotations

import logging
import shutil
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..graph.weights import Weight
from .buckets import MIXED_GRAPHS, captured_sizes, decode_sizes
from .execution import Execution, Opened, open_engines
from .manifest import BuildConfig, Manifest
from .native_step import NativeStep, make_native_step, outlook
from .read_weights import weights_on
from .segment import Plan
from .split_steps import SplitSteps
from .split_steps import graph_bytes as split_graph_bytes
from .step_outputs import StepOutputs

if TYPE_CHECKING:
    from ..graph.display import PassTable
    from .cuda_graphs import StepGraphs

logger = logging.getLogger(__name__)

_BYTES_PER_CAPTURED_STEP = 128 << 10
"""Of a CUDA graph, for each segment or attention in it."""
_UNCAPTURABLE = ("camshaft.moe",)
"""Operators whose definition reads back from the device which kernels to launch."""


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
        self._execution: Execution | None = None
        self._lock = threading.Lock()
        self._native: NativeStep | None = None
        self._split: SplitSteps | None = None
        """Of an engine with an early exit."""
        self._native_line = ""

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
    def hidden_layers(self) -> tuple[int, ...]:
        """The hidden states that `step_outputs` gives, in their order; see `passes/capture_hidden.py`."""
        return self.config.hidden_layers

    @property
    def early_exit(self) -> int | None:
        """Layers in front of the exit that drafts; None for an engine without one. See `passes/split_early_exit.py`."""
        return self.config.early_exit

    @property
    def takes_tree_masks(self) -> bool:
        """Whether steps may verify token trees (`Batch.tree_mask`): attention runs in kernels of the package, which all do."""
        return True

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a text."""
        return self.manifest.model.eos_token_ids

    @property
    def weights_bytes(self) -> int:
        """Size of all weights in bytes; once the engine is prepared, with the copies that its native step reads."""
        copied = self._native.copied_bytes if self._native is not None else 0
        return sum(self.weights[name].num_bytes for name in self.plan.weight_names) + copied

    @property
    def native_step(self) -> str:
        """One line: which steps run as one native call, or why none do; certain once the engine is prepared."""
        return self._native_line or outlook(self.plan, self.config)

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
    def prepare(self) -> Execution:
        """Reads the weights onto the device and opens the segments' engines (once); called by the first use."""
        with self._lock:
            return self._prepare()

    def _prepare(self) -> Execution:
        if self._execution is None:
            if self.device.type == "cuda" and not torch.cuda.is_available():
                raise ValueError(
                    "the engine runs on a GPU, and torch sees no CUDA device here; save it and load it where one is"
                )
            if self.device.type == "cuda" and torch.cuda.current_device() != 0:
                raise ValueError(
                    f"the current CUDA device is {torch.cuda.current_device()}; an engine runs on device 0 of those that are "
                    "visible: choose the GPU with CUDA_VISIBLE_DEVICES"
                )
            with ThreadPoolExecutor(1) as pool:  # engines are opened while weights are read
                opening = pool.submit(
                    open_engines, self.plan, self.manifest.engines, self.config.target, self.engine_dir, self.device
                )
                tensors = weights_on({name: self.weights[name] for name in self.plan.weight_names}, self.device)
                lowered = opening.result()
            self._native, self._native_line = make_native_step(self.plan, self.manifest, tensors)
            opened = Opened(self.manifest, lowered, tensors, self.engine_dir, self.device)
            execution = Execution(self.plan, opened)
            if self.early_exit is not None:
                self._split = SplitSteps(self.plan, opened, execution, self._native)
            self._execution = execution
            if self.device.type == "cuda":
                self.weights = {name: Weight.from_tensor(tensor) for name, tensor in tensors.items()}  # not the sources
                torch.cuda.empty_cache()  # parts of joined weights: the KV cache can have their memory
        return self._execution

    def bind_cache(self, num_blocks: Sequence[int]) -> None:
        """Allocates the KV tensors, one number of blocks per cache group: [blocks, block_size, heads, D] per layer."""
        cache = self.manifest.cache
        if len(num_blocks) != len(cache.windows):
            raise ValueError(
                f"{len(num_blocks)} numbers of blocks for {len(cache.windows)} cache groups; give one each"
            )
        execution = self.prepare()
        self.release_cache()  # the old one first: both together may not fit
        caches = []
        for index, layer in enumerate(cache.layers):
            shape = (num_blocks[cache.group_of(index)], cache.block_size, layer.num_kv_heads)
            sizes = ((*shape, layer.head_dim), (*shape, layer.value_dim))
            k_cache, v_cache = (_zeros(size, layer.dtype, self.device) for size in sizes)
            caches.append((k_cache, v_cache))
        execution.bind_caches(caches)
        if self._split is not None:
            self._split.bind_caches(caches)

    def release_cache(self) -> None:
        """Frees the KV tensors and the captured steps that use them; `bind_cache` makes new ones."""
        if self._execution is not None:
            self._execution.bind_caches([])
        if self._split is not None:
            self._split.bind_caches([])
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the next cache is sized by what the driver calls free

    def capture(self) -> StepGraphs | None:
        """Captures decode steps as CUDA graphs; None where there is nothing to capture (`uncaptured` says why).

        Mixed steps are captured when their shape comes again. Needs the KV cache; binding another one drops the graphs.
        """
        if self.uncaptured is not None:
            return None
        graphs = self.prepare().capture(self.max_sequences)
        if self._split is not None:
            self._split.capture(self.max_sequences, self.max_batch_tokens)
        return graphs

    def write_native_steps(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Prepares native steps of these numbers of (tokens, rows of logits), as far as there are any; others when they first come.

        Needs the KV cache; binding another one drops them.
        """
        execution = self._ready_execution()
        if self._native is not None:
            self._native.write_ahead(sizes, execution.executor.caches)

    def graph_bytes(self) -> int:
        """Estimate of the memory that `capture` takes: the largest step's activations and the graphs themselves, in bytes."""
        if self.uncaptured is not None:
            return 0
        buckets = self.config.buckets
        rows = captured_sizes(buckets, self.max_sequences)[-1]
        graphs = len(decode_sizes(buckets, self.max_sequences)) + MIXED_GRAPHS
        return (
            self.activation_bytes()
            + 4 * rows * self.vocab_size
            + self._hidden_bytes()
            + graphs * len(self.plan.steps) * _BYTES_PER_CAPTURED_STEP
            + (0 if self.early_exit is None else split_graph_bytes(self.manifest, self.plan, self.max_sequences))
        )

    @property
    def uncaptured(self) -> str | None:
        """Why steps are not captured as CUDA graphs, or None if they can be."""
        if self.device.type != "cuda":
            return "CUDA graphs need a GPU"
        if not self.config.buckets:
            return "the engine was built without buckets"
        in_pytorch = [s for s in self.plan.segments.values() if s.eager or not self.manifest.engines_of(s.id)]
        blocked = {name for s in in_pytorch for name in s.operators if name.startswith(_UNCAPTURABLE)}
        return f"{', '.join(sorted(blocked))} decides on the host what it launches" if blocked else None

    def step(self, batch: Any) -> Tensor:
        """Runs one step on a runtime Batch: writes keys and values, returns logits [R, V] on the device.

        They are of the dtype in which the model computes them: float32 or the compute dtype.

        The logits of a captured decode step are overwritten by the next one.
        """
        return self.step_outputs(batch).logits

    def step_outputs(self, batch: Any) -> StepOutputs:
        """As `step`, with the hidden states of all rows of the batch where the engine was built with `hidden_layers`.

        A batch with `early` rows goes on behind the early exit, and gives logits alone.
        """
        execution = self._ready_execution()
        width, given = self.manifest.model.hidden_input, getattr(batch, "hidden", None)
        if (width is None) != (given is None):
            raise ValueError(
                f"{self.manifest.model.name} takes hidden states of {width} numbers beside each token (None: none), and the batch "
                f"brings {'none' if given is None else list(given.shape)}; set Batch.hidden"
            )
        if batch.early is not None:
            return self._split_steps().verify(batch)
        if self._native is not None and self._native.takes(batch):
            return self._native.step_outputs(batch, execution.executor.caches)
        return execution.step(batch)

    def draft(self, batch: Any) -> StepOutputs:
        """Runs the layers in front of the early exit: writes their keys and values, returns the exit's logits [R, V] and the hidden
        states [T, 1, H] that `Batch.early` brings back. Raises ValueError for an engine without an exit."""
        self._ready_execution()
        return self._split_steps().draft(batch)

    def _ready_execution(self) -> Execution:
        execution = self.prepare()
        if not execution.executor.caches and self.manifest.cache.layers:
            raise ValueError("the engine has no KV cache yet; call bind_cache, or use camshaft.LLM")
        return execution

    def _split_steps(self) -> SplitSteps:
        if self._split is None:
            raise ValueError(
                "the engine was built without an early exit; compile the model with early_exit=, a number of layers"
            )
        return self._split

    def copy_slots(self, group: int, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies keys and values of a cache group from slot sources[i] to slot destinations[i], for all i at once.

        A slot is block * block_size + offset. The copy comes behind the steps before it and in front of those after it, on the
        stream that they are called on; on CUDA the host does not wait for it.

        Raises ValueError for lists of different lengths, slots outside the cache and destinations that occur twice.
        """
        self.prepare().copy_slots(group, sources, destinations)

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
        return 2 * rows + 3 * self.max_sequences * self.vocab_size * 4 + self._hidden_bytes()

    def _hidden_bytes(self) -> int:
        """Size of the hidden states that a full step gives, in bytes."""
        width = len(self.hidden_layers) * (self.manifest.model.hidden_size or 0)
        return self.max_batch_tokens * width * getattr(torch, self.config.dtype).itemsize

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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU in pages that the system hands out when they are first touched, so that a large cache costs no time."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = dtype.itemsize
    for size in shape:
        count *= size
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
