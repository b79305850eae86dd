"""Transformers' `generate` on the same requests, as the peer of a run: one by one, and in static batches.

A static batch is padded on the left to its longest prompt and runs until its longest output; only the tokens that were
asked for count. Both systems decode greedily, in the same dtype, on the same device, with the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .measure import Repeat
from .statistics import distribution
from .workload import BenchRequest

BATCH_SIZES = (8, 16, 32, 64)
"""Sizes of static batches that are tried; the best one is reported."""


class TransformersPeer:
    """A checkpoint opened by Transformers, with its default attention.

    path: a Hugging Face directory. dtype: name, such as "float32". device: "cpu" or "cuda". Raises ValueError for a
    directory that Transformers does not open.
    """

    def __init__(self, path: str | Path, *, dtype: str, device: str, ignore_eos: bool = True) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=getattr(torch, dtype))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"transformers does not open {path}: {str(error).splitlines()[0]}") from error
        self._model = model.to(device).eval()
        self._device = device
        generation = self._model.generation_config
        if ignore_eos:
            generation.eos_token_id = None
        generation.pad_token_id = 0

    def run(self, requests: Sequence[BenchRequest], batch_size: int) -> Repeat:
        """All requests in their order, `batch_size` at a time.

        Returns output_tok_s, total_tok_s, duration_s, steps, mean_batch_size, and request_s_* (arrival of all requests to a
        request's end).
        """
        start = time.perf_counter()
        num_output = num_steps = 0
        ends: list[float] = []
        for index in range(0, len(requests), batch_size):
            batch = requests[index : index + batch_size]
            num_output += self._generate(batch)
            num_steps += max(request.output_len for request in batch)
            ends.extend([time.perf_counter() - start] * len(batch))
        duration = time.perf_counter() - start
        num_input = sum(len(request.prompt) for request in requests)
        return {
            "output_tok_s": num_output / duration,
            "total_tok_s": (num_input + num_output) / duration,
            "requests_s": len(requests) / duration,
            "duration_s": duration,
            "input_tokens": float(num_input),
            "output_tokens": float(num_output),
            "steps": float(num_steps),
            "mean_batch_size": min(batch_size, len(requests)),
            **distribution("request_s", ends),
        }

    def latency(self, requests: Sequence[BenchRequest]) -> Repeat:
        """One request after another: decode_ms per token after the first, by the difference to a run of one token."""
        decode, totals, num_output = [], [], 0
        for request in requests:
            start = time.perf_counter()
            self._generate([BenchRequest(request.prompt, 1)])
            first = time.perf_counter() - start
            start = time.perf_counter()
            num_output += self._generate([request])
            totals.append(time.perf_counter() - start)
            if request.output_len > 1:
                decode.append(1e3 * (totals[-1] - first) / (request.output_len - 1))
        return {
            **distribution("decode_ms", decode),
            "request_s": sorted(totals)[len(totals) // 2],
            "output_tok_s": num_output / sum(totals),
            "output_tokens": float(num_output),
        }

    def _generate(self, batch: Sequence[BenchRequest]) -> int:
        """Runs one static batch and returns how many of its new tokens were asked for."""
        import torch

        longest = max(len(request.prompt) for request in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        most = max(request.output_len for request in batch)
        with torch.inference_mode():
            output = self._model.generate(
                ids.to(self._device), attention_mask=mask.to(self._device), max_new_tokens=most, do_sample=False
            )
        new = output[:, longest:].cpu()
        if self._model.generation_config.eos_token_id is None:
            return sum(request.output_len for request in batch)
        return sum(self._asked(row, request) for row, request in zip(new, batch))

    def _asked(self, row: Any, request: BenchRequest) -> int:
        """New tokens of a row up to its end of text, at most as many as were asked for."""
        eos = self._model.generation_config.eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos)
        for count, token in enumerate(row[: request.output_len].tolist(), start=1):
            if token in ends:
                return count
        return min(len(row), request.output_len)


def run_peer(
    peer: TransformersPeer,
    make: Callable[[int], Sequence[BenchRequest]],
    *,
    repeats: int,
    warmup: int,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    on_run: Callable[[str, int, Repeat], None] | None = None,
) -> list[tuple[str, int, list[Repeat]]]:
    """(system, batch size, repeats) of one by one, and of the batch size that was fastest in a first run over all requests.

    make: number of a repeat -> its requests. The first runs over the batch sizes are warm-up as well.
    """
    requests = make(-1)
    sizes = sorted({min(size, len(requests)) for size in batch_sizes})
    trials = {size: peer.run(requests, size)["output_tok_s"] for size in sizes}
    best = max(trials, key=lambda size: trials[size])
    results = []
    for label, size in (("transformers, one by one", 1), (f"transformers, static batches of {best}", best)):
        for _ in range(warmup if size == 1 else 0):
            peer.run(requests[: max(1, len(requests) // 8)], size)
        runs = []
        for index in range(repeats):
            runs.append(peer.run(make(index), size))
            if on_run is not None:
                on_run(label, index, runs[-1])
        results.append((label, size, runs))
    return results
