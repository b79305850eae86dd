"""How much memory the KV cache gets, and a ledger that says where the memory went.

GPU:  total * memory_fraction = weights and others in use now + activations of a full step + KV cache
CPU:  what `max_sequences` requests of `max_seq_len` tokens need, at most a share of the free memory
"""

from __future__ import annotations

import html
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from .batch import Engine
from .kv_cache import CacheGroup

logger = logging.getLogger(__name__)

GPU_MEMORY_FRACTION = 0.9
"""Share of a GPU's memory that Camshaft uses unless told otherwise."""
CPU_FREE_SHARE = 0.4
"""Share of the free main memory that the KV cache takes at most, unless told otherwise."""
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def format_bytes(num_bytes: float) -> str:
    """ "1.50 GiB" """
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """Where a device's memory goes, in bytes."""

    device: str
    weights_bytes: int
    kv_bytes: int
    """With that of a draft model, whose blocks are beside the target's."""
    activation_bytes: int
    """Estimate for a full step."""
    graph_bytes: int
    """Captured graphs and their buffers."""
    other_bytes: int
    """Used by something else when the cache was sized: other processes, the driver, libraries."""
    free_bytes: int
    """Left over."""
    total_bytes: int
    kv_tokens: int
    """Tokens of full-length requests that the KV cache holds at once."""
    draft_bytes: int = 0
    """Weights of a draft model."""

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes), the total last."""
        draft = [("draft model", self.draft_bytes)] if self.draft_bytes else []
        return [
            ("weights", self.weights_bytes),
            *draft,
            ("KV cache", self.kv_bytes),
            ("activations", self.activation_bytes),
            ("graphs", self.graph_bytes),
            ("others", self.other_bytes),
            ("free", self.free_bytes),
            ("total", self.total_bytes),
        ]

    def __str__(self) -> str:
        lines = [f"memory of {self.device}"]
        for name, size in self.rows():
            lines.append(f"  {name:<12}{format_bytes(size):>12}{size / max(self.total_bytes, 1):>8.1%}")
        return "\n".join([*lines, f"  the KV cache holds {self.kv_tokens:,} tokens"])

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td style='text-align:right'>{format_bytes(size)}</td>"
            f"<td style='text-align:right'>{size / max(self.total_bytes, 1):.1%}</td></tr>"
            for name, size in self.rows()
        )
        caption = f"memory of {html.escape(self.device)}; the KV cache holds {self.kv_tokens:,} tokens"
        return f"<table><caption>{caption}</caption>{body}</table>"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Blocks per cache group, and the ledger."""

    num_blocks: tuple[int, ...]
    ledger: MemoryLedger


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a device; for the CPU within the limits of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return host_memory()


def host_memory(
    proc: Path = Path("/proc/meminfo"), cgroups: tuple[tuple[str, str, str], ...] = _CGROUPS
) -> tuple[int, int]:
    """(available, total) bytes of main memory, the smaller of the machine's and the control group's.

    Raises:
        ValueError: the machine does not tell (no /proc/meminfo).
    """
    if not proc.is_file():
        raise ValueError(f"{proc} does not exist, so the free memory is unknown; pass kv_cache_bytes=...")
    fields = {name: int(rest.split()[0]) * 1024 for name, rest in _colon_fields(proc)}
    free, total = fields["MemAvailable"], fields["MemTotal"]
    for limit_file, usage_file, stat_file in cgroups:
        if not Path(limit_file).is_file():
            continue
        text = Path(limit_file).read_text().strip()
        if text == "max" or int(text) >= total:
            continue
        stat = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        total = int(text)
        free = max(0, min(free, total - int(Path(usage_file).read_text()) + reclaimable))
    return free, total


def _colon_fields(path: Path) -> list[tuple[str, str]]:
    return [(name, rest) for name, _, rest in (line.partition(":") for line in path.read_text().splitlines()) if rest]


