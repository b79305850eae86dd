"""TensorRT on a GPU: families against eager, then a Llama-3.1-8B-shaped random model with tensorrt, inductor and auto in one run.

    python3 bench/gpu_tensorrt.py --out OUT [--families demo,llama] [--targets tensorrt,inductor,auto] [--layers 32]

Writes OUT/gpu-tensorrt.json: agreement, build split, start to first token, ms per decode step by batch size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_core import Results, eager_tokens, family
from gpu_large import ARTIFACT, artifact, make_model, reload

BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXT = 192
"""Tokens in the cache of each sequence when a decode step is timed."""


def demo(target: str) -> dict[str, Any]:
    """Greedy tokens of the bundled model in fp32 against eager."""
    from camshaft.models import demo as bundled
    from transformers import AutoModelForCausalLM

    import camshaft
    from camshaft import SamplingParams

    model = AutoModelForCausalLM.from_pretrained(
        bundled.path(), dtype=torch.float32, attn_implementation="eager"
    ).cuda()
    start = time.perf_counter()
    engine = camshaft.compile("demo", target=target, device="cuda", dtype="float32", max_seq_len=256,
                              max_batch_tokens=256, max_sequences=16)  # fmt: skip
    seconds = time.perf_counter() - start
    prompts = ["Once upon a time", "def main():", "The standard library"]
    with camshaft.LLM(engine, kv_cache_bytes=1 << 28) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
    equal = total = 0
    for output in outputs:
        tokens, _ = eager_tokens(model, list(output.prompt_token_ids), 48)
        equal += sum(a == b for a, b in zip(tokens, output.token_ids))
        total += 48
    return {"build_s": seconds, "agreement": equal / total, "text": outputs[0].text[:80]}


def decode_times(engine: Any, vocab: int) -> dict[str, Any]:
    """Median ms of a decode step with `CONTEXT` tokens a sequence, by batch size: on the device, and seen from the host."""
    import camshaft
    from camshaft import SamplingParams

    rows: dict[str, Any] = {}
    start = time.perf_counter()
    with camshaft.LLM(engine, memory_fraction=0.6) as llm:
        ready = time.perf_counter() - start
        graphs = llm._core.engine._execution._graphs
        kept: dict[int, Any] = {}
        step = engine.step

        def keep(batch: Any) -> Any:
            size = batch.num_sequences
            if batch.max_query_len == 1 and batch.max_seq_len >= CONTEXT and size not in kept:
                kept[size] = clone(batch)
            return step(batch)

        engine.step = keep
        for size in BATCHES:
            prompts = torch.randint(0, vocab, (size, CONTEXT - 8)).tolist()
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        del engine.step
        for size in BATCHES:
            batch = kept[size]
            for _ in range(3):
                step(batch)
            torch.cuda.synchronize()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(20)]
            begin = time.perf_counter()
            for first, last in events:
                first.record()
                step(batch)
                last.record()
            torch.cuda.synchronize()
            wall = (time.perf_counter() - begin) / len(events)
            times = [first.elapsed_time(last) for first, last in events]
            rows[str(size)] = {
                "ms": statistics.median(times),
                "ms_range": [min(times), max(times)],
                "wall_ms": 1e3 * wall,
            }
        return {
            "llm_ready_s": ready,
            "captured": None if graphs is None else len(graphs.shapes),
            "capture_s": None if graphs is None else graphs.seconds,
            "capture_bytes": None if graphs is None else graphs.num_bytes,
            "decode": rows,
            "ledger": str(llm.memory),
        }


def clone(batch: Any) -> Any:
    """A batch with memory of its own: the builder uses its buffers again."""
    from camshaft.runtime.batch import Batch, GroupMetadata

    groups = tuple(GroupMetadata(g.slot_mapping.clone(), g.block_tables.clone()) for g in batch.groups)
    return Batch(
        batch.token_ids.clone(), batch.positions.clone(), groups, batch.query_start.clone(), batch.seq_lens.clone(),
        batch.sample_rows.clone(), batch.max_query_len, batch.max_seq_len,
    )  # fmt: skip


def large(out: dict[str, Any], model: Any, target: str, *, small: bool, starts: bool) -> None:
    """Build, second build and decode steps of one target; with `starts` its artifact and starts from that."""
    import camshaft

    limits = {"max_seq_len": 4096, "max_batch_tokens": 8192, "max_sequences": 256}
    if small:
        limits = {"max_seq_len": 256, "max_batch_tokens": 512, "max_sequences": 256}
    vocab = model.config.vocab_size
    for label, changed in (
        ("build", {}),
        ("equal_layers_build", {"max_seq_len": limits["max_seq_len"] - 1}),
        ("second_build", {}),
    ):
        start = time.perf_counter()
        engine = camshaft.compile(model, target=target, dtype=torch.bfloat16, **{**limits, **changed})
        out[f"{label}_s"] = time.perf_counter() - start
        out[f"{label}_phases"] = engine.manifest.timings
    out["engine"] = repr(engine)
    out["num_engine_files"] = len(engine.manifest.engines)
    out["choices"] = list(engine.manifest.choices)
    out["report"] = list(engine.manifest.report)
    out.update(decode_times(engine, vocab))
    if not starts:
        return
    prompt = torch.randint(0, vocab, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    with camshaft.LLM(engine, kv_cache_bytes=1 << 28) as llm:
        token = llm.generate([prompt], camshaft.SamplingParams(temperature=0, max_tokens=1))[0].token_ids[0]
    artifact(engine, out)
    del engine
    torch.cuda.empty_cache()
    reload(prompt, token, out)
    shutil.rmtree(ARTIFACT, ignore_errors=True)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", default="demo,llama,qwen3,gemma2,mistral,gpt2,gpt_oss")
    parser.add_argument("--targets", default="tensorrt,inductor,auto")
    parser.add_argument(
        "--starts", default="tensorrt,inductor,auto", help="targets whose artifact is saved and started"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    os.environ["CAMSHAFT_CACHE"] = "/tmp/camshaft-gpu-cache"
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "gpu-tensorrt.json")
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in filter(None, options.families.split(",")):

        def one(entry: dict[str, Any], name: str = name) -> None:
            entry.update(demo("tensorrt") if name == "demo" else family(name, "tensorrt", torch.float32))

        results.section(f"{name} tensorrt fp32", one)
    targets = [name for name in options.targets.split(",") if name]
    if targets:
        model = make_model(options.layers, torch.bfloat16, options.small)
        for target in targets:
            results.section(
                f"8b {target}",
                lambda entry, t=target: large(  # type: ignore[misc]
                    entry, model, t, small=options.small, starts=t in options.starts.split(",")
                ),
            )
    results.write()
    print(json.dumps({key: value.get("error") for key, value in results.data.items() if isinstance(value, dict)}))


if __name__ == "__main__":
    main()
