"""The path that is measured, on a GPU: captured steps, asynchronous scheduling, fp8; its tokens against Transformers' own.

pytest -m gpu tests/gpu/test_fast_path.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from camshaft.models import demo
from families import random_model, tiny_config
from row_traces import batch_of, bind_caches, chunked, first_difference, interleaved, trace_steps
from transformers import AutoModelForCausalLM

import camshaft
from camshaft import LLM, SamplingParams

pytestmark = pytest.mark.gpu
LENGTHS = [3, 70, 20, 1, 9, 33, 5, 64, 17, 2, 41, 8]
PROMPTS = [[(7 * i + 3 * j) % 120 + 1 for j in range(n)] for i, n in enumerate(LENGTHS)]
TEXTS = [
    "A dictionary maps", "The package manager keeps track of", "When a process is created, the kernel", "def main():",
    "An exception is raised if", "The file system", "To install the library,", "A thread is",
]  # fmt: skip


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Transformers' own tokens, EOS ignored."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens], device="cuda")).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_captured_steps_of_mixed_batches_give_eagers_tokens(family: str, async_scheduling: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_model(tiny_config(family)).to("cuda")
    engine = camshaft.compile(
        model, target="inductor", dtype="float32", max_seq_len=128, max_batch_tokens=96, max_sequences=8, cache=False
    )
    counts = [5 + 2 * i for i in range(len(PROMPTS))]
    expected = [greedy(model, prompt, count) for prompt, count in zip(PROMPTS, counts)]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
    with LLM(
        engine, kv_cache_bytes=1 << 24, enable_prefix_cache=False, max_chunk_tokens=40, async_scheduling=async_scheduling
    ) as llm:  # fmt: skip
        for _ in range(3):  # shapes of mixed steps are captured when they come again
            assert [list(output.token_ids) for output in llm.generate(PROMPTS, params)] == expected
        graphs = engine.prepare()._graphs
        assert graphs is not None and not graphs.failures
        assert any(not shape.decode for shape in graphs.shapes)


def test_bfloat16_tokens_are_eagers_but_for_ties() -> None:
    """Where a token differs, eager's own logits for the two must lie within bfloat16's rounding of each other."""
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.bfloat16).cuda().eval()
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    with LLM(camshaft.compile("demo", target="inductor", cache=False), kv_cache_bytes=1 << 28) as llm:
        outputs = llm.generate(TEXTS * 4, params)
    equal = 0
    for output in outputs:
        assert output.prompt_token_ids is not None
        prompt, ours = list(output.prompt_token_ids), list(output.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ours[:-1]], device="cuda")).logits[0, len(prompt) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(ours, device="cuda")[:, None])[:, 0]
        gaps = logits.amax(1) - chosen
        assert float(gaps.max()) <= 0.15, f"{output.prompt!r}: eager prefers another token by {float(gaps.max()):.3f}"
        equal += ours == greedy(model, prompt, 64)
    print(f"{equal} of {len(outputs)} texts equal eager's in bfloat16, token for token")
    assert equal >= len(outputs) // 2


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_rows_of_a_step_do_not_depend_on_each_other(quantize: str | None, kv_cache_dtype: str) -> None:
    """Every operation's result for each token, to the last bit: a sequence alone, among others in other chunks, and captured.

    It names the first operation that gives a row something else.
    """
    engine = camshaft.compile(
        "demo", target="inductor", quantize=quantize, kv_cache_dtype=kv_cache_dtype, batch_invariant=True, max_seq_len=256,
        max_batch_tokens=512, max_sequences=16, cache=False,
    )  # fmt: skip
    lengths = [3, 70, 20, 1, 9, 130, 5, 64, 17, 2, 41, 8, 33, 24, 200, 65]
    prompts = [[(7 * i + 3 * j) % 4000 + 4 for j in range(n)] for i, n in enumerate(lengths)]
    bind_caches(engine, len(prompts))
    alone = [
        trace_steps(engine, prompts, [[(i, *chunk)] for chunk in chunked(n, 24)])[i] for i, n in enumerate(lengths)
    ]
    logits = next(reversed(alone[0]))
    for size in (24, 17, 7):
        bind_caches(engine, len(prompts))
        together = trace_steps(engine, prompts, interleaved(lengths, size))
        found = {i: first_difference(trace, together[i]) for i, trace in enumerate(alone)}
        assert not any(found.values()), f"chunks of {size}: {found}"
    engine.capture()  # decode steps again: they write what is there already
    for count in (1, 2, 3, 5, 16):
        batch = batch_of(engine, prompts, [(i, n - 1, n) for i, n in enumerate(lengths[:count])])
        for kind in ("replayed", "captured when it was needed often"):
            for _ in range(12):
                rows = engine.step(batch).cpu()
            for i, row in enumerate(rows):
                assert torch.equal(row, alone[i][logits][-1][-1]), f"decode step of {count}, {kind}, sequence {i}"


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_batch_invariance(quantize: str | None) -> None:
    """A request's tokens and log-probabilities, alone and in a full batch with chunked prompts, to the last bit; twice."""
    engine = camshaft.compile(
        "demo", target="inductor", quantize=quantize, batch_invariant=True, max_batch_tokens=256, max_sequences=32,
        cache=False,
    )  # fmt: skip
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=48, ignore_eos=True, logprobs=1)

    def results(llm: LLM, texts: list[str]) -> list[tuple[list[int], float | None]]:
        return [(list(o.token_ids), o.outputs[0].cumulative_logprob) for o in llm.generate(texts, params)]

    long = [text + " " + " ".join(TEXTS) for text in TEXTS]
    with LLM(engine, kv_cache_bytes=1 << 28, enable_prefix_cache=False, max_chunk_tokens=24) as llm:
        alone = [results(llm, [text])[0] for text in (*TEXTS, *long)]
        for attempt in range(2):
            together = results(llm, [*TEXTS, *long] * 2)
            for i, ((tokens, logprob), (wanted, wanted_logprob)) in enumerate(zip(together, alone * 2, strict=True)):
                at = next((at for at, pair in enumerate(zip(tokens, wanted)) if pair[0] != pair[1]), None)
                assert at is None, f"attempt {attempt}, request {i}: token {at} differs: {tokens} {wanted}"
                # the tokens are equal: what is left is the sampler's sum
                assert logprob == wanted_logprob, f"attempt {attempt}, request {i}: {logprob} {wanted_logprob}"


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_fp8_agrees_with_the_definitions(kv_cache_dtype: str) -> None:
    """Mean log-probability of text with fp8 kernels, against the same program run operator by operator in PyTorch.

    Single tokens differ: a value near the border of two fp8 numbers falls to either side.
    """
    heldout = demo.heldout_path().read_text()
    texts = [heldout[start : start + 1000] for start in range(0, 32_000, 1000)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    sums = []
    for target in ("eager", "inductor"):
        engine = camshaft.compile("demo", target=target, quantize="fp8", kv_cache_dtype=kv_cache_dtype, cache=False)
        with LLM(engine, kv_cache_bytes=1 << 28) as llm:
            total, count = 0.0, 0
            for output in llm.generate(texts, params):
                assert output.prompt_logprobs is not None and output.prompt_token_ids is not None
                for token, row in zip(output.prompt_token_ids, output.prompt_logprobs):
                    if row is not None:
                        total, count = total + row[token].logprob, count + 1
            sums.append(total / count)
    assert abs(sums[0] - sums[1]) < 0.01, sums
