"""Tile sizes of the Triton attention kernels, timed on a GPU; for `gpu_attention.py`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from attention_steps import CACHES, DIM, Step
from camshaft.export.kernels.triton.configs import DecodeConfig, PrefillConfig, decode_config

DECODE_TILES = [  # keys a step, warps, most registers of a thread, stages
    (32, 1, None, (5,)), (64, 2, None, (5,)), (64, 2, None, (7,)),
]  # fmt: skip
TRANSPOSED_TILES = [
    (32, 1, None, (4, 5, 7)), (32, 1, 104, (4, 5)), (16, 1, None, (5, 7)), (64, 1, None, (4, 5)),
    (64, 2, None, (4, 5)), (64, 4, None, (4, 5)), (128, 4, None, (4, 5)),
]  # fmt: skip
PREFILL_TILES = [(256, 64, 8), (256, 32, 8), (128, 128, 8), (128, 64, 8), (64, 64, 4)]
SUSTAINED_S = 0.6
"""Long enough for a GPU at its power limit to lower its clock."""


def decode_configs(cache: str) -> list[DecodeConfig]:
    """What a sweep of decode steps times: queries as rows of the products, then keys as rows."""
    base = decode_config(DIM, CACHES[cache].itemsize, 2)
    return [
        dataclasses.replace(base, block_n=n, num_warps=w, num_stages=s, max_registers=r, transposed=transposed)
        for transposed, tiles in ((False, DECODE_TILES), (True, TRANSPOSED_TILES))
        for n, w, r, stages in tiles
        for s in stages
    ]


def compile_all(jobs: Iterable[Callable[[], object]], threads: int) -> None:
    """Runs every job once, so that its kernel is compiled; jobs that do not compile say so when they are timed."""

    def attempt(job: Callable[[], object]) -> None:
        try:
            job()
        except (RuntimeError, triton.TritonError) as error:
            print("does not compile:", str(error).splitlines()[0], flush=True)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(attempt, jobs))
    torch.cuda.synchronize()


def sweep(kind: str, threads: int) -> list[dict[str, Any]]:
    """Times tile sizes: decode of 1,024 x 600, 8 x 1500 and 1 x 256 tokens, or prefill of 4 x 2048 tokens; the fastest first.

    Decode's three fastest of either kind are timed once more under load of `SUSTAINED_S` seconds each.
    """
    rows = []
    for cache in CACHES:
        configs: list[Any]
        if kind == "decode":
            steps = {
                "1024 x 600": Step([(1, 600)] * 1024, cache),
                "8 x 1500": Step([(1, 1500)] * 8, cache),
                "1 x 256": Step([(1, 256)], cache),
            }
            configs = list(decode_configs(cache))
        else:
            steps = {"4 x 2048": Step([(2048, 2048)] * 4, cache, layers=4)}
            configs = [
                PrefillConfig(block_m=m, block_n=n, num_warps=w, num_stages=s, programs_per_processor=p)
                for (m, n, w), s, p in itertools.product(PREFILL_TILES, (3, 5), (1, 4, 16))
            ]
        compile_all([functools.partial(s.call, **{kind: c}) for s in steps.values() for c in configs], threads)
        timed: list[tuple[dict[str, Any], Any]] = []
        for config in configs:
            entry: dict[str, Any] = {"cache": cache, **dataclasses.asdict(config)}
            try:
                for name, step in steps.items():
                    entry[f"{name} us"] = round(step.time_us(**{kind: config}), 2)
            except (RuntimeError, triton.TritonError) as error:
                entry["error"] = str(error).splitlines()[0][:80]
            timed.append((entry, config))
        first = next(iter(steps))
        timed.sort(key=lambda pair: pair[0].get(f"{first} us", float("inf")))
        if kind == "decode":
            for transposed in (False, True):
                best = [pair for pair in timed if pair[1].transposed == transposed and "error" not in pair[0]][:3]
                for entry, config in best:
                    entry[f"{first} us, sustained"] = round(sustained_us(steps[first], config), 2)
        rows += [entry for entry, _ in timed]
    return rows


def sustained_us(step: Step, config: DecodeConfig) -> float:
    """Microseconds a layer, the mean of the second half of `SUSTAINED_S` seconds without a pause."""
    step.run(decode=config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(decode=config)
    count = max(1, round(SUSTAINED_S / 2 * 1e6 / (step.time_us(decode=config) * step.layers)))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(count):
        graph.replay()
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / count / step.layers
