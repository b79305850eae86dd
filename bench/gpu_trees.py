"""Token trees on a GPU: attention with masks and slots that move, against the reference first, and then timed.

    python3 bench/gpu_trees.py --out OUT [--budget-s 240]

Llama-3.1-8B's attention (32 heads, 8 kv heads, size 128, blocks of 16 tokens), bfloat16 queries, a bfloat16 or an fp8 cache. A
step verifies a tree of `rows` rows for each of S sequences; beside it the same rows as a chain, without masks, and a decode step.
Times are of one layer, from a CUDA graph over several layers' caches. Slots are copied in 32 layers at once, from the host's lists
on, as the serving loop does it. A variant that fails is recorded, and the others go on. Writes OUT/gpu-trees.json; the table comes
last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from attention_steps import BLOCK, CACHES, DEVICE, DIM, KV, Step
from camshaft.export.kernels import reference
from camshaft.export.kernels.slots import SlotCopier

ROWS = (8, 16, 49)
BATCHES = (1, 4, 16, 64)
CONTEXTS = (1000, 8000)
LAYERS = 32


def tree_mask(lengths: list[tuple[int, int]]) -> torch.Tensor:
    """[T] int64: a random tree for each sequence."""
    rng, masks = random.Random(0), []
    for rows, _ in lengths:
        own: list[int] = []
        for row in range(rows):
            own.append((own[rng.randrange(max(0, row - 6), row)] if row else 0) | 1 << row)
        masks += own
    return torch.tensor(masks, dtype=torch.int64, device=DEVICE)


# ------------------------------------------------------------------------------------------------------------ numerics
def check_attention(cache: str, window: int) -> dict[str, Any]:
    """Largest error of trees, texts and decodes in one step."""
    step = Step([(49, 900), (1, 70), (8, 8), (30, 500), (5, 21)], cache, layers=1)
    mask = tree_mask(step.lengths)
    mask[50:58] = 0
    before = tuple(tensor.clone() for tensor in step.caches[0])

    def widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **more: Any) -> torch.Tensor:  # fmt: skip  # noqa: E501
        k, v = (t.to(k_cache.dtype).to(q.dtype) for t in (k, v))
        return reference.paged_attention(q, k, v, k_cache.float(), v_cache.float(), **more)

    expected = step.call(kernel=widened, tree_mask=mask, window=window).float()
    step.caches = [before]
    difference = (step.call(tree_mask=mask, window=window).float() - expected).abs()
    excess = (difference - 1.6e-2 * expected.abs()).max().item()  # bfloat16 rounds the softmax's weights and the result
    return {
        "check": f"attention, {cache}, window {window}",
        "max_error": difference.max().item(),
        "ok": excess < 1.6e-2,
    }


def check_copies(dtype: torch.dtype) -> dict[str, Any]:
    """Copies whose sources are also overwritten."""
    caches = [tuple(torch.randn(9, BLOCK, KV, DIM, device=DEVICE).to(dtype) for _ in range(2)) for _ in range(3)]
    rng = random.Random(0)
    sources, destinations = (rng.sample(range(9 * BLOCK), 60) for _ in range(2))
    expected = []
    for cache in (cache for pair in caches for cache in pair):
        slots = cache.view(torch.uint8).flatten(0, 1).clone()
        slots[destinations] = slots[sources]
        expected.append(slots)
    SlotCopier([(k, v) for k, v in caches]).copy(sources, destinations)
    same = [torch.equal(c.view(torch.uint8).flatten(0, 1), e) for c, e in zip((c for p in caches for c in p), expected)]
    return {"check": f"copies, {dtype}", "ok": all(same)}


# --------------------------------------------------------------------------------------------------------------- times
def time_attention(cache: str, batch: int, context: int, rows: int) -> dict[str, Any]:
    """Microseconds of a layer: a tree, the same rows as a chain, one row a sequence."""
    step = Step([(rows, context + rows)] * batch, cache)
    mask = tree_mask(step.lengths)
    tree, chain = step.time_us(tree_mask=mask), step.time_us()
    decode = Step([(1, context + 1)] * batch, cache).time_us()
    return {
        "attention": cache, "batch": batch, "context": context, "rows": rows, "tree_us": tree, "chain_us": chain,
        "decode_us": decode,
    }  # fmt: skip


def time_copies(batch: int, moves: int) -> dict[str, Any]:
    """Copies of `moves` slots for each of the requests, in 32 layers: the host's time and the device's, in microseconds."""
    num_slots = 64 * BLOCK * max(1, batch // 4)
    caches = [
        tuple(torch.zeros(num_slots // BLOCK, BLOCK, KV, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        for _ in range(LAYERS)
    ]
    copier = SlotCopier([(k, v) for k, v in caches])
    slots = random.Random(0).sample(range(num_slots), 2 * batch * moves)
    host, device = [], []
    for _ in range(30):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        start.record()
        copier.copy(slots[::2], slots[1::2])
        end.record()
        host.append((time.perf_counter() - begin) * 1e6)
        end.synchronize()
        device.append(start.elapsed_time(end) * 1e3)
    return {
        "copies": batch * moves, "batch": batch, "host_us": statistics.median(host[5:]), "device_us": statistics.median(device[5:])
    }  # fmt: skip


def jobs() -> Iterator[Callable[[], dict[str, Any]]]:
    """Everything, in the order of interest."""
    for cache, window in itertools.product(CACHES, (0, 40)):
        yield lambda cache=cache, window=window: check_attention(cache, window)
    for dtype in CACHES.values():
        yield lambda dtype=dtype: check_copies(dtype)
    for batch in BATCHES:
        yield lambda batch=batch: time_copies(batch, 3)
    for context, cache, batch, rows in itertools.product(CONTEXTS, CACHES, BATCHES, ROWS):
        yield lambda c=cache, b=batch, n=context, r=rows: time_attention(c, b, n, r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=240)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start, results = time.perf_counter(), []
    for job in jobs():
        if time.perf_counter() - start > arguments.budget_s:
            results.append({"error": "out of time; the rest was left out"})
            break
        try:
            results.append(job())
        except (RuntimeError, ValueError, AssertionError, triton.TritonError) as error:
            results.append({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]})
        print(results[-1], flush=True)
    document = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "results": results,
    }  # fmt: skip
    (arguments.out / "gpu-trees.json").write_text(json.dumps(document, indent=1))
    print(f"{'cache':5} {'context':>7} {'batch':>5} {'rows':>4} {'tree us':>9} {'chain us':>9} {'decode us':>9}")
    for entry in results:
        if "attention" in entry:
            print(
                f"{entry['attention']:5} {entry['context']:7} {entry['batch']:5} {entry['rows']:4} {entry['tree_us']:9.1f} "
                f"{entry['chain_us']:9.1f} {entry['decode_us']:9.1f}"
            )
        elif "copies" in entry:
            print(
                f"{entry['copies']} slots in {LAYERS} layers: {entry['host_us']:.0f} us host, {entry['device_us']:.0f} us"
            )
        elif not entry.get("ok"):
            print("FAIL", entry.get("check"), entry.get("error", ""))


if __name__ == "__main__":
    main()
