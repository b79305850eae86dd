"""Whole engines of a Llama-3.1-8B-shaped random model in several recipes: milliseconds of decode steps, TFLOP/s of prompts.

    python3 bench/gpu_quant_model.py --out OUT [--recipes bf16,fp8,w8a16,w4a16,w4a8] [--batches 1,8,32,64,256] [--seconds 300]

Every recipe has a process of its own. All of them build and prepare their engines at once, which is the host's work; then one
after another times its steps, alone on the GPU: the same step again and again, as the runtime calls it (CUDA graphs), by the
host's clock. A decode step has --context tokens in each sequence's cache; a prompt step is --prompt-tokens in sequences of 2,048.
Weights are drawn at random and rounded to nearest on the device, with one candidate for each scale.

Writes OUT/gpu-quant-model.json after each recipe; one that fails leaves its error. `--device cpu --shape small` tries the script
without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

RECIPES = {
    "bf16": None, "fp8": "fp8", "fp8_lm_head": "fp8_lm_head", "w8a16": "int8_weight_only", "w4a16": "int4", "w4a8": "w4a8",
    "w8a8": "int8", "fp8_block": "fp8_block", "nvfp4": "nvfp4_weight_only",
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 512,
}  # fmt: skip
PROMPT = 2048
"""Tokens of a sequence of a prompt step."""
_WARMUP = 4
"""Steps before the clock: the second of a shape is captured, the next replays it."""
_STEP_BUDGET_S = 0.6
"""Time that the repeated steps of one measurement take, about."""


# ------------------------------------------------------------------------------------------------- one recipe, in a child
def open_model(shape: str, device: str, layers: int | None) -> Any:
    """The random model."""
    from camshaft.models.random_weights import RandomWeights

    weights = RandomWeights.of("llama-3.1-8b" if shape == "small" else shape, device=device)
    for key, number in (SMALL if shape == "small" else {}).items():
        setattr(weights.config, key, number)
    if layers is not None:
        weights.config.num_hidden_layers = layers
    return weights


def build(args: argparse.Namespace, out: dict[str, Any]) -> Any:
    """The engine with its weights on the device, its KV cache and its captured decode steps."""
    import camshaft

    begun = time.perf_counter()
    name = RECIPES[args.child]
    recipe = None if name is None else replace(camshaft.Recipe.named(name), candidates=1)
    batches = [int(batch) for batch in args.batches.split(",")]
    largest, longest = max(batches), max(args.context, min(PROMPT, args.prompt_tokens))
    on_gpu = args.device == "cuda"
    engine = camshaft.compile(
        open_model(args.shape, args.device, args.layers), device=args.device, dtype="bfloat16" if on_gpu else "float32",
        target="inductor" if on_gpu else "eager", max_seq_len=longest + 16, max_batch_tokens=max(args.prompt_tokens, largest),
        max_sequences=largest, buckets=sorted({*batches, args.prompt_tokens}) if on_gpu else None, quantize=recipe, cache=False,
    )  # fmt: skip
    out["build_s"], out["phases"] = round(time.perf_counter() - begun, 2), engine.manifest.timings
    begun = time.perf_counter()
    engine.prepare()
    out["weights_s"], out["weights_bytes"] = round(time.perf_counter() - begun, 2), engine.weights_bytes
    begun = time.perf_counter()
    blocks = max(largest * -(-args.context // engine.block_size), -(-args.prompt_tokens // engine.block_size) + 1)
    engine.bind_cache([blocks] * len(engine.cache_groups))
    engine.capture()
    out["capture_s"] = round(time.perf_counter() - begun, 2)
    return engine


def batch_of(engine: Any, sequences: int, rows: int, context: int) -> Any:
    """A step of `rows` tokens of each sequence, which has `context` tokens behind it; the last of each is sampled."""
    import torch
    from camshaft.runtime.batch import Batch, GroupMetadata

    size, device = engine.block_size, engine.device
    width = -(-context // size)
    positions = torch.arange(context - rows, context).repeat(sequences)
    owners = torch.arange(sequences).repeat_interleave(rows)
    tables = torch.arange(sequences * width, dtype=torch.int32).view(sequences, width).to(device)
    slots = (owners * width * size + positions).to(device)
    generator = torch.Generator().manual_seed(0)
    return Batch(
        token_ids=torch.randint(0, engine.vocab_size, (sequences * rows,), generator=generator).to(device),
        positions=positions.to(device),
        groups=tuple(GroupMetadata(slots, tables) for _ in engine.cache_groups),
        query_start=torch.arange(0, sequences * rows + 1, rows, dtype=torch.int32, device=device),
        seq_lens=torch.full((sequences,), context, dtype=torch.int32, device=device),
        sample_rows=torch.arange(rows - 1, sequences * rows, rows, device=device),
        max_query_len=rows, max_seq_len=context, num_decodes=sequences if rows == 1 else 0,
    )  # fmt: skip


def step_ms(engine: Any, batch: Any) -> float:
    """Milliseconds of a step, the median of three runs of many."""
    import torch

    def run(count: int) -> float:
        _synchronize(engine)
        begun = time.perf_counter()
        for _ in range(count):
            logits = engine.step(batch)
        _synchronize(engine)
        seconds = (time.perf_counter() - begun) / count
        assert bool(torch.isfinite(logits[-1]).all()), "logits are not finite"
        return seconds

    run(_WARMUP)
    count = max(1, min(200, int(_STEP_BUDGET_S / 3 / run(1))))
    return 1e3 * sorted(run(count) for _ in range(3))[1]


def _synchronize(engine: Any) -> None:
    import torch

    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace, engine: Any, out: dict[str, Any]) -> None:
    """Decode steps of all batch sizes, and a step of prompts."""
    import torch

    with torch.inference_mode():
        for batch in (int(batch) for batch in args.batches.split(",")):
            out["decode_ms"][batch] = round(step_ms(engine, batch_of(engine, batch, 1, args.context)), 4)
        rows = min(PROMPT, args.prompt_tokens)
        sequences = args.prompt_tokens // rows
        ms = step_ms(engine, batch_of(engine, sequences, rows, rows))
    flops = flops_of(args, sequences, rows)
    out |= {"prefill_ms": round(ms, 3), "prefill_tflops": round(flops / ms / 1e9, 1)}
    out["prefill_tokens"] = sequences * rows
    if engine.device.type == "cuda":
        out["peak_bytes"] = torch.cuda.max_memory_allocated()


def flops_of(args: argparse.Namespace, sequences: int, rows: int) -> int:
    """Of a step of whole prompts: the layers' products, attention, and the head for one row of each."""
    config = open_model(args.shape, "cpu", args.layers).config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size, kv = config.head_dim, config.num_key_value_heads
    matrices = hidden * size * (heads + 2 * kv) + heads * size * hidden + 3 * hidden * inner
    attention = 4 * heads * size * (rows * (rows + 1) // 2)
    layers = config.num_hidden_layers * (2 * matrices * rows + attention)
    return sequences * (layers + 2 * hidden * config.vocab_size)


def child(args: argparse.Namespace) -> None:
    """Builds, says "ready", waits for a line, measures, and prints what it found."""
    out: dict[str, Any] = {"decode_ms": {}}
    try:
        engine = build(args, out)
        print("ready", flush=True)
        sys.stdin.readline()
        measure(args, engine, out)
    except Exception as error:  # a benchmark: recorded, and the other recipes go on
        out |= {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-2500:]}
    print("result " + json.dumps(out), flush=True)
    os._exit(0)  # nothing is worth waiting for


