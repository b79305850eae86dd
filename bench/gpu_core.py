"""What is checked and measured of the core on a GPU: kernels' families, then a Llama-3.1-8B-shaped random model.

    python3 bench/gpu_core.py --out OUT [--families llama,gemma2] [--layers 32] [--skip-large]

Writes OUT/gpu-core.json with versions and every number; prints a table last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def eager_tokens(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the first logits of Transformers' eager model."""
    ids = torch.tensor([prompt], device="cuda")
    with torch.no_grad():
        out = model(ids, use_cache=True)
        first = out.logits[0, -1].float()
        tokens = [int(first.argmax())]
        for _ in range(count - 1):
            out = model(
                torch.tensor([[tokens[-1]]], device="cuda"), past_key_values=out.past_key_values, use_cache=True
            )
            tokens.append(int(out.logits[0, -1].argmax()))
    return tokens, first


def family(name: str, target: str, dtype: torch.dtype) -> dict[str, Any]:
    """Greedy agreement of one family's small config with eager, in a batch of mixed lengths with preemption."""
    from families import random_model, tiny_config

    import camshaft
    from camshaft import SamplingParams

    model = random_model(tiny_config(name)).to("cuda", dtype)
    start = time.perf_counter()
    engine = camshaft.compile(
        model, target=target, dtype=dtype, max_seq_len=128, max_batch_tokens=64, max_sequences=8, block_size=16
    )
    seconds = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 5, 17, 30, 45, 60, 12, 33)]
    cache = sum(group.bytes_per_block for group in engine.cache_groups) * 14
    with camshaft.LLM(engine, kv_cache_bytes=cache, policy="max_utilization") as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0))
        preemptions = llm.stats().scheduler.preemptions
    equal = total = 0
    for prompt, output in zip(prompts, outputs):
        tokens, _ = eager_tokens(model, prompt, 24)
        equal += sum(a == b for a, b in zip(tokens, output.token_ids))
        total += 24
    return {"build_s": seconds, "agreement": equal / total, "preemptions": preemptions}


def large(layers: int, out: dict[str, Any]) -> None:
    """Llama-3.1-8B shape, random bf16 weights made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import camshaft
    from camshaft import SamplingParams

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    out["model_s"] = time.perf_counter() - start
    os.environ["CAMSHAFT_CACHE"] = "/tmp/camshaft-gpu-cache"
    for label in ("build", "second_build"):
        start = time.perf_counter()
        engine = camshaft.compile(model, max_seq_len=4096, max_batch_tokens=8192, max_sequences=256)
        out[f"{label}_s"] = time.perf_counter() - start
        out[f"{label}_phases"] = engine.manifest.timings
    out["engine"] = repr(engine)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, config.vocab_size, (int(n),), generator=generator).tolist()
        for n in torch.randint(16, 200, (16,), generator=generator)
    ]
    references = [eager_tokens(model, prompt, 32) for prompt in prompts]
    out["first_logits"] = {"std": float(torch.stack([r[1] for r in references]).std())}
    start = time.perf_counter()
    llm = camshaft.LLM(engine, memory_fraction=0.8)
    first = llm.generate([prompts[0]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    out["llm_to_first_token_s"] = time.perf_counter() - start
    out["ledger"] = str(llm.memory)
    del first
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=1))
    equal = [sum(a == b for a, b in zip(o.token_ids, r[0])) for o, r in zip(outputs, references)]
    prefix = [
        next((i for i, (a, b) in enumerate(zip(o.token_ids, r[0])) if a != b), 32) for o, r in zip(outputs, references)
    ]
    errors = []
    for output, (_, logits) in zip(outputs, references):
        reference = torch.log_softmax(logits, -1)
        chosen = output.token_ids[0]
        errors.append(abs(float(reference[chosen]) - output.logprobs[0][chosen].logprob))
    out["greedy"] = {
        "first_token_agreement": sum(o.token_ids[0] == r[0][0] for o, r in zip(outputs, references)) / 16,
        "token_agreement": sum(equal) / (16 * 32),
        "common_prefix_mean": statistics.mean(prefix),
        "first_logprob_error_max": max(errors),
    }
    steps: dict[str, float] = {}
    for batch in (1, 8, 64, 256):
        requests = [torch.randint(0, config.vocab_size, (128,), generator=generator).tolist() for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        llm.generate(requests, params)
        start = time.perf_counter()
        llm.generate(requests, params)
        steps[str(batch)] = batch * 64 / (time.perf_counter() - start)
    out["tok_s_128_64"] = steps
    llm.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", default="llama,gemma2,gpt_oss,bloom,mixtral,qwen3")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--skip-large", action="store_true")
    options = parser.parse_args()
    import transformers
    import triton

    results: dict[str, Any] = {
        "command": "python3 " + " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
    }
    path = options.out / "gpu-core.json"

    def section(name: str, function: Any) -> None:
        start = time.perf_counter()
        try:
            results[name] = function()
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
        entry = results[name]
        entry["section_s"] = time.perf_counter() - start
        print(name, json.dumps({k: v for k, v in entry.items() if k != "trace"})[:700], flush=True)
        if "trace" in entry:
            print(entry["trace"], flush=True)
        path.write_text(json.dumps(results, indent=1))

    torch.backends.cuda.matmul.allow_tf32 = False
    for name in filter(None, options.families.split(",")):
        section(f"{name} eager fp32", lambda n=name: family(n, "eager", torch.float32))
        section(f"{name} inductor fp32", lambda n=name: family(n, "inductor", torch.float32))
    if not options.skip_large:
        entry: dict[str, Any] = {}

        def run_large() -> dict[str, Any]:
            try:
                large(options.layers, entry)
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
                entry["trace"] = traceback.format_exc()[-2000:]
            return entry

        section("llama-8b bf16", run_large)


if __name__ == "__main__":
    main()
