"""The Llama-3.1-8B-shaped random model of gpu_core.py: build, agreement, throughput, where a step's time goes, artifact."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_core import DEVICE, Results, eager_tokens

ARTIFACT = Path("/tmp/camshaft-8b")
CHILD = """
import json, sys, time
start = time.perf_counter()
import camshaft
from camshaft import SamplingParams
times = {"import_s": time.perf_counter() - start}
begin = time.perf_counter()
engine = camshaft.load(sys.argv[1], verify=sys.argv[2] == "verify")
times["load_s"] = time.perf_counter() - begin
begin = time.perf_counter()
llm = camshaft.LLM(engine, kv_cache_bytes=1 << 28)
times["llm_s"] = time.perf_counter() - begin
begin = time.perf_counter()
prompt = json.loads(sys.argv[3])
tokens = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))[0].token_ids
times["first_token_s"] = time.perf_counter() - begin
times["start_to_first_token_s"] = time.perf_counter() - start
print(json.dumps({"token": tokens[0], **times}))
llm.shutdown()
"""


def make_model(layers: int, dtype: torch.dtype, small: bool) -> Any:
    """Llama-3.1-8B's shape with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if small:
        width = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 500}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **width, **heads, num_hidden_layers=layers, max_position_embeddings=8192, rope_theta=500000.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager").eval()


def build(model: Any, out: dict[str, Any], small: bool, **options: Any) -> Any:
    """Compiles twice (the second comes from the cache) and returns the engine."""
    import camshaft

    limits = {"max_seq_len": 256, "max_batch_tokens": 512, "max_sequences": 32} if small else {
        "max_seq_len": 4096, "max_batch_tokens": 8192, "max_sequences": 256
    }  # fmt: skip
    for label in ("build", "second_build"):
        start = time.perf_counter()
        engine = camshaft.compile(model, **limits, **options)
        out[f"{label}_s"] = time.perf_counter() - start
        out[f"{label}_phases"] = engine.manifest.timings
    out["engine"] = repr(engine)
    return engine


def agreement(model: Any, llm: Any, out: dict[str, Any]) -> list[list[int]]:
    """Greedy tokens of 16 requests x 32 tokens in one batch against eager, one by one; returns the prompts."""
    from camshaft import SamplingParams

    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 200, (16,), generator=generator).tolist()
    prompts = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
    start = time.perf_counter()
    references = [eager_tokens(model, prompt, 32) for prompt in prompts]
    out["eager_reference_s"] = time.perf_counter() - start
    start = time.perf_counter()
    llm.generate([prompts[0]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    out["first_generate_s"] = time.perf_counter() - start
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=1))
    equal, prefix, errors, gaps = 0, [], [], []
    for output, (tokens, logits) in zip(outputs, references):
        same = [a == b for a, b in zip(output.token_ids, tokens)]
        equal += sum(same)
        prefix.append(same.index(False) if False in same else 32)
        chosen = output.token_ids[0]
        errors.append(abs(float(logits.log_softmax(-1)[chosen]) - output.logprobs[0][chosen].logprob))
        top = logits.topk(2).values
        gaps.append(float(top[0] - top[1]))
    out["greedy"] = {
        "token_agreement": equal / (16 * 32),
        "first_token_agreement": sum(o.token_ids[0] == r[0][0] for o, r in zip(outputs, references)) / 16,
        "common_prefix_mean": statistics.mean(prefix),
        "first_logprob_error_max": max(errors),
        "eager_top1_to_top2_gap_median": statistics.median(gaps),
    }
    return prompts