# -------------------------------------------------------------------------------------------------------------- all of them
class Child:
    """A recipe's process."""

    def __init__(self, name: str, args: argparse.Namespace, log: Path) -> None:
        command = [sys.executable, __file__, "--child", name, "--out", str(args.out)]
        for option in ("batches", "context", "prompt_tokens", "shape", "device", "layers"):
            if getattr(args, option) is not None:
                command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        self._log = log
        workers = max(1, (os.cpu_count() or 1) // len(args.recipes.split(",")))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(workers)},
        )  # fmt: skip
        self._changed = threading.Condition()
        self._ready = False
        self._result: dict[str, Any] | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._ready |= line.strip() == "ready"
                if line.startswith("result "):
                    self._result = json.loads(line.removeprefix("result "))
                self._changed.notify_all()
        with self._changed:
            if self._result is None:
                self._result = {"error": f"the process ended: {self._log.read_text()[-1500:]}"}
            self._changed.notify_all()

    def await_ready(self, timeout: float) -> None:
        """Waits until the engine is there, or nothing more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._result is not None, max(timeout, 0.0))

    def measure(self, timeout: float) -> dict[str, Any]:
        """Lets it measure, and returns what it found."""
        with self._changed:
            if self._result is None and self._ready and timeout > 0:
                assert self._process.stdin is not None
                self._process.stdin.write("go\n")
                self._process.stdin.flush()
                self._changed.wait_for(lambda: self._result is not None, timeout)
            found = self._result or {"error": f"no time left; ready: {self._ready}"}
        self._process.kill()
        self._process.wait()
        return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default="bf16,fp8,w8a16,w4a16,w4a8", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--batches", default="1,8,32,64,256")
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache of each sequence that decodes")
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a shape of models/random_weights.py, or small")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the whole script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
    names = args.recipes.split(",")
    if unknown := set(names) - set(RECIPES):
        parser.error(f"unknown recipes {', '.join(sorted(unknown))}; known: {', '.join(RECIPES)}")
    from camshaft.runtime.bench.environment import git_commit, machine, package_versions

    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + args.seconds
    results: dict[str, Any] = {
        "command": "python3 " + " ".join(sys.argv), "machine": machine(), "versions": package_versions(), "commit": git_commit(),
        "context": args.context, "prompt_tokens": args.prompt_tokens, "recipes": {},
    }  # fmt: skip
    children = {name: Child(name, args, args.out / f"gpu-quant-model-{name}.log") for name in names}
    for one in children.values():  # all of them, so that the first is alone when it measures
        one.await_ready(deadline - 15.0 * len(names) - time.perf_counter())
    for name, one in children.items():
        found = results["recipes"][name] = one.measure(deadline - time.perf_counter())
        shown = {key: value for key, value in found.items() if key != "trace"}
        print(f"{name}: {json.dumps(shown)}", flush=True)
        (args.out / "gpu-quant-model.json").write_text(json.dumps(results, indent=1))
    print_table(results["recipes"])


def print_table(recipes: dict[str, dict[str, Any]]) -> None:
    """Milliseconds, and times as fast as the first recipe."""
    first = next(iter(recipes.values()))
    for name, found in recipes.items():
        parts = []
        for batch, ms in found.get("decode_ms", {}).items():
            base = first.get("decode_ms", {}).get(batch)
            parts.append(f"B={batch} {ms:.3f} ms" + (f" ({base / ms:.2f}x)" if base else ""))
        if "prefill_tflops" in found:
            parts.append(f"prefill {found['prefill_ms']:.1f} ms, {found['prefill_tflops']:.0f} TFLOP/s")
        print(f"{name:10} {'  '.join(parts) or found.get('error')}")


if __name__ == "__main__":
    main()
