"""Execution: a plan on its device, one step at a time. Steps are padded to the sizes that the opened engines take.

    batch of T tokens, R rows -> padded to (T', R') -> executor -> logits [R, V], hidden states [T, L, H]

On CUDA a step is a graph that was captured for its shape (`cuda_graphs`); others are launched piece by piece.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .buckets import Bucketed, bucket_of, captured_sizes, varying_sizes
from .executor import Executor, StepContext
from .kernels.slots import SlotCopier
from .manifest import EngineFile, Manifest
from .segment import Plan
from .step_outputs import GraphPool, StepOutputs, stack_hidden
from .targets.base import Lowered, get_target

if TYPE_CHECKING:
    from .cuda_graphs import StepGraphs


def open_engines(
    plan: Plan, files: Sequence[EngineFile], target: str, directory: Path, device: torch.device
) -> dict[str, Lowered]:
    """Every segment of a plan, opened; engines of fixed sizes are opened when they are first used.

    target: of segments without an engine file. Raises LoweringError.
    """
    lowered: dict[str, Lowered] = {}
    for segment in plan.segments.values():
        mine = [file for file in files if file.segment == segment.id]
        varying = next((file for file in mine if file.tokens is None), None)
        whole: Lowered | None = None
        if varying is not None:
            whole = get_target(varying.target).load(segment, directory / varying.file, device)
        elif not mine:
            whole = get_target("eager" if segment.eager else target).load(segment, None, device)
        fixed = {file.tokens: file for file in mine if file.tokens is not None}
        if not fixed:
            assert whole is not None
            lowered[segment.id] = whole
            continue

        openers = {
            size: functools.partial(get_target(file.target).load, segment, directory / file.file, device)
            for size, file in fixed.items()
        }
        lowered[segment.id] = Bucketed(segment, openers, whole)
    return lowered


def open_together(engines: Sequence[Lowered], sizes: Sequence[int]) -> None:
    """Opens the engines of fixed sizes among `engines` for these sizes, many at once. Raises LoweringError."""
    jobs = [(engine, size) for size in sizes for engine in engines if isinstance(engine, Bucketed)]
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1) or 1) as pool:
        for _ in pool.map(lambda job: job[0].open(job[1]), jobs):
            pass


class StepSizes:
    """To what a step's numbers of tokens ("T") and rows of logits ("R") are padded: to the bucket where an engine takes nothing
    else, otherwise only to the fewest that engines of varying size take, `fewest`.
    """

    def __init__(self, plan: Plan, lowered: Mapping[str, Lowered], buckets: Sequence[int], fewest: int) -> None:
        self._buckets: dict[str, list[int]] = {}
        self._fixed: dict[str, set[int]] = {}
        self._fewest: dict[str, int] = {}
        for name in ("T", "R"):
            engines = [lowered[s.id] for s in plan.segments.values() if name in varying_sizes(s) and not s.eager]
            fixed = [{b for b in buckets if isinstance(e, Bucketed) and e.is_fixed(b)} for e in engines]
            self._fixed[name] = set[int]().union(*fixed)
            demanding = [sizes for e, sizes in zip(engines, fixed) if isinstance(e, Bucketed) and not e.takes_any]
            self._buckets[name] = [b for b in buckets if all(b in sizes for sizes in demanding)]
            self._fewest[name] = 1 if engines and all(1 in sizes for sizes in fixed) else fewest

    def padded(self, name: str, count: int) -> int:
        """The size that `count` tokens or rows are padded to."""
        count = max(count, self._fewest[name])
        if self._fixed[name]:
            bucket = bucket_of(self._buckets[name], count)
            return bucket if bucket in self._fixed[name] else count
        return count


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """An engine that has been opened: what executions of its plan, and of parts of it, are made of."""

    manifest: Manifest
    lowered: Mapping[str, Lowered]
    """Segment -> what `open_engines` opened."""
    weights: Mapping[str, Tensor]
    """Name -> tensor on `device`."""
    directory: Path
    """Of the engine files."""
    device: torch.device


class Execution:
    """A plan with its weights on the device, KV caches and, on CUDA, captured decode steps.

    like: the execution of another plan of the same engine, whose stream, bound segments and graphs' memory are shared: the two
    run one after another.
    """

    def __init__(self, plan: Plan, opened: Opened, like: Execution | None = None) -> None:
        manifest = opened.manifest
        self.device = device = opened.device
        self._has_logits = plan.has_logits
        self._hidden_input = plan.hidden_input
        self._manifest = manifest
        self._directory = opened.directory
        self._inputs = list(plan.inputs)
        target = manifest.build.target
        self._lowered = opened.lowered
        names = {file.target for file in manifest.engines} or {target}
        self._sizes = StepSizes(
            plan, self._lowered, manifest.build.buckets, max(get_target(name).fewest_tokens(device) for name in names)
        )
        self.executor: Executor = Executor(
            plan, self._lowered, opened.weights, batch_invariant=manifest.build.batch_invariant,
            like=None if like is None else like.executor,
        )  # fmt: skip
        self._graphs: StepGraphs | None = None
        self._copiers: dict[int, SlotCopier] = {}
        """Of cache groups whose slots have been copied."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = GraphPool()
        if like is not None:
            self._stream, self._pool = like._stream, like._pool

    def bind_caches(self, caches: list[tuple[Tensor, Tensor]]) -> None:
        """Takes the KV tensors of all layers; graphs that wrote to others are dropped."""
        self._graphs = None
        self._pool.clear()
        self._copiers.clear()
        self.executor.caches = caches

    @torch.inference_mode()
    def copy_slots(self, group: int, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `Engine.copy_slots`."""
        if group not in self._copiers:
            layers = self._manifest.cache.layers_of(group)
            self._copiers[group] = SlotCopier([self.executor.caches[layer] for layer in layers])
        self._copiers[group].copy(sources, destinations)

    def capture(self, max_sequences: int) -> StepGraphs:
        """Captures the decode steps of up to `max_sequences` sequences; mixed steps are captured as they come."""
        self.open(captured_sizes(self._manifest.build.buckets, max_sequences))
        graphs = self.capture_later(max_sequences, self._manifest.build.max_batch_tokens)
        graphs.capture_decodes()
        if "tensorrt" in self._manifest.targets:
            from .targets.tensorrt import keep_kernels

            keep_kernels(self._directory)
        return graphs

    def capture_later(self, max_sequences: int, max_tokens: int) -> StepGraphs:
        """Captures steps of up to `max_sequences` sequences and `max_tokens` tokens when their shape comes again."""
        from .cuda_graphs import CaptureLimits, StepGraphs

        build, cache, model = self._manifest.build, self._manifest.cache, self._manifest.model
        assert self._stream is not None
        width, dtype = self._hidden_input or (None, torch.float32)
        limits = CaptureLimits(
            build.buckets, max_tokens, max_sequences, build.max_seq_len,
            -(-build.max_seq_len // cache.block_size), len(cache.windows), model.vocab_size, width, dtype,
        )  # fmt: skip
        self._graphs = StepGraphs(self._launch, self._sizes, limits, self.device, self._stream, self._pool)
        return self._graphs

    def open(self, sizes: Sequence[int]) -> None:
        """Opens the engines of these sizes, many at once: TensorRT compiles kernels meanwhile, unless it finds them."""
        open_together(list(self._lowered.values()), sizes)

    @torch.inference_mode()
    def step(self, batch: Any) -> StepOutputs:
        """Logits, and hidden states where the plan has some, of a runtime Batch; keys and values are written."""
        if self._graphs is not None and (outputs := self._graphs.run(batch)) is not None:
            return outputs
        num_tokens, num_rows = batch.token_ids.shape[0], batch.sample_rows.shape[0]
        tokens = self._sizes.padded("T", num_tokens) - num_tokens
        rows = (
            self._sizes.padded("R", max(num_rows, 1)) - num_rows
        )  # a chunk inside a prompt: one row, which is dropped
        context = StepContext(
            [(_pad(group.slot_mapping, tokens, -1), group.block_tables) for group in batch.groups],
            batch.query_start, batch.seq_lens, batch.max_query_len, batch.max_seq_len,
            None if batch.tree_mask is None else _pad(batch.tree_mask, tokens, 0),
        )  # fmt: skip
        values = {
            "token_ids": _pad(batch.token_ids, tokens, 0)[None],
            "positions": _pad(batch.positions, tokens, 0)[None],
            "sample_rows": _pad(batch.sample_rows, rows, 0),
        }
        if self._hidden_input is not None:
            values["hidden"] = _pad(batch.hidden, tokens, 0)[None]
        with self._on_stream():
            logits, states = self._launch(values, context)
            return StepOutputs(logits[:num_rows], stack_hidden(states, num_tokens))

    def _launch(self, values: Mapping[str, Tensor], context: StepContext) -> tuple[Tensor, list[Tensor]]:
        results = self.executor.run([values[name] for name in self._inputs], context)
        if not self._has_logits:
            return results[0].new_empty(values["sample_rows"].shape[0], 0), results
        return results[0][0], results[1:]

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Work inside runs on a stream of its own, behind what was launched before and in front of what follows.

        TensorRT waits for the whole device when it is launched on the default stream.
        """
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def _pad(tensor: Tensor, count: int, value: int) -> Tensor:
    """`count` more entries along the first axis."""
    return torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.dim() - 1), 0, count), value=value) if count else tensor