@contextmanager
def step_timers(llm: Any) -> Iterator[dict[str, list[float]]]:
    """Host seconds of each part of every step while it is open; `sample` includes the wait for the device."""
    core, runner = llm._core, llm._core.runner
    places = {
        "schedule": (core.scheduler, "schedule"),
        "batch": (runner._builder, "build"),
        "engine": (core.engine, "step"),
        "sample": (runner.sampler, "sample"),
        "update": (core.scheduler, "update"),
        "step": (core, "step"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in places}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            seconds[name].append(time.perf_counter() - start)
            return result

        return call

    for name, (owner, method) in places.items():
        setattr(owner, method, timed(name, getattr(owner, method)))
    try:
        yield seconds
    finally:
        for owner, method in places.values():
            delattr(owner, method)


def throughput(llm: Any, vocab: int, out: dict[str, Any], num_requests: int, length: int, repeats: int) -> None:
    """Output tokens/s with all requests queued at once, random prompts, EOS ignored; and one latency row per batch size."""
    from camshaft import SamplingParams

    generator = torch.Generator().manual_seed(1)

    def prompts(count: int) -> list[list[int]]:  # new ones every time: nothing comes from the prefix cache
        return torch.randint(0, vocab, (count, length), generator=generator).tolist()

    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    batches: dict[str, Any] = {}
    for batch in (1, 8, 64):
        count = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        llm.generate(prompts(batch), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        start = time.perf_counter()
        llm.generate(prompts(batch), count)
        batches[str(batch)] = batch * 64 / (time.perf_counter() - start)
    out[f"tok_s_by_batch_{length}_64"] = batches
    rows = []
    for _ in range(repeats):
        requests = prompts(num_requests)
        with step_timers(llm) as seconds:
            start = time.perf_counter()
            outputs = llm.generate(requests, params)
            wall = time.perf_counter() - start
        tokens = sum(len(output.token_ids) for output in outputs)
        steps = [s for s in seconds["step"] if s > 1e-4]
        parts = {name: 1e3 * sum(values) / len(steps) for name, values in seconds.items()}
        rows.append(
            {
                "output_tok_s": tokens / wall,
                "wall_s": wall,
                "steps": len(steps),
                "step_ms_mean": 1e3 * statistics.mean(steps),
                "step_ms_median": 1e3 * statistics.median(steps),
                "step_ms_max": 1e3 * max(steps),
                "ms_per_step_by_part": parts,
                "outside_steps_s": wall - sum(steps),
            }
        )
    out[f"throughput_{length}_{length}"] = {"requests": num_requests, "runs": rows}


def decode_profile(llm: Any, vocab: int, out: dict[str, Any], batch_size: int) -> None:
    """One decode step of `batch_size` sequences, replayed: host time to launch, time on the device, kernels by time."""
    from torch.profiler import ProfilerActivity, profile

    from camshaft import SamplingParams

    kept: list[Any] = []
    engine = llm._core.engine
    step = engine.step

    def keep(batch: Any) -> Any:
        if batch.max_query_len == 1 and batch.num_sequences == batch_size:
            kept[:] = [batch]
        return step(batch)

    engine.step = keep
    try:
        prompts = torch.randint(0, vocab, (batch_size, 100)).tolist()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    finally:
        del engine.step
    batch = kept[0]
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    launches, totals = [], []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        step(batch)
        launches.append(time.perf_counter() - start)
        synchronize()
        totals.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step(batch)
        synchronize()
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    out[f"decode_{batch_size}"] = {
        "launch_ms_median": 1e3 * statistics.median(launches[2:]),
        "total_ms_median": 1e3 * statistics.median(totals[2:]),
        "device_busy_ms": sum(getattr(e, key) for e in events if e.device_type.name == "CUDA") / 1e3,
        "kernels": sum(e.count for e in events if e.device_type.name == "CUDA"),
    }
    rows = sorted(events, key=lambda e: -getattr(e, key))[:14]
    lines = [f"{getattr(e, key) / 1e3:9.3f} ms {e.count:5d} x {e.key[:90]}" for e in rows]
    out["profile"] = out.get("profile", "") + f"decode of {batch_size}, by {key}\n" + "\n".join(lines) + "\n"


def artifact(engine: Any, out: dict[str, Any]) -> None:
    """Saves the engine: seconds and bytes."""
    shutil.rmtree(ARTIFACT, ignore_errors=True)
    start = time.perf_counter()
    engine.save(ARTIFACT)
    files = [file for file in ARTIFACT.rglob("*") if file.is_file()]
    out["save_s"] = time.perf_counter() - start
    out["artifact_bytes"] = sum(file.stat().st_size for file in files)
    out["artifact_files"] = len(files)
    out["plan_and_engines_bytes"] = sum(f.stat().st_size for f in files if not f.name.startswith("weights"))


def reload(prompt: list[int], token: int, out: dict[str, Any]) -> None:
    """Opens the artifact in new processes, with and without checking sha256 (the files are in the page cache)."""
    for mode in ("verify", "trust"):
        start = time.perf_counter()
        command = [sys.executable, "-c", CHILD, str(ARTIFACT), mode, json.dumps(prompt)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if child.returncode:
            out[mode] = {"error": child.stderr[-1500:]}
            continue
        entry = json.loads(child.stdout.strip().splitlines()[-1])
        out[mode] = {**entry, "same_token": entry["token"] == token, "process_s": time.perf_counter() - start}


def run(results: Results, target: str, *, layers: int, num_requests: int, small: bool) -> None:
    """All parts; a part that fails leaves its error, and the next go on."""
    import camshaft
    from camshaft import SamplingParams

    state: dict[str, Any] = {}

    def exact(out: dict[str, Any]) -> None:
        model = make_model(4, torch.float32, small)
        engine = build(model, out, small, dtype=torch.float32, target=target)
        with camshaft.LLM(engine, kv_cache_bytes=1 << 30) as llm:
            agreement(model, llm, out)

    def serve(out: dict[str, Any]) -> None:
        start = time.perf_counter()
        state["model"] = model = make_model(layers, torch.bfloat16, small)
        out["model_s"] = time.perf_counter() - start
        state["engine"] = engine = build(model, out, small, target=target, dtype=torch.bfloat16)
        start = time.perf_counter()
        state["llm"] = llm = camshaft.LLM(engine, memory_fraction=0.8 if DEVICE == "cuda" else 0.1)
        out["llm_s"] = time.perf_counter() - start
        out["ledger"] = str(llm.memory)
        state["prompts"] = agreement(model, llm, out)

    def speed(out: dict[str, Any]) -> None:
        throughput(state["llm"], state["model"].config.vocab_size, out, num_requests, 32 if small else 128, 2)

    def profiles(out: dict[str, Any]) -> None:
        for batch in (1, 4 if small else 64, 8 if small else 256):
            decode_profile(state["llm"], state["model"].config.vocab_size, out, batch)

    def save(out: dict[str, Any]) -> None:
        llm, prompt = state["llm"], state["prompts"][0]
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        token = llm.generate([prompt], params)[0].token_ids[0]
        if DEVICE == "cuda":
            out["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            out["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        artifact(state["engine"], out)
        llm.shutdown()
        del llm
        state.clear()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        reload(prompt, token, out)
        shutil.rmtree(ARTIFACT, ignore_errors=True)

    results.section("llama-8b 4 layers fp32", exact)
    results.section(f"llama-8b {layers} layers bf16", serve)
    results.section("throughput bf16", speed)
    results.section("decode step bf16", profiles)
    results.section("artifact bf16", save)