def plan_cache(
    engine: Engine,
    *,
    max_chunk_tokens: int,
    kv_cache_bytes: int | None = None,
    memory_fraction: float | None = None,
    graph_bytes: int = 0,
    draft: Engine | None = None,
    draft_group: int = 0,
) -> CachePlan:
    """Decides how many blocks each cache group gets.

    The bytes are split so that every group holds the same number of requests of `max_seq_len` tokens: a group of
    sliding windows needs few blocks per request, one of full attention many.

    Args:
        max_chunk_tokens: most tokens of one request in a step (a window group holds them beside the window).
        kv_cache_bytes: size of the cache; None: decided as the module says.
        memory_fraction: share of the device's memory that may be used, in (0, 1]; not together with kv_cache_bytes.
        graph_bytes: to keep free for captured graphs.
        draft: a draft model; every block of the target's cache group `draft_group` comes with one of it.

    Raises:
        ValueError: a number is out of range, or a group would not get a single block.
    """
    if kv_cache_bytes is not None and memory_fraction is not None:
        raise ValueError(f"kv_cache_bytes={kv_cache_bytes} and memory_fraction={memory_fraction}; give one of the two")
    if kv_cache_bytes is not None and kv_cache_bytes <= 0:
        raise ValueError(f"kv_cache_bytes is {kv_cache_bytes}; allowed: > 0")
    if memory_fraction is not None and not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction is {memory_fraction}; allowed: in (0, 1]")
    free, total = device_memory(engine.device)
    activations = engine.activation_bytes() + (0 if draft is None else draft.activation_bytes())
    weights = engine.weights_bytes + (0 if draft is None else draft.weights_bytes)
    block_bytes = [spec.bytes_per_block for spec in engine.cache_groups]
    if draft is not None:
        block_bytes[draft_group] += sum(spec.bytes_per_block for spec in draft.cache_groups)
    per_request = _blocks_per_request(engine, max_chunk_tokens)
    request_bytes = sum(n * size for n, size in zip(per_request, block_bytes))
    if kv_cache_bytes is not None:
        budget, source = kv_cache_bytes, f"kv_cache_bytes={kv_cache_bytes}"
    elif engine.device.type == "cuda":
        fraction = GPU_MEMORY_FRACTION if memory_fraction is None else memory_fraction
        budget = int(free - (1 - fraction) * total) - activations - graph_bytes
        source = (
            f"memory_fraction={fraction} of {format_bytes(total)}, of which {format_bytes(total - free)} is in use "
            f"(weights {format_bytes(weights)}) and a step needs {format_bytes(activations)}"
        )
    else:
        share = CPU_FREE_SHARE if memory_fraction is None else memory_fraction
        budget = min(engine.max_sequences * request_bytes, int(share * free) - activations)
        source = f"a share of {share} of {format_bytes(free)} free memory"
    num_requests = budget / request_bytes if request_bytes else 1.0
    num_blocks = tuple(int(num_requests * n + 1e-9) for n in per_request)
    if min(num_blocks, default=1) < 1:
        smallest = sum(block_bytes)
        raise ValueError(
            f"the KV cache would get {format_bytes(max(budget, 0))} ({source}), which is not one block of "
            f"{engine.block_size} tokens in every cache group ({format_bytes(smallest)}); a request of "
            f"{engine.max_seq_len} tokens needs {format_bytes(request_bytes)}. Raise kv_cache_bytes or "
            "memory_fraction, free memory on the device, or compile with a smaller max_seq_len or max_batch_tokens"
        )
    kv_bytes = sum(n * size for n, size in zip(num_blocks, block_bytes))
    if kv_bytes > free:
        raise ValueError(
            f"a KV cache of {format_bytes(kv_bytes)} ({source}) does not fit the {format_bytes(free)} that are free on "
            f"{engine.device}; lower kv_cache_bytes to at most {max(0, free - activations)}"
        )
    other = max(0, total - free - weights)
    left = max(0, free - kv_bytes - activations - graph_bytes)
    ledger = MemoryLedger(
        device=str(engine.device), weights_bytes=engine.weights_bytes, kv_bytes=kv_bytes, activation_bytes=activations,
        graph_bytes=graph_bytes, other_bytes=other, free_bytes=left, total_bytes=total,
        kv_tokens=int(num_requests * engine.max_seq_len), draft_bytes=0 if draft is None else draft.weights_bytes,
    )  # fmt: skip
    if num_requests < 1:
        logger.warning("the KV cache holds %d tokens, less than one request of max_seq_len=%d", ledger.kv_tokens,
                       engine.max_seq_len)  # fmt: skip
    return CachePlan(num_blocks=num_blocks, ledger=ledger)


def _blocks_per_request(engine: Engine, max_chunk_tokens: int) -> tuple[int, ...]:
    """Blocks that one request of max_seq_len tokens holds in each group."""
    return tuple(
        CacheGroup(num_blocks=1, block_size=engine.block_size, window=spec.window).max_blocks_held(
            engine.max_seq_len, max_chunk_tokens
        )
        for spec in engine.cache_groups
    )
