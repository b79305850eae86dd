"""Asynchronous scheduling on a GPU: the same tokens as in turns, then what it brings.

    python3 bench/gpu_async.py --out OUT [--layers 4] [--sequences 256] [--skip-speed]

First a small model in all kinds of load: both orders must give the same tokens (batches differ between them, so a sample in
fifty may differ by rounding; more end the script with code 1). Then loads in which torch raises where the host waits for the
device unasked. Then a random Llama-shaped one: tokens per second and the serving thread's time in both orders. Writes
OUT/gpu-async.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(vocab_size: int) -> tuple[list[list[int]], list[Any]]:
    """Prompts and parameters with prefixes, samples, stops, penalties and log-probabilities."""
    from camshaft import SamplingParams

    rng = random.Random(1)
    head = [rng.randrange(3, vocab_size) for _ in range(20)]
    prompts, params = [], []
    for number in range(60):
        tail = [rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, 30))]
        prompts.append((head if number % 3 == 0 else []) + tail)
        random_row = number % 4 > 1
        params.append(
            SamplingParams(
                n=1 + number % 2,
                temperature=0.9 if random_row else 0.0,
                top_k=20 if random_row and number % 5 == 0 else 0,
                top_p=0.9 if number % 6 == 3 else 1.0,
                seed=number,
                max_tokens=rng.randrange(8, 40),
                stop_token_ids=[rng.randrange(3, vocab_size) for _ in range(3)],
                repetition_penalty=1.2 if number >= 50 and number % 5 == 4 else 1.0,
                logprobs=1 if number % 7 == 0 else None,
                prompt_logprobs=1 if number % 11 == 0 else None,
            )
        )
    return prompts, params


def agreement(target: str) -> dict[str, Any]:
    """Outputs of a small engine in both orders, with preemption and prefix hits."""
    from families import random_model, tiny_config

    import camshaft

    entry: dict[str, Any] = {}
    for family in ("llama", "gemma2"):
        engine = camshaft.compile(
            random_model(tiny_config(family)), target=target, device=DEVICE, dtype=torch.float32, max_seq_len=96,
            max_batch_tokens=64, max_sequences=16, block_size=16,
        )  # fmt: skip
        prompts, params = load(128)
        cache_bytes = sum(group.bytes_per_block for group in engine.cache_groups) * 26
        runs, times = [], []
        for asynchronous in (False, True, True):
            with camshaft.LLM(
                engine, kv_cache_bytes=cache_bytes, policy="max_utilization", async_scheduling=asynchronous
            ) as llm:
                outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, progress=False)
                times.append(llm.stats().times)
                preemptions = llm.stats().scheduler.preemptions
            runs.append([(o.token_ids, o.finish_reason) for output in outputs for o in output.outputs])
        entry[family] = {
            "samples": len(runs[0]),
            "samples_that_differ": [sum(a != b for a, b in zip(run, runs[0])) for run in runs[1:]],
            "ahead": times[1].ahead, "late": times[1].late, "steps": times[1].steps, "preemptions": preemptions,
        }  # fmt: skip
    return entry


def hidden_waits(target: str) -> dict[str, str]:
    """Runs loads while torch raises on every call that makes the host wait for the device; what it said, or "none"."""
    from families import random_model, tiny_config

    import camshaft
    from camshaft import SamplingParams

    engine = camshaft.compile(
        random_model(tiny_config("llama")), target=target, device=DEVICE, dtype=torch.float32, max_seq_len=96,
        max_batch_tokens=64, max_sequences=16, block_size=16,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [3 + i, 4, 5]} for i in range(40)]
    cases = {
        "greedy": SamplingParams(temperature=0, max_tokens=20),
        "random": SamplingParams(max_tokens=20),
        "top_k": SamplingParams(max_tokens=20, top_k=20, top_p=0.9, min_p=0.01),
        "penalties": SamplingParams(max_tokens=20, repetition_penalty=1.2, frequency_penalty=0.1),
        "logprobs": SamplingParams(temperature=0, max_tokens=20, logprobs=3, prompt_logprobs=2),
    }
    found = {}
    with camshaft.LLM(engine, memory_fraction=0.2, async_scheduling=True) as llm:
        for name, params in cases.items():
            llm.generate(prompts, params, progress=False)  # first uses allocate and compile
            torch.cuda.set_sync_debug_mode("error")
            try:
                llm.generate(prompts, params, progress=False)
                found[name] = "none"
            except Exception as error:
                found[name] = str(error)[:600]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


def speed(layers: int, num_sequences: int, target: str) -> list[dict[str, Any]]:
    """Tokens per second of 128 in, 128 out, and where the serving thread's time goes per step."""
    import transformers

    import camshaft
    from camshaft import SamplingParams

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    engine = camshaft.compile(
        model, target=target, device=DEVICE, max_seq_len=1024, max_batch_tokens=4096, max_sequences=num_sequences
    )
    del model
    prompts = torch.randint(3, 120_000, (3 * num_sequences, 128)).tolist()
    rows = []
    for count, greedy in ((1, True), (3 * num_sequences, True), (3 * num_sequences, False)):
        for asynchronous in (False, True):
            params = SamplingParams(
                temperature=0.0 if greedy else 0.8, max_tokens=128, ignore_eos=True, detokenize=False, seed=1
            )
            with camshaft.LLM(engine, memory_fraction=0.6, async_scheduling=asynchronous) as llm:
                llm.generate(prompts[:2], params, progress=False)
                before = llm.stats().times
                start = time.perf_counter()
                llm.generate(prompts[:count], params, progress=False)
                seconds = time.perf_counter() - start
                after = llm.stats().times
            steps = after.steps - before.steps
            names = ("schedule_s", "launch_s", "wait_s", "deliver_s")
            per_step = {
                name[:-1] + "ms": 1e3 * (getattr(after, name) - getattr(before, name)) / steps for name in names
            }
            rows.append({
                "requests": count, "greedy": greedy, "asynchronous": asynchronous, "tok_s": 128 * count / seconds,
                "steps": steps, "step_ms": 1e3 * seconds / steps, **{k: round(v, 3) for k, v in per_step.items()},
            })  # fmt: skip
    return rows


def main() -> None:
    """Checks, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="inductor")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--skip-speed", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("CAMSHAFT_CACHE", "/tmp/camshaft-gpu-cache")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "none",
        "torch": torch.__version__,
        "command": sys.argv,
    }
    file = args.out / "gpu-async.json"
    document["agreement"] = agreement(args.target)
    file.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["agreement"], indent=1), flush=True)
    if any(50 * max(e["samples_that_differ"]) > e["samples"] for e in document["agreement"].values()):
        sys.exit(1)
    if DEVICE == "cuda":
        document["hidden_waits"] = hidden_waits(args.target)
        print(json.dumps(document["hidden_waits"], indent=1), flush=True)
    if not args.skip_speed:
        document["speed"] = rows = speed(args.layers, args.sequences, args.target)
        file.write_text(json.dumps(document, indent=1) + "\n")
        print(" ".join(f"{name:>12}" for name in rows[0]))
        for row in rows:
            print(" ".join(f"{v:>12.3f}" if isinstance(v, float) else f"{v!s:>12}" for v in row.values()))


if __name__ == "__main__":
    main()
