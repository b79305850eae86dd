"""The sampler on a GPU: a row's token and log-probabilities are the same bits whatever rows are sampled with it.

`pytest -m gpu tests/gpu/test_sampler_rows.py -s`; it prints the time of a sample. Seconds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from camshaft.runtime.logits import SamplingState
from camshaft.runtime.packing import HostCopy
from camshaft.runtime.sampler import Sampler
from camshaft.runtime.sampling_params import SamplingParams

pytestmark = pytest.mark.gpu
ROWS = (1, 2, 7, 64, 300)
CHOICES: list[dict[str, float]] = [
    {}, {"top_p": 0.9}, {"top_k": 40}, {"temperature": 0.7, "top_p": 0.5, "min_p": 0.01}, {"temperature": 0},
    {"top_k": 1500, "top_p": 0.8}, {"min_p": 0.2}, {"top_p": 0.97, "temperature": 1.3},
]  # fmt: skip


def states(num_rows: int, logprobs: int | None) -> list[SamplingState]:
    return [
        SamplingState(SamplingParams(logprobs=logprobs, **CHOICES[row % len(CHOICES)]), [1], [], row)  # type: ignore[arg-type]
        for row in range(num_rows)
    ]


def random_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """bfloat16, so that many are equal; steep rows and flat ones."""
    generator = torch.Generator("cuda").manual_seed(7)
    scale = torch.linspace(0.02, 9, num_rows, device="cuda")[:, None]
    return (torch.randn(num_rows, vocab_size, generator=generator, device="cuda") * scale).bfloat16()


@pytest.mark.parametrize("vocab_size", [1000, 50_257, 128_256])
def test_rows_do_not_depend_on_their_number(vocab_size: int) -> None:
    logits, rows = random_logits(max(ROWS), vocab_size), states(max(ROWS), 5)
    whole = Sampler(vocab_size, "cuda").sample(logits.clone(), rows)
    assert whole.logprobs is not None and whole.tokens.min() >= 0
    for num_rows in ROWS:
        for first in sorted({0, 3, 128, max(ROWS) - num_rows}):
            part = slice(first, first + num_rows)
            if part.stop > max(ROWS):
                continue
            output = Sampler(vocab_size, "cuda").sample(logits[part].clone(), rows[part])
            assert output.logprobs is not None
            assert output.tokens.tolist() == whole.tokens[part].tolist(), (num_rows, first)
            for name in ("top_ids", "top_logprobs", "logprobs", "ranks"):
                mine, other = getattr(output.logprobs, name), getattr(whole.logprobs, name)[part]
                assert np.array_equal(mine, other), (num_rows, first, name)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_time_of_a_sample(params: dict[str, float]) -> None:
    for num_rows in (1, 64, 256):
        rows = [SamplingState(SamplingParams(**params), [1], [], row) for row in range(num_rows)]  # type: ignore[arg-type]
        logits, sampler = random_logits(num_rows, 128_256) * 3, Sampler(128_256, "cuda")
        steps = np.zeros(num_rows, dtype=np.int64)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for event, repeats in zip(events, (3, 20)):
            for _ in range(repeats):
                sampler.launch(logits.clone(), rows, steps)
            event.record()
        torch.cuda.synchronize()
        print(f"{params} {num_rows} rows: {events[0].elapsed_time(events[1]) / 20:.3f} ms")


def test_a_copy_of_nothing_waits_for_the_device() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        x = (x @ x).clamp_(-1, 1)
    done = torch.cuda.Event()
    done.record()
    HostCopy([], torch.device("cuda")).wait()
    assert done.query()
